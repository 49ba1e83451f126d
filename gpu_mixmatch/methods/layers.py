"""The layers of a model that own running statistics: set for a while, and left as they came."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from gpu_mixmatch._writes import count_of_writes

_NOTHING: AbstractContextManager[None] = contextlib.nullcontext()


def norm_flags(
    modules: Sequence[nn.Module], *, training: bool | None = None, tracking: bool | None = None
) -> AbstractContextManager[None]:
    """Set flags of all normalisation layers for a while; None leaves a flag as it is.

    A BatchNorm in training mode that does not track normalises with batch statistics, and neither
    reads nor writes its running ones. Layers of other kinds have no such flag: `buffers_kept` puts
    back what they move.

    Args:
        modules: All modules of a model.
        training: Whether they normalise with the statistics of what they are given.
        tracking: False stops a BatchNorm's running statistics.
    """
    layers = [module for module in modules if _is_norm(module)]
    return _flags_set(layers, training, tracking) if layers else _NOTHING


@contextlib.contextmanager
def _flags_set(
    layers: list[nn.Module], training: bool | None, tracking: bool | None
) -> Iterator[None]:
    flags = [(layer.training, getattr(layer, "track_running_stats", None)) for layer in layers]

    def set_flags(layer: nn.Module) -> None:
        if training is not None:
            _set_flag(layer, "training", training)
        if tracking is False and isinstance(layer, _BatchNorm) and not _is_unmade(layer):
            _set_flag(layer, "track_running_stats", False)

    with contextlib.ExitStack() as hooks:
        try:
            for layer in layers:
                set_flags(layer)
                if _is_unmade(layer):  # it makes running statistics only if it tracks
                    hooks.callback(_once_made(layer, set_flags))
            yield
        finally:
            for layer, (trained, tracked) in zip(layers, flags, strict=True):
                _set_flag(layer, "training", trained)
                if isinstance(layer, _BatchNorm):
                    _set_flag(layer, "track_running_stats", tracked)


def buffers_kept(
    modules: Sequence[nn.Module], *, of_batch_norm: bool = False
) -> AbstractContextManager[None]:
    """Put the buffers of a model back at the end, whatever wrote into them or replaced them.

    Args:
        modules: All modules of a model.
        of_batch_norm: Whether those of torch's own BatchNorm layers are among them, which
            `norm_flags` keeps from moving.
    """
    # DDP sends rank 0's buffers to the others before a forward pass, and not before one that
    # follows a pass without gradients: what is put back here must be sent again
    replicated = [module for module in modules if isinstance(module, DistributedDataParallel)]
    of_all = of_batch_norm or bool(replicated)
    owners = [
        module for module in modules if module._buffers and (of_all or not _obeys_flags(module))
    ]
    return _buffers_put_back(owners, replicated) if owners or replicated else _NOTHING


@contextlib.contextmanager
def _buffers_put_back(
    owners: list[nn.Module], replicated: list[DistributedDataParallel]
) -> Iterator[None]:
    sends = [module.require_forward_param_sync for module in replicated]
    kept: list[_Kept] = []

    def keep(owner: nn.Module) -> None:
        for name, buffer in owner._buffers.items():
            if buffer is not None and not is_lazy(buffer) and _is_writable(buffer):
                kept.append(
                    _Kept(owner, name, buffer, buffer.detach().clone(), count_of_writes(buffer))
                )

    with contextlib.ExitStack() as hooks:
        try:
            with torch.no_grad():
                for owner in owners:
                    if _is_unmade(owner):
                        hooks.callback(_once_made(owner, keep))
                    else:
                        keep(owner)
            yield
        finally:
            with torch.no_grad():
                for buffer in kept:
                    buffer.put_back()
            for module, sent in zip(replicated, sends, strict=True):
                module.require_forward_param_sync = sent


class _Kept(NamedTuple):
    """A buffer, and what was in it."""

    owner: nn.Module
    name: str
    buffer: Tensor
    value: Tensor
    writes: int | None

    def put_back(self) -> None:
        buffers, buffer = self.owner._buffers, self.buffer
        if self.name not in buffers or buffers[self.name] is not buffer:
            buffers[self.name] = buffer
        if buffer.shape != self.value.shape:
            buffer.resize_(self.value.shape)
        if self.writes is None or buffer._version != self.writes:
            buffer.copy_(self.value)
        else:
            # Perhaps written to through .data, which is not counted. If not, this changes nothing,
            # and a graph that holds the buffer for its backward pass must not be told otherwise.
            with _unsafe_preserve_version_counter(buffer):
                buffer.copy_(self.value)


def _set_flag(layer: nn.Module, name: str, value: bool | None) -> None:
    """Set a flag of a layer if it has another value.

    A module takes ten times as long as an object: it looks whether the flag is a parameter. There
    are several flags per layer and guess.
    """
    if getattr(layer, name) is value:
        return
    if type(layer).__setattr__ is nn.Module.__setattr__ and not torch.compiler.is_compiling():
        object.__setattr__(layer, name, value)
    else:
        setattr(layer, name, value)


def _is_writable(tensor: Tensor) -> bool:
    return not tensor.is_inference() or torch.is_inference_mode_enabled()


def _is_norm(module: nn.Module) -> bool:
    """Whether a module normalises with statistics that it runs, whatever its class.

    A whole network that normalises its input is none: it has layers with weights.
    """
    if isinstance(module, _NormBase):
        return True
    buffers = module._buffers
    return (
        "running_mean" in buffers
        and "running_var" in buffers
        and not any(True for child in module.children() for _ in child.parameters())
    )


def _obeys_flags(module: nn.Module) -> bool:
    """Whether a layer's running statistics stay where `norm_flags` stops them."""
    if not isinstance(module, _BatchNorm) or _is_unmade(module):
        return False
    forward = type(module).forward  # a class of others may move them in its own
    own = forward is _BatchNorm.forward or forward is nn.SyncBatchNorm.forward
    return own and "forward" not in module.__dict__


