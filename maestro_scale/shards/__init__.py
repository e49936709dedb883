"""How the data is stored: safetensors samples in tar shards, a manifest, and a store that verifies them."""
