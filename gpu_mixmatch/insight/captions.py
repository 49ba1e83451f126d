"""What stands below a view: what was drawn for it, in a few words."""

import textwrap
from collections.abc import Sequence
from typing import Any

import torch

from gpu_mixmatch._chain import columns, entries
from gpu_mixmatch._validation import MAGNITUDES
from gpu_mixmatch.augment.base import complete
from gpu_mixmatch.impl.eager.cut import regions_of
from gpu_mixmatch.types import (
    AugmentParams,
    AugmentPolicy,
    Chain,
    ChainParams,
    Draws,
    Geometry,
    OpName,
)

_UNITS: dict[OpName, str] = {
    "posterize": " bits",
    "rotate": "°",
    "translate_x": " px",
    "translate_y": " px",
}


def caption(
    draws: Any, row: int, augment: Any, size: Sequence[int], out_size: Sequence[int], width: int
) -> str:
    """Say what was drawn for a view, in lines; nothing where the draws are not those of a policy.

    Args:
        draws: Of an engine, for all rows.
        row: The view's.
        augment: The engine.
        size: Height and width of the images.
        out_size: Height and width of the views.
        width: Characters of a line. A word that is longer has a line of its own.
    """
    if not isinstance(draws, AugmentParams | ChainParams):
        return ""
    policy = complete(augment).policy or AugmentPolicy()
    parts = _shift_and_zoom(draws, row, policy)
    if isinstance(draws, ChainParams) and policy.cut:
        parts += _cut(draws, row, policy, size, out_size)
    parts += ["mirrored"] if int(draws.flip[row]) else []
    if isinstance(draws, ChainParams) and policy.chain:
        parts += _operations(draws, row, policy, policy.chain)
    parts += [f"blur {float(draws.sigma[row]):.1f} px"] if float(draws.sigma[row]) else []
    if isinstance(draws, ChainParams) and policy.chain and policy.chain.cutout:
        parts += _cutout(draws, row, policy, policy.chain, out_size[1])
    # a no-break space keeps a part on one line where it fits
    kept = [
        part.replace(" ", "\N{NO-BREAK SPACE}") if len(part) < width else part for part in parts
    ]
    return textwrap.fill(", ".join(kept), width, break_long_words=False, break_on_hyphens=False)


def _shift_and_zoom(draws: Draws, row: int, policy: AugmentPolicy) -> list[str]:
    parts = []
    if policy.padding:
        down, right = (policy.padding - int(offset[row]) for offset in (draws.top, draws.left))
        moves = [f"{'↓' if down > 0 else '↑'}{abs(down)}"] if down else []
        moves += [f"{'→' if right > 0 else '←'}{abs(right)}"] if right else []
        parts.append(f"moved {' '.join(moves)} px" if moves else "not moved")
    cut = draws.zoom[row].tolist()
    return parts + ([f"cut {' '.join(map(str, cut))} px"] if any(cut) else [])


def _cut(
    draws: ChainParams,
    row: int,
    policy: AugmentPolicy,
    size: Sequence[int],
    out_size: Sequence[int],
) -> list[str]:
    """What was cut out of the window, as it lies there before it is mirrored."""
    unmirrored = draws._replace(flip=torch.zeros_like(draws.flip))
    regions = regions_of(
        unmirrored, Geometry(cut=policy.cut), (size[0], size[1]), (out_size[0], out_size[1])
    )
    assert regions is not None  # there is a cut
    top, left, height, width = (int(values[row]) for values in regions)
    return [f"cut {height} × {width} px", f"at ↓{top} →{left}"]


def _operations(draws: ChainParams, row: int, policy: AugmentPolicy, chain: Chain) -> list[str]:
    listed = entries(chain)
    slots = draws.chain[row, columns(policy.cut, chain).slots].tolist()
    parts = []
    for entry in slots:
        name, magnitude = listed[entry]
        if entry == len(listed) - 1 and chain.gray > 0:
            parts.append("gray")
        elif entry:
            parts.append(f"{name} {_number(magnitude)}{_UNITS.get(name, '')}"
                         if name in MAGNITUDES else name)  # fmt: skip
    return parts


def _cutout(
    draws: ChainParams, row: int, policy: AugmentPolicy, chain: Chain, width: int
) -> list[str]:
    side = int(draws.chain[row, columns(policy.cut, chain).cutout.stop - 1])
    side = side if isinstance(chain.cutout, int) else side * width >> 16
    return [f"cutout {side} px"] if side else []


def _number(value: float) -> str:
    text = f"{value:.2f}".rstrip("0").rstrip(".").replace("-", "\N{MINUS SIGN}")
    return "0" if text == "\N{MINUS SIGN}0" else text
