"""What others got wrong is right here. A comment in each test says what their mistake was."""

import warnings

import numpy as np
import pytest
import torch
from scipy.stats import beta, kstest
from torch import nn

from gpu_mixmatch import MixMatch, MixMatchLoss, WeakAugment, sampling
from gpu_mixmatch.functional import guess_labels, mixmatch_loss, mixup, sharpen
from gpu_mixmatch.types import MixMatchBatch, MixUpParams
from tests import oracle
from tests.factories import ConstantNet, LinearNet, random_data

NUM_CLASSES = 4
B, M = 6, 5
IMAGE = (3, 6, 6)


def data():
    return random_data(B, M, IMAGE, num_classes=NUM_CLASSES, seed=1)


def net():
    return LinearNet(NUM_CLASSES, IMAGE)


def batch_of(model=None, **switches):
    x, y, u = data()
    builder = MixMatch(WeakAugment(padding=1), NUM_CLASSES, seed=3, **switches)
    return builder(x, y, u, net() if model is None else model)


def lam_of(alpha, lam="sample", count=20_000, step=0):
    ids = torch.arange(count)
    return sampling.draw_mixup(7, step, ids, 0, num_augmentations=1, alpha=alpha, lam=lam).lam


# Mistakes of the numpy sketch that this package grew from


def test_probabilities_are_sharpened_and_not_logits():
    # the sketch sharpened logits
    logits = [3.0, 2.0, 1.0, 0.5]
    guess = batch_of(ConstantNet(logits), mix="none").targets_u[0].double().numpy()
    np.testing.assert_allclose(guess, oracle.sharpen(oracle.softmax(logits), 0.5), atol=1e-6)
    assert np.abs(guess - oracle.sharpen(logits, 0.5)).max() > 0.1
    # logits may be negative, of which a power is no probability
    assert batch_of(ConstantNet([-3.0, -2.0, -1.0, 0.0]), mix="none").targets.isfinite().all()


def test_the_temperature_is_applied():
    # the sketch did not pass T on
    logits = [1.0, 0.5, 0.0, -1.0]
    for temperature in (0.1, 0.5, 1.0):
        guess = batch_of(ConstantNet(logits), mix="none", temperature=temperature).targets_u[0]
        expected = oracle.sharpen(oracle.softmax(logits), temperature)
        np.testing.assert_allclose(guess.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("alpha", "mean", "deviation"),
    [(0.25, 0.881, 0.146), (0.5, 0.818, 0.154), (0.75, 0.778, 0.150), (1.0, 0.750, 0.144)],
)
def test_both_parameters_of_beta_are_alpha(alpha, mean, deviation):
    # the sketch drew from Beta(alpha, -alpha)
    lam = lam_of(alpha).double().numpy()
    assert lam.mean() == pytest.approx(mean, abs=4 * deviation / len(lam) ** 0.5 + 5e-4)
    assert lam.std() == pytest.approx(deviation, abs=3e-3)
    # float32 rounds what is nearer to 1 to a few values or to 1 itself
    below = 1 - 1e-6
    share = 2 * beta.cdf(below, alpha, alpha) - 1
    folded = kstest(lam[lam < below], lambda value: (2 * beta.cdf(value, alpha, alpha) - 1) / share)
    assert folded.pvalue > 1e-3
    assert (lam < below).mean() == pytest.approx(share, abs=5e-3)


@pytest.mark.parametrize("lam", ["sample", "batch"])
@pytest.mark.parametrize("alpha", [0.1, 0.75, 16.0])
def test_lambda_is_the_larger_of_itself_and_its_complement(alpha, lam):
    # the sketch took lambda as it was drawn
    for step in range(20):
        drawn = lam_of(alpha, lam, count=50, step=step)
        assert drawn.min() >= 0.5
        assert drawn.max() <= 1
    batch, plain = batch_of(alpha=alpha, lam=lam), batch_of(mix="none")
    own = (batch.inputs - plain.inputs).flatten(1).norm(dim=1)
    other = (batch.inputs - plain.inputs[batch.params.index]).flatten(1).norm(dim=1)
    assert (own <= other + 1e-4).all()


def test_every_row_has_a_lambda_of_its_own():
    # the sketch drew one lambda per batch
    lam = batch_of().params.lam
    assert len(lam.unique()) == len(lam) == B + 2 * M


def test_x_and_u_share_the_lambda_of_a_batch():
    # the sketch drew two; where one per batch is asked for it is one, and every step has another
    x, y, u = data()
    builder = MixMatch(WeakAugment(padding=1), NUM_CLASSES, lam="batch")
    drawn = [builder(x, y, u, net()).params.lam for _ in range(8)]
    assert all(len(lam.unique()) == 1 for lam in drawn)
    assert len(torch.stack(drawn).unique()) == 8
    for mix in ("separate", "labelled", "unlabelled"):
        lam = batch_of(lam="batch", mix=mix).params.lam
        mixed = {"separate": lam, "labelled": lam[:B], "unlabelled": lam[B:]}[mix]
        assert torch.equal(mixed, drawn_like(mixed))


