"""Implementations of the operations, and the choice among them."""

import os
import warnings
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal, Protocol

import torch
from torch import Tensor

from gpu_mixmatch._buffers import Workspace
from gpu_mixmatch._extras import install_hint
from gpu_mixmatch._keys import CountedKey
from gpu_mixmatch._validation import check_choice
from gpu_mixmatch.types import (
    DrawPlan,
    Draws,
    Geometry,
    Impl,
    MixUpParams,
    Scaling,
)

ImplName = Literal["eager", "numba", "triton"]

# What "auto" takes where it can be imported, by the kind of device; elsewhere it takes eager.
_FOR_DEVICE: dict[str, ImplName] = {"cpu": "numba", "cuda": "triton"}
_warned_of: set[str] = set()  # what "auto" did without
_installed = {name: find_spec(name) is not None for name in ("numba", "triton")}


class Implementation(Protocol):
    """What an implementation offers: a module with these functions.

    Arguments arrive validated by `gpu_mixmatch.functional`, on one device. Results are written to
    arguments whose names begin with ``out`` or ``mixed``, every value of them; they do not overlap
    what is read. Nothing waits for the device.
    """

    def draw_batch(
        self,
        key: Tensor | CountedKey | tuple[int, int | Tensor],
        ids_x: Tensor | int,
        ids_u: Tensor | int,
        plan: DrawPlan,
        out: Tensor,
    ) -> None:
        """Draw all that a batch of N = B + K·M rows needs.

        Args:
            key: Seed and step, the latter an integer or 0-d on the CPU; or, in kernels only, both
                as ``[2]`` int64 on the device, which stay as they are, or a key that counts on.
            ids_x: Labelled sample ids, ``[B]`` int64; an integer B stands for 0 .. B - 1.
            ids_u: Unlabelled sample ids, ``[M]`` int64, likewise.
            plan: What is drawn.
            out: ``[words·N]`` int32, laid out as `sampling.pack` does it.
        """

    def prepare(self, plan: DrawPlan, device: torch.device) -> None:
        """Make what `draw_batch` reads on ``device``, which no CUDA graph can make for itself.

        Args:
            plan: What will be drawn.
            device: Where.
        """

    def augment(
        self,
        sources: tuple[Tensor, ...],
        params: Draws,
        geometry: Geometry,
        scaling: Scaling,
        *,
        channels_last_in: bool,
        out: Tensor,
        workspace: Workspace | None,
        mixup: MixUpParams | None = None,
    ) -> None:
        """Write every view of every source image, and mix them where that is asked.

        In this order: shift, zoom or cut, flip, the slots of a chain, blur, cutout, scale.

        Args:
            sources: Images, ``[M_i, C, H, W]`` or ``[M_i, H, W, C]``, uint8 or floating point. The
                first of two is drawn once, the second as often as rows remain; a single one fills
                all rows.
            params: Draws of R rows, view-major.
            geometry: What the rows have in common.
            scaling: value·scale + bias at the end, numbers or ``[C]`` float32.
            channels_last_in: Whether sources are NHWC.
            out: ``[R, C, H, W]`` float32, float16 or bfloat16, contiguous or channels_last, of the
                size of the cut where there is one. The arithmetic is float32, and that of a chain
                on whole bytes.
            workspace: Where scratch memory comes from; None allocates.
            mixup: λ' and partners of the R rows, to blend the views by; None leaves them unmixed.
        """

    def guess_labels(self, logits: Tensor, temperature: float, out: Tensor) -> None:
        """Sharpen the mean over the views of the softmaxes.

        Args:
            logits: ``[K, M, L]``, floating point, of any strides.
            temperature: T > 0.
            out: ``[M, L]`` float32, contiguous.
        """

    def batch_targets(
        self,
        y: Tensor,
        logits: Tensor,
        temperature: float,
        label_smoothing: float,
        mixup: MixUpParams | None,
        out: Tensor,
    ) -> None:
        """Write labels of x, smoothed, then the guesses of u, once per view.

        Args:
            y: ``[B]`` integers or ``[B, L]`` distributions, of any strides.
            logits: ``[K, M, L]``, as for `guess_labels`.
            temperature: T > 0.
            label_smoothing: Share of the uniform distribution in the labelled rows.
            mixup: λ' and partners of the N rows, to blend the targets by; None leaves them unmixed.
            out: ``[N, L]`` float32, contiguous.
        """

    def mixup(
        self,
        inputs: Tensor,
        targets: Tensor,
        params: MixUpParams,
        out: Tensor,
        mixed_targets: Tensor,
    ) -> None:
        """Write λ'·row + (1 - λ')·row[index], of images and targets alike.

        Args:
            inputs: ``[N, ...]``, floating point, contiguous or channels_last.
            targets: ``[N, L]`` float32, contiguous.
            params: λ' ``[N]`` float32 and partners ``[N]`` int64.
            out: Like ``inputs``, strides included.
            mixed_targets: Like ``targets``.
        """

    def mixmatch_loss(
        self,
        logits: Tensor,
        targets: Tensor,
        num_labelled: int,
        weight_u: Tensor,
        out: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """Write the loss, the cross-entropy on X' and the squared error on U'.

        Args:
            logits: ``[N, L]``, floating point, of any strides.
            targets: ``[N, L]``, of any strides.
            num_labelled: B.
            weight_u: λ_U, 0-d float32, on the logits' device or on the CPU.
            out: Three 0-d tensors, float32, or float64 for float64 logits.
        """

    def mixmatch_loss_backward(
        self,
        grads: tuple[Tensor | None, Tensor | None, Tensor | None],
        logits: Tensor,
        targets: Tensor,
        num_labelled: int,
        weight_u: Tensor,
        out: Tensor,
    ) -> None:
        """Write the gradient of the logits.

        Args:
            grads: Of the three results of `mixmatch_loss`, 0-d; None is zero.
            logits, targets, num_labelled, weight_u: As for `mixmatch_loss`.
            out: ``[N, L]``, contiguous, dtype of ``logits``.
        """


def resolve_impl(impl: Impl, device: torch.device) -> ImplName:
    """Say which implementation ``impl`` means on ``device``; `torch.compile` can trace this.

    "auto" takes Numba's loops on a CPU and Triton's kernels on CUDA where they are installed, and
    plain torch elsewhere. Any other word means itself, whether it can run there or not.

    Raises:
        ValueError: If ``impl`` is unknown.
    """
    check_choice("impl", impl, Impl)
    if impl != "auto":
        return impl
    wanted = _FOR_DEVICE.get(device.type, "eager")
    return wanted if _installed.get(wanted) else "eager"


@lru_cache(maxsize=64)
def implementation(impl: Impl, device: torch.device) -> Implementation:
    """Return the module whose functions run for ``impl`` on ``device``.

    Where "auto" finds that what it should take cannot be imported, it takes eager and warns once.

    Raises:
        ValueError: If ``impl`` is unknown.
        RuntimeError: If ``impl`` cannot run there; says why.
    """
    if impl == "auto":
        return _automatic(device)
    name = resolve_impl(impl, device)
    if name == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f'impl="triton" cannot run on {device}: its kernels need a CUDA device. Elsewhere they '
            "run only in Triton's interpreter, for tests (TRITON_INTERPRET=1 in the environment of "
            'the process). Use impl="auto" or a CUDA device'
        )
    if name == "numba" and device.type != "cpu":
        raise RuntimeError(
            f'impl="numba" cannot run on {device}: it is compiled for CPUs. '
            'Use impl="auto", or leave this module on the CPU'
        )
    try:
        return _load(name)
    except ImportError as error:
        raise RuntimeError(
            f'impl="{name}" cannot run on {device}: {error}. '
            f'Install it ({install_hint(name)}), or use impl="auto" or impl="eager"'
        ) from error


def _automatic(device: torch.device) -> Implementation:
    wanted = _FOR_DEVICE.get(device.type, "eager")
    if wanted != "eager":
        try:
            if not _installed[wanted]:
                raise ImportError(f"{wanted.capitalize()} is not installed")
            return _load(wanted)
        except ImportError as error:
            _installed[wanted] = False  # for `resolve_impl`
            if wanted not in _warned_of:
                _warned_of.add(wanted)
                warnings.warn(
                    f'impl="auto" runs plain torch on {device.type}, which is slower than '
                    f"{wanted}: {error}. Install it ({install_hint(wanted)})",
                    RuntimeWarning,
                    stacklevel=3,
                )
    return _load("eager")


def _load(name: ImplName) -> Implementation:
    """Import an implementation at the moment of use; its return type holds it to the protocol."""
    if name == "numba":
        from gpu_mixmatch.impl import numba

        return numba
    if name == "triton":
        from gpu_mixmatch.impl import triton

        return triton
    from gpu_mixmatch.impl import eager

    return eager
