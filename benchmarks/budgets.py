"""What is wanted of the kernels on sm_90, and what the tests allow them.

A goal is set by hand. A budget is what was counted and a little more: ``python -m
benchmarks.kernels --budgets`` writes all of them to ``budgets.json``, where a change of the kernels
shows as a change of numbers.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import ROOT, Row
from benchmarks.costs import OVERHEAD_US
from benchmarks.launches import NUM_AUGMENTATIONS, OPERATIONS

BUDGETS = ROOT / "benchmarks" / "budgets.json"
SLACK = 1.03  # of a budget over what was counted


def kernels_of(rows: Iterable[Row]) -> list[Row]:
    """The rows of kernels among all."""
    return [row for row in rows if "kernel" in row]


def batches_of(rows: Iterable[Row]) -> list[Row]:
    """The rows of batches among all."""
    return [row for row in rows if "launches" in row]


class Goal(NamedTuple):
    """What is wanted of the kernels on sm_90.

    Attributes:
        regime: As text.
        effects: Of the policy.
        quantity: "instructions" per value, "registers", or "us" of a batch, predicted.
        mixes: Whether of the kernel that blends rows; None is of all that make views, together.
        most: That is wanted.
    """

    regime: str
    effects: str
    quantity: str
    mixes: bool | None
    most: float

    def __str__(self) -> str:
        what = {None: "views", True: "views, mixed", False: "views, not mixed"}[self.mixes]
        unit = {
            "instructions": f"{what}, instructions/value",
            "registers": f"{what}, registers",
            "us": "batch on an H100, predicted us",
        }[self.quantity]
        return f"{self.regime}, {self.effects}: {unit}"


_FLOAT, _HALF = "224 px float32 contiguous", "224 px bfloat16 channels_last"
GOALS = (
    Goal("32 px float32 contiguous", "shift", "us", None, 15),
    *(Goal(regime, "shift", "instructions", False, 13) for regime in (_FLOAT, _HALF)),
    *(Goal(regime, "shift", "instructions", True, 24) for regime in (_FLOAT, _HALF)),
    *(Goal(regime, "shift", "registers", None, 96) for regime in (_FLOAT, _HALF)),
    *(Goal(regime, "zoom", "instructions", None, 40) for regime in (_FLOAT, _HALF)),
    Goal(_FLOAT, "zoom and blur", "instructions", None, 140),
    Goal(_HALF, "zoom and blur", "instructions", None, 45),
    Goal(_FLOAT, "zoom and blur", "us", None, 300),
    Goal(_HALF, "zoom and blur", "us", None, 150),
    Goal("32 px float32 contiguous", OPERATIONS, "us", None, 30),
    Goal(_HALF, OPERATIONS, "us", None, 170),
    Goal(_HALF, OPERATIONS, "instructions", None, 34),
    Goal(_HALF, OPERATIONS, "registers", None, 96),
)


def goal_rows(rows: list[Row]) -> list[Row]:
    """What was counted beside what is wanted; nothing where sm_90 is not among the rows."""
    found = []
    for goal in GOALS:
        of_regime = [
            row
            for row in rows
            if row.get("arch") == 90
            and "regime" in row
            and (row["regime"], row["effects"]) == (goal.regime, goal.effects)
        ]
        views = [
            row
            for row in kernels_of(of_regime)
            if row["makes_views"] and goal.mixes in (None, row["mixes"])
        ]
        if not views:
            continue
        if goal.quantity == "us":
            (value,) = (row["predicted_us"] for row in batches_of(of_regime))
        elif goal.quantity == "registers":
            value = max(row["registers"] for row in views)
        else:
            value = rounded(sum(row["instructions"] for row in views))
        found.append(
            {
                "case": "goals",
                "contender": str(goal),
                "threads": 1,
                "note": "met" if value <= goal.most else "not met",
                "value": value,
                "goal": goal.most,
            }
        )
    return found


def mixing_rows(rows: list[Row]) -> list[Row]:
    """What MixUp of views with operations is predicted to take, in two ways.

    Views are written and read back in pairs, which is what is done; or those of u are written for
    the guess, events and all, and then all rows and their partners made anew. For the second the
    least is taken: twice what keeps `chain_kernel` busy, and not a byte more to read. Events of all
    rows are part of both and left out.
    """
    found = []
    share_of_u = NUM_AUGMENTATIONS / (1 + NUM_AUGMENTATIONS)
    kernels = [row for row in kernels_of(rows) if row["effects"] == OPERATIONS]
    for regime, gpu in dict.fromkeys((row["regime"], row["gpu"]) for row in kernels):
        of_batch = [row for row in kernels if (row["regime"], row["gpu"]) == (regime, gpu)]
        chain, mixup = (
            next(row for row in of_batch if row["kernel"] == name)
            for name in ("chain_kernel", "mixup_kernel")
        )
        anew = OVERHEAD_US + max(
            us * (1 if part in ("L2", "DRAM") else 2) for part, us in chain["us_of"].items()
        )
        for row in of_batch:
            if row["kernel"] in ("event_kernel", "chain_kernel"):
                anew += OVERHEAD_US + share_of_u * max(row["us_of"].values())
        found.append(
            {
                "case": f"mixing: {regime}, {OPERATIONS}",
                "contender": gpu,
                "threads": 1,
                "note": "views written, then mixed; or made anew in pairs",
                "read_back_us": rounded(chain["predicted_us"] + mixup["predicted_us"]),
                "anew_us": rounded(anew),
            }
        )
    return found


def budgets(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """What the tests allow on sm_90: instructions per value, or per warp, by case and kernel."""
    found: dict[str, dict[str, float]] = {}
    for row in kernels_of(rows):
        if row["arch"] == 90:
            most = SLACK * row["instructions"]
            case = found.setdefault(f"{row['regime']}, {row['effects']}", {})
            case[row["contender"]] = math.ceil(most) if most > 200 else math.ceil(10 * most) / 10
    return found


def write_budgets(content: dict[str, Any], path: Path = BUDGETS) -> None:
    """Write what the tests allow from results."""
    text = json.dumps(
        {"triton": content["versions"]["triton"], "most": budgets(content["rows"])}, indent=1
    )
    path.write_text(text + "\n")


def rounded(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")
