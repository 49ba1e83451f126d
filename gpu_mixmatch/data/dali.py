"""DaliLoader: batches for MixMatch from encoded images on disk, decoded by NVIDIA DALI."""

import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from gpu_mixmatch import sampling
from gpu_mixmatch._extras import import_dali
from gpu_mixmatch._validation import (
    MOST_IMAGES,
    MOST_PADDING,
    MOST_VIEW,
    as_flag,
    as_integer,
    as_pair,
    check_choice,
)
from gpu_mixmatch.augment import as_augment
from gpu_mixmatch.augment.base import Augment
from gpu_mixmatch.data.check import read_or_error, undecodable
from gpu_mixmatch.data.decoding import Encoded, UndecodableError
from gpu_mixmatch.data.images import open_images
from gpu_mixmatch.data.index import ImageIndex, PathLike
from gpu_mixmatch.data.order import BatchOrder, KeyedLoader
from gpu_mixmatch.types import SemiSupervisedBatch

OnError = Literal["raise", "skip"]

_BATCHES_AHEAD = 2  # batches made while the training works on another


class AugmentedBatch(NamedTuple):
    """What a loader that augments gives for one step: ``mixmatch.from_views(x, y, views, model)``.

    Attributes:
        x: Augmented labelled images, ``[B, C, H, W]`` floating point.
        y: Their labels, ``[B]`` int64.
        views: The K views of the unlabelled images, ``[K, M, C, H, W]``.
        ids_x: Sample ids of x, ``[B]`` int64, on the CPU: where the images lie in their source.
        ids_u: Sample ids of the unlabelled images, ``[M]`` int64, on the CPU.
    """

    x: Tensor
    y: Tensor
    views: Tensor
    ids_x: Tensor
    ids_u: Tensor


def mixmatch_pipeline(
    batch_size: int,
    size: int | tuple[int, int],
    *,
    random_crop: bool = False,
    device_id: int | None = None,
    num_threads: int = 2,
) -> Any:
    """Build the DALI pipeline that `DaliLoader` runs: encoded bytes to uint8 images of one size.

    A batch holds labelled and unlabelled images together, so that each is decoded once and all of
    them at once. ``(images,) = pipeline.run(encoded=arrays)`` takes a list of ``[bytes]`` uint8
    arrays and returns ``[n, H, W, 3]`` RGB. EXIF orientation is honoured; grey images, CMYK and
    palettes become RGB and an alpha channel is dropped.

    The largest centred window of the wanted shape is resized to ``size``, bilinear and
    antialiased. With ``random_crop`` the run also takes ``region``, ``[n, 4]`` float32: the share
    of the image's area, the aspect ratio (width over height), and where the window lies between
    top and bottom and between left and right, from 0 to 1. What would reach beyond the image is
    cut.

    Args:
        batch_size: Most images of a run.
        size: Of the images, one number or height and width, in pixels.
        random_crop: Whether windows are given.
        device_id: GPU that decodes (nvJPEG) and holds the images; None does it all on the CPU.
        num_threads: CPU threads that decode.

    Returns:
        An ``nvidia.dali.Pipeline``.

    Raises:
        ImportError: If DALI is not installed.
        TypeError: If an argument is of the wrong kind.
        ValueError: If a number is out of its range.
    """
    batch_size = as_integer("batch_size", batch_size, least=1, most=2 * MOST_IMAGES)
    random_crop = as_flag("random_crop", random_crop)
    num_threads = as_integer("num_threads", num_threads, least=1, most=2**12)
    if device_id is not None:
        device_id = as_integer("device_id", device_id, most=2**15)
    fn, types, dali_math = map(import_dali, ("fn", "types", "math"))
    height, width = _height_and_width(size)
    pipeline = import_dali("pipeline").Pipeline(
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=device_id,
        prefetch_queue_depth=1,  # inputs go in with run()
    )
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        device = "cpu" if device_id is None else "mixed"
        images = fn.decoders.image(encoded, device=device, output_type=types.RGB)
        shape = fn.cast(images.shape(), dtype=types.FLOAT)
        rows, columns = shape[0], shape[1]
        if random_crop:
            region = fn.external_source(name="region", dtype=types.FLOAT, ndim=1)
            area, aspect, down, across = (region[number] for number in range(4))
            area = area * rows * columns
            tall = dali_math.min(dali_math.sqrt(area / aspect), rows)
            wide = dali_math.min(dali_math.sqrt(area * aspect), columns)
        else:
            down = across = 0.5
            tall = dali_math.min(rows, columns * (height / width))
            wide = dali_math.min(columns, rows * (width / height))
        top, left = (rows - tall) * down, (columns - wide) * across
        pipeline.set_outputs(
            fn.resize(
                images,
                size=[height, width],
                roi_start=fn.stack(top, left),
                roi_end=fn.stack(top + tall, left + wide),
            )
        )
    pipeline.build()
    return pipeline


