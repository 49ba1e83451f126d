"""Settings of the paper and of two of its ports, each difference a named switch.

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
"""

from typing import Any, NamedTuple

from torch import Tensor, nn

from gpu_mixmatch._validation import shown
from gpu_mixmatch.augment.weak import WeakAugment
from gpu_mixmatch.methods.passes import interleaved_forward
from gpu_mixmatch.types import MixMatchBatch

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


class Preset(NamedTuple):
    """A named set of switches.

    Attributes:
        name: Whose settings these are.
        dataset: The data set that they are for.
        builder: Keyword arguments of `MixMatch`, beside ``augment`` and ``num_classes``.
        loss: Keyword arguments of `MixMatchLoss`.
        interleaving: Keyword arguments of `interleaved_forward`.
        optimizer: "adam" or "sgd" with its learning rate and momentum, and, for kernels only,
            "decay", the share that a step takes off them (decoupled), or "weight_decay", which
            adds to their gradient.
        ema_decay: Decay of the averaged weights that are evaluated.
        filters: Channels of the first stage of WRN-28-2.
    """

    name: str
    dataset: str
    builder: dict[str, Any]
    loss: dict[str, Any]
    interleaving: dict[str, Any]
    optimizer: dict[str, Any]
    ema_decay: float
    filters: int

    def augment(self, **fields: Any) -> WeakAugment:
        """Return the data set's `WeakAugment`; fields replace its own."""
        factory = getattr(WeakAugment, _PAPER[self.dataset][0])
        augment: WeakAugment = factory(**fields)
        return augment

    def forward(self, model: nn.Module, batch: MixMatchBatch) -> Tensor:
        """Run the model on the batch as this preset does; logits in batch order, ``[N, L]``."""
        return interleaved_forward(model, batch, **self.interleaving)


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


def _settings(dataset: str) -> tuple[str, dict[str, float], int]:
    if not isinstance(dataset, str) or dataset not in _PAPER:
        raise ValueError(f"dataset must be one of {list(_PAPER)}, got {shown(dataset)}")
    return _PAPER[dataset]
