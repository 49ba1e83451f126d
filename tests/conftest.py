"""Settings of the whole test run."""

import os

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports the kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")

# the tensors are small: threads would spend their time waiting for each other
torch.set_num_threads(1)


@pytest.fixture
def no_kernels_here(monkeypatch):
    """As on a user's machine: kernels need CUDA, the interpreter is off."""
    from gpu_mixmatch.impl import implementation

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    implementation.cache_clear()
    yield
    implementation.cache_clear()
