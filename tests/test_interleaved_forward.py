"""interleaved_forward: the reference's forward pass, in groups that each hold a share of X'."""

import pytest
import torch
from torch import nn
from torch.nn.functional import batch_norm

from gpu_mixmatch import MixMatchBatch, MixUpParams, interleaved_forward
from gpu_mixmatch.functional import interleave

SHAPE = (2, 3, 4)
NUM_CLASSES = 5
# Largest absolute difference of logits whose rows were multiplied in other groups, in float32.
ERROR = 1e-5
# B, M, K
SIZES = [(4, 4, 2), (4, 4, 1), (3, 5, 2), (6, 2, 3), (8, 3, 4), (7, 7, 3), (9, 2, 1), (2, 9, 2)]


class Net(nn.Module):
    def __init__(self, norm=None, seed=0):
        super().__init__()
        self.inner = nn.Linear(24, 6)
        self.norm = norm or nn.Identity()
        self.outer = nn.Linear(6, NUM_CLASSES)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)

    def forward(self, images):
        return self.outer(self.norm(self.inner(images.flatten(1))))

    def normalised_by_batch(self, images):
        rows = self.inner(images.flatten(1))
        weight, bias, eps = self.norm.weight, self.norm.bias, self.norm.eps
        return self.outer(batch_norm(rows, None, None, weight, bias, training=True, eps=eps))


def batch_of(num_labelled, num_unlabelled, num_augmentations):
    length = num_labelled + num_augmentations * num_unlabelled
    generator = torch.Generator().manual_seed(1)
    # rows of different means, so that it shows in which group they were normalised
    inputs = torch.randn(length, *SHAPE, generator=generator) + torch.arange(length).view(
        -1, 1, 1, 1
    )
    targets = torch.full((length, NUM_CLASSES), 1 / NUM_CLASSES)
    params = MixUpParams(torch.ones(length), torch.arange(length))
    return MixMatchBatch(inputs, targets, num_labelled, torch.tensor(0), params)


def default_groups(batch):
    return max(1, len(batch.inputs) // batch.num_labelled)


def state_of(norm):
    return {name: value.clone() for name, value in norm.state_dict().items()}


def assert_same_state(norm, state):
    for name, value in norm.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("swap", [True, False])
@pytest.mark.parametrize("num_groups", [None, 1, 2, 3])
@pytest.mark.parametrize(("num_labelled", "num_unlabelled", "num_augmentations"), SIZES)
def test_logits_are_in_batch_order(
    num_labelled, num_unlabelled, num_augmentations, num_groups, swap
):
    batch = batch_of(num_labelled, num_unlabelled, num_augmentations)
    model = Net()
    logits = interleaved_forward(model, batch, num_groups, swap=swap)
    torch.testing.assert_close(logits, model(batch.inputs), rtol=1e-5, atol=ERROR)


def test_as_many_groups_as_rows_is_one_row_at_a_time():
    batch = batch_of(3, 2, 2)
    model = Net()
    seen = []
    model.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    logits = interleaved_forward(model, batch, 7)
    assert seen == [1] * 7
    torch.testing.assert_close(logits, model(batch.inputs), rtol=1e-5, atol=ERROR)


@pytest.mark.parametrize(("num_labelled", "num_unlabelled", "num_augmentations"), SIZES)
def test_groups_are_about_as_large_as_the_labelled_part(
    num_labelled, num_unlabelled, num_augmentations
):
    batch = batch_of(num_labelled, num_unlabelled, num_augmentations)
    model = Net()
    seen = []
    model.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    interleaved_forward(model, batch)
    assert len(seen) == default_groups(batch)
    assert sum(seen) == len(batch.inputs)
    if num_labelled == num_unlabelled:  # as the reference
        assert seen == [num_labelled] * (num_augmentations + 1)
    assert max(seen) - min(seen) <= 1
    assert min(seen) >= num_labelled


@pytest.mark.parametrize("swap", [True, False])
@pytest.mark.parametrize("running_stats", ["first", "last", "all"])
@pytest.mark.parametrize(("num_labelled", "num_unlabelled", "num_augmentations"), SIZES)
def test_batch_norm_normalises_each_group_by_itself(
    num_labelled, num_unlabelled, num_augmentations, running_stats, swap
):
    batch = batch_of(num_labelled, num_unlabelled, num_augmentations)
    model = Net(nn.BatchNorm1d(6))
    logits = interleaved_forward(model, batch, swap=swap, running_stats=running_stats)
    num_groups = default_groups(batch)
    rows = interleave(batch.inputs, num_groups) if swap else batch.inputs
    expected = torch.cat([model.normalised_by_batch(g) for g in rows.tensor_split(num_groups)])
    expected = interleave(expected, num_groups) if swap else expected
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=ERROR)


@pytest.mark.parametrize("swap", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.001, None])
@pytest.mark.parametrize("running_stats", ["first", "last", "all"])
@pytest.mark.parametrize(("num_labelled", "num_unlabelled", "num_augmentations"), SIZES)
def test_running_statistics_move_with_the_first_group_the_last_or_all(
    num_labelled, num_unlabelled, num_augmentations, running_stats, momentum, swap
):
    batch = batch_of(num_labelled, num_unlabelled, num_augmentations)
    model = Net(nn.BatchNorm1d(6, momentum=momentum))
    mean, var = model.norm.running_mean.clone(), model.norm.running_var.clone()
    interleaved_forward(model, batch, swap=swap, running_stats=running_stats)

    num_groups = default_groups(batch)
    rows = interleave(batch.inputs, num_groups) if swap else batch.inputs
    groups = rows.tensor_split(num_groups)
    moving = {"first": groups[:1], "last": groups[-1:], "all": groups}[running_stats]
    for number, group in enumerate(moving, 1):
        share = 1 / number if momentum is None else momentum
        hidden = model.inner(group.flatten(1))
        mean = (1 - share) * mean + share * hidden.mean(dim=0)
        var = (1 - share) * var + share * hidden.var(dim=0)
    torch.testing.assert_close(model.norm.running_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.norm.running_var, var, rtol=1e-4, atol=1e-5)
    assert model.norm.num_batches_tracked == len(moving)


