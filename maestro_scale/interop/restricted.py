"""Pickled checkpoints of others, read without running anything of theirs.

torch's own restricted unpickler reads them: tensors, numbers, text and plain containers. What else a training
framework leaves in its checkpoints (configuration objects and the like) becomes an :class:`InertRecord`; a file that
names anything further is refused before a byte of it is unpickled.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from maestro_scale.interop.export import ExportError

# Packages whose objects are kept as records. None of them is imported; a record holds what the object was made of.
INERT_PACKAGES = frozenset(
    {
        "argparse",
        "conf",
        "hydra_zen",
        "lightning",
        "lightning_fabric",
        "lightning_utilities",
        "maestro",
        "numpy",
        "omegaconf",
        "pathlib",
        "pytorch_lightning",
        "ssl_models",
        "torchmetrics",
    }
)


class InertRecord:
    """Stands for an object of a class that is not loaded: ``args`` it was made with, ``fields`` it held."""

    def __new__(cls, *args: Any) -> InertRecord:
        record = object.__new__(cls)
        record.__dict__.update(args=args, fields={})
        return record

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.fields.update(state if isinstance(state, dict) else {"state": state})

    def __repr__(self) -> str:
        return f"<{type(self).__module__}.{type(self).__qualname__} {self.fields or self.args}>"


def load_untrusted(path: Path) -> Any:
    """What ``torch.save`` wrote to ``path``, on the CPU, tensors mapped from the file.

    Raises:
        ExportError: the file is missing, damaged or no such file, or it names code outside ``INERT_PACKAGES``.
    """
    if not path.is_file():
        raise ExportError(f"{path}: there is no such file")
    if not zipfile.is_zipfile(path):
        raise ExportError(
            f"{path}: is no checkpoint of torch 1.6 or later (not a zip archive), or was cut short: "
            "fetch it again"
        )
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        if refused := sorted(n for n in foreign if n.partition(".")[0] not in INERT_PACKAGES):
            raise ExportError(
                f"{path}: asks to run {', '.join(refused[:3])} when it is loaded, which a checkpoint has no need to; "
                "nothing was run. Do not use this file, or have its author save the state dict alone"
            )
        with torch.serialization.safe_globals([(_record_class(n), n) for n in foreign]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise ExportError(f"{path}: cannot be read as a checkpoint ({str(error).splitlines()[0]})") from None


def _record_class(name: str) -> type[InertRecord]:
    module, _, attribute = name.rpartition(".")
    return type(attribute, (InertRecord,), {"__module__": module, "__qualname__": attribute})
