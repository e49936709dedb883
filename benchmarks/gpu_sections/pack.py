"""What a bare machine needs to run the benchmark: code, recipes and wheels, of at most 64 MiB."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

_REPO = Path(__file__).parents[2]
_PATHS = ("maestro_scale", "benchmarks", "recipes", "pyproject.toml", "README.md")
LIMIT_BYTES = 64 * 2**20


class PackError(Exception):
    """The files cannot be packed; the message says why."""


def files_to_pack(wheels: Path | None = None) -> dict[str, Path]:
    """{path at the destination: file}: what git tracks of the code, new files included, and the wheels in ``.whl/``.

    PackError outside of a git checkout, without a wheel in ``wheels``, or above 64 MiB.
    """
    command = [
        "git",
        "-C",
        str(_REPO),
        "ls-files",
        "--cached",
        "--others",
        "--exclude-standard",
        "-z",
        *_PATHS,
    ]
    try:
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError) as error:
        raise PackError(f"{_REPO} is not a git checkout: {error}") from None
    unneeded = "benchmarks/results/"
    files = {n: _REPO / n for n in names if n and not n.startswith(unneeded) and (_REPO / n).is_file()}
    if wheels is not None:
        found = sorted(wheels.glob("*.whl"))
        if not found:
            raise PackError(f"{wheels} contains no wheel: see docs/gpu.md for the command")
        files |= {f".whl/{p.name}": p for p in found}
    size = sum(p.stat().st_size for p in files.values())
    if size > LIMIT_BYTES:
        largest = max(files, key=lambda n: files[n].stat().st_size)
        raise PackError(
            f"{size / 2**20:.1f} MiB, at most {LIMIT_BYTES / 2**20:.0f} can travel; the largest file is {largest}"
        )
    return files


def list_files(files: dict[str, Path]) -> None:
    """Print names, sizes and the total."""
    for name, path in files.items():
        print(f"{path.stat().st_size:>10,}  {name}")
    total = sum(p.stat().st_size for p in files.values())
    print(f"{total:>10,}  {len(files)} files, {total / 2**20:.1f} of {LIMIT_BYTES / 2**20:.0f} MiB")


def pack(files: dict[str, Path], folder: Path) -> None:
    """Copy the files to ``folder``, which must not exist or be empty; else PackError."""
    if folder.exists() and any(folder.iterdir()):
        raise PackError(f"{folder} is not empty: use another folder")
    for name, path in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
