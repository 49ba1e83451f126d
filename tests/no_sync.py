"""Modes under which a value that is read back from the device is an error, also on a CPU."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_mixmatch import _validation
from gpu_mixmatch.impl.eager import chain
from gpu_mixmatch.methods import looks, mixmatch

aten = torch.ops.aten
# Operations whose result or size depends on values: on a device they wait for it.
WAITING = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.is_nonzero,
    aten.equal,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.bincount,
}
# With a mask for an index these are nonzero in disguise.
INDEXING = {
    aten.index,
    aten.index_put,
    aten.index_put_,
    aten._unsafe_index,
    aten._index_put_impl_,
}


class NoSync(TorchDispatchMode):
    """Raise where a tensor's values would be read, but for tensors that live on the host."""

    def __init__(self, *host):
        super().__init__()
        self.host = {tensor.data_ptr() for tensor in host}
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        packet = function.overloadpacket
        on_host = (
            isinstance(args[0], torch.Tensor) and args[0].data_ptr() in self.host if args else False
        )
        masked = packet in INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        counted = (
            packet is aten.repeat_interleave and function is not aten.repeat_interleave.self_int
        )
        if not on_host and (packet in WAITING or masked or counted):
            shapes = [list(a.shape) for a in args if isinstance(a, torch.Tensor)]
            raise AssertionError(f"{function} on {shapes} waits for the device")
        return function(*args, **(kwargs or {}))


class NoExport(TorchFunctionMode):
    """Raise where a tensor leaves torch, which the dispatcher does not see on a CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu):
            raise AssertionError(f"Tensor.{function.__name__} waits for the device")
        return function(*args, **(kwargs or {}))


# What is looked at on a CPU, and on a device is not
_LOOKS = {
    "check_classes": (_validation,),
    "check_distributions": (_validation,),
    "check_draws": (_validation,),
    "check_chain_draws": (_validation,),
    "check_mixup_values": (_validation,),
    "check_scalar": (_validation,),
    "check_finite": (_validation, mixmatch),
}


def look_at_nothing(monkeypatch, *, but=()):
    """Leave out the looks at values that a CPU allows: what is left runs on a device too."""
    for name, modules in _LOOKS.items():
        for module in modules if name not in but else ():
            monkeypatch.setattr(module, name, lambda *_: None)
    monkeypatch.setattr(looks, "_are_probabilities", lambda *_: False)
    monkeypatch.setattr(looks, "_differ", lambda *_: False)
    look_for_no_rows(monkeypatch)


def look_for_no_rows(monkeypatch):
    """Let plain torch run each kind of operation on all rows, as where looking is waiting."""
    monkeypatch.setattr(chain, "_rows", lambda records, kind: torch.arange(len(records)))
