"""A batch depends on nothing that a model does to its input, and a guess leaves any model as is."""

import copy
import functools
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gpu_mixmatch import MixMatch, WeakAugment, interleaved_forward
from gpu_mixmatch.capture import capture
from tests.batches import assert_same_mixed
from tests.factories import random_data

NUM_CLASSES = 4
SHAPE = (3, 6, 6)
DENSE = torch.randn(NUM_CLASSES, 108, generator=torch.Generator().manual_seed(0))


def data_of():
    return random_data(4, 6, SHAPE, num_classes=NUM_CLASSES)


def builder_of(augment=None, **options):
    return MixMatch(augment or WeakAugment(padding=1), NUM_CLASSES, **options)


def logits_of(images):
    return images.flatten(1) @ DENSE.T


# What is written into the views


def writes_in_place(images):
    return logits_of(images.sub_(images.mean()).relu_())


def writes_uncounted(images):
    images.data.relu_()
    return logits_of(images)


def writes_through_numpy(images):
    images.numpy()[:] = 0.25
    return logits_of(images)


def returns_its_input(images):
    images.mul_(2)
    return images.flatten(1)[:, :NUM_CLASSES]


class OnlyInTraining(nn.Module):
    """Writes from its third pass on."""

    passes = 0

    def forward(self, images):
        self.passes += 1
        return logits_of(images.relu_() if self.passes > 2 else images.relu())


def clean(model):
    """The same model, given copies."""
    return lambda images: model(images.clone())


class Whole:
    """An engine whose buffer, x and u in one, is the caller's own memory."""

    def draw_batch(self, *_):
        return None

    def build(self, x, u, draws, num_augmentations, workspace=None):
        assert num_augmentations == 1
        return torch.as_strided(x, (len(x) + len(u), *x.shape[1:]), x.stride())


ENGINES = {
    "shift": WeakAugment(padding=1),
    "zoom": WeakAugment(padding=0, zoom_px=(0, 2)),
    "blur, channels last": WeakAugment(padding=1, blur_sigma=(0.0, 0.5), channels_last=True),
    "eager": WeakAugment(padding=1, impl="eager"),
    "callable": lambda images: images + torch.rand_like(images),
    "callable that returns what it gets": lambda images: images,
}


@pytest.mark.parametrize("model", [writes_in_place, writes_uncounted, writes_through_numpy])
@pytest.mark.parametrize("guess_forward", ["joint", "separate"])
@pytest.mark.parametrize("engine", ENGINES)
def test_batch_is_that_of_a_model_that_leaves_its_input_alone(engine, guess_forward, model):
    options = {"guess_forward": guess_forward, "num_augmentations": 3}
    mine, other = (builder_of(ENGINES[engine], **options) for _ in range(2))
    for _ in range(3):
        assert_same_mixed(mine(*data_of(), model), other(*data_of(), clean(model)))


@pytest.mark.parametrize("mix", ["all", "none"])
@pytest.mark.parametrize("reuse_buffers", [False, True])
@pytest.mark.parametrize("engine", ["shift", "zoom", "callable"])
def test_logits_that_lie_in_the_views_are_read_as_they_were_returned(engine, reuse_buffers, mix):
    options = {"reuse_buffers": reuse_buffers, "mix": mix}
    mine, other = (builder_of(ENGINES[engine], **options) for _ in range(2))
    for model in (logits_of, returns_its_input, returns_its_input):  # at first it does not write
        assert_same_mixed(mine(*data_of(), model), other(*data_of(), clean(model)))


def test_views_that_are_mixed_from_bytes_do_not_mind_what_a_model_writes(monkeypatch):
    monkeypatch.setattr("gpu_mixmatch.augment.keyed._LEAST_TO_MIX_BYTES", 0)
    for guess_forward in ("joint", "separate"):
        options = {"guess_forward": guess_forward, "reuse_buffers": True}
        mine, other = (builder_of(**options) for _ in range(2))
        for _ in range(3):
            wanted = other(*data_of(), clean(writes_in_place))
            assert_same_mixed(mine(*data_of(), writes_in_place), wanted)


