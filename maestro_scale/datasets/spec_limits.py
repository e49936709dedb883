"""Limits of single values in a dataset spec: names, counts, extents in metres, scales.

No real dataset comes near the limits. Beyond them a typing error, or a manifest that was made to exhaust the memory of
its reader, is more likely than a sensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from maestro_scale.datasets.spec import Scale
from maestro_scale.errors import KeyPath, shorten

Problem = tuple[KeyPath, str]
"""(path of the field from the object that was checked, reason): ``(("sensors", 0, "patch"), "4 does not …")``."""

MAX_SIDE = 32_768  # pixels
MAX_DATES = 4096
MAX_POS_GRID = 4096
MAX_ITEMS = 1000  # modalities, targets, sensors
MAX_CLASSES = 10_000  # of a classification, whose index is stored as int16
MAX_UNITS = 40  # characters
NUM_CLASS_INDICES = 256  # a segmentation is stored as uint8
_MIN_EXTENT_M, _MAX_EXTENT_M = 1e-4, 1e7
_MIN_DIVISOR, _MAX_DIVISOR = 1e-12, 1e12
_MAX_NAME = 100  # characters; names are parts of file names
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_RESERVED = ("target", "ref_date")  # fields of a stored sample
_MODULE_ATTRIBUTES = """
    T_destination add_module apply bfloat16 buffers call_super_init children clear compile cpu cuda double dump_patches
    eval extra_repr float forward get_buffer get_extra_state get_parameter get_submodule half ipu items keys
    load_state_dict modules mtia named_buffers named_children named_modules named_parameters parameters pop
    register_backward_hook register_buffer register_forward_hook register_forward_pre_hook
    register_full_backward_hook register_full_backward_pre_hook register_load_state_dict_post_hook
    register_load_state_dict_pre_hook register_module register_parameter register_state_dict_post_hook
    register_state_dict_pre_hook requires_grad_ set_extra_state set_submodule share_memory state_dict to to_empty
    train training type update values xpu zero_grad
"""
"""Attributes of torch.nn.ModuleDict, which cannot be keys of one. Listed, because this layer does not import torch."""


def name_problem(name: str) -> str | None:
    """Why ``name`` cannot be part of the names of fields, which join names with dots, and of files."""
    if not _NAME.fullmatch(name) or name in _RESERVED:
        return f"{shorten(name)} is not a valid name; use letters, digits, '_' and '-'"
    if len(name) > _MAX_NAME:
        return f"{shorten(name)} has {len(name)} characters; use at most {_MAX_NAME}"
    return None


def module_name_problem(name: str) -> str | None:
    """Why torch cannot name a part of the model ``name``."""
    if not name or "." in name or not name.isprintable() or len(name) > _MAX_NAME:
        return f"{shorten(name)} is not a valid name; use at most {_MAX_NAME} letters, digits, '_' and '-'"
    if name in _MODULE_ATTRIBUTES.split():
        return f"{name!r} is reserved by torch; use another name"
    return None


def extent_problems(field: str, value: float) -> Iterator[Problem]:
    """Why ``value`` is not an extent or a resolution in metres."""
    if not (math.isfinite(value) and value > 0):
        yield (field,), f"is {value:g}, must be a positive number of metres"
    elif not _MIN_EXTENT_M <= value <= _MAX_EXTENT_M:
        yield (field,), f"is {value:g}, must be from {_MIN_EXTENT_M:g} to {_MAX_EXTENT_M:g} metres"


def count_problems(field: str, value: int, largest: int) -> Iterator[Problem]:
    """Why ``value`` is not from 1 to ``largest``."""
    if value < 1:
        yield (field,), f"is {value}, must be at least 1"
    elif value > largest:
        yield (field,), f"is {value}; at most {largest} is supported"


def scale_problems(scale: Scale) -> Iterator[Problem]:
    """Why values cannot be divided by this; also of NaN, which compares as False."""
    low, high = _MIN_DIVISOR, _MAX_DIVISOR
    if not low <= scale.divisor <= high:
        yield ("divisor",), f"is {scale.divisor:g}, must be a positive number from {low:g} to {high:g}"
