"""Data sets, batches and loaders that feed MixMatch."""
