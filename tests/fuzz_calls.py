"""Valid calls of all that is public, for `test_fuzz_arguments`: add a line for what is new.

Each argument of a call is replaced in turn by values that are none of its kind, or out of range.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import TensorDataset

import gpu_mixmatch as gm
from gpu_mixmatch import functional, presets, sampling
from gpu_mixmatch._buffers import Workspace
from gpu_mixmatch.augment import CallableAugment
from gpu_mixmatch.data.datasets import load_dataset
from gpu_mixmatch.data.images import file_list, image_folder, tfrecords, web_dataset
from gpu_mixmatch.insight import GuessWatch, TensorBoardInsight, draw_preview
from gpu_mixmatch.types import AugmentPolicy, Chain, Cut, DrawPlan, Geometry, Scaling, Weighting
from tests.factories import PooledNet, random_images, random_labels
from tests.image_files import encode, tile, write_tar, write_tfrecord

CLASSES = 3
POLICY = AugmentPolicy(1, (0, 1), 0.5, (0.0, 1.0))


class Call(NamedTuple):
    """A call that succeeds.

    Attributes:
        function: What is called with ``arguments()`` as keywords.
        arguments: Makes them anew, since calls may write to them.
        names: What an error may call an argument, beside its own name.
        errors: What may be raised beside TypeError and ValueError, as documented.
    """

    function: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]
    names: Mapping[str, tuple[str, ...]] = {}
    errors: tuple[type[Exception], ...] = ()


def images(count: int = 4) -> torch.Tensor:
    return random_images(count, (3, 6, 6), seed=count)


def weak(**fields: Any) -> gm.WeakAugment:
    return gm.WeakAugment(1, zoom_px=(0, 1), blur_sigma=(0.0, 1.0), **fields)


def builder(**switches: Any) -> gm.MixMatch:
    return gm.MixMatch(weak(), CLASSES, **switches)


def batch() -> gm.MixMatchBatch:
    return builder()(images(), random_labels(4, CLASSES), images(5), PooledNet(CLASSES))


def step_arguments() -> dict[str, Any]:
    return {
        "x": images(),
        "y": random_labels(4, CLASSES),
        "u": images(5),
        "model": PooledNet(CLASSES),
        "ids_x": torch.arange(4),
        "ids_u": torch.arange(5),
    }


def consistency_switches() -> dict[str, Any]:
    return {
        "weak": weak(),
        "strong": gm.RandAugment(weak(), cutout=2),
        "num_classes": CLASSES,
        "num_strong": 2,
        "threshold": 0.5,
        "temperature": 0.5,
        "alignment": gm.DistributionAlignment(2),
        "guess_bn": "batch",
        "teacher": None,
        "label_smoothing": 0.1,
        "logits_getter": None,
        "reuse_buffers": False,
        "seed": 3,
        "impl": "auto",
    }


def fixmatch(method: Any = gm.FixMatch, **switches: Any) -> Any:
    return method(weak(), gm.RandAugment(weak(), cutout=2), CLASSES, **switches)


def loss_rows() -> dict[str, Any]:
    return {
        "logits": torch.rand(6, CLASSES),
        "targets": torch.rand(6, CLASSES),
        "weights": torch.rand(6),
        "num_labelled": 2,
        "weight_u": 3.0,
        "loss_u": "kl",
        "tsa": torch.tensor(0.5),
        "num_u": 2,
        "share_v": 0.5,
        "impl": "auto",
    }


def rows() -> dict[str, Any]:
    return {
        "inputs": torch.rand(6, 3, 2, 2),
        "targets": torch.rand(6, CLASSES),
        "params": sampling.draw_mixup(0, 0, 2, 2),
        "out": torch.empty(6, 3, 2, 2),
        "impl": "auto",
    }


def plan() -> DrawPlan:
    return DrawPlan(2, POLICY)


class Writer:
    """As much of a SummaryWriter as is called."""

    def add_scalar(self, *args: Any) -> None:
        pass

    def add_image(self, *args: Any, **options: Any) -> None:
        pass


def weak_fields() -> dict[str, Any]:
    return {
        "padding": 1,
        "padding_mode": "edge",
        "zoom_px": (0, 1),
        "flip": 0.5,
        "blur_sigma": (0.0, 1.0),
        "mean": 0.5,
        "std": (0.5, 0.4, 0.3),
        "dtype": torch.float32,
        "channels_last": False,
        "layout": "NCHW",
        "impl": "auto",
        "size": (5, 4),
        "area": None,
        "aspect": (0.75, 1.5),
    }


def strong_fields() -> dict[str, Any]:
    return {
        "weak": weak(),
        "num_ops": 2,
        "ops": ("rotate", "equalize"),
        "levels": (1, 9),
        "prob": 0.5,
        "cutout": 2,
        "cutout_color": (1, 2, 3),
        "outside": "black",
    }


def jitter_fields() -> dict[str, Any]:
    return {
        "weak": weak(),
        "brightness": 0.1,
        "contrast": 0.2,
        "saturation": 0.3,
        "hue": 0.1,
        "gray": 0.2,
        "prob": 0.8,
    }


def switches() -> dict[str, Any]:
    return {
        "augment": weak(),
        "num_classes": CLASSES,
        "num_augmentations": 2,
        "temperature": 0.5,
        "alpha": 0.75,
        "lam": "sample",
        "mix": "all",
        "guess_bn": "batch",
        "guess_forward": "joint",
        "teacher": None,
        "label_smoothing": 0.1,
        "logits_getter": None,
        "reuse_buffers": False,
        "seed": 3,
        "impl": "auto",
    }


def order() -> dict[str, Any]:
    return {
        "batch_size": 2,
        "ratio": 2,
        "steps_per_epoch": 3,
        "seed": 0,
        "rank": 0,
        "world_size": 2,
    }


def resident(**options: Any) -> gm.ResidentLoader:
    return gm.ResidentLoader(images(8), random_labels(8, CLASSES), 2, **options)


def first_batch(loader: Any) -> Any:
    return next(iter(loader))


# arguments of `switches` that all methods have
_OF_ALL = (
    *("augment", "num_classes", "guess_bn", "teacher", "label_smoothing", "logits_getter"),
    *("reuse_buffers", "seed", "impl"),
)
KEY = {"seed": 1, "step": 2}
IDS = {"ids_x": torch.arange(4), "ids_u": 5}
LENGTH = ("length of the labelled data set", "length of the unlabelled data set")
RANKS = {"rank": ("rank and world_size",), "world_size": ("rank",)}
DATA_SETS = {"labelled": (*LENGTH, "labels"), "unlabelled": LENGTH, **RANKS}

CALLS: dict[str, Call] = {
    # functional
    "draw_batch": Call(
        functional.draw_batch,
        lambda: {
            "seed": 1,
            "step": torch.tensor(2),
            **IDS,
            "plan": plan(),
            "device": torch.device("cpu"),
            "key": None,
            "impl": "auto",
        },
        errors=(RuntimeError,),
    ),
    "sharpen": Call(functional.sharpen, lambda: {"probs": torch.rand(2, 3), "temperature": 0.5}),
    "guess_labels": Call(
        functional.guess_labels,
        lambda: {"logits": torch.rand(2, 4, CLASSES), "temperature": 0.5, "impl": "auto"},
    ),
    "batch_targets": Call(
        functional.batch_targets,
        lambda: {
            "y": torch.tensor([0, 2]),
            "logits": torch.rand(2, 2, CLASSES),
            "temperature": 0.5,
            "label_smoothing": 0.1,
            "mixup": sampling.draw_mixup(0, 0, 2, 2),
            "impl": "auto",
        },
    ),
    "mixup": Call(functional.mixup, rows),
    "interleave": Call(
        functional.interleave,
        lambda: {"rows": torch.rand(6, 2), "num_groups": 2},
        names={"rows": ("num_groups",)},
    ),
    "linear_rampup": Call(functional.linear_rampup, lambda: {"step": 3, "rampup_steps": 10}),
    "mixmatch_loss": Call(
        functional.mixmatch_loss,
        lambda: {
            "logits": torch.rand(6, CLASSES),
            "targets": torch.rand(6, CLASSES),
            "num_labelled": 2,
            "weight_u": 3.0,
            "impl": "auto",
        },
    ),
    "consistency_targets": Call(
        functional.consistency_targets,
        lambda: {
            "y": torch.tensor([0, 2]),
            "logits": torch.rand(4, CLASSES),
            "weighting": Weighting(),
            "num_strong": 2,
            "label_smoothing": 0.1,
            "impl": "auto",
        },
    ),
    "weighting": Call(
        lambda **fields: functional.consistency_targets(
            torch.tensor([0, 2]), torch.rand(4, CLASSES), Weighting(**fields)
        ),
        lambda: Weighting(
            0.5, "soft", 0.5, torch.rand(2 + 3 * CLASSES), 2.0, torch.rand(CLASSES), True
        )._asdict(),
    ),
    "consistency_loss": Call(functional.consistency_loss, loss_rows),
    "fairness_loss": Call(
        functional.fairness_loss,
        lambda: {
            "logits": torch.rand(6, CLASSES),
            "weights": torch.rand(6),
            "fairness": torch.rand(CLASSES),
        },
    ),
    "augment": Call(
        functional.augment,
        lambda: {
            "images": images(),
            "params": weak().draw(0, 0, 4),
            "geometry": Geometry(1, "reflect", True, 3),
            "scaling": Scaling(1.0, 0.0),
            "dtype": torch.float32,
            "channels_last": False,
            "mixup": sampling.draw_mixup(0, 0, 2, 1),
            "layout": "NCHW",
            "out": torch.empty(4, 3, 6, 6),
            "workspace": Workspace(),
            "impl": "auto",
        },
        names={"images": ("x must",)},
    ),
    "geometry": Call(
        lambda **fields: functional.augment(
            images(), weak().draw(0, 0, 4), Geometry(**fields), Scaling(1.0, 0.0)
        ),
        lambda: {"padding": 1, "padding_mode": "zeros", "zoom": True, "blur_radius": 3},
        names={"padding": ("params.top",)},
    ),
    "scaling": Call(
        lambda **fields: functional.augment(
            images(), weak().draw(0, 0, 4), Geometry(1), Scaling(**fields)
        ),
        lambda: {"scale": torch.ones(3), "bias": 0.5},
    ),
    "augment params": Call(
        lambda **fields: functional.augment(
            images(), gm.AugmentParams(**fields), Geometry(1, zoom=True), Scaling(1.0, 0.0)
        ),
        lambda: weak().draw(0, 0, 4)._asdict(),
    ),
    "mixup params": Call(
        lambda **fields: functional.mixup(**{**rows(), "params": gm.MixUpParams(**fields)}),
        lambda: sampling.draw_mixup(0, 0, 2, 2)._asdict(),
    ),
    # sampling
    "draw_augment": Call(
        sampling.draw_augment,
        lambda: {**KEY, "ids": torch.arange(4), "views": (0, 1), **POLICY._asdict()},
    ),
    "draw_mixup": Call(
        sampling.draw_mixup,
        lambda: {**KEY, **IDS, "num_augmentations": 2, "alpha": 0.75, "lam": "batch", "mix": "all"},
    ),
    "sampling.draw_batch": Call(sampling.draw_batch, lambda: {**KEY, **IDS, "plan": plan()}),
    "plan": Call(
        lambda **fields: sampling.draw_batch(0, 0, 2, 3, DrawPlan(**fields)),
        lambda: plan()._asdict(),
    ),
    "policy": Call(
        lambda **fields: sampling.draw_batch(0, 0, 2, 3, DrawPlan(2, AugmentPolicy(**fields))),
        lambda: POLICY._asdict(),
    ),
    "draw_regions": Call(
        sampling.draw_regions,
        lambda: {**KEY, **IDS, "area": (0.5, 1.0), "aspect": (0.75, 1.5)},
    ),
    "epoch_order": Call(
        sampling.epoch_order, lambda: {"seed": 0, "epoch": 1, "length": 5, "view": 1}
    ),
    "split_order": Call(sampling.split_order, lambda: {"seed": 0, "length": 5, "number": 1}),
    "generator_seed": Call(sampling.generator_seed, lambda: dict(KEY)),
    "batch_seed": Call(sampling.batch_seed, lambda: {**KEY, **IDS}),
    "check_key": Call(sampling.check_key, lambda: dict(KEY)),
    "philox": Call(
        sampling.philox, lambda: {"counter": np.zeros((4, 2), dtype=np.uint64), "seed": 1}
    ),
    "folded_beta_quantile": Call(sampling.folded_beta_quantile, lambda: {"alpha": 0.75}),
    "shuffle_grid": Call(sampling.shuffle_grid, lambda: {"length": 9}),
    "shuffled_parts": Call(
        sampling.shuffled_parts,
        lambda: {"num_rows": 9, "num_labelled": 3, "mix": "all"},
        names={"num_rows": ("num_labelled",)},
    ),
    "pack": Call(
        sampling.pack,
        lambda: dict(
            zip(("augment", "mixup"), sampling.draw_batch(0, 0, 2, 3, plan()), strict=True)
        ),
    ),
    "unpack": Call(
        sampling.unpack,
        lambda: {
            "packed": sampling.pack(None, sampling.draw_mixup(0, 0, 2, 3)),
            "num_rows": 8,
            "with_augment": False,
            "chain_columns": None,
        },
        names={"num_rows": ("packed",), "with_augment": ("packed",), "chain_columns": ("packed",)},
    ),
    "words_per_row": Call(
        sampling.words_per_row, lambda: {"with_augment": True, "chain_columns": 5}
    ),
    "augment_to_device": Call(
        sampling.augment_to_device,
        lambda: {"params": weak().draw(0, 0, 4), "device": torch.device("cpu")},
    ),
    # engines
    "WeakAugment": Call(gm.WeakAugment, weak_fields),
    "RandAugment": Call(gm.RandAugment, strong_fields),
    "ColorJitter": Call(gm.ColorJitter, jitter_fields),
    "chain": Call(
        lambda **fields: sampling.draw_augment(0, 0, 2, 0, chain=Chain(**fields)),
        lambda: gm.RandAugment.fixmatch().chain._asdict(),
        names={"num_slots": ("ops",), "shuffled": ("ops", "gray")},
    ),
    "cut": Call(
        lambda **fields: sampling.draw_augment(0, 0, 2, 0, cut=Cut(**fields)),
        lambda: Cut((5, 4), (0.1, 1.0))._asdict(),
        names={"size": ("cut",), "area": ("cut",)},
    ),
    "chain params": Call(
        lambda **fields: functional.augment(
            images(), gm.ChainParams(**fields), Geometry(1, cut=Cut((5, 4))), Scaling(1.0, 0.0)
        ),
        lambda: gm.WeakAugment(1, size=(5, 4)).draw(0, 0, 4)._asdict(),
    ),
    "WeakAugment.draw": Call(weak().draw, lambda: {**KEY, "ids": torch.arange(4), "views": (0, 1)}),
    "WeakAugment.apply": Call(
        weak().apply,
        lambda: {
            "images": images(),
            "params": weak().draw(0, 0, 4),
            "mixup": sampling.draw_mixup(0, 0, 2, 1),
            "out": torch.empty(4, 3, 6, 6),
            "workspace": Workspace(),
        },
    ),
    "WeakAugment.forward": Call(
        weak(),
        lambda: {
            "images": images(),
            "seed": 0,
            "step": 1,
            "view": 2,
            "ids": torch.arange(4),
        },
        {"view": ("views",)},
    ),
    "WeakAugment.normalize": Call(weak().normalize, lambda: {"images": images()}),
    "WeakAugment.draw_batch": Call(
        weak().draw_batch, lambda: {**KEY, **IDS, "num_augmentations": 2}
    ),
    "as_augment": Call(gm.as_augment, lambda: {"augment": torch.sigmoid, "layout": "NCHW"}),
    "CallableAugment": Call(CallableAugment, lambda: {"function": torch.sigmoid, "layout": "NCHW"}),
    # the method
    "Consistency": Call(gm.Consistency, consistency_switches),
    "Consistency.forward": Call(
        lambda **arguments: fixmatch()(**arguments),
        step_arguments,
        names={"x": ("images",), "u": ("images",)},
    ),
    "Consistency.from_views": Call(
        lambda **arguments: fixmatch().from_views(**arguments),
        lambda: {
            "x": torch.rand(4, 3, 6, 6),
            "y": random_labels(4, CLASSES),
            "weak": torch.rand(5, 3, 6, 6),
            "strong": torch.rand(1, 5, 3, 6, 6),
            "model": PooledNet(CLASSES),
            "ids_u": torch.arange(5),
        },
    ),
    "FixMatch": Call(gm.FixMatch, consistency_switches),
    "UDA": Call(gm.UDA, consistency_switches),
    "SoftMatch": Call(
        lambda threshold: fixmatch(gm.SoftMatch, threshold=threshold),
        lambda: {"threshold": gm.SoftThreshold()},
    ),
    "FreeMatch": Call(
        lambda threshold: fixmatch(gm.FreeMatch, threshold=threshold),
        lambda: {"threshold": gm.FreeThreshold()},
    ),
    "FlexMatch": Call(
        lambda **options: fixmatch(gm.FlexMatch, **options),
        lambda: {"num_unlabelled": 5, "threshold": 0.5},
    ),
    "FlexMatch.forward": Call(
        lambda ids_u: fixmatch(gm.FlexMatch, num_unlabelled=5)(
            images(), random_labels(4, CLASSES), images(5), ids_u=ids_u
        ),
        lambda: {"ids_u": torch.arange(5)},
    ),
    "MeanTeacher": Call(
        lambda **options: gm.MeanTeacher(weak(), CLASSES, **options),
        lambda: {"teacher": PooledNet(CLASSES), "temperature": 0.5, "threshold": 0.5},
    ),
    "FixedThreshold": Call(
        gm.FixedThreshold, lambda: {"value": 0.5}, names={"value": ("threshold",)}
    ),
    "SoftThreshold": Call(
        gm.SoftThreshold, lambda: {"momentum": 0.9, "spread": 2.0, "uniform": True}
    ),
    "FreeThreshold": Call(gm.FreeThreshold, lambda: {"momentum": 0.9}),
    "FlexThreshold": Call(
        gm.FlexThreshold,
        lambda: {"num_unlabelled": 5, "value": 0.5},
        names={"value": ("threshold",)},
    ),
    "DistributionAlignment": Call(
        gm.DistributionAlignment, lambda: {"window": 2, "momentum": 0.9, "target": (0.5, 0.5)}
    ),
    "ConsistencyLoss": Call(
        gm.ConsistencyLoss,
        lambda: {
            "lambda_u": 1.0,
            "rampup_steps": 3,
            "loss_u": "kl",
            "tsa": "exp",
            "tsa_steps": 5,
            "lambda_fair": 0.1,
            "impl": "auto",
        },
    ),
    "ConsistencyLoss.forward": Call(
        gm.ConsistencyLoss(),
        lambda: {
            "logits": torch.rand(14, CLASSES),
            "batch": fixmatch()(images(), random_labels(4, CLASSES), images(5)),
        },
    ),
    "MixMatch": Call(gm.MixMatch, switches),
    "MixMatch.forward": Call(
        lambda **arguments: builder()(**arguments),
        lambda: {**step_arguments(), "key": None},
        names={"x": ("images",)},
    ),
    "MixMatch.from_views": Call(
        lambda **arguments: builder().from_views(**arguments),
        lambda: {
            **{name: value for name, value in step_arguments().items() if name != "u"},
            "x": images() / 255,
            "views": [images(5) / 255] * 2,
        },
    ),
    "MixMatch.load_state_dict": Call(
        lambda **state: builder().load_state_dict({**builder().state_dict(), **state}),
        lambda: dict(builder().state_dict()),
        errors=(RuntimeError,),  # torch collects what modules have to say
    ),
    "interleaved_forward": Call(
        gm.interleaved_forward,
        lambda: {
            "model": PooledNet(CLASSES),
            "batch": batch(),
            "num_groups": 2,
            "swap": True,
            "running_stats": "first",
            "logits_getter": None,
        },
    ),
    "MixMatchLoss": Call(
        gm.MixMatchLoss, lambda: {"lambda_u": 75.0, "rampup_steps": 10, "impl": "auto"}
    ),
    "MixMatchLoss.forward": Call(
        gm.MixMatchLoss(), lambda: {"logits": torch.rand(14, CLASSES), "batch": batch()}
    ),
    "ICT": Call(
        gm.ICT,
        lambda: {
            **{name: value for name, value in switches().items() if name in _OF_ALL},
            "alpha": 1.0,
            "lam": "batch",
            "mix": "unlabelled",
            "partner": "reversed",
            "blend": "probs",
        },
    ),
    "ICT.forward": Call(
        lambda **arguments: gm.ICT(weak(), CLASSES)(**arguments),
        lambda: {**step_arguments(), "key": None},
        names={"x": ("images",)},
    ),
    "ReMixMatch": Call(
        gm.ReMixMatch,
        lambda: {
            **{name: value for name, value in switches().items() if name in _OF_ALL[1:]},
            "weak": weak(),
            "strong": weak(),
            "num_strong": 2,
            "rotation": True,
            "temperature": 0.5,
            "alignment": None,
            "alpha": 0.75,
            "lam": "sample",
        },
    ),
    "ReMixMatch.forward": Call(
        lambda **arguments: gm.ReMixMatch(weak(), weak(), CLASSES, num_strong=1)(**arguments),
        lambda: {**step_arguments(), "key": None},
        names={"x": ("images",)},
    ),
    "ReMixMatchLoss": Call(
        gm.ReMixMatchLoss,
        lambda: {
            "lambda_mix": 1.5,
            "lambda_kl": 0.5,
            "lambda_rot": 0.5,
            "rampup_steps": 10,
            "impl": "auto",
        },
    ),
    "ReMixMatchLoss.forward": Call(
        gm.ReMixMatchLoss(),
        lambda: {
            "logits": torch.rand(19, CLASSES),
            "batch": gm.ReMixMatch(weak(), weak(), CLASSES, num_strong=1)(
                images(), random_labels(4, CLASSES), images(5), PooledNet(CLASSES)
            ),
        },
    ),
    "capture": Call(
        gm.capture,
        lambda: {
            "mixmatch": builder(),
            **{name: step_arguments()[name] for name in ("model", "x", "y", "u")},
        },
        errors=(RuntimeError,),  # there is no CUDA device
    ),
    # presets
    "paper": Call(presets.paper, lambda: {"dataset": "svhn"}),
    "yu1ut": Call(presets.yu1ut, lambda: {"dataset": "svhn"}),
    "usb": Call(presets.usb, lambda: {"dataset": "svhn"}),
    **{
        name: Call(getattr(presets, name), lambda: {"dataset": "svhn"})
        for name in (
            *("fixmatch", "uda", "softmatch", "freematch", "flexmatch", "mean_teacher"),
            *("pi_model", "ict", "ict_reference", "remixmatch"),
        )
    },
    # data
    "SemiSupervisedLoader": Call(
        lambda **arguments: first_batch(gm.SemiSupervisedLoader(**arguments)),
        lambda: {
            "labelled": TensorDataset(images(8), random_labels(8, CLASSES)),
            "unlabelled": TensorDataset(images(9)),
            **order(),
            "image": "image",
            "label": "label",
            "device": "cpu",
            "num_workers": 0,
            "timeout": 10.0,
            "collate_fn": gm.collate,
        },
        names=DATA_SETS,
    ),
    "ResidentLoader": Call(
        lambda **arguments: first_batch(gm.ResidentLoader(**arguments)),
        lambda: {
            "images": images(8),
            "labels": random_labels(8, CLASSES),
            **order(),
            "labelled_indices": [1, 2, 3],
            "unlabelled": images(9),
            "device": "cpu",
        },
        names={"labelled_indices": LENGTH, "images": LENGTH, "unlabelled": LENGTH, **RANKS},
    ),
    "loader.set_epoch": Call(lambda epoch: resident().set_epoch(epoch), lambda: {"epoch": 2}),
    "loader.load_state_dict": Call(
        lambda state: resident().load_state_dict(state),
        lambda: {"state": resident().state_dict()},
    ),
    "loader state": Call(
        lambda **state: resident().load_state_dict(state), lambda: dict(resident().state_dict())
    ),
    "collate": Call(gm.collate, lambda: {"samples": [(images(1)[0], 3)]}),
    "Indexed": Call(gm.Indexed, lambda: {"dataset": [1, 2]}),
    # insight
    "GuessWatch": Call(
        GuessWatch, lambda: {"mixmatch": builder(), "truth": random_labels(5, CLASSES)}
    ),
    "TensorBoardInsight": Call(
        TensorBoardInsight,
        lambda: {
            "mixmatch": builder(),
            "writer": Writer(),
            "every_n_steps": 10,
            "truth": random_labels(5, CLASSES),
            "class_names": ["a", "b", "c"],
            "rows": 2,
        },
    ),
}


def drawing(folder: Path) -> dict[str, Call]:
    """Calls that write to ``folder``, or need what may not be installed."""
    return {
        "draw_preview": Call(
            draw_preview,
            lambda: {
                "mixmatch": builder(),
                **step_arguments(),
                "path": folder / "preview.png",
                "class_names": ["a", "b", "c"],
                "rows": 1,
            },
            names={"x": ("images",)},
        )
    }


def reading(folder: Path) -> dict[str, Call]:
    """Calls that read images below ``folder``, in a folder, a list and archives."""
    root = folder / "labelled"
    for name in ("labelled/a/0.png", "unlabelled/1.png"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(encode(tile(), "PNG"))
    (folder / "list.txt").write_text("labelled/a/0.png\t0\n")
    write_tar(folder / "data.tar", [(b"x", "jpg", 1)])
    write_tfrecord(folder / "data.tfrecord", [(b"x", 1)])
    missing = (OSError,)
    archive = {"labelled": True}
    return {
        "ImageFiles": Call(
            gm.ImageFiles,
            lambda: {"source": root, "size": 8, "labelled": True},
            {"source": ("root",)},
        ),
        "check_images": Call(
            gm.check_images,
            lambda: {
                "root": root,
                "list_path": folder / "good.txt",
                "decoder": "pil",
                "progress": lambda seen, total: None,
                "num_threads": 1,
            },
            errors=missing,
        ),
        "image_folder": Call(image_folder, lambda: {"root": root, "labelled": True}),
        "file_list": Call(
            file_list, lambda: {"path": folder / "list.txt", "labelled": True}, errors=missing
        ),
        "web_dataset": Call(
            web_dataset,
            lambda: {"paths": [folder / "data.tar"], "label_suffix": "cls", **archive},
            {"label_suffix": ("an integer in sample0000.",)},
            missing,
        ),
        "tfrecords": Call(
            tfrecords,
            lambda: {
                "paths": [folder / "data.tfrecord"],
                "image_key": "image/encoded",
                "label_key": "image/class/label",
                **archive,
            },
            {"image_key": ("the feature",), "label_key": ("the feature",)},
            missing,
        ),
        "load_dataset": Call(
            load_dataset,
            lambda: {
                "name": "folder",
                "root": folder,
                "size": 8,
                "on_error": "raise",
                "list_path": None,
                "decoder": "pil",
                "progress": None,
            },
            {"list_path": ("path",)},
            missing,
        ),
    }


# What is public and no call with arguments of its own: tuples, protocols, modules, and what needs
# another package and has a table in the tests of that package
NOT_CALLED = {
    "Augment",
    "AugmentParams",
    "ChainParams",
    "ConsistencyBatch",
    "ConsistencyLossOutput",
    "AugmentedBatch",
    "DaliAugment",
    "DaliLoader",
    "FoldedBetaQuantile",
    "GuessQuality",
    "KeyedLoader",
    "KorniaAugment",
    "LossOutput",
    "MixMatchBatch",
    "MixUpParams",
    "Preset",
    "Purpose",
    "ReMixMatchBatch",
    "ReMixMatchLossOutput",
    "SemiSupervisedBatch",
    "WeighedGuessQuality",
    "Words",
    "__version__",
    "functional",
    "mixmatch_pipeline",
    "presets",
    "sampling",
}
