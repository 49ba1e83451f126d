"""Settings of the papers and of ports, each difference a named switch.

A `Preset` holds plain keyword arguments for `MixMatch`, `MixMatchLoss` and `interleaved_forward`,
and the optimiser's settings::

    preset = presets.paper("cifar10")
    mixmatch = MixMatch(preset.augment(), num_classes=10, **preset.builder)
    criterion = MixMatchLoss(**preset.loss)
    logits = preset.forward(model, mixmatch(x, y, u, model))

| switch | paper and reference | yu1ut | usb |
|---|---|---|---|
| λ | per row | per batch | per batch |
| guess | K passes, running statistics left alone | K passes, statistics move | as the paper |
| forward | interleaved, statistics move with the first group | interleaved, with all | \
groups of B rows in order, with the first |
| α, λ_U | 0.75, per data set | 0.75, 75 | 0.5, 100 |
| ramp of λ_U | 16 384 steps | 1 048 576 steps, the whole run | 419 430 steps, 0.4 of the run |
| optimiser | Adam 0.002, decay 4e-5 on kernels | Adam 0.002, decay 4e-5 | \
SGD 0.03, Nesterov momentum 0.9, L2 decay 5e-4 |
| filters of WRN-28-2 | 32, for CIFAR-100 135 | 32 | 32 |

Left out, as mistakes: YU1ut's crop never draws the last offset, and its decay takes BatchNorm's
weights too (here it takes kernels alone). Left out, as no part of the batch: USB's augmentation by
PIL, and its cosine schedule of the learning rate.

The other methods have a preset each, with what its own code runs::

    preset = presets.fixmatch("cifar10")
    fixmatch = preset.build(num_classes=10)
    criterion = preset.criterion()

| preset | whose settings | what differs in USB |
|---|---|---|
| `fixmatch` | google-research/fixmatch, with RandAugment | three operations, always applied |
| `uda` | google-research/uda | T is never applied; EMA 0.999 |
| `softmatch` | USB's, with the paper's μ = 7 | μ = 1; averages of aligned guesses |
| `freematch` | TorchSSL's, fairness 0.01 | fairness 0.001 |
| `flexmatch` | TorchSSL's | nothing |
| `mean_teacher` | google-research/fixmatch | its consistency term has no gradient |
| `pi_model` | google-research/fixmatch | nothing |
| `ict` | google-research/fixmatch, as MixMatch's paper has it | it has none |
| `ict_reference` | vikasverma1077/ICT | it has none |
| `remixmatch` | google-research/remixmatch | SGD, λ per batch, two strong views, no interleaving, \
an average in place of the window |

All but `uda` run 2^20 steps. All but the last three take SGD of lr 0.03 · cos(7π/16 · share of the
run), Nesterov momentum 0.9, and an L2 decay of 5e-4 on kernels, FixMatch and its kin 1e-3 for
CIFAR-100, whose network has 128 filters. Averages have a decay of 0.999. A step has B = 64 labelled
and μ · B unlabelled images. USB has 32 filters for CIFAR-100 in all but `flexmatch`, and normalises
CIFAR-10 with ImageNet's constants.

Not followed: STL-10's network is WRN-37-2; UDA standardises each channel, and its strong views are
made before they are flipped and shifted, as TorchSSL's; FixMatch's headline runs learn their
augmentation (CTAugment), as all of ReMixMatch's do; google-research/fixmatch runs labelled images,
teacher and student of `mean_teacher` and `ict` in passes of their own, of which the first alone
moves BatchNorm's statistics; and ICT's authors have batches of 100, whitened pixels, 400 epochs
with a falling learning rate, and a ramp of a sigmoid's form.
"""

import math
from typing import Any, NamedTuple

from torch import nn

