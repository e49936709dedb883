"""Observers of a run (MLflow, terminal), pictures, reports, and the commands that read or send what a run logged."""
