"""Weak and strong views of a batch: by one engine in one pass where it can be, else by two."""

from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from gpu_mixmatch.augment.base import complete
from gpu_mixmatch.augment.keyed import KeyedAugment
from gpu_mixmatch.types import DrawPlan

Ids = Tensor | int
_STRONG_SEED = 0x5DEECE66D  # of a strong engine that draws by the seed of a call


class WeakAndStrong(NamedTuple):
    """Two engines, and how many views of what they make.

    Rows are x, then the strong views of u, view-major, then its weak view. In the draws x is view
    0, the strong ones are views 1 .. S and the weak one is view S + 1, whoever makes them.

    Attributes:
        weak: An engine.
        strong: Another, or the same.
        num_strong: S.
        strong_x: Whether x is augmented strongly too.
    """

    weak: Any
    strong: Any
    num_strong: int
    strong_x: bool = False

    @property
    def joint(self) -> KeyedAugment | None:
        """The engine that makes all views: the strong one, if it is the weak one with a chain."""
        weak, strong = self.weak, self.strong
        if not builds_by_policy(weak) or not builds_by_policy(strong):
            return None
        if weak is strong:
            return strong
        alike = (
            weak.geometry == strong.geometry._replace(chain=None)
            and weak.policy == strong.policy._replace(chain=None)
            and (weak.mean, weak.std, weak.dtype) == (strong.mean, strong.std, strong.dtype)
            and weak.channels_last == strong.channels_last
            and (weak.layout, weak.impl) == (strong.layout, strong.impl)
        )
        return strong if alike else None

    @property
    def plan(self) -> DrawPlan:
        """What a builder draws for all views: nothing where two engines make them."""
        joint, num_views = self.joint, self.num_strong + 1
        if joint is None:
            return DrawPlan(num_views, None, mix="none")
        is_weak = joint is not self.weak and not self.strong_x
        weak_views = int(joint is not self.weak)
        return DrawPlan(num_views, joint.policy, mix="none", weak_x=is_weak, weak_views=weak_views)

    def by_two(self, x: Tensor, u: Tensor, ids: tuple[Ids, Ids], seed: int, step: int) -> Tensor:
        """Make the views by each engine, with the draws that it makes on the host.

        Returns:
            All rows, in memory of their own.

        Raises:
            ValueError: If the engines' views are not of one size and dtype.
        """
        last = self.num_strong + 1
        strong_x, strong = _views(
            self.strong, x, u, ids, seed, step, range(1, last), self.strong_x, _STRONG_SEED
        )
        weak_x, weak = _views(self.weak, x, u, ids, seed, step, (last,), not self.strong_x, 0)
        first = strong_x if self.strong_x else weak_x
        assert first is not None
        if strong.shape[1:] != weak.shape[1:] or strong.dtype != weak.dtype:
            raise ValueError(
                "weak and strong must make views of one size and dtype, got "
                f"{list(weak.shape[1:])} {weak.dtype} and {list(strong.shape[1:])} {strong.dtype}"
            )
        return torch.cat((first, strong, weak))


def builds_by_policy(engine: Any) -> TypeGuard[KeyedAugment]:
    """Whether an engine's views are its policy's, and not what a class of the user's makes."""
    if not isinstance(engine, KeyedAugment):
        return False
    kind, plain = type(engine), KeyedAugment
    return (
        kind.build is plain.build
        and kind.apply is plain.apply
        and kind.draw is plain.draw
        and kind.draw_batch is plain.draw_batch
    )


def _views(
    engine: Any,
    x: Tensor,
    u: Tensor,
    ids: tuple[Ids, Ids],
    seed: int,
    step: int,
    views: range | tuple[int, ...],
    with_x: bool,
    other_seed: int,
) -> tuple[Tensor | None, Tensor]:
    """View 0 of x, where it is asked for, and some views of u, by one engine."""
    ids_x, ids_u = ids
    if builds_by_policy(engine):
        of_x = engine.apply(x, engine.draw(seed, step, ids_x, 0)) if with_x else None
        return of_x, engine.apply(u, engine.draw(seed, step, ids_u, tuple(views)))
    whole = complete(engine)
    draws = whole.draw_batch(seed ^ other_seed, step, ids_x, ids_u, len(views))
    rows = whole.build(x, u, draws, len(views))
    return rows[: len(x)], rows[len(x) :]