def _is_unmade(module: nn.Module) -> bool:
    """Whether the parameters or buffers of a lazy module are still to be made."""
    return isinstance(module, LazyModuleMixin) and bool(module.has_uninitialized_params())


def _once_made(layer: nn.Module, act: Callable[[nn.Module], None]) -> Callable[[], None]:
    """Call ``act`` when a lazy layer has made its buffers and has not run yet; returns the undo."""
    # the layer's own hook, which makes them, stands before this one
    return layer.register_forward_pre_hook(lambda made, _: act(made)).remove


# Layers whose mode is part of their graph


class FixedLayer(NamedTuple):
    """A layer that was traced, frozen or exported: its mode is a constant of its graph.

    Attributes:
        name: Qualified name, or what is known of it.
        kind: Class of the layer.
        training: Whether it normalises with batch statistics.
    """

    name: str
    kind: str
    training: bool


_GRAPHS = (torch.jit.ScriptModule, fx.GraphModule)
_fixed_layers: WeakKeyDictionary[nn.Module, list[FixedLayer]] = WeakKeyDictionary()


def check_guessable(modules: Sequence[nn.Module], guess_bn: str) -> None:
    """Raise if a layer cannot be put into the mode that ``guess_bn`` says.

    Raises:
        ValueError: If so; names the layer, and says how to go on.
    """
    if torch.compiler.is_compiling() or not any(map(_is_graph, modules)):
        return
    root = modules[0]
    fixed = []
    scripts: list[str] = []
    for name, module in root.named_modules():
        if not _is_graph(module) or any(name.startswith(script) for script in scripts):
            continue
        if isinstance(module, torch.jit.ScriptModule):
            scripts.append(f"{name}." if name else "")  # its graph has its parts' graphs in it
        if module not in _fixed_layers:
            _fixed_layers[module] = list(_layers_of_graph(module))
        prefix = f"{name}." if name else ""
        fixed += [layer._replace(name=prefix + layer.name) for layer in _fixed_layers[module]]
    wanted = guess_bn != "eval"
    for name, kind, training in fixed:
        if training == wanted:
            continue
        if wanted:
            raise ValueError(
                f"guess_bn must be 'eval' for this model, got {guess_bn!r}: its layer {name!r} "
                f"({kind}) reads its running statistics whatever its mode, as it was traced, "
                "frozen or exported in evaluation mode. Or guess with the module that it was made "
                "of, or with one scripted by torch.jit.script, whose mode can change"
            )
        raise ValueError(
            f"guess_bn must be 'batch' or 'update' for this model, got 'eval': its layer {name!r} "
            f"({kind}) reads batch statistics whatever its mode, as it was traced or exported in "
            "training mode. Or guess with the module that it was made of, or with one scripted by "
            "torch.jit.script, whose mode can change"
        )


def _is_graph(module: nn.Module) -> bool:
    return isinstance(module, _GRAPHS)


def _layers_of_graph(module: nn.Module) -> Iterator[FixedLayer]:
    if isinstance(module, torch.jit.ScriptModule):
        graph: Any = module.inlined_graph  # held, since the nodes do not hold it
        for kind in ("aten::batch_norm", "aten::instance_norm"):
            for node in graph.findAllNodes(kind):
                yield from _of_script(module, node)
    elif isinstance(module, fx.GraphModule):
        for node in module.graph.nodes:
            yield from _of_fx(node)


def _of_script(module: torch.jit.ScriptModule, node: Any) -> Iterator[FixedLayer]:
    _, _, _, running_mean, _, training, *_ = node.inputs()
    if training.node().kind() != "prim::Constant" or running_mean.node().mustBeNone():
        return
    path: list[str] = []
    owner = running_mean.node()
    while owner.kind() == "prim::GetAttr":
        path.insert(0, owner.s("name"))
        owner = next(owner.inputs()).node()
    if path:
        name = ".".join(path[:-1])
        kind = getattr(module.get_submodule(name), "original_name", "layer")
    else:  # freezing leaves no names
        name, kind = node.kind().removeprefix("aten::"), "frozen"
    yield FixedLayer(name, kind, bool(training.toIValue()))


def _of_fx(node: fx.Node) -> Iterator[FixedLayer]:
    operation = getattr(node.target, "__name__", str(node.target))
    if node.op != "call_function" or "batch_norm" not in operation or "backward" in operation:
        return
    names = ("running_mean", "training")
    # torch.nn.functional's order, and that of the operations beneath it
    places = (1, 5) if node.target is nn.functional.batch_norm else (3, 5)
    running_mean, training = (
        node.kwargs.get(name, node.args[place] if place < len(node.args) else None)
        for name, place in zip(names, places, strict=True)
    )
    if "no_training" in operation:
        training = False
    if isinstance(running_mean, fx.Node) and isinstance(training, bool | None):
        stack = node.meta.get("nn_module_stack") or {"": (str(running_mean.target), "layer")}
        name, kind = list(stack.values())[-1]
        kind = kind if isinstance(kind, str) else kind.__name__
        yield FixedLayer(str(name), kind.rsplit(".", 1)[-1], bool(training))
