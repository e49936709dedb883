"""Scores of an encoder on benchmarks: frozen (kNN, probes), finetuned, from scratch, and the oracle's bound."""
