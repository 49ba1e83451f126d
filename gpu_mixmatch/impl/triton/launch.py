"""How a kernel is launched: in one place, so that tests can count launches and look at them.

For every launch Triton binds the arguments anew, to find what it compiled for arguments like these.
On the host that takes longer than the kernel on the device. Here what it found is kept, by a key
that tells apart whatever Triton tells apart, and is called directly from the second launch on.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

MOST_PROGRAMS = 2**31 - 1
# How a kernel is compiled and called is no documented part of Triton: it was read in these
# versions, for NVIDIA's GPUs. With any other one all launches are bound by Triton.
_READ_VERSIONS = ((3, 6), (3, 7), (3, 8))
_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
KEEPS_KERNELS = _VERSION in _READ_VERSIONS and torch.version.hip is None


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, **options: Any) -> None:
    """Run ``programs`` programs of ``kernel`` on ``device``, in the current stream of it.

    Raises:
        ValueError: If there are more programs than a grid can have.
    """
    if programs == 0:
        return
    if programs > MOST_PROGRAMS:
        raise ValueError(
            f"inputs must need at most {MOST_PROGRAMS} programs of a kernel, got {programs}; "
            'split the batch, or use impl="eager"'
        )
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            run(kernel, programs, *args, **options)
    else:
        run(kernel, programs, *args, **options)


def blocks(length: int, size: int) -> int:
    """Round ``length / size`` up. On the host Triton's own cdiv takes longer than a kernel."""
    return -(length // -size)


def run(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    """Run a kernel on the current device. Whoever counts launches puts a function in its place."""
    variants = _variants.get(id(kernel)) or _variants_of(kernel)
    runtime = knobs.runtime
    if (
        variants is None
        or runtime.debug
        or runtime.add_stages_inspection_hook is not None
        or knobs.compilation.instrumentation_mode
        or kernel.pre_run_hooks
        or len(args) < variants.num_arguments
    ):  # compiled or watched in a way of its own
        kernel[(programs,)](*args, **options)
        return
    active = driver.active
    device = active.get_current_device()
    key = variants.key(device, args, options)
    found = variants.found.get(key)
    if found is None or not found.is_current():
        variants.keep(key, kernel[(programs,)](*args, **options), args, options)
        return
    stream = active.get_current_stream(device)
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    metadata = None
    if getattr(enter, "calls", True) or getattr(leave, "calls", True):
        metadata = found.compiled.launch_metadata((programs,), stream, *args, *found.constexprs)
    else:  # chains of no hooks, which would be called for nothing
        enter = leave = None
    found.call(
        programs, 1, 1, stream, found.function, found.packed_metadata, metadata, enter, leave,
        *args, *found.constexprs,
    )  # fmt: skip


class _Variant(NamedTuple):
    """What Triton compiled for some arguments.

    Attributes:
        compiled: Held, since it unloads itself.
        call: Launches it, given what is below and the arguments.
        function: Its handle on the device.
        packed_metadata: Warps and shared memory.
        constexprs: Values of the parameters that follow the arguments.
        globals: Where what the kernel reads of its module lies, its name, and what it was.
    """

    compiled: Any
    call: Any
    function: Any
    packed_metadata: Any
    constexprs: tuple[Any, ...]
    globals: tuple[tuple[dict[str, Any], str, Any], ...]

    def is_current(self) -> bool:
        """Whether what the kernel reads of its module is what it was."""
        for place, name, value in self.globals:  # noqa: SIM110 - all() takes three times as long
            if place.get(name) is not value:
                return False
        return True


class _Variants:
    """What Triton compiled of a kernel, by what it distinguishes arguments by."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel  # held, so that no other has its id
        self.found: dict[tuple[Any, ...], _Variant] = {}
        self.num_arguments = sum(not param.is_constexpr for param in kernel.params)
        specialised = [
            param
            for param in kernel.params
            if not param.is_constexpr and not param.do_not_specialize
        ]
        self._aligned = tuple(
            param.num for param in specialised if not param.do_not_specialize_on_alignment
        )
        self._unaligned = {
            param.num for param in specialised if param.do_not_specialize_on_alignment
        }

    def key(self, device: int, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
        """Tell apart what Triton does: no two launches of one key are compiled differently.

        That holds where `tells` says so; other launches are not kept. Only the options have names
        that are texts, so that what comes before them is not taken for them.
        """
        return (
            device,
            *[
                arg.dtype
                if type(arg) is Tensor
                else -0x80000000 <= arg < 0x80000000
                if type(arg) is int
                else type(arg)
                for arg in args
            ],
            *[
                arg.data_ptr() % 16 == 0
                if type(arg) is Tensor
                else (arg == 1, arg % 16 == 0)
                if type(arg) is int
                else None
                for arg in [args[place] for place in self._aligned]
            ],
            *options,
            *options.values(),
        )

    def tells(self, args: tuple[Any, ...], options: dict[str, Any]) -> bool:
        """Whether a key says all that Triton would look at."""
        return (
            all(type(arg) in _KINDS for arg in args)
            and all(type(value) in _CONSTANTS for value in options.values())
            and options.keys() >= set(self.kernel.arg_names[len(args) :])
            # not an integer that Triton compiles in if it is 1, which is looked at elsewhere
            and not any(
                type(arg) is int and place in self._unaligned for place, arg in enumerate(args)
            )
            and all(-(2**63) <= arg < 2**63 for arg in args if type(arg) is int)
        )

    def keep(
        self, key: tuple[Any, ...], compiled: Any, args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        """Keep what a launch compiled, where its key says all about it."""
        if type(compiled) is not CompiledKernel or not self.tells(args, options):
            return
        names = self.kernel.arg_names[len(args) :]
        used = self.kernel.used_global_vals.items()
        self.found[key] = _Variant(
            compiled,
            compiled.run,
            compiled.function,
            compiled.packed_metadata,
            tuple(options[name] for name in names),
            tuple((place, name, place.get(name)) for (name, _), (_, place) in used),
        )


_KINDS = (Tensor, int, float, type(None))
_CONSTANTS = (int, float, bool, str, type(None))
_variants: dict[int, _Variants] = {}


def _variants_of(kernel: Any) -> _Variants | None:
    """Where what is compiled of a kernel is kept; None for one that Triton interprets or binds."""
    if not KEEPS_KERNELS or type(kernel) is not JITFunction:
        return None
    return _variants.setdefault(id(kernel), _Variants(kernel))
