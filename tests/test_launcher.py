"""The launcher against Triton's own, without a GPU: the driver and the compiler are recorders.

Kernels must not be interpreted here, as they are in the other tests, so that these run in a process
of their own.
"""

import importlib
import itertools
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.skips import skip_without

triton = skip_without("triton")
tl = importlib.import_module("triton.language")

ROOT = Path(__file__).parent.parent
OWN_PROCESS = os.environ.get("TRITON_INTERPRET") == "0"
in_own_process = pytest.mark.skipif(
    not OWN_PROCESS, reason="runs in the process of test_all_passes_where_kernels_are_compiled"
)
_FACTOR = tl.constexpr(3)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["anywhere_ptr", "length"])
def some_kernel(
    out_ptr, anywhere_ptr, maybe, count, stride, length, size: tl.constexpr, mode: tl.constexpr
):
    tl.store(out_ptr, _FACTOR)


@pytest.mark.skipif(OWN_PROCESS, reason="this is that process")
def test_all_passes_where_kernels_are_compiled():
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", __file__],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


class Recorder:
    """A driver that takes down launches, and a compiler that takes down what it is asked for."""

    def __init__(self):
        from benchmarks.host import Driver

        class Recording(Driver):
            def launcher_cls(driver, source, metadata):  # noqa: N805
                return lambda *arguments: self.launches.append(arguments)

        self.driver = Recording(next(_devices))
        self.launches, self.compiled, self.bound = [], [], 0

    def compile(self, source, target=None, options=None, **_):
        from triton.compiler import CompiledKernel

        kernel = CompiledKernel.__new__(CompiledKernel)
        kernel.src, kernel.name, kernel.kernel = source, source.name, b""
        kernel.metadata = SimpleNamespace(shared=0, num_warps=options["num_warps"], target=target)
        kernel.packed_metadata = (options["num_warps"], 1, 0)
        kernel.module = kernel.function = kernel._run = None
        kernel.hash, kernel.metadata_group = source.hash(), {}  # which reads the globals
        self.compiled.append((source.signature, source.constants, source.attrs, options))
        return kernel

    def last(self):
        """The last launch, and how many there were since it was asked for."""
        launch, count = self.launches[-1], len(self.launches)
        self.launches.clear()
        return launch, count


_devices = itertools.count(1000)  # a new one for each test: Triton keeps kernels by it


@pytest.fixture
def recorder(monkeypatch):
    from triton import compiler
    from triton.runtime import JITFunction
    from triton.runtime import driver as config

    recorder, run = Recorder(), JITFunction.run

    def counted(*args, **kwargs):
        recorder.bound += 1
        return run(*args, **kwargs)

    monkeypatch.setattr(config, "_active", recorder.driver)
    monkeypatch.setattr(compiler, "compile", recorder.compile)
    monkeypatch.setattr(JITFunction, "run", counted)
    monkeypatch.setattr(launcher(), "_variants", {})
    return recorder


def launcher():
    return importlib.import_module("gpu_mixmatch.impl.triton.launch")


def some_arguments(**changes):
    arguments = {
        "out": torch.zeros(8),
        "anywhere": torch.zeros(8)[1:],
        "maybe": None,
        "count": 64,
        "stride": 32,
    }
    values = {**arguments, **changes}
    return (*values.values(), torch.zeros(4))


OPTIONS = {"size": 32, "mode": "reflect", "num_warps": 4}


def assert_same_launch(ours, theirs):
    assert len(ours) == len(theirs)
    *_, function, packed = ours[:6]
    assert ours[:6] == theirs[:6]
    assert function is not None
    assert packed is not None
    # then what tells hooks of the launch, the hooks, and the arguments
    for mine, other in zip(ours[9:], theirs[9:], strict=True):
        assert mine is other


def run_twice(recorder, kernel, programs, *args, **options):
    """Launch by Triton, then twice by us: what was launched by Triton and by the second of ours."""
    kernel[(programs,)](*args, **options)
    theirs, _ = recorder.last()
    launcher().run(kernel, programs, *args, **options)
    bound = recorder.bound
    launcher().run(kernel, programs, *args, **options)
    ours, count = recorder.last()
    assert count == 2
    return theirs, ours, recorder.bound - bound


@in_own_process
@pytest.mark.parametrize("effects", ["shift", "zoom and blur"])
def test_every_kernel_of_a_step_is_launched_as_triton_launches_it_and_bound_once(recorder, effects):
    from benchmarks.kernels import REGIMES, launches_of

    launches = [launch for part in launches_of(REGIMES[0], effects) for launch in part]
    assert len(launches) >= 6
    for kernel, programs, arguments, options in launches:
        theirs, ours, bound = run_twice(recorder, kernel, programs, *arguments, **options)
        assert bound == 0, kernel.__name__
        assert_same_launch(ours, theirs)
        assert ours[0] == programs


@in_own_process
def test_every_kernel_of_consistency_methods_is_launched_as_triton_launches_it(recorder):
    from benchmarks.family_kernels import launches_of

    for kernel, programs, arguments, options in launches_of(10, 4, 28):
        theirs, ours, bound = run_twice(recorder, kernel, programs, *arguments, **options)
        assert bound == 0, kernel.__name__
        assert_same_launch(ours, theirs)