def test_first_group_holds_rows_of_both_parts_unless_they_are_not_swapped():
    batch = batch_of(4, 4, 2)
    seen = []
    model = Net()
    model.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    for swap in (True, False):
        seen.clear()
        interleaved_forward(model, batch, swap=swap)
        labelled = [(seen[0] == row).flatten(1).all(dim=1).any() for row in batch.inputs_x]
        assert sum(map(int, labelled)) == (1 if swap else 4)


def test_eval_mode_model_is_unaffected():
    batch = batch_of(4, 6, 2)
    for running_stats in ("first", "last", "all"):
        model = Net(nn.BatchNorm1d(6))
        model(batch.inputs)  # statistics that differ from those of any group
        model.eval()
        state = state_of(model.norm)
        logits = interleaved_forward(model, batch, running_stats=running_stats)
        torch.testing.assert_close(logits, model(batch.inputs), rtol=1e-5, atol=ERROR)
        assert_same_state(model.norm, state)
        assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("running_stats", ["first", "last", "all"])
def test_frozen_batch_norm_of_a_training_model_stays_frozen(running_stats):
    # fine-tuning: the model trains, its normalisation reads the statistics it came with
    batch = batch_of(4, 6, 2)
    model = Net(nn.BatchNorm1d(6)).train()
    model.norm.eval()
    state = state_of(model.norm)
    logits = interleaved_forward(model, batch, running_stats=running_stats)
    torch.testing.assert_close(logits, model(batch.inputs), rtol=1e-5, atol=ERROR)
    assert_same_state(model.norm, state)
    assert not model.norm.training


@pytest.mark.parametrize("running_stats", ["first", "last", "all"])
def test_model_is_left_as_it_came_even_if_it_raises(running_stats):
    class Raising(Net):
        calls = 0

        def forward(self, images):
            self.calls += 1
            if self.calls == 2:
                raise RuntimeError("out of memory")
            return super().forward(images)

    model = Raising(nn.BatchNorm1d(6))
    with pytest.raises(RuntimeError, match="out of memory"):
        interleaved_forward(model, batch_of(4, 4, 2), running_stats=running_stats)
    assert model.calls == 2
    assert all(module.training for module in model.modules())
    assert model.norm.track_running_stats


def test_layer_without_running_statistics_stays_without():
    model = Net(nn.BatchNorm1d(6, track_running_stats=False))
    logits = interleaved_forward(model, batch_of(4, 4, 2))
    with_statistics = interleaved_forward(Net(nn.BatchNorm1d(6)), batch_of(4, 4, 2))
    assert torch.equal(logits, with_statistics)
    assert model.norm.running_mean is None
    assert not model.norm.track_running_stats


def test_gradients_are_those_of_one_pass_without_batch_norm():
    batch = batch_of(4, 6, 2)
    gradients = []
    for forward in (lambda m: interleaved_forward(m, batch), lambda m: m(batch.inputs)):
        model = Net()
        (forward(model) * torch.arange(16.0)[:, None]).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_gradients_flow_through_every_group():
    batch = batch_of(4, 4, 2)
    inputs = batch.inputs.clone().requires_grad_()
    model = Net(nn.BatchNorm1d(6))
    logits = interleaved_forward(model, batch._replace(inputs=inputs))
    logits.square().sum().backward()
    assert (inputs.grad.flatten(1).abs().sum(dim=1) > 0).all()


def test_logits_getter_takes_logits_out_of_what_the_model_returns():
    class DictNet(Net):
        def forward(self, images):
            return {"logits": super().forward(images)}

    batch = batch_of(4, 4, 2)
    logits = interleaved_forward(DictNet(), batch, logits_getter=lambda output: output["logits"])
    torch.testing.assert_close(logits, Net()(batch.inputs), rtol=1e-5, atol=ERROR)
    with pytest.raises(TypeError, match="logits_getter"):
        interleaved_forward(DictNet(), batch)


@pytest.mark.parametrize("num_groups", [0, -1, 13])
def test_num_groups_out_of_range_is_an_error(num_groups):
    message = rf"num_groups must be in 1 \.\. N = 12, got {num_groups}"
    with pytest.raises(ValueError, match=message):
        interleaved_forward(Net(), batch_of(4, 4, 2), num_groups)


def test_unknown_running_stats_is_an_error():
    with pytest.raises(
        ValueError, match=r"running_stats must be one of \['first', 'last', 'all'\], got 'none'"
    ):
        interleaved_forward(Net(), batch_of(4, 4, 2), running_stats="none")


def test_channels_last_batch_gives_the_same_logits():
    batch = batch_of(4, 4, 2)
    last = batch._replace(inputs=batch.inputs.contiguous(memory_format=torch.channels_last))
    model = Net()
    logits = interleaved_forward(model, last)
    torch.testing.assert_close(logits, interleaved_forward(model, batch), rtol=1e-5, atol=ERROR)
