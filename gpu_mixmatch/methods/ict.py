"""ICT: interpolation consistency training, as its authors ran it and as FixMatch's did."""

from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from gpu_mixmatch import _unchecked, sampling
from gpu_mixmatch._keys import CountedKey
from gpu_mixmatch._validation import as_plan, check_choice, check_device
from gpu_mixmatch.augment import as_augment
from gpu_mixmatch.augment.base import Augment, complete
from gpu_mixmatch.impl.constants import constant
from gpu_mixmatch.methods.base import BatchBuilder
from gpu_mixmatch.methods.passes import GuessBatchNorm, Model
from gpu_mixmatch.types import ConsistencyBatch, DrawPlan, Impl, LamMode, MixUpParams

Blend = Literal["logits", "probs"]
Partner = Literal["shuffled", "reversed"]
IctMix = Literal["separate", "unlabelled"]


class ICT(BatchBuilder):
    """Train a mixed image towards the mixture of what a teacher says of its two parts.

    There are two methods of this name, and each has a constructor:

    | | `reference`, its authors' | `fixmatch`, a baseline of FixMatch's authors |
    |---|---|---|
    | ``lam``: λ | one for x and one for u | one per row |
    | ``partner`` | any row | row M - 1 - i of row i |
    | ``blend``: what of the teacher is mixed | logits, before the softmax | probabilities |
    | ``mix`` | x with x, u with u | u with u; x stays as it is |
    | ``alpha``: α | 1 for CIFAR-10, 0.1 for SVHN | 0.5 |
    | λ_U | up to 100, over a quarter of the run | 50, over 0.4 of the run |

    λ is λ' = max(λ, 1 - λ) throughout. Its authors take λ itself; with one λ for all rows and any
    partners these are the same batches as often, up to the order of their rows. The loss is
    `ConsistencyLoss(lambda_u, rampup_steps, loss_u="mse")`, whose ramp is linear where theirs is a
    sigmoid's.

    Args:
        augment: An engine such as `WeakAugment`. One view of u is guessed on and mixed.
        num_classes: L, at least 2.
        alpha: α of Beta(α, α).
        lam: "batch" draws a λ for x and one for u, "sample" one per row.
        mix: "separate" mixes x with x and u with u, "unlabelled" u alone.
        partner: "shuffled" draws partners, "reversed" takes the rows from the last on.
        blend: Mixes the teacher's "logits" or its probabilities, "probs".
        guess_bn: BatchNorm while guessing; see `BatchBuilder`, like the next six.
        teacher: An average of the model over steps, in the caller's hands, as both references have
            it; None is the model of the call.
        label_smoothing: See there.
        logits_getter: See there.
        reuse_buffers: See there.
        seed: See there.
        impl: See there.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of its range.

    References:
        Verma et al., "Interpolation Consistency Training for Semi-Supervised Learning", IJCAI 2019;
        vikasverma1077/ICT; google-research/fixmatch, ``ict.py``.
    """

    switches = (
        *("num_classes", "alpha", "lam", "mix", "partner", "blend", "guess_bn"),
        "label_smoothing",
    )

    def __init__(
        self,
        augment: Any,
        num_classes: int,
        *,
        alpha: float = 1.0,
        lam: LamMode = "batch",
        mix: IctMix = "separate",
        partner: Partner = "shuffled",
        blend: Blend = "logits",
        guess_bn: GuessBatchNorm = "batch",
        teacher: nn.Module | None = None,
        label_smoothing: float = 0.0,
        logits_getter: Callable[[Any], Tensor] | None = None,
        reuse_buffers: bool = False,
        seed: int = 0,
        impl: Impl = "auto",
    ) -> None:
        super().__init__(
            num_classes,
            guess_bn=guess_bn,
            teacher=teacher,
            label_smoothing=label_smoothing,
            logits_getter=logits_getter,
            reuse_buffers=reuse_buffers,
            seed=seed,
            impl=impl,
        )
        check_choice("lam", lam, LamMode)
        check_choice("mix", mix, IctMix)
        check_choice("partner", partner, Partner)
        check_choice("blend", blend, Blend)
        self.alpha = as_plan(DrawPlan(alpha=alpha)).alpha
        sampling.folded_beta_quantile(self.alpha)  # takes a moment, once
        self.augment = as_augment(augment)
        self.lam = lam
        self.mix = mix
        self.partner = partner
        self.blend = blend
        self._finish()

    @classmethod
    def reference(cls, augment: Any, num_classes: int, **options: Any) -> Self:
        """Return what ICT's authors ran on CIFAR-10: the defaults; options replace them."""
        return cls(augment, num_classes, **options)

    @classmethod
    def fixmatch(cls, augment: Any, num_classes: int, **options: Any) -> Self:
        """Return what FixMatch's authors ran as ICT, and MixMatch's; options replace its switches.

        The paper of MixMatch has it as the last row of its ablation.
        """
        switches = {"alpha": 0.5, "lam": "sample", "mix": "unlabelled"}
        theirs = {**switches, "partner": "reversed", "blend": "probs"}
        return cls(augment, num_classes, **{**theirs, **options})

    @property
    def plan(self) -> DrawPlan:
        """What is drawn for a batch, here and not by the engine."""
        return self._plan_of(complete(self.augment))

    @property
    def engines(self) -> dict[str, Any]:
        """The engine, as "augment"."""
        return {"augment": self.augment}

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        u: Tensor,
        model: Model | None = None,
        *,
        ids_x: Tensor | None = None,
        ids_u: Tensor | None = None,
        key: Tensor | CountedKey | None = None,
    ) -> ConsistencyBatch:
        """Build the batch of the next step; arguments as for `ReMixMatch.forward`.

        Returns:
            B rows of x and M mixed rows of u, with their targets; all weigh 1.

        Raises:
            TypeError: If an argument is of the wrong kind, or there is nothing to guess with.
            ValueError: If images, labels, ids or the model's logits do not fit each other.
        """
        guesser = self._guesser(model)
        x, y, u, ids = self._taken_in(x, y, u, (ids_x, ids_u), key)
        engine = complete(self.augment)
        draws, mixup = self._draw(self._plan_of(engine), ids, key, self.device)
        if draws is None:
            draws = engine.draw_batch(self.seed, int(self.step), *ids, 1)
        params = self._params(mixup, len(x))
        workspaces = self._workspaces
        with torch.no_grad():
            views = engine.views(x, u, draws, 1, workspaces[0] if workspaces else None)
            shown = views.unlabelled
            # a copy: the model may write into what it is given
            logits = self._guess_logits(shown.clone() if views.mixes_unlabelled else shown, guesser)
            check_device("y", y, "logits", logits)

            def targets(params: MixUpParams | None) -> Tensor:
                return _unchecked.batch_targets(
                    y, logits, 1.0, self.label_smoothing, params, self.impl
                )

            rows = len(params.lam)
            out = self._output(rows, shown, workspaces) if workspaces else None
            inputs, mixed_targets = views.mix(params, targets, out, self.impl)
            if self.blend == "logits":
                mixed_targets[len(x) :] = _blend(logits[0].float(), params, len(x)).softmax(dim=1)
            weights = torch.ones(rows, dtype=torch.float32, device=self.device)
        step = self.step.clone()
        self.step.add_(1)
        return ConsistencyBatch(inputs, mixed_targets, weights, len(x), step)

    def _plan_of(self, engine: Augment) -> DrawPlan:
        policy = engine.policy if engine.drawn_by_builder else None
        return DrawPlan(1, policy, self.alpha, "sample", self.mix)

    def _params(self, drawn: MixUpParams, num_x: int) -> MixUpParams:
        """What mixes the rows, of what was drawn for each: a λ of many is that of the first row."""
        lam, index = drawn
        if self.lam == "batch":
            parts = lam[:num_x], lam[num_x:]
            lam = torch.cat([part[:1].expand(len(part)) for part in parts])
        if self.partner == "reversed":
            index = _reversed(num_x, len(lam) - num_x, self.mix == "separate", index.device)
        return MixUpParams(lam, index)


def _blend(logits: Tensor, params: MixUpParams, num_x: int) -> Tensor:
    """Mix the logits of u as its images are."""
    lam, partners = params.lam[num_x:, None], params.index[num_x:] - num_x
    return torch.lerp(logits[partners], logits, lam)


@constant
def _reversed(num_x: int, num_u: int, with_x: bool, device: torch.device) -> Tensor:
    """Partners from the last row on, of u, and of x where it is mixed."""
    of_x, of_u = torch.arange(num_x), torch.arange(num_x, num_x + num_u)
    return torch.cat((of_x.flip(0) if with_x else of_x, of_u.flip(0))).to(device)
