"""Every check of arguments and its text, once.

A message names the argument, what is wanted and what came.
"""

import math
import operator
import os
from collections.abc import Sequence
from functools import lru_cache
from numbers import Real
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from gpu_mixmatch._chain import columns, entries
from gpu_mixmatch.types import (
    MOST_ROWS,
    MOST_SLOTS,
    SUM_TOLERANCE,
    AugmentParams,
    AugmentPolicy,
    Chain,
    ChainParams,
    ConsistencyBatch,
    Cut,
    DrawPlan,
    Geometry,
    LamMode,
    Layout,
    MixMatchBatch,
    MixMode,
    MixUpParams,
    Op,
    OpName,
    Outside,
    PaddingMode,
    ReMixMatchBatch,
    Scaling,
    Weighting,
    WeightRule,
)

IMAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Resizing with torch's bicubic overshoots [0, 1] by at most 0.45: (1.375² - 1) / 2, the negative
# weights of both axes. Every usual normalisation leads further out.
LEAST_PIXEL, MOST_PIXEL = -0.5, 1.5
MOST_SEED = 2**63 - 1
MOST_STEP = 2**32 - 1  # a word of the counter
MOST_VIEW = 2**16
# Pixels of padding, cut and blur: beyond any image, and few enough for memory
MOST_PADDING = 2**15
MOST_SIGMA = 1000.0
# Images of one kind in a step, on one rank
MOST_IMAGES = 2**24
MOST_SAMPLES = 2**40


def came(value: object) -> str:
    """Say what came in place of what was wanted: a tensor by its shape, else value and type."""
    if isinstance(value, Tensor | np.ndarray):
        kind = "tensor" if isinstance(value, Tensor) else "numpy array"
        return f"a {kind} {list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], Tensor):
        return f"a {type(value).__name__} of one tensor; unpack it, as in (u,) = batch"
    if isinstance(value, int) and value.bit_length() > 256:
        return f"{_shown(value)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, tuple) and any(isinstance(part, Tensor) for part in value):
        return f"a {type(value).__name__}"  # whose values would fill the page, read from a device
    try:
        text = " ".join(map(str.strip, repr(value).splitlines()))  # of a module, one line
    except Exception:  # of an object that is broken in more than one way
        return f"an object of type {type(value).__name__}"
    text = text if len(text) <= 80 else f"{text[:77]}..."
    return f"{text} of type {type(value).__name__}"


def as_integer(name: str, value: Any, *, least: int = 0, most: int | None = None) -> int:
    """Return a whole number as an ``int``: Python's, numpy's, or whatever ``operator.index`` takes.

    Raises:
        TypeError: If it is none; booleans, floats and tensors are not.
        ValueError: If it is not in ``least .. most``.
    """
    if type(value) is not int:
        try:
            if isinstance(value, bool | np.bool_ | np.ndarray | Tensor):
                raise TypeError
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{name} must be an integer, got {came(value)}") from None
    if value < least or (most is not None and value > most):
        wanted = f"at least {least}" if most is None else f"in {least} .. {_power(most)}"
        raise ValueError(f"{name} must be {wanted}, got {_shown(value)}")
    return int(value)


def _power(number: int) -> str:
    """A large limit as one reads it: 2**63 - 1."""
    if number < 2**16:
        return str(number)
    for offset, text in ((0, ""), (1, " - 1")):
        if (number + offset).bit_count() == 1:
            return f"2**{(number + offset).bit_length() - 1}{text}"
    return str(number)


def _shown(number: Any) -> str:
    """A number, or the size of one whose digits would fill the page (or may not be printed)."""
    if isinstance(number, int) and number.bit_length() > 256:
        return f"an integer of {number.bit_length()} bits"
    return str(number)


def as_number(
    name: str,
    value: Any,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    above: float | None = None,
    below: float | None = None,
) -> float:
    """Return a finite real number as a ``float``: Python's or numpy's.

    Raises:
        TypeError: If it is none; booleans, texts and tensors are not.
        ValueError: If it is not finite, or not within the limits that are given.
    """
    if type(value) not in (float, int) and (
        isinstance(value, bool | np.bool_) or not isinstance(value, Real)
    ):
        raise TypeError(f"{name} must be a number, got {came(value)}")
    try:
        number = float(value)
    except OverflowError:  # an integer of more than 308 digits
        number = math.inf
    fits = math.isfinite(number) and least <= number <= most
    fits = fits and (above is None or number > above) and (below is None or number < below)
    if not fits:
        limits = _interval(least, most, above, below)
        raise ValueError(f"{name} must be {limits or 'finite'}, got {_shown(value)}")
    return number


def _interval(least: float, most: float, above: float | None, below: float | None) -> str:
    low = f"({above:g}" if above is not None else f"[{least:g}"
    high = f"{below:g})" if below is not None else f"{most:g}]"
    if (below is not None or math.isfinite(most)) and low != "[-inf":
        return f"in {low}, {high}"
    if above is not None:
        return f"above {above:g} and finite"
    if math.isfinite(least):
        return f"at least {least:g} and finite"
    return ""


def as_flag(name: str, value: Any) -> bool:
    """Return a switch as a ``bool``.

    Raises:
        TypeError: If it is neither True nor False.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {came(value)}")
    return bool(value)


def as_seed(value: Any) -> int:
    """Return a key of draws as an ``int``."""
    return as_integer("seed", value, most=MOST_SEED)


def as_step(value: Any) -> int:
    """Return a step as an ``int``; it may also be a 0-d integer tensor on the CPU."""
    if isinstance(value, Tensor) and value.dim() == 0 and is_integer(value.dtype):
        if value.device.type != "cpu":
            raise ValueError(f"step must be on the CPU, got it on {value.device}")
        value = int(value)
    return as_integer("step", value, most=MOST_STEP)


def as_text(name: str, value: Any) -> str:
    """Return a text; raise a TypeError for anything else."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a text, got {came(value)}")
    return value


def as_path(name: str, value: Any) -> Path:
    """Return a path, of which "~" is not read.

    Raises:
        TypeError: If it is neither a text nor a path.
        ValueError: If it has a character that no path has.
    """
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} must be a path, got {came(value)}")
    text = os.fsdecode(value)
    if "\0" in text:
        raise ValueError(f"{name} must be a path without the character 0, got {came(text)}")
    return Path(text)


def as_device(name: str, value: Any) -> torch.device:
    """Return a `torch.device`, made of its name where that is given.

    Raises:
        TypeError: If it is neither a device nor a name.
        ValueError: If torch knows no such device.
    """
    if isinstance(value, torch.device):
        return value
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a torch.device or its name, got {came(value)}")
    try:
        return torch.device(value)
    except RuntimeError as error:
        raise ValueError(
            f"{name} must be a device such as 'cpu' or 'cuda:0', got {value!r}"
        ) from error


