"""The methods: each builds batches from the same stages."""

from gpu_mixmatch.methods.mixmatch import MixMatch
from gpu_mixmatch.methods.passes import interleaved_forward

__all__ = ["MixMatch", "interleaved_forward"]
