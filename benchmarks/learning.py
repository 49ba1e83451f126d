"""Train many short runs, and show what follows for the defaults and for those who train.

``python -m benchmarks.learning PART...`` trains the runs of some parts, or of all:

- ``choice``: λ_U and its ramp for short runs, with fresh seeds, and judged on images held out of
  the training part; the test images of the published tables have no say.
- ``goal``: the defaults beside YU1ut's semantics, on the test images.
- ``gap``: the differences between the two, switched one at a time.
- ``guesses``: how sure the guesses are beside how many are right, where MixMatch wins and loses.
- ``remedies``: what to do on the photograph tiles, where it loses.
- ``collapse``: a run whose λ_U is too strong for its length.
- ``strong``: strong views beside weak ones, on the test images; no default follows from it.
- ``orders``: FixMatch's guesses in the training pass or before it, on the test images.

Each run is a line in ``--runs`` once it has ended, and is not trained again: a killed command goes
on where it was, and two at once share the work. ``--fashion`` is the folder of Fashion-MNIST's
IDX files. Results go to ``PART-learning--MACHINE.json``.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks import schema, tiles
from benchmarks.common import RESULTS, ROOT, Row, commit
from gpu_mixmatch import _machine
from gpu_mixmatch.data.datasets import FolderData, ImageData, load_dataset
from gpu_mixmatch.recipes.train import TrainConfig, TrainRun
from gpu_mixmatch.sampling import epoch_order

WATCHED = 50  # last steps of a run, whose guesses are looked at
SELECTION_SEEDS = (10, 11, 12)
TEST_SEEDS = (0, 1, 2, 3, 4)

Data = ImageData | FolderData


@dataclass(frozen=True)
class Case:
    """A data set and the length of the runs on it.

    Attributes:
        title: As tables show it.
        dataset: The name that `TrainConfig` has for its augmentation and preset.
        labels: Number of labels.
        steps: Length of a run.
        held: Training images that are held out to choose on.
        size: Pixels that the images of a folder are brought to.
    """

    title: str
    dataset: str
    labels: int
    steps: int
    held: int
    size: int = 32


@dataclass(frozen=True)
class Contender:
    """A way to train.

    Attributes:
        key: Short name.
        label: As tables show it.
        settings: Fields of `TrainConfig` that differ from its defaults, and of `Semantics`;
            "ramp" is the share of the run that the ramp takes.
    """

    key: str
    label: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Semantics:
    """What another port does and no option of `TrainConfig` has.

    Attributes:
        average_statistics: Average BatchNorm's running statistics like the weights.
        decay: What the decay of a step shrinks: "kernels" of convolutions and linear layers, all
            "parameters", or the whole "state", which has the running statistics too.
    """

    average_statistics: bool = False
    decay: str = "kernels"


@dataclass(frozen=True)
class Trial:
    """One run: a case, a contender's settings and a seed, on held-out or on test images."""

    case: str
    on: str
    steps: int
    seed: int
    settings: dict[str, Any]

    @property
    def key(self) -> str:
        """Text that is equal for equal trials alone."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Part:
    """Contenders on some cases: what one file of results holds.

    Attributes:
        cases: Each with its seeds and, if they are not the case's, its steps.
        contenders: Of all cases.
        on: "held" or "test" images.
    """

    cases: dict[str, tuple[Sequence[int], int | None]]
    contenders: Sequence[Contender]
    on: str = "test"

    def trials(self, case: str, contender: Contender) -> list[Trial]:
        """The runs of a row, one per seed."""
        seeds, steps = self.cases[case]
        length = CASES[case].steps if steps is None else steps
        return [Trial(case, self.on, length, seed, contender.settings) for seed in seeds]

    def all_trials(self) -> list[Trial]:
        """The runs of all rows, those of one data set and seed together."""
        rows = [self.trials(case, who) for case in self.cases for who in self.contenders]
        places = {case: place for place, case in enumerate(self.cases)}
        return sorted(
            (trial for row in rows for trial in row),
            key=lambda trial: (places[trial.case], self.cases[trial.case][0].index(trial.seed)),
        )


def pooled(images: Tensor) -> Tensor:
    """Images of half the height and width: means of 2 x 2 pixels, rounded, uint8."""
    count, channels, height, width = images.shape
    blocks = images.view(count, channels, height // 2, 2, width // 2, 2)
    return blocks.float().mean(dim=(3, 5)).round().to(torch.uint8).contiguous()


def at_half_size(data: ImageData) -> ImageData:
    """A data set whose images have half the height and width."""
    return data._replace(
        train_images=pooled(data.train_images), test_images=pooled(data.test_images)
    )


def held_out(data: ImageData, count: int) -> ImageData:
    """A data set whose test part is cut from its training part, and removed there."""
    order = epoch_order(0, 0, len(data.train_labels))
    held, kept = order[:count].sort().values, order[count:].sort().values
    return data._replace(
        train_images=data.train_images[kept].contiguous(),
        train_labels=data.train_labels[kept],
        test_images=data.train_images[held].contiguous(),
        test_labels=data.train_labels[held],
    )


def texture_tiles() -> ImageData:
    """The textures of `benchmarks.tiles` in memory, all with their labels."""
    parts: dict[str, tuple[list[Any], list[int]]] = {"test": ([], []), "train": ([], [])}
    chosen = tiles.shuffled_tiles(tiles.textures(), tiles.MOST_TEXTURE_TILES)
    for label, (_, pieces) in enumerate(chosen):
        count = tiles.PER_CLASS["test"]
        for name, part in (("test", pieces[:count]), ("train", pieces[count:])):
            parts[name][0].extend(part)
            parts[name][1].extend([label] * len(part))
    images = {
        name: torch.from_numpy(np.stack(found))[:, None] for name, (found, _) in parts.items()
    }
    labels = {name: torch.tensor(found) for name, (_, found) in parts.items()}
    return ImageData(
        images["train"].contiguous(),
        labels["train"],
        images["test"].contiguous(),
        labels["test"],
        len(chosen),
        "folder",
    )


def photograph_tiles(folder: Path) -> FolderData:
    """The photograph tiles as the demonstration has them, JPEG files written to a folder."""
    if not folder.exists():
        tiles.write_tiles(folder)
    data = load_dataset("folder", folder, CASES["photographs"].size)
    assert isinstance(data, FolderData)
    return data


def _load(case: str, fashion: str, work: Path) -> Data:
    if case == "photographs":
        return photograph_tiles(work / "tiles")
    if case == "textures":
        return at_half_size(texture_tiles())
    data = load_dataset("digits") if case == "digits" else load_dataset("fashion-mnist", fashion)
    assert isinstance(data, ImageData)
    return at_half_size(data) if case == "fashion-14" else data


CASES = {
    "digits": Case("digits, 8 px, 40 labels", "digits", 40, 800, 300),
    "fashion-28": Case("Fashion-MNIST, 28 px, 100 labels", "fashion-mnist", 100, 1200, 5000),
    "fashion-14": Case("Fashion-MNIST, 14 px, 100 labels", "fashion-mnist", 100, 1200, 5000),
    "textures": Case("texture tiles, 16 px, 28 labels", "folder", 28, 800, 210),
    "photographs": Case("photograph tiles, 16 px, 24 labels", "folder", 24, 800, 0, size=16),
}


def weight(lambda_u: float, ramp: float) -> Contender:
    """λ_U, ramped over a share of the run."""
    span = f"ramp over {ramp:.0%}".replace("%", " %") if ramp else "no ramp"
    label = f"λ_U {lambda_u:g}, {span}"
    return Contender(f"{lambda_u:g}-{ramp:g}", label, {"lambda_u": float(lambda_u), "ramp": ramp})


def in_order(guess: str) -> dict[str, Any]:
    """FixMatch with its guess "first" or in the "loss"."""
    return {"method": "fixmatch", "batch_size": 16, "ratio": 7, "guess": guess}


OURS = Contender("ours", "defaults")
SUPERVISED = Contender("supervised", "supervised only", {"supervised": True})
YU1UT = Contender(
    "yu1ut",
    "YU1ut's semantics",
    {
        "preset": "yu1ut",
        "lambda_u": 75.0,
        "ramp": 1.0,
        "average_statistics": True,
        "decay": "state",
    },
)
LONG_AVERAGE = {"ema_decay": 0.999}  # of the paper and of YU1ut, for long runs


class LearningRun(TrainRun):
    """A run with another port's semantics."""

    def __init__(self, config: TrainConfig, data: Data, semantics: Semantics) -> None:
        super().__init__(config, data)
        if semantics.average_statistics:
            average = get_ema_multi_avg_fn(self.config.ema_decay)  # type: ignore[no-untyped-call]
            self.ema = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
        if semantics.decay == "parameters":
            self.kernels = list(self.model.parameters())
        elif semantics.decay == "state":
            state = self.model.state_dict().values()
            self.kernels = [value for value in state if value.is_floating_point()]