def as_pair(
    name: str, value: Any, *, least: float = 0, most: float, above: float | None = None
) -> tuple[float, float]:
    """Return two finite numbers, least <= most, as floats.

    Raises:
        TypeError: If they are no two numbers.
        ValueError: If they are out of order or of their limits.
    """
    low, high = (
        as_number(f"{name}[{place}]", number, least=least, most=most, above=above)
        for place, number in enumerate(_two(name, value, "numbers, least and most"))
    )
    if low > high:
        raise ValueError(f"{name} must be two numbers, least <= most, got {value}")
    return low, high


def as_integer_pair(name: str, value: Any, *, least: int = 0, most: int) -> tuple[int, int]:
    """`as_pair` for whole numbers."""
    low, high = (
        as_integer(f"{name}[{place}]", number, least=least, most=most)
        for place, number in enumerate(_two(name, value, "integers, least and most"))
    )
    if low > high:
        raise ValueError(f"{name} must be two integers, least <= most, got {value}")
    return low, high


def _two(name: str, value: Any, kind: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise TypeError(f"{name} must be two {kind}, got {came(value)}")
    return value


def check_kind(name: str, value: Any, kind: type | tuple[type, ...], wanted: str) -> None:
    """Raise a TypeError if ``value`` is of none of the kinds."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {wanted}, got {came(value)}")


def check_callable(name: str, value: Any, wanted: str) -> None:
    """Raise a TypeError if ``value`` cannot be called, or is a class instead of an object."""
    if not callable(value) or isinstance(value, type):
        raise TypeError(f"{name} must be {wanted}, got {came(value)}")


def check_tensor(name: str, value: Any) -> None:
    """Raise a TypeError if ``value`` is no tensor; says how to make one where that is plain."""
    if not isinstance(value, Tensor):
        hint = "; torch.from_numpy makes one" if isinstance(value, np.ndarray) else ""
        raise TypeError(f"{name} must be a tensor, got {came(value)}{hint}")
    if value.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got {value.layout}")


def is_integer(dtype: torch.dtype) -> bool:
    """Whether a dtype is of whole numbers; booleans are none."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def as_labels(name: str, value: Any) -> Tensor:
    """Return labels or ids as a tensor: a tensor as it is, a copy of a numpy array of numbers.

    Raises:
        TypeError: If it is neither; a list may mean many things.
        ValueError: If integers of the array do not fit into int64.
    """
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf":
        raise TypeError(f"{name} must be a tensor or a numpy array of numbers, got {came(value)}")
    if value.dtype.kind == "f":  # in this machine's order of bytes
        return torch.from_numpy(value.astype(np.promote_types(value.dtype, np.float16)))
    if value.dtype == np.uint64 and value.size and value.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} must be at most 2**63 - 1, got {value.max()}")
    return torch.from_numpy(value.astype(np.int64))


def as_ids(name: str, value: Any) -> Tensor | int:
    """Return sample ids: ``[M]`` int64, or M for 0 .. M - 1.

    Raises:
        TypeError: If it is neither a tensor or array nor an integer.
        ValueError: If the tensor is not ``[M]`` int64, or M is out of its range.
    """
    if type(value) is int or not isinstance(value, Tensor | np.ndarray):
        if isinstance(value, list | tuple):
            raise TypeError(f"{name} must be a tensor or the number of ids, got {came(value)}")
        return as_integer(name, value, most=MOST_ROWS)
    ids = as_labels(name, value)
    if ids.dim() != 1 or ids.dtype != torch.int64:
        raise ValueError(f"{name} must be [M] int64, got {list(ids.shape)} {dtype_name(ids.dtype)}")
    if ids.device.type == "meta":
        raise ValueError(f"{name} must be on a device that holds values, got it on meta")
    return ids


def image_layout(
    name: str, images: Tensor, layout: Layout | None = None
) -> tuple[bool, tuple[int, int, int]]:
    """Tell whether ``images`` are NHWC, and their channels, height and width.

    Without a layout the shape must leave no doubt. Channels are few (1 to 4) and a picture is no
    strip of so few pixels: the one of second and last axis that is as small is the channels. NHWC
    must also look like pictures, square or at least 16 pixels high and wide with 3 or 4 channels,
    since signals and patches of many channels end in a small axis too. More channels are NCHW, and
    must be fewer than the pixels of a line, or belong to square images.

    Raises:
        TypeError: If they are no tensor.
        ValueError: If they are not a batch of images of a supported dtype, or may be both.
    """
    check_tensor(name, images)
    if images.dim() != 4:
        raise ValueError(f"{name} must be [M, C, H, W] or [M, H, W, C], got {list(images.shape)}")
    if images.dtype != torch.uint8 and images.dtype not in IMAGE_DTYPES:
        raise ValueError(
            f"{name} must be uint8 or one of {dtype_names(IMAGE_DTYPES)}, "
            f"got {dtype_name(images.dtype)}"
        )
    _, second, third, fourth = images.shape
    if 0 in (second, third, fourth):
        raise ValueError(f"{name} must have pixels and channels, got {list(images.shape)}")
    nhwc = layout == "NHWC" if layout is not None else _looks_nhwc(second, third, fourth)
    if nhwc is None:
        raise ValueError(
            f"{name} must say by layout what its axes are, got {list(images.shape)}, which may be "
            '[M, C, H, W] or [M, H, W, C]: give the engine layout="NCHW" or layout="NHWC"'
        )
    return nhwc, ((fourth, second, third) if nhwc else (second, third, fourth))


def _looks_nhwc(second: int, third: int, last: int) -> bool | None:
    """Whether images are NHWC by their shape; None where they may be both."""
    if second <= 4:
        return None if last <= 4 else False
    if last <= 4:
        pictures = last >= 3 and min(second, third) >= 16
        return True if second == third or pictures else None
    fits = second < min(third, last) or (third == last and second != last)
    return False if fits else None


def check_pixels(name: str, images: Tensor) -> None:
    """Raise if floats are not in [0, 1], with a margin. On a device that cannot be told at once."""
    if images.is_floating_point() and _is_seen(images) and images.numel():
        low, high = (float(value) for value in images.detach().aminmax())
        check_pixel_range(name, low, high)


