"""maestro_scale pretrains MAESTRO, a masked autoencoder for Earth observation, on clusters, and scores it."""

__version__ = "0.1.0"