def run(trial: Trial, data: Data) -> dict[str, Any]:
    """Train, and return the error on the images to judge by, in percent, and the confidence.

    The confidence is that of the guesses of the last steps before sharpening: the mean of their
    largest probability, None without guesses.
    """
    case, settings = CASES[trial.case], dict(trial.settings)
    names = {each.name for each in fields(Semantics)}
    semantics = Semantics(**{name: settings.pop(name) for name in names & settings.keys()})
    if "ramp" in settings:
        settings["rampup_steps"] = round(settings.pop("ramp") * trial.steps)
    config = TrainConfig(
        dataset=case.dataset, labels=case.labels, steps=trial.steps, seed=trial.seed, **settings
    )
    if trial.on == "held":
        assert isinstance(data, ImageData)
        data = held_out(data, case.held)
    training = LearningRun(config, data, semantics)
    watch = training.watch
    for batch in islice(training.loader, trial.steps):
        if watch:
            watch.paused = training.step < trial.steps - WATCHED
        training.train_step(batch)
    quality = watch.read() if watch else None
    return {
        "error": training.test_error(),
        "confidence": None if quality is None else quality.confidence,
    }


class Store:
    """Finished runs, a line each; other processes may append to the same file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, dict[str, Any]]:
        """The runs by the key of their trial."""
        if not self.path.exists():
            return {}
        lines = map(json.loads, self.path.read_text().splitlines())
        return {Trial(**line["trial"]).key: line for line in lines}

    def append(self, trial: Trial, result: dict[str, Any]) -> None:
        """Keep a finished run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"trial": asdict(trial), **result}, allow_nan=False) + "\n")


