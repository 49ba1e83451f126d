"""The named tuples that travel between the parts of the package, and the words that they use."""

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor

Impl = Literal["auto", "eager", "numba", "triton"]
Layout = Literal["NCHW", "NHWC"]
PaddingMode = Literal["reflect", "zeros", "edge"]
MixMode = Literal["all", "separate", "labelled", "unlabelled", "none"]
LamMode = Literal["sample", "batch"]
OpName = Literal[
    "identity",
    "autocontrast",
    "equalize",
    "invert",
    "posterize",
    "solarize",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "hue",
    "rotate",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "translate_x_rel",
    "translate_y_rel",
]
Outside = Literal["mean", "black"]
WeightRule = Literal["fixed", "soft", "free", "flex"]
UnlabelledLoss = Literal["ce", "kl", "mse"]

# Soft labels and targets may miss a sum of one by this much: float16 rows of 1000 classes do.
SUM_TOLERANCE = 1e-2
# Below this many pixels a Gaussian's taps beside the centre are zero in float32: no blur at all.
LEAST_SIGMA = 0.01
# Positions of rows, and the grid that they are shuffled on, are int32 in kernels.
MOST_ROWS = 2**30
# A slot of a chain has a purpose of its own in the byte that purposes have.
MOST_SLOTS = 16
# Rows of more classes do not fit into a tile of Triton's kernels.
MOST_CLASSES = 2**16


class Op(NamedTuple):
    """An operation of a chain, and the magnitudes that it is drawn with, each as often as another.

    A magnitude is what Pillow is given: degrees ("rotate"), a slope ("shear_x"), pixels
    ("translate_x"), a share of the width or height, in whole pixels, towards 0 ("translate_x_rel"),
    a factor ("brightness", "color", "contrast", "sharpness"), bits that are kept ("posterize"), the
    first byte that is inverted ("solarize") or a share of the circle of colours ("hue"). A sign is
    a magnitude of its own. The others have the one magnitude 0.

    Attributes:
        name: The operation.
        magnitudes: At least one.
    """

    name: OpName
    magnitudes: tuple[float, ...] = (0.0,)

    def __hash__(self) -> int:
        """Look at the ends alone: constants are found by chains, of up to thousands of numbers."""
        return hash((self.name, len(self.magnitudes), self.magnitudes[0], self.magnitudes[-1]))


class Chain(NamedTuple):
    """What follows the geometry of a view, on bytes: operations drawn per view, then a cutout.

    Attributes:
        ops: What a slot may hold.
        num_slots: Operations per view, each any of ``ops``; where they are shuffled, their number.
        prob: Probability that a slot is filled; where they are shuffled, that all of them are.
        shuffled: Whether every view gets each of ``ops`` once, in an order of its own.
        gray: Probability of one more operation at the end that takes colour away; shuffled ones
            only.
        outside: What lies outside of a moved image: "mean", a value of 0 after normalisation, or
            "black". A pixel is outside until an operation that makes a new colour of it.
        cutout: Side of a square that is painted over, in pixels; or least and most of it as shares
            of the width. 0 is none.
        cutout_color: Bytes per channel of that square; None is a value of 0 after normalisation.
    """

    ops: tuple[Op, ...]
    num_slots: int = 2
    prob: float = 1.0
    shuffled: bool = False
    gray: float = 0.0
    outside: Outside = "mean"
    cutout: int | tuple[float, float] = 0
    cutout_color: tuple[int, ...] | None = None

    def __hash__(self) -> int:
        """Look at a few fields, for the same reason as `Op` does."""
        return hash((len(self.ops), *self.ops[:1], *self.ops[-1:], *self[1:4]))


class Cut(NamedTuple):
    """A part of each image that becomes the view: a random crop, resized where it has an area.

    Attributes:
        size: Height and width of the views in pixels; None keeps those of the images.
        area: Least and most of the image's area that is cut out, in (0, 1]; None cuts as many
            pixels as the view has.
        aspect: Least and greatest width over height of what is cut out.
    """

    size: tuple[int, int] | None = None
    area: tuple[float, float] | None = None
    aspect: tuple[float, float] = (3 / 4, 4 / 3)


