"""A simulated accelerator: device tensors with CPU memory, streams, and a recorder of what a GPU would have to do.

``tensor`` registers a torch device (``simulated``), which cannot be undone: import it only in a process of its own.
``recorder`` can be imported anywhere.
"""
