"""How a chain's draws are laid out: what an entry stands for, and which column is what."""

from functools import lru_cache
from typing import NamedTuple

from gpu_mixmatch.types import AugmentPolicy, Chain, Cut, OpName


class Columns(NamedTuple):
    """The columns of `ChainParams.chain` of one policy; a part that is not drawn has none.

    Attributes:
        cut: Height, width, top and left of the cut.
        slots: An entry per slot.
        cutout: Centre, down and across, and side.
    """

    cut: slice
    slots: slice
    cutout: slice

    @property
    def total(self) -> int:
        """How many there are."""
        return int(self.cutout.stop)


def columns(cut: Cut | None, chain: Chain | None) -> Columns:
    """Return the columns of what is drawn for a cut and a chain."""
    of_cut = 4 if cut else 0
    of_slots = of_cut + (slots_of(chain) if chain else 0)
    stop = of_slots + (3 if chain and chain.cutout else 0)
    return Columns(slice(0, of_cut), slice(of_cut, of_slots), slice(of_slots, stop))


def num_columns(policy: AugmentPolicy | None) -> int | None:
    """Count the columns that are drawn for a policy; None where it draws `AugmentParams`."""
    if policy is None or (policy.cut is None and policy.chain is None):
        return None
    return columns(policy.cut, policy.chain).total


def slots_of(chain: Chain) -> int:
    """Return the number of slots, that of a grayscale included."""
    return (len(chain.ops) if chain.shuffled else chain.num_slots) + (chain.gray > 0)


@lru_cache(maxsize=64)
def entries(chain: Chain) -> tuple[tuple[OpName, float], ...]:
    """List what a slot may hold, operation and magnitude: a drawn entry is a place in this list.

    The first is an empty slot. Each operation has a run of them, one per magnitude. A grayscale,
    where the chain has one, is the last.
    """
    found: list[tuple[OpName, float]] = [("identity", 0.0)]
    found += [(op.name, magnitude) for op in chain.ops for magnitude in op.magnitudes]
    if chain.gray > 0:
        found.append(("color", 0.0))
    return tuple(found)


@lru_cache(maxsize=64)
def runs(chain: Chain) -> tuple[tuple[int, int], ...]:
    """Return the first entry and the number of entries of each operation."""
    found, first = [], 1
    for op in chain.ops:
        found.append((first, len(op.magnitudes)))
        first += len(op.magnitudes)
    return tuple(found)
