"""Counts what a GPU would be asked to do, on a machine without one.

The fake device is torch's "meta": tensors there have shapes and no values, every operation on them
passes the dispatcher, and whatever would read a value raises. An operation that is not a view and
not an allocation counts as one launch, which is how the ATen operations used here are implemented
on CUDA; those that are several kernels are listed.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_"}
# kernels of one operation, where they are more than one
KERNELS = {"sort": 2, "argsort": 2, "nonzero": 3, "randperm": 4, "logsumexp": 5}


class LaunchCounter(TorchDispatchMode):
    """Counts launches on the fake device, and copies to it.

    Attributes:
        launches: Number of launches by operation.
        copies: Bytes of each copy from the host to the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.copies: list[int] = []

    @property
    def total(self) -> int:
        """Number of all launches."""
        return self.launches.total()

    def __torch_dispatch__(
        self,
        function: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Do an operation, and count what it would launch or copy."""
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        inputs = [arg for arg in _leaves((args, kwargs)) if isinstance(arg, torch.Tensor)]
        outputs = [out for out in _leaves(result) if isinstance(out, torch.Tensor)]
        touched = [*inputs, *outputs]
        if not any(tensor.device == DEVICE for tensor in touched):
            return result  # work of the host
        if name in ("_to_copy", "copy_", "copy"):
            source = inputs[-1] if name != "_to_copy" else inputs[0]
            if source.device != DEVICE:
                self.copies.append(source.numel() * source.element_size())
                return result
        if _is_view(function) or name in ALLOCATIONS:
            return result
        self.launches[name] += KERNELS.get(name, 1)
        return result


def _is_view(function: Any) -> bool:
    """Whether an operation only looks at its input: it returns an alias and writes nothing."""
    returned = function._schema.returns
    aliases = [value.alias_info for value in returned]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def _leaves(tree: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(tree)