def train(
    trials: Iterable[Trial], store: Store, fashion: str, tell: Callable[[str], None] = print
) -> None:
    """Train what the store does not have yet."""
    loaded: tuple[str, Data] | None = None
    for trial in trials:
        if trial.key in store.read():
            continue
        if loaded is None or loaded[0] != trial.case:
            loaded = trial.case, _load(trial.case, fashion, store.path.parent)
        result = run(trial, loaded[1])
        store.append(trial, result)
        tell(f"{trial.case}, seed {trial.seed}, {trial.settings}: {result['error']:.2f} %")


def rows(part: Part, store: Store) -> list[Row]:
    """A row per case and contender, of finished runs.

    Raises:
        KeyError: If a run has not ended yet.
    """
    finished = store.read()
    found = []
    for case in part.cases:
        for contender in part.contenders:
            results = [finished[trial.key] for trial in part.trials(case, contender)]
            errors = [result["error"] for result in results]
            confidences = [result["confidence"] for result in results]
            trial = part.trials(case, contender)[0]
            length = "" if trial.steps == CASES[case].steps else f", {trial.steps} steps"
            found.append(
                {
                    "case": CASES[case].title + length,
                    "contender": contender.label,
                    "threads": 1,
                    "note": "",
                    "key": contender.key,
                    "settings": contender.settings,
                    "steps": trial.steps,
                    "on": part.on,
                    "seeds": list(part.cases[case][0]),
                    "errors": errors,
                    "mean": round(statistics.fmean(errors), 3),
                    "deviation": round(statistics.stdev(errors), 3) if len(errors) > 1 else 0.0,
                    "confidences": None if None in confidences else confidences,
                    "paper": None,
                }
            )
    return found


def _seeded(seeds: Sequence[int], *cases: str) -> dict[str, tuple[Sequence[int], int | None]]:
    return dict.fromkeys(cases, (seeds, None))


