"""Reading shards: download, verification, cache and previews."""
