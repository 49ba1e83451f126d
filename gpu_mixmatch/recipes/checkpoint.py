"""A run's checkpoint as a file: written whole or not at all, and read without trust.

A file that comes from outside may be damaged, of something else, or made to harm. Whatever it is,
`read_checkpoint` runs nothing of it and answers in one line that names it.
"""

import math
import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from gpu_mixmatch._validation import as_integer, as_number, came

FORMAT = 1
_KINDS: dict[str, type] = {
    "format": int,
    "versions": dict,
    "config": dict,
    "data": dict,
    "normalisation": dict,
    "step": int,
    "model": dict,
    "ema": dict,
    "optimizer": dict,
    "mixmatch": dict,
    "loader": dict,
    "metrics": list,
}
_COUNTS = ("num_classes", "num_labelled", "num_unlabelled", "num_test")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ``gpu-mixmatch train``; tensors come to the CPU.

    Args:
        path: The file, ``checkpoint.pt`` in the folder of a run.

    Returns:
        The entries of `TrainRun.state_dict`, each of its kind; `check_state` says what is checked.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, of something else, made to run code, or of another format.
        OSError: If it may not be read.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} must be a checkpoint of gpu-mixmatch train, got no file")
    if not path.is_file():  # a pipe would be waited for
        raise _refused(path, "a folder" if path.is_dir() else "a pipe or device")
    size = _check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what other files of torch are
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refused(
            path, "a file with other objects than tensors and plain values, of which none was run"
        ) from error
    except Exception as error:  # a file of any content may raise anything
        raise _refused(path, f"one that torch does not load ({_first_line(error)})") from error
    try:
        check_state(state, size)
    except (ValueError, TypeError) as error:
        raise _refused(path, f"one in which {error}") from error
    checked: dict[str, Any] = state
    return checked


def check_state(state: Any, size: float = math.inf) -> None:
    """Raise if something is not what `TrainRun.state_dict` returns.

    Entries must be there and of their kind, numbers finite, and tensors of floats finite.

    Args:
        state: What was read.
        size: Bytes of the file: no tensor can have more.

    Raises:
        TypeError: If an entry is of the wrong kind.
        ValueError: If it is of another format, or an entry is missing or has a wrong value.
    """
    if not isinstance(state, dict) or not {"config", "model"} <= state.keys():
        raise ValueError(f"entries must be config, model and more, got {_entries(state)}")
    if "format" not in state:
        raise ValueError(
            f"format must be {FORMAT}, got none: version 0.1 wrote it, and nothing of the data"
        )
    if state["format"] != FORMAT:
        raise ValueError(
            f"format must be {FORMAT}, got {came(state['format'])}, which another version of "
            "gpu_mixmatch wrote"
        )
    for name, kind in _KINDS.items():
        if not isinstance(state.get(name), kind) or isinstance(state[name], bool):
            raise TypeError(f"{name} must be of type {kind.__name__}, got {came(state.get(name))}")
    as_integer("step", state["step"])
    _check_config(state["config"])
    _check_data(state["data"])
    _check_normalisation(state["normalisation"], state["data"]["image"][0])
    for entry in state["metrics"]:
        if not isinstance(entry, dict) or not {"step", "error", "seconds"} <= entry.keys():
            raise ValueError(f"metrics must have step, error and seconds, got {came(entry)}")
        for name, value in entry.items():
            as_number(f"{name} of metrics", value)
    optimizer = state["optimizer"]
    groups, states = optimizer.get("param_groups"), optimizer.get("state")
    if (
        not isinstance(groups, list)
        or not isinstance(states, dict)
        or not all(isinstance(entry, dict) for entry in (*groups, *states.values()))
    ):
        raise TypeError(f"optimizer must have param_groups and state, got {_entries(optimizer)}")
    for name in ("model", "ema"):
        for key, value in state[name].items():
            if not isinstance(key, str) or not isinstance(value, Tensor):
                raise TypeError(f"{name} must hold tensors by name, got {came(key)}")
    for name, value in _tensors(state):
        if value.layout != torch.strided or value.numel() * value.element_size() > size:
            raise ValueError(f"{name} must be as large as its file, got {came(value)}")
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{name} must be finite, got NaN or infinity in it")


