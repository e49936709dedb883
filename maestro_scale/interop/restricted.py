"""Restricted loading of pickled checkpoints from others, without executing their code.

A pickle can run arbitrary code when it is loaded. torch's restricted unpickler reads tensors, numbers, text and plain
containers. Other objects that training frameworks store in checkpoints, such as configuration objects, become an
:class:`InertRecord` if they come from known packages; a file that names anything else is refused before unpickling.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from maestro_scale.interop.export import ExportError

# Packages whose objects become records. None of them is imported.
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
    """Placeholder for an object whose class is not loaded: constructor ``args`` and ``fields`` of its state."""

    args: tuple[Any, ...]
    fields: dict[str, Any]

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
    """Load a ``torch.save`` file on the CPU, with memory-mapped tensors.

    Raises:
        ExportError: the file is missing, damaged or not a torch checkpoint, or it names code outside
            ``INERT_PACKAGES``.
    """
    if not path.is_file():
        raise ExportError(f"{path}: does not exist")
    if not zipfile.is_zipfile(path):
        raise ExportError(
            f"{path}: is not a checkpoint of torch 1.6 or later (not a zip archive), or is cut short: "
            "download it again"
        )
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        if refused := sorted(n for n in foreign if n.partition(".")[0] not in INERT_PACKAGES):
            raise ExportError(
                f"{path}: would run {', '.join(refused[:3])} when it is loaded, which a checkpoint does not need; "
                "nothing was run. Do not use this file, or ask its author to save the state dict alone"
            )
        with torch.serialization.safe_globals([(_record_class(n), n) for n in foreign]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise ExportError(f"{path}: cannot be read as a checkpoint ({str(error).splitlines()[0]})") from None


def _record_class(name: str) -> type[InertRecord]:
    module, _, attribute = name.rpartition(".")
    return type(attribute, (InertRecord,), {"__module__": module, "__qualname__": attribute})
