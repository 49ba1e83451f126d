"""The preview shows the builder's next batch, legibly, and leaves no trace of having looked."""

import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from torch import Tensor, nn

from gpu_mixmatch import ColorJitter, DaliAugment, MixMatch, RandAugment, WeakAugment, presets
from gpu_mixmatch.data.datasets import load_dataset
from gpu_mixmatch.data.formats.common import ImageData
from gpu_mixmatch.insight.canvas import DPI, IMAGE_SIDE, MARGIN, TO_HEADS, TO_ROWS
from gpu_mixmatch.insight.captions import caption
from gpu_mixmatch.insight.preview import draw_preview
from gpu_mixmatch.recipes.choices import make_augment
from gpu_mixmatch.recipes.dataset_preview import CLASS_NAMES, preview_dataset
from gpu_mixmatch.recipes.models import SmallCNN
from tests.factories import ConstantNet, random_images
from tests.image_files import CLASSES, write_folder

ROOT = Path(__file__).parents[1]
LONG_NAMES = [f"{number} incomprehensibilities" for number in range(12)]


def images(count: int, channels: int = 1, side: int = 8) -> Tensor:
    return random_images(count, (channels, side, side), seed=count)


def network(num_classes: int = 10, channels: int = 1) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        model = SmallCNN(num_classes, in_channels=channels, filters=4)
        with torch.no_grad():
            model.dense.weight.mul_(20)  # an untrained guess is nearly uniform
    return model


def builder(num_classes: int = 10, augment: Any = None, **options: Any) -> MixMatch:
    return MixMatch(augment or WeakAugment(padding=2), num_classes, seed=5, **options)


def draw(mixmatch: MixMatch, path: Path, model: nn.Module | None = None, **options: Any) -> Path:
    options = {"rows": 1, **options}
    y = torch.arange(6) % mixmatch.num_classes
    return draw_preview(
        mixmatch, images(6), y, images(9), model or network(mixmatch.num_classes), path, **options
    )


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Networks this small are faster so, above all beside other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_args, **_options: saved.append(self))
    return saved


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


def tick_names(figure: Figure) -> list[list[str]]:
    """Labels of every vertical axis that has some."""
    labels = [[tick.get_text() for tick in axes.get_yticklabels()] for axes in figure.axes]
    return [names for names in labels if names]


def pictures(figure: Figure) -> list[np.ndarray]:
    return [np.asarray(image.get_array()) for axes in figure.axes for image in axes.images]


def bars(figure: Figure, num_classes: int) -> list[np.ndarray]:
    """Lengths of the bars of each chart, those of a stack added up."""
    charts = []
    for axes in figure.axes:
        lengths = [patch.get_width() for patch in axes.patches]
        lengths += [
            np.ptp(line[:, 0]) for lines in axes.collections for line in lines.get_segments()
        ]
        if lengths:
            charts.append(np.reshape(lengths, (-1, num_classes)).sum(axis=0))
    return charts


@pytest.mark.parametrize(
    ("views", "channels", "side"), [(1, 1, 8), (2, 3, 32), (3, 1, 28), (2, 3, 96), (3, 3, 17)]
)
def test_a_picture_of_any_size_and_number_of_views_shows_the_first_unlabelled_image(
    tmp_path: Path, views: int, channels: int, side: int
) -> None:
    u = images(7, channels, side)
    path = draw_preview(
        builder(num_augmentations=views),
        images(5, channels, side),
        torch.arange(5),
        u,
        network(channels=channels),
        tmp_path / "new" / "folder" / "preview.png",
        rows=2,
    )
    pixels = imread(path)
    height, width = pixels.shape[:2]
    assert 1000 <= width <= 1600
    assert height >= 800
    top, left = 1.25 + TO_HEADS + TO_ROWS, MARGIN
    centres = (np.arange(side) + 0.5) * IMAGE_SIDE / side
    rows, columns = ((DPI * (start + centres)).astype(int) for start in (top, left))
    expected = u[0].permute(1, 2, 0).expand(-1, -1, 3).numpy() / 255
    # a picture may begin a pixel higher: its corner is rounded
    shown = np.stack([pixels[rows[:, None] - shift, columns, :3] for shift in (0, 1)])
    errors = np.abs(shown - expected).max(axis=3).min(axis=0)
    assert (errors < 0.005).mean() > 0.95
    assert np.all(pixels[[0, -1]] == 1)
    assert np.all(pixels[:, [0, -1]] == 1)


