"""From a run to answers: its model to call, and labels for the images of a folder."""

import csv
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from gpu_mixmatch._validation import as_integer, as_path, came, check_tensor
from gpu_mixmatch.augment import WeakAugment
from gpu_mixmatch.data.collate import collate
from gpu_mixmatch.data.folder import ImageFiles
from gpu_mixmatch.data.images import image_folder
from gpu_mixmatch.recipes.checkpoint import check_weights, read_checkpoint, write_atomically
from gpu_mixmatch.recipes.models import build_model

_DECODERS = 4  # threads; each may hold a whole photograph


class Normalize(nn.Module):
    """Turn images into what a run's model takes, on the device that the run was loaded to.

    Args:
        mean: Of each channel, in [0, 1] units.
        std: Of each channel, in [0, 1] units.
    """

    _device_anchor: Tensor

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.channels = len(mean)
        # where channels are alike the run itself normalised by one number
        shared = len({*zip(mean, std, strict=True)}) == 1
        self.engine = WeakAugment(
            mean=mean[0] if shared else mean,
            std=std[0] if shared else std,
            channels_last=True,
            layout="NCHW",
        )
        self.register_buffer("_device_anchor", torch.empty(0), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalise ``images``.

        Args:
            images: ``[M, C, H, W]`` or ``[M, H, W, C]``, uint8, or floating point in [0, 1], with
                the channels of the run, on any device.

        Returns:
            ``[M, C, H, W]`` float32.

        Raises:
            TypeError: If it is no tensor.
            ValueError: If it is no batch of such images.
        """
        check_tensor("images", images)
        if images.dim() != 4 or self.channels not in (images.shape[1], images.shape[3]):
            raise ValueError(
                f"images must be [M, C, H, W] or [M, H, W, C] with C = {self.channels} like those "
                f"of the run, got {list(images.shape)}"
            )
        images = images.to(self._device_anchor.device)
        nhwc = images.shape[1] != self.channels
        return self.engine.normalize(images.permute(0, 3, 1, 2) if nhwc else images)

    def extra_repr(self) -> str:
        """Show mean and std."""
        return f"mean={self.engine.mean}, std={self.engine.std}"


class LoadedModel(NamedTuple):
    """A run's model and what it takes and says.

    Attributes:
        model: The averaged weights, in eval mode and without gradients; from images
            ``[N, C, H, W]``, normalised, to logits ``[N, L]``.
        classes: Names of the L classes, in the order of the logits.
        normalize: Makes the model's input of a batch of images; see `Normalize`.
        image: C, H and W of the images that it was trained on. It takes others of about this size
            too; `predict` brings files to it as training did: the largest centred square, resized.
        step: Steps that the weights were trained for.
    """

    model: nn.Module
    classes: tuple[str, ...]
    normalize: Normalize
    image: tuple[int, int, int]
    step: int


def load_model(run: str | os.PathLike[str], device: str | torch.device = "cpu") -> LoadedModel:
    """Load the averaged weights of a run of ``gpu-mixmatch train``, finished or under way.

    Args:
        run: The run's folder, or its ``checkpoint.pt``.
        device: Where the model shall be.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        TypeError: If ``run`` is no path.
        ValueError: If ``run`` is damaged, of something else, or of version 0.1, which did not keep
            what this needs; the message names the file.
    """
    path = as_path("run", run).expanduser()
    path = path / "checkpoint.pt" if path.is_dir() else path
    place = _as_device(device)
    state = read_checkpoint(path)
    data, ema = state["data"], state["ema"]
    weights = {
        name.removeprefix("module."): value
        for name, value in ema.items()
        if name.startswith("module.")
    }
    try:
        model = _network(state["config"], data["num_classes"], data["image"][0])
        check_weights("ema", model.state_dict(), weights, type(model).__name__)
        normalize = Normalize(state["normalisation"]["mean"], state["normalisation"]["std"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} must be a checkpoint of gpu-mixmatch train: {error}") from error
    model.to_empty(device=place)
    model.load_state_dict(weights)
    channels, height, width = data["image"]
    return LoadedModel(
        model.eval().requires_grad_(False),
        tuple(data["classes"]),
        normalize.to(place),
        (channels, height, width),
        state["step"],
    )


class Prediction(NamedTuple):
    """What the model says of a file.

    Attributes:
        file: The file's place below the folder, with forward slashes.
        label: Name of the most probable class; None if the file cannot be read.
        confidence: Its probability, in [0, 1]; None if the file cannot be read.
    """

    file: str
    label: str | None
    confidence: float | None


class Predictions:
    """The predictions for a folder, made batch by batch as they are iterated over.

    Its length is the number of files.

    Attributes:
        unreadable: Why each file that cannot be read cannot, of those seen so far.
        left_out: How many entries of the folder are not among the files, by the reason.
    """

    def __init__(
        self, loaded: LoadedModel, images: ImageFiles, folder: Path, batch_size: int
    ) -> None:
        self.loaded = loaded
        self.files = [Path(path).relative_to(folder).as_posix() for path in images.index.paths]
        self.batch_size = batch_size
        self.unreadable: dict[str, str] = {}
        self.left_out = images.index.left_out
        self._images = images

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Prediction]:
        with ThreadPoolExecutor(_DECODERS) as decoders:
            for start in range(0, len(self), self.batch_size):
                numbers = range(start, min(start + self.batch_size, len(self)))
                decoded = list(decoders.map(self._decoded, numbers))
                answers = self._answers([image for image in decoded if image is not None])
                for number, image in zip(numbers, decoded, strict=True):
                    answer = (None, None) if image is None else next(answers)
                    yield Prediction(self.files[number], *answer)

    def _decoded(self, number: int) -> Any:
        try:
            image = self._images[number]
        except (ValueError, OSError) as error:
            self.unreadable[self.files[number]] = str(error)
            return None
        return image.convert("L") if self.loaded.image[0] == 1 else image

    @torch.no_grad()
    def _answers(self, images: list[Any]) -> Iterator[tuple[str, float]]:
        if not images:
            return iter(())
        logits = self.loaded.model(self.loaded.normalize(collate(images)))
        confidences, labels = logits.softmax(dim=1).max(dim=1)
        names = [self.loaded.classes[label] for label in labels.tolist()]
        return zip(names, confidences.tolist(), strict=True)


def predict(
    run: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
) -> Predictions:
    """Label the image files of a folder by a run's averaged weights.

    Files are read as a run on a folder reads them: upright RGB, of which the largest centred square
    is resized to the run's size. For a run on grey images they are made grey.

    Args:
        run: The run's folder, or its ``checkpoint.pt``.
        folder: The folder; images are found at any depth, in the order of `image_folder`.
        batch_size: Images that go through the model at once.
        device: Where the model runs.

    Returns:
        An iterable of `Prediction`: file, label, confidence, one for each file. What cannot be read
        has no label, and its reason in ``unreadable``.

    Raises:
        FileNotFoundError: If ``run`` has no checkpoint.
        ImportError: If Pillow is not installed.
        TypeError: If an argument is of the wrong kind.
        ValueError: If ``run`` is no run that `load_model` takes, or ``folder`` no folder of images.
    """
    batch_size = as_integer("batch_size", batch_size, least=1)
    place = as_path("folder", folder).expanduser()
    images = replace(image_folder(place), labels=None, classes=())
    if len(images) == 0:
        raise ValueError(f"folder must hold at least one image, got none in {place}")
    loaded = load_model(run, device)
    return Predictions(loaded, ImageFiles(images, loaded.image[1]), place, batch_size)


def write_labels(
    predictions: Predictions,
    path: Path,
    progress: Callable[[int], None] | None = None,
) -> Counter[str]:
    """Write predictions as CSV, whole or not at all: ``file,label,confidence``, a row per file.

    Label and confidence are empty for a file that cannot be read.

    Args:
        predictions: What `predict` returns.
        path: The file.
        progress: Called with the number of rows so far.

    Returns:
        The number of files of each label.

    Raises:
        OSError: If it cannot be written; the message names file and disk.
    """
    counts: Counter[str] = Counter()

    def write(file: BinaryIO) -> None:
        # a name that is no UTF-8 keeps its bytes
        text = io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="")
        rows = csv.writer(text)
        rows.writerow(Prediction._fields)
        for number, (name, label, confidence) in enumerate(predictions, 1):
            rows.writerow((name, label, None if confidence is None else f"{confidence:.4f}"))
            if label is not None:
                counts[label] += 1
            if progress:
                progress(number)
        text.detach()  # flushed, and the file left open

    write_atomically(path, write)
    return counts


def _network(config: dict[str, Any], num_classes: int, channels: int) -> nn.Module:
    """Build a run's network without memory for its weights."""
    filters = config.get("filters")
    filters = None if filters is None else as_integer("filters of its config", filters, least=1)
    try:
        with torch.device("meta"):
            return build_model(config.get("model"), num_classes, channels, filters)  # type: ignore[arg-type]
    except RuntimeError as error:  # more weights than can be counted
        raise ValueError(f"filters of its config must be fewer, got {filters}") from error


def _as_device(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be as torch names it, got {came(device)}") from error
