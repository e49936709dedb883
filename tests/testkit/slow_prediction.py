"""``maestro-scale`` with maps and tables of small parts, and a pause after each batch, to be killed in the middle.

``PAUSE_S``: the pause in seconds.
"""

import os
import sys
import time
from collections.abc import Callable
from typing import Any


def use_small_parts(set_attribute: Callable[[Any, str, Any], None]) -> None:
    """Parts of 32 × 32 pixels, or of 9 windows."""
    from maestro_scale.inference import run, windows

    for module, name, value in ((windows, "BLOCK", 32), (windows, "_LEAST", 32), (run, "_POINTS", 9)):
        set_attribute(module, name, value)


if __name__ == "__main__":
    from maestro_scale.inference import run

    use_small_parts(setattr)
    run.MEMORY_BYTES["cpu"] = 1
    batches = run._batches

    def slow_batches(*args: Any) -> Any:
        for batch in batches(*args):
            yield batch
            time.sleep(float(os.environ["PAUSE_S"]))

    run._batches = slow_batches
    from maestro_scale.cli import main

    sys.argv[0] = "maestro-scale"
    main()