@pytest.mark.parametrize(
    ("rows", "mix", "num_classes"),
    [(1, "all", 10), (3, "separate", 7), (2, "none", 13), (50, "labelled", 10)],
)
def test_what_is_drawn_are_the_rows_of_the_builders_next_batch(
    tmp_path: Path, figures: list[Figure], rows: int, mix: Any, num_classes: int
) -> None:
    mixmatch = builder(num_classes, mix=mix)
    draw(mixmatch, tmp_path / "preview.png", rows=rows)
    batch = mixmatch(images(6), torch.arange(6), images(9), network(num_classes))
    shown = [int(match[1]) for text in texts(figures[0])
             if (match := re.match(r"row (\d+) of the batch, in [XU]'", text))]  # fmt: skip
    assert len(shown) == len(set(shown)) == min(rows, len(batch.inputs))
    *_, mixed = (pictures(figures[0])[-3 * len(shown) + start :: 3] for start in range(3))
    charts = bars(figures[0], num_classes)[-len(shown) :]
    for row, picture, chart in zip(shown, mixed, charts, strict=True):
        expected = (batch.inputs[row] * 0.5 + 0.5).permute(1, 2, 0).expand(-1, -1, 3)
        np.testing.assert_allclose(picture, expected.numpy(), atol=1e-5)
        np.testing.assert_allclose(chart, batch.targets[row].numpy(), atol=1e-5)
    factors = [float(text[2:]) for text in texts(figures[0]) if text.startswith("× ")]
    lam = batch.params.lam[shown].numpy()
    np.testing.assert_allclose(factors[0::2], lam, atol=0.0051)
    np.testing.assert_allclose(factors[1::2], 1 - lam, atol=0.0051)


def test_pairs_show_the_row_and_its_partner_before_mixing(
    tmp_path: Path, figures: list[Figure]
) -> None:
    augment = WeakAugment(padding=2, mean=0.3, std=0.2)
    mixmatch = builder(augment=augment)
    draw(mixmatch, tmp_path / "preview.png", rows=4)
    x, u = images(6), images(9)
    whole = augment.build(x, u, augment.draw_batch(5, 0, 6, 9, 2), 2)
    index = mixmatch(x, torch.arange(6), u, network()).params.index
    shown = [int(match[1]) for text in texts(figures[0])
             if (match := re.match(r"row (\d+) of the batch", text))]  # fmt: skip
    trios = pictures(figures[0])[-3 * len(shown) :]
    for number, row in enumerate(shown):
        for picture, source in zip(trios[3 * number :], (row, int(index[row])), strict=False):
            expected = (whole[source, 0] * 0.2 + 0.3).clamp(0, 1).numpy()
            np.testing.assert_allclose(picture[..., 0], expected, atol=1e-5)


def test_guess_bars_are_the_mean_of_softmaxes_and_its_sharpened_form(
    tmp_path: Path, figures: list[Figure]
) -> None:
    augment, model = WeakAugment(padding=2), network()
    draw(builder(temperature=0.25), tmp_path / "preview.png", model, rows=3)
    whole = augment.build(images(6), images(9), augment.draw_batch(5, 0, 6, 9, 2), 2)
    with torch.no_grad():
        logits = model(whole[6:]).double().numpy().reshape(2, 9, 10)  # batch statistics, as asked
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    mean = (odds / odds.sum(axis=-1, keepdims=True)).mean(axis=0)
    sharp = mean**4 / (mean**4).sum(axis=-1, keepdims=True)
    charts = bars(figures[0], 10)
    for number in range(3):
        np.testing.assert_allclose(charts[2 * number], mean[number], atol=1e-5)
        np.testing.assert_allclose(charts[2 * number + 1], sharp[number], atol=1e-5)
    assert f"largest: {mean[0].argmax()} ({mean[0].max():.2f})" in texts(figures[0])


