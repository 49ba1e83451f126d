"""The examples: each runs as a user runs it, fits on a page, and prints what it claims."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# The labels alone give about 8 % (README); a guess would give 90 %.
MOST_ERROR = 6.0  # in percent
TIME_LIMIT = 300  # seconds


def stem(path):
    return path.stem


def output_of(name):
    """What an example prints, in an interpreter of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [str(ROOT), environment.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py")],
        env={
            **environment,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        },
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def error_of(output):
    error = float(re.search(r"test error (\d+\.\d) %", output)[1])
    assert 0 < error < MOST_ERROR
    return error


@pytest.mark.slow
def test_plain_loop_and_the_trainers_that_run_it_end_with_one_error():
    names = ["plain"]
    for name, package in (("accelerate_loop", "accelerate"), ("lightning_module", "lightning")):
        if find_spec(package):
            names.append(name)
    errors = {name: error_of(output_of(name)) for name in names}
    if not torch.cuda.is_available():  # a GPU need not sum in one order
        assert len(set(errors.values())) == 1, errors


@pytest.mark.slow
def test_kornia_engine_learns_digits_from_40_labels():
    error_of(output_of("kornia_engine"))


@pytest.mark.slow
def test_fixmatch_learns_digits_from_40_labels_and_says_what_it_kept():
    output = output_of("fixmatch")
    assert 50 < int(re.match(r"kept (\d+)% of the guesses, ", output)[1]) <= 100
    error_of(output)


@pytest.mark.slow
def test_hugging_face_trainer_learns_digits_from_40_labels():
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    error_of(output_of("hf_trainer"))


@pytest.mark.slow
def test_own_images_are_read_from_files_and_learnt():
    pytest.importorskip("PIL")
    output = output_of("own_images")
    assert output.startswith("40 labelled and 1297 unlabelled files, ")
    error_of(output)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_graph_example_says_that_it_needs_a_cuda_device():
    assert output_of("cuda_graph") == ("no CUDA device here: nothing to capture\n")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graph_example_learns_digits_from_40_labels():
    error_of(output_of("cuda_graph"))


@pytest.mark.parametrize("path", EXAMPLES, ids=stem)
def test_example_fits_on_a_page_and_hides_no_package(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 60
    assert text.startswith('"""')
    imported = set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE))
    assert "gpu_mixmatch" in imported
    assert not imported & {example.stem for example in EXAMPLES}
