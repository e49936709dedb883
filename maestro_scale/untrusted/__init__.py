"""Bounded parsers for data from outside: JSON, YAML, tar listings, safetensors headers and zstd frames.

Manifests, shards, recipes, results and checkpoints may come from others. Each function here limits size, nesting,
number of entries and length of numbers *before* it allocates memory or recurses, so a malformed document ends in one
:class:`InputError` within seconds and 1 GiB of memory. No other module calls the underlying
parsers. SECURITY.md lists the limits.
"""

from maestro_scale.untrusted.arrays import NpyLayout, NpzArrays, load_npz, npy_layout, open_npy, parse_npz
from maestro_scale.untrusted.documents import (
    check_regular,
    check_size,
    field_of,
    load_json,
    read_bytes,
    read_json,
    read_json_lines,
    read_record,
)
from maestro_scale.untrusted.limits import (
    COUNTS_BYTES,
    DOCUMENT,
    FIELD_BYTES,
    FRAME_BYTES,
    HEADER,
    MANIFEST,
    RECIPE,
    TENSOR_AXES,
    InputError,
    Limits,
    is_relative_path,
    size_text,
)
from maestro_scale.untrusted.records import from_builtins
from maestro_scale.untrusted.tar import TarMember, list_tar, list_tar_file
from maestro_scale.untrusted.tensors import (
    TensorEntry,
    decompress_frame,
    load_tensors,
    open_tensors,
    parse_safetensors_header,
    split_safetensors_header,
)
from maestro_scale.untrusted.yaml_documents import load_yaml
from maestro_scale.untrusted.zip import open_zip

__all__ = [
    "COUNTS_BYTES",
    "DOCUMENT",
    "FIELD_BYTES",
    "FRAME_BYTES",
    "HEADER",
    "MANIFEST",
    "RECIPE",
    "TENSOR_AXES",
    "InputError",
    "Limits",
    "NpyLayout",
    "NpzArrays",
    "TarMember",
    "TensorEntry",
    "check_regular",
    "check_size",
    "decompress_frame",
    "field_of",
    "from_builtins",
    "is_relative_path",
    "list_tar",
    "list_tar_file",
    "load_json",
    "load_npz",
    "load_tensors",
    "load_yaml",
    "npy_layout",
    "open_npy",
    "open_tensors",
    "open_zip",
    "parse_npz",
    "parse_safetensors_header",
    "read_bytes",
    "read_json",
    "read_json_lines",
    "read_record",
    "size_text",
    "split_safetensors_header",
]
