"""SemiSupervisedLoader: a labelled and an unlabelled data set as one stream of batches."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from gpu_mixmatch._validation import (
    as_device,
    as_integer,
    as_number,
    as_text,
    check_callable,
)
from gpu_mixmatch._writes import count_of_writes
from gpu_mixmatch.data.collate import batched, collate
from gpu_mixmatch.data.decoding import UndecodableError
from gpu_mixmatch.data.order import BatchOrder, KeyedLoader
from gpu_mixmatch.data.upload import Upload
from gpu_mixmatch.types import SemiSupervisedBatch


class SemiSupervisedLoader(KeyedLoader):
    """Pair the batches of a labelled and an unlabelled data set.

    The labelled data set repeats for as long as the unlabelled one lasts, or for
    ``steps_per_epoch``; see `BatchOrder` for the order and `KeyedLoader` for epochs and state.
    Samples are fetched by torch's `DataLoader`, whose workers persist; none that a resumed run
    would skip is fetched. Random transforms inside a data set draw from its worker, as always:
    keyed draws are those of the augmentation on the device.

    On a CUDA device the images travel as they are, uint8, through reused pinned buffers on a
    stream of their own, one batch ahead. On the CPU nothing is copied.

    Args:
        labelled: A map-style data set, Hugging Face's among them, or a `DataLoader` of one, of
            which the data set, ``collate_fn``, ``num_workers``, ``timeout``, ``prefetch_factor``,
            ``worker_init_fn`` and ``multiprocessing_context`` are taken; batches and their order
            are made here. Samples are (image, label, ...) or dicts.
        unlabelled: Likewise; samples may also be images alone, and labels are not looked at.
        batch_size: B, labelled images per step (and rank).
        ratio: Unlabelled images per labelled one; M = ratio · B. FixMatch's μ is 7.
        steps_per_epoch: Steps in an epoch; None takes one pass over the unlabelled data set.
        image: Name of the image in samples that are dicts.
        label: Name of the label in samples that are dicts.
        seed: The key of the order, 0 ≤ seed < 2^63.
        device: Where the batches go; None leaves them on the CPU.
        num_workers: Processes for each of the two data sets; 0 fetches in this one.
        timeout: Seconds that workers have for a batch before an error says which data set stalled;
            0 waits for ever. Without workers nothing can be timed out.
        collate_fn: Makes a batch of samples; of a `DataLoader` its own is taken, unless that is
            torch's default.
        rank: Of this process; None asks torch.distributed, where it is initialised.
        world_size: Number of processes, likewise.

    Raises:
        TypeError: If a data set is not map-style, or an argument of the wrong kind.
        ValueError: If a number is out of its range, or a `DataLoader` has an order of its own.
    """

    def __init__(
        self,
        labelled: Any,
        unlabelled: Any,
        batch_size: int,
        *,
        ratio: int = 1,
        steps_per_epoch: int | None = None,
        image: str = "image",
        label: str = "label",
        seed: int = 0,
        device: torch.device | str | None = None,
        num_workers: int = 0,
        timeout: float = 300.0,
        collate_fn: Callable[[Any], Any] = collate,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        image, label = as_text("image", image), as_text("label", label)
        num_workers = as_integer("num_workers", num_workers, most=2**16)
        timeout = as_number("timeout", timeout, least=0)
        check_callable("collate_fn", collate_fn, "a function from samples to a batch")
        device = torch.device("cpu") if device is None else as_device("device", device)
        sources = [
            _source(name, dataset, collate_fn, num_workers, timeout)
            for name, dataset in (("labelled", labelled), ("unlabelled", unlabelled))
        ]
        order = BatchOrder(
            len(sources[0].dataset),
            len(sources[1].dataset),
            batch_size,
            ratio=ratio,
            steps_per_epoch=steps_per_epoch,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )
        super().__init__(order)
        self.image = image
        self.label = label
        self.device = device
        self._upload = Upload(self.device) if self.device.type == "cuda" else None
        self._sources = sources
        self._loaders = self._new_loaders()

    @property
    def dataset(self) -> Any:
        """The unlabelled data set, which sets the epoch."""
        return self._sources[1].dataset

    @property
    def sampler(self) -> Any:
        """The unlabelled samples that this rank takes to the end of the epoch, as indices."""
        return self._loaders[1].sampler

    @property
    def batch_sampler(self) -> Any:
        """The samples of `sampler`, in batches."""
        return self._loaders[1].batch_sampler

    def __repr__(self) -> str:
        order = self.order
        return (
            f"SemiSupervisedLoader({order.num_labelled} labelled, {order.num_unlabelled} "
            f"unlabelled, batch_size={order.batch_size}, ratio={order.ratio}, "
            f"steps_per_epoch={order.steps_per_epoch}, seed={order.seed}, device='{self.device}')"
        )

    def _new_loaders(self) -> list[DataLoader[Any]]:
        order = self.order
        # the workers' seeds come from it, and not from torch's global generator
        generator = torch.Generator().manual_seed((order.seed + order.rank) % 2**63)
        sizes = (order.batch_size, order.ratio * order.batch_size)
        indices = (order.indices_x, order.indices_u)
        return [
            source.loader(
                _RankSampler(order, take, size), size, (self.image, self.label), generator
            )
            for source, take, size in zip(self._sources, indices, sizes, strict=True)
        ]

    def _batches(self, steps: range) -> Iterator[SemiSupervisedBatch]:
        if any(map(_has_dead_worker, self._loaders)):
            self._loaders = self._new_loaders()  # torch would wait for the dead worker
        batches = self._fetched(steps, [iter(loader) for loader in self._loaders])
        if self._upload:
            return self._upload(batches)
        if self.device.type == "cpu":
            return batches
        return (
            batch._replace(
                x=batch.x.to(self.device), y=batch.y.to(self.device), u=batch.u.to(self.device)
            )
            for batch in batches
        )

    def _fetched(
        self, steps: range, iterators: Sequence[Iterator[Any]]
    ) -> Iterator[SemiSupervisedBatch]:
        for step in steps:
            ids = self.order.indices_x(step)[0], self.order.indices_u(step)[0]
            labelled, unlabelled = (
                partial(source.next_batch, iterator, step, len(indices))
                for source, iterator, indices in zip(self._sources, iterators, ids, strict=True)
            )
            try:
                x, y = labelled()
                before = count_of_writes(x), count_of_writes(y)
                u, _ = unlabelled()
            except TimeoutError:
                self._loaders = self._new_loaders()  # a stalled worker would stall all that follow
                raise
            overwritten = (count_of_writes(x), count_of_writes(y)) != before
            # what goes past torch's count shows in the address, unless both are of the same samples
            same = x.numel() and x.data_ptr() == u.data_ptr() and not torch.equal(*ids)
            if overwritten or same:
                raise ValueError(
                    "collate_fn must return memory of its own every time, got a function whose "
                    f"unlabelled batch of step {step} overwrote the labelled one: clone what it "
                    "returns"
                )
            yield SemiSupervisedBatch(x, y, u, *ids)


class _Source(NamedTuple):
    """One of the two data sets, and how it is fetched."""

    name: str
    dataset: Any
    collate_fn: Callable[[Any], Any]
    num_workers: int
    timeout: float
    options: dict[str, Any]  # further arguments of the DataLoader

    def loader(
        self,
        sampler: Sampler[int],
        batch_size: int,
        names: tuple[str, str],
        generator: torch.Generator,
    ) -> DataLoader[Any]:
        """Make the `DataLoader` of this data set."""
        dataset, collate_fn = self.dataset, self.collate_fn
        whole = _whole_tensors(dataset) if collate_fn is collate else None
        if whole is not None:
            dataset, collate_fn = _TensorRows(whole), _unchanged
        return DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            drop_last=True,
            collate_fn=_ImageAndLabel(self.name, collate_fn, *names),
            num_workers=self.num_workers,
            timeout=self.timeout if self.num_workers else 0,
            persistent_workers=self.num_workers > 0,
            generator=generator,
            **self.options,
        )

    def next_batch(self, batches: Iterator[Any], step: int, length: int) -> tuple[Tensor, Any]:
        """Return the next images and labels; an error says which data set and step failed."""
        waiting = f"the {self.name} batch of step {step}"
        try:
            images, labels = next(batches)
        except ConnectionResetError as error:
            if not self.num_workers or str(error).startswith("Caught"):  # by the data set
                raise
            raise RuntimeError(  # in the midst of what it sent
                f"a worker process died while {waiting} was waited for: {error}"
            ) from error
        except RuntimeError as error:
            if str(error).startswith("DataLoader timed out"):
                raise TimeoutError(
                    f"{waiting} did not come within timeout = {self.timeout} s from "
                    f"{self.num_workers} workers: the {self.name} data set has stalled, or is too "
                    "slow for this timeout"
                ) from error
            if str(error).startswith("DataLoader worker"):
                raise RuntimeError(
                    f"a worker process died while {waiting} was waited for: {error}. Killed "
                    "workers are often out of memory, or of shared memory (/dev/shm)"
                ) from error
            error.add_note(f"while {waiting} was fetched")
            raise
        except UndecodableError as error:  # of a worker: what torch says is a whole traceback
            raise UndecodableError(error.reason) from None
        except Exception as error:
            error.add_note(f"while {waiting} was fetched")
            raise
        if len(images) != length:
            raise ValueError(
                f"collate_fn must keep all samples, got {len(images)} images of {length} samples "
                f"in {waiting}"
            )
        return images, labels


def _source(
    name: str,
    source: Any,
    collate_fn: Callable[[Any], Any],
    num_workers: int,
    timeout: float,
) -> _Source:
    if isinstance(source, DataLoader):
        _check_loader(name, source)
        options = {
            option: getattr(source, option)
            for option in ("prefetch_factor", "worker_init_fn", "multiprocessing_context")
        }
        own_collate = source.collate_fn
        return _Source(
            name,
            source.dataset,
            collate if own_collate is default_collate else own_collate,
            source.num_workers,
            source.timeout or timeout,
            options,
        )
    _check_map_style(name, source)
    return _Source(name, source, collate_fn, num_workers, timeout, {})


def _check_loader(name: str, loader: DataLoader[Any]) -> None:
    _check_map_style(name, loader.dataset)
    ordinary = (SequentialSampler, RandomSampler, DistributedSampler)
    if type(loader.sampler) not in ordinary or type(loader.batch_sampler) is not BatchSampler:
        raise ValueError(
            f"{name} must be a DataLoader with batch_size and no sampler or batch_sampler of its "
            "own, since the order is made here, got "
            f"{type(loader.sampler).__name__} and {type(loader.batch_sampler).__name__}"
        )


def _check_map_style(name: str, dataset: Any) -> None:
    is_map_style = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    is_number = isinstance(dataset, Tensor | np.ndarray) and dataset.ndim == 0
    wrong = isinstance(dataset, IterableDataset | tuple | Mapping | str | bytes | type)
    if not is_map_style or is_number or wrong:
        raise TypeError(
            f"{name} must be a map-style data set, with __len__ and __getitem__, or a DataLoader "
            f"of one, got {type(dataset).__name__}; tensors go into "
            "TensorDataset(images, labels), and of a dict of splits one is chosen"
        )


class _RankSampler(Sampler[int]):
    """The indices that a rank takes of one data set, from the current step to the epoch's end."""

    def __init__(self, order: BatchOrder, indices: Callable[[int], Tensor], size: int) -> None:
        self.order = order
        self.indices = indices
        self.size = size

    def __iter__(self) -> Iterator[int]:
        for step in self.order.steps_left():
            yield from self.indices(step)[0].tolist()

    def __len__(self) -> int:
        return self.order.steps_per_epoch * self.size

    def set_epoch(self, epoch: int) -> None:
        """Move the loader, for trainers that look for this method on samplers."""
        self.order.set_epoch(epoch)


