"""Write README's result tables from the JSON under ``benchmarks/results``.

``python -m benchmarks.report`` rewrites what stands between the markers
``<!-- results: NAME -->`` and ``<!-- /results -->``; with ``--check`` it only says whether README
equals the results, and exits with 1 if not.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "0.1.0"
MARKED = re.compile(r"(<!-- results: (?P<name>[\w-]+) -->\n)(.*?)(<!-- /results -->)", re.DOTALL)


def table(content: dict[str, Any]) -> str:
    """A comparison's rows as a Markdown table, with the command and versions below."""
    with_paper = any(row["paper"] for row in content["rows"])
    heading = ["test error in %", *(f"seed {seed}" for seed in content["seeds"])]
    if len(content["seeds"]) > 1:
        heading.append("mean ± sd")
    if with_paper and len(content["rows"]) > 2:
        heading.append("paper")
    lines = ["| " + " | ".join(heading) + " |", "|---" * len(heading) + "|"]
    for row in content["rows"]:
        cells = [row["label"], *(f"{error:.2f}" for error in row["errors"])]
        if len(content["seeds"]) > 1:
            cells.append(f"{row['mean']:.2f} ± {row['deviation']:.2f}")
        if "paper" in heading:
            paper = row["paper"]
            cells.append(f"{paper[0]:.2f} / {paper[1]:.2f}" if paper else "")
        lines.append("| " + " | ".join(cells) + " |")
    config, versions = content["config"], content["versions"]
    lines += [
        "",
        f"`{content['command']}`: {config['labels']} labels, {config['steps']} steps of "
        f"{config['batch_size']} + {config['batch_size']} images, model `{config['model']}`, "
        f"{content['device']}, {content['date']}, torch {versions['torch']}.",
    ]
    return "\n".join(lines) + "\n"


def rendered(readme: str) -> str:
    """README with every marked part written anew."""

    def fill(match: re.Match[str]) -> str:
        files = sorted(RESULTS.glob(f"{match['name']}--*.json"))
        if not files:
            raise FileNotFoundError(f"no results {match['name']}--*.json in {RESULTS}")
        tables = [table(json.loads(file.read_text())) for file in files]
        return match[1] + "\n".join(tables) + match[4]

    return MARKED.sub(fill, readme)


def main() -> None:
    """Rewrite README, or check it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if stale")
    arguments = parser.parse_args()
    path = ROOT / "README.md"
    before = path.read_text()
    after = rendered(before)
    if arguments.check:
        sys.exit(0 if after == before else "README.md is stale: run python -m benchmarks.report")
    path.write_text(after)


if __name__ == "__main__":
    main()