class AugmentPolicy(NamedTuple):
    """What an augmentation is drawn from.

    Attributes:
        padding: Pixels of padding; offsets are uniform on 0 .. 2·padding.
        zoom_px: Least and most pixels to cut per side, inclusive.
        flip: Probability of a mirror image.
        blur_sigma: Least and greatest standard deviation of the blur in pixels; None is no blur.
        cut: What is cut out of the window; None is all of it.
        chain: The operations that follow; None is none.
    """

    padding: int = 0
    zoom_px: tuple[int, int] = (0, 0)
    flip: float = 0.0
    blur_sigma: tuple[float, float] | None = None
    cut: Cut | None = None
    chain: Chain | None = None


class AugmentParams(NamedTuple):
    """What was drawn for the augmentation of R rows (a row is one view of one image).

    Attributes:
        top: Row offset of the window in the padded image, ``[R]`` int32, in pixels.
        left: Column offset of the window in the padded image, ``[R]`` int32, in pixels.
        flip: 1 where the view is mirrored left to right, else 0, ``[R]`` int32.
        zoom: Pixels cut off the top, bottom, left and right before resizing back, ``[R, 4]`` int32.
        sigma: Standard deviation of the Gaussian blur, ``[R]`` float32, in pixels; 0 is no blur.
    """

    top: Tensor
    left: Tensor
    flip: Tensor
    zoom: Tensor
    sigma: Tensor


class ChainParams(NamedTuple):
    """What was drawn for R rows where a policy has a cut or a chain: more than `AugmentParams`.

    Nothing here depends on the size of the images. `gpu_mixmatch._chain.columns` says which
    columns of ``chain`` are what.

    Attributes:
        top: As in `AugmentParams`, like the next four.
        left: See there.
        flip: See there.
        zoom: See there.
        sigma: See there.
        chain: ``[R, W]`` int32. Where there is a cut, four columns: its height and width in
            1/65536 of the root of the image's area (0 for a crop of fixed size), then how far down
            and across it lies between the ends, in 2^-24. A column per slot: the place of operation
            and magnitude in `gpu_mixmatch._chain.entries`, 0 for none. Where there is a cutout,
            three: its centre, down and across, in 2^-24 of the view, and its side, in pixels or in
            1/65536 of the view's width as the chain has it; 0 is no cutout.
    """

    top: Tensor
    left: Tensor
    flip: Tensor
    zoom: Tensor
    sigma: Tensor
    chain: Tensor


# What may be drawn for an augmentation: all of it for one policy is of one kind.
Draws = AugmentParams | ChainParams


class Geometry(NamedTuple):
    """How pixels are moved and weighed: what all views of a batch have in common.

    Attributes:
        padding: Pixels that images are padded by before the shift.
        padding_mode: "reflect" (without the edge), "zeros" (black) or "edge".
        zoom: Whether `AugmentParams.zoom` is cut off and the rest resized back, bilinear.
        blur_radius: Radius of the sampled Gaussian in pixels; 0 is no blur.
        cut: What is cut out of the window, as in `AugmentPolicy`.
        chain: The operations that follow, as in `AugmentPolicy`.
    """

    padding: int = 0
    padding_mode: PaddingMode = "reflect"
    zoom: bool = False
    blur_radius: int = 0
    cut: Cut | None = None
    chain: Chain | None = None


class Scaling(NamedTuple):
    """The last step of a view: value · scale + bias.

    Attributes:
        scale: A number, or one per channel, ``[C]`` float32.
        bias: Likewise.
    """

    scale: Tensor | float
    bias: Tensor | float


class DrawPlan(NamedTuple):
    """What is drawn for a batch, beside its seed, step and ids.

    Attributes:
        num_augmentations: K, views per unlabelled image.
        policy: What an augmentation is drawn from; None draws none.
        alpha: The Beta parameter α, in [0.05, 1000].
        lam: "sample" draws one λ per row (the paper), "batch" one for all rows.
        mix: Which rows meet: "all" (the paper), X with X and U with U ("separate"), only one of the
            two parts within itself ("labelled", "unlabelled"), or "none". Rows that are not mixed
            have λ' = 1 and themselves as partner.
        weak_x: Whether x has no operations of the policy's chain: empty slots and no cutout.
        weak_views: How many views of u, the last ones, have none.
    """

    num_augmentations: int = 2
    policy: AugmentPolicy | None = None
    alpha: float = 0.75
    lam: LamMode = "sample"
    mix: MixMode = "all"
    weak_x: bool = False
    weak_views: int = 0


