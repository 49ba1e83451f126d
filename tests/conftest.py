"""Settings of the whole test run."""

import os
import signal

import pytest
import torch

# a shell that runs the tests in the background lets them ignore Ctrl-C, and what they start too
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if not torch.cuda.is_available():  # before anything imports the kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")

# the tensors are small: threads would spend their time waiting for each other
torch.set_num_threads(1)


def _choose_numba(monkeypatch, installed):
    from gpu_mixmatch import impl

    monkeypatch.setitem(impl._installed, "numba", installed)
    monkeypatch.setattr(impl, "_warned_of", {"numba"})
    impl.implementation.cache_clear()
    yield
    impl.implementation.cache_clear()


@pytest.fixture
def without_numba(monkeypatch):
    """As where Numba is not installed: "auto" is eager on a CPU."""
    yield from _choose_numba(monkeypatch, installed=False)


@pytest.fixture(params=["eager", "numba"])
def each_cpu_impl(request, monkeypatch):
    """What "auto" means on a CPU without Numba and with it."""
    if request.param == "numba":
        pytest.importorskip("numba")
    yield from _choose_numba(monkeypatch, installed=request.param == "numba")


@pytest.fixture
def no_kernels_here(monkeypatch):
    """As on a user's machine: kernels need CUDA, the interpreter is off."""
    from gpu_mixmatch.impl import implementation

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    implementation.cache_clear()
    yield
    implementation.cache_clear()
