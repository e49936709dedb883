"""Loaders compared on the same samples: ours, those of other projects, the authors' files, and the lower bound."""
