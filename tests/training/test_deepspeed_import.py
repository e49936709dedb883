"""DeepSpeed is imported without MLflow, which stays importable."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
from maestro_scale.training.deepspeed_import import import_deepspeed
deepspeed = import_deepspeed()
assert deepspeed is sys.modules["deepspeed"] is import_deepspeed()
assert "mlflow" not in sys.modules
import mlflow.version
"""


def test_deepspeed_is_imported_without_mlflow():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
