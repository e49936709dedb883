"""Known GPUs: memory, peak FLOP/s, memory bandwidth and interconnect, by the vendors' datasheets.

The meter reads the peak for MFU from here, and ``maestro-scale plan`` the rest. A GPU that is not listed has no MFU
rather than a guess.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_GB = 10**9
_TB = 10**12


@dataclass(frozen=True)
class Gpu:
    """A GPU model. ``device_name``: part of the name that the driver reports. ``tflops``: peak of dense bf16 matrix
    products, in TFLOP/s. ``bandwidth``: of its memory, in bytes/s. ``link``: to the GPUs of the same node, in bytes/s
    and direction (NVLink, Infinity Fabric, or PCIe)."""

    device_name: str
    memory_bytes: int
    tflops: float
    bandwidth: float
    link: float


# The order matters where one device name contains another: "NVIDIA H100 NVL" and "NVIDIA H100 PCIe" before "H100",
# which is the SXM module ("NVIDIA H100 80GB HBM3"). "NVIDIA H200 NVL" before "NVIDIA H200".
GPUS = {
    "h100-nvl": Gpu("H100 NVL", 94 * _GB, 835.0, 3.9 * _TB, 300 * _GB),
    "h100-pcie": Gpu("H100 PCIe", 80 * _GB, 756.0, 2.0 * _TB, 64 * _GB),
    "h100": Gpu("H100", 80 * _GB, 989.0, 3.35 * _TB, 450 * _GB),
    "h200-nvl": Gpu("H200 NVL", 141 * _GB, 836.0, 4.8 * _TB, 450 * _GB),
    "h200": Gpu("H200", 141 * _GB, 989.0, 4.8 * _TB, 450 * _GB),
    "b200": Gpu("B200", 180 * _GB, 2250.0, 7.7 * _TB, 900 * _GB),
    "a100-40": Gpu("A100-SXM4-40GB", 40 * _GB, 312.0, 1.555 * _TB, 300 * _GB),
    "a100": Gpu("A100", 80 * _GB, 312.0, 2.039 * _TB, 300 * _GB),
    "l40s": Gpu("L40S", 48 * _GB, 362.0, 0.864 * _TB, 32 * _GB),
    "mi300x": Gpu("MI300X", 192 * _GB, 1307.0, 5.3 * _TB, 448 * _GB),
}


def find_gpu(device_name: str) -> Gpu | None:
    """The GPU that the driver calls ``device_name``, e.g. ``NVIDIA H100 80GB HBM3``; None if it is not listed,
    or a MIG slice, whose peak is only a part of the GPU's."""
    if " MIG " in device_name:
        return None
    # No digit after it: "NVIDIA RTX A1000" is not an A100.
    return next((gpu for gpu in GPUS.values() if re.search(rf"{gpu.device_name}(?!\d)", device_name)), None)
