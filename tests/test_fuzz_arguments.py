"""Whatever comes as an argument is taken, or refused by its name; nothing else happens."""

import inspect
import math

import numpy as np
import pytest
import torch

import gpu_mixmatch
from gpu_mixmatch import augment, data, functional, insight, losses, presets, sampling
from gpu_mixmatch.insight import preview
from tests.fuzz_calls import CALLS, NOT_CALLED, drawing, reading

BAD = {
    "None": None,
    "text": "x",
    "no text": "",
    "fraction": 1.5,
    "negative": -1,
    "zero": 0,
    "nan": math.nan,
    "inf": math.inf,
    "huge": 2**70,
    "more digits than Python prints": 10**5000,
    "True": True,
    "list": [],
    "list of numbers": [1, 2],
    "pair": (3, 1),
    "pair of no numbers": (None, "x"),
    "pair with nan": (math.nan, 1.0),
    "dict": {},
    "object": object(),
    "class": int,
    "numpy float": np.float64(-2.5),
    "numpy integer": np.int64(-3),
    "array": np.zeros((2, 3)),
    "array of integers": np.arange(3, dtype=np.int32),
    "array of objects": np.array([None, "x"], dtype=object),
    "0-d array": np.array(1),
    "no values": torch.empty(0),
    "0-d tensor": torch.tensor(2.5),
    "tensor of nan": torch.full((4, 3, 6, 6), math.nan),
    "tensor of bytes": torch.zeros(3, 5, dtype=torch.uint8),
    "tensor of integers": torch.full((4,), 10**6),
    "tensor of small integers": torch.full((4,), 10**6, dtype=torch.int32),
    "complex tensor": torch.zeros(4, 3, dtype=torch.complex64),
    "tensor without values": torch.empty(4, 3, 6, 6, device="meta"),
    "sparse tensor": torch.zeros(4, 3).to_sparse(),
    "list of a tensor": [torch.zeros(4, 3, 6, 6)],
}


def problem_of(call, name, bad):
    """What is wrong with the answer to a bad value of the argument ``name``, or None."""
    arguments = {**call.arguments(), name: bad}
    try:
        call.function(**arguments)
    except (TypeError, ValueError, *call.errors) as error:
        named = any(text in str(error) for text in (name, *call.names.get(name, ())))
        return None if named or type(error) in call.errors else f"does not name it: {error!r}"
    except Exception as error:
        return repr(error)
    return None


def problems_of(call):
    found = []
    for name in call.arguments():
        for kind, bad in BAD.items():
            problem = problem_of(call, name, bad)
            if problem:
                found.append(f"{name} = {kind}: {problem[:300]}")
    return found


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:model returns rows")
def test_a_bad_argument_is_refused_by_its_name(name):
    call = CALLS[name]
    call.function(**call.arguments()) if name != "capture" else None  # which needs CUDA
    assert problems_of(call) == []


@pytest.mark.filterwarnings("ignore:model returns rows")
def test_a_bad_argument_of_a_picture_is_refused_by_its_name(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)  # a text is a path
    for name in ("draw_heading", "draw_guesses", "draw_pairs"):  # the slow part
        monkeypatch.setattr(preview, name, lambda *_, **__: None)
    for call in drawing(tmp_path).values():
        call.function(**call.arguments())
        assert problems_of(call) == []


READING = {
    *("ImageFiles", "check_images", "image_folder", "file_list", "web_dataset", "tfrecords"),
    "load_dataset",
}


@pytest.mark.filterwarnings("ignore::gpu_mixmatch.data.index.LeftOutWarning")
def test_a_bad_argument_of_what_reads_files_is_refused_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a text is a path
    calls = reading(tmp_path)
    assert calls.keys() == READING
    for call in calls.values():
        call.function(**call.arguments())
        assert problems_of(call) == []


def test_a_problem_is_seen():
    call = CALLS["linear_rampup"]
    for wrong in (lambda **_: {}["step"], lambda **_: int("rampup")):
        assert problem_of(call._replace(function=wrong), "step", None)
    assert not problem_of(call, "step", None)


def public_names(module):
    names = getattr(module, "__all__", None)
    if names is None:
        members = inspect.getmembers(module, lambda m: inspect.isfunction(m) or inspect.isclass(m))
        names = [name for name, member in members if member.__module__ == module.__name__]
    return {name for name in names if not name.startswith("_") or name == "__version__"}


@pytest.mark.parametrize(
    "module",
    [gpu_mixmatch, functional, sampling, presets, losses, augment, data, insight],
    ids=lambda module: module.__name__,
)
def test_all_that_is_public_is_called(module):
    assert public_names(module) - CALLS.keys() - NOT_CALLED - READING - {"draw_preview"} == set()
