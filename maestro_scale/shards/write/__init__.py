"""Writing datasets as shards: in parallel, resumable, the same bytes for any number of workers."""
