"""Patterns of paths: ``s2/{key}/{date:%Y%m%d}_{band}.tif``, and the files below a folder that match one.

A name in braces matches text without ``/``; the same name again matches the same text. ``*`` matches any text without
``/``, and ``**/`` any folders. Dates are matched by their format, bands by the list of the raster's bands.
Between two other names there must be text or a date: else it is not clear where the first one ends, and the time to
find that a path does not match grows with a power of its length.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache

from maestro_scale.datasets.spec import DatasetError
from maestro_scale.errors import shorten

Date = tuple[int, int, int]
"""Year, day of year from 1, hour."""

KEY, DATE, BAND, SPLIT = "key", "date", "band", "split"

_DIRECTIVES = {
    "Y": r"\d{4}", "y": r"\d{2}", "m": r"\d{2}", "d": r"\d{2}", "j": r"\d{3}", "H": r"\d{2}", "M": r"\d{2}",
    "S": r"\d{2}", "f": r"\d{1,6}", "b": r"[A-Za-z]{3}", "B": r"[A-Za-z]+", "%": "%",
}  # fmt: skip
_ANY_DATE = r"\d{4}-?\d{2}-?\d{2}(?:[T_ ]?\d{2}:?\d{2}(?::?\d{2})?)?"  # of {date} without a format
_OFFSET = re.compile(r"(?<=[T_ ])(?P<time>\d\d:?\d\d.*?)(?P<sign>[+-])(?P<hours>\d\d):?(?P<minutes>\d\d)?$")
_DATE_GROUP = re.compile(r"date\d+")
_FIELD = re.compile(r"\{(?P<name>[A-Za-z_]\w*)(?::(?P<format>[^{}]*))?\}|(?P<any>\*\*/|\*+)|(?P<brace>[{}])")


@dataclass(frozen=True)
class Match:
    """What a path says. ``date``: None without ``{date}``, or where it is not a date. ``names``: all other names."""

    key: str | None
    date: Date | None
    band: str | None
    split: str | None
    names: tuple[tuple[str, str], ...]


class Pattern:
    """A compiled pattern. DatasetError (one line) if the text is not one."""

    def __init__(self, text: str, bands: Sequence[str] = (), key: str | None = None) -> None:
        """``bands``: texts that ``{band}`` may be; empty: any. ``key``: the template of the key, if it has several
        names of the pattern: ``{zone}_{row}``."""
        self.text, self._bands = text, tuple(bands)
        self._formats: list[str] = []
        self._check_separators(text)
        self.regex = re.compile(self._regex(text, {}, self._formats))
        # The same, but with any text in the place of a date: to tell a file of another kind from a wrong date.
        self._lenient = re.compile(self._regex(text, {}, None)) if self._formats else None
        self.names = tuple(self.regex.groupindex)
        self._others = tuple(
            n for n in self.names if n not in (KEY, BAND, SPLIT) and not _DATE_GROUP.fullmatch(n)
        )
        self._key = key
        if key is not None:
            self._check_key(key)
        self._parts = self._split(text)

    @property
    def has_key(self) -> bool:
        """Whether a match has a key."""
        return self._key is not None or KEY in self.names

    @property
    def has_date(self) -> bool:
        """Whether the pattern has a date."""
        return bool(self._formats)

    @property
    def has_split(self) -> bool:
        """Whether the pattern has a split."""
        return SPLIT in self.names

    @property
    def num_literal(self) -> int:
        """Characters that every match has."""
        return len(_FIELD.sub("", self.text))

    @property
    def is_literal(self) -> bool:
        """Whether it is one path."""
        return not _FIELD.search(self.text)

    def match(self, path: str) -> Match | None:
        """What the whole of ``path`` says; None if it does not match."""
        found = self.regex.fullmatch(path)
        if found is None:
            return None
        groups = found.groupdict()
        names = tuple((n, groups[n]) for n in self._others)
        key = groups.get(KEY)
        if self._key is not None:
            key = self._key.format_map(groups)
        date = None
        if self._formats:
            texts = [groups[f"date{i}"] for i in range(len(self._formats))]
            try:
                date = parse_date(" ".join(texts), " ".join(self._formats) if self._formats[0] else None)
            except ValueError:
                date = None
        return Match(key, date, groups.get(BAND), groups.get(SPLIT), names)

    def nearly(self, path: str) -> bool:
        """Whether only the date keeps ``path`` from matching."""
        return self._lenient is not None and self._lenient.fullmatch(path) is not None

    def fill(self, **names: str) -> str:
        """The path with these names filled in; others stay."""
        return _FIELD.sub(lambda m: names.get(m["name"] or "", m.group()), self.text)

    def walk(
        self,
        list_folder: Callable[[str], Iterable[tuple[str, bool]]],
        nearly: Callable[[str], None] | None = None,
    ) -> Iterator[tuple[str, Match]]:
        """Paths that match, relative to the root of ``list_folder``, in no order.

        ``list_folder(path)``: (name, whether it is a folder) of each entry; the root is "". No other folders are listed
        than those that can hold a match. ``nearly``: called with paths that match but for their date.
        """
        yield from self._walk("", 0, list_folder, nearly)

    def _walk(
        self,
        folder: str,
        depth: int,
        list_folder: Callable[[str], Iterable[tuple[str, bool]]],
        nearly: Callable[[str], None] | None,
    ) -> Iterator[tuple[str, Match]]:
        while depth < len(self._parts) - 1 and isinstance(part := self._parts[depth], str) and part != "**":
            folder, depth = f"{folder}{part}/", depth + 1
        part, last = self._parts[depth], depth == len(self._parts) - 1
        if part == "**":
            yield from self._walk(folder, depth + 1, list_folder, nearly)
            for name, is_folder in list_folder(folder):
                if is_folder:
                    yield from self._walk(f"{folder}{name}/", depth, list_folder, nearly)
            return
        for name, is_folder in list_folder(folder):
            if last:
                path = folder + name
                if (match := self.match(path)) is not None:
                    yield path, match
                elif nearly is not None and self.nearly(path):
                    nearly(path)
            elif is_folder and not isinstance(part, str) and part.fullmatch(name):
                yield from self._walk(f"{folder}{name}/", depth + 1, list_folder, nearly)

    def _split(self, text: str) -> list[str | re.Pattern[str]]:
        """The parts between slashes: literal text, ``**``, or what a folder's name must match."""
        parts: list[str | re.Pattern[str]] = []
        for part in text.split("/"):
            if part == "**" or not _FIELD.search(part):
                parts.append(part)
            else:
                parts.append(re.compile(self._regex(part, {}, None)))
        return parts

    def _check_separators(self, text: str) -> None:
        """DatasetError if two names that may be any text follow each other."""
        before, end = None, 0
        seen = set()
        for found in _FIELD.finditer(text):
            if found.start() > end:
                before = None
            end = found.end()
            name = found["name"]
            if name is None:
                continue
            is_any = name not in seen and name != DATE and not (name == BAND and self._bands)
            if is_any and before is not None:
                raise DatasetError(
                    f"{text}: {{{before}}} and {{{name}}} have no text between them, so where the first ends is not "
                    "clear; write what is between them, or one name for both"
                )
            before = name if is_any else None
            seen.add(name)

    def _regex(self, text: str, seen: dict[str, str], formats: list[str] | None) -> str:
        """``formats``: receives the formats of dates; None: a date is any text, unless it is next to a name."""
        out, start = "", 0
        for found in _FIELD.finditer(text):
            out += re.escape(text[start : found.start()])
            start = found.end()
            if found["brace"]:
                raise DatasetError(f"{text}: {found.group()} is not a name in braces, such as {{key}}")
            out += self._group(text, found, seen, formats)
        return out + re.escape(text[start:])

    def _group(self, text: str, found: re.Match[str], seen: dict[str, str], formats: list[str] | None) -> str:
        if found["any"]:
            return r"(?:[^/]+/)*" if found["any"] == "**/" else r"[^/]*"
        name, format = found["name"], found["format"] or ""
        if name == DATE:
            if format in seen:
                return f"(?P={seen[format]})"
            if formats is not None and formats and not (format and formats[0]):
                raise DatasetError(f"{text}: a pattern with several dates needs their formats: {{date:%Y}}")
            group = f"date{sum(not name.startswith('{') for name in seen)}"
            seen[format] = group
            if formats is None and not _is_next_to_field(text, found):
                return f"(?P<{group}>[^/]+?)"
            if formats is not None:
                formats.append(format)
            return f"(?P<{group}>{_date_regex(text, format)})"
        if format:
            raise DatasetError(f"{text}: {{{name}}} takes no format, only {{date}} does")
        if _DATE_GROUP.fullmatch(name):
            raise DatasetError(f"{text}: {{{name}}} is reserved; call it otherwise")
        if f"{{{name}}}" in seen:
            return f"(?P={name})"
        seen[f"{{{name}}}"] = name
        if name == BAND and self._bands:
            # The longest first: B8A before B8.
            return f"(?P<band>{'|'.join(re.escape(b) for b in sorted(self._bands, key=len, reverse=True))})"
        return f"(?P<{name}>[^/]+?)"

    def _check_key(self, key: str) -> None:
        for found in _FIELD.finditer(key):
            if found["name"] is None or found["format"] is not None:
                raise DatasetError(f"{key}: the template of a key has names in braces only, such as {{zone}}")
            if found["name"] not in self.names:
                raise DatasetError(
                    f"{key}: the pattern {self.text} has no {{{found['name']}}}; it has {', '.join(self.names)}"
                )


