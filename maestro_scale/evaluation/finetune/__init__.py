"""Finetuning of an encoder with a head, and training of the same network from scratch."""
