"""Results as Markdown tables, a function per suite."""

from collections.abc import Callable, Iterable
from statistics import fmean
from typing import Any

from benchmarks.common import Row
from gpu_mixmatch._machine import UNKNOWN

Content = dict[str, Any]
Tables = list[tuple[str, str]]  # titles and Markdown
SWEEP_TITLES = {
    "batch": "batch size",
    "size": "image size",
    "num_views": "views per image",
    "classes": "classes",
}
BOUNDS = ("copy_", "ideal loader")  # what no contender can pass


def machine_name(content: Content) -> str:
    """The GPU, or else the CPU."""
    name = content["gpu"] or content["cpu"]
    return "CPU" if name == UNKNOWN else str(name)


def place(content: Content) -> str:
    """Where results were made: the machine and its cores."""
    return f"{machine_name(content)}, {content['cores']} cores"


def pivot(
    rows: list[Row],
    column: Callable[[Row], str],
    cell: Callable[[Row], str],
    label: str,
    best: Callable[[Row], float] | None = None,
) -> str:
    """Rows as a Markdown table: contenders below each other, cases beside each other.

    Args:
        rows: Of one kind.
        column: The heading of a row's column.
        cell: What is shown of a row that was not skipped.
        label: The heading of the contenders.
        best: A row's rank, of which the least is bold; None marks none.
    """
    columns = list(dict.fromkeys(map(column, rows)))
    found = {(row["contender"], column(row)): row for row in rows}
    winners = set()
    for name in columns if best else ():
        ranked = [row for row in rows if column(row) == name and "skipped" not in row]
        ranked = [row for row in ranked if row["contender"] not in BOUNDS]
        if ranked:
            winners.add(id(min(ranked, key=best)))
    lines = ["| " + " | ".join([label, *columns]) + " |", "|---" * (len(columns) + 1) + "|"]
    for contender in dict.fromkeys(row["contender"] for row in rows):
        cells = []
        for name in columns:
            row = found.get((contender, name))
            if row is None:
                cells.append("")
            elif "skipped" in row:
                cells.append("skipped")
            else:
                cells.append(f"**{cell(row)}**" if id(row) in winners else cell(row))
        reasons = {r["skipped"] for r in rows if r["contender"] == contender and "skipped" in r}
        shown = f"{contender} ({'; '.join(sorted(reasons))})" if reasons else contender
        lines.append("| " + " | ".join([shown, *cells]) + " |")
    return "\n".join(lines) + "\n"


def threads(row: Row) -> str:
    """A row's number of CPU threads, in words."""
    return f"{row['threads']} thread" + ("" if row["threads"] == 1 else "s")


