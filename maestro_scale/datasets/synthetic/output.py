"""Writes synthetic datasets: files are atomic, an interrupted folder can be resumed, other data is never overwritten.

The scenes themselves are in :mod:`maestro_scale.datasets.synthetic.scene`; each dataset's
``synth`` module writes them in its official raw layout.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from maestro_scale import untrusted
from maestro_scale.datasets.spec import DatasetError

MARKER = "synth.json"
SCENES_VERSION = 2
"""Of the scenes. Increase it with every change of their values, so that no folder mixes two versions."""


class Destination:
    """The folder of one synthetic dataset. Opened again, only missing files are written.

    ``what`` identifies the dataset and is stored in ``synth.json``, with the version of the scenes; DatasetError if the
    folder holds anything else. A file is written under a temporary name and renamed, so that one that exists is
    complete.
    """

    def __init__(self, folder: Path, what: Mapping[str, str | int]) -> None:
        self._folder = folder
        self._what = {**what, "generator": SCENES_VERSION}
        if not self._holds_the_same():
            folder.mkdir(parents=True, exist_ok=True)
            self.write_text(MARKER, json.dumps(self._what))

    def write(self, name: str, writer: Callable[[Path], object]) -> None:
        """Call ``writer`` with a temporary path for the file ``name``, unless it exists."""
        path = self._folder / name
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        # The temporary name keeps the suffix, from which some writers infer the format.
        partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
        try:
            writer(partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def write_text(self, name: str, text: str) -> None:
        """Write the file ``name`` unless it exists."""
        self.write(name, lambda path: path.write_text(text, encoding="utf-8"))

    def _holds_the_same(self) -> bool:
        """Whether the folder holds (a part of) this dataset; DatasetError if it holds anything else."""
        marker = self._folder / MARKER
        if not marker.is_file():
            if self._folder.exists() and (not self._folder.is_dir() or any(self._folder.iterdir())):
                raise DatasetError(
                    f"{self._folder}: is not an empty folder; synthetic data goes to a new one"
                )
            return False
        try:
            held = untrusted.read_record(marker)
        except (OSError, ValueError) as error:
            raise DatasetError(f"{marker}: cannot be read ({error}); delete the folder") from error
        if {**held, "generator": SCENES_VERSION} == self._what != held:
            raise DatasetError(
                f"{self._folder}: holds scenes of version {held.get('generator')!r}, which this release (version "
                f"{SCENES_VERSION}) does not write; choose another folder"
            )
        if held != self._what:
            raise DatasetError(
                f"{self._folder}: holds another synthetic dataset ({held}); choose another folder"
            )
        return True