def _has_dead_worker(loader: DataLoader[Any]) -> bool:
    workers = getattr(loader._iterator, "_workers", ())
    return not all(worker.is_alive() for worker in workers)


class _ImageAndLabel:
    """Collate in the worker and keep image and label alone: nothing else travels."""

    def __init__(
        self, source: str, collate_fn: Callable[[Any], Any], image: str, label: str
    ) -> None:
        self.source = source
        self.collate_fn = collate_fn
        self.image = image
        self.label = label

    def __call__(self, samples: Any) -> tuple[Tensor, Tensor | None]:
        batch = self.collate_fn(samples)
        images = batch if isinstance(batch, Tensor) else self._field(batch, "image", self.image, 0)
        if not isinstance(images, Tensor) or images.dim() != 4:
            raise ValueError(
                f"{self.source} images must be [n, C, H, W] or [n, H, W, C], got "
                f"{_described(images)}"
            )
        if self.source == "unlabelled":
            return images, None
        labels = self._field(batch, "label", self.label, 1)
        if not isinstance(labels, Tensor):
            raise ValueError(f"{self.source} labels must be numbers, got {_described(labels)}")
        return images, labels

    def _field(self, batch: Any, what: str, name: str, position: int) -> Any:
        if isinstance(batch, Mapping):
            if name in batch:
                return batch[name]
            raise ValueError(
                f"{self.source} samples must have a field {name!r}, got {list(batch)}: say which "
                f'it is with {what}="..."'
            )
        if isinstance(batch, list | tuple) and len(batch) > position:
            return batch[position]
        raise ValueError(
            f"{self.source} samples must be (image, label) or dicts, got {_described(batch)}"
        )


