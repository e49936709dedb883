"""Weights in and out: the authors' checkpoints, ours, and plain safetensors."""