class MixUpParams(NamedTuple):
    """What was drawn for MixUp over N rows.

    Attributes:
        lam: Weight of the row itself, λ' = max(λ, 1 - λ), ``[N]`` float32 in [0.5, 1].
        index: The row's partner, ``[N]`` int64.
    """

    lam: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs


class MixMatchBatch(NamedTuple):
    """A training batch: X' in the first ``num_labelled`` rows, U' in the rest, view-major.

    Attributes:
        inputs: Mixed images, ``[N, C, H, W]`` with N = B + K·M.
        targets: Mixed targets, ``[N, L]`` float32.
        num_labelled: B, the number of rows of X'.
        step: The step that the batch was drawn for, a 0-d int64 tensor.
        params: The λ' and the partners that mixed it.
    """

    inputs: Tensor
    targets: Tensor
    num_labelled: int
    step: Tensor
    params: MixUpParams

    @property
    def inputs_x(self) -> Tensor:
        """X', ``[B, C, H, W]``, a view of ``inputs``."""
        return self.inputs[: self.num_labelled]

    @property
    def targets_x(self) -> Tensor:
        """Targets of X', ``[B, L]``, a view of ``targets``."""
        return self.targets[: self.num_labelled]

    @property
    def inputs_u(self) -> Tensor:
        """U', ``[K·M, C, H, W]``, a view of ``inputs``."""
        return self.inputs[self.num_labelled :]

    @property
    def targets_u(self) -> Tensor:
        """Targets of U', ``[K·M, L]``, a view of ``targets``."""
        return self.targets[self.num_labelled :]

    def check(self) -> None:
        """Raise if a row is no training example. Reads the device, so it waits for it.

        Call it where a loss turns NaN, or every few hundred steps: NaN logits in the guess, integer
        labels out of range and soft labels that do not sum to one all end in ``targets``, NaN and
        infinite pixels in ``inputs``.

        Raises:
            ValueError: If rows are not finite, or targets do not sum to one; the message lists
                them.
        """
        sums = self.targets.sum(dim=1)
        wrong = ~((sums - 1).abs() <= SUM_TOLERANCE)
        if bool(wrong.any()):
            rows = wrong.nonzero().flatten().tolist()
            raise ValueError(
                f"targets must be finite and sum to 1 in every row, got rows {_listed(rows)} with "
                f"sums {_listed([round(v, 4) for v in sums[wrong].tolist()])}. Bad before mixing: "
                f"rows {self._origins(wrong)} (rows below {self.num_labelled} are labelled, the "
                "others guessed): look for NaN logits, labels out of range, or soft labels that do "
                "not sum to 1"
            )
        wrong = ~self.inputs.flatten(1).isfinite().all(dim=1)
        if bool(wrong.any()):
            rows = wrong.nonzero().flatten().tolist()
            raise ValueError(
                f"inputs must be finite, got NaN or infinity in rows {_listed(rows)}. Bad before "
                f"mixing: rows {self._origins(wrong)} (rows below {self.num_labelled} are "
                "labelled): look for such pixels in x and u"
            )

    def _origins(self, wrong: Tensor) -> str:
        # a row that was wrong before mixing spoils the row whose partner it is, unless λ' hides it
        hosts = self.params.index.argsort()
        hidden = self.params.lam[hosts] > 1 - 2 * SUM_TOLERANCE
        return _listed((wrong & (wrong[hosts] | hidden)).nonzero().flatten().tolist())


