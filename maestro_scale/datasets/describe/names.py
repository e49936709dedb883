"""Patterns of file names: which files are images of one raster, and where their names hold key, date, band and split.

A path is cut into words and the characters between them. Paths with the same characters between their words are
compared word by word: what is the same in all files is constant; what differs is a split, a date, a band, a word that
divides the files into rasters, or else part of the tile's key.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from maestro_scale.datasets.describe import words

Row = tuple[str, ...]  # a path in parts: words and what is between them
Kind = str  # of a part: "const", "split", "date", "band", "key", "any"

_PART = re.compile(
    r"(?<![0-9A-Za-z])\d{4}([-_./])\d{2}\1\d{2}(?![0-9A-Za-z])"
    r"|(?<![0-9A-Za-z])(?:SR_B\d+|ST_B\d+|SR_QA_AEROSOL|SR_CLOUD_QA|SR_ATMOS_OPACITY|QA_PIXEL|QA_RADSAT"
    r"|ST_(?:QA|ATRAN|CDIST|DRAD|EMIS|EMSD|TRAD|URAD)|red_edge|cloud_?mask)(?![0-9A-Za-z])"
    r"|[0-9A-Za-z]+|[^0-9A-Za-z]+",
    re.IGNORECASE,
)
_DATES = (
    ("", r"\d{8}T\d{6}", "%Y%m%dT%H%M%S"),
    ("", r"\d{7}T\d{6}", "%Y%jT%H%M%S"),  # HLS
    ("", r"\d{14}", "%Y%m%d%H%M%S"),
    ("", r"\d{8}", "%Y%m%d"),
    ("", r"\d{4}-\d{2}-\d{2}", "%Y-%m-%d"),
    ("", r"\d{4}_\d{2}_\d{2}", "%Y_%m_%d"),
    ("", r"\d{4}\.\d{2}\.\d{2}", "%Y.%m.%d"),
    ("", r"\d{4}/\d{2}/\d{2}", "%Y/%m/%d"),
    ("A", r"A\d{7}", "%Y%j"),  # MODIS
    ("D", r"D\d{8}", "%Y%m%d"),
)
_WEAK_DATES = (("", r"\d{7}", "%Y%j"), ("", r"\d{6}", "%Y%m"), ("", r"\d{4}", "%Y"))
_FIRST_YEAR, _LAST_YEAR = 1972, 2049  # of satellites; other numbers of eight digits are no dates
_MAX_CLASSES = 100  # folders that may be classes
_IDENTITY = ("key", "date", "joined", "band", "split")
_MAX_RASTERS = 12  # values of a word that divides files into rasters


@dataclass(frozen=True)
class File:
    """A file and what its name says."""

    path: str
    key: str | None = None
    date: datetime | None = None
    band: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Family:
    """Files that differ in place, date, band and split alone. ``words``: the constant words of their paths, in order.

    ``date_format``: of the dates in the names, or "". ``unique``: whether no two files have equal key, date and band.
    ``key_template``: how the key is made of several parts of the pattern; None if it is one. ``folders``: name of a
    folder that is not part of the key → how often it occurs; ``{class}`` stands for it in the pattern.
    """

    pattern: str
    files: tuple[File, ...]
    words: tuple[str, ...]
    date_format: str = ""
    unique: bool = True
    key_template: str | None = None
    folders: Mapping[str, int] = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        """The keys that occur, sorted."""
        return sorted({f.key for f in self.files if f.key is not None})

    @property
    def bands(self) -> list[str]:
        """The bands that occur in the names, in the order of sensors."""
        return sorted({f.band for f in self.files if f.band is not None}, key=words.band_order)


@dataclass
class _Columns:
    """The kinds of the parts of some rows, while they are being found."""

    rows: list[Row]
    kinds: list[Kind]
    formats: dict[int, tuple[str, str]] = field(default_factory=dict)  # date column → (prefix, format)

    def values(self, i: int) -> list[str]:
        return [row[i] for row in self.rows]

    def of(self, kind: Kind) -> list[int]:
        return [i for i, k in enumerate(self.kinds) if k == kind]


def families(paths: Sequence[str], header: Callable[[str], Hashable]) -> list[Family]:
    """The files of ``paths`` by raster, sorted by pattern.

    ``header``: what files of one raster have in common, such as dtype, bands and resolution; called for a few files.
    """
    found: list[Family] = []
    for rows in _by_structure(paths):
        found += _divide(rows, header)
    return sorted(found, key=lambda f: f.pattern)


def _parts(path: str) -> Row:
    return tuple(m[0] for m in _PART.finditer(path))


def _collapsed(path: str) -> Row:
    """The parts of an irregular name: what is no date and no band is joined to one part, within a folder."""
    joined: list[str] = []
    plain = False  # whether the last part may be extended
    *parts, dot, suffix = _parts(path)
    for part in parts:
        typed = _date_of([part], _DATES) is not None or words.is_beside_bands(part) or _is_long_band(part)
        if "/" in part or typed:
            joined.append(part)
            plain = False
        elif plain:
            joined[-1] += part
        else:
            joined.append(part)
            plain = part[0].isalnum()
    return (*joined, dot, suffix)


def _is_long_band(part: str) -> bool:
    return len(part) > 1 and words.is_band(part)


def _by_structure(paths: Sequence[str]) -> Iterator[list[Row]]:
    """Rows of as many parts with the same characters between the words."""
    by_place: dict[Hashable, list[str]] = {}
    for path in paths:
        by_place.setdefault((path.count("/"), path.rpartition(".")[2]), []).append(path)
    for some in by_place.values():
        groups = _grouped(map(_parts, some))
        if len(groups) > 8 and len(groups) > len(some) / 4:
            groups = _grouped(map(_collapsed, some))
        yield from groups


def _grouped(rows: Iterable[Row]) -> list[list[Row]]:
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        shape = tuple("" if part[0].isalnum() else part for part in row)
        groups.setdefault((shape, row[-1]), []).append(row)
    return list(groups.values())


def _divide(rows: list[Row], header: Callable[[str], Hashable]) -> list[Family]:
    columns = _Columns(rows, ["const"] * len(rows[0]))
    varying = [i for i in range(len(rows[0])) if len(set(columns.values(i))) > 1]
    for i in varying:
        columns.kinds[i] = "key"
    _find_splits(columns)
    _find_dates(columns)
    for i in columns.of("key"):
        groups = _rasters_by(columns, i, header)
        if groups is not None:
            return [family for group in groups for family in _divide(group, header)]
    _find_bands(columns)
    _find_key(columns)
    return [_family(columns)]


def _find_splits(columns: _Columns) -> None:
    last_folder = max((i for i, part in enumerate(columns.rows[0]) if "/" in part), default=-1)
    for i in range(len(columns.kinds)):
        in_folder = i < last_folder
        if not columns.of("split") and (in_folder or columns.kinds[i] == "key"):
            values = {v.lower() for v in columns.values(i)}
            if values <= set(words.SPLITS):
                columns.kinds[i] = "split"


def _find_dates(columns: _Columns) -> None:
    for formats in (_DATES, _WEAK_DATES):
        found: dict[int, tuple[str, str]] = {}
        for i, part in enumerate(columns.rows[0]):
            if part[0].isalnum() and columns.kinds[i] in ("const", "key"):
                date_format = _date_of(columns.values(i), formats)
                if date_format and (formats is _DATES or _is_weak_date(columns, i)):
                    found[i] = date_format
        if found:
            _choose_date(columns, found)
            return


def _choose_date(columns: _Columns, found: dict[int, tuple[str, str]]) -> None:
    """Of several dates the first counts, or one of the same day with a time; the rest, as of processing, does not."""
    first = min(found)
    days = [_day(v, *found[first]) for v in columns.values(first)]
    same = [i for i, given in found.items() if [_day(v, *given) for v in columns.values(i)] == days]
    timed = {i: _with_time(columns, i, *found[i]) for i in same}
    chosen = next((i for i in same if "%H" in timed[i]), first)
    for i in found:
        equal = i == chosen or columns.values(i) == columns.values(chosen)
        columns.kinds[i] = "date" if equal else "any" if columns.kinds[i] == "key" else "const"
    columns.formats[chosen] = (found[chosen][0], timed[chosen])
    if timed[chosen] != found[chosen][1]:
        columns.kinds[chosen + 1] = columns.kinds[chosen + 2] = "joined"


def _day(value: str, prefix: str, date_format: str) -> object:
    return datetime.strptime(value[len(prefix) :], date_format).date()


def _with_time(columns: _Columns, i: int, prefix: str, date_format: str) -> str:
    """The format of the date in column ``i``, with the time in the next column if there is one."""
    if "%H" in date_format or i + 2 >= len(columns.kinds) or not columns.rows[0][i + 2][0].isalnum():
        return date_format
    between = {row[i + 1] for row in columns.rows}
    if len(between) == 1 and between < {"_", "-"} and all(_is_time(t) for t in columns.values(i + 2)):
        return f"{date_format}{between.pop()}%H%M%S"
    return date_format


def _is_weak_date(columns: _Columns, i: int) -> bool:
    """A number of four to seven digits is a date where it varies besides something else, or is a folder."""
    others = [j for j in columns.of("key") if j != i]
    folder = "/" in "".join(columns.rows[0][i + 1 : i + 2])
    return folder or (columns.kinds[i] == "key" and bool(others))


def _date_of(values: Sequence[str], formats: Sequence[tuple[str, str, str]]) -> tuple[str, str] | None:
    distinct = set(values)
    for prefix, pattern, date_format in formats:
        if all(re.fullmatch(pattern, v) and _parsed(v[len(prefix) :], date_format) for v in distinct):
            return prefix, date_format
    return None


def _parsed(text: str, date_format: str) -> datetime | None:
    try:
        date = datetime.strptime(text, date_format)
    except ValueError:
        return None
    return date if _FIRST_YEAR <= date.year <= _LAST_YEAR else None


def _is_time(text: str) -> bool:
    return re.fullmatch(r"([01]\d|2[0-3])[0-5]\d[0-5]\d", text) is not None


def _rasters_by(columns: _Columns, i: int, header: Callable[[str], Hashable]) -> list[list[Row]] | None:
    """The rows by their part ``i`` if it divides them into rasters; None if it does not."""
    by_value: dict[str, list[Row]] = {}
    for row in columns.rows:
        by_value.setdefault(row[i], []).append(row)
    values = list(by_value)
    beside = [v for v in values if words.is_beside_bands(v)]
    bands = [v for v in values if words.is_band(v) and v not in beside]
    if beside and len(beside) < len(values):
        rest = [row for v, some in by_value.items() if v not in beside for row in some]
        return [*(by_value[v] for v in beside), rest]
    if len(bands) == len(values):
        return None
    if len(bands) >= 3 and len(values) - len(bands) <= _MAX_RASTERS and _is_crossed(columns, i):
        others = [v for v in values if v not in bands]
        return [*(by_value[v] for v in others), [row for v in bands for row in by_value[v]]]
    if all(map(words.is_platform, values)) or len(values) > _MAX_RASTERS:
        return None
    if all(words.is_known(v) or words.is_resolution(v) for v in values):
        return list(by_value.values())
    if any(v.isdigit() for v in values) or len(columns.rows) == len(values) > 4:
        return None
    headers: list[Hashable] = []
    for some in by_value.values():
        of_value = {header("".join(row)) for row in (some[0], some[len(some) // 2], some[-1])}
        if len(of_value) > 1:
            return None
        headers += of_value
    return list(by_value.values()) if len(set(headers)) > 1 else None


def _is_crossed(columns: _Columns, i: int) -> bool:
    """Whether files that are equal but for part ``i`` occur with at least two values of it, on average."""
    rest = {(*row[:i], *row[i + 1 :]) for row in columns.rows}
    return len(columns.rows) >= 2 * len(rest)


def _find_bands(columns: _Columns) -> None:
    for i in columns.of("key"):
        if not columns.of("band") and all(map(words.is_band, columns.values(i))) and _is_crossed(columns, i):
            columns.kinds[i] = "band"


def _find_key(columns: _Columns) -> None:
    """Of the parts that are left, those that identify the place stay "key"; the others become "any"."""
    kinds, rows = columns.kinds, columns.rows
    for i in columns.of("key"):
        if all(map(words.is_platform, columns.values(i))):
            kinds[i] = "any"
    places = [i for i in columns.of("key") if all(map(words.is_place, columns.values(i)))]
    landsat = [
        i
        for i in columns.of("key")
        if i > 3 and re.fullmatch(r"L[COTEM]0\d", rows[0][i - 4], re.IGNORECASE) and rows[0][i].isdigit()
    ]
    if chosen := places or landsat:
        same = [i for i in chosen if columns.values(i) == columns.values(chosen[0])]
        for i in columns.of("key"):
            kinds[i] = "key" if i in same else "any"
        return
    constant_place = any(words.is_place(part) for i, part in enumerate(rows[0]) if kinds[i] == "const")
    dates = columns.of("date")
    for i in reversed(columns.of("key")):  # after the date there are versions, satellites and times
        if dates and i > dates[0] and (constant_place or _segment(rows[0], i) == _segment(rows[0], dates[0])):
            kinds[i] = "any"
            if not _is_unique(columns):
                kinds[i] = "key"
    last = max((_segment(rows[0], i) for i in columns.of("key")), default=0)
    inner = [i for i in columns.of("key") if _segment(rows[0], i) == last]
    for segment in range(last):  # outer folders are left out of the key where they say nothing new
        outer = [i for i in columns.of("key") if _segment(rows[0], i) == segment]
        if len(inner) == len(outer) == 1 and columns.values(inner[0]) == columns.values(outer[0]):
            continue  # the same key twice
        for i in outer:
            kinds[i] = "any"
        if outer and not _is_unique(columns):
            for i in outer:
                kinds[i] = "key"


def _segment(row: Row, i: int) -> int:
    return sum("/" in part for part in row[:i])


def _identity(columns: _Columns, row: Row) -> Row:
    return tuple(part for part, kind in zip(row, columns.kinds, strict=True) if kind in _IDENTITY)


def _is_unique(columns: _Columns) -> bool:
    return len({_identity(columns, row) for row in columns.rows}) == len(columns.rows)


def _family(columns: _Columns) -> Family:
    kinds, rows = columns.kinds, columns.rows
    spans = list(_key_spans(columns))
    labels = _key_labels(columns, spans)
    folder = _class_folder(columns)
    files = []
    for row in rows:
        date = None
        for i, (prefix, date_format) in columns.formats.items():
            end = i + 3 if "joined" in kinds[i + 1 : i + 2] else i + 1
            date = datetime.strptime("".join(row[i:end])[len(prefix) :], date_format)
        band = next((row[i] for i in columns.of("band")), None)
        split = next((words.SPLITS[row[i].lower()] for i in columns.of("split")), None)
        texts = {label: "".join(row[start:end]) for label, (start, end) in zip(labels, spans, strict=True)}
        files.append(File("".join(row), "_".join(texts.values()) or None, date, band, split))
    constant = tuple(
        part for part, kind in zip(rows[0], kinds, strict=True) if kind == "const" and part[0].isalnum()
    )
    return Family(
        pattern=_pattern(columns, spans, labels, folder),
        files=tuple(sorted(files, key=lambda f: f.path)),
        words=constant[:-1],  # without the suffix
        date_format=next((date_format for _, date_format in columns.formats.values()), ""),
        unique=_is_unique(columns),
        key_template="_".join(f"{{{label}}}" for label in dict.fromkeys(labels))
        if len(set(labels)) > 1
        else None,
        folders={} if folder is None else dict(sorted(Counter(columns.values(folder)).items())),
    )


def _class_folder(columns: _Columns) -> int | None:
    """The folder that may name the class of a tile: few words, each with several files."""
    for i in columns.of("any"):
        counts = Counter(columns.values(i))
        is_folder = columns.rows[0][i + 1] == "/" and (i == 0 or "/" in columns.rows[0][i - 1])
        named = all(re.fullmatch(r"[A-Za-z]\w*", name) for name in counts)
        if is_folder and named and len(counts) <= _MAX_CLASSES and min(counts.values()) > 1:
            return i
    return None


def _key_spans(columns: _Columns) -> Iterator[tuple[int, int]]:
    """(start, end) of the parts that form a key: from the first to the last in a folder, unless something of another
    kind lies between them."""
    start = end = -1
    for i, (part, kind) in enumerate(zip(columns.rows[0], columns.kinds, strict=True)):
        if kind == "key":
            again = start >= 0 and columns.values(i) == columns.values(start)
            if again:
                yield start, end
            if start < 0 or again:
                start = i
            end = i + 1
        elif start >= 0 and (kind != "const" or "/" in part):
            yield start, end
            start = -1
    if start >= 0:
        yield start, end


def _key_labels(columns: _Columns, spans: Sequence[tuple[int, int]]) -> list[str]:
    """The name in the pattern of each span: ``key``, or ``part1``, ``part2`` … where spans have different texts."""
    texts = [tuple("".join(row[start:end]) for row in columns.rows) for start, end in spans]
    distinct = list(dict.fromkeys(texts))
    return ["key" if len(distinct) == 1 else f"part{distinct.index(text) + 1}" for text in texts]


def _pattern(
    columns: _Columns, spans: Sequence[tuple[int, int]], labels: Sequence[str], folder: int | None
) -> str:
    starts = {start: (end, label) for (start, end), label in zip(spans, labels, strict=True)}
    text, i = "", 0
    while i < len(columns.kinds):
        kind = columns.kinds[i]
        if i in starts:
            i, label = starts[i]
            text += f"{{{label}}}"
            continue
        if kind == "date":
            prefix, date_format = columns.formats.get(i, next(iter(columns.formats.values())))
            # A folder is matched by itself.
            text += prefix + "/".join(f"{{date:{part}}}" for part in date_format.split("/"))
        elif kind in ("band", "split"):
            text += f"{{{kind}}}"
        elif kind == "any":
            text += "{class}" if i == folder else "*"
        elif kind == "const":
            text += re.sub(r"[{}*]", "*", columns.rows[0][i])  # the characters of patterns
        i += 1
    return text
