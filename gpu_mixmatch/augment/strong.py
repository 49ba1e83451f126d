"""RandAugment and ColorJitter: operations drawn per view, to the last bit Pillow's."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, get_args

import numpy as np

from gpu_mixmatch._validation import (
    MAGNITUDES,
    as_chain,
    as_integer,
    as_number,
    came,
    check_choice,
    check_kind,
)
from gpu_mixmatch.augment.keyed import KeyedAugment
from gpu_mixmatch.augment.weak import WeakAugment
from gpu_mixmatch.types import (
    MOST_SLOTS,
    AugmentPolicy,
    Chain,
    Geometry,
    Op,
    OpName,
    Outside,
)

_SIGNED = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
# The 14 operations of FixMatch's RandAugment
FIXMATCH_OPS: tuple[OpName, ...] = (
    *("identity", "autocontrast", "equalize", "brightness", "color", "contrast", "sharpness"),
    *("posterize", "solarize", "rotate", "shear_x", "shear_y", "translate_x", "translate_y"),
)
_MOST_LEVEL = 10
_FINE = 256  # levels of a magnitude that its source draws as a real number


class _StrongAugment(KeyedAugment):
    """A weak augmentation, and a chain of operations on its bytes."""

    def __init__(self, weak: WeakAugment | None, chain: Chain) -> None:
        weak = WeakAugment.cifar10() if weak is None else weak
        check_kind("weak", weak, WeakAugment, "a WeakAugment such as WeakAugment.cifar10()")
        super().__init__(
            weak.mean, weak.std, weak.dtype, weak.channels_last, weak.layout, weak.impl
        )
        checked = as_chain(chain)
        assert checked is not None
        self.weak = weak
        self.chain = checked

    @property
    def policy(self) -> AugmentPolicy:
        """What is drawn."""
        return self.weak.policy._replace(chain=self.chain)

    @property
    def geometry(self) -> Geometry:
        """What all views have in common."""
        return self.weak.geometry._replace(chain=self.chain)

    def extra_repr(self) -> str:
        """Show the chain; the weak augmentation is shown as a module."""
        chain = self.chain
        shown_fields = [f"ops=[{', '.join(map(_shown_op, chain.ops))}]"]
        shown_fields += [] if chain.shuffled else [f"num_ops={chain.num_slots}"]
        shown_fields += [f"prob={chain.prob}"]
        shown_fields += [f"gray={chain.gray}"] if chain.shuffled else []
        shown_fields += [f"outside={chain.outside!r}", f"cutout={chain.cutout}"]
        if chain.cutout:
            shown_fields.append(f"cutout_color={chain.cutout_color or 'mean'}")
        return ", ".join([*shown_fields, f"impl={self.impl!r}"])


class RandAugment(_StrongAugment):
    """Strong augmentation: operations drawn per view and image, then a cutout.

    In this order: the geometry of ``weak``; ``num_ops`` operations, each any of ``ops`` with any of
    its magnitudes, or none; blur, if ``weak`` has one; a cutout; normalisation. Each view of each
    image has draws of its own, functions of (seed, step, sample id, view). An operation makes bytes
    of bytes, to the last bit those that Pillow makes, so that images must be uint8.

    It is an engine for `MixMatch`, and works alone::

        strong = RandAugment.fixmatch()
        views = strong(images, ids=ids, step=step)

    Presets say by their names whose ranges they have: papers and ports differ.

    Args:
        weak: Geometry, mean, std, dtype, layout and implementation; None is `WeakAugment.cifar10`.
        num_ops: Operations per view, drawn with replacement; 0 .. 16.
        ops: Names, each with FixMatch's magnitudes at ``levels``; or a mapping of names to the
            magnitudes that are drawn, as `Op` has them, signs included.
        levels: Of 0 .. 10, each as likely; None is 1 .. 9. Only with names.
        prob: Probability that a drawn operation is applied.
        cutout: Side of the square in pixels, or least and most of it as shares of the width; its
            centre is any pixel, and it is cut at the border. 0 is none.
        cutout_color: Bytes of the square, one or one per channel; None is 0 after normalisation.
        outside: What comes in where an image moves: "mean", 0 after normalisation, unless an
            operation makes another colour of it, or "black".

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of its range, or an operation is unknown.

    References:
        Cubuk et al. 2020; Sohn et al. 2020, appendix D; google-research/fixmatch.
    """

    def __init__(
        self,
        weak: WeakAugment | None = None,
        num_ops: int = 2,
        ops: Sequence[str] | Mapping[str, Sequence[float]] = FIXMATCH_OPS,
        levels: Sequence[int] | None = None,
        prob: float = 0.5,
        cutout: int | tuple[float, float] = 16,
        cutout_color: tuple[int, ...] | None = None,
        outside: Outside = "mean",
    ) -> None:
        if isinstance(ops, Mapping):
            if levels is not None:
                raise ValueError(f"levels must be None where ops has magnitudes, got {levels}")
            made = tuple(Op(_name(name), _numbers(name, ops[name])) for name in ops)
        else:
            made = _at_levels(ops, levels)
        num_ops = as_integer("num_ops", num_ops, most=MOST_SLOTS)
        chain = Chain(
            *(made, num_ops, prob),
            outside=outside,
            cutout=cutout,
            cutout_color=cutout_color,
        )
        super().__init__(weak, chain)

    @classmethod
    def fixmatch(cls, weak: WeakAugment | None = None, **fields: Any) -> Self:
        """FixMatch's ("RA" in its code): 2 of 14, p ½ each, levels 1 .. 9 per image; cutout 16.

        Factors .28 .. 1.72, up to ±27°, slopes of ±.27, ±9 pixels, 4 .. 1 bits. What comes in is 0
        after normalisation, and so is the cutout. The order is the source's: flip and shift come
        first.
        """
        return cls(weak, **fields)

    @classmethod
    def uda(cls, weak: WeakAugment | None = None, **fields: Any) -> Self:
        """UDA's: 2 of 14, p ½ each, levels 1 .. 9, with invert and without identity; cutout 16.

        Its source draws from 15: the last is a cutout of up to 18 pixels among the operations,
        which is not here. It also makes 100 strong copies of each image beforehand and shifts and
        flips them when they are read; here the geometry comes first, and every draw is new.
        """
        return cls(weak, **{"ops": ("invert", *FIXMATCH_OPS[1:]), **fields})

    @classmethod
    def kekmodel(cls, weak: WeakAugment | None = None, **fields: Any) -> Self:
        """The PyTorch port kekmodel/FixMatch-pytorch's: 2 of 14, p ½ each, levels 1 .. 9.

        Factors .14 .. .86, so that nothing gets brighter or more colourful, 4 .. 7 bits, black
        borders, translations by whole pixels of up to 27 % of a side, and a grey cutout of 17
        pixels, since its rectangle of 16 includes both ends. At the top and left border that one is
        moved inside; here it is cut.
        """
        levels = range(1, 10)
        factors = [level * 0.9 / 10 + 0.05 for level in levels]
        return cls(
            weak,
            **{
                "ops": _in_order(
                    factors,
                    posterize=[int(level * 4 / 10) + 4 for level in levels],
                    solarize=[256 - int(level * 256 / 10) for level in levels],
                    rotate=_signed([int(level * 30 / 10) for level in levels]),
                    shear=_signed([level * 0.3 / 10 for level in levels]),
                    translate_rel=_signed([level * 0.3 / 10 for level in levels]),
                ),
                "cutout": 17,
                "cutout_color": (127,),
                "outside": "black",
                **fields,
            },
        )

    @classmethod
    def usb(cls, weak: WeakAugment | None = None, **fields: Any) -> Self:
        """USB's and TorchSSL's: 3 of 14, always applied, real magnitudes; cutout of 0 .. ½ width.

        Factors .05 .. .95, ±30°, slopes of ±.3, ±30 % of a side, 4 .. 7 bits. Magnitudes are drawn
        from 256 levels, the middles of equal parts; translations are whole pixels, cut towards 0
        where the source rounds; and a cutout is cut at the border where the source moves it inside
        at the top and left. USB crops and flips before, as here, TorchSSL after.
        """
        return cls(
            weak,
            **{
                "num_ops": 3,
                "prob": 1.0,
                "ops": _in_order(
                    _levels(0.05, 0.95),
                    posterize=[4, 5, 6, 7],
                    solarize=list(range(1, 257)),
                    rotate=_levels(-30, 30),
                    shear=_levels(-0.3, 0.3),
                    translate_rel=_levels(-0.3, 0.3),
                ),
                "cutout": (0.0, 0.5),
                "cutout_color": (125, 123, 114),
                "outside": "black",
                **fields,
            },
        )

    @classmethod
    def torchvision(
        cls,
        weak: WeakAugment | None = None,
        *,
        magnitude: int = 9,
        num_bins: int = 31,
        **fields: Any,
    ) -> Self:
        """Torchvision's RandAugment: 2 of 14, always applied, one magnitude; no cutout.

        As it is on Pillow's images, with nearest neighbours and black borders: there it draws once
        per call, so once for a batch of tensors; here per view.

        Args:
            weak: As for `RandAugment`.
            magnitude: The bin, 0 .. ``num_bins`` - 1.
            num_bins: Bins from no change to the strongest.
            fields: Of `RandAugment`.
        """
        num_bins = as_integer("num_bins", num_bins, least=2, most=1000)
        magnitude = as_integer("magnitude", magnitude, most=num_bins - 1)
        share = magnitude / (num_bins - 1)
        ops = _in_order(
            _around_one([0.9 * share]),
            posterize=[round(8 - 4 * share)],
            solarize=[255 * (1 - share)],
            rotate=_signed([30 * share]),
            shear=_signed([0.3 * share]),
            translate_rel=_signed([150 / 331 * share]),
        )
        usual = {"prob": 1.0, "ops": ops, "cutout": 0, "outside": "black"}
        return cls(weak, **{**usual, **fields})

    @classmethod
    def trivial(cls, weak: WeakAugment | None = None, **fields: Any) -> Self:
        """Torchvision's TrivialAugmentWide: 1 of 14, any of 31 levels up to very strong; no cutout.

        Up to ±135°, slopes of ±.99, ±32 pixels, factors .01 .. 1.99, 8 .. 2 bits. On Pillow's
        images, as `torchvision`.
        """
        shares = [level / 30 for level in range(31)]
        ops = _in_order(
            _around_one([0.99 * share for share in shares]),
            posterize=[round(8 - 6 * share) for share in shares],
            solarize=[255 * (1 - share) for share in shares],
            rotate=_signed([135 * share for share in shares]),
            shear=_signed([0.99 * share for share in shares]),
            translate=_signed([int(32 * share) for share in shares]),
        )
        usual = {"num_ops": 1, "prob": 1.0, "ops": ops, "cutout": 0, "outside": "black"}
        return cls(weak, **{**usual, **fields})


class ColorJitter(_StrongAugment):
    """Brightness, contrast, saturation and hue in an order drawn per view, then perhaps no colour.

    As torchvision's ColorJitter and RandomGrayscale on Pillow's images, to the last bit, but that
    factors are drawn from 256 levels, the middles of equal parts, and all of it per view, from
    (seed, step, sample id, view). Images must be uint8.

    Args:
        weak: Geometry, mean, std, dtype, layout and implementation; None is `WeakAugment.cifar10`.
        brightness: Factors are in 1 - this .. 1 + this, and at least 0; 0 leaves brightness alone.
        contrast: Likewise.
        saturation: Likewise.
        hue: Hues turn by up to this share of the circle, either way, at most ½.
        gray: Probability of a view without colour.
        prob: Probability that a view's colours change, grayscale apart.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        weak: WeakAugment | None = None,
        brightness: float = 0.4,
        contrast: float = 0.4,
        saturation: float = 0.4,
        hue: float = 0.1,
        *,
        gray: float = 0.0,
        prob: float = 1.0,
    ) -> None:
        changes: list[tuple[str, OpName, float]] = [
            ("brightness", "brightness", brightness),
            ("contrast", "contrast", contrast),
            ("saturation", "color", saturation),
        ]
        ops = []
        for called, name, value in changes:
            value = as_number(called, value, least=0, most=MAGNITUDES[name][1] - 1)
            if value:
                ops.append(Op(name, tuple(_levels(max(1 - value, 0.0), 1 + value))))
        hue = as_number("hue", hue, least=0, most=0.5)
        if hue:
            ops.append(Op("hue", tuple(_levels(-hue, hue))))
        ops = ops or [Op("identity")]
        super().__init__(
            weak, Chain(tuple(ops), len(ops), prob, shuffled=True, gray=gray, outside="black")
        )