from gpu_mixmatch._validation import as_integer, shown
from gpu_mixmatch.augment.strong import RandAugment
from gpu_mixmatch.augment.weak import WeakAugment
from gpu_mixmatch.losses import ConsistencyLoss, MixMatchLoss, ReMixMatchLoss
from gpu_mixmatch.methods.alignment import DistributionAlignment
from gpu_mixmatch.methods.base import BatchBuilder
from gpu_mixmatch.methods.fixmatch import UDA, FixMatch, FlexMatch, FreeMatch, SoftMatch
from gpu_mixmatch.methods.ict import ICT
from gpu_mixmatch.methods.mean_teacher import MeanTeacher
from gpu_mixmatch.methods.mixmatch import MixMatch
from gpu_mixmatch.methods.passes import interleaved_forward
from gpu_mixmatch.methods.remixmatch import ReMixMatch
from gpu_mixmatch.methods.thresholds import FreeThreshold, SoftThreshold
from gpu_mixmatch.types import ConsistencyBatch, MixMatchBatch, ReMixMatchBatch

# Per data set: the augmentation's factory, λ_U and α of the paper (section 4 and appendix), and the
# filters of WRN-28-2's first stage. Data sets that the paper does not have are marked.
_PAPER: dict[str, tuple[str, dict[str, float], int]] = {
    "cifar10": ("cifar10", {"lambda_u": 75.0, "alpha": 0.75}, 32),
    "cifar100": ("cifar100", {"lambda_u": 150.0, "alpha": 0.75}, 135),
    "svhn": ("svhn", {"lambda_u": 250.0, "alpha": 0.75}, 32),
    "svhn-extra": ("svhn", {"lambda_u": 250.0, "alpha": 0.25}, 32),
    "stl10": ("stl10", {"lambda_u": 50.0, "alpha": 0.75}, 32),
    "fashion-mnist": ("fashion_mnist", {"lambda_u": 75.0, "alpha": 0.75}, 32),  # not in the paper
    "mnist": ("svhn", {"lambda_u": 75.0, "alpha": 0.75}, 32),  # not in the paper
    "digits": ("digits", {"lambda_u": 75.0, "alpha": 0.75}, 32),  # not in the paper
}

USB_GREY = (123,)  # the luma of the colour that its cutout has

Loss = MixMatchLoss | ConsistencyLoss | ReMixMatchLoss


