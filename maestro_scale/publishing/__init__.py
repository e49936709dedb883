"""Publish a model on the Hugging Face hub, with a model card written from its run."""
