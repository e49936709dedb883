"""Where synthetic datasets are written: atomically, resumably, and never over anything else.

The scenes themselves are in :mod:`maestro_scale.datasets.synthetic.scene`; each dataset's module says how its official
raw layout holds them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from maestro_scale.datasets.spec import DatasetError

MARKER = "synth.json"


class Destination:
    """A folder that one synthetic dataset is written to; made again, it writes only missing files.

    ``what`` identifies the dataset and is kept in ``synth.json``; a folder that holds anything else is
    refused (DatasetError). Files already there are kept: each is written aside and then renamed.
    """

    def __init__(self, folder: Path, what: Mapping[str, str | int]) -> None:
        self._folder = folder
        self._what = dict(what)
        if not self._holds_the_same():
            folder.mkdir(parents=True, exist_ok=True)
            self.write_text(MARKER, json.dumps(self._what))

    def write(self, name: str, writer: Callable[[Path], None]) -> None:
        """Let ``writer`` fill the file ``name`` unless it is already there."""
        path = self._folder / name
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        # The suffix stays, since some writers choose the format by it.
        partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
        try:
            writer(partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def write_text(self, name: str, text: str) -> None:
        """Write the file ``name`` unless it is already there."""
        self.write(name, lambda path: path.write_text(text, encoding="utf-8"))

    def _holds_the_same(self) -> bool:
        """Whether this dataset was begun here; DatasetError if the folder holds anything else."""
        marker = self._folder / MARKER
        if not marker.is_file():
            if self._folder.exists() and (not self._folder.is_dir() or any(self._folder.iterdir())):
                raise DatasetError(
                    f"{self._folder}: is not an empty folder; synthetic data goes to a new one"
                )
            return False
        try:
            held = json.loads(marker.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DatasetError(f"{marker}: cannot be read ({error}); delete the folder") from error
        if held != self._what:
            raise DatasetError(
                f"{self._folder}: holds another synthetic dataset ({held}); choose another folder"
            )
        return True