def scan_local(root: str) -> Callable[[str], Iterable[tuple[str, bool]]]:
    """``list_folder`` of :meth:`Pattern.walk` for a local folder. A folder that is not there has no entries."""

    def entries(folder: str) -> Iterator[tuple[str, bool]]:
        path = os.path.join(root, folder)
        try:
            with os.scandir(path) as found:
                for entry in found:
                    yield entry.name, entry.is_dir()
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise DatasetError(
                f"{path}: cannot list the folder ({error.strerror}); check the path"
            ) from error

    return entries


@lru_cache(maxsize=100_000)
def parse_date(text: str, format: str | None) -> Date:
    """(year, day of year, hour) of a date; ``format``: of strptime, None for ISO 8601 and YYYYMMDD. ValueError."""
    if format is None:
        return _triple(_parse_iso(text))
    return _triple(datetime.strptime(text, format))


def parse_date_text(text: str, format: str | None, part: int | None, where: str) -> Date:
    """As :func:`parse_date`, of a text in a table or tag: a date, or a product name of which ``part`` begins with one.

    DatasetError if there is none.
    """
    text = text.strip()
    try:
        if part is None:
            return parse_date(text, format)
        piece = text.split("_")[part]
        return parse_date(
            piece[: len(datetime(2000, 1, 1).strftime(format))] if format else piece[:8], format
        )
    except (ValueError, IndexError):
        wanted = format or "YYYYMMDD or ISO 8601"
        inside = "" if part is None else f" in part {part}"
        raise DatasetError(
            f"{where}: {shorten(text)} is not a date ({wanted}){inside}; set dates.format, or fix it",
            "a date cannot be read",
        ) from None