def drawn_like(lam):
    return sampling.draw_mixup(3, 0, 1, 0, num_augmentations=1, lam="batch").lam.expand(len(lam))


def test_partners_are_a_shuffle_of_all_rows():
    # the sketch took the result of random.shuffle, which is None
    batch, plain = batch_of(), batch_of(mix="none")
    index = batch.params.index
    assert torch.equal(index.sort().values, torch.arange(B + 2 * M))
    assert not torch.equal(index, torch.arange(B + 2 * M))
    assert (index[:B] >= B).any()  # X meets U
    lam = batch.params.lam.view(-1, 1, 1, 1)
    mixed = lam * plain.inputs + (1 - lam) * plain.inputs[index]
    torch.testing.assert_close(batch.inputs, mixed, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_augmentations", [1, 2, 3])
def test_targets_are_mixed_with_those_of_the_images_mixed_in(num_augmentations):
    # the sketch built the targets of the shuffled set from one copy of q
    plain = batch_of(mix="none", num_augmentations=num_augmentations)
    assert len(plain.targets) == len(plain.inputs) == B + num_augmentations * M
    guesses = plain.targets_u.split(M)
    assert all(torch.equal(guess, guesses[0]) for guess in guesses)
    assert len(plain.targets_u.unique(dim=0)) == M  # images differ
    # every row is mixed with the target of the image that it is mixed with
    batch = batch_of(num_augmentations=num_augmentations)
    lam = batch.params.lam[:, None]
    mixed = lam * plain.targets + (1 - lam) * plain.targets[batch.params.index]
    torch.testing.assert_close(batch.targets, mixed, rtol=0, atol=1e-5)


def test_the_loss_takes_a_batch_as_it_is_built():
    # the sketch returned X, p, U, q to a loss that takes X, U, p, q
    # inputs stay with inputs and targets with targets, and the loss takes the batch as it is
    assert MixMatchBatch._fields[:2] == ("inputs", "targets")
    batch = batch_of()
    logits = batch.targets.clamp_min(1e-30).log()  # a model that is right about every row
    output = MixMatchLoss(rampup_steps=0)(logits, batch)
    entropy = -(batch.targets_x * batch.targets_x.clamp_min(1e-30).log()).sum(dim=1).mean()
    torch.testing.assert_close(output.loss_x, entropy, rtol=1e-5, atol=1e-6)
    assert output.loss_u.item() == pytest.approx(0, abs=1e-10)


def test_each_loss_is_one_number_and_of_its_own_rows():
    # the sketch concatenated the losses along the classes
    logits, targets = torch.randn(8, NUM_CLASSES), torch.rand(8, NUM_CLASSES).softmax(dim=1)
    output = mixmatch_loss(logits, targets, 3, 1.0)
    assert output.loss.shape == output.loss_x.shape == output.loss_u.shape == ()
    other = logits.clone()
    other[3:] += torch.randn(5, NUM_CLASSES)
    assert mixmatch_loss(other, targets, 3, 1.0).loss_x == output.loss_x
    other = logits.clone()
    other[:3] += torch.randn(3, NUM_CLASSES)
    assert mixmatch_loss(other, targets, 3, 1.0).loss_u == output.loss_u


def test_lambda_u_weighs_the_unlabelled_loss():
    # the sketch never applied lambda_u
    batch = batch_of()
    logits = torch.randn(len(batch.inputs), NUM_CLASSES)
    parts = MixMatchLoss(0.0, 0)(logits, batch)
    assert parts.loss_u > 0
    for lambda_u in (1.0, 75.0, 250.0):
        loss = MixMatchLoss(lambda_u, 0)(logits, batch).loss
        torch.testing.assert_close(loss, parts.loss_x + lambda_u * parts.loss_u)


def test_the_squared_error_is_that_of_probabilities():
    # the sketch took the squared error of logits
    _, targets = torch.zeros(6, NUM_CLASSES), torch.rand(6, NUM_CLASSES).softmax(dim=1)
    logits = torch.randn(6, NUM_CLASSES)
    loss_u = mixmatch_loss(logits, targets, 0, 1.0).loss_u
    shifted = mixmatch_loss(logits + 100, targets, 0, 1.0).loss_u
    torch.testing.assert_close(shifted, loss_u, rtol=1e-4, atol=1e-6)
    # two distributions are never farther apart than √2
    assert mixmatch_loss(1e4 * logits, targets, 0, 1.0).loss_u <= 2 / NUM_CLASSES


@pytest.mark.parametrize("teacher", [False, True])
def test_targets_are_detached(teacher):
    # the sketch let gradients through the guess
    model = net()
    batch = batch_of(model, teacher=model if teacher else None)
    assert not batch.targets.requires_grad
    logits = torch.randn(len(batch.inputs), NUM_CLASSES, requires_grad=True)
    MixMatchLoss(rampup_steps=0)(logits, batch).loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_powers_in_half_precision_do_not_underflow(dtype):
    # the sketch took powers in the dtype of the input
    # 1000 classes of 0.001: the square is 1e-6 and the hundredth power 1e-300
    probs = torch.full((2, 1000), 1e-3, dtype=dtype)
    for temperature in (0.5, 0.01):
        sharpened = sharpen(probs, temperature).double()
        torch.testing.assert_close(
            sharpened, torch.full_like(sharpened, 1e-3), rtol=torch.finfo(dtype).eps, atol=0
        )
        guess = guess_labels(torch.zeros(2, 3, 1000, dtype=dtype), temperature)
        torch.testing.assert_close(guess, torch.full_like(guess, 1e-3), rtol=1e-5, atol=0)


# Bugs of other libraries


def test_mixup_of_equal_labels_leaves_them():
    # FFCV assigned instead of adding: equal labels gave a row that did not sum to one
    targets = torch.eye(3)[[1, 1, 1]]
    params = MixUpParams(torch.tensor([0.6, 0.7, 0.8]), torch.tensor([1, 2, 0]))
    mixed = mixup(torch.zeros(3, 1), targets, params)[1]
    torch.testing.assert_close(mixed, targets, rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_classes", [1, 31, 32, 33, 1023, 1025, 4097, 70_001])
def test_softmax_of_any_number_of_classes_reads_them_all_and_no_more(num_classes):
    # of others' kernels one was wrong beyond a block, one summed what it read beyond the end
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 3, num_classes, generator=generator)
    # a class that is read but not there would count as logit 0 among these
    logits = 3 * logits - 50
    expected = oracle.guess_labels(logits.double().numpy(), 0.5)
    np.testing.assert_allclose(guess_labels(logits, 0.5).numpy(), expected, rtol=1e-4, atol=1e-7)
    targets = torch.from_numpy(expected).float()
    output = mixmatch_loss(logits[0], targets, 2, 3.0)
    reference = oracle.mixmatch_loss(logits[0].double().numpy(), targets.double().numpy(), 2, 3.0)
    assert [value.item() for value in output[:3]] == pytest.approx(reference, rel=1e-4, abs=1e-9)


def test_lambda_is_uniform_for_an_alpha_of_one_only():
    # others drew it uniformly where Beta was promised
    assert kstest(lam_of(1.0).double().numpy(), lambda value: 2 * value - 1).pvalue > 1e-3
    for alpha in (0.5, 0.75, 2.0):
        assert kstest(lam_of(alpha).double().numpy(), lambda value: 2 * value - 1).pvalue < 1e-6


def test_errors_print_the_value_that_is_wrong():
    # a message printed stale loop variables
    with pytest.raises(ValueError, match=r"^temperature must be above 0 and finite, got -2$"):
        MixMatch(WeakAugment(), 3, temperature=-2, alpha=0.5)
    with pytest.raises(ValueError, match=r"^alpha must be in \[0.05, 1000\], got -3$"):
        MixMatch(WeakAugment(), 3, temperature=0.5, alpha=-3)
    with pytest.raises(ValueError, match=r"^lam must be one of \['sample', 'batch'\], got 'row'$"):
        MixMatch(WeakAugment(), 3, lam="row", mix="all")
    # the second of three views is the wrong one, not the last
    x = torch.zeros(2, 3, 4, 4)
    views = [torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4).half(), torch.zeros(2, 3, 4, 4)]
    builder = MixMatch(WeakAugment(padding=1), 3, num_augmentations=3)
    with pytest.raises(ValueError, match=r"got torch\.float32 and torch\.float16$"):
        builder.from_views(x, torch.tensor([0, 1]), views, net())
    views[1] = torch.zeros(2, 3, 5, 4)
    with pytest.raises(ValueError, match=r"\[\[2, 3, 4, 4\], \[2, 3, 5, 4\], \[2, 3, 4, 4\]\]$"):
        builder.from_views(x, torch.tensor([0, 1]), views, net())


def test_the_guess_leaves_running_statistics_alone():
    # YU1ut: BatchNorm moved in the guess passes too
    model = nn.Sequential(nn.BatchNorm2d(3), net())
    batch_of(model)
    assert model[0].num_batches_tracked == 0
    assert torch.equal(model[0].running_mean, torch.zeros(3))


def test_crops_reach_the_last_offset():
    # YU1ut drew randint(0, 2 · padding), without its end
    params = WeakAugment(padding=2).draw(0, 0, 500)
    for offsets in (params.top, params.left):
        assert offsets.unique().tolist() == [0, 1, 2, 3, 4]


def test_a_warning_fails_a_test():
    # a gate turned failures into warnings
    with pytest.raises(UserWarning, match="of no account"):
        warnings.warn("of no account", UserWarning, stacklevel=1)
