"""Words in file names that say what a file is: sensors, bands, masks, labels, splits and versions of products."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Literal

Role = Literal["raster", "mask", "label", "area", "skip"]

S2_BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")
_COLOURS = (
    *("coastal", "blue", "green", "yellow", "red", "rededge", "red_edge", "re", "re1", "re2", "re3"),
    *(
        "nir",
        "nir08",
        "nir09",
        "nir2",
        "swir",
        "swir1",
        "swir2",
        "swir16",
        "swir22",
        "lwir",
        "thermal",
        "pan",
    ),
)
_LETTERS = ("r", "g", "b", "n", "i")
_RADAR = ("vv", "vh", "hh", "hv")
_PLAIN = re.compile(r"b\d{1,2}a?|(?:sr|st)_b\d{1,2}|band\d{1,2}")

# Files of quality that become a mask band, by the name of the rule.
MASKS = {
    "scl": "scl",
    "fmask": "fmask",
    "qa_pixel": "qa_pixel",
    "qa60": "qa60",
    "udm": "udm",
    "udm2": "udm2",
    "cloud": "cloud",
    "clouds": "cloud",
    "cloudmask": "cloud",
    "cloudprob": "cloud_percent",
    "cldprb": "cloud_percent",
    "cld": "cloud_percent",
    "cmask": "cloud",
}
_SKIPPED = (
    *("tci", "aot", "wvp", "pvi", "preview", "thumbnail", "quicklook", "browse", "overview", "qa_radsat"),
    *(
        "sr_qa_aerosol",
        "sr_cloud_qa",
        "sr_atmos_opacity",
        "st_qa",
        "st_atran",
        "st_cdist",
        "st_drad",
        "st_emis",
    ),
    *("st_emsd", "st_trad", "st_urad", "vaa", "vza", "saa", "sza", "snwprb", "snw", "dem_mask", "ql", "qi"),
)
_LABELS = (
    *(
        "label",
        "labels",
        "target",
        "targets",
        "gt",
        "groundtruth",
        "annotation",
        "annotations",
        "mask",
        "masks",
    ),
    *(
        "class",
        "classes",
        "landcover",
        "lulc",
        "lc",
        "segmentation",
        "seg",
        "reference",
        "ref",
        "truth",
        "crops",
    ),
    *("biomass", "agb", "yield", "parcels", "lpis", "cosia", "worldcover", "corine", "clc"),
)
_AREAS = ("aoi", "area", "boundary", "extent", "roi", "footprint", "border", "outline", "perimeter")
SPLITS = {
    "train": "train",
    "training": "train",
    "trn": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
    "tst": "test",
}
# The first that occurs in a name wins. Names of rasters are those of the shipped datasets, so that encoders are shared.
_SENSORS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("s1", ("s1", "s1a", "s1b", "s1c", "sentinel1", "sen1", "sar", "grd", "rtc", "s1grd", "s1rtc")),
    (
        "s2",
        ("s2", "s2a", "s2b", "s2c", "sentinel2", "sen2", "msi", "s2l2a", "s2l1c", "msil2a", "msil1c", "s30"),
    ),
    (
        "landsat",
        ("landsat", "landsat8", "landsat9", "lc08", "lc09", "le07", "lt05", "oli", "hls", "l30", "l8", "l9"),
    ),
    (
        "planet",
        ("planet", "planetscope", "psscene", "psscene4band", "analyticms", "analytic", "skysat", "3b"),
    ),
    ("naip", ("naip",)),
    ("spot", ("spot", "spot6", "spot7")),
    ("dem", ("dem", "dsm", "dtm", "srtm", "elevation", "elev", "cop30", "copdem", "ndsm", "chm", "lidar")),
    (
        "aerial",
        ("aerial", "ortho", "orthophoto", "orthomosaic", "mosaic", "drone", "uav", "photo", "rgb", "rgbi"),
    ),
)
_PLATFORM = re.compile(r"S[12][ABCD]|L[COTEM]0[4-9]|LANDSAT_?\d", re.IGNORECASE)
_PLACE = re.compile(r"T?\d{2}[C-HJ-NP-X][A-HJ-NP-Z]{2}|h\d{2}v\d{2}")
_RESOLUTION = re.compile(r"R?\d{1,3}m")
_VERSION = re.compile(r"T[12]|RT|N\d{4}|V\d{1,3}", re.IGNORECASE)


def is_band(word: str) -> bool:
    """Whether a part of a name is the name of a band of images, as ``B04``, ``SR_B5``, ``nir`` or ``VV``."""
    low = word.lower()
    return low in (*_COLOURS, *_LETTERS, *_RADAR) or _PLAIN.fullmatch(low) is not None


def is_beside_bands(word: str) -> bool:
    """Whether a part of a name stands where others have a band, as ``SCL``, ``QA_PIXEL`` or ``TCI``."""
    return word.lower() in MASKS or word.lower() in _SKIPPED


def is_platform(word: str) -> bool:
    """Whether a word names a satellite (``S2A``) or a version (``T1``, ``N0500``), which say nothing of the place."""
    return _PLATFORM.fullmatch(word) is not None or _VERSION.fullmatch(word) is not None


def is_place(word: str) -> bool:
    """Whether a word is a tile of Sentinel-2's or MODIS's grid, as ``T32UMD`` and ``h18v04``."""
    return _PLACE.fullmatch(word) is not None


def is_resolution(word: str) -> bool:
    """Whether a word is the size of a pixel, as ``R10m`` and ``20m``."""
    return _RESOLUTION.fullmatch(word) is not None


def is_known(word: str) -> bool:
    """Whether a word says which raster, mask or label a file belongs to, rather than which place."""
    low = word.lower()
    return any(low in words for words in (MASKS, _SKIPPED, _LABELS, _AREAS, _IMAGES)) or any(
        low in words for _, words in _SENSORS
    )


_IMAGES = (
    "image",
    "images",
    "img",
    "imgs",
    "data",
    "raster",
    "rasters",
    "scene",
    "scenes",
    "tiles",
    "patches",
)


def role_of(words: tuple[str, ...]) -> Role:
    """What the files with these constant words are; the last word that says so counts, short ones (``S1``) least."""
    lows = [w.lower() for w in reversed(words)]
    for word in (*(w for w in lows if len(w) > 2), *(w for w in lows if len(w) <= 2)):
        if word in MASKS:
            return "mask"
        if word in _SKIPPED:
            return "skip"
        if word in _LABELS:
            return "label"
        if word in _AREAS:
            return "area"
        if any(word in names for _, names in _SENSORS) or word in _IMAGES:
            return "raster"
    return "raster"


def label_of(words: tuple[str, ...]) -> str | None:
    """The last of these constant words that says that files are labels."""
    return next((w.lower() for w in reversed(words) if w.lower() in _LABELS), None)


def mask_rule(words: tuple[str, ...]) -> str | None:
    """The rule of :data:`MASKS` for the files with these constant words."""
    return next((MASKS[w.lower()] for w in reversed(words) if w.lower() in MASKS), None)


def sensor_of(words: tuple[str, ...]) -> str | None:
    """The usual name of the sensor that these constant words name, the longest of them (``SENTINEL2``), or None."""
    lows = [w.lower() for w in words]
    lows += [a + b for a, b in pairwise(lows) if b.isdigit()]  # sen-2
    found = [(len(low), name) for name, names in _SENSORS for low in lows if low in names]
    if not found:
        return None
    longest = max(length for length, _ in found)
    name = next(name for length, name in found if length == longest)
    orbit = next(
        (o for o in ("asc", "des") for w in lows if w in (o, f"{o}c", f"{o}cending", f"{o}ending")), ""
    )
    return f"{name}_{orbit}" if orbit and name == "s1" else name


def band_order(band: str) -> tuple[int, int, str]:
    """Sorts bands as sensors list them: B1 … B8, B8A, B9; VV before VH; blue before green before red."""
    low = band.lower().removeprefix("sr_").removeprefix("st_")
    for rank, names in enumerate((_COLOURS, ("r", "g", "b", "n", "i"), _RADAR)):
        if low in names:
            return rank, names.index(low), band
    match = re.search(r"(\d+)(a?)", low)
    return 3, int(match[1]) * 2 + bool(match[2]) if match else 0, band