def check_weights(
    name: str, mine: Mapping[str, Any], theirs: Mapping[str, Any], model: str
) -> None:
    """Raise a ValueError if weights are of another network; it says which ones and how.

    Args:
        name: Whose weights these are, for the message: "model".
        mine: ``state_dict()`` of the network that is to have them.
        theirs: The weights.
        model: What the network is, for the message.
    """
    missing, more = mine.keys() - theirs.keys(), theirs.keys() - mine.keys()
    if missing or more:
        parts = [
            f"{len(keys)} entries {word}, {min(keys)!r} among them"
            for keys, word in ((missing, "are missing"), (more, "are of another network"))
            if keys
        ]
        raise ValueError(f"{name} must hold the weights of {model}: {'; '.join(parts)}")
    for key, value in mine.items():
        if not isinstance(value, Tensor):
            continue
        other = theirs[key]
        if (
            not isinstance(other, Tensor)
            or other.shape != value.shape
            or other.dtype != value.dtype
        ):
            raise ValueError(
                f"{name} must hold the weights of {model}: {key!r} must be {came(value)}, got "
                f"{came(other)}"
            )


def check_optimizer(optimizer: torch.optim.Optimizer, theirs: Mapping[str, Any]) -> None:
    """Raise a ValueError if a state is not one of this optimizer, for these parameters."""
    mine = optimizer.state_dict()
    groups = [[entry.get("params") for entry in state["param_groups"]] for state in (mine, theirs)]
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    fits = groups[0] == groups[1] and all(
        isinstance(number, int)
        and 0 <= number < len(parameters)
        and all(
            not isinstance(value, Tensor)
            or value.dim() == 0
            or value.shape == parameters[number].shape
            for value in entry.values()
        )
        for number, entry in theirs["state"].items()
    )
    settings = [
        {name: value for name, value in group.items() if name != "params"}
        for group in mine["param_groups"]
    ]
    fits = fits and all(
        own.items() <= {**own, **group}.items()
        for own, group in zip(settings, theirs["param_groups"], strict=True)
    )
    if not fits:
        raise ValueError(
            f"optimizer must hold the state of {type(optimizer).__name__} for "
            f"{len(parameters)} parameters of these shapes, got another one"
        )


