"""The training engine: trainer, objectives, hooks, checkpoints and metrics."""
