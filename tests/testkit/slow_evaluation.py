"""The trainer with one in-loop evaluation that takes longer.

``SLOW_STEP``: the step that is evaluated slowly. ``SLOW_S``: by how many seconds. ``STARTED``: a file that is created
when it starts.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    from maestro_scale.evaluation import in_loop

    samples, hook = in_loop._Samples, in_loop.InLoopEvaluationHook
    encode, after_step = samples.encode, hook.after_step
    current = {"step": 0}

    def noted_after_step(self: Any, step: Any) -> bool:
        current["step"] = step.position.step
        return after_step(self, step)

    def slow_encode(self: Any, split: str, on_batch: Any) -> Any:
        if split == "val" and current["step"] == int(os.environ["SLOW_STEP"]):
            Path(os.environ["STARTED"]).touch()
            time.sleep(float(os.environ["SLOW_S"]))
        return encode(self, split, on_batch)

    samples.encode, hook.after_step = slow_encode, noted_after_step
    from maestro_scale.train import main
    from maestro_scale.training.distributed import hard_exit

    sys.argv[0] = "train.py"
    hard_exit(main())