@pytest.mark.parametrize("engine", ["zoom", "callable"])
def test_model_that_begins_to_write_later_is_seen(engine):
    mine, other = (builder_of(ENGINES[engine]) for _ in range(2))
    model = OnlyInTraining()
    twin = OnlyInTraining()
    for _ in range(5):
        assert_same_mixed(mine(*data_of(), model), other(*data_of(), clean(twin)))


def test_what_an_engine_of_the_users_writes_into_its_draws_does_not_change_what_is_built_again():
    class Shifts:
        policy = WeakAugment(padding=1).policy

        def draw_batch(self, *args):
            return WeakAugment(padding=1).draw_batch(*args)

        def build(self, x, u, draws, num_augmentations, workspace=None):
            images = WeakAugment(padding=1).build(x, u, draws, num_augmentations)
            draws.flip.fill_(1)
            return images

    mine, other = builder_of(Shifts()), builder_of(Shifts())
    for model in (logits_of, writes_in_place, writes_in_place):
        assert_same_mixed(mine(*data_of(), model), other(*data_of(), clean(model)))


@pytest.mark.parametrize("model", [writes_in_place, writes_uncounted])
def test_ready_views_and_the_users_own_images_are_left_alone(model):
    x, y, u = (part / 255 if part.dim() == 4 else part for part in data_of())
    views = [u, u.flip(3)]
    before = [x.clone(), *(view.clone() for view in views)]
    mine, other = builder_of(), builder_of()
    for _ in range(2):
        batch = mine.from_views(x, y, views, model)
        assert_same_mixed(batch, other.from_views(x, y, views, clean(model)))
        mine(x, y, u, model)
        other(x, y, u, clean(model))
    for images, wanted in zip([x, *views], before, strict=True):
        assert torch.equal(images, wanted)


def test_caller_keeps_images_that_an_engine_passes_on_as_they_are():
    x, y, u = data_of()
    images = torch.cat([x, u]) / 255
    before = images.clone()
    mine, other = (builder_of(Whole(), num_augmentations=1) for _ in range(2))
    for _ in range(2):
        x, u = images[: len(x)], images[len(x) :]
        batch = mine(x, y, u, writes_in_place)
        assert torch.equal(images, before)
        assert_same_mixed(batch, other(x, y, u, clean(writes_in_place)))


def test_batches_of_inference_mode_are_kept_from_the_model_too():
    with torch.inference_mode():
        mine, other = (builder_of(ENGINES["zoom"]) for _ in range(2))
        for _ in range(2):
            assert_same_mixed(
                mine(*data_of(), writes_in_place), other(*data_of(), clean(writes_in_place))
            )


def test_batch_shares_no_memory_with_what_the_model_holds():
    seen = []

    def keeps(images):
        seen.append(images)
        return images.flatten(1)[:, :NUM_CLASSES]

    for engine in ENGINES.values():
        x, y, u = data_of()
        y = F.one_hot(y, NUM_CLASSES).float()
        batch = builder_of(engine, mix="none")(x, y, u, keeps)
        wanted = batch.inputs.clone(), batch.targets.clone()
        seen[-1].fill_(7)
        y.fill_(7)
        assert torch.equal(batch.inputs, wanted[0])
        assert torch.equal(batch.targets, wanted[1])


# What returns the same memory every time


class StaticOutput(nn.Module):
    """As a captured CUDA graph: every pass overwrites the logits of the one before."""

    def __init__(self):
        super().__init__()
        self.memory = {}

    def forward(self, images):
        out = self.memory.setdefault(len(images), torch.empty(len(images), NUM_CLASSES))
        return {"logits": out.copy_(logits_of(images))}


def test_logits_of_one_pass_outlive_the_next():
    options = {"guess_forward": "separate", "num_augmentations": 3}
    mine = builder_of(**options, logits_getter=lambda output: output["logits"])
    batch = mine(*data_of(), StaticOutput())
    assert_same_mixed(batch, builder_of(**options)(*data_of(), logits_of))
    with torch.no_grad():
        logits = interleaved_forward(
            StaticOutput(), batch, logits_getter=lambda output: output["logits"]
        )
    torch.testing.assert_close(logits, logits_of(batch.inputs))


@pytest.mark.parametrize("swap", [True, False])
def test_interleaved_forward_keeps_the_batch_from_the_model(swap):
    batch = builder_of()(*data_of(), logits_of)
    inputs = batch.inputs.clone()
    interleaved_forward(lambda images: logits_of(images.relu_()), batch, swap=swap)
    assert torch.equal(batch.inputs, inputs)