def number(value: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _milliseconds(row: Row) -> float:
    return float(row["median_ms"])


def _thousand_views(row: Row) -> str:
    return _rate(row, row["num_rows"])


def _rate(row: Row, count: float) -> str:
    """How many a millisecond: the median and the quartiles."""
    median = number(count / row["median_ms"])
    return f"{median} ({number(count / row['high_ms'])} to {number(count / row['low_ms'])})"


def _column_of(row: Row) -> str:
    return f"{row['size']} px, {row['batch']} + {row['batch']}, {threads(row)}"


def augment_tables(content: Content) -> Tables:
    """A table for each choice of effects; the fastest is bold where others are beside ours."""
    rows = content["rows"]
    tables = []
    for effects in dict.fromkeys(row["effects"] for row in rows):
        chosen = [row for row in rows if row["effects"] == effects]
        compared = any(row["contender"].startswith("ours") for row in chosen)
        best = _milliseconds if compared else None
        table = pivot(chosen, _column_of, _thousand_views, "views", best)
        tables.append((f"Thousand views/s (quartiles): {effects}, normalise", table))
    return tables


def strong_tables(content: Content) -> Tables:
    """A table for each choice of effects, then the goals."""
    rows = [row for row in content["rows"] if "goal" not in row]
    goals = [row for row in content["rows"] if "goal" in row]
    parts = augment_tables(content | {"rows": rows})
    return parts + ([("Goals, on one thread", goals_table(goals))] if goals else [])


def strong_speed(content: Content) -> Tables:
    """README's row: RandAugment at the greatest size and number of threads, medians."""
    rows = [row for row in content["rows"] if row.get("effects") == "RandAugment"]
    most = max(row["threads"] for row in rows)
    size = max(row["size"] for row in rows)
    impl = "triton" if content["gpu"] else "numba"
    names = {
        f"ours, {impl}, reused buffers": f"{impl.capitalize()}, reused buffers",
        "ours, eager": "plain torch",
        "Pillow, image by image": "Pillow",
        "Kornia, one call": "Kornia, one call",
    }
    found = {
        row["contender"]: number(row["num_rows"] / row["median_ms"])
        for row in rows
        if (row["size"], row["threads"]) == (size, most) and "median_ms" in row
    }
    shown = [name for name in names if name in found]
    heading = [f"thousand views/s: RandAugment, {size} px", *(names[name] for name in shown)]
    cells = [f"`{content['command']}`", *(found[name] for name in shown)]
    return [("", markdown(heading, [cells]))]


def batch_tables(content: Content) -> Tables:
    """Rates, page faults, launches, and the share of a training step."""
    rows = content["rows"]
    timed = [row for row in rows if row["case"].startswith("batch")]
    measured = [row for row in timed if "faults_per_batch" in row]
    counted = [row for row in rows if row["case"].startswith("launches")]
    steps = [row for row in rows if row["case"].startswith("training step")]
    faults = [row for row in measured if row["threads"] == content["threads"][0]]
    parts = [
        (
            "Thousand views/s (quartiles), from uint8 in a data set to the mixed batch",
            pivot(timed, _column_of, _thousand_views, "batches", _milliseconds),
        )
    ]
    if faults:
        counts = pivot(faults, _column_of, lambda row: number(row["faults_per_batch"]), "batches")
        parts.append(("Minor page faults per batch", counts))
    return [
        *parts,
        (
            "Launches and copies to the device per batch"
            + ("" if content["gpu"] else ", counted on a fake device"),
            pivot(counted, lambda row: row["case"].split(": ")[-1], _counts, "batches"),
        ),
        (
            f"The builder in a {steps[0]['case']}",
            pivot(
                steps,
                threads,
                lambda row: f"{number(row['median_ms'])} ms ({row['share_percent']:.3g} %)",
                "part",
            ),
        ),
    ]


def _counts(row: Row) -> str:
    waits = row.get("synchronisations", row.get("device_reads"))
    kind = "waits" if "synchronisations" in row else "reads of the device"
    return f"{row['launches']} launches, {row['copies_to_device']} copies, {waits} {kind}"


def loader_tables(content: Content) -> Tables:
    """Images per second by loader."""
    table = pivot(
        content["rows"],
        lambda row: row["case"],
        lambda row: _rate(row, 2e3 * row["batch"]),
        "loader",
        _milliseconds,
    )
    return [("Images/s (quartiles), decoded and augmented", table)]


def scaling_tables(content: Content) -> Tables:
    """A table per sweep: time and memory."""
    rows = content["rows"]
    return [
        (
            f"Milliseconds (and MB) per batch by {title}, {threads(rows[0])}",
            pivot(
                [row for row in rows if row["sweep"] == sweep],
                lambda row: str(row["at"]),
                lambda row: f"{number(row['median_ms'])} ({number(row['peak_mb'])})",
                title,
                _milliseconds,
            ),
        )
        for sweep, title in SWEEP_TITLES.items()
    ]


def orders_tables(content: Content) -> Tables:
    """Orders of guess and training pass below each other, networks beside each other."""
    rows = content["rows"]

    def cell(row: Row) -> str:
        return f"{number(1e3 / row['median_ms'])} ({number(row['peak_mb'])})"

    title = f"Training steps/s (and MB held at once), {threads(rows[0])}"
    return [(title, pivot(rows, lambda row: str(row["case"]), cell, "FixMatch"))]


def ops_tables(content: Content) -> Tables:
    """Operations below each other, implementations beside each other; then the goals."""
    rows = [row for row in content["rows"] if row["threads"] == content["threads"][-1]]
    timed = [row for row in rows if "copy_percent" in row or "skipped" in row]
    names = list(dict.fromkeys(row["contender"] for row in timed))
    turned = [row | {"contender": row["case"], "column": row["contender"]} for row in timed]
    turned.sort(key=lambda row: names.index(row["column"]))
    parts = [
        (
            f"Microseconds (and the rate in % of a copy of as many bytes), {threads(rows[0])}",
            pivot(
                turned,
                lambda row: row["column"],
                lambda row: f"{number(1e3 * row['median_ms'])} ({row['copy_percent']:.3g})",
                "operation",
            ),
        )
    ]
    goals = [row for row in rows if "goal" in row]
    return parts + ([("Goals of the fused path", goals_table(goals))] if goals else [])


def goals_table(rows: list[Row]) -> str:
    """What was measured beside what is wanted."""
    lines = ["| goal | measured | wanted | |", "|---|---|---|---|"]
    for row in rows:
        values = f"{number(row['value'])} | {number(row['goal'])} | {row['note']}"
        lines.append(f"| {row['contender']} | {values} |")
    return "\n".join(lines) + "\n"


def claims_tables(content: Content) -> Tables:
    """What is promised and what was measured."""
    return [("", goals_table([row for row in content["rows"] if "goal" in row]))]


def host_tables(content: Content) -> Tables:
    """What the host takes, cases below each other; where another checkout took turns, both."""
    rows = content["rows"]
    found = {(row["case"], row["contender"]): row for row in rows}
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    heading = ["us on the host", *contenders, *(["share"] if len(contenders) > 1 else [])]
    lines = ["| " + " | ".join(heading) + " |", "|---" * len(heading) + "|"]
    for case in dict.fromkeys(row["case"] for row in rows):
        cells = [number(1e3 * found[case, contender]["median_ms"]) for contender in contenders]
        shares = [
            row["share_percent"] for row in rows if row["case"] == case and "share_percent" in row
        ]
        cells += [f"{share:.0f} %" for share in shares]
        lines.append("| " + " | ".join([case, *cells]) + " |")
    commits = {row["contender"]: row["note"] for row in rows if row["note"]}
    named = "; ".join(f"{contender}: {note}" for contender, note in commits.items())
    lines += ["", f"{named[0].upper()}{named[1:]}."] if named else []
    return [("", "\n".join([*lines, ""]))]


def markdown(heading: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    """Cells as a Markdown table."""
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (heading, *rows)]
    lines.insert(1, "|---" * (lines[0].count("|") - 1) + "|")
    return "\n".join(lines) + "\n"


def kernels_tables(content: Content) -> Tables:
    """What a batch is predicted to take: policies below each other, GPUs beside each other."""
    batches = [row for row in content["rows"] if "launches" in row]
    names = list(dict.fromkeys(row["contender"] for row in batches))
    heading = ["64 + 2 · 64", "launches", "MB (of the least)", "instructions/value", *names]
    rows = []
    for case in dict.fromkeys(row["case"] for row in batches):
        of_case = {row["contender"]: row for row in batches if row["case"] == case}
        shown = of_case.get("H100") or next(
            iter(of_case.values())
        )  # others differ by a few percent
        rows.append(
            [
                f"{shown['regime']}, {shown['effects']}",
                len(shown["launches"]),
                f"{shown['moved'] / 1e6:.0f} ({shown['ratio']:.2f}×)",
                number(shown["instructions"]),
                *(
                    f"{number(row['predicted_us'])} ({row['times_floor']:.1f}×)"
                    for row in (of_case[name] for name in names)
                ),
            ]
        )
    title = "Predicted µs of a batch (and how many times the least bytes at copy speed)"
    return [(title, markdown(heading, rows))]


def kernel_table(content: Content, gpu: str = "H100") -> Tables:
    """What each kernel executes and is predicted to take on one GPU."""
    pipes = ("alu", "imad", "fma", "xu", "convert", "tensor")
    heading = [
        *("kernel", "", "instructions per", "", *pipes, "loads + stores"),
        *("registers × programs", "µs", "binds"),
    ]
    rows = [
        [
            row["contender"],
            f"{row['regime']}, {row['effects']}",
            row["per"],
            number(row["instructions"]),
            *(number(row["pipes"].get(pipe, 0.0)) for pipe in pipes),
            number(row["loads"] + row["stores"]),
            f"{row['registers']} × {row['resident']}",
            number(row["predicted_us"]),
            row["bound"],
        ]
        for row in content["rows"]
        if "kernel" in row and row["gpu"] == gpu
    ]
    return [(f"Per kernel on {gpu}: instructions by pipe, predicted µs", markdown(heading, rows))]


def kernel_goals(content: Content) -> Tables:
    """What was counted beside what is wanted."""
    rows = [
        [row["contender"], number(row["value"]), number(row["goal"]), row["note"]]
        for row in content["rows"]
        if "goal" in row
    ]
    return [("", markdown(["on sm_90", "counted or predicted", "at most", ""], rows))]


def model_table(content: Content) -> Tables:
    """What the predictions take the GPUs to be."""
    gpus = [row for row in content["rows"] if row["case"] == "model"]
    fields = {
        "sms": "multiprocessors",
        "ghz": "GHz",
        "dram": "GB/s of a copy",
        "l2": "GB/s of a copy within the L2",
        "l2_mb": "MB of L2",
        "fp32": "floats a clock",
        "convert": "conversions a clock",
        "fp64": "doubles a clock",
        "tensor": "multiply-adds of halves a clock, HMMA",
        "grouped": "the same, HGMMA and UTCHMMA",
        "l2_latency": "clocks to the L2",
        "dram_latency": "clocks to the DRAM",
    }
    rows = [[shown, *(f"{gpu[field]:,}" for gpu in gpus)] for field, shown in fields.items()]
    return [("", markdown(["", *(gpu["contender"] for gpu in gpus)], rows))]


def trained_tables(content: Content) -> Tables:
    """Test errors by seed, and the paper's own beside them for an ablation."""
    seeds, several = content["seeds"], len(content["seeds"]) > 1
    heading = ["test error in %", *(f"seed {seed}" for seed in seeds)]
    if several:
        heading.append("mean ± sd")
    if content["suite"] == "ablation":
        heading.append("paper")
    lines = ["| " + " | ".join(heading) + " |", "|---" * len(heading) + "|"]
    for row in content["rows"]:
        cells = [row["contender"], *(f"{error:.2f}" for error in row["errors"])]
        if several:
            cells.append(f"{row['mean']:.2f} ± {row['deviation']:.2f}")
        if content["suite"] == "ablation":
            paper = row["paper"]
            cells.append(f"{paper[0]:.2f} / {paper[1]:.2f}" if paper else "")
        lines.append("| " + " | ".join(cells) + " |")
    return [("", "\n".join(lines) + "\n")]


def compare_tables(content: Content) -> Tables:
    """Test errors by seed of each method, what it keeps, and what it takes."""
    seeds = content["seeds"]
    heading = ["test error in %", *(f"seed {seed}" for seed in seeds), "mean ± sd", "kept", "s"]
    rows = [
        [
            row["contender"],
            *(f"{error:.2f}" for error in row["errors"]),
            f"{row['mean']:.2f} ± {row['deviation']:.2f}",
            f"{row['kept']:.2f}" if "kept" in row else "",
            f"{fmean(row['seconds']):.0f}",
        ]
        for row in content["rows"]
    ]
    return [("", markdown(heading, rows))]


def methods_table(contents: dict[str, Content]) -> str:
    """The methods beside each other: what they ask, remember and launch; errors, and the papers'.

    Args:
        contents: Comparisons, by how the headings call their data sets.
    """
    heading = ["method", "augmentation", "state beside seed and step", "kernels", *contents]
    heading.append("paper, CIFAR-10, 250 / 4,000 labels")
    by_key = {
        name: {row["key"]: row for row in content["rows"]} for name, content in contents.items()
    }
    rows = []
    for key in dict.fromkeys(key for rows_of in by_key.values() for key in rows_of):
        found = [rows_of.get(key) for rows_of in by_key.values()]
        row = next(row for row in found if row is not None)
        kernels = " + ".join(map(str, row["kernels"])) if "kernels" in row else ""
        errors = [f"{row['mean']:.2f} ± {row['deviation']:.2f}" if row else "" for row in found]
        asks, state, papers = METHODS.get(key, ("weak", "", ""))
        rows.append([row["contender"], asks, state, kernels, *errors, papers])
    return markdown(heading, rows)


def learning_tables(content: Content) -> Tables:
    """Test errors, contenders below each other and data sets beside each other.

    Where it matters how sure the guesses were, a second table has it beside how many were right.
    """
    rows = content["rows"]
    counts = {row["case"]: len(row["seeds"]) for row in rows}
    seeds = {case: f"{n} seed" + ("" if n == 1 else "s") for case, n in counts.items()}
    table = pivot(
        rows,
        lambda row: f"{row['case']} ({seeds[row['case']]})",
        lambda row: f"{row['mean']:.2f} ± {row['deviation']:.2f}",
        "error in %: mean ± sd",
    )
    parts = [("", table)]
    if content["command"].endswith((" guesses", " collapse")):
        parts.append(("", _guesses_table([row for row in rows if row["confidences"]])))
    return parts


def _guesses_table(rows: list[Row]) -> str:
    """How sure guesses are beside how many are right, at the end of runs."""
    several = len({row["case"] for row in rows}) > 1
    heading = "MixMatch on" if several else "guesses"
    lines = [f"| {heading} | confidence | accuracy | gap |", "|---|---|---|---|"]
    for row in rows:
        confidence = fmean(row["confidences"])
        accuracy = 1 - fmean(row["errors"]) / 100
        cells = f"{confidence:.2f} | {accuracy:.2f} | {confidence - accuracy:+.2f}"
        lines.append(f"| {row['case' if several else 'contender']} | {cells} |")
    return "\n".join(lines) + "\n"


# What a method asks of augmentation, what it remembers, and errors in % that its own paper prints
# (those of MixMatch and UDA, FixMatch's) of CIFAR-10 with a Wide ResNet 28-2; what is not printed
# there is left out.
METHODS = {
    "mixmatch": ("weak, K views", "", "11.05 / 6.42"),
    "remixmatch": ("weak, and strong views of x and u", "mean guesses of 128 steps", "5.44 / 4.72"),
    "fixmatch": ("weak and strong", "", "5.07 / 4.26"),
    "uda": ("weak and strong", "", "8.82 / 4.88"),
    "flexmatch": ("weak and strong", "a class per unlabelled image", "4.98 / 4.19"),
    "freematch": ("weak and strong", "2L + 1 averages", "4.88 /"),
    "softmatch": ("weak and strong", "L + 2 averages", ""),
    "mean_teacher": ("weak, twice", "the teacher, yours", ""),
    "pi_model": ("weak, twice", "", ""),
    "ict": ("weak", "the teacher, yours", "/ 7.66"),
}

TABLES: dict[str, Callable[[Content], Tables]] = {
    "augment": augment_tables,
    "strong": strong_tables,
    "batch": batch_tables,
    "loader": loader_tables,
    "scaling": scaling_tables,
    "orders": orders_tables,
    "ops": ops_tables,
    "claims": claims_tables,
    "host": host_tables,
    "kernels": kernels_tables,
    "demo": trained_tables,
    "ablation": trained_tables,
    "compare": compare_tables,
    "learning": learning_tables,
}