class Preset(NamedTuple):
    """A named set of switches.

    Attributes:
        name: Whose settings these are.
        dataset: The data set that they are for.
        builder: Keyword arguments of the method, beside engines and ``num_classes``; and the
            "momentum" of a threshold that follows the guesses, or the "window" of an alignment.
        loss: Keyword arguments of its loss.
        interleaving: Keyword arguments of `interleaved_forward`; without any there is one pass.
        optimizer: "adam" or "sgd" with its learning rate and momentum, and, for kernels only,
            "decay", the share that a step takes off them (decoupled), or "weight_decay", which
            adds to their gradient. Where there is a "cosine", the learning rate of a step is
            multiplied with cos(cosine · π · share of the run that is over).
        ema_decay: Decay of the averaged weights that are evaluated, and of a teacher.
        filters: Channels of the first stage of WRN-28-2.
        method: "mixmatch", or the preset's own name.
        ratio: μ, unlabelled images per labelled one.
        steps: Length of the run.
        strong: The factory of `RandAugment` that makes strong views; None where there are none.
    """

    name: str
    dataset: str
    builder: dict[str, Any]
    loss: dict[str, Any]
    interleaving: dict[str, Any]
    optimizer: dict[str, Any]
    ema_decay: float
    filters: int
    method: str = "mixmatch"
    ratio: int = 1
    steps: int = 1024 * 1024
    strong: str | None = None

    def augment(self, **fields: Any) -> WeakAugment:
        """Return the data set's `WeakAugment`; fields replace its own."""
        factory = getattr(WeakAugment, _PAPER[self.dataset][0])
        augment: WeakAugment = factory(**fields)
        return augment

    def strong_augment(self, weak: WeakAugment | None = None) -> RandAugment:
        """Return the engine of the strong views behind ``weak``, or behind `augment`.

        Raises:
            ValueError: If the method has no strong views.
        """
        if self.strong is None:
            raise ValueError(f"method must have strong views, got {self.method!r}, which has none")
        colour = {"cutout_color": USB_GREY} if self.strong == "usb" and self.is_grey else {}
        engine: RandAugment = getattr(RandAugment, self.strong)(weak or self.augment(), **colour)
        return engine

    @property
    def is_grey(self) -> bool:
        """Whether the data set's images have one channel."""
        return self.dataset in ("fashion-mnist", "mnist", "digits")

    def build(
        self, num_classes: int, *, weak: Any = None, strong: Any = None, **more: Any
    ) -> BatchBuilder:
        """Return the method's builder.

        Args:
            num_classes: L.
            weak: Engine of the weak views, or of all; None takes `augment`.
            strong: Engine of the strong ones, for a method that has any; None takes
                `strong_augment` behind ``weak``.
            more: Further arguments of the method, such as ``seed``. `MeanTeacher` and `ICT` need
                their ``teacher``, `FlexMatch` its ``num_unlabelled``.
        """
        weak = self.augment() if weak is None else weak
        options = {**self.builder, **more}
        if self.strong is None:
            alike: BatchBuilder = _WEAK_METHODS[self.method](weak, num_classes, **options)
            return alike
        if "momentum" in options:
            threshold = _FOLLOWING[self.method](options.pop("momentum"))
            options.setdefault("threshold", threshold)
        if "window" in options:
            alignment = DistributionAlignment(window=options.pop("window"))
            options.setdefault("alignment", alignment)
        if strong is None:
            strong = self.strong_augment(weak if isinstance(weak, WeakAugment) else None)
        apart: BatchBuilder = _STRONG_METHODS[self.method](weak, strong, num_classes, **options)
        return apart

    def criterion(self, **changes: Any) -> Loss:
        """Return the method's loss; ``changes`` replace arguments of it."""
        loss: Loss = _LOSSES.get(self.method, ConsistencyLoss)(**{**self.loss, **changes})
        return loss

    def forward(
        self, model: nn.Module, batch: MixMatchBatch | ConsistencyBatch | ReMixMatchBatch
    ) -> Any:
        """Run the model on the batch as this preset does; logits in batch order, ``[N, L]``.

        Of `ReMixMatch` with its rotation it is the pair that its loss takes.
        """
        if not self.interleaving:
            return model(batch.inputs)
        return interleaved_forward(model, batch, **self.interleaving)

    def lr_factor(self, step: int, steps: int) -> float:
        """Return what the learning rate of a step is multiplied with, in a run of so many steps.

        Raises:
            ValueError: If ``step`` is below 0 or ``steps`` below 1.
        """
        done = as_integer("step", step) / as_integer("steps", steps, least=1)
        return math.cos(self.optimizer.get("cosine", 0.0) * math.pi * min(1.0, done))


_WEAK_METHODS: dict[str, Any] = {
    "mixmatch": MixMatch,
    "mean_teacher": MeanTeacher,
    "pi_model": MeanTeacher,
    "ict": ICT.fixmatch,
}
_STRONG_METHODS: dict[str, Any] = {
    "fixmatch": FixMatch,
    "uda": UDA,
    "softmatch": SoftMatch,
    "freematch": FreeMatch,
    "flexmatch": FlexMatch,
    "remixmatch": ReMixMatch,
}
_LOSSES: dict[str, Any] = {"mixmatch": MixMatchLoss, "remixmatch": ReMixMatchLoss}
_FOLLOWING: dict[str, Any] = {"softmatch": SoftThreshold, "freematch": FreeThreshold}


def paper(dataset: str = "cifar10") -> Preset:
    """Return the settings of the paper and of google-research/mixmatch.

    The paper prints a weight decay of 0.0004; the code applies 0.02 · lr = 4e-5 per step, decoupled
    from the gradient, to kernels only. This preset follows the code.

    Args:
        dataset: cifar10, cifar100, svhn, svhn-extra or stl10 as in the paper; fashion-mnist, mnist
            and digits with CIFAR-10's weights, since the paper does not have them.

    Raises:
        ValueError: If the data set is unknown.
    """
    _, values, filters = _settings(dataset)
    return Preset(
        name="paper",
        dataset=dataset,
        builder={
            "num_augmentations": 2,
            "temperature": 0.5,
            "alpha": values["alpha"],
            "lam": "sample",
            "guess_bn": "batch",
            "guess_forward": "separate",
        },
        loss={"lambda_u": values["lambda_u"], "rampup_steps": 16_384},
        interleaving={"swap": True, "running_stats": "first"},
        optimizer={"name": "adam", "lr": 0.002, "decay": 4e-5},
        ema_decay=0.999,
        filters=filters,
    )


