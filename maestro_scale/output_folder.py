"""What a folder holds that a command is to write to: outputs of different kinds do not share one."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from maestro_scale.errors import MaestroError

Kind = Literal["a run", "shards of a dataset", "an exported model"]
# By the file or folder that each has; a run first, since earlier revisions exported into runs.
_MARKERS: dict[str, Kind] = {
    "checkpoints": "a run",
    "manifest.json": "shards of a dataset",
    "model.safetensors": "an exported model",
}


class OutputError(MaestroError):
    """The folder belongs to something else."""


def check_output(folder: Path, kind: Kind | None = None) -> None:
    """OutputError if ``folder`` holds an output of another kind than ``kind``, as whose part files would be taken."""
    found = next((kind for marker, kind in _MARKERS.items() if (folder / marker).exists()), None)
    if found not in (None, kind):
        raise OutputError(f"{folder} contains {found}: choose another folder for the output")
