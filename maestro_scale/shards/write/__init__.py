"""Writing datasets as shards: in parallel, resumable, with the same bytes for any number of workers."""