def yu1ut(dataset: str = "cifar10") -> Preset:
    """Return the settings of YU1ut/MixMatch-pytorch, a much copied port.

    λ per batch; the running statistics of BatchNorm move five times a step, in both guess passes
    and in all three groups; the weight ramps over the whole run of 1024 · 1024 steps. Its script
    knows CIFAR-10 alone; λ_U = 75, α = 0.75 and 32 filters are taken for every data set here.

    Raises:
        ValueError: If the data set is unknown.
    """
    base = paper(dataset)
    return base._replace(
        name="yu1ut",
        builder={**base.builder, "alpha": 0.75, "lam": "batch", "guess_bn": "update"},
        loss={"lambda_u": 75.0, "rampup_steps": 1024 * 1024},
        interleaving={"swap": True, "running_stats": "all"},
        filters=32,
    )


def usb(dataset: str = "cifar10") -> Preset:
    """Return the settings of microsoft/Semi-supervised-learning (USB, semilearn), classic CV.

    λ per batch with α = 0.5; groups of B rows in order, without interleaving, as its current code
    has it (an earlier version interleaved); λ_U = 100, ramped over 0.4 of 1 048 576 steps; SGD.
    Values are those of ``config/classic_cv/mixmatch/mixmatch_cifar10_250_0.yaml``.

    Raises:
        ValueError: If the data set is unknown.
    """
    base = paper(dataset)
    return base._replace(
        name="usb",
        builder={**base.builder, "alpha": 0.5, "lam": "batch"},
        loss={"lambda_u": 100.0, "rampup_steps": round(0.4 * 1024 * 1024)},
        interleaving={"swap": False, "running_stats": "first"},
        optimizer={
            "name": "sgd",
            "lr": 0.03,
            "momentum": 0.9,
            "nesterov": True,
            "weight_decay": 5e-4,
        },
        filters=32,
    )


def fixmatch(dataset: str = "cifar10") -> Preset:
    """Return the settings of google-research/fixmatch with RandAugment.

    Raises:
        ValueError: If the data set is unknown.
    """
    return _confident("fixmatch", dataset, {"threshold": 0.95})


def uda(dataset: str = "cifar10") -> Preset:
    """Return the settings of google-research/uda for images.

    Training signal annealing is off, as in its script for CIFAR-10; `ConsistencyLoss` has it as
    ``tsa``. For CIFAR-100 the settings are FixMatch's.

    Raises:
        ValueError: If the data set is unknown.
    """
    preset = _confident("uda", dataset, {"temperature": 0.4, "threshold": 0.8}, strong="uda")
    loss = {**preset.loss, "loss_u": "kl"}
    return preset._replace(loss=loss, ema_decay=0.9999, steps=500_000)


def softmatch(dataset: str = "cifar10") -> Preset:
    """Return the settings of SoftMatch's paper, as USB runs them.

    Raises:
        ValueError: If the data set is unknown.
    """
    return _confident("softmatch", dataset, {"momentum": 0.999}, strong="usb")


def freematch(dataset: str = "cifar10") -> Preset:
    """Return the settings of FreeMatch's paper, with the fairness of TorchSSL.

    Raises:
        ValueError: If the data set is unknown.
    """
    preset = _confident("freematch", dataset, {"momentum": 0.999}, strong="usb")
    return preset._replace(loss={**preset.loss, "lambda_fair": 0.01})


def flexmatch(dataset: str = "cifar10") -> Preset:
    """Return the settings of TorchSSL, the code of FlexMatch's paper.

    Raises:
        ValueError: If the data set is unknown.
    """
    return _confident("flexmatch", dataset, {"threshold": 0.95}, strong="usb")


def mean_teacher(dataset: str = "cifar10") -> Preset:
    """Return the settings of google-research/fixmatch for mean teachers.

    The paper has a weight of 100, a ramp of 5 epochs and a decay that ramps too.

    Raises:
        ValueError: If the data set is unknown.
    """
    return _consistent("mean_teacher", dataset, lambda_u=50.0)