def check_pixel_range(name: str, low: float, high: float) -> None:
    """Raise a ValueError for images whose least and greatest value say another unit."""
    if low >= LEAST_PIXEL and high <= MOST_PIXEL:
        return
    if math.isnan(low) or math.isnan(high) or math.isinf(low) or math.isinf(high):
        why = "repair these images in the data set"
    elif low >= LEAST_PIXEL and 2 < high <= 65535:
        most = 255 if high <= 256 else 65535
        why = f"if they are in 0 .. {most}, give them as uint8 or divide them by {most}"
    else:
        why = (
            "if they are normalised already, leave that to the engine (its mean and std), or pass "
            "augmented views to from_views"
        )
    raise ValueError(
        f"{name} must be uint8, or floats in [0, 1] ({LEAST_PIXEL:g} to {MOST_PIXEL:g} is let "
        f"pass), got values in {low:.4g} .. {high:.4g}: {why}"
    )


def check_finite(name: str, images: Tensor) -> None:
    """Raise if floats hold NaN or infinity. On a device that cannot be told without waiting."""
    if images.is_floating_point() and _is_seen(images) and images.numel():
        low, high = (float(value) for value in images.detach().aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"{name} must be finite, got values in {low:.4g} .. {high:.4g}")


def _is_seen(tensor: Tensor) -> bool:
    """Whether values can be looked at: they are on the CPU, and nothing is traced."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def as_length(name: str, value: Any) -> int:
    """Return the length of a tensor's first axis; raise if there is none."""
    check_tensor(name, value)
    if value.dim() == 0:
        raise ValueError(f"{name} must be [N], got a single number")
    return len(value)


def check_rows(name: str, num_rows: int) -> None:
    """Raise a ValueError if a batch has more rows than a kernel can count."""
    if num_rows > MOST_ROWS:
        raise ValueError(f"a batch must have at most {MOST_ROWS} rows, got {num_rows} by {name}")


def as_views(value: Any) -> tuple[int, ...]:
    """Return the numbers of some views; one stands for itself."""
    if isinstance(value, range):
        value = tuple(value)
    if isinstance(value, list | tuple):
        return tuple(
            as_integer(f"views[{place}]", view, most=MOST_VIEW) for place, view in enumerate(value)
        )
    return (as_integer("views", value, most=MOST_VIEW),)


def check_key_tensor(key: Any) -> None:
    """Raise unless ``key`` is a seed and a step in one tensor."""
    check_tensor("key", key)
    if tuple(key.shape) != (2,) or key.dtype != torch.int64:
        raise ValueError(f"key must be [2] int64, got {came(key)}")


def check_geometry(geometry: Geometry) -> None:
    """Raise if a field of a `Geometry` is of the wrong kind or out of its range."""
    check_kind("geometry", geometry, Geometry, "a Geometry")
    as_integer("padding", geometry.padding, most=MOST_PADDING)
    check_choice("padding_mode", geometry.padding_mode, PaddingMode)
    as_flag("zoom", geometry.zoom)
    as_integer("blur_radius", geometry.blur_radius, most=math.ceil(3 * MOST_SIGMA))
    if torch.compiler.is_compiling():  # engines have looked, when they were made
        return
    cut = as_cut(geometry.cut)
    as_chain(geometry.chain)
    if geometry.zoom and cut and cut.area:
        raise ValueError(f"zoom must be False where a cut has an area, got {geometry}")


def as_cut(cut: Any) -> Cut | None:
    """Return a `Cut` of which every field is checked, or None."""
    if cut is None:
        return None
    check_kind("cut", cut, Cut, "a Cut or None")
    size, area, aspect = cut
    if size is not None:
        _two("size", size, "integers, height and width")
        size = tuple(
            as_integer(f"size[{place}]", side, least=1, most=MOST_PADDING)
            for place, side in enumerate(size)
        )
    if size is None and area is None:
        raise ValueError("cut must have a size or an area, got neither")
    return Cut(
        size,
        None if area is None else as_pair("area", area, above=0, most=1),
        as_aspect(aspect),
    )


def as_aspect(aspect: Any) -> tuple[float, float]:
    """Return least and greatest width over height."""
    return as_pair("aspect", aspect, least=0.001, most=1000)


# Least and greatest magnitude of an operation; those that are not named have 0 alone.
MAGNITUDES: dict[OpName, tuple[float, float]] = {
    "posterize": (1, 8),
    "solarize": (0, 256),
    **dict.fromkeys(("brightness", "color", "contrast", "sharpness"), (0, 100)),
    "hue": (-0.5, 0.5),
    "rotate": (-360, 360),
    **dict.fromkeys(("shear_x", "shear_y"), (-10, 10)),
    **dict.fromkeys(("translate_x", "translate_y"), (-(2**14), 2**14)),
    **dict.fromkeys(("translate_x_rel", "translate_y_rel"), (-1, 1)),
}
_MOST_SHUFFLED = 4
# What `as_chain` has returned, which comes back with every batch of an engine, by identity: as long
# as it is here no other has its number.
_checked_chains: dict[int, Chain] = {}
_MOST_CHECKED = 64


def as_chain(chain: Any) -> Chain | None:
    """Return a `Chain` of which every field is checked, or None."""
    if chain is None or _checked_chains.get(id(chain)) is chain:
        return chain
    check_kind("chain", chain, Chain, "a Chain or None")
    ops, num_slots, prob, shuffled, gray, outside, cutout, color = chain
    check_kind("ops", ops, tuple, "a tuple of Op")
    for place, op in enumerate(ops):
        check_kind(f"ops[{place}]", op, Op, "an Op")
        check_choice(f"ops[{place}].name", op.name, OpName)
        name = f"ops[{place}].magnitudes"
        check_kind(name, op.magnitudes, tuple, "a tuple of numbers")
        if not op.magnitudes:
            raise ValueError(f"{name} must hold at least one, got none for {op.name}")
        for magnitude in (op.magnitudes[0], op.magnitudes[-1]):  # which are hashed
            as_number(name, magnitude)
        _check_magnitudes(op)
    num_slots = as_integer("num_slots", num_slots, most=MOST_SLOTS)
    shuffled, gray = as_flag("shuffled", shuffled), as_number("gray", gray, least=0, most=1)
    if shuffled and len(ops) > _MOST_SHUFFLED:
        raise ValueError(f"ops must be at most {_MOST_SHUFFLED} to be shuffled, got {len(ops)}")
    if not shuffled and gray:
        raise ValueError(f"gray must be 0 where operations are not shuffled, got {gray}")
    if not ops:
        raise ValueError("ops must hold at least one, if only identity, got none")
    check_choice("outside", outside, Outside)
    checked = Chain(
        ops,
        num_slots,
        as_number("prob", prob, least=0, most=1),
        shuffled,
        gray,
        outside,
        as_cutout(cutout),
        None if color is None else as_color(color),
    )
    if len(_checked_chains) >= _MOST_CHECKED:
        _checked_chains.clear()
    _checked_chains[id(checked)] = checked
    return checked


def as_cutout(cutout: Any) -> int | tuple[float, float]:
    """Return the side of a cutout in pixels, or its least and greatest share of the width."""
    if isinstance(cutout, list | tuple):
        return as_pair("cutout", cutout, most=1)
    return as_integer("cutout", cutout, most=MOST_PADDING)