class _TensorRows(Dataset[Any]):
    """A data set of whole tensors or arrays: a batch is one gather, not a stack of samples."""

    def __init__(self, tensors: Sequence[Any]) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitems__(self, indices: Sequence[int]) -> list[Tensor]:
        """Return the batch of ``indices``, as `collate` would make it."""
        rows = np.asarray(indices)
        return [batched(_rows_of(tensor, rows)) for tensor in self.tensors]


def _rows_of(tensor: Any, rows: Any) -> Tensor:
    if isinstance(tensor, Tensor):  # many times faster than tensor[rows]
        return tensor.index_select(0, torch.as_tensor(rows, device=tensor.device))
    return torch.as_tensor(tensor[rows])


def _whole_tensors(dataset: Any) -> Sequence[Any] | None:
    if type(dataset) is TensorDataset:
        return dataset.tensors
    is_whole = isinstance(dataset, Tensor) or (
        isinstance(dataset, np.ndarray) and dataset.dtype.kind in "biuf"
    )
    return (dataset,) if is_whole else None


def _unchanged(batch: Any) -> Any:
    return batch


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    kinds = {type(item).__name__ for item in value} if isinstance(value, list | tuple) else None
    return f"a {type(value).__name__}" + (f" of {sorted(kinds)}" if kinds else "")
