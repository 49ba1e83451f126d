"""The operations as torch.library ops: fakes, schemas, gradients, and compiled graphs."""

import warnings

import pytest
import torch
from torch.autograd import gradcheck
from torch.library import opcheck

from gpu_mixmatch import (
    ColorJitter,
    MixMatch,
    MixMatchLoss,
    RandAugment,
    WeakAugment,
    _unchecked,
    functional,
    sampling,
)
from gpu_mixmatch._keys import CountedKey
from gpu_mixmatch.impl import library as ops
from gpu_mixmatch.types import AugmentPolicy, DrawPlan
from tests.factories import ConvNet, random_data, random_images

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
NUM_CLASSES = 5
POLICY = AugmentPolicy(2, (0, 3), 0.5, (0.0, 0.6))

both = pytest.mark.parametrize("impl", ["eager", "triton"])
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda]),
]


def random(*shape, dtype=torch.float32, seed=0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(DEVICE, dtype)


def targets_of(*shape):
    return random(*shape, seed=1).softmax(dim=-1)


def mixup_params(num_x=2, num_u=3):
    return [field.to(DEVICE) for field in sampling.draw_mixup(0, 0, num_x, num_u)]


# What opcheck looks at: schema, mutation, aliases, fake tensors, autograd, symbolic shapes


@both
@pytest.mark.parametrize("policy", [None, POLICY, AugmentPolicy(padding=4)])
@pytest.mark.parametrize("with_ids", [False, True])
def test_draw_batch_passes_opcheck(impl, policy, with_ids):
    ids = (torch.tensor([7, 8]), torch.tensor([1, 2**40, 3])) if with_ids else (None, None)
    ids = [None if each is None else each.to(DEVICE) for each in ids]
    step = torch.tensor(4)
    numbers = ops.flat_policy(policy)
    words = sampling.words_per_row(with_augment=policy is not None)
    out = torch.zeros(8 * words, dtype=torch.int32, device=DEVICE)
    switches = (2, numbers, [], 0.75, "sample", "all", False, 0, out, impl)
    opcheck(ops.draw_batch, (0, step, *ids, 2, 3, *switches))


def test_a_key_that_counts_on_does_so_in_a_compiled_program():
    key, plan = CountedKey(DEVICE), DrawPlan(2, None)
    key.words(1)
    key.send(4, 6)

    def draw():
        options = {"device": DEVICE, "key": key, "impl": "triton"}
        return _unchecked.draw_batch(0, torch.tensor(0), 4, 5, plan, **options)[1].index

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    for step in (6, 7):
        expected = sampling.draw_batch(4, step, 4, 5, plan)[1].index
        assert torch.equal(compiled().cpu(), expected)


def test_a_policy_survives_becoming_numbers():
    for policy in (None, POLICY, AugmentPolicy(), AugmentPolicy(3, (1, 4), 0.3)):
        assert ops.policy_of(ops.flat_policy(policy)) == policy


@pytest.mark.parametrize(
    "augment",
    [
        RandAugment.fixmatch(),
        RandAugment.usb(WeakAugment.imagenet((24, 20))),
        RandAugment(cutout=8, cutout_color=(1, 2, 3), outside="black"),
        ColorJitter(gray=0.2, prob=0.8),
        WeakAugment(size=24),
        WeakAugment(area=(0.5, 0.9), aspect=(1.0, 1.5)),
    ],
    ids=["fixmatch", "usb", "colours", "jitter", "crop", "resized"],
)
def test_a_cut_and_a_chain_survive_becoming_numbers(augment):
    policy = augment.policy
    numbers = ops.flat_policy(policy), ops.flat_parts(policy.cut, policy.chain)
    assert ops.policy_of(*numbers) == policy
    assert all(type(number) is float for number in numbers[1])


@pytest.mark.parametrize("augment", [RandAugment.fixmatch(cutout=4), WeakAugment.imagenet(8)])
def test_a_compiled_chain_gives_the_same_views(augment):
    images = random_images(4, (3, 9, 9), seed=1)
    params = augment.draw(0, 3, 4)
    compiled = torch.compile(augment.apply, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images, params), augment.apply(images, params))


@both
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_augment_passes_opcheck(impl, per_channel, mixed):
    x, u = (random_images(n, (3, 8, 9), seed=n).to(DEVICE) for n in (2, 3))
    params = sampling.draw_augment(0, 0, 8, 0, padding=2, zoom_px=(0, 2), flip=0.5)
    arguments = {
        "sources": [x, u],
        "params": [field.to(DEVICE) for field in params],
        "mixup": mixup_params() if mixed else [],
        "per_channel": [random(3), random(3)] if per_channel else [],
        "scale": 2.0,
        "bias": -1.0,
        "padding": 2,
        "padding_mode": "reflect",
        "zoom": True,
        "blur_radius": 0,
        "cut_and_chain": [],
        "channels_last_in": False,
        "out": torch.zeros(8, 3, 8, 9, device=DEVICE),
        "impl": impl,
    }
    opcheck(ops.augment, tuple(arguments.values()))


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_guess_labels_passes_opcheck(impl, dtype):
    out = torch.zeros(3, NUM_CLASSES, device=DEVICE)
    opcheck(ops.guess_labels, (random(2, 3, NUM_CLASSES, dtype=dtype), 0.5, out, impl))