def _at_levels(names: Any, levels: Any) -> tuple[Op, ...]:
    """FixMatch's operations at some of its levels."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"ops must be names, or a mapping of them to magnitudes, got {came(names)}")
    levels = [
        as_integer(f"levels[{place}]", level, most=_MOST_LEVEL)
        for place, level in enumerate(
            range(1, _MOST_LEVEL)
            if levels is None
            else _listed(f"levels must be a list of integers in 0 .. {_MOST_LEVEL}", levels)
        )
    ]
    made = []
    for name in map(_name, names):
        magnitude = _FIXMATCH.get(name)
        if magnitude is None and name in MAGNITUDES:
            raise ValueError(
                f"ops must be a mapping that gives {name} its magnitudes, since FixMatch has none"
            )
        magnitudes = [magnitude(level) for level in levels] if magnitude else [0.0]
        if name == "posterize" and min(magnitudes) < 1:
            raise ValueError(
                f"levels must be below {_MOST_LEVEL} for posterize, which would keep no bit, "
                f"got {levels}"
            )
        made.append(Op(name, tuple(_signed(magnitudes) if name in _SIGNED else magnitudes)))
    return tuple(made)


# Magnitudes of FixMatch at a level of 0 .. 10, by its own order of operations
_FIXMATCH: dict[OpName, Callable[[int], float]] = {
    **dict.fromkeys(
        ("brightness", "color", "contrast", "sharpness"), lambda level: level * 1.8 / 10 + 0.1
    ),
    "posterize": lambda level: float(4 - int(level * 4 / 10)),
    "solarize": lambda level: float(256 - int(level * 256 / 10)),
    "rotate": lambda level: float(int(level * 30 / 10)),
    **dict.fromkeys(("shear_x", "shear_y"), lambda level: level * 0.3 / 10),
    **dict.fromkeys(("translate_x", "translate_y"), float),
}


def _in_order(
    factors: Sequence[float],
    *,
    posterize: Sequence[float],
    solarize: Sequence[float],
    rotate: Sequence[float],
    shear: Sequence[float],
    translate: Sequence[float] = (),
    translate_rel: Sequence[float] = (),
) -> dict[str, Sequence[float]]:
    """FixMatch's 14 operations with other magnitudes; translations in pixels or as shares."""
    suffix = "" if translate else "_rel"
    moved = translate or translate_rel
    return {
        **dict.fromkeys(("identity", "autocontrast", "equalize"), (0.0,)),
        **dict.fromkeys(("brightness", "color", "contrast", "sharpness"), factors),
        "posterize": posterize,
        "solarize": solarize,
        "rotate": rotate,
        **dict.fromkeys(("shear_x", "shear_y"), shear),
        **dict.fromkeys((f"translate_x{suffix}", f"translate_y{suffix}"), moved),
    }