def as_color(color: Any) -> tuple[int, ...]:
    """Return a colour as bytes, one or one per channel."""
    if not isinstance(color, list | tuple) or not color:
        raise TypeError(f"cutout_color must be bytes per channel or None, got {came(color)}")
    return tuple(
        as_integer(f"cutout_color[{place}]", value, most=255) for place, value in enumerate(color)
    )


@lru_cache(maxsize=256)
def _check_magnitudes(op: Op) -> None:
    """Raise unless Pillow would take each magnitude, and make of it what it says."""
    least, most = MAGNITUDES.get(op.name, (0, 0))
    for magnitude in op.magnitudes:
        as_number(f"the magnitude of {op.name}", magnitude, least=least, most=most)
        if op.name == "posterize" and magnitude != int(magnitude):
            raise ValueError(f"the magnitude of posterize must be whole bits, got {magnitude}")
    if (least, most) == (0, 0) and len(op.magnitudes) > 1:
        raise ValueError(
            f"the magnitudes of {op.name} must be the one number 0, got {len(op.magnitudes)}"
        )


def as_policy(
    padding: Any,
    zoom_px: Any,
    flip: Any,
    blur_sigma: Any,
    cut: Any = None,
    chain: Any = None,
) -> AugmentPolicy:
    """Return what an augmentation is drawn from; each field is checked.

    Raises:
        TypeError: If a field is of the wrong kind.
        ValueError: If a field is out of its range.
    """
    policy = AugmentPolicy(
        as_integer("padding", padding, most=MOST_PADDING),
        as_integer_pair("zoom_px", zoom_px, most=MOST_PADDING),
        as_number("flip", flip, least=0, most=1),
        None if blur_sigma is None else as_pair("blur_sigma", blur_sigma, most=MOST_SIGMA),
        as_cut(cut),
        as_chain(chain),
    )
    if policy.zoom_px[1] and policy.cut and policy.cut.area:
        raise ValueError(
            f"zoom_px must be (0, 0) where there is an area to cut out, got {policy.zoom_px}"
        )
    return policy


def as_plan(plan: Any) -> DrawPlan:
    """Return a plan of which every field is checked.

    Raises:
        TypeError: If it is none, or a field is of the wrong kind.
        ValueError: If a field is out of its range.
    """
    check_kind("plan", plan, DrawPlan, "a DrawPlan")
    num_augmentations, policy, alpha, lam, mix, weak_x, weak_views = plan
    if policy is not None:
        check_kind("policy", policy, AugmentPolicy, "an AugmentPolicy or None")
        policy = as_policy(*policy)
    check_choice("lam", lam, LamMode)
    check_choice("mix", mix, MixMode)
    num_augmentations = as_integer("num_augmentations", num_augmentations, least=1, most=MOST_VIEW)
    return DrawPlan(
        num_augmentations,
        policy,
        as_number("alpha", alpha, least=0.05, most=1000),
        lam,
        mix,
        as_flag("weak_x", weak_x),
        as_integer("weak_views", weak_views, most=num_augmentations),
    )


def check_choice(name: str, choice: object, kind: Any) -> None:
    """Raise a ValueError if ``choice`` is none of the words of a Literal."""
    if not isinstance(choice, str) or choice not in kind.__args__:
        raise ValueError(f"{name} must be one of {list(get_args(kind))}, got {shown(choice)}")


def check_layout(layout: object) -> None:
    """Raise a ValueError if ``layout`` is neither None nor one of its words."""
    if layout is not None:
        check_choice("layout", layout, Layout)


def shown(value: object) -> str:
    """A value without its type, of bounded length."""
    text = came(value)
    return text.removesuffix(f" of type {type(value).__name__}")


def check_labels(y: Any, num_classes: int) -> None:
    """Raise if ``y`` are not labels. On a device their values cannot be looked at without waiting.

    There a label out of range gives a row of zeros, which `MixMatchBatch.check` finds.

    Args:
        y: Integer labels, ``[B]``, or soft labels, ``[B, L]``.
        num_classes: L.

    Raises:
        TypeError: If ``y`` is no tensor.
        ValueError: If labels are out of range, of the wrong shape, or do not sum to one.
    """
    check_tensor("y", y)
    hard = y.dim() == 1 and is_integer(y.dtype)
    soft = y.dim() == 2 and y.shape[1] == num_classes
    if not hard and not (soft and y.is_floating_point()):
        hint = "; soft labels are floating point" if soft and is_integer(y.dtype) else ""
        raise ValueError(
            f"y must be integer labels [B] or soft labels [B, L] with L = {num_classes}, "
            f"got {list(y.shape)} {dtype_name(y.dtype)}{hint}"
        )
    if not _is_seen(y):
        return
    if hard:
        check_classes(y, num_classes)
    else:
        check_distributions(y.float())


def check_classes(y: Tensor, num_classes: int) -> None:
    if len(y) == 0:
        return
    least, most = (int(value) for value in y.aminmax())
    if least < 0 or most >= num_classes:
        raise ValueError(
            f"y must be labels in 0 .. {num_classes - 1} (num_classes = {num_classes}), "
            f"got {least if least < 0 else most}"
        )


def check_distributions(targets: Tensor) -> None:
    sums = targets.sum(dim=1)
    fine = ((sums - 1).abs() <= SUM_TOLERANCE) & (targets >= 0).all(dim=1)
    if not fine.all():
        row = int((~fine).nonzero()[0])
        raise ValueError(
            "y must be soft labels that are not negative and sum to 1 in every row, got row "
            f"{row} with the sum {float(sums[row]):.4g} and the least entry "
            f"{float(targets[row].min()):.4g}"
        )


def check_mixup(params: Any, length: int, like_name: str, name: str = "params") -> None:
    """Raise if ``params`` are not λ' and partners of ``length`` rows."""
    check_kind(name, params, MixUpParams, "MixUpParams")
    for field, tensor, dtype in zip(
        ("lam", "index"), params, (torch.float32, torch.int64), strict=True
    ):
        check_tensor(f"{name}.{field}", tensor)
        if tuple(tensor.shape) != (length,) or tensor.dtype != dtype:
            raise ValueError(
                f"{name}.{field} must be [N] {dtype_name(dtype)} with N = {length} like "
                f"{like_name}, got {list(tensor.shape)} {dtype_name(tensor.dtype)}"
            )
    check_device(f"{name}.lam", params.lam, f"{name}.index", params.index)


