"""The compiled path for CPUs equals eager over odd shapes, whatever the threads, and is chosen."""

import importlib
import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

import gpu_mixmatch.impl as impl_module
from gpu_mixmatch import MixMatch, WeakAugment, functional
from gpu_mixmatch._buffers import Workspace
from gpu_mixmatch._validation import image_layout
from gpu_mixmatch.augment import keyed
from gpu_mixmatch.impl import eager, implementation, resolve_impl
from gpu_mixmatch.types import AugmentPolicy, DrawPlan, MixUpParams
from tests.factories import LinearNet, random_images
from tests.tolerances import TOLERANCES

compiled = pytest.importorskip("gpu_mixmatch.impl.numba", reason="needs numba")
threads = importlib.import_module("gpu_mixmatch.impl.numba.threads")

SHAPES = [(3, 32, 32), (1, 31, 33), (4, 5, 13), (3, 3, 96), (3, 1, 1)]
POLICIES = {
    "shift": {"padding": 2, "flip": 0.5},
    "zoom": {"padding": 0, "zoom_px": (0, 3), "flip": 0.5},
    "blur": {"padding": 2, "flip": 0.5, "blur_sigma": (0.0, 2.0)},
    "all": {"padding": 2, "zoom_px": (0, 3), "flip": 0.5, "blur_sigma": (0.0, 2.0)},
}
PER_CHANNEL = {"mean": (0.5, 0.4, 0.45, 0.3), "std": (0.25, 0.3, 0.27, 0.5)}


def views_of(impl, images, rows, policy, mixup=None, workspace=None, **fields):
    fields = {"layout": "NCHW", **fields}  # of images as small as these
    augment = WeakAugment(**POLICIES[policy], impl=impl, **fields)
    params = augment.draw(seed=1, step=2, ids=rows)
    channels, height, width = image_layout("images", images[0], augment.layout)[1]
    layout = torch.channels_last if augment.channels_last else torch.contiguous_format
    out = torch.full((rows, channels, height, width), float("nan"), dtype=augment.dtype)
    out = out.to(memory_format=layout)
    return augment.apply(images, params, mixup=mixup, out=out, workspace=workspace)


def assert_equal_views(images, rows, policy, mixup=None, **fields):
    wanted, found = (
        views_of(impl, images, rows, policy, mixup, **fields) for impl in ("eager", "numba")
    )
    assert found.stride() == wanted.stride()
    tolerance = TOLERANCES[found.dtype]
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=0)


def params_for(rows):
    generator = torch.Generator().manual_seed(3)
    lam = torch.rand(rows, generator=generator) / 2 + 0.5
    return MixUpParams(lam, torch.randperm(rows, generator=generator))