class Weighting(NamedTuple):
    """How guesses become targets and weights; see `Implementation.consistency_targets`.

    The guess p is the softmax of the logits; q is p, or p aligned: p·ratio, normalised. The first
    of equal classes is the largest.

    Attributes:
        temperature: T of the sharpening; 0 gives one-hot targets.
        rule: The weight of a row: "fixed", 1 where max q is at least ``threshold``; "soft",
            exp(-min(max q - μ, 0)² / (2σ² / spread²)) (SoftMatch); "free", 1 where max q is at
            least mean confidence · p̃(c) / max p̃ for c = argmax q (FreeMatch); "flex", where it is
            at least threshold · β / (2 - β) for β = count(c) / max count (FlexMatch).
        threshold: In [0, 1].
        state: For "soft" and "free" the averages of `update_averages`, whose first are μ and σ²,
            then p̃; for "flex" the counts of `update_labels`, those of no class among them.
        spread: Standard deviations, of "soft".
        ratio: Factors of an alignment, ``[L]`` float32; None aligns nothing.
        aligned_targets: Whether targets are those of q; else those of p, and q only weighs them.
    """

    temperature: float = 0.0
    rule: WeightRule = "fixed"
    threshold: float = 0.0
    state: Tensor | None = None
    spread: float = 2.0
    ratio: Tensor | None = None
    aligned_targets: bool = True


class Guess(NamedTuple):
    """What rows of a batch are trained towards.

    Attributes:
        targets: ``[B + S·M, L]`` float32.
        weights: ``[B + S·M]`` float32; those of x are 1.
        fairness: What the strong views of all classes should be predicted as, on average, ``[L]``
            float32 (FreeMatch); None where that is no part of the loss.
    """

    targets: Tensor
    weights: Tensor
    fairness: Tensor | None = None


class ConsistencyBatch(NamedTuple):
    """A training batch: x, then S strong views of u, view-major.

    Where the model has guessed already, there is a target and a weight for each row. Else the weak
    views of u follow as the last rows, and `complete` labels the rows by the logits of these, which
    the losses do by themselves.

    Attributes:
        inputs: Images, ``[B + S·M (+ M), C, H, W]``.
        targets: ``[B + S·M, L]`` float32; before the guess the labels of x as they came.
        weights: Of the rows in the loss, ``[B + S·M]`` float32; before the guess None.
        num_labelled: B.
        step: The step that the batch was drawn for, a 0-d int64 tensor.
        num_weak: Rows at the end that are weak views, to be guessed on: M, or 0 after the guess.
        fairness: As in `Guess`.
        guess: What labels a batch by the logits of its weak views; None where that is done.
    """

    inputs: Tensor
    targets: Tensor
    weights: Tensor | None
    num_labelled: int
    step: Tensor
    num_weak: int = 0
    fairness: Tensor | None = None
    guess: Callable[[Tensor], Guess] | None = None

    def complete(self, logits: Tensor) -> "tuple[Tensor, ConsistencyBatch]":
        """Label a batch by the logits of its weak views, without gradient.

        Args:
            logits: ``model(batch.inputs)``, a row for each of ``inputs``.

        Returns:
            The logits of the rows that are trained on, ``[B + S·M, L]``, and these rows as a batch.
            What has its guess already is returned as it is.

        Raises:
            TypeError: If logits are no tensor.
            ValueError: If there is not a row of logits for each input.
        """
        if self.guess is None:
            return logits, self
        if not isinstance(logits, Tensor):
            raise TypeError(f"logits must be a tensor, got {type(logits).__name__}")
        if logits.dim() != 2 or len(logits) != len(self.inputs):
            raise ValueError(
                f"logits must be [{len(self.inputs)}, L], a row for each of batch.inputs, "
                f"got {list(logits.shape)}"
            )
        rows = len(logits) - self.num_weak
        guess = self.guess(logits[rows:].detach())
        completed = self._replace(
            inputs=self.inputs[:rows], num_weak=0, guess=None, **guess._asdict()
        )
        return logits[:rows], completed


