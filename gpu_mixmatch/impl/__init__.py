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
    UnlabelledLoss,
    Weighting,
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

    def guess_statistics(self, logits: Tensor, y: Tensor, out: Tensor) -> None:
        """Write sums of guesses and of labels, in whole numbers: of any order and in any parts.

        Args:
            logits: Of the weak views, ``[M, L]``, floating point, of any strides.
            y: ``[B]`` integers or ``[B, L]`` distributions.
            out: ``[4 + 3·L]`` int64: M, B, then, of the guesses p = softmax(logits) in float32, in
                2^-32 and cut off after it: the sum of max p and of its square; of every class the
                sum of p, how often it is argmax p (the first of equals), and the sum of y. A guess
                that is not a number adds to M alone.
        """

    def update_averages(
        self,
        sums: Tensor,
        averages: Tensor,
        momentum: float,
        target: Tensor | None,
        out: Tensor | None,
    ) -> None:
        """Move averages of guesses by the means of a batch: m·average + (1 - m)·mean, in float64.

        Args:
            sums: Of `guess_statistics`, of one or of all processes.
            averages: ``[2 + 3·L]`` float32, updated: mean of max p, its variance (unbiased;
                0 of one guess), and of every class the mean p, its share of the argmax, its share
                of the labels.
            momentum: m, in [0, 1].
            target: What guesses are aligned to, ``[L]`` float32; None is the share of the labels.
            out: (1e-6 + target) / (1e-6 + mean p) of after the update, ``[L]`` float32, or None.
        """

    def update_window(
        self,
        sums: Tensor,
        window: Tensor,
        position: Tensor,
        labels: Tensor,
        momentum: float,
        out: Tensor,
    ) -> None:
        """Write the factors of an alignment, then take a batch in.

        Args:
            sums: Of `guess_statistics`.
            window: Mean guesses of the last batches, ``[W, L]`` float32; the row at ``position`` is
                overwritten.
            position: 0-d int64 on the device, counted on, modulo W.
            labels: Average of the labels, ``[L]`` float32, updated as in `update_averages`.
            momentum: m of ``labels``; 1 leaves them as they are.
            out: (1e-6 + labels) / (1e-6 + mean of the window) of before, ``[L]`` float32.
        """

    def confident_classes(self, logits: Tensor, threshold: float, out: Tensor) -> None:
        """Write the class of each guess that is confident, and -1 for the others.

        Args:
            logits: ``[M, L]``, floating point.
            threshold: A guess of which max p is above this is confident.
            out: ``[M]`` int64.
        """

    def update_labels(self, classes: Tensor, ids: Tensor, table: Tensor, counts: Tensor) -> None:
        """Note the classes of samples by their ids; the last of an id counts.

        Args:
            classes: ``[M]`` int64; what is negative is left out.
            ids: ``[M]`` int64; those outside of the table are left out.
            table: ``[U]`` int16 class of each sample, -1 for none yet; updated.
            counts: ``[L + 1]`` int32, how often each class is in the table, then -1; updated.
        """

    def consistency_targets(
        self,
        y: Tensor,
        logits: Tensor,
        weighting: Weighting,
        label_smoothing: float,
        out: tuple[Tensor, Tensor],
    ) -> None:
        """Write targets and weights of x and of all strong views.

        Args:
            y: ``[B]`` integers or ``[B, L]`` distributions.
            logits: Of the weak views, ``[M, L]``, floating point, of any strides.
            weighting: What becomes of guesses. The first of equals is the largest. Where σ² is 0,
                "soft" gives 1 to what is at least μ and 0 to the others.
            label_smoothing: Share of the uniform distribution in the labelled rows.
            out: ``[B + S·M, L]`` float32 targets, the guesses once per strong view, and
                ``[B + S·M]`` float32 weights, 1 for x.
        """

    def consistency_loss(
        self,
        logits: Tensor,
        targets: Tensor,
        weights: Tensor,
        parts: tuple[int, int],
        weight_u: Tensor,
        share_v: float,
        loss_u: UnlabelledLoss,
        tsa: Tensor | None,
        out: Tensor,
        count_x: Tensor | None = None,
    ) -> None:
        """Write the loss of labelled rows, x, and of two parts of unlabelled ones, u and v.

        Of x the mean of weights·cross-entropy, over rows that do not know their label yet, see
        ``tsa``; of u and v the mean over all rows of weights·loss.

        Args:
            logits: ``[N, L]``, floating point, of any strides.
            targets: ``[N, L]``, of any strides.
            weights: ``[N]`` float32.
            parts: Where x ends, and u: rows x, u and v may be empty.
            weight_u: λ_U, 0-d float32, on the logits' device or on the CPU.
            share_v: The weight of v is this times λ_U.
            loss_u: Of u and v: "ce", "kl" (ce less the targets' entropy) or "mse" (squared error of
                probabilities, mean over classes).
            tsa: 0-d float32: rows of x whose probability of their targets, p·target, is above
                this are left out, and the mean is over the others, 0 for none; None keeps all.
            out: ``[6]`` float32, or float64 for float64 logits: the loss x + λ_U·(u + share_v·v),
                its parts x, u, v, the share of u's and v's rows whose weight is above 0, and their
                mean weight.
            count_x: How many rows of x are not left out, 0-d, dtype of ``out``; None where nobody
                asks. The gradient does, where there is ``tsa``.
        """

    def consistency_loss_backward(
        self,
        grads: Tensor,
        logits: Tensor,
        targets: Tensor,
        weights: Tensor,
        parts: tuple[int, int],
        weight_u: Tensor,
        share_v: float,
        loss_u: UnlabelledLoss,
        tsa: Tensor | None,
        count_x: Tensor | None,
        out: Tensor,
    ) -> None:
        """Write the gradient of the logits.

        Args:
            grads: Of the results of `consistency_loss`, ``[6]``; those of shares of rows count not.
            logits, targets, weights, parts, weight_u, share_v, loss_u, tsa: As there.
            count_x: What it wrote; None without ``tsa``.
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
