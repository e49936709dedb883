"""What a run measures about itself: speed, memory, node statistics, and metrics.jsonl."""
