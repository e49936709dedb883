"""Metrics of a run: throughput, memory, utilisation of nodes, and metrics.jsonl."""
