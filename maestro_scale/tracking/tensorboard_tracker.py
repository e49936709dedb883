"""Tracking in TensorBoard: event files in ``RUN_DIR/tensorboard``, with the metrics, pictures and recipe of the run."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from maestro_scale.tracking.tracker import RunStart, TrackerError

FOLDER = "tensorboard"


def check_installed() -> None:
    """TrackerError if TensorBoard is not installed."""
    if find_spec("tensorboard") is None:
        raise TrackerError(
            "tracking.tensorboard: TensorBoard is not installed; pip install 'maestro-scale[tensorboard]'"
        )


class TensorBoardTracker:
    """A ``Tracker`` that writes event files; the writer has a queue and a thread of its own."""

    def __init__(self, start: RunStart) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps that a killed start had logged after its last checkpoint are hidden: they are logged again.
        purge = start.step + 1 if start.step else None
        self._writer = SummaryWriter(str(start.run_dir / FOLDER), purge_step=purge)
        rows = "\n".join(f"    {key}: {value}" for key, value in {**start.params, **start.tags}.items())
        self._writer.add_text("recipe and setup", rows, start.step)

    def log(self, step: int, metrics: Mapping[str, float | None], time_s: float | None = None) -> None:
        """See ``Tracker``."""
        for name, value in metrics.items():
            if value is not None:
                self._writer.add_scalar(name, value, step, time_s)

    def log_picture(self, step: int, path: Path) -> None:
        """See ``Tracker``."""
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._writer.add_image("reconstruction", pixels, step, dataformats="HWC")

    def finish(self, status: str) -> None:
        """See ``Tracker``."""
        del status
        self._writer.close()