def check_mixup_values(params: MixUpParams) -> None:
    """Raise if λ' or partners are out of range. On a device that cannot be told at once."""
    lam, index = params
    if not _is_seen(index) or len(index) == 0:
        return
    low, high = map(float, lam.detach().aminmax())
    first, last = map(int, index.aminmax())
    if not (low >= 0 and high <= 1 and first >= 0 and last < len(lam)):
        raise mixup_error(len(lam), low, high, first, last)


def mixup_error(length: int, low: float, high: float, first: int, last: int) -> ValueError:
    """Say that λ' or partners are out of range."""
    return ValueError(
        f"params.lam must be in [0, 1] and params.index in 0 .. N - 1 = {length - 1}, got "
        f"{low:.4g} .. {high:.4g} and {first} .. {last}"
    )


def check_batch_logits(logits: Any) -> tuple[int, int, int]:
    """Raise if ``logits`` are not ``[K, M, L]`` floats with K at least 1; return K, M and L."""
    check_tensor("logits", logits)
    if logits.dim() != 3 or len(logits) < 1:
        raise ValueError(f"logits must be [K, M, L] with K >= 1, got {list(logits.shape)}")
    check_float("logits", logits)
    num_views, num_images, num_classes = logits.shape
    if num_classes == 0:
        raise ValueError(f"logits must be [K, M, L] with L >= 1, got {list(logits.shape)}")
    return num_views, num_images, num_classes


def check_mixup_rows(inputs: Any, targets: Any, params: Any, out: Any) -> None:
    """Raise if rows, targets, draws and the output of a MixUp do not fit each other."""
    check_tensor("inputs", inputs)
    check_tensor("targets", targets)
    if inputs.dim() < 1:
        raise ValueError(f"inputs must be [N, ...], got {list(inputs.shape)}")
    length = len(inputs)
    check_float("inputs", inputs)
    if targets.dim() != 2 or len(targets) != length:
        raise ValueError(
            f"targets must be [N, L] with N = {length} like inputs, got {list(targets.shape)}"
        )
    if targets.dtype != torch.float32:
        raise ValueError(f"targets must be float32, got {dtype_name(targets.dtype)}")
    check_mixup(params, length, "inputs")
    check_device("targets", targets, "inputs", inputs)
    check_device("params.index", params.index, "inputs", inputs)
    check_dense("inputs", inputs)
    check_dense("targets", targets)
    if out is not None:
        check_tensor("out", out)
        check_device("out", out, "inputs", inputs)
        check_like("out", out, "inputs", inputs)
        check_device("out", out, "inputs", inputs)


def check_loss(logits: Any, targets: Any, num_labelled: Any, weight_u: Any) -> None:
    """Raise if logits, targets and the number of labelled rows do not fit each other."""
    check_tensor("logits", logits)
    check_tensor("targets", targets)
    check_float("logits", logits)
    if logits.dim() != 2 or logits.shape != targets.shape:
        raise ValueError(
            f"logits must be [N, L] = {list(targets.shape)} like targets, got {list(logits.shape)}"
        )
    check_float("targets", targets)
    as_integer("num_labelled", num_labelled, most=2**63)
    if num_labelled > len(logits):
        raise ValueError(f"num_labelled must be in 0 .. N = {len(logits)}, got {num_labelled}")
    check_device("targets", targets, "logits", logits)
    if not isinstance(weight_u, Tensor):
        as_number("weight_u", weight_u, least=0)
        return
    check_tensor("weight_u", weight_u)
    if weight_u.dim() or weight_u.is_complex():
        raise ValueError(f"weight_u must be a number or a 0-d tensor, got {came(weight_u)}")
    if weight_u.device.type != "cpu":
        check_device("weight_u", weight_u, "logits", logits)
    else:
        check_scalar("weight_u", weight_u)


def check_weights(weights: Any, logits: Tensor) -> None:
    """Raise if there is not a floating point weight for each row of logits."""
    check_tensor("weights", weights)
    check_float("weights", weights)
    if weights.shape != logits.shape[:1]:
        raise ValueError(
            f"weights must be [N] = {list(logits.shape[:1])} like logits, got {list(weights.shape)}"
        )
    check_device("weights", weights, "logits", logits)


def check_tsa(tsa: Any, logits: Tensor) -> None:
    """Raise if the probability from which labelled rows are left out is no 0-d float."""
    check_tensor("tsa", tsa)
    if tsa.dim() or not tsa.is_floating_point():
        raise ValueError(f"tsa must be a 0-d floating point tensor, got {came(tsa)}")
    if tsa.device.type != "cpu":
        check_device("tsa", tsa, "logits", logits)
    check_scalar("tsa", tsa)


def check_fairness(fairness: Any, logits: Tensor) -> None:
    """Raise if there is not a floating point share for each class of logits ``[N, L]``."""
    check_tensor("fairness", fairness)
    if logits.dim() != 2 or fairness.shape != logits.shape[1:]:
        raise ValueError(
            f"fairness must be [L] like logits [N, L], got {list(fairness.shape)} and "
            f"{list(logits.shape)}"
        )
    check_float("fairness", fairness)
    check_device("fairness", fairness, "logits", logits)


def check_ids_of(name: str, ids: Tensor, count_name: str, count: int) -> None:
    """Raise if ids are not those of ``count`` samples. On a device that cannot be told at once."""
    if not _is_seen(ids) or not ids.numel():
        return
    low, high = (int(end) for end in ids.aminmax())
    if low < 0 or high >= count:
        raise ValueError(
            f"{name} must be in 0 .. {count_name} - 1 = {count - 1}, got {low} .. {high}"
        )


def as_weighting(weighting: Any, logits: Tensor) -> Weighting:
    """Return a weighting of which every field fits logits ``[M, L]``."""
    check_kind("weighting", weighting, Weighting, "a Weighting")
    temperature, rule, threshold, state, spread, ratio, aligned = weighting
    check_choice("rule", rule, WeightRule)
    num_classes = logits.shape[1]
    lengths = {"soft": 2 + 3 * num_classes, "free": 2 + 3 * num_classes, "flex": num_classes + 1}
    for name, tensor, length in (
        ("state", state, lengths.get(rule)),
        ("ratio", ratio, num_classes),
    ):
        if tensor is None and (name == "ratio" or length is None):
            continue
        check_tensor(name, tensor)
        if tuple(tensor.shape) != (length,):
            raise ValueError(f"{name} must be [{length}] for {rule!r}, got {list(tensor.shape)}")
        wanted = torch.int32 if name == "state" and rule == "flex" else torch.float32
        if tensor.dtype != wanted:
            raise ValueError(
                f"{name} must be {dtype_name(wanted)} for {rule!r}, got {dtype_name(tensor.dtype)}"
            )
        check_device(name, tensor, "logits", logits)
    return Weighting(
        as_number("temperature", temperature, least=0),
        rule,
        as_number("threshold", threshold, least=0, most=1),
        state,
        as_number("spread", spread, above=0),
        ratio,
        as_flag("aligned_targets", aligned),
    )


