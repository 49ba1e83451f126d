"""Implementations of the operations; `gpu_mixmatch.functional` chooses among them."""
