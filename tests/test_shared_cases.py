"""Inputs on which the project once did the wrong thing: ``run.sh`` of each case ends with 0."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from testkit.runs import REPO

CASES = Path(os.environ.get("MAESTRO_CASES_DIR", REPO.parent / "shared" / "cases"))
# The scripts were written for an older revision: names of then, and of now.
RENAMED = {
    "maestro_scale.shards.manifest": "maestro_scale.shards.format.manifest",
    "maestro_scale.shards.peek import first_sample": "maestro_scale.shards.read.preview import "
    "read_first_sample as first_sample",
    "maestro_scale.shards.verify": "maestro_scale.shards.read.verify",
    "maestro_scale.shards.writer": "maestro_scale.shards.write.writer",
    "quiet_mlflow": "configure_mlflow",
    "RunCard": "RunMetadata",
    "int(time.time() * 1000), print); r.close(": "print); r.close(RunEnd(",
    'RunEnd("done")': 'RunEnd("done", int(time.time() * 1000)))',
    "import MlflowRun,": "import RunEnd, MlflowRun,",
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not CASES.is_dir(), reason=f"no cases at {CASES}; set MAESTRO_CASES_DIR to the folder of cases"
    ),
]


@pytest.fixture
def short_tmpdir() -> Iterator[Path]:
    """A folder for temporary files with a short path: that of ``tmp_path`` is too long for sockets."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.parametrize("name", sorted(script.parent.name for script in CASES.glob("*/run.sh")))
def test_a_case_ends_with_0(name: str, tmp_path: Path, short_tmpdir: Path):
    cases = tmp_path / "cases"  # all of them: one case uses files of another
    for source in CASES.rglob("*"):
        if source.is_file():
            copy = cases / source.relative_to(CASES)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
            if copy.suffix == ".py":
                text = copy.read_text(encoding="utf-8")
                for old, new in RENAMED.items():
                    text = text.replace(old, new)
                copy.write_text(text, encoding="utf-8")
    bin_folder = Path(sys.executable).parent
    env = {
        **os.environ,
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPO),
        "PROJECT": str(REPO),
        "TMPDIR": str(short_tmpdir),
        "WORKDIR": str(tmp_path),
    }
    done = subprocess.run(
        ["bash", str(cases / name / "run.sh")], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