def check_scalar(name: str, value: Tensor) -> None:
    """Raise if a 0-d tensor is negative or not finite. On a device that cannot be told at once."""
    if _is_seen(value):
        as_number(name, value.item(), least=0)


def as_rampup(step: Any, rampup_steps: Any) -> tuple[Tensor, int]:
    """Return the step and the length of a ramp, the step as a 0-d tensor.

    Raises:
        TypeError: If one is no integer.
        ValueError: If one is negative.
    """
    rampup_steps = as_integer("rampup_steps", rampup_steps, most=MOST_STEP)
    if not isinstance(step, Tensor):
        step = torch.tensor(as_integer("step", step, most=MOST_SEED), device="cpu")
    elif step.dim() or not is_integer(step.dtype):
        raise ValueError(f"step must be a 0-d integer, got {came(step)}")
    else:
        check_scalar("step", step)
    return step, rampup_steps


def check_batch(batch: Any) -> None:
    """Raise if ``batch`` is no `MixMatchBatch` whose parts are tensors and a number of rows."""
    check_kind("batch", batch, MixMatchBatch, "a MixMatchBatch")
    for name in ("inputs", "targets", "step"):
        check_tensor(f"batch.{name}", getattr(batch, name))
    as_integer("batch.num_labelled", batch.num_labelled)


def check_consistency_batch(batch: Any) -> None:
    """Raise if ``batch`` is no `ConsistencyBatch` whose parts are tensors and a number of rows."""
    check_kind("batch", batch, ConsistencyBatch, "a ConsistencyBatch")
    for name in ("inputs", "targets", "step"):
        check_tensor(f"batch.{name}", getattr(batch, name))
    as_integer("batch.num_labelled", batch.num_labelled)
    if batch.guess is None:
        check_tensor("batch.weights", batch.weights)
        return
    check_callable("batch.guess", batch.guess, "what labels a batch, or None")
    as_integer("batch.num_weak", batch.num_weak, least=1, most=len(batch.inputs))


def check_remixmatch_batch(batch: Any) -> None:
    """Raise if ``batch`` is no `ReMixMatchBatch` whose parts are tensors and numbers of rows."""
    check_kind("batch", batch, ReMixMatchBatch, "a ReMixMatchBatch")
    for name in ("inputs", "targets", "weights", "step"):
        check_tensor(f"batch.{name}", getattr(batch, name))
    rows = as_integer("batch.num_mixed", batch.num_mixed, most=len(batch.targets))
    as_integer("batch.num_labelled", batch.num_labelled, most=rows)


def check_any_batch(batch: Any) -> None:
    """Raise if ``batch`` is that of no method."""
    if isinstance(batch, ConsistencyBatch):
        check_consistency_batch(batch)
    elif isinstance(batch, ReMixMatchBatch):
        check_remixmatch_batch(batch)
    else:
        check_kind("batch", batch, MixMatchBatch, "a batch of a method, such as a MixMatchBatch")
        check_batch(batch)


# Dtype and length of a row of the fields of AugmentParams
_DRAWS = (
    ("top", torch.int32, ()),
    ("left", torch.int32, ()),
    ("flip", torch.int32, ()),
    ("zoom", torch.int32, (4,)),
    ("sigma", torch.float32, ()),
)


def check_params(params: Any, called: str = "params") -> int:
    """Raise if ``params`` are not draws of R rows, all on one device; return R."""
    check_kind(called, params, (AugmentParams, ChainParams), "AugmentParams or ChainParams")
    top = params.top
    check_tensor(f"{called}.top", top)
    rows = top.shape[0] if top.dim() else -1
    device = top.device
    for (name, dtype, row), tensor in zip(_DRAWS, params[:5], strict=True):
        if (
            type(tensor) is Tensor
            and tensor.shape == (rows, *row)
            and tensor.dtype is dtype
            and tensor.layout is torch.strided
            and tensor.device == device
        ):
            continue
        check_tensor(f"{called}.{name}", tensor)
        if tuple(tensor.shape) != (rows, *row) or tensor.dtype != dtype:
            raise ValueError(
                f"{called}.{name} must be {'[R, 4]' if row else '[R]'} {dtype_name(dtype)}"
                f"{'' if rows < 0 else f' with R = {rows} like {called}.top'}, "
                f"got {list(tensor.shape)} {dtype_name(tensor.dtype)}"
            )
        check_device(f"{called}.{name}", tensor, f"{called}.top", top)
    if isinstance(params, ChainParams):
        chain = params.chain
        check_tensor(f"{called}.chain", chain)
        if chain.dim() != 2 or chain.shape[0] != rows or chain.dtype != torch.int32:
            raise ValueError(
                f"{called}.chain must be [R, W] int32 with R = {rows} like {called}.top, "
                f"got {came(chain)}"
            )
        check_device(f"{called}.chain", chain, f"{called}.top", top)
    return rows


def check_chain_params(params: Any, cut: Cut | None, chain: Chain | None) -> None:
    """Raise unless draws have the columns of a cut and a chain, or none where there is neither."""
    has_columns = isinstance(params, ChainParams)
    if has_columns != (cut is not None or chain is not None):
        kinds = ("AugmentParams", "ChainParams")
        raise ValueError(
            f"params must be {kinds[not has_columns]} for this geometry, "
            f"got {kinds[has_columns]}: draw them by the policy that it belongs to"
        )
    if not has_columns:
        return
    wanted = columns(cut, chain).total
    if params.chain.shape[1] != wanted:
        raise ValueError(
            f"params.chain must have {wanted} columns for this geometry, "
            f"got {params.chain.shape[1]}: draw them by the policy that it belongs to"
        )


def check_augment(
    sources: Sequence[Any],
    params: Any,
    geometry: Any,
    scaling: Any,
    dtype: Any,
    mixup: Any,
    out: Any,
    layout: Layout | None = None,
) -> tuple[bool, tuple[int, int, int, int]]:
    """Raise if the arguments of an augmentation do not fit each other.

    Returns:
        Whether the sources are NHWC, and the shape of the views, R, C, H and W.
    """
    nhwc, image_shape = check_sources(sources, layout)
    channels, height, width = image_shape
    first = sources[0]
    check_geometry(geometry)
    check_reflection(geometry.padding, geometry.padding_mode, height, width)
    check_image_dtype(dtype)
    rows = check_draws_of(sources, params, geometry)
    check_kind("scaling", scaling, Scaling, "a Scaling")
    for name, factor in zip(("scale", "bias"), scaling, strict=True):
        if not isinstance(factor, Tensor):
            as_number(name, factor)
            continue
        if tuple(factor.shape) != (channels,):
            raise ValueError(
                f"{name} must be [C] with C = {channels} like images, got {list(factor.shape)}"
            )
        check_float(name, factor)
        check_device(name, factor, "images", first)
    shape = (rows, channels, *view_size(geometry.cut, height, width))
    if geometry.chain:
        name = "x" if len(sources) == 2 else "images"
        check_chain_images(name, first, geometry.chain, shape)
    if out is not None:
        check_tensor("out", out)
        if tuple(out.shape) != shape or out.dtype != dtype:
            raise ValueError(
                f"out must be {list(shape)} {dtype_name(dtype)}, "
                f"got {list(out.shape)} {dtype_name(out.dtype)}"
            )
        check_device("out", out, "images", first)
        check_dense("out", out)
    if mixup is not None:
        check_mixup(mixup, rows, "params", "mixup")
        check_device("mixup.index", mixup.index, "images", first)
    return nhwc, shape


