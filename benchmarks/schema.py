"""What a file of results must hold: strict JSON, with the machine, the versions and the rows.

The header is made by `gpu_mixmatch._machine.header`. A row is one contender in one case. It is
timed (``median_ms`` and the quartiles ``low_ms`` and ``high_ms``, over ``blocks`` blocks of calls)
or ``skipped`` with a reason, or it holds other numbers alone, such as counts. Rows of what was
trained hold the ``errors`` of the test images, one per seed, in percent; in the suite ``learning``,
whose rows are of several data sets, each row has ``seeds`` of its own.
"""

import datetime
import json
import math
from pathlib import Path
from typing import Any

from gpu_mixmatch._machine import UNKNOWN

SUITES = ("ops", "augment", "strong", "batch", "loader", "scaling")
TRAINED = ("demo", "ablation", "compare")  # in the form of the package's own commands
LEARNING = "learning"  # many short runs
# what is promised, the parts of `make gpu`, what the host takes, what is predicted of kernels
# and what they then took
OTHERS = ("claims", "orders", "gpu", "host", "kernels", "facts", LEARNING)
VERSIONS = ("gpu_mixmatch", "python", "torch", "numpy", "kornia", "dali", "triton", "numba")

_HEADER: dict[str, tuple[type, ...]] = {
    "suite": (str,),
    "command": (str,),
    "date": (str,),
    "commit": (str,),
    "machine": (str,),
    "cpu": (str,),
    "gpu": (str, type(None)),
    "cores": (int,),
    "threads": (list,),
    "quick": (bool,),
    "device": (str,),
    "versions": (dict,),
    "rows": (list,),
}
_TIMES = ("low_ms", "median_ms", "high_ms")


def load(path: Path) -> dict[str, Any]:
    """Read and check a file of results.

    Raises:
        ValueError: If it is no strict JSON, or does not fit the schema; the message says where.
    """
    try:
        content = json.loads(path.read_text(), parse_constant=_refuse)
        check(content)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    return content  # type: ignore[no-any-return]


def dump(content: dict[str, Any], path: Path) -> None:
    """Check results, then write them.

    Raises:
        ValueError: If they do not fit the schema.
    """
    check(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def check(content: Any) -> None:
    """Raise a ValueError that says what is wrong with results, if anything is."""
    if not isinstance(content, dict):
        raise ValueError(f"results must be an object, got {type(content).__name__}")
    _check_header(content)
    _check_numbers(content, "results")
    if not content["rows"]:
        raise ValueError("rows must hold at least one row, got none")
    seen = set()
    for number, row in enumerate(content["rows"]):
        _check_row(row, f"rows[{number}]")
        key = (row["case"], row["contender"], row["threads"])
        if key in seen:
            raise ValueError(f"rows[{number}] must be the only one of {key}, got a second")
        seen.add(key)
    if content["suite"] in (*TRAINED, LEARNING):
        _check_trained(content)


def _check_header(content: dict[str, Any]) -> None:
    for name, kinds in _HEADER.items():
        if name not in content or type(content[name]) not in kinds:
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise ValueError(f"{name} must be {wanted}, got {content.get(name, 'nothing')!r}")
    known = (*SUITES, *TRAINED, *OTHERS)
    if content["suite"] not in known:
        raise ValueError(f"suite must be one of {known}, got {content['suite']!r}")
    try:
        datetime.date.fromisoformat(content["date"])
    except ValueError:
        raise ValueError(f"date must be YYYY-MM-DD, got {content['date']!r}") from None
    for name in VERSIONS:
        version = content["versions"].get(name, "nothing")
        if version == "nothing" or not isinstance(version, str | None):
            raise ValueError(f"versions.{name} must be a string or null, got {version!r}")
    if content["suite"] not in TRAINED:  # of which early files recorded less
        described = {"cpu": content["cpu"], **content["versions"]}
        unknown = [name for name, value in described.items() if value == UNKNOWN]
        if unknown:
            raise ValueError(f"{unknown[0]} must be known where something is timed, got 'unknown'")


def _check_row(row: Any, place: str) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{place} must be an object, got {type(row).__name__}")
    for name, kind in (("case", str), ("contender", str), ("threads", int), ("note", str)):
        if type(row.get(name)) is not kind:
            raise ValueError(f"{place}.{name} must be {kind.__name__}, got {row.get(name)!r}")
    if "skipped" in row:
        if not isinstance(row["skipped"], str) or not row["skipped"]:
            raise ValueError(f"{place}.skipped must be a reason, got {row['skipped']!r}")
        if any(name in row for name in _TIMES):
            raise ValueError(f"{place} must be timed or skipped, got both")
        return
    if not any(name in row for name in _TIMES):
        if all(isinstance(value, str) for key, value in row.items() if key != "threads"):
            raise ValueError(f"{place} must hold a time, another number or skipped, got {row}")
        return
    low, median, high = (row.get(name) for name in _TIMES)
    if not all(isinstance(value, int | float) for value in (low, median, high)):
        raise ValueError(f"{place} must have {_TIMES}, got {low!r}, {median!r}, {high!r}")
    if not 0 < low <= median <= high:
        raise ValueError(
            f"{place} must have 0 < low_ms <= median_ms <= high_ms, got {low}, {median}, {high}"
        )
    if not isinstance(row.get("blocks"), int) or row["blocks"] < 1:
        raise ValueError(f"{place}.blocks must be at least 1, got {row.get('blocks')!r}")


def _check_trained(content: dict[str, Any]) -> None:
    for name, kind in (("config", dict), ("seeds", list)):
        if not isinstance(content.get(name), kind) or (kind is list and not content[name]):
            raise ValueError(f"{name} must be {kind.__name__}, got {content.get(name)!r}")
    for number, row in enumerate(content["rows"]):
        missing = {"key", "mean", "deviation", "paper"} - row.keys()
        if missing:
            raise ValueError(f"rows[{number}] must have {sorted(missing)}, got {row}")
        errors = row.get("errors")
        seeds = row.get("seeds", content["seeds"])
        if not isinstance(errors, list) or len(errors) != len(seeds):
            raise ValueError(f"rows[{number}].errors must have one error per seed, got {errors!r}")
        if not all(isinstance(error, int | float) and 0 <= error <= 100 for error in errors):
            raise ValueError(f"rows[{number}].errors must be percentages, got {errors}")


def _check_numbers(value: Any, place: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place} must be finite, got {value}")
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, item in items:
        _check_numbers(item, f"{place}[{key!r}]")


def _refuse(name: str) -> None:
    raise ValueError(f"numbers must be finite, got {name}")
