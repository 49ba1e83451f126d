"""The command line; ``python -m gpu_mixmatch.cli`` runs it."""
