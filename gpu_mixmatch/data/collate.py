"""collate: samples become a batch, and images stay the bytes that they are."""

import copy
import math
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from gpu_mixmatch._validation import came

_NUMBERS = (bool, int, float, np.number, np.bool_)
_INT64_MAX = np.iinfo(np.int64).max
_GREY_MODES = ("1", "L", "LA", "La")


def collate(samples: Sequence[Any]) -> Any:
    """Turn samples into a batch: a ``collate_fn`` for any `DataLoader`.

    The structure is that of torch's `default_collate`: tuples and lists become lists, dicts and
    named tuples keep their kind. Each leaf becomes a batch of its own:

    - Arrays and tensors are stacked as they are, HWC or CHW, uint8 or float. A grey image of HW
      uint8 pixels gets a channel axis, ``[n, 1, H, W]``.
    - PIL images become ``[n, C, H, W]`` uint8 in channels_last memory, which is the order of their
      bytes. 1, L and LA give one channel, all other modes of 8 bits give RGB; transparency is
      dropped. Modes of more bits (I, F, I;16) raise: they have no one scale to 8 bits.
    - Integers, also 0-d arrays and tensors, become ``[n]`` int64; floats and booleans keep their
      kind, Python's floats being float64.
    - Strings, bytes, None and all other objects are passed through as a list of n.

    Pixels are copied once and never computed with. A worker process copies them straight into the
    shared memory in which they travel. Nothing here calls CUDA.

    Args:
        samples: What a data set gives, at least one.

    Returns:
        The batch of n samples, on the CPU.

    Raises:
        TypeError: If ``samples`` are no list, or like one.
        ValueError: If samples differ in structure, size, channels or dtype, or an image has more
            than 8 bits or does not decode; the message names the sample by its number in the batch.
    """
    # also what is no Sequence by its class and can be indexed, as a batch of Hugging Face's
    is_sequence = hasattr(samples, "__len__") and hasattr(samples, "__getitem__")
    is_number = getattr(samples, "ndim", 1) == 0
    if not is_sequence or is_number or isinstance(samples, str | bytes | Mapping | type):
        raise TypeError(f"samples must be a list of samples, got {came(samples)}")
    if len(samples) == 0:
        raise ValueError("samples must hold at least one sample, got none")
    return _collate(samples, "")


class Indexed(Dataset[tuple[Any, int]]):
    """A data set whose samples come with their index, so that ids arrive with the batch.

    Example:
        >>> loader = DataLoader(Indexed(dataset), batch_size=64, collate_fn=collate)
        >>> for (x, y), ids_x in loader: ...

    Args:
        dataset: Any map-style data set. One that fetches whole batches (``__getitems__``) still
            does.

    Raises:
        TypeError: If it is none.
    """

    def __init__(self, dataset: Any) -> None:
        if not hasattr(dataset, "__getitem__") or isinstance(dataset, str | bytes | type):
            raise TypeError(
                f"dataset must be a map-style data set, with __getitem__, got {came(dataset)}"
            )
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.dataset[index], index

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, int]]:
        """Return the samples at ``indices``, each with its index."""
        fetch = getattr(self.dataset, "__getitems__", None)
        # a copy: a data set may sort its indices, or take them off the list
        samples = fetch(list(indices)) if fetch else [self.dataset[index] for index in indices]
        return list(zip(samples, indices, strict=True))

    def __repr__(self) -> str:
        return f"Indexed({self.dataset!r})"


def batched(stacked: Tensor) -> Tensor:
    """Return stacked leaves as `collate` gives them: grey images get channels, integers int64."""
    if stacked.dtype == torch.uint8 and stacked.dim() == 3:
        return stacked.unsqueeze(1)
    is_integer = not (stacked.is_floating_point() or stacked.is_complex())
    if stacked.dim() == 1 and is_integer and stacked.dtype != torch.bool:
        return stacked.long()
    return stacked


def _collate(samples: Sequence[Any], place: str) -> Any:
    """Collate samples, or one part of each: ``place`` says which part, as in "[0]['image']"."""
    first = samples[0]
    if isinstance(first, Tensor):
        return batched(_stack_tensors(samples, place))
    if isinstance(first, np.ndarray) and first.dtype.kind in "biufc":
        return batched(_stack_arrays(samples, place))
    if _is_pil(first):
        return _stack_pil(samples, place)
    if isinstance(first, _NUMBERS):
        return _numbers(samples, place)
    if isinstance(first, Mapping):
        return _mapping(samples, place)
    if isinstance(first, Sequence) and not isinstance(first, str | bytes):
        return _sequence(samples, place)
    return list(samples)


def _stack_tensors(tensors: Sequence[Tensor], place: str) -> Tensor:
    first = tensors[0]
    shape, dtype = first.shape, first.dtype
    for number, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor) or tensor.shape != shape or tensor.dtype != dtype:
            raise _mismatch(number, place, first, tensor)
    if get_worker_info() is None:
        return torch.stack(list(tensors))
    return torch.stack(list(tensors), out=_empty((len(tensors), *shape), dtype))


