"""Training from the command line: one run, runs side by side, the networks, and a run's answers."""

from gpu_mixmatch.recipes.predict import LoadedModel, load_model

__all__ = ["LoadedModel", "load_model"]