def _levels(low: float, high: float) -> list[float]:
    """The middles of equal parts of an interval."""
    return [low + (high - low) * (level + 0.5) / _FINE for level in range(_FINE)]


def _signed(magnitudes: Sequence[float]) -> list[float]:
    return [sign * magnitude for magnitude in magnitudes for sign in (1, -1)]


def _around_one(magnitudes: Sequence[float]) -> list[float]:
    return [1 + signed for signed in _signed(magnitudes)]


def _name(name: Any) -> OpName:
    check_choice("ops", name, OpName)
    return get_args(OpName)[get_args(OpName).index(name)]  # type: ignore[no-any-return]


def _numbers(name: str, magnitudes: Any) -> tuple[float, ...]:
    numbers = _listed(f"the magnitudes of {name} must be a list of numbers", magnitudes)
    return tuple(as_number(f"the magnitude of {name}", value) for value in numbers)


def _listed(wanted: str, values: Any) -> Sequence[Any]:
    """Return a sequence that is not empty, or what a numpy array holds."""
    found = values.tolist() if isinstance(values, np.ndarray) and values.ndim == 1 else values
    if isinstance(found, str | bytes) or not isinstance(found, Sequence):
        raise TypeError(f"{wanted}, got {came(values)}")
    if not found:
        raise ValueError(f"{wanted}, at least one, got none")
    return found


def _shown_op(op: Op) -> str:
    """An operation and the range of its magnitudes."""
    least, most = min(op.magnitudes), max(op.magnitudes)
    if op.name not in MAGNITUDES:
        return op.name
    if least == most:
        return f"{op.name} {least:g}"
    return f"{op.name} {least:g} .. {most:g} ({len(op.magnitudes)} levels)"
