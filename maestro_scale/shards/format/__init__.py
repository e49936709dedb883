"""The storage format: samples, tar shards, sidecar indexes and the manifest."""