def test_function_that_returns_the_same_memory_every_time_gives_every_view():
    memory = torch.empty(6, *SHAPE)

    def noisy(images):
        return images + torch.rand_like(images)

    def static(images):
        out = memory[: len(images)]
        return out.copy_(noisy(images))

    assert_same_mixed(
        builder_of(static)(*data_of(), logits_of), builder_of(noisy)(*data_of(), logits_of)
    )


def test_views_of_other_sizes_or_dtypes_are_refused():
    sizes = iter([4, 5])
    cases = {
        "images of one size and dtype": lambda images: images[..., : next(sizes)],
        "got .* torch.float64": lambda images: images.double() if len(images) == 6 else images,
    }
    for message, function in cases.items():
        with pytest.raises(ValueError, match=message):
            builder_of(function)(*data_of(), logits_of)


def test_engine_that_writes_into_the_users_images_is_refused():
    class Writes:
        def draw_batch(self, *_):
            return None

        def build(self, x, u, draws, num_augmentations, workspace=None):
            return torch.cat([x.div_(2), *[u.div_(2)] * num_augmentations])

    x, y, u = (part / 255 if part.dim() == 4 else part for part in data_of())
    builder = builder_of(Writes())
    with pytest.raises(RuntimeError, match=r"augment must leave x and u .* Writes\.build"):
        builder(x, y, u, logits_of)
    assert int(builder.step) == 0


# What a guess leaves as it came


class HandMade(nn.Module):
    """A norm as people write it, by a name of its own."""

    def __init__(self, channels=4):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, images):
        return F.batch_norm(images, self.running_mean, self.running_var, training=self.training)


class Rebinding(nn.Module):
    """Moving averages that are replaced, hidden from the count, or resized."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(4))
        self.register_buffer("hidden", torch.zeros(4))
        self.register_buffer("histogram", torch.zeros(0))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, images):
        mean = images.detach().mean(dim=(0, 2, 3))
        self.centre = 0.9 * self.centre + 0.1 * mean
        self.hidden.data.mul_(0.9).add_(mean)
        self.histogram.resize_(3).fill_(1)
        self.calls += 1
        return images - mean[:, None, None]


class Overriding(nn.BatchNorm2d):
    """A BatchNorm with a forward pass of its own, which minds no flag, and a part with weights."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.PReLU()

    def forward(self, images):
        self.num_batches_tracked += 1
        return self.act(F.batch_norm(images, self.running_mean, self.running_var, training=True))


