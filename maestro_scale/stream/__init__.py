"""From shards to batches: order of samples, random draws, transforms, and the training and evaluation loaders."""