@both
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_batch_targets_passes_opcheck(impl, soft, mixed):
    y = targets_of(2, NUM_CLASSES) if soft else torch.tensor([1, 4], device=DEVICE)
    mixup = mixup_params() if mixed else []
    out = torch.zeros(8, NUM_CLASSES, device=DEVICE)
    opcheck(ops.batch_targets, (y, random(2, 3, NUM_CLASSES), 0.5, 0.1, mixup, out, impl))


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_mixup_passes_opcheck(impl, dtype):
    inputs, targets = random(8, 3, 4, 5, dtype=dtype), targets_of(8, NUM_CLASSES)
    outs = torch.zeros_like(inputs), torch.zeros_like(targets)
    opcheck(ops.mixup, (inputs, targets, *mixup_params(), *outs, impl))


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_loss_passes_opcheck(impl, dtype):
    logits, targets = random(8, NUM_CLASSES, dtype=dtype), targets_of(8, NUM_CLASSES)
    outs = [torch.zeros((), dtype=dtype, device=DEVICE) for _ in range(3)]
    opcheck(ops.mixmatch_loss, (logits, targets, 3, torch.tensor(3.0), *outs, impl))


def of_guesses():
    """Arguments of the ops that weigh guesses, without their implementation."""
    classes = NUM_CLASSES
    whole = torch.arange(4 + 3 * classes, device=DEVICE) + 1
    averages, window = targets_of(2 + 3 * classes), targets_of(2, classes)
    ids, found = torch.tensor([4, 1, 4]).to(DEVICE), torch.tensor([0, -1, 3]).to(DEVICE)
    table = torch.tensor([-1, 0, 2, -1, 1], dtype=torch.int16, device=DEVICE)
    counts = torch.tensor([1, 1, 1, 0, 0, 2], dtype=torch.int32, device=DEVICE)
    y, logits = torch.tensor([0, 4]).to(DEVICE), random(3, classes)
    weighting = 0.5, "soft", 0.5, averages, 2.0, targets_of(classes), False
    rows = random(5, classes), targets_of(5, classes), targets_of(5)
    switches = (2, 4), torch.tensor(3.0), 0.5, "mse", torch.tensor(0.5, device=DEVICE)
    position, out = torch.tensor(1, device=DEVICE), torch.zeros
    return {
        "guess_statistics": (logits, y, whole.clone()),
        "update_averages": (whole, averages, 0.9, None, out(classes, device=DEVICE)),
        "update_window": (
            *(whole, window, position, targets_of(classes), 0.9),
            out(classes, device=DEVICE),
        ),
        "confident_classes": (logits, 0.5, found.clone()),
        "update_labels": (found, ids, table, counts),
        "consistency_targets": (
            *(y, logits, *weighting, 0.1),
            *(out(8, classes, device=DEVICE), out(8, device=DEVICE)),
        ),
        "consistency_loss": (
            *(*rows, *switches, out(6, device=DEVICE)),
            out((), device=DEVICE),
        ),
        "consistency_loss_backward": (
            *(targets_of(6), *rows, *switches),
            *(torch.tensor(2.0, device=DEVICE), random(5, classes)),
        ),
    }


@both
@pytest.mark.parametrize("op", list(of_guesses()))
def test_what_weighs_guesses_passes_opcheck(impl, op):
    opcheck(getattr(ops, op), (*of_guesses()[op], impl))


@both
def test_the_backward_of_the_loss_passes_opcheck(impl):
    logits, targets = random(8, NUM_CLASSES), targets_of(8, NUM_CLASSES)
    one, out = torch.ones((), device=DEVICE), torch.zeros(8, NUM_CLASSES, device=DEVICE)
    for grads in ((one, None, None), (None, one, 2 * one), (one, one, one)):
        opcheck(
            ops.mixmatch_loss_backward, (*grads, logits, targets, 3, torch.tensor(3.0), out, impl)
        )


# Gradients


@pytest.mark.parametrize("num_labelled", [0, 3, 6])
@pytest.mark.parametrize("form", ["plain torch", "fused, eager", "fused, triton"])
def test_the_loss_passes_gradcheck_in_float64(num_labelled, form):
    logits = random(6, 4, dtype=torch.float64).requires_grad_()
    targets, weight = targets_of(6, 4).double(), torch.tensor(3.0)

    def losses(logits):
        if form == "plain torch":
            return functional.mixmatch_loss(logits, targets, num_labelled, weight, impl="eager")[:3]
        impl = form.removeprefix("fused, ")
        return ops.FusedLoss.apply(logits, targets, num_labelled, weight, impl)

    # a part without rows is a constant in plain torch
    assert gradcheck(
        lambda logits: tuple(part + 0 * logits.sum() for part in losses(logits)), logits
    )


