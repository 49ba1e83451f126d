"""ResidentLoader: the whole uint8 data set on the device, and batches by index."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpu_mixmatch._validation import (
    as_device,
    came,
    check_kind,
    check_tensor,
    dtype_name,
    is_integer,
)
from gpu_mixmatch.data.collate import batched
from gpu_mixmatch.data.order import BatchOrder, KeyedLoader
from gpu_mixmatch.types import SemiSupervisedBatch

_STEPS_AT_ONCE = 64  # indices are drawn and sent for so many steps at a time, and for so many
_IMAGES_AT_ONCE = 2**20  # images


class ResidentLoader(KeyedLoader):
    """Batches of images that lie on the device, gathered by keyed indices.

    There are no workers, and nothing waits for the device: indices are sent ahead, and a step is
    one gather of each tensor. Order, ids and state are those of a `SemiSupervisedLoader` over
    ``Subset(TensorDataset(images, labels), labelled_indices)`` and ``unlabelled``; see `BatchOrder`
    for the order and `KeyedLoader` for epochs and state.

    Args:
        images: ``[N, C, H, W]``, ``[N, H, W, C]`` or grey ``[N, H, W]``, uint8, a tensor or array.
        labels: ``[N]`` integers, or ``[N, L]`` distributions; any values where images are not in
            the labelled part.
        batch_size: B, labelled images per step (and rank).
        labelled_indices: Which of the images form the labelled part, ``[n]`` integers; None is all
            of them. Ids of labelled samples are places in this list.
        unlabelled: The unlabelled images, like ``images``; None takes all of ``images``, as the
            paper does, the labelled ones among them.
        ratio: Unlabelled images per labelled one; M = ratio · B. FixMatch's μ is 7.
        steps_per_epoch: Steps in an epoch; None takes one pass over the unlabelled images.
        seed: The key of the order, 0 ≤ seed < 2^63.
        device: Where the images go; None leaves tensors where they are.
        rank: Of this process; None asks torch.distributed, where it is initialised.
        world_size: Number of processes, likewise.

    Attributes:
        images: All images, on the device.
        labels: Their labels, int64 if they are integers, on the device.
        unlabelled: The unlabelled images, on the device.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If shapes, dtypes or lengths do not fit, or a number is out of its range.
    """

    def __init__(
        self,
        images: Any,
        labels: Any,
        batch_size: int,
        *,
        labelled_indices: Any = None,
        unlabelled: Any = None,
        ratio: int = 1,
        steps_per_epoch: int | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        images = _images("images", images)
        labels = batched(_tensor("labels", labels))
        hard = labels.dim() == 1 and is_integer(labels.dtype)
        if len(labels) != len(images) or not (hard or labels.dim() == 2):
            raise ValueError(
                f"labels must be [N] integers or [N, L] with N = {len(images)} like images, got "
                f"{came(labels)}"
            )
        self._labelled = None if labelled_indices is None else _indices(labelled_indices, images)
        others = None if unlabelled is None else _images("unlabelled", unlabelled)
        if others is not None and others.shape[1:] != images.shape[1:]:
            raise ValueError(
                f"unlabelled must be [M, ...] with {list(images.shape[1:])} like images, "
                f"got {list(others.shape)}"
            )
        super().__init__(
            BatchOrder(
                len(images if self._labelled is None else self._labelled),
                len(images if others is None else others),
                batch_size,
                ratio=ratio,
                steps_per_epoch=steps_per_epoch,
                seed=seed,
                rank=rank,
                world_size=world_size,
            )
        )
        self.images: Tensor = images if device is None else images.to(as_device("device", device))
        self.labels = labels.to(self.images.device)
        self.unlabelled = self.images if others is None else others.to(self.images.device)
        self._into: SemiSupervisedBatch | None = None

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.images.device

    def gather_into(self, inputs: SemiSupervisedBatch | None) -> None:
        """Write x, y and u of the batches to come into tensors that are there already.

        It is meant for ``captured.inputs``: a captured builder copies none of them. Each batch then
        overwrites the one before, in the stream that is current when it is asked for, which must be
        that of the builder's calls. Ids are given on the CPU as ever.

        Args:
            inputs: Where to write, tensors like a batch's on this loader's device; None gives every
                batch tensors of its own again.

        Raises:
            TypeError: If ``inputs`` is of the wrong kind.
            ValueError: If x, y or u is not like those of a batch.
        """
        if inputs is not None:
            check_kind("inputs", inputs, SemiSupervisedBatch, "a SemiSupervisedBatch or None")
            size = self.order.batch_size
            self._check_like("inputs.x", inputs.x, self.images, size)
            self._check_like("inputs.y", inputs.y, self.labels, size)
            self._check_like("inputs.u", inputs.u, self.unlabelled, self.order.ratio * size)
        self._into = inputs

    def __repr__(self) -> str:
        order = self.order
        return (
            f"ResidentLoader({order.num_labelled} labelled, {order.num_unlabelled} unlabelled, "
            f"batch_size={order.batch_size}, ratio={order.ratio}, "
            f"steps_per_epoch={order.steps_per_epoch}, seed={order.seed}, device='{self.device}')"
        )

    def _check_like(self, name: str, tensor: Tensor, source: Tensor, length: int) -> None:
        check_tensor(name, tensor)
        wanted = (length, *source.shape[1:]), source.dtype, source.device
        if (tuple(tensor.shape), tensor.dtype, tensor.device) != wanted:
            raise ValueError(
                f"{name} must be {list(wanted[0])} {dtype_name(source.dtype)} on {source.device} "
                f"like a batch's, got {came(tensor)} on {tensor.device}"
            )

    def _batches(self, steps: range) -> Iterator[SemiSupervisedBatch]:
        size = self.order.ratio * self.order.batch_size
        at_once = max(1, min(_STEPS_AT_ONCE, _IMAGES_AT_ONCE // size))
        for start in steps[::at_once]:
            num_steps = min(at_once, steps.stop - start)
            ids_x = self.order.indices_x(start, num_steps)
            ids_u = self.order.indices_u(start, num_steps)
            rows_x = _to_device(
                ids_x if self._labelled is None else self._labelled[ids_x], self.device
            )
            rows_u = _to_device(ids_u, self.device)
            for number in range(num_steps):
                x, y, u = self._into[:3] if self._into else (None, None, None)
                yield SemiSupervisedBatch(
                    torch.index_select(self.images, 0, rows_x[number], out=x),
                    torch.index_select(self.labels, 0, rows_x[number], out=y),
                    torch.index_select(self.unlabelled, 0, rows_u[number], out=u),
                    ids_x[number],
                    ids_u[number],
                )


def _to_device(indices: Tensor, device: torch.device) -> Tensor:
    """Send indices to ``device``; to a GPU from pinned memory, so that the host does not wait."""
    if device.type == "cuda":
        indices = indices.contiguous().pin_memory()
    return indices.to(device, non_blocking=True)


def _tensor(name: str, values: Any) -> Tensor:
    """Return values that may be a tensor, an array, or what numpy makes an array of."""
    if isinstance(values, Tensor):
        check_tensor(name, values)
        found = values
    else:
        try:
            array = np.asarray(values)
        except ValueError:  # rows of different lengths
            array = np.asarray(None)
        if array.dtype.kind not in "iufb":
            raise TypeError(f"{name} must be a tensor or a numpy array, got {came(values)}")
        # copies what is read-only, or in another machine's order of bytes
        found = torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))
    if found.dim() == 0 or found.device.type == "meta":
        raise ValueError(f"{name} must be [N, ...] and hold values, got {came(values)}")
    return found


def _images(name: str, images: Any) -> Tensor:
    tensor = batched(_tensor(name, images))
    if tensor.dim() != 4 or tensor.dtype != torch.uint8:
        raise ValueError(
            f"{name} must be [N, C, H, W], [N, H, W, C] or [N, H, W] uint8, got "
            f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        )
    return tensor


def _indices(labelled_indices: Any, images: Tensor) -> Tensor:
    indices = batched(_tensor("labelled_indices", labelled_indices)).cpu()
    if indices.dim() != 1 or (indices.dtype != torch.int64 and len(indices)):
        raise ValueError(f"labelled_indices must be [n] integers, got {came(indices)}")
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(images):
        raise ValueError(
            f"labelled_indices must be in 0 .. {len(images) - 1}, the images' places, got "
            f"{int(indices.min())} .. {int(indices.max())}"
        )
    return indices.long()
