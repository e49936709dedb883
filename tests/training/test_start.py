"""The start of a rank imports only what training uses: every import is paid by every rank, on a shared file system."""

from __future__ import annotations

import subprocess
import sys

import torch

# Torch itself imports sympy early in versions such as 2.6.
SYMPY = ("sympy",) if torch.__version__.startswith("2.13") else ()
SCRIPT = f"""
import sys
from maestro_scale.training.deepspeed_import import import_deepspeed
deepspeed = import_deepspeed()
assert deepspeed is sys.modules["deepspeed"] is import_deepspeed()
import maestro_scale.evaluation.in_loop, maestro_scale.evaluation.run
import maestro_scale.tracking.observers, maestro_scale.tracking.run_report, maestro_scale.training.run
print(*[m for m in ("mlflow", "sklearn", "scipy", "pandas", "pyarrow", "matplotlib", *{SYMPY}) if m in sys.modules])
import mlflow.version  # still possible
"""


def test_training_starts_without_packages_that_it_does_not_use():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, ""), done.stderr