def check_sources(
    sources: Sequence[Any], layout: Layout | None
) -> tuple[bool, tuple[int, int, int]]:
    """Raise unless ``sources`` are images, or x and u of one kind.

    Returns:
        Whether they are NHWC, and their channels, height and width.
    """
    if len(sources) not in (1, 2):
        raise ValueError(f"images must be a tensor or a pair (x, u), got {len(sources)} of them")
    check_layout(layout)
    first = sources[0]
    found = image_layout("x" if len(sources) == 2 else "images", first, layout)
    for image in sources[1:]:
        check_tensor("u", image)
        if image.shape[1:] != first.shape[1:] or image.dtype != first.dtype:
            raise ValueError(
                "x and u must have the same channels, height, width, layout and dtype, got "
                f"{list(first.shape)} {dtype_name(first.dtype)} and "
                f"{list(image.shape)} {dtype_name(image.dtype)}"
            )
        check_device("u", image, "x", first)
    return found


def check_draws_of(sources: Sequence[Tensor], params: Any, geometry: Geometry) -> int:
    """Raise unless ``params`` are draws of some views of ``sources``; return their number."""
    rows = check_params(params)
    check_chain_params(params, geometry.cut, geometry.chain)
    check_device("params.top", params.top, "images", sources[0])
    *once, last = (source.shape[0] for source in sources)
    if rows < sum(once) or (rows - sum(once)) % max(last, 1):
        raise ValueError(f"params must have a row per view of {[*once, last]} images, got {rows}")
    if last == 0 and rows > sum(once):
        raise ValueError(f"images must not be empty where params have rows, got {rows} rows")
    return rows


def view_size(cut: Cut | None, height: int, width: int) -> tuple[int, int]:
    """Return height and width of the views of images; raise if nothing of that size is in them."""
    if cut is None or cut.size is None:
        return height, width
    if cut.area is None and (cut.size[0] > height or cut.size[1] > width):
        raise ValueError(
            f"size must be at most that of the images, {height} x {width} pixels, to be cut out "
            f"of them, got {cut.size[0]} x {cut.size[1]}: give an area, too, to resize what is cut"
        )
    return cut.size


_OF_COLORS = ("color", "contrast", "hue")


def check_chain_images(
    name: str, images: Tensor, chain: Chain, shape: tuple[int, int, int, int]
) -> None:
    """Raise if a chain cannot run on images that become views of ``shape``."""
    _, channels, height, width = shape
    if images.dtype != torch.uint8:
        raise ValueError(
            f"{name} must be uint8 where operations such as equalize follow, which are defined on "
            f"bytes, got {dtype_name(images.dtype)}: {name}.byte() makes them of 0 .. 255, "
            f"{name}.mul(255).round().byte() of [0, 1]"
        )
    of_colors: list[str] = [op.name for op in chain.ops if op.name in _OF_COLORS]
    of_colors += ["gray"] if chain.gray else []
    if of_colors and channels not in (1, 3):
        raise ValueError(
            f"{name} must have 1 or 3 channels for {of_colors[0]}, which reads colours, "
            f"got {channels}"
        )
    if isinstance(chain.cutout, int) and chain.cutout > min(height, width):
        raise ValueError(
            f"cutout must be at most the smaller side of a view, {min(height, width)} pixels, "
            f"got {chain.cutout}"
        )
    if chain.cutout_color is not None and len(chain.cutout_color) not in (1, channels):
        raise ValueError(
            f"cutout_color must have one byte or one per channel, {channels}, "
            f"got {chain.cutout_color}"
        )


def check_image_dtype(dtype: Any) -> None:
    """Raise unless views can be of ``dtype``."""
    check_kind("dtype", dtype, torch.dtype, "a torch.dtype")
    if dtype not in IMAGE_DTYPES:
        raise ValueError(
            f"dtype must be one of {dtype_names(IMAGE_DTYPES)}, got {dtype_name(dtype)}"
        )


def check_draws(params: AugmentParams | ChainParams, padding: int) -> None:
    """Raise if draws lead out of an image. On a device they cannot be looked at without waiting."""
    top, left, flip, zoom, sigma = params[:5]
    if not _is_seen(top) or len(top) == 0:
        return
    offsets = torch.stack([top, left])
    least, most = (int(value) for value in offsets.aminmax())
    if least < 0 or most > 2 * padding:
        raise draws_error(2 * padding, least, most)
    least, most = (int(value) for value in zoom.aminmax())
    if least < 0 or most > MOST_PADDING:
        raise zoom_error(least, most)
    if int(flip.min()) < 0 or int(flip.max()) > 1:
        raise flip_error(int(flip.min()), int(flip.max()))
    low, high = (float(value) for value in sigma.aminmax())
    if not 0 <= low <= high < math.inf:
        raise sigma_error(low, high)


def check_chain_draws(params: ChainParams, cut: Cut | None, chain: Chain | None) -> None:
    """`check_draws` for the columns of a cut and a chain."""
    drawn = params.chain
    if not _is_seen(drawn) or drawn.numel() == 0:
        return
    of_cut, of_slots, of_cutout = columns(cut, chain)
    places = torch.cat([drawn[:, of_cut][:, 2:], drawn[:, of_cutout][:, :2]], dim=1)
    if int(drawn.min()) < 0 or (places.numel() and int(places.max()) >= 2**24):
        raise ValueError(
            "params.chain must hold no negative number, and places below 2**24, "
            f"got {int(drawn.min())} .. {int(drawn.max())}"
        )
    slots = drawn[:, of_slots]
    if chain and slots.numel() and int(slots.max()) >= len(entries(chain)):
        raise ValueError(
            f"params.chain must hold entries in 0 .. {len(entries(chain)) - 1} in its slots, "
            f"got {int(slots.max())}"
        )