def _stack_arrays(arrays: Sequence[Any], place: str) -> Tensor:
    first = arrays[0]
    shape, dtype = first.shape, first.dtype
    for number, array in enumerate(arrays):
        if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype != dtype:
            raise _mismatch(number, place, first, array)
    torch_dtype = torch.from_numpy(np.empty(0, dtype.newbyteorder("="))).dtype
    batch = _empty((len(arrays), *shape), torch_dtype)
    rows = batch.numpy()
    for number, array in enumerate(arrays):  # a third of the time of np.stack
        rows[number] = array
    return batch


def _stack_pil(images: Sequence[Any], place: str) -> Tensor:
    first = _eight_bits(images[0], 0, place)
    width, height = size = first.size
    mode = first.mode
    channels = len(mode)
    num_bytes = height * width * channels
    batch = _empty((len(images), height, width, channels), torch.uint8)
    memory = batch.numpy().reshape(-1).data
    for number, image in enumerate(images):
        if not _is_pil(image):
            raise _mismatch(number, place, first, image)
        row = _eight_bits(image, number, place)
        if row.size != size or row.mode != mode:
            raise _mismatch(number, place, first, row)
        memory[number * num_bytes : (number + 1) * num_bytes] = row.tobytes()
    return batch.permute(0, 3, 1, 2)


def _eight_bits(image: Any, number: int, place: str) -> Any:
    """Return a PIL image in mode L or RGB, decoded."""
    try:
        image.load()
    except Exception as error:  # a decoder trips over damage in its own way, by any exception
        name = getattr(image, "filename", "") or "its file"
        raise ValueError(
            f"samples[{number}]{place} must be an image that decodes, got {name}: "
            f"{error or type(error).__name__}"
        ) from error
    mode = image.mode
    if mode in ("RGB", "L"):
        return image
    if mode == "F" or mode.startswith("I"):
        raise ValueError(
            f"samples[{number}]{place} must be an image of 8 bits per channel, got mode {mode}: "
            "scale it to 8 bits in the data set"
        )
    if mode == "La":  # PIL has no direct way from it to L
        image = image.convert("LA")
    elif mode == "P" and "transparency" in image.info:  # PIL warns of the direct way to RGB
        image = image.convert("RGBA")
    return image.convert("L" if mode in _GREY_MODES else "RGB")


def _numbers(values: Sequence[Any], place: str) -> Tensor:
    for number, value in enumerate(values):
        if not isinstance(value, _NUMBERS):
            raise _mismatch(number, place, values[0], value)
    array = np.asarray(values)
    if array.dtype == object or (array.dtype == np.uint64 and array.max() > _INT64_MAX):
        raise ValueError(f"samples[i]{place} must be at most 2**63 - 1, got {array.max()}")
    return batched(torch.from_numpy(array))


def _mapping(samples: Sequence[Any], place: str) -> Any:
    first = samples[0]
    for number, sample in enumerate(samples):
        if not isinstance(sample, Mapping) or sample.keys() != first.keys():
            raise _mismatch(number, place, first, sample)
    fields = {
        key: _collate([sample[key] for sample in samples], f"{place}[{key!r}]") for key in first
    }
    if type(first) is dict:
        return fields
    try:
        if not isinstance(first, MutableMapping):
            return type(first)(fields)
        clone = copy.copy(first)  # keeps what a mapping holds beside its fields
        own = {key: first[key] for key in fields}
        clone.update(fields)
        if any(first[key] is not own[key] for key in own):
            first.update(own)  # the copy writes into the sample, which the data set may hold
            return fields
        return clone
    except TypeError:  # a mapping that cannot be made of fields
        return fields


def _sequence(samples: Sequence[Any], place: str) -> Any:
    first = samples[0]
    for number, sample in enumerate(samples):
        if not isinstance(sample, type(first)) or len(sample) != len(first):
            raise _mismatch(number, place, first, sample)
    columns = [
        _collate(column, f"{place}[{index}]")
        for index, column in enumerate(zip(*samples, strict=True))
    ]
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*columns)
    return columns


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    # as default_collate does: a tensor in shared memory is not copied again to be sent
    num_bytes = math.prod(shape) * dtype.itemsize
    storage = torch.UntypedStorage._new_shared(num_bytes)  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)


def _is_pil(value: Any) -> bool:
    pil = sys.modules.get("PIL.Image")  # until PIL is imported, nothing is a PIL image
    return pil is not None and isinstance(value, pil.Image)


def _mismatch(number: int, place: str, first: Any, other: Any) -> ValueError:
    hint = ""
    if _is_pil(first) and _is_pil(other) and first.mode != other.mode:
        hint = '; convert all images of the data set, for instance with image.convert("RGB")'
    elif _is_image(first) and _is_image(other):
        hint = "; bring all images to one size and kind in the data set"
    return ValueError(
        f"samples[{number}]{place} must be {_described(first)} like samples[0]{place}, "
        f"got {_described(other)}{hint}"
    )


def _is_image(value: Any) -> bool:
    return _is_pil(value) or (isinstance(value, Tensor | np.ndarray) and value.ndim >= 2)


def _described(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        kind = "a tensor" if isinstance(value, Tensor) else "an array"
        return f"{kind} {list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if _is_pil(value):
        return f"a PIL image of {value.height} x {value.width} pixels in mode {value.mode}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with keys {list(value)}"
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{value!r} of type {type(value).__name__}"