class DaliLoader(KeyedLoader):
    """Decode labelled and unlabelled images from disk, ahead of the training that uses them.

    Each batch is a function of (seed, step), and the state is two integers: see `BatchOrder` for
    the order and its shards, and `KeyedLoader` for epochs and state. To that end bytes are read by
    their place in the source, not by DALI's readers, which shuffle by a state of their own. Images
    in tars and TFRecords are found by an index that is made here, from headers.

    Threads read and decode two batches ahead; there are no worker processes. Use the loader in a
    ``with`` block or `close` it to end them at once; otherwise they end with the interpreter.

    Images are JPEG, PNG, WebP, BMP or TIFF by their content, of 8 bits per channel and at most 179
    megapixels; others are refused by their headers, as by `ImageFiles`.

    With ``on_error="skip"`` an image that does not decode is left out: the next good sample of this
    rank's order takes its place, and comes again in its own. Which one that is does not depend on
    when the fault was found, so that lengths stay equal on all ranks and a resumed run has the same
    batches.

    Args:
        labelled: Labelled images: a folder of class folders, a ``.txt`` list, ``.tar`` or
            ``.tfrecord`` files, or an index; see `images.open_images`.
        unlabelled: Unlabelled images, likewise; labels are not looked at.
        batch_size: B, labelled images per step (and rank).
        size: Of the images, one number or height and width, in pixels.
        ratio: Unlabelled images per labelled one; M = ratio · B. FixMatch's μ is 7.
        crop_area: Least and most of an image's area that a random window covers before it is
            resized, keyed by (seed, step, id); its aspect ratio lies between 3/4 and 4/3. All
            views of an image share the window. None takes the largest centred window.
        augment: Engine that augments what was decoded, such as a `DaliAugment`, or a callable,
            with the draws that `MixMatch` would make for (seed, step); batches are then
            `AugmentedBatch`es. None gives uint8, `SemiSupervisedBatch`es, for an engine of
            `MixMatch` itself.
        num_augmentations: K, where there is ``augment``.
        steps_per_epoch: Steps in an epoch; None takes one pass over the unlabelled images.
        seed: The key of the order and of all draws, 0 ≤ seed < 2^63.
        on_error: "raise" names the images of a batch that do not decode; "skip" leaves them out,
            warns once for each and lists them in ``skipped``.
        device_id: GPU that decodes and holds the images; None does it all on the CPU.
        num_threads: Threads that decode, and as many that read.
        rank: Of this process; None asks torch.distributed, where it is initialised.
        world_size: Number of processes, likewise.

    Attributes:
        labelled: Index of the labelled images; ``labelled.name(id)`` tells which one an id is, and
            ``labelled.classes`` names the labels of a folder.
        unlabelled: Index of the unlabelled images.
        skipped: Names of the images that were left out so far.

    Raises:
        ImportError: If DALI is not installed.
        TypeError: If an argument is of the wrong kind.
        ValueError: If a number is out of its range, or a source holds no images.
    """

    def __init__(
        self,
        labelled: ImageIndex | PathLike | Sequence[PathLike],
        unlabelled: ImageIndex | PathLike | Sequence[PathLike],
        batch_size: int,
        size: int | tuple[int, int],
        *,
        ratio: int = 1,
        crop_area: tuple[float, float] | None = None,
        augment: Augment | Callable[[Tensor], Tensor] | None = None,
        num_augmentations: int = 2,
        steps_per_epoch: int | None = None,
        seed: int = 0,
        on_error: OnError = "raise",
        device_id: int | None = None,
        num_threads: int = 2,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        check_choice("on_error", on_error, OnError)
        if crop_area is not None:
            crop_area = as_pair("crop_area", crop_area, above=0, most=1)
        num_augmentations = as_integer(
            "num_augmentations", num_augmentations, least=1, most=MOST_VIEW
        )
        num_threads = as_integer("num_threads", num_threads, least=1, most=2**12)
        if device_id is not None:
            device_id = as_integer("device_id", device_id, most=2**15)
        size = _height_and_width(size)
        self.labelled = open_images(labelled, labelled=True)
        self.unlabelled = open_images(unlabelled)
        order = BatchOrder(
            len(self.labelled),
            len(self.unlabelled),
            batch_size,
            ratio=ratio,
            steps_per_epoch=steps_per_epoch,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )
        super().__init__(order)
        self.size = size
        self.crop_area = crop_area
        self.augment = None if augment is None else as_augment(augment)
        self.num_augmentations = num_augmentations
        self.on_error = on_error
        self.device_id = device_id
        self.num_threads = num_threads
        self.skipped: list[str] = []
        self._x = _Part(self.labelled, {})
        self._u = _Part(self.unlabelled, {})
        self._pipeline = self._new_pipeline()
        self._decoding = threading.Lock()
        self._makers = ThreadPoolExecutor(_BATCHES_AHEAD, "DaliLoader makes batches")
        self._readers = ThreadPoolExecutor(num_threads, "DaliLoader reads")
        self._side_stream = None if device_id is None else torch.cuda.Stream(device_id)  # type: ignore[no-untyped-call]
        self._closed = False

    def __iter__(self) -> Iterator[Any]:
        """Give the batches from the current step to the end of its epoch."""
        if self._closed:
            raise RuntimeError("this DaliLoader is closed: make a new one")
        return super().__iter__()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads and free what DALI holds. Batches that were handed out stay."""
        self._closed = True
        self._makers.shutdown(cancel_futures=True)
        self._readers.shutdown(cancel_futures=True)
        self._pipeline = None

    def __repr__(self) -> str:
        order = self.order
        return (
            f"DaliLoader({order.num_labelled} labelled, {order.num_unlabelled} unlabelled, "
            f"batch_size={order.batch_size}, size={self.size}, ratio={order.ratio}, "
            f"crop_area={self.crop_area}, augment={self.augment!r}, "
            f"steps_per_epoch={order.steps_per_epoch}, seed={order.seed}, "
            f"on_error={self.on_error!r}, device_id={self.device_id})"
        )

    def _batches(self, steps: range) -> Iterator[Any]:
        waiting = iter(steps)
        ahead: deque[tuple[int, Future[SemiSupervisedBatch]]] = deque()
        try:
            while True:
                for step in waiting:
                    ahead.append((step, self._makers.submit(self._make, step)))
                    if len(ahead) > _BATCHES_AHEAD:
                        break
                if not ahead:
                    return
                step, made = ahead.popleft()
                yield self._finish(step, made.result())
        finally:
            for _, made in ahead:
                made.cancel()

    def _finish(self, step: int, batch: SemiSupervisedBatch) -> Any:
        """Warn of images that were left out and augment if asked to, in the thread that trains."""
        for part in (self._x, self._u):
            for number, reason in list(part.bad.items()):
                name = part.images.name(number)
                if name not in self.skipped:
                    self.skipped.append(name)
                    warnings.warn(f"{name} is left out: {reason}", stacklevel=4)
        if self._side_stream:  # it owns the images' memory, and must not reuse it too early
            batch.x.record_stream(torch.cuda.current_stream(self.device_id))
        if self.augment is None:
            return batch
        x, y, u, ids_x, ids_u = batch
        num_views = self.num_augmentations
        draws = self.augment.draw_batch(self.order.seed, step, ids_x, ids_u, num_views)
        images = self.augment.build(x, u, draws, num_views)
        views = images[len(x) :].view(num_views, len(u), *images.shape[1:])
        return AugmentedBatch(images[: len(x)], y, views, ids_x, ids_u)

    def _make(self, step: int) -> SemiSupervisedBatch:
        """Read and decode the batch of a step; begin again without images that do not decode."""
        while True:
            ids_x = self._x.decodable(self.order.indices_x, step)
            ids_u = self._u.decodable(self.order.indices_u, step)
            places = [(self._x, number) for number in ids_x.tolist()]
            places += [(self._u, number) for number in ids_u.tolist()]
            encoded = list(
                self._readers.map(lambda place: read_or_error(place[0].images, place[1]), places)
            )
            images = self._decode(encoded, step, ids_x, ids_u)
            if isinstance(images, Tensor):
                labels = self.labelled.labels
                assert labels is not None  # open_images sees to it
                x, u = images[: len(ids_x)], images[len(ids_x) :]
                return SemiSupervisedBatch(x, labels[ids_x], u, ids_x, ids_u)
            bad = [(*places[row], reason) for row, reason in images.items()]
            if self.on_error == "raise":
                names = "; ".join(f"{part.images.name(at)}: {why}" for part, at, why in bad)
                raise UndecodableError(
                    f'{len(bad)} of {len(places)} images do not decode, which on_error="skip" '
                    f"(train --on-error skip) would leave out: {names}. gpu-mixmatch check-images "
                    "--decoder dali lists all that do not"
                )
            for part, number, reason in bad:
                part.bad[number] = reason

    def _decode(
        self,
        encoded: list[Encoded | Exception],
        step: int,
        ids_x: Tensor,
        ids_u: Tensor,
    ) -> Tensor | dict[int, str]:
        """Return the images, ``[B + M, 3, H, W]`` channels_last, or why rows do not decode."""
        device = "cpu" if self.device_id is None else f"gpu:{self.device_id}"
        inputs: dict[str, Any] = {"encoded": encoded}
        if self.crop_area is not None:
            inputs["region"] = sampling.draw_regions(
                self.order.seed, step, ids_x, ids_u, self.crop_area
            )
        with self._decoding:
            if any(isinstance(item, Exception) for item in encoded):
                return undecodable(encoded, device)
            try:
                (images,) = self._pipeline.run(**inputs)
            except RuntimeError as error:
                self._pipeline = self._new_pipeline()  # DALI calls the old one no longer valid
                reasons = undecodable(encoded, device)
                if not reasons:
                    error.add_note(f"DALI failed on step {step}, whose images decode one by one")
                    raise
                return reasons
            return self._as_torch(images).permute(0, 3, 1, 2)

    def _as_torch(self, images: Any) -> Tensor:
        """Return the images as a tensor: on a GPU a copy that torch owns, on the CPU in place."""
        if self._side_stream is None:
            return from_dlpack(images.as_tensor())
        with torch.cuda.stream(self._side_stream):
            # DALI reuses its memory, whatever stream still reads it
            copy = from_dlpack(images.as_tensor()).clone()
        self._side_stream.synchronize()
        return copy

    def _new_pipeline(self) -> Any:
        return mixmatch_pipeline(
            (1 + self.order.ratio) * self.order.batch_size,
            self.size,
            random_crop=self.crop_area is not None,
            device_id=self.device_id,
            num_threads=self.num_threads,
        )


class _Part(NamedTuple):
    """The labelled or the unlabelled part: its images, and why some are known not to decode."""

    images: ImageIndex
    bad: dict[int, str]

    def decodable(self, indices: Callable[[int], Tensor], step: int) -> Tensor:
        """Return the samples of a step, each bad one replaced by the next good one of the order."""
        chosen = indices(step)[0]
        if not self.bad:
            return chosen
        if len(self.bad) == len(self.images):
            raise ValueError(f"no image decodes, of {len(self.images)}: {self.images.name(0)}, ...")
        spares = (
            number
            for later in count(step + 1)
            for number in indices(later)[0].tolist()
            if number not in self.bad
        )
        return torch.tensor(
            [next(spares) if number in self.bad else number for number in chosen.tolist()]
        )


def _height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    sides = size if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2:
        raise ValueError(f"size must be one or two integers of at least 1, got {size!r}")
    height, width = (as_integer("size", side, least=1, most=MOST_PADDING) for side in sides)
    return height, width