@pytest.mark.parametrize("num_labelled", [0, 3, 6])
def test_gradients_of_the_fused_loss_equal_those_of_plain_torch(num_labelled):
    targets, weight = targets_of(6, 4), torch.tensor(75.0)
    factors = (0.5, -2.0, 30.0)
    grads = []
    for impl in ("plain", "eager", "triton"):
        logits = random(6, 4).requires_grad_()
        if impl == "plain":
            parts = functional.mixmatch_loss(logits, targets, num_labelled, weight, impl="eager")[
                :3
            ]
        else:
            parts = ops.FusedLoss.apply(logits, targets, num_labelled, weight, impl)
        sum(factor * part for factor, part in zip(factors, parts, strict=True)).backward()
        grads.append(logits.grad)
    plain, *others = grads
    for grad in others:
        torch.testing.assert_close(grad, plain, rtol=1e-5, atol=1e-6)


# Compiled


POLICIES = {
    "plain": {"padding": 2},
    "zoom": {"padding": 0, "zoom_px": (0, 3)},
    "blur": {"padding": 1, "blur_sigma": (0.0, 0.6), "mean": (0.4, 0.5, 0.6)},
}


class WritingNet(ConvNet):
    def forward(self, images):
        return super().forward(images.mul_(1.5))


def trained(device, impl, backend, num_steps=4, policy="plain", **switches):
    """Batches, losses and BatchNorm's statistics of some steps, built and trained on."""
    # where W is stored, a model that writes into its views
    model = (WritingNet if policy == "zoom" else ConvNet)(NUM_CLASSES).to(device)
    augment = WeakAugment(**POLICIES[policy], impl=impl)
    mixmatch = MixMatch(augment, NUM_CLASSES, seed=3, impl=impl, **switches).to(device)
    criterion = MixMatchLoss(75.0, rampup_steps=3).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step(x, y, u):
        batch = mixmatch(x, y, u, model)
        return batch, criterion(model(batch.inputs), batch)

    if backend:
        step = torch.compile(step, fullgraph=True, backend=backend)
    history, writes = [], {}
    for _ in range(num_steps):
        batch, losses = step(*random_data(num_classes=NUM_CLASSES, device=device))
        place, count = batch.inputs.data_ptr(), batch.inputs._version
        if switches.get("reuse_buffers"):  # autograd is told of every write into a buffer
            assert count > writes.get(place, -1)
        writes[place] = count
        losses.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append((batch.inputs.clone(), batch.targets, batch.step, *losses[:3]))
    assert int(mixmatch.step) == num_steps
    assert model.norm.num_batches_tracked == num_steps  # of training, not of guessing
    return history, model.norm.running_mean


def assert_equal_histories(compiled, plain):
    torch.testing.assert_close(compiled[1], plain[1], rtol=1e-4, atol=1e-5)
    for step, (mine, theirs) in enumerate(zip(compiled[0], plain[0], strict=True)):
        assert int(mine[2]) == int(theirs[2]) == step
        for left, right in zip(mine, theirs, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("device", DEVICES)
@both
@pytest.mark.parametrize(
    ("policy", "switches"),
    [
        ("plain", {}),
        ("zoom", {"guess_forward": "separate", "mix": "separate", "label_smoothing": 0.1}),
        ("blur", {"reuse_buffers": True, "guess_bn": "eval", "lam": "batch"}),
    ],
    ids=["plain", "zoom", "blur"],
)
def test_a_training_step_is_one_graph(device, impl, policy, switches):
    if impl == "triton" and device == "cpu":
        if torch.cuda.is_available():
            pytest.skip("kernels run on CUDA here, without the interpreter")
        if policy == "blur":
            pytest.skip("the interpreter takes too long; test_triton.py holds blur")
    plain = trained(device, impl, None, policy=policy, **switches)
    compiled = trained(device, impl, "aot_eager", policy=policy, **switches)
    assert_equal_histories(compiled, plain)


def test_compiled_model_that_writes_into_its_views_changes_no_batch():
    model = WritingNet(NUM_CLASSES)
    compiled = torch.compile(model, backend="aot_eager")
    augment = WeakAugment(**POLICIES["zoom"])
    batches = []
    for guesser in (compiled, lambda images: model(images.clone())):
        mixmatch = MixMatch(augment, NUM_CLASSES, guess_bn="eval")
        model.eval()
        data = random_data(num_classes=NUM_CLASSES)
        mixmatch(*data, lambda images: images.new_zeros(len(images), NUM_CLASSES))
        batches.append(mixmatch(*data, guesser))
    assert torch.equal(batches[0].inputs, batches[1].inputs)
    torch.testing.assert_close(batches[0].targets, batches[1].targets)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", ["auto"])
def test_inductor_compiles_a_training_step(device, impl):
    plain = trained(device, impl, None)
    with warnings.catch_warnings():  # inductor's own imports warn
        warnings.simplefilter("ignore")
        compiled = trained(device, impl, "inductor")
    assert_equal_histories(compiled, plain)
