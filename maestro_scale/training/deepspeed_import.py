"""Import of DeepSpeed without MLflow, which would take 40 % of its time."""

from __future__ import annotations

import sys
from types import ModuleType


def import_deepspeed() -> ModuleType:
    """The ``deepspeed`` package.

    Its autotuner, which is not used here, imports MLflow if there is one: 1.7 s of processor time at the start of each
    rank, the larger part of the start on a shared file system. None in ``sys.modules`` makes that import fail, which
    the autotuner expects. Call this before threads start: their own import of MLflow would fail meanwhile.
    """
    if "deepspeed" not in sys.modules and "mlflow" not in sys.modules:
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # documented: makes an import fail
        try:
            import deepspeed
        finally:
            del sys.modules["mlflow"]
    else:
        import deepspeed
    return deepspeed