class Codebook(nn.Module):
    """A network with statistics of its input and a mode that must not change."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.zeros(4))
        self.scale = nn.Linear(1, 1)

    def forward(self, images):
        self.running_mean.add_(1)
        assert not self.training
        return images


def net(norm, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        conv, dense = nn.Conv2d(3, 4, 3), nn.Linear(4, NUM_CLASSES)
        spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    return nn.Sequential(conv, norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), spectral, dense)


def state_of(model):
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return buffers, [(module.training, str(module)) for module in model.modules()]


def assert_as_it_came(model, state):
    buffers, modes = state_of(model)
    assert modes == state[1]
    assert buffers.keys() == state[0].keys()
    for name, buffer in buffers.items():
        assert torch.equal(buffer, state[0][name]), name


NORMS = {
    "instance": lambda: nn.InstanceNorm2d(4, track_running_stats=True),
    "hand made": HandMade,
    "rebinding": Rebinding,
    "overriding": lambda: Overriding(4),
    "codebook": lambda: Codebook().eval(),
}


@pytest.mark.parametrize("guess_bn", ["batch", "eval"])
@pytest.mark.parametrize("guess_forward", ["joint", "separate"])
@pytest.mark.parametrize("norm", NORMS)
def test_guess_leaves_every_buffer_and_mode_as_they_came(norm, guess_forward, guess_bn):
    builder = builder_of(guess_bn=guess_bn, guess_forward=guess_forward)
    model = net(NORMS[norm]())
    held = dict(model.named_buffers())
    for _ in range(2):
        state = state_of(model)
        builder(*data_of(), model)
        assert_as_it_came(model, state)
        # whoever holds a buffer, such as an optimiser or a graph, still holds it
        assert all(buffer is held[name] for name, buffer in model.named_buffers())
        model(torch.rand(4, *SHAPE))  # which moves them
        held = dict(model.named_buffers())


@pytest.mark.parametrize("norm", NORMS)
def test_guess_that_fails_leaves_the_model_as_it_came(norm):
    model = nn.Sequential(net(NORMS[norm]()), nn.Linear(3, 3))
    state = state_of(model)
    with pytest.raises(RuntimeError, match="shapes"):
        builder_of()(*data_of(), model)
    assert_as_it_came(model, state)


def test_guess_bn_update_lets_all_buffers_move():
    model = net(Rebinding())
    builder_of(guess_bn="update")(*data_of(), model)
    assert int(model[1].calls) == 1


@pytest.mark.parametrize(
    "wrap", [lambda model: model.forward, functools.partial], ids=["bound", "partial"]
)
def test_module_behind_a_callable_is_found(wrap):
    model = net(nn.BatchNorm2d(4))
    state = state_of(model)
    batch = builder_of()(*data_of(), wrap(model))
    assert_as_it_came(model, state)
    assert_same_mixed(batch, builder_of()(*data_of(), net(nn.BatchNorm2d(4))))


def test_constant_that_a_graph_holds_is_not_marked_as_written():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.rand(4, 1, 1))

        def forward(self, images):
            return images * self.mask

    model = net(Masked())
    loss = model(torch.rand(2, *SHAPE)).sum()
    builder_of()(*data_of(), model)  # between forward and backward, as when batches are prefetched
    loss.backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", [lambda: nn.BatchNorm2d(4), HandMade], ids=["torch", "hand made"])
def test_scripted_model_guesses_as_the_plain_one(norm, training):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates scripts
        plain = net(norm())
        plain[4] = nn.Identity()
        scripted = torch.jit.script(plain)
    for guess_bn in ("batch", "eval"):
        plain.train(training)
        scripted.train(training)
        state = state_of(scripted)
        batch = builder_of(guess_bn=guess_bn)(*data_of(), scripted)
        assert_as_it_came(scripted, state)
        wanted = builder_of(guess_bn=guess_bn)(*data_of(), plain)
        torch.testing.assert_close(batch.targets, wanted.targets)


def traced(model, training):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(model.train(training), torch.rand(3, *SHAPE), check_trace=False)


def exported(model, training):
    size = torch.export.Dim("size", min=2)
    program = torch.export.export(
        model.train(training), (torch.rand(3, *SHAPE),), dynamic_shapes=({0: size},)
    )
    return program.module()


def fx_traced(model, training):
    return torch.fx.symbolic_trace(model.train(training))


def inner(model):
    model[4] = nn.Identity()
    return model


@pytest.mark.parametrize("make", [traced, exported, fx_traced])
def test_model_of_a_fixed_mode_is_handled_or_refused_by_the_name_of_its_layer(make):
    norm = HandMade if make is fx_traced else lambda: nn.BatchNorm2d(4)
    for training, right, wrong in ((True, "batch", "eval"), (False, "eval", "batch")):
        model = nn.ModuleDict({"body": make(inner(net(norm())), training)})
        model.forward = lambda images, model=model: model["body"](images)
        state = state_of(model)
        builder = builder_of(guess_bn=wrong)
        with pytest.raises(ValueError, match=rf"guess_bn .* layer 'body\.1' .*, got|got '{wrong}'"):
            builder(*data_of(), model)
        assert int(builder.step) == 0
        batch = builder_of(guess_bn=right)(*data_of(), model)
        assert_as_it_came(model, state)
        wanted = builder_of(guess_bn=right)(*data_of(), inner(net(norm())))
        torch.testing.assert_close(batch.targets, wanted.targets)


def test_frozen_script_is_refused_for_batch_statistics():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.script(nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 4)))
        frozen = torch.jit.freeze(script.eval())
    with pytest.raises(ValueError, match=r"guess_bn must be 'eval' .* 'batch_norm'"):
        builder_of()(*data_of(), frozen)
    builder_of(guess_bn="eval")(*data_of(), frozen)


def lazy_net():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls lazy modules new
        return nn.Sequential(
            nn.LazyConv2d(4, 3),
            nn.LazyBatchNorm2d(),
            nn.LazyInstanceNorm2d(track_running_stats=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.LazyLinear(NUM_CLASSES),
        )


@pytest.mark.parametrize("guess_bn", ["batch", "eval"])
def test_guess_may_be_the_first_pass_of_a_lazy_model(guess_bn):
    model, twin = lazy_net(), lazy_net()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        batch = builder_of(guess_bn=guess_bn)(*data_of(), model)
        torch.default_generator.manual_seed(0)
        twin.eval()(torch.zeros(2, *SHAPE))  # which makes it, and moves nothing
    twin.train()
    assert str(model) == str(twin)
    for (name, value), wanted in zip(
        model.state_dict().items(), twin.state_dict().values(), strict=True
    ):
        assert torch.equal(value, wanted), name
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert_same_mixed(batch, builder_of(guess_bn=guess_bn)(*data_of(), twin))
    model(torch.rand(2, *SHAPE))
    assert int(model[1].num_batches_tracked) == 1


def test_lazy_model_that_cannot_be_made_is_left_usable():
    model = nn.Sequential(nn.Flatten(), nn.Linear(5, 5), *lazy_net())
    with pytest.raises(RuntimeError, match="shapes"):
        builder_of()(*data_of(), model)
    assert model[3].track_running_stats
    model[2:](torch.rand(2, *SHAPE))
    assert int(model[3].num_batches_tracked) == 1


@pytest.mark.parametrize("norm", NORMS)
def test_interleaved_forward_moves_buffers_with_the_first_group_alone(norm):
    batch = builder_of()(*data_of(), logits_of)
    model, twin = net(NORMS[norm]()), net(NORMS[norm]())
    interleaved_forward(model, batch, 2, swap=False).sum().backward()
    twin(batch.inputs.tensor_split(2)[0])
    assert_as_it_came(model, state_of(twin))
    assert model[0].weight.grad is not None
    model, twin = net(NORMS[norm]()), net(NORMS[norm]())
    interleaved_forward(model, batch, 2, swap=False, running_stats="all")
    for group in batch.inputs.tensor_split(2):
        twin(group)
    assert_as_it_came(model, state_of(twin))


def test_ddp_sends_its_buffers_before_training_as_if_nothing_had_been_guessed(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.LazyLinear(NUM_CLASSES))
        x, y, u = data_of()
        net(x.float())
        model = nn.parallel.DistributedDataParallel(net)
        model(x.float()).sum().backward()
        assert model.require_forward_param_sync
        builder_of()(x, y, u, model)
        assert model.require_forward_param_sync
    finally:
        torch.distributed.destroy_process_group()


# On a GPU


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("writes", [torch.Tensor.relu_, lambda images: images.data.relu_()])
@pytest.mark.parametrize("engine", ["shift", "zoom", "callable"])
def test_batch_on_a_gpu_is_that_of_a_model_that_leaves_its_input_alone(engine, writes):
    dense = DENSE.cuda()

    def model(images):
        writes(images)
        return images.flatten(1) @ dense.T

    mine, other = (builder_of(copy.deepcopy(ENGINES[engine])).cuda() for _ in range(2))
    for _ in range(4):
        data = [part.cuda() for part in data_of()]
        assert_same_mixed(mine(*data, model), other(*data, clean(model)))
        torch.cuda.synchronize()


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("norm", NORMS)
def test_guess_on_a_gpu_leaves_every_buffer_and_mode_as_they_came(norm):
    model = net(NORMS[norm]()).cuda()
    state = state_of(model)
    builder_of().cuda()(*(part.cuda() for part in data_of()), model)
    assert_as_it_came(model, state)


@pytest.mark.gpu
@needs_cuda
def test_captured_builder_leaves_every_buffer_as_it_came():
    model = net(HandMade()).cuda()
    state = state_of(model)
    data = [part.cuda() for part in data_of()]
    builder, other = (builder_of(copy.deepcopy(ENGINES["zoom"])).cuda() for _ in range(2))
    captured = capture(builder, model, *data)
    assert_as_it_came(model, state)
    batch = captured(*data)
    assert_as_it_came(model, state)
    wanted = other(*data, model)
    torch.testing.assert_close(batch.inputs, wanted.inputs)
