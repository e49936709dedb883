"""Around the trainer on a cluster: node health checks, task launch, requeue decisions, and the ``doctor`` command."""