def test_views_and_their_captions_are_what_the_engine_draws(
    tmp_path: Path, figures: list[Figure]
) -> None:
    mixmatch = builder(augment=WeakAugment(padding=1, padding_mode="zeros", flip=0.0))
    draw(mixmatch, tmp_path / "preview.png", rows=4)
    shown = pictures(figures[0])
    steps = {"↑": (-1, 0), "↓": (1, 0), "←": (0, -1), "→": (0, 1)}
    captions = [text for text in texts(figures[0]) if "moved" in text]
    assert len(captions) == 8
    for number, words in enumerate(captions):
        down, right = np.sum([steps[arrow] for arrow in re.findall("[↑↓←→]", words)], axis=0) \
            if "not" not in words else (0, 0)  # fmt: skip
        original = np.pad(shown[3 * (number // 2)], ((1, 1), (1, 1), (0, 0)))
        moved = original[1 - down : 9 - down, 1 - right : 9 - right]
        np.testing.assert_allclose(shown[3 * (number // 2) + 1 + number % 2], moved, atol=1e-5)


@pytest.mark.parametrize(
    ("guess_bn", "forward"), [("batch", "joint"), ("update", "separate"), ("eval", "separate")]
)
def test_a_preview_leaves_builder_model_and_generator_as_they_were(
    tmp_path: Path, figures: list[Figure], guess_bn: Any, forward: Any
) -> None:
    model = nn.Sequential(network(), nn.Dropout(0.5))
    mixmatch = builder(guess_bn=guess_bn, guess_forward=forward)
    untouched = builder(guess_bn=guess_bn, guess_forward=forward)
    for other in (mixmatch, untouched):
        other.step.fill_(41)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    draw(mixmatch, tmp_path / "preview.png", model)
    assert int(mixmatch.step) == 41
    assert "seed 5, step 41" in figures[0].texts[1].get_text()
    assert torch.equal(torch.get_rng_state(), generator)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not model._forward_hooks
    batches = []
    for other in (mixmatch, untouched):
        torch.set_rng_state(generator)
        model.load_state_dict(before)
        batches.append(other(images(6), torch.arange(6), images(9), model))
    assert torch.equal(batches[0].inputs, batches[1].inputs)
    assert torch.equal(batches[0].targets, batches[1].targets)


def test_a_preview_with_reused_buffers_spares_the_batch_in_use(
    tmp_path: Path, figures: list[Figure]
) -> None:
    mixmatch = builder(reuse_buffers=True)
    batch = mixmatch(images(6), torch.arange(6), images(9), network())
    inputs = batch.inputs.clone()
    draw(mixmatch, tmp_path / "preview.png")
    assert torch.equal(batch.inputs, inputs)


def wrong_lam(batch: Any) -> Any:
    return batch._replace(params=batch.params._replace(lam=batch.params.lam * 0.99))


def wrong_index(batch: Any) -> Any:
    return batch._replace(params=batch.params._replace(index=batch.params.index.roll(1)))


def wrong_inputs(batch: Any) -> Any:
    inputs = batch.inputs.clone()
    inputs[-1, 0, 3, 3] += 1e-3
    return batch._replace(inputs=inputs)


def wrong_targets(batch: Any) -> Any:
    return batch._replace(targets=batch.targets.roll(1, dims=1))


@pytest.mark.parametrize("tamper", [wrong_lam, wrong_index, wrong_inputs, wrong_targets])
def test_a_batch_that_its_parts_do_not_give_is_not_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tamper: Any
) -> None:
    honest = MixMatch.forward
    monkeypatch.setattr(
        MixMatch, "forward", lambda *args, **options: tamper(honest(*args, **options))
    )
    mixmatch = builder()
    with pytest.raises(RuntimeError, match=r"batch\.(inputs|targets) must be λ'·W"):
        draw(mixmatch, tmp_path / "preview.png")
    assert int(mixmatch.step) == 0
    assert not list(tmp_path.iterdir())


def test_an_engine_that_draws_anew_for_the_same_step_is_found_out(tmp_path: Path) -> None:
    calls = itertools.count()
    with pytest.raises(RuntimeError, match=r"draws something else when it is called again"):
        draw(builder(augment=lambda x: x + next(calls)), tmp_path / "preview.png")


def test_a_guesser_may_return_a_view_of_its_parameter(tmp_path: Path) -> None:
    model = ConstantNet([0.0, 1.0, 2.0])
    del model.logits  # the buffer
    model.logits = nn.Parameter(torch.tensor([0.0, 1.0, 2.0]))
    assert draw(builder(3), tmp_path / "preview.png", model).exists()


def test_a_model_that_returns_nan_is_found_out(tmp_path: Path) -> None:
    model = network()
    with torch.no_grad():
        model.dense.bias[0] = torch.nan
    with pytest.raises(ValueError, match="targets must be finite"):
        draw(builder(), tmp_path / "preview.png", model)


@pytest.mark.parametrize("num_classes", [2, 10, 12])
def test_names_of_few_classes_stand_on_the_axis_of_every_row(
    tmp_path: Path, figures: list[Figure], num_classes: int
) -> None:
    names = [f"kind {number}" for number in range(num_classes)]
    draw(builder(num_classes), tmp_path / "preview.png", class_names=names, rows=3)
    assert tick_names(figures[0]) == [names] * 6
    labels = [text for text in texts(figures[0]) if text.startswith("label: ")]
    assert labels
    assert all(label.removeprefix("label: ") in names for label in labels)


def test_names_of_many_classes_are_left_to_the_text(tmp_path: Path, figures: list[Figure]) -> None:
    draw(builder(100), tmp_path / "preview.png", rows=2)
    assert tick_names(figures[0]) == [["class 0", "class 50", "class 99"]] * 4
    assert sum(bool(re.fullmatch(r"class \d+", text)) for text in texts(figures[0])) == 2 * 2


@pytest.mark.parametrize(
    ("views", "num_classes"), [(1, 2), (2, 12), (3, 100), (4, 12), (5, 12), (6, 100), (8, 12)]
)
def test_texts_meet_neither_each_other_nor_a_picture(
    tmp_path: Path, figures: list[Figure], views: int, num_classes: int
) -> None:
    augment = WeakAugment(padding=2, zoom_px=(1, 2), flip=1.0, blur_sigma=(0.5, 1.0))
    names = LONG_NAMES[:num_classes] if num_classes <= 12 else None
    mixmatch = builder(num_classes, augment, num_augmentations=views, mix="separate")
    draw(mixmatch, tmp_path / "preview.png", class_names=names, rows=2)
    check_that_texts_stand_apart(figures[0])


ALL_OF_IT = WeakAugment(padding=11, size=128, area=(0.1, 1), flip=1.0, blur_sigma=(0.5, 1.0))


@pytest.mark.parametrize("views", [2, 4])
@pytest.mark.parametrize(
    "engine",
    [
        RandAugment.usb(ALL_OF_IT),
        RandAugment(ALL_OF_IT, 5, {"translate_x_rel": [-0.123]}, prob=1.0),
        ColorJitter(ALL_OF_IT, gray=1.0),
    ],
    ids=["usb", "long names", "jitter"],
)
def test_captions_of_strong_views_are_whole_and_stand_apart(
    tmp_path: Path, figures: list[Figure], views: int, engine: Any
) -> None:
    x, u = images(4, 3, 160), images(3, 3, 160)
    mixmatch = builder(12, engine, num_augmentations=views)
    draw_preview(mixmatch, x, torch.arange(4), u, network(12, 3), tmp_path / "a.png", rows=2)
    shown = " ".join(texts(figures[0]))
    assert shown.count("blur") == shown.count("moved") == 2 * views
    assert "…" not in shown
    check_that_texts_stand_apart(figures[0])


def words_of(engine: Any, count: int = 4, size: int = 12, width: int = 99) -> list[str]:
    """Captions of the views of some images, one each."""
    draws = engine.draw(5, 3, count)
    height = engine.apply(images(count, 3, size), draws).shape[2]
    lines = (caption(draws, row, engine, (size, size), (height, height), width)
             for row in range(count))  # fmt: skip
    return [text.replace("\N{NO-BREAK SPACE}", " ") for text in lines]


STILL = WeakAugment(padding=0, flip=0.0)


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        (RandAugment(STILL, 1, {"rotate": [-12.5]}, prob=1.0, cutout=3),
         "rotate −12.5°, cutout 3 px"),
        (RandAugment(STILL, 2, {"hue": [-0.001]}, prob=1.0, cutout=(0.5, 0.5)),
         "hue 0, hue 0, cutout 6 px"),
        (RandAugment(STILL, 2, ["equalize"], prob=1.0, cutout=0), "equalize, equalize"),
        (RandAugment(STILL, prob=0.0, cutout=0), ""),
        (ColorJitter(STILL, 0, 0, 0, 0, gray=1.0), "identity, gray"),
        (RandAugment(WeakAugment(0, flip=1.0, size=12), 1, {"posterize": [3]}, prob=1.0, cutout=0),
         "cut 12 × 12 px, at ↓0 →0, mirrored, posterize 3 bits"),
    ],
)  # fmt: skip
def test_a_caption_says_all_that_was_drawn_in_the_order_of_what_was_done(
    engine: Any, words: str
) -> None:
    assert words_of(engine) == [words] * 4


def test_a_caption_says_where_a_view_was_cut_out() -> None:
    engine = WeakAugment(padding=0, size=6, flip=0.5, mean=0.0, std=1.0)
    x = images(8, 3, 12)
    views = engine.apply(x, engine.draw(5, 3, 8))
    captions = words_of(engine, 8)
    assert len(set(captions)) > 4
    for image, view, words in zip(x, views, captions, strict=True):
        top, left = map(int, re.findall(r"[↓→](\d+)", words))
        wanted = image[:, top : top + 6, left : left + 6] / 255
        wanted = wanted.flip(2) if "mirrored" in words else wanted
        torch.testing.assert_close(view, wanted)


def test_a_narrow_caption_breaks_between_words() -> None:
    draws = RandAugment(STILL, 2, {"translate_x_rel": [-0.2]}, prob=1.0, cutout=0)
    (first, *_) = words_of(draws, width=16)
    assert first.splitlines() == ["translate_x_rel", "−0.2,", "translate_x_rel", "−0.2"]


def check_that_texts_stand_apart(figure: Figure) -> None:
    canvas = FigureCanvasAgg(figure)
    with matplotlib.style.context("default"):
        canvas.draw()
    ticks = [label for axes in figure.axes for label in (*axes.get_yticklabels(),
             *axes.get_xticklabels())]  # fmt: skip
    boxes = [
        (text.get_text(), text.get_window_extent())
        for text in (*figure.texts, *ticks)
        if text.get_text()
    ]
    taken = boxes + [("picture", axes.get_window_extent()) for axes in figure.axes if axes.images]
    for name, box in boxes:
        assert figure.bbox.padded(-10).containsx(box.x0), name
        assert figure.bbox.padded(-10).containsx(box.x1), name
        assert figure.bbox.padded(-10).containsy(box.y0), name
        for other_name, other in taken:
            if box is not other:
                assert not (
                    box.x0 < other.x1 and other.x0 < box.x1
                    and box.y0 + 2 < other.y1 and other.y0 + 2 < box.y1
                ), (name, other_name)  # fmt: skip


def test_an_engine_without_mean_and_std_is_shown_stretched_and_says_so(
    tmp_path: Path, figures: list[Figure]
) -> None:
    draw(builder(augment=lambda x: 7 * x - 3), tmp_path / "preview.png", rows=2)
    assert "contrast stretched" in figures[0].texts[1].get_text()
    for picture in pictures(figures[0]):
        assert picture.min() >= 0
        assert picture.max() <= 1
        assert picture.max() - picture.min() > 0.9


def test_a_view_in_half_precision_passes_the_check(tmp_path: Path, figures: list[Figure]) -> None:
    class Widened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.float())

    augment = WeakAugment(padding=2, dtype=torch.bfloat16, channels_last=True)
    draw(builder(augment=augment), tmp_path / "preview.png", Widened())
    assert len(figures) == 1


def test_the_teacher_guesses_where_there_is_one(tmp_path: Path, figures: list[Figure]) -> None:
    sure = ConstantNet([100.0 * (label == 3) for label in range(10)])
    draw(builder(teacher=sure), tmp_path / "preview.png", rows=1)
    assert "largest: 3 (1.00)" in texts(figures[0])


def test_images_with_channels_last_give_the_same_pictures(
    tmp_path: Path, figures: list[Figure]
) -> None:
    x, u = images(6, 3, 9), images(9, 3, 9)
    for order in ((0, 1, 2, 3), (0, 2, 3, 1)):
        draw_preview(builder(), x.permute(order), torch.arange(6), u.permute(order),
                     network(channels=3), tmp_path / "preview.png", rows=2)  # fmt: skip
    first, second = map(pictures, figures)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_sample_ids_reach_the_draws(tmp_path: Path, figures: list[Figure]) -> None:
    mixmatch = builder()
    draw(mixmatch, tmp_path / "a.png", ids_x=torch.arange(6), ids_u=torch.arange(9))
    draw(mixmatch, tmp_path / "b.png")
    draw(mixmatch, tmp_path / "c.png", ids_x=torch.arange(6) + 70, ids_u=torch.arange(9) + 80)
    first, positions, others = map(pictures, figures)
    assert all(map(np.array_equal, first, positions))
    assert not all(map(np.array_equal, first, others))


def test_names_are_drawn_as_they_are_whatever_signs_they_hold(
    tmp_path: Path, figures: list[Figure]
) -> None:
    names = ["$x", "a$b$", "\\frac", "^", "_", "", "{", "}", "%", "#"]
    draw(builder(), tmp_path / "preview.png", class_names=names, rows=1)
    FigureCanvasAgg(figures[0]).draw()  # in which matplotlib would read mathematics
    assert names in tick_names(figures[0])


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows must be in 1 \.\. 1000, got 0"):
        draw(builder(), tmp_path / "preview.png", rows=0)
    with pytest.raises(ValueError, match="class_names must hold num_classes = 10 names, got 2"):
        draw(builder(), tmp_path / "preview.png", class_names=["a", "b"])


def test_a_missing_matplotlib_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("matplotlib", "matplotlib.style"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ImportError, match=re.escape('a preview needs matplotlib: pip install -e ".[cli]"')
    ):
        draw(builder(), tmp_path / "preview.png")


def test_matplotlib_is_imported_only_to_draw() -> None:
    code = "import sys, gpu_mixmatch.insight.preview as p; print('matplotlib' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.strip() == "False"


def dataset(name: str = "digits", channels: int = 1) -> ImageData:
    labels = torch.arange(60) % 10
    return ImageData(images(60, channels), labels, images(10, channels), torch.arange(10), 10, name)


def test_engines_that_share_draws_show_the_same_views_and_captions(
    tmp_path: Path, figures: list[Figure]
) -> None:
    for weak in (
        WeakAugment(padding=2),
        WeakAugment(padding=1, zoom_px=(0, 2), blur_sigma=(0, 1), mean=0.3, std=0.7),
    ):
        figures.clear()
        for engine in (weak, DaliAugment(weak)):
            draw(builder(augment=engine), tmp_path / "preview.png", rows=4)
        first, second = map(pictures, figures)
        assert len(first) == 24
        for mine, theirs in zip(first, second, strict=True):
            np.testing.assert_allclose(theirs, mine, atol=2e-4)
        captions = [[text for text in texts(figure) if "moved" in text] for figure in figures]
        assert len(captions[0]) == 8
        assert captions[0] == captions[1]


def test_kornia_shows_other_crops_of_the_same_images(tmp_path: Path, figures: list[Figure]) -> None:
    weak = WeakAugment(padding=2)
    for engine in (weak, make_augment("kornia", weak, 8, 8)):
        draw(builder(augment=engine), tmp_path / "preview.png", rows=4)
    first, second = (np.stack(pictures(figure)[:12]).reshape(4, 3, 8, 8, 3) for figure in figures)
    np.testing.assert_array_equal(second[:, 0], first[:, 0])
    assert (np.abs(second[:, 1:] - first[:, 1:]).max(axis=(2, 3, 4)) > 0.1).sum() >= 6
    assert not [text for text in texts(figures[1]) if "moved" in text or "stretched" in text]


def test_heading_names_the_engine(tmp_path: Path, figures: list[Figure]) -> None:
    weak = WeakAugment(padding=2)
    for engine in (weak, DaliAugment(weak), lambda x: x):
        draw(builder(augment=engine), tmp_path / "preview.png")
    for figure, name in zip(
        figures, ("WeakAugment", "DaliAugment", "CallableAugment"), strict=True
    ):
        assert f"views by {name}" in figure.texts[1].get_text()


def test_preview_of_a_folder_names_its_classes(tmp_path: Path, figures: list[Figure]) -> None:
    for part, count in (("labelled", 3), ("unlabelled", 5)):
        write_folder(tmp_path / part, count)
    data = load_dataset("folder", tmp_path, 16)
    preset = presets.paper("cifar10")
    for labels, text in ((None, "9 labelled + 2 × 15 unlabelled"), (3, "3 labelled + 2 × 15")):
        preview_dataset(
            data, tmp_path / "a.png", preset=preset, labels=labels, train_steps=2, rows=1
        )
        assert text in figures[-1].texts[1].get_text()
        assert tick_names(figures[-1])[0] == list(CLASSES)
    preview_dataset(data, tmp_path / "a.png", labels=None, train_steps=2, rows=1)
    assert figures[-1].texts[1].get_text() == figures[0].texts[1].get_text()
    with pytest.raises(ValueError, match="labels must be a number for digits, got None"):
        preview_dataset(dataset(), tmp_path / "a.png", labels=None)


@pytest.mark.parametrize(
    ("name", "channels", "expected"),
    [("digits", 1, "0"), ("fashion-mnist", 1, "T-shirt/top"), ("cifar10", 3, "airplane")],
)
def test_preview_of_a_data_set_names_its_classes(
    tmp_path: Path, figures: list[Figure], name: str, channels: int, expected: str
) -> None:
    out = preview_dataset(
        dataset(name, channels), tmp_path / "preview.png", labels=20, train_steps=2, rows=1
    )
    assert out == tmp_path / "preview.png"
    assert tick_names(figures[0]) == [list(CLASS_NAMES[name])] * 2
    assert tick_names(figures[0])[0][0] == expected
    assert "20 labelled + 2 × 40 unlabelled = 100 rows" in figures[0].texts[1].get_text()


def test_preview_is_a_function_of_its_arguments(tmp_path: Path) -> None:
    options: dict[str, Any] = {"labels": 20, "train_steps": 2, "rows": 1}
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    generator = torch.get_rng_state()
    preview_dataset(dataset(), paths[0], seed=1, **options)
    assert torch.equal(torch.get_rng_state(), generator)
    torch.rand(3)
    preview_dataset(dataset(), paths[1], seed=1, **options)
    preview_dataset(dataset(), paths[2], seed=2, **options)
    assert np.array_equal(imread(paths[0]), imread(paths[1]))
    assert not np.array_equal(imread(paths[0]), imread(paths[2]))


def test_preview_takes_another_preset_engine_and_number_of_views(
    tmp_path: Path, figures: list[Figure]
) -> None:
    preview_dataset(
        dataset("mine"),
        tmp_path / "preview.png",
        preset=presets.usb("digits"),
        augment=lambda x: x.flip(3),
        num_augmentations=3,
        labels=20,
        train_steps=2,
        rows=2,
    )
    assert "20 labelled + 3 × 40 unlabelled = 140 rows   ·   K = 3   ·   T = 0.5   ·   α = 0.5" in (
        figures[0].texts[1].get_text()
    )
    factors = [text for text in texts(figures[0]) if text.startswith("× ")]
    assert len(set(factors[0::2])) == 1  # USB draws one λ for the batch


def test_preview_of_a_data_set_without_a_preset_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dataset must be one of"):
        preview_dataset(dataset("mine"), tmp_path / "preview.png")