@in_own_process
@pytest.mark.parametrize("effects", ["shift", "zoom and blur"])
def test_a_batch_of_another_size_or_alignment_is_not_bound_again(recorder, effects):
    from benchmarks.kernels import LAST_SIZES, REGIMES, launches_of

    bound = []
    for number, sizes in enumerate(zip(LAST_SIZES, reversed(LAST_SIZES), strict=True)):
        before = recorder.bound
        for part in launches_of(REGIMES[0], effects, *sizes, start=(16, 1)[number % 2]):
            for kernel, programs, arguments, options in part:
                launcher().run(kernel, programs, *arguments, **options)
        bound.append(recorder.bound - before)
    assert bound[0] >= 6
    assert bound[2:] == [0] * len(bound[2:])  # the first two may differ in whether there are ids


@in_own_process
def test_no_two_launches_of_one_key_are_compiled_differently(recorder):
    """Over many lists of arguments, against the key that Triton's own binder makes of them."""
    from triton.runtime.jit import compute_cache_key

    aligned, dtypes = torch.zeros(64), (torch.float32, torch.float16, torch.int64, torch.uint8)
    pointers = [
        *(torch.zeros(8, dtype=dtype) for dtype in dtypes),
        aligned[1:],
        aligned[4:],
        torch.zeros(8, dtype=torch.float16)[1:],
        torch.zeros(8, dtype=torch.bool),
        torch.nn.Parameter(torch.zeros(4)),
        None,
    ]
    limits = (2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**40, 2**63 - 1, 2**63)
    numbers = [*range(-1, 4), 15, 16, 17, 32, *limits]
    anything = [*pointers, *numbers, 1.0, 0.5, 16.0, True, False, torch.float32]
    choices = (anything, pointers, anything, numbers, numbers, anything)
    constants = {"size": [1, 16, 32], "mode": ["zeros", "reflect"], "num_warps": [1, 4]}
    variants = launcher()._Variants(some_kernel)
    _, known, _, _, binder = some_kernel.device_caches[recorder.driver.device]
    generator = random.Random(0)
    found, told = {}, 0
    for _ in range(20_000):
        args = tuple(map(generator.choice, choices))
        options = {name: generator.choice(values) for name, values in constants.items()}
        if not variants.tells(args, options):
            continue
        told += 1
        _, specialization, bound = binder(*args, **options)
        theirs = compute_cache_key(known, specialization, bound)
        assert found.setdefault(variants.key(7, args, options), theirs) == theirs, args
    assert told > 3_000
    assert len(set(found.values())) > 500
    device = variants.key(8, args, options)
    assert device != variants.key(7, args, options)


@in_own_process
@pytest.mark.parametrize(
    "changes",
    [
        {"out": torch.zeros(8, dtype=torch.float16)},
        {"out": torch.zeros(8)[1:]},
        {"maybe": torch.zeros(3)},
        {"maybe": 0.5},
        {"count": 2**31},
        {"stride": 1},
        {"stride": 33},
    ],
    ids=str,
)
def test_other_arguments_are_compiled_anew(recorder, changes):
    for arguments in (some_arguments(), some_arguments(**changes)):
        launcher().run(some_kernel, 5, *arguments, **OPTIONS)
        launcher().run(some_kernel, 5, *arguments, **OPTIONS)
    assert recorder.bound == len(recorder.compiled) == 2
    assert recorder.compiled[0][:3] != recorder.compiled[1][:3]
    launched = [launch[9:15] for launch in recorder.launches]
    assert all(mine is other for mine, other in zip(*launched[:2], strict=True))
    assert all(mine is other for mine, other in zip(*launched[2:], strict=True))


@in_own_process
def test_the_same_kind_of_arguments_is_kept_wherever_they_begin_and_however_many(recorder):
    launcher().run(some_kernel, 5, *some_arguments(), **OPTIONS)
    for changes in ({"count": 1}, {"count": 16}, {"anywhere": torch.zeros(16)}, {"stride": 48}):
        launcher().run(some_kernel, 5, *some_arguments(**changes), **OPTIONS)
    assert recorder.bound == len(recorder.compiled) == 1
    assert [launch[0] for launch in recorder.launches] == [5] * 5
    assert recorder.launches[-1][13] == 48


@in_own_process
@pytest.mark.parametrize(
    "changes",
    [{"maybe": torch.nn.Parameter(torch.zeros(3))}, {"maybe": True}, {"count": 2**63}],
    ids=["a subclass", "a truth", "beyond int64"],
)
def test_what_a_key_does_not_tell_is_left_to_triton(recorder, changes):
    for _ in range(2):
        launcher().run(some_kernel, 5, *some_arguments(**changes), **OPTIONS)
    assert recorder.bound == len(recorder.launches) == 2


@in_own_process
def test_arguments_by_name_are_left_to_triton(recorder):
    *first, length = some_arguments()
    for _ in range(2):
        launcher().run(some_kernel, 5, *first, length=length, **OPTIONS)
    assert recorder.bound == len(recorder.launches) == 2