def _parse_iso(text: str) -> datetime:
    """In UTC; a text without an offset is in UTC."""
    offset = timedelta()
    if found := _OFFSET.search(text):
        hours, minutes = int(found["hours"]), int(found["minutes"] or 0)
        offset = timedelta(hours=hours, minutes=minutes) * (-1 if found["sign"] == "-" else 1)
        text = text[: found.end("time")]
    digits = re.sub(r"[-:T_ Z]", "", text.partition(".")[0])
    if not (digits.isascii() and digits.isdigit()):
        raise ValueError(text)
    formats = {8: "%Y%m%d", 10: "%Y%m%d%H", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}
    if len(digits) not in formats:
        raise ValueError(text)
    return datetime.strptime(digits, formats[len(digits)]) - offset


def _triple(when: datetime) -> Date:
    if not 1 <= when.year <= 9999:
        raise ValueError(when)
    day = when.timetuple()
    return day.tm_year, day.tm_yday, day.tm_hour


def _is_next_to_field(text: str, found: re.Match[str]) -> bool:
    return text[found.start() - 1 : found.start()] in ("}", "*") or text[found.end() : found.end() + 1] in (
        "{",
        "*",
    )


def _date_regex(text: str, format: str) -> str:
    if not format:
        return _ANY_DATE
    out, i = "", 0
    while i < len(format):
        if format[i] == "%":
            code = format[i + 1 : i + 2]
            if code not in _DIRECTIVES:
                known = ", ".join(f"%{c}" for c in _DIRECTIVES)
                raise DatasetError(f"{text}: %{code} is not supported in a date; there are {known}")
            out, i = out + _DIRECTIVES[code], i + 2
        else:
            out, i = out + re.escape(format[i]), i + 1
    return out
