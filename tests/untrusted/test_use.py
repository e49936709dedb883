"""No module but those of ``untrusted`` calls a parser of files directly; the exceptions are listed with a reason."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path("maestro_scale")
PARSERS = {
    "json.load",
    "json.loads",
    "yaml.load",
    "yaml.safe_load",
    "yaml.load_all",
    "yaml.safe_load_all",
    "yaml.unsafe_load",
    "yaml.full_load",
    "tarfile.open",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "torch.load",
    "np.load",
    "numpy.load",
    "np.fromfile",
    "safe_open",
    "load_file",
    "safetensors.torch.load",
    "ast.literal_eval",
    "eval",
    "exec",
    "zstandard.decompress",
    "zipfile.ZipFile",
    "tomllib.load",
    "tomllib.loads",
}
_ANYWHERE = {"safe_open", "load_file"}  # of whatever module
EXCEPTIONS = {
    ("training/distributed.py", "json.loads"): "texts that the ranks of one job exchange",
    ("training/job_store.py", "json.loads"): "failures that the ranks of one job report to each other",
    ("training/manifests.py", "json.loads"): "texts that the ranks of one job exchange",
    ("training/watchdog.py", "json.loads"): "heartbeats that the ranks of one job exchange",
}


def direct_calls(source: str) -> set[str]:
    """The parsers that a module calls, by the names of PARSERS; also under another name, by ``from … import``."""
    names = {}
    found = set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.asname: a.name for a in node.names if a.asname}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        head, dot, rest = called.partition(".")
        full = f"{names.get(head, head)}{dot}{rest}"
        found |= PARSERS & {called, full, *(_ANYWHERE & {full.rpartition(".")[2]})}
        # decompressor.decompress(…) of any zstandard object
        if called.endswith(".decompress"):
            found.add("zstandard.decompress")
    return found


def test_a_direct_call_is_found():
    assert direct_calls("import json as j\nj.loads(x)") == {"json.loads"}
    assert direct_calls("from json import load as l\nl(x)") == {"json.load"}
    assert direct_calls("import safetensors\nsafetensors.safe_open(x)") == {"safe_open"}
    assert direct_calls("d.decompress(x)") == {"zstandard.decompress"}
    assert direct_calls("model.eval(); Manifest.load(x); json.dumps(x)") == set()


def test_only_untrusted_calls_parsers():
    found = {
        (str(path.relative_to(PACKAGE)), call)
        for path in PACKAGE.rglob("*.py")
        if path.parent.name != "untrusted"
        for call in direct_calls(path.read_text())
    }
    assert found == EXCEPTIONS.keys()
