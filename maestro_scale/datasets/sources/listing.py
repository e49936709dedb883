"""Listing of files that match the pattern of a section, for sources with an image per file."""

from __future__ import annotations

import itertools
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator

from maestro_scale.datasets.description.patterns import BAND, Pattern
from maestro_scale.datasets.description.sections.images import ImageFiles
from maestro_scale.datasets.sources import remote
from maestro_scale.datasets.sources.protocol import ImageRef
from maestro_scale.datasets.spec import DatasetError

log = logging.getLogger(__name__)


def pattern_of(section: ImageFiles) -> Pattern:
    """The pattern of ``section.files``, in which ``{band}`` is one of its bands; DatasetError if it is not valid."""
    assert section.files is not None  # sections without files of their own get those of their raster
    pattern = Pattern(section.files, [str(b) for b in section.band_sources], section.key)
    if BAND in pattern.names and (numbers := [b for b in section.band_sources if isinstance(b, int)]):
        raise DatasetError(
            f"{section.files}: has {{band}}, but band {numbers[0]} is given by number; give the text that stands for it"
        )
    return pattern


def list_files(section: ImageFiles, src: str) -> Iterator[ImageRef]:
    """One image per file that matches, with all bands of the section or, of ``{band}``, one. No file is opened.

    ``src``: a folder, or an address that fsspec lists. Of a web server, which does not list its files, only a path
    without names in braces can be given. ``files`` may be an address itself: then ``src`` does not matter. Files that
    match but for the date, or whose names are no UTF-8, are counted in a warning, with the first.
    """
    if section.files is not None and "://" in section.files:
        # The pattern begins after the last folder that it names without braces.
        src = re.split(r"[{*]", section.files, maxsplit=1)[0].rpartition("/")[0]
        section = section.model_copy(update={"files": section.files[len(src) + 1 :]})
    pattern = pattern_of(section)
    excluded = [Pattern(text) for text in section.exclude]
    every = tuple(range(len(section.band_sources)))
    single = {str(band): (i,) for i, band in enumerate(section.band_sources)}
    undated: list[str] = []
    undecoded: list[str] = []
    count = 0

    def nearly(path: str) -> None:
        nonlocal count
        count += 1
        if not undated:
            undated.append(path)

    if pattern.is_literal and remote.is_remote(address := remote.join(src, pattern.text)):
        yield ImageRef(address, None, None, every)
        return
    # Of a million files, joining each with the root by itself would take most of the time.
    root = remote.join(src, "")
    root = root if root.endswith("/") else f"{root}/"
    for path, match in pattern.walk(remote.scan(src), nearly):
        if any(other.match(path) for other in excluded):
            continue
        if not is_text(path):
            undecoded.append(path)
            continue
        bands = every if match.band is None else single[match.band]
        address = path if path.startswith("/") else root + path
        key = None if match.key is None else sys.intern(match.key)  # the images of a tile share its text
        yield ImageRef(address, key, match.date, bands, match.split, (), match.names)
    if count:
        log.warning(
            "%d files match %s but for the date, which cannot be read; they are left out, the first: %s",
            count,
            section.files,
            undated[0],
        )
    if undecoded:
        log.warning(
            "%d files match %s, but their names are not UTF-8; they are left out, rename them, the first: %s",
            len(undecoded),
            section.files,
            os.fsencode(undecoded[0]).decode(errors="backslashreplace"),
        )


def is_text(path: str) -> bool:
    """Whether a path is Unicode, as it is to be in shards and messages; Linux allows any bytes."""
    return path.isascii() or not any("\ud800" <= character <= "\udfff" for character in path)


def some_names(names: Iterable[str], most: int = 20) -> str:
    """The first names of a list, for messages."""
    shown = list(itertools.islice(names, most + 1))
    return ", ".join(shown[:most]) + (", …" if len(shown) > most else "")
