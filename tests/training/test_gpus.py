"""The table of known GPUs, by the names that drivers report."""

from __future__ import annotations

import pytest

from maestro_scale.training.metrics.gpus import GPUS, find_gpu


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("AMD Instinct MI300X OAM", "mi300x"),
    ],
)
def test_a_device_name_selects_its_gpu(reported, name):
    assert find_gpu(reported) is GPUS[name]


def test_an_unknown_device_has_no_entry():
    assert find_gpu("NVIDIA GeForce RTX 4090") is None
    assert find_gpu("NVIDIA RTX A1000") is None  # its name contains A100
    assert find_gpu("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None  # a slice of it