PARTS: dict[str, tuple[Part, ...]] = {
    "choice": tuple(
        Part(cases, [weight(*each) for each in candidates], on="held")
        for cases, candidates in (
            (
                {
                    "digits": (range(10, 18), None),
                    "textures": (SELECTION_SEEDS[:1], None),
                    "fashion-14": (SELECTION_SEEDS[:2], None),
                },
                ((75, 0.5), (75, 1.0), (50, 0.5), (25, 0.25), (25, 0.5), (25, 1.0), (10, 0.5)),
            ),
            (
                {"digits": (SELECTION_SEEDS, 200), "fashion-28": (SELECTION_SEEDS[:2], None)},
                ((75, 0.5), (25, 0.5)),
            ),
        )
    ),
    "goal": (
        Part(_seeded(TEST_SEEDS, "digits"), (weight(75, 0.5),)),
        Part(_seeded(TEST_SEEDS, "digits", "fashion-28"), (OURS, YU1UT)),
    ),
    "gap": (
        Part(
            _seeded(TEST_SEEDS, "fashion-14"),
            (
                OURS,
                Contender("statistics", "averaged statistics", {"average_statistics": True}),
                Contender("decay", "decay of all parameters", {"decay": "parameters"}),
                Contender("state", "decay of parameters and statistics", {"decay": "state"}),
                Contender("lam", "λ per batch", {"builder": {"lam": "batch"}}),
                Contender(
                    "passes",
                    "separate, interleaved passes that all move statistics",
                    {"preset": "yu1ut", "builder": {"lam": "sample"}},
                ),
                YU1UT,
                Contender("ema", "averages of decay 0.999", LONG_AVERAGE),
            ),
        ),
    ),
    "guesses": (
        Part(
            _seeded(TEST_SEEDS[:3], "digits", "textures", "fashion-28", "photographs"),
            (SUPERVISED, OURS),
        ),
    ),
    "remedies": (
        Part(
            _seeded(TEST_SEEDS[:3], "photographs"),
            (
                SUPERVISED,
                OURS,
                Contender("lambda_u-5", "λ_U 5", {"lambda_u": 5.0}),
                Contender("separate", 'mix="separate"', {"builder": {"mix": "separate"}}),
            ),
        ),
    ),
    "collapse": (
        Part(
            {"digits": (TEST_SEEDS[:3], 111)},
            (
                weight(25, 0.5),
                weight(75, 0.9),
                weight(75, 0.0),
                weight(300, 0.0),
                Contender(
                    "eval",
                    'λ_U 75, ramp over 90 %, guess_bn="eval"',
                    {"lambda_u": 75.0, "ramp": 0.9, "builder": {"guess_bn": "eval"}},
                ),
            ),
        ),
    ),
    "strong": (
        Part(
            {"digits": (TEST_SEEDS[:3], None), "fashion-28": (TEST_SEEDS[:3], 600)},
            (
                Contender("supervised", "supervised only, weak views", SUPERVISED.settings),
                Contender(
                    "supervised-strong",
                    "supervised only, strong views",
                    {**SUPERVISED.settings, "augment": "strong"},
                ),
                Contender("weak", "MixMatch, weak views"),
                Contender("strong", "MixMatch, strong views", {"augment": "strong"}),
            ),
        ),
    ),
    "orders": (
        Part(
            {"fashion-28": (TEST_SEEDS[:3], 600)},
            (
                Contender(
                    "supervised", "supervised only", {"batch_size": 16, **SUPERVISED.settings}
                ),
                Contender("loss", "FixMatch, guess in the loss, one pass", in_order("loss")),
                Contender("first", "FixMatch, guess first", in_order("first")),
            ),
        ),
    ),
}
# Images of a step where they are not 64 + 64: labelled, and unlabelled per labelled one
BATCHES = {"orders": {"batch_size": 16, "ratio": 7}}


def main() -> None:
    """Train the parts that the command line names, and write their results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--fashion", default="/usr/share/datasets/fashion-mnist", metavar="FOLDER")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "learning" / "runs.jsonl")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    store = Store(arguments.runs)
    for name in arguments.parts or PARTS:
        trials = (trial for part in PARTS[name] for trial in part.all_trials())
        train(trials, store, arguments.fashion)
        found = [row for part in PARTS[name] for row in rows(part, store)]
        path = write(name, found, arguments.out)
        print(f"wrote {path}")


def write(name: str, found: list[Row], folder: Path) -> Path:
    """Write the results of a part."""
    described = _machine.header(
        "learning",
        f"python -m benchmarks.learning {name}",
        torch.device("cpu"),
        [1],
        commit=commit(),
    )
    config = {"model": "cnn", "batch_size": 64, "preset": "fast", **BATCHES.get(name, {})}
    seeds = sorted({seed for row in found for seed in row["seeds"]})
    content = described | {"config": config, "seeds": seeds, "rows": found}
    path = folder / f"{name}-learning--{described['machine']}.json"
    schema.dump(content, path)
    return path


if __name__ == "__main__":
    main()