class ReMixMatchBatch(NamedTuple):
    """A training batch: N mixed rows, M un-mixed ones, and, where it was asked for, M turned ones.

    The mixed rows are X', then those of the S strong views of u and of its weak one, view-major.
    The un-mixed ones are the first strong view, and the turned ones are that view again: a quarter
    of them by 0, 90, 180 and 270 degrees each.

    Attributes:
        inputs: Images, ``[N + M (+ M), C, H, W]`` with N = B + (S + 1)·M.
        targets: Of all rows but the turned ones, ``[N + M, L]`` float32.
        weights: Of the same rows in the loss, ``[N + M]`` float32: ones.
        num_labelled: B, the number of rows of X'.
        num_mixed: N.
        step: The step that the batch was drawn for, a 0-d int64 tensor.
        params: The λ' and the partners of the mixed rows.
        rotations: Quarter turns of the turned rows, counter-clockwise, ``[M]`` int64 in 0 .. 3;
            None where there are none.
    """

    inputs: Tensor
    targets: Tensor
    weights: Tensor
    num_labelled: int
    num_mixed: int
    step: Tensor
    params: MixUpParams
    rotations: Tensor | None = None

    @property
    def mixed(self) -> MixMatchBatch:
        """The mixed rows, as views of this batch."""
        rows = slice(self.num_mixed)
        images, targets = self.inputs[rows], self.targets[rows]
        return MixMatchBatch(images, targets, self.num_labelled, self.step, self.params)

    def check(self) -> None:
        """Raise if a row is no training example; see `MixMatchBatch.check`.

        Whatever the rows that are not mixed are made of is in mixed ones, too.

        Raises:
            ValueError: If rows are not finite, or targets do not sum to one.
        """
        self.mixed.check()


class SemiSupervisedBatch(NamedTuple):
    """What a loader gives for one step, before any augmentation.

    Attributes:
        x: Labelled images, ``[B, C, H, W]`` or ``[B, H, W, C]`` uint8.
        y: Their labels, ``[B]`` int64.
        u: Unlabelled images, like x; M of them.
        ids_x: Sample ids of x, ``[B]`` int64, on the CPU: where the images lie in their data set.
        ids_u: Sample ids of u, ``[M]`` int64, on the CPU.
    """

    x: Tensor
    y: Tensor
    u: Tensor
    ids_x: Tensor
    ids_u: Tensor


class LossOutput(NamedTuple):
    """The loss and its parts, all 0-d float32 tensors.

    Attributes:
        loss: loss_x + weight_u · loss_u, to call ``backward`` on.
        loss_x: Cross-entropy on X' (eq. 3).
        loss_u: Squared error of probabilities on U' (eq. 4).
        weight_u: λ_U after its ramp.
    """

    loss: Tensor
    loss_x: Tensor
    loss_u: Tensor
    weight_u: Tensor


class ConsistencyLossOutput(NamedTuple):
    """The loss of a `ConsistencyBatch` and its parts, all 0-d float32 tensors.

    Attributes:
        loss: loss_x + weight_u · loss_u (+ weight_fair · loss_fair), to call ``backward`` on.
        loss_x: Cross-entropy on x.
        loss_u: Weighted loss of the strong views, a mean over all of them, masked or not.
        weight_u: λ_U after its ramp.
        loss_fair: FreeMatch's fairness loss, else 0.
        kept: Share of the strong views whose weight is above 0.
        mean_weight: Mean weight of the strong views.
    """

    loss: Tensor
    loss_x: Tensor
    loss_u: Tensor
    weight_u: Tensor
    loss_fair: Tensor
    kept: Tensor
    mean_weight: Tensor


class ReMixMatchLossOutput(NamedTuple):
    """The loss of a `ReMixMatchBatch` and its parts, all 0-d float32 tensors.

    Attributes:
        loss: loss_x + weight_u · loss_u + weight_kl · loss_kl + λ_rot · loss_rot, to call
            ``backward`` on.
        loss_x: Cross-entropy on X'.
        loss_u: Cross-entropy on the other mixed rows.
        loss_kl: Cross-entropy on the un-mixed rows.
        loss_rot: Cross-entropy of the quarter turns; 0 for λ_rot = 0.
        weight_u: λ_mix after its ramp.
        weight_kl: λ_KL after its ramp.
    """

    loss: Tensor
    loss_x: Tensor
    loss_u: Tensor
    loss_kl: Tensor
    loss_rot: Tensor
    weight_u: Tensor
    weight_kl: Tensor


def _listed(values: list[int] | list[float], most: int = 8) -> str:
    shown = ", ".join(str(value) for value in values[:most])
    return f"[{shown}{', ...' if len(values) > most else ''}]"
