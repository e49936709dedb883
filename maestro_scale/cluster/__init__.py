"""What runs around the trainer on a cluster: health of nodes, starts and restarts, and what ``doctor`` finds."""
