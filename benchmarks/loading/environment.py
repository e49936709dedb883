"""The environment of the other loaders: created with uv or venv, and filled by pip."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

PACKAGES = {
    "webdataset": "webdataset",
    "mosaicml-streaming": "mosaicml-streaming",
    "litdata": "litdata",
    "lance": "pylance",
}
"""{peer: its package}."""
_SHARED = ("torch<2.14", "numpy")


def create(folder: Path) -> dict[str, str]:
    """Install each peer into the environment in ``folder``, which is created where it is missing.

    Returns {peer: why it could not be installed}: the others can still be measured.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        _create_empty(folder)
    missing = _missing(python, ("torch", "numpy", *PACKAGES.values()))
    if {"torch", "numpy"} & missing:
        _install(python, _SHARED, check=True)
    wanted = {peer: package for peer, package in PACKAGES.items() if package in missing}
    return {
        peer: why for peer, package in wanted.items() if (why := _install(python, (package,), check=False))
    }


def _missing(python: Path, packages: tuple[str, ...]) -> set[str]:
    """Those that are not installed."""
    script = "import importlib.metadata as m; print(*(d.metadata['Name'] for d in m.distributions()))"
    done = subprocess.run([str(python), "-c", script], capture_output=True, text=True, check=True)
    return set(packages) - set(done.stdout.split())


def _create_empty(folder: Path) -> None:
    if uv := shutil.which("uv"):
        command = [uv, "venv", "--quiet", "--seed", "--python", sys.executable, str(folder)]
        if subprocess.run(command, check=False).returncode == 0:
            return
    venv.create(folder, with_pip=True, clear=True)


def _install(python: Path, packages: tuple[str, ...], check: bool) -> str:
    """Install; the last line of pip's message if it fails, else empty."""
    # pip, not uv: its settings on this machine (indexes, folders of wheels) also choose the build of torch.
    command = [str(python), "-m", "pip", "install", "--quiet", *packages]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if check:
        raise SystemExit(f"{' '.join(packages)} cannot be installed into {python.parents[1]}: {last}")
    return last