def write_checkpoint(state: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint, whole or not at all; it is on the disk when this returns.

    Raises:
        OSError: If it cannot be written; the message names file and disk, and what was there before
            is as it was.
    """
    write_atomically(path, lambda file: _save(state, file))


def write_atomically(path: Path, content: bytes | Callable[[BinaryIO], None]) -> None:
    """Write a file whose readers find the old content or the new, never a part.

    Args:
        path: The file; its folder must exist.
        content: What it shall hold, or a function that writes it.

    Raises:
        OSError: If it cannot be written; the message names file and disk.
    """
    temporary = path.with_name(path.name + ".partial")
    try:
        try:
            with open(temporary, "wb") as file:
                if callable(content):
                    content(file)
                else:
                    file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> OSError:
    """Return the error that says which file cannot be written, why, and how full its disk is."""
    text = f"{path} cannot be written: {error.strerror or error}"
    try:
        disk = shutil.disk_usage(existing(path.parent))
        text += f"; its disk has {disk.free:,} of {disk.total:,} bytes free"
    except OSError:
        pass  # it may be gone altogether
    named = OSError(text)
    named.errno = error.errno
    return named


def check_writable(folder: Path, size: int = 0) -> None:
    """Raise if files of so many bytes could not be written into a folder that may be yet to make.

    Raises:
        OSError: If something else has its name or that of a folder above it, if it may not be
            written to, or if its disk is too full.
    """
    parent = existing(folder)
    if not parent.is_dir():
        raise NotADirectoryError(
            f"out must be a path of folders, got the file {parent} in {folder}"
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"out must be in a folder that may be written to, got {parent}")
    disk = shutil.disk_usage(parent)
    if disk.free < size:
        raise OSError(
            f"out must be on a disk with {size:,} bytes free, got {disk.free:,} of {disk.total:,} "
            f"bytes for {folder}"
        )


def existing(path: Path) -> Path:
    """Return the path, or the nearest one above it that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def _check_archive(path: Path) -> int:
    """Raise a ValueError unless a file is a whole archive that unpacks to no more than its size."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(4)
    if not start:
        raise _refused(path, "an empty file")
    if start != b"PK\x03\x04":
        raise _refused(path, f"a file of something else, which begins with {start!r}")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
            packed = packed or sum(member.file_size for member in members) > size
            named = any(member.filename.endswith("data.pkl") for member in members)
            # torch compares no checksums
            damaged = archive.testzip() if named and not packed else None
    except Exception as error:  # of a damaged archive, zipfile raises more than it documents
        raise _refused(
            path, f"a damaged one, cut short or overwritten: {_first_line(error)}"
        ) from error
    if packed or not named:
        raise _refused(path, "an archive of something else")
    if damaged is not None:
        raise _refused(path, f"a damaged one: the bytes of {damaged} in it have changed")
    return size


def _refused(path: Path, found: str) -> ValueError:
    return ValueError(
        f"{path} must be a checkpoint of gpu-mixmatch train, got {found}. Take another copy of it, "
        "or begin anew in another folder"
    )


def _check_config(config: dict[str, Any]) -> None:
    for name, value in config.items():
        kinds = dict if name == "builder" else str | int | float | None
        if not isinstance(name, str) or not isinstance(value, kinds):
            raise TypeError(f"{name} of config must be a plain value, got {came(value)}")


def _check_data(data: dict[str, Any]) -> None:
    for name in _COUNTS:
        as_integer(f"{name} of data", data.get(name), least=1)
    for name in ("name", "digest"):
        if not isinstance(data.get(name), str):
            raise TypeError(f"{name} of data must be a text, got {came(data.get(name))}")
    classes = data.get("classes")
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if not isinstance(classes, list) or not named or len(classes) != data["num_classes"]:
        raise ValueError(
            f"classes of data must be {data['num_classes']} names, got {came(classes)}"
        )
    image = data.get("image")
    if not isinstance(image, list) or len(image) != 3:
        raise ValueError(f"image of data must be [C, H, W], got {came(image)}")
    for number in image:
        as_integer("image of data", number, least=1)


def _check_normalisation(values: dict[str, Any], channels: int) -> None:
    for name in ("mean", "std"):
        numbers = values.get(name)
        if not isinstance(numbers, list) or len(numbers) != channels:
            raise ValueError(
                f"{name} of normalisation must be {channels} numbers, one per channel, got "
                f"{came(numbers)}"
            )
        for number in numbers:
            as_number(f"{name} of normalisation", number)


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Find the tensors in dicts and lists, with the path to each."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _tensors(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _tensors(inner, f"{name}.{number}")


def _save(state: Mapping[str, Any], file: BinaryIO) -> None:
    """Write by torch, which tells of a full disk in words of its own."""
    recorded = _Recorded(file)
    with_checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        torch.save(dict(state), cast(Any, recorded))
    except RuntimeError:
        if recorded.error is not None:
            raise recorded.error from None
        raise
    finally:
        torch.serialization.set_crc32_options(with_checksums)


class _Recorded:
    """A file that remembers which error ended it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            return self.file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _sync_folder(folder: Path) -> None:
    """Let the new name of a file outlive a loss of power, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # a folder that may be written to but not read
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network disks have no such thing
    finally:
        os.close(descriptor)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _entries(state: Any) -> str:
    if not isinstance(state, dict):
        return f"a {type(state).__name__}"
    names = [str(name) for name in state]
    return f"{', '.join(names[:5]) or 'nothing'}" + (" and more" if len(names) > 5 else "")
