"""Run the test suite with the oldest or the newest versions of the dependencies that pyproject.toml allows.

    python -m benchmarks.dependencies lowest|newest [--python 3.10] [--venv DIR] [--json F] [-- PYTEST ARGUMENTS]

Creates a virtual environment with uv (in a temporary folder, or kept in --venv, and then reused), installs the
project with all extras there (`--resolution lowest-direct` takes the lowest versions that the bounds in pyproject.toml
allow, and the newest of what those need), and runs pytest: the whole suite unless arguments follow `--`. The result,
versions and counts, is stored under the end and the arguments. Needs uv; about 7 GB of disk where torch is a build
with CUDA.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "dependencies.json"
RESOLUTIONS = {"lowest": "lowest-direct", "newest": "highest"}
DEFAULT_PYTHON = {
    "lowest": "3.10",
    "newest": "3.12",
}  # the ends of requires-python; uv finds or installs them

_VERSIONS = """
import json, platform, sys
from importlib.metadata import PackageNotFoundError, version
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps({"python": platform.python_version(), **found}))
"""


def direct_dependencies() -> list[str]:
    """Names of all direct dependencies, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {re.split(r"[\[<>=~! ;]", requirement)[0] for entries in lists for requirement in entries}
    return sorted(names - {project["name"]})


def install(end: str, python: str, venv: Path) -> None:
    """Create the environment. CalledProcessError if the versions of that end cannot be installed together."""
    uv = os.environ.get("UV", "uv")
    subprocess.run([uv, "venv", "--quiet", "--seed", "--python", python, str(venv)], check=True)
    command = [uv, "pip", "install", "--python", str(venv / "bin" / "python")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = ",".join(project["optional-dependencies"])
    resolution = ["--resolution", RESOLUTIONS[end]]
    subprocess.run([*command, *resolution, "--editable", f".[{extras}]"], cwd=ROOT, check=True)
    if not Path("/dev/nvidiactl").exists():
        # A build of torch with CUDA brings triton, and DeepSpeed 0.19 cannot be imported with triton but without a
        # GPU. The CPU build, which such a machine would have, does not bring it.
        subprocess.run([uv, "pip", "uninstall", "--python", command[-1], "triton"], check=False)


def run_tests(end: str, venv: Path, arguments: list[str]) -> dict[str, object]:
    """Counts of pytest's last line, and the failed tests."""
    environment = {
        **os.environ,
        "PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "VIRTUAL_ENV": str(venv),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MAESTRO_DEPENDENCIES": end,
    }
    environment.pop("PYTHONPATH", None)
    command = [str(venv / "bin" / "python"), "-m", "pytest", "-rfE", "-p", "no:cacheprovider", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip())
    process.wait()
    summary = next((line for line in reversed(lines) if re.search(r"\d+ (passed|failed|error)", line)), "")
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) ([a-z]+)(?=,| in )", summary)}
    failed = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return {"returncode": process.returncode, "counts": counts, "failed": failed}


def main() -> None:
    """Install, test, and update the entry of this end in the JSON file; exit code of pytest."""
    end_of_own = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    own, pytest_arguments = sys.argv[1:end_of_own], sys.argv[end_of_own + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("end", choices=RESOLUTIONS)
    parser.add_argument("--python", help="version or path of the interpreter")
    parser.add_argument("--venv", type=Path, help="keep the environment here, or reuse it")
    parser.add_argument("--json", type=Path, default=RESULT)
    arguments = parser.parse_args(own)
    with tempfile.TemporaryDirectory(prefix="dependencies-") as folder:
        venv = (arguments.venv or Path(folder) / "venv").absolute()
        if not (venv / "bin" / "python").exists():
            install(arguments.end, arguments.python or DEFAULT_PYTHON[arguments.end], venv)
        listed = subprocess.run(
            [str(venv / "bin" / "python"), "-c", _VERSIONS, *direct_dependencies()],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        result = {"versions": json.loads(listed), **run_tests(arguments.end, venv, pytest_arguments)}
    recorded = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    recorded.setdefault(arguments.end, {})[shlex.join(pytest_arguments) or "whole suite"] = result
    arguments.json.write_text(json.dumps(recorded, indent=1) + "\n")
    print(f"{arguments.end}: {result['counts']} with {result['versions']}")
    raise SystemExit(result["returncode"])


if __name__ == "__main__":
    main()
