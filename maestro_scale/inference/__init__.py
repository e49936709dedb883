"""Maps and embeddings of areas larger than what a model sees at once: windows, blending, writers."""