def fitting(policy, shape, mode):
    """A 1 px image has no reflection."""
    reflects = mode == "reflect" and POLICIES[policy]["padding"] > 0
    if reflects and min(shape[1:]) <= POLICIES[policy]["padding"]:
        pytest.skip("the image is smaller than its padding")


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("mode", ["reflect", "zeros", "edge"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_views_equal_those_of_eager(shape, policy, mode, channels_last, mixes):
    fitting(policy, shape, mode)
    images = random_images(3, shape), random_images(4, shape, seed=1)
    rows = 3 + 2 * 4
    mixup = params_for(rows) if mixes else None
    assert_equal_views(images, rows, policy, mixup, padding_mode=mode, channels_last=channels_last)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_shifted_views_equal_those_of_eager_to_the_last_bit(shape, channels_last):
    images = random_images(3, shape), random_images(4, shape, seed=1)
    fields = {name: values[: shape[0]] for name, values in PER_CHANNEL.items()}
    for policy in (fields, {"mean": 0.5, "std": 0.5}):
        wanted, found = (
            views_of(impl, images, 11, "shift", channels_last=channels_last, **policy)
            for impl in ("eager", "numba")
        )
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nhwc", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_layouts_and_dtypes_of_images_equal_eager(nhwc, channels_last, dtype, policy, mixes):
    shape = (4, 9, 13)
    images = tuple(
        random_images(count, shape, nhwc=nhwc, dtype=dtype, seed=count) for count in (2, 3)
    )
    fields = {name: values[:4] for name, values in PER_CHANNEL.items()}
    mixup = params_for(8) if mixes else None
    fields["layout"] = "NHWC" if nhwc else "NCHW"
    assert_equal_views(images, 8, policy, mixup, channels_last=channels_last, **fields)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_dtypes_of_views_equal_eager(policy, channels_last, dtype):
    images = (random_images(5, (3, 9, 7)),)
    assert_equal_views(images, 10, policy, dtype=dtype, channels_last=channels_last)
    assert_equal_views(images, 10, policy, params_for(10), dtype=dtype)


@pytest.mark.parametrize("policy", POLICIES)
def test_no_rows_and_one_row(policy):
    for rows in (0, 1):
        assert_equal_views((random_images(rows, (3, 9, 7)),), rows, policy)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mixes", [False, True])
def test_threads_change_no_bit(monkeypatch, policy, mixes):
    images = random_images(5, (3, 9, 7)), random_images(7, (3, 9, 7), seed=1)
    mixup = params_for(19) if mixes else None
    alone = views_of("numba", images, 19, policy, mixup)
    monkeypatch.setattr(threads, "_LEAST_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for team in (threads._torch_team(), None):  # torch's threads, then our own
        monkeypatch.setattr(threads, "_torch_team", lambda team=team: team)
        assert torch.equal(views_of("numba", images, 19, policy, mixup), alone)


@pytest.mark.parametrize("with_team", [True, False])
def test_every_part_runs_once_and_errors_arrive(monkeypatch, with_team):
    if with_team and threads._torch_team() is None:
        pytest.skip("torch is not built with GNU OpenMP here")
    if not with_team:
        monkeypatch.setattr(threads, "_torch_team", lambda: None)
    done = []
    threads.in_threads(done.append, 5)
    assert sorted(done) == list(range(5))

    def fail(part):
        if part == 1:
            raise ArithmeticError("of a part")

    with pytest.raises(ArithmeticError, match="of a part"):
        threads.in_threads(fail, 3)


def test_builders_in_several_threads_do_not_disturb_each_other(monkeypatch):
    monkeypatch.setattr(threads, "_LEAST_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    images = random_images(5, (3, 9, 7)), random_images(7, (3, 9, 7), seed=1)
    wanted = views_of("numba", images, 19, "all")
    same = []

    def repeat():
        same.extend(torch.equal(views_of("numba", images, 19, "all"), wanted) for _ in range(50))

    workers = [threading.Thread(target=repeat) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert same == [True] * 150


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_mixup_equals_eager(layout, dtype):
    inputs = torch.rand(9, 3, 5, 7).to(dtype).to(memory_format=layout)
    targets = torch.softmax(torch.rand(9, 10), dim=1)
    params = params_for(9)
    found, wanted = (
        functional.mixup(inputs, targets, params, impl=impl) for impl in ("numba", "eager")
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCES[dtype], rtol=0)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mixes_bytes", [False, True])
def test_batches_equal_those_of_eager(monkeypatch, mixes_bytes, policy):
    monkeypatch.setattr(keyed, "_LEAST_TO_MIX_BYTES", 0 if mixes_bytes else 2**40)
    x, u = random_images(4, (3, 9, 7)), random_images(6, (3, 9, 7), seed=1)
    y = torch.arange(4) % 3
    model = LinearNet(3, (3, 9, 7))
    for reuse_buffers in (False, True):
        builders = [
            MixMatch(
                WeakAugment(**POLICIES[policy], impl=impl),
                3,
                reuse_buffers=reuse_buffers,
                impl=impl,
            )
            for impl in ("numba", "eager")
        ]
        for _ in range(3):
            found, wanted = (builder(x, y, u, model) for builder in builders)
            assert torch.equal(found.params.lam, wanted.params.lam)
            assert torch.equal(found.params.index, wanted.params.index)
            torch.testing.assert_close(found.inputs, wanted.inputs, atol=4e-6, rtol=0)
            torch.testing.assert_close(found.targets, wanted.targets, atol=4e-6, rtol=0)


def test_a_workspace_is_used_again_for_other_shapes():
    workspace = Workspace()
    for count, policy in ((3, "all"), (5, "shift"), (3, "all"), (2, "zoom")):
        images = (random_images(count, (3, 9, 7)),)
        found = views_of("numba", images, 2 * count, policy, workspace=workspace).clone()
        wanted = views_of("eager", images, 2 * count, policy)
        torch.testing.assert_close(found, wanted, atol=4e-6, rtol=0)


@pytest.mark.parametrize("index", [-1, 3])
def test_partners_that_do_not_exist_are_refused(index):
    params = MixUpParams(torch.ones(3), torch.tensor([0, 1, index]))
    with pytest.raises(ValueError, match=r"params.index in 0 \.\. N - 1 = 2, got 1 \.\. 1 and "):
        functional.mixup(torch.ones(3, 4), torch.ones(3, 2), params, impl="numba")
    augment = WeakAugment(padding=2, impl="numba")
    draws = augment.draw(seed=0, step=0, ids=3)
    with pytest.raises(ValueError, match=r"params.index in 0 \.\. N - 1 = 2, got 1 \.\. 1 and "):
        augment.apply(random_images(3, (3, 9, 7)), draws, mixup=params)


def test_auto_is_the_compiled_path_on_a_cpu():
    assert implementation("auto", torch.device("cpu")) is compiled
    assert "impl='auto' -> numba on cpu" in repr(MixMatch(WeakAugment.cifar10(), 10))
    assert not MixMatch(WeakAugment.cifar10(), 10).runs_kernels


def test_another_device_is_refused():
    with pytest.raises(RuntimeError, match=r'impl="numba" cannot run on cuda: .* for CPUs'):
        implementation("numba", torch.device("cuda"))


def test_without_numba_auto_is_eager_with_one_warning_and_a_request_raises(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setitem(sys.modules, "numba", None)
    for name in [name for name in sys.modules if name.startswith("gpu_mixmatch.impl.numba")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(impl_module, "numba", raising=False)
    monkeypatch.setitem(impl_module._installed, "numba", True)
    monkeypatch.setattr(impl_module, "_warned_of", set())
    implementation.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"auto.* runs plain torch on cpu.*pip install"):
            assert implementation("auto", cpu) is eager
        assert resolve_impl("auto", cpu) == "eager"
        implementation.cache_clear()
        implementation("auto", cpu)  # warns no second time
        with pytest.raises(RuntimeError, match=r"cannot run on cpu: .*numba.*pip install"):
            implementation("numba", cpu)
    finally:
        implementation.cache_clear()


def test_draws_are_those_of_every_implementation():
    drawn = [
        functional.draw_batch(
            7,
            torch.tensor(3),
            5,
            6,
            DrawPlan(policy=AugmentPolicy(padding=4, flip=0.5)),
            device=torch.device("cpu"),
            impl=impl,
        )
        for impl in ("eager", "numba")
    ]
    (augment, mixup), (other_augment, other_mixup) = drawn
    for one, other in zip((*augment, *mixup), (*other_augment, *other_mixup), strict=True):
        assert torch.equal(one, other)


def test_without_a_place_for_what_is_compiled_every_process_compiles():
    code = """
        import torch
        from gpu_mixmatch import WeakAugment
        images = torch.zeros(2, 3, 5, 5, dtype=torch.uint8)
        augment = WeakAugment(padding=1, mean=0.0, std=1.0, impl="numba")
        print(augment(images, seed=0, step=0).sum())
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "NUMBA_CACHE_DIR": os.path.join(os.devnull, "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stdout == "tensor(0.)\n", ended.stderr
