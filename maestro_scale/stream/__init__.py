"""From shards to batches: the order of samples, all random draws, transforms, and the training and evaluation loaders."""
