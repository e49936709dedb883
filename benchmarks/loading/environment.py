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
    _install(python, _SHARED, check=True)
    return {
        peer: why for peer, package in PACKAGES.items() if (why := _install(python, (package,), check=False))
    }


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