def draws_error(limit: int, least: int, most: int) -> ValueError:
    """Say that offsets lead out of an image."""
    return ValueError(
        f"params.top and params.left must be in 0 .. 2·padding = {limit}, "
        f"got offsets in {least} .. {most}"
    )


def zoom_error(least: int, most: int) -> ValueError:
    """Say that a cut is none that is drawn."""
    return ValueError(f"params.zoom must be in 0 .. {MOST_PADDING}, got {least} .. {most}")


def flip_error(least: int, most: int) -> ValueError:
    """Say that a flip is neither yes nor no."""
    return ValueError(f"params.flip must be 0 or 1, got {least} .. {most}")


def sigma_error(low: float, high: float) -> ValueError:
    """Say that a blur is none."""
    return ValueError(f"params.sigma must be at least 0 and finite, got {low:g} .. {high:g}")


def check_reflection(padding: int, padding_mode: PaddingMode, height: int, width: int) -> None:
    """Raise a ValueError if an image is too small to be reflected into its padding."""
    if padding_mode == "reflect" and padding >= min(height, width):
        raise ValueError(
            f"padding must be smaller than the image to reflect it, got padding = {padding} for "
            f"images of {height} x {width} pixels"
        )


def check_groups(num_groups: Any, length: int) -> None:
    """Raise unless N rows can be split into ``num_groups``."""
    as_integer("num_groups", num_groups, least=-(2**63), most=2**63)
    if not 1 <= num_groups <= max(length, 1):
        raise ValueError(f"num_groups must be in 1 .. N = {length}, got {num_groups}")


def as_temperature(temperature: Any) -> float:
    """Return the T of a sharpening."""
    return as_number("temperature", temperature, above=0)


def as_smoothing(label_smoothing: Any) -> float:
    """Return the share of the uniform distribution in a label."""
    return as_number("label_smoothing", label_smoothing, least=0, below=1)


def check_float(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {dtype_name(tensor.dtype)}")


def check_device(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"{name} must be on {like.device} like {like_name}, got it on {tensor.device}"
        )


def check_dense(name: str, tensor: Tensor) -> None:
    dense = tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )
    if not dense:
        raise ValueError(
            f"{name} must be contiguous or channels_last, got strides {list(tensor.stride())} for "
            f"{list(tensor.shape)}"
        )


def check_like(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    same_layout = all(
        mine == theirs
        for mine, theirs, size in zip(tensor.stride(), like.stride(), like.shape, strict=False)
        if size > 1
    )
    if tensor.shape != like.shape or tensor.dtype != like.dtype or not same_layout:
        raise ValueError(
            f"{name} must be {list(like.shape)} {dtype_name(like.dtype)} with strides "
            f"{list(like.stride())} like {like_name}, got {list(tensor.shape)} "
            f"{dtype_name(tensor.dtype)} with strides {list(tensor.stride())}"
        )


def check_no_grad(**tensors: Tensor) -> None:
    """Raise a ValueError if a gradient is asked for of what has none."""
    for name, tensor in tensors.items():
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} must not require a gradient, since none flows through this operation: "
                "detach it, or call this under torch.no_grad()"
            )


def check_out(out: Tensor, **read: object) -> None:
    """Raise if writing to ``out`` would change what is read while it is read, or break a gradient.

    Memory is compared as stretches from the first value to the last, so that disjoint parts of one
    buffer are fine. Costs a few microseconds, waits for nothing.

    Args:
        out: Dense, so that it does not overlap itself.
        read: What is read, by the names of the arguments; other things than tensors are passed
            over.

    Raises:
        ValueError: If ``out`` requires a gradient, or shares memory with a tensor that is read.
    """
    if out.requires_grad:
        raise ValueError("out must not require a gradient, since what it holds is overwritten")
    if torch.compiler.is_compiling() or out.device.type == "meta":  # no addresses
        return
    start, stop = _stretch(out)
    for name, tensor in read.items():
        if not isinstance(tensor, Tensor):
            continue
        first, last = _stretch(tensor)
        if first < stop and start < last:
            raise ValueError(
                f"out must share no memory with {name}, which is read while out is written; got "
                f"both in {min(stop, last) - max(start, first)} bytes"
            )


def _stretch(tensor: Tensor) -> tuple[int, int]:
    """The address of the first value and that behind the last; the same for no values."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    away = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return start, start + (away + 1) * tensor.element_size()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(map(dtype_name, dtypes))


def check_not_empty(x: Tensor, u: Tensor) -> None:
    """Raise a TypeError if x or u is no tensor, a ValueError if it is empty."""
    for name, images in (("x", x), ("u", u)):
        check_tensor(name, images)
        if images.dim() == 0 or len(images) == 0:
            raise ValueError(f"{name} must hold at least one image, got {list(images.shape)}")


def check_same_images(x: Any, weak: Any, strong: Any, num_strong: int) -> Tensor:
    """Raise if views made elsewhere do not fit; return the strong ones as ``[S·M, ...]``."""
    for name, images in (("x", x), ("weak", weak), ("strong", strong)):
        check_tensor(name, images)
        if not images.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {images.dtype}")
    if x.dim() != 4:
        raise ValueError(f"x must be [B, C, H, W], got {list(x.shape)}")
    if weak.dim() != 4 or weak.shape[1:] != x.shape[1:]:
        raise ValueError(
            f"weak must be [M, C, H, W] with {list(x.shape[1:])} like x, got {list(weak.shape)}"
        )
    for name, images in (("x", x), ("weak", weak)):
        if len(images) == 0:
            raise ValueError(f"{name} must hold at least one image, got {list(images.shape)}")
    flat: Tensor = strong.flatten(0, 1) if strong.dim() == 5 else strong
    views = strong.shape[0] if strong.dim() == 5 else 1
    if views != num_strong or flat.shape != (views * len(weak), *weak.shape[1:]):
        raise ValueError(
            f"strong must be [S, M, C, H, W] with S = {num_strong} and {list(weak.shape)} like "
            f"weak, got {list(strong.shape)}"
        )
    if len({x.dtype, weak.dtype, strong.dtype}) > 1:
        raise ValueError(
            f"x, weak and strong must be of one dtype, got {x.dtype}, {weak.dtype} and "
            f"{strong.dtype}"
        )
    for name, images in (("x", x), ("weak", weak), ("strong", strong)):
        check_finite(name, images)
    return flat


def check_images_alike(x: Tensor, u: Tensor) -> None:
    """Raise if x or u is no tensor or empty, or their images are not of one shape and dtype."""
    check_not_empty(x, u)
    if x.shape[1:] != u.shape[1:] or x.dtype != u.dtype:
        raise ValueError(
            "x and u must have the same channels, height, width and dtype, got "
            f"{list(x.shape)} {x.dtype} and {list(u.shape)} {u.dtype}"
        )
