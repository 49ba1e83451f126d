"""CUDA graphs without CUDA: work on CPU tensors is recorded and done again, in the same memory.

As a real graph does, a recorded one knows memory by its address: what was allocated while it was
captured is its own, everything else must still be there when it is replayed. Reads of the host,
here of the builder's step, are not repeated.
"""

import importlib
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from gpu_mixmatch import _streams, _unchecked, sampling
from gpu_mixmatch._chain import num_columns
from gpu_mixmatch._keys import CountedKey

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty"}


class Memory:
    """A tensor by its address: it keeps nothing alive."""

    def __init__(self, tensor):
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.dtype = tensor.dtype
        self.place = tensor.storage_offset(), tensor.shape, tensor.stride()

    def tensor(self):
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        assert storage is not None, "a replay touches memory that was freed"
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.place)


class Graph:
    """What stands for a `torch.cuda.CUDAGraph`."""

    def __init__(self):
        self.own = []  # memory of the graph
        self.work = []  # functions that do it again

    def replay(self):
        with torch.no_grad():
            for again in self.work:
                again()

    def by_address(self, tree):
        return tree_map_only(torch.Tensor, Memory, tree)

    def record(self, function, args, kwargs, result):
        held = self.by_address((args, kwargs, result))
        read = {storage_of(tensor) for tensor in tensors_in((args, kwargs))}
        self.own += [tensor for tensor in tensors_in(result) if storage_of(tensor) not in read]
        self.work.append(partial(do_again, function, *held))

    def record_whole(self, function, args):
        held = self.by_address(args)
        self.work.append(lambda: function(*tensors(held)))


def tensors_in(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def storage_of(tensor):
    return tensor.untyped_storage().data_ptr()


def tensors(tree):
    return tree_map_only(Memory, Memory.tensor, tree)


def do_again(function, args, kwargs, result):
    new = function(*tensors(args), **tensors(kwargs))
    for old, value in zip(tree_leaves(tensors(result)), tree_leaves(new), strict=True):
        if isinstance(old, torch.Tensor) and old.data_ptr() != value.data_ptr():
            old.copy_(value)


def run(kernel, programs, *args, **options):
    kernel[(programs,)](*args, **options)


def draw_into(words, ids_x, ids_u, out, plan, counts):
    seed, step = words.tolist()
    out.copy_(sampling.pack(*sampling.draw_batch(seed, step, ids_x, ids_u, plan)))
    if counts:
        words[1] += 1


draw_batch = _unchecked.draw_batch


class Recorder(TorchDispatchMode):
    """Takes down what is done; ``capturing`` is the graph that it goes into."""

    def __init__(self, host):
        super().__init__()
        self.host = host
        self.graph = None
        self.in_kernel = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inputs = tensors_in((args, kwargs))
        on_host = bool(inputs) and all(tensor.data_ptr() in self.host() for tensor in inputs)
        if not self.in_kernel and not on_host:
            if function.overloadpacket.__name__ in ALLOCATIONS:
                self.graph.own.append(result)
            elif function.overloadpacket is not torch.ops.aten.detach:
                self.graph.record(function, args, kwargs or {}, result)
        return result

    def whole(self, function, *args):
        """Do what is one piece of work on a GPU, whatever it does here."""
        if self.graph is None:
            function(*args)
            return
        self.graph.record_whole(function, args)
        self.in_kernel = True
        try:
            function(*args)
        finally:
            self.in_kernel = False

    def run(self, kernel, programs, *args, **options):
        self.whole(partial(run, kernel, programs, **options), *args)

    def draw_batch(self, seed, step, ids_x, ids_u, plan, *, device, key=None, impl="auto"):
        """Draw by a key that is read anew, without Triton too: its interpreter takes its time."""
        if key is None or impl == "triton":
            return draw_batch(seed, step, ids_x, ids_u, plan, device=device, key=key, impl=impl)
        with_augment = plan.policy is not None
        num_rows = len(ids_x) + plan.num_augmentations * len(ids_u)
        columns = num_columns(plan.policy)
        words = sampling.words_per_row(with_augment=with_augment, chain_columns=columns)
        out = torch.empty(words * num_rows, dtype=torch.int32)
        counts = isinstance(key, CountedKey)
        words = key.words(1) if counts else key
        self.whole(partial(draw_into, plan=plan, counts=counts), words, ids_x, ids_u, out)
        return sampling.unpack(out, num_rows, with_augment=with_augment, chain_columns=columns)

    @contextmanager
    def capturing(self, graph):
        self.graph = graph
        try:
            with self:
                yield
        finally:
            self.graph = None


class Stream:
    """What stands for a `torch.cuda.Stream`."""

    def wait_stream(self, other):
        pass


def record_graphs(monkeypatch, host):
    """Let `capture` take builders on the CPU.

    Args:
        monkeypatch: pytest's.
        host: Gives the tensors that a graph would not read, since they are on the host.
    """
    recorder = Recorder(lambda: {tensor.data_ptr() for tensor in host()})
    module = importlib.import_module("gpu_mixmatch.capture")
    monkeypatch.setattr(module, "check_capturable", lambda mixmatch: None)
    monkeypatch.setattr(_unchecked, "draw_batch", recorder.draw_batch)
    if find_spec("triton"):
        launch = importlib.import_module("gpu_mixmatch.impl.triton.launch")
        monkeypatch.setattr(launch, "run", recorder.run)
    monkeypatch.setattr(_streams, "is_capturing", lambda device: recorder.graph is not None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recorder.capturing)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    return recorder
