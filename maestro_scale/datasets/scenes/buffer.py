"""Windows of scenes, read once: open files are reused, and a walk along a strip of tiles keeps what it still needs.

Files store blocks of, say, 512×512 pixels, compressed, so the window of a small tile costs the decompression of all the
blocks that it touches. Tiles are therefore read in *runs*: strips of the grid, from west to east. For each scene a
buffer holds the rows of the strip and the columns from the current tile to the end of its blocks; it moves on by whole
blocks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass

import numpy as np

from maestro_scale.datasets.scenes.grid import Box
from maestro_scale.datasets.scenes.images import Scene
from maestro_scale.datasets.scenes.warp import (
    Pixels,
    Shape,
    Window,
    clipped,
    exact_window,
    source_window,
)
from maestro_scale.datasets.sources import protocol
from maestro_scale.datasets.sources.protocol import ImageRef, OpenFile
from maestro_scale.datasets.spec import DatasetError

Opener = Callable[[str, str], AbstractContextManager[OpenFile]]
"""Opens a file: (layer, address). Picklable: it travels to writer processes."""

_MAX_OPEN = 256  # files per process: far below the usual limit of 1024 descriptors
GDAL_CACHE_BYTES = 32 * 2**20
"""Of GDAL's own cache of blocks in a process. By default it takes 5 % of the machine's memory, in each process."""


class OpenFiles:
    """Files that are open in this process, reused, within a bounded cache of GDAL. Reads their images by window.

    All is done in a thread of its own, since GDAL's environment belongs to a thread: sources enter one to open a file,
    and environments must be left in the reverse order, also by whoever else uses GDAL meanwhile. When there are too
    many files, all are closed.
    """

    def __init__(self, opener: Opener, most: int = _MAX_OPEN) -> None:
        self._files = _Files(opener, most)
        self._thread = ThreadPoolExecutor(1)
        self._finalizer = weakref.finalize(
            self, _close, self._thread, self._files
        )  # also when the process ends

    def read(self, layer: str, ref: ImageRef, window: Window) -> Pixels:
        """The pixels of a window of an image; DatasetError if it cannot be read."""
        return self._thread.submit(self._files.read, layer, ref, window).result()

    def close(self) -> None:
        """Close all of them, for good."""
        self._finalizer()


class _Files:
    """What the thread of :class:`OpenFiles` does."""

    def __init__(self, opener: Opener, most: int) -> None:
        self._opener, self._most = opener, most
        self._stack = ExitStack()
        self._open: dict[tuple[str, str], OpenFile] = {}

    def read(self, layer: str, ref: ImageRef, window: Window) -> Pixels:
        try:
            image = self._file(layer, ref.address).image(ref)
            return Pixels(*image.read(protocol.Window(*window)))
        except (
            OSError,
            RuntimeError,
        ) as error:  # of the libraries: the file stays open, outside of its source
            cause = " ".join(str(error.__cause__ or error).split())  # of GDAL, which says more
            raise DatasetError(f"{ref.address}: cannot be read ({cause}); fetch the file again") from error

    def close(self) -> None:
        self._open.clear()
        self._stack.close()

    def _file(self, layer: str, address: str) -> OpenFile:
        import rasterio

        key = layer, address
        if key not in self._open:
            if len(self._open) >= self._most:
                self.close()
            if not self._open:
                self._stack.enter_context(rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE_BYTES // 2**20))
            self._open[key] = self._stack.enter_context(self._opener(layer, address))
        return self._open[key]


def _close(thread: ThreadPoolExecutor, files: _Files) -> None:
    try:
        thread.submit(files.close).result()
    except RuntimeError:  # the interpreter is ending, and has joined its threads
        with suppress(Exception):  # GDAL's environment is not that of this thread
            files.close()
    thread.shutdown(wait=False)


@dataclass
class _Held:
    window: Window
    pixels: Pixels


class Windows:
    """Reads windows of scenes; within :meth:`strip`, from buffers that move on along it. ``crs``: of the grid."""

    def __init__(self, opener: Opener, crs: str) -> None:
        self._files, self._crs = OpenFiles(opener), crs
        self._strip: tuple[float, float] | None = None
        self._held: dict[Scene, _Held] = {}

    @contextmanager
    def strip(self, south: float, north: float) -> Iterator[None]:
        """Read boxes between ``south`` and ``north`` from west to east: each block of a file is read about once."""
        self._strip = south, north
        try:
            yield
        finally:
            self._strip = None
            self._held.clear()

    def read(self, scene: Scene, window: Window, box: Box, shape: Shape) -> Pixels:
        """The pixels of a window within the scene, which is needed for ``box`` as ``shape`` pixels.

        The caller does not change them.
        """
        if self._strip is None:
            return self._direct(scene, window)
        held = self._held.get(scene)
        if held is None or not _contains(held.window, window):
            try:
                held = self._moved(scene, self._wanted(scene, window, box, shape), held)
            except DatasetError:  # a damaged block concerns only the tiles that it is needed for
                return self._direct(scene, window)
            self._held[scene] = held
        row, col = window[0] - held.window[0], window[1] - held.window[1]
        rows, cols = slice(row, row + window[2]), slice(col, col + window[3])
        values, invalid = held.pixels
        return Pixels(values[:, rows, cols], None if invalid is None else invalid[:, rows, cols])

    def leave(self, west: float) -> None:
        """Forget the buffers of scenes that end west of ``west``, which the strip has left behind."""
        for scene in [s for s in self._held if s.box.east <= west]:
            del self._held[scene]

    def close(self) -> None:
        """Close the files."""
        self._files.close()
        self._held.clear()

    def _direct(self, scene: Scene, window: Window) -> Pixels:
        return self._files.read(scene.layer, scene.ref, window)

    def _wanted(self, scene: Scene, window: Window, box: Box, shape: Shape) -> Window:
        """The window of the strip at this column of cells, up to the end of its blocks."""
        assert self._strip is not None
        south, north = self._strip
        column = Box(box.west, min(south, box.south), box.east, max(north, box.north))
        pixel_m = (box.east - box.west) / shape[1]
        tall = round((column.north - column.south) / pixel_m), shape[1]
        exact = exact_window(scene.place, self._crs, column, tall)
        strip = exact or source_window(scene.place, self._crs, column, tall) or window
        height, width = scene.block
        top, bottom = min(strip[0], window[0]), max(strip[0] + strip[2], window[0] + window[2])
        left, right = min(strip[1], window[1]), max(strip[1] + strip[3], window[1] + window[3])
        if exact is None:
            # In another CRS the strip is rotated, so its rows change along it: not before the next block.
            top, bottom = top // height * height, -(-bottom // height) * height
        right = -(-right // width) * width
        wanted = clipped((top, left, bottom - top, right - left), scene.place)
        assert wanted is not None
        return wanted

    def _moved(self, scene: Scene, wanted: Window, held: _Held | None) -> _Held:
        """The pixels of a window, as far as possible from those that are held."""
        if held is None or (held.window[0], held.window[2]) != (wanted[0], wanted[2]):
            return _Held(wanted, self._direct(scene, wanted))
        first, last, stop = held.window[1], held.window[1] + held.window[3], wanted[1] + wanted[3]
        if not (first <= wanted[1] < last < stop):
            return _Held(wanted, self._direct(scene, wanted))
        old, new = held.pixels, self._direct(scene, (wanted[0], last, wanted[2], stop - last))
        kept = slice(wanted[1] - first, None)
        values = np.concatenate([old.values[:, :, kept], new.values], axis=2)
        if old.invalid is None and new.invalid is None:
            return _Held(wanted, Pixels(values, None))
        masks = [np.zeros(p.values.shape, bool) if p.invalid is None else p.invalid for p in (old, new)]
        invalid = np.concatenate([masks[0][:, :, kept], masks[1]], axis=2)
        return _Held(wanted, Pixels(values, invalid if invalid.any() else None))


def _contains(outer: Window, inner: Window) -> bool:
    return (
        outer[0] <= inner[0]
        and outer[1] <= inner[1]
        and outer[0] + outer[2] >= inner[0] + inner[2]
        and outer[1] + outer[3] >= inner[1] + inner[3]
    )