@in_own_process
def test_each_device_has_a_kernel_of_its_own(recorder):
    devices = [recorder.driver.device, next(_devices)]
    functions = []
    for device in devices * 2:
        recorder.driver.device = device
        launcher().run(some_kernel, 5, *some_arguments(), **OPTIONS)
        functions.append(recorder.launches[-1][4])
    assert functions == [1000 + device for device in devices * 2]
    assert recorder.bound == 2


@in_own_process
@pytest.mark.parametrize("which", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_are_told_of_a_launch_as_triton_tells_them(recorder, monkeypatch, which):
    from triton import knobs

    chain = getattr(knobs.runtime, which)
    theirs, ours, _ = run_twice(recorder, some_kernel, 5, *some_arguments(), **OPTIONS)
    assert ours[6:9] == (None, None, None)
    monkeypatch.setattr(chain, "calls", [lambda metadata: None])
    theirs, ours, bound = run_twice(recorder, some_kernel, 5, *some_arguments(), **OPTIONS)
    assert bound == 0
    assert chain in ours[7:9]
    assert ours[7:9] == theirs[7:9]
    assert ours[6].get() == theirs[6].get()
    assert ours[6].get()["name"] == "some_kernel"


@in_own_process
@pytest.mark.parametrize("watched", ["debug", "instrumentation_mode", "pre_run_hooks"])
def test_a_launch_that_is_watched_is_bound_by_triton(recorder, monkeypatch, watched):
    from triton import knobs

    launcher().run(some_kernel, 5, *some_arguments(), **OPTIONS)
    if watched == "debug":
        monkeypatch.setattr(knobs.runtime, "debug", True)
    elif watched == "instrumentation_mode":
        monkeypatch.setattr(knobs.compilation, "instrumentation_mode", "fpsan")
    else:
        monkeypatch.setattr(some_kernel, "pre_run_hooks", [lambda *_, **__: None])
    for _ in range(2):
        launcher().run(some_kernel, 5, *some_arguments(), **OPTIONS)
    assert recorder.bound == len(recorder.launches) == 3


@in_own_process
def test_a_global_that_has_changed_since_is_refused_as_triton_refuses_it(recorder, monkeypatch):
    for _ in range(2):
        launcher().run(some_kernel, 5, *some_arguments(), **OPTIONS)
    monkeypatch.setitem(some_kernel.fn.__globals__, "_FACTOR", tl.constexpr(4))
    with pytest.raises(RuntimeError, match="Global variable _FACTOR has changed"):
        launcher().run(some_kernel, 5, *some_arguments(), **OPTIONS)
    monkeypatch.undo()
    assert recorder.bound == 2


@in_own_process
def test_versions_that_were_not_read_are_left_to_triton(recorder, monkeypatch):
    assert launcher().KEEPS_KERNELS
    monkeypatch.setattr(launcher(), "KEEPS_KERNELS", False)
    for _ in range(2):
        launcher().run(some_kernel, 5, *some_arguments(), **OPTIONS)
    assert recorder.bound == len(recorder.launches) == 2


@pytest.mark.gpu
def test_kept_kernels_give_what_bound_ones_do_on_every_stream_and_in_a_graph(monkeypatch):
    if OWN_PROCESS or not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from gpu_mixmatch import MixMatch, WeakAugment, capture

    x, u = (torch.randint(256, (n, 3, 16, 16), dtype=torch.uint8, device="cuda") for n in (5, 7))
    y = torch.arange(5, device="cuda") % 4
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 4)).cuda()

    def batches():
        mixmatch = MixMatch(WeakAugment(), 4, seed=3).cuda()
        found = [mixmatch(x, y, u, model) for _ in range(2)]
        with torch.cuda.stream(torch.cuda.Stream()):
            found.append(mixmatch(x, y, u, model))
        torch.cuda.synchronize()
        captured = capture(mixmatch, model, x, y, u)(x, y, u)
        return [*(batch.inputs for batch in found), captured.inputs.clone()]

    kept = batches()
    monkeypatch.setattr(launcher(), "KEEPS_KERNELS", False)
    monkeypatch.setattr(launcher(), "_variants", {})
    for mine, other in zip(kept, batches(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.slow
@pytest.mark.skipif(OWN_PROCESS, reason="once is enough")
def test_the_host_is_timed_beside_another_checkout(tmp_path):
    file = tmp_path / "host.json"
    command = ["-m", "benchmarks.host", "--quick", "--against", ".", "--json", str(file)]
    result = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    from benchmarks import host, schema

    rows = schema.load(file)["rows"]
    assert [(row["case"], row["contender"]) for row in rows] == [
        (case, contender) for case in host.CASES for contender in (host.NOW, host.BEFORE)
    ]
    medians = {row["case"]: row["median_ms"] for row in rows}
    for effects in host.BUILDERS:  # what is left out of a launch is not all of it
        alone = medians[f"{host.UNLAUNCHED}: {effects}"]
        assert 0 < alone < 2 * medians[f"{host.LAUNCHED}: {effects}"]