def pi_model(dataset: str = "cifar10") -> Preset:
    """Return the settings of google-research/fixmatch for the Π-model.

    Raises:
        ValueError: If the data set is unknown.
    """
    return _consistent("pi_model", dataset, lambda_u=10.0)


def ict(dataset: str = "cifar10") -> Preset:
    """Return the settings of google-research/fixmatch for ICT, which are MixMatch's paper's, too.

    Raises:
        ValueError: If the data set is unknown.
    """
    preset = _consistent("ict", dataset, lambda_u=50.0)
    switches = {
        "alpha": 0.5,
        "lam": "sample",
        "mix": "unlabelled",
        "partner": "reversed",
        "blend": "probs",
    }
    return preset._replace(builder=switches, optimizer=paper(dataset).optimizer)


def ict_reference(dataset: str = "cifar10") -> Preset:
    """Return the settings of ICT's authors.

    Raises:
        ValueError: If the data set is unknown.
    """
    preset = _consistent("ict", dataset, lambda_u=100.0)
    switches = {
        "alpha": 0.1 if dataset.startswith("svhn") else 1.0,
        "lam": "batch",
        "mix": "separate",
        "partner": "shuffled",
        "blend": "logits",
    }
    loss = {**preset.loss, "rampup_steps": preset.steps // 4}
    optimizer = {**preset.optimizer, "lr": 0.1, "weight_decay": 1e-4, "cosine": 0.0}
    return preset._replace(name="ict_reference", builder=switches, loss=loss, optimizer=optimizer)


def remixmatch(dataset: str = "cifar10") -> Preset:
    """Return the settings of google-research/remixmatch, with RandAugment for its CTAugment.

    They are for 250 labels or more: its runs with 40 have one strong view, and rotations of a
    weight of 2, 3 for SVHN. The model must return logits of the turns beside its own, or
    ``rotation`` and ``lambda_rot`` be replaced.

    Raises:
        ValueError: If the data set is unknown.
    """
    base = paper(dataset)
    views = 4 if dataset == "stl10" else 8
    return base._replace(
        name="remixmatch",
        builder={
            "num_strong": views,
            "temperature": 0.5,
            "alpha": 0.75,
            "window": 128,
            "rotation": True,
        },
        loss={"lambda_mix": 1.5, "lambda_kl": 0.5, "lambda_rot": 0.5, "rampup_steps": 16_384},
        interleaving={"swap": True, "running_stats": "last"},
        filters=128 if dataset == "cifar100" else 32,
        method="remixmatch",
        strong="fixmatch",
    )


def _confident(
    name: str, dataset: str, builder: dict[str, Any], strong: str = "fixmatch"
) -> Preset:
    """What FixMatch and its kin have in common."""
    _settings(dataset)
    large = dataset == "cifar100"
    return Preset(
        name=name,
        dataset=dataset,
        builder=builder,
        loss={"lambda_u": 1.0, "rampup_steps": 0},
        interleaving={},
        optimizer={
            "name": "sgd",
            "lr": 0.03,
            "momentum": 0.9,
            "nesterov": True,
            "weight_decay": 1e-3 if large else 5e-4,
            "cosine": 7 / 16,
        },
        ema_decay=0.999,
        filters=128 if large else 32,
        method=name,
        ratio=7,
        strong=strong,
    )


def _consistent(name: str, dataset: str, lambda_u: float) -> Preset:
    """What methods have in common that compare probabilities of weak views."""
    preset = _confident(name, dataset, {})
    ramp = round(0.4 * preset.steps)
    return preset._replace(
        loss={"lambda_u": lambda_u, "rampup_steps": ramp, "loss_u": "mse"},
        optimizer={**preset.optimizer, "weight_decay": 5e-4},
        ratio=1,
        strong=None,
    )


def _settings(dataset: str) -> tuple[str, dict[str, float], int]:
    if not isinstance(dataset, str) or dataset not in _PAPER:
        raise ValueError(f"dataset must be one of {list(_PAPER)}, got {shown(dataset)}")
    return _PAPER[dataset]
