"""A simulated accelerator: device tensors with CPU memory, streams, and a recorder of what a GPU would have to do.

Import it only in a process of its own: it registers a torch backend (``simulated``), which cannot be undone.
"""

from testkit.simulated.recorder import Record, Recorder
from testkit.simulated.tensor import DEVICE, SimulatedTensor, recorder, simulation

__all__ = ["DEVICE", "Record", "Recorder", "SimulatedTensor", "recorder", "simulation"]
