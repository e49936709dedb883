"""Files with many tiles stay open from tile to tile."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from maestro_scale.datasets.description.sections.images import ImageFiles
from maestro_scale.datasets.sources.protocol import OpenFile
from maestro_scale.datasets.sources.table import source_kind, source_of

_MOST = 4


class OpenFiles:
    """The latest files of one section that hold many tiles, open once per process and thread.

    Opening one reads its headers and coordinates, by requests if it is remote. Pickled, it has none open.
    """

    def __init__(self) -> None:
        self._owner = (0, 0)
        self._files: OrderedDict[str, tuple[OpenFile, ExitStack]] = OrderedDict()

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[()]]:
        return OpenFiles, ()

    def __del__(self) -> None:
        if self._owner == _here():
            self.close()

    @contextmanager
    def open(self, section: ImageFiles, address: str) -> Iterator[OpenFile]:
        """As ``open_file`` of the section's source; a file of which many tiles are read stays open after the block,
        unless that ends with an error."""
        if not _holds_many_tiles(section):
            with source_of(section).open_file(address, section) as file:
                yield file
            return
        if self._owner != _here():  # of another process, or in use by another thread
            self._owner, self._files = _here(), OrderedDict()
        files = self._files
        if address not in files:
            stack = ExitStack()
            files[address] = (stack.enter_context(source_of(section).open_file(address, section)), stack)
        files.move_to_end(address)
        while len(files) > _MOST:
            files.popitem(last=False)[1][1].close()
        try:
            yield files[address][0]
        except BaseException:
            if address in files:
                files.pop(address)[1].close()
            raise

    def close(self) -> None:
        """Close all files."""
        while self._files:
            self._files.popitem()[1][1].close()


def _here() -> tuple[int, int]:
    return os.getpid(), threading.get_ident()


def _holds_many_tiles(section: ImageFiles) -> bool:
    return source_kind(section) in ("parquet", "webdataset") or "key" in (section.axes or ())
