"""The recipe networks agree with google-research/mixmatch, libml/models.py::ResNet."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv2d, cross_entropy, leaky_relu

from gpu_mixmatch.recipes.models import (
    ResidualBlock,
    SameConv2d,
    SmallCNN,
    WideResNet,
    build_model,
    kernel_parameters,
    same_padding,
    wideresnet28,
)

State = dict[str, Tensor]


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def expected_count(num_classes: int, in_channels: int, filters: int, repeat: int = 4) -> int:
    """Count from the architecture: kernels and biases of the convolutions, two vectors per norm."""

    def conv(side: int, inputs: int, outputs: int) -> int:
        return side * side * inputs * outputs + outputs

    total = conv(3, in_channels, 16)
    inputs = 16
    for outputs in (filters, 2 * filters, 4 * filters):
        for _ in range(repeat):
            total += 2 * inputs + conv(3, inputs, outputs) + 2 * outputs + conv(3, outputs, outputs)
            if inputs != outputs:
                total += conv(1, inputs, outputs)
            inputs = outputs
    return total + 2 * inputs + inputs * num_classes + num_classes


def randomise(model: nn.Module) -> None:
    """Give every parameter and running statistic a value that a forward pass cannot ignore."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point():
                tensor.normal_(std=0.3)


def same(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """Convolve with TensorFlow's padding, from the formula in its documentation of tf.nn."""
    height, width = x.shape[2:]
    k = weight.shape[2]
    down = max(k - stride, 0) if height % stride == 0 else max(k - height % stride, 0)
    across = max(k - stride, 0) if width % stride == 0 else max(k - width % stride, 0)
    padded = x.new_zeros(x.shape[0], x.shape[1], height + down, width + across)
    padded[:, :, down // 2 : down // 2 + height, across // 2 : across // 2 + width] = x
    return conv2d(padded, weight, bias, stride)


def reference_forward(
    x: Tensor, state: State, *, scales: int, repeat: int, training: bool
) -> Tensor:
    """Follow ResNet.classifier line by line on the values of a state dict."""

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        return same(x, state[f"{name}.weight"], state[f"{name}.bias"], stride)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        if training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        scale = state[f"{name}.weight"] / torch.sqrt(var + 1e-3)
        x = (x - mean[:, None, None]) * scale[:, None, None]
        x = x + state[f"{name}.bias"][:, None, None]
        return torch.where(x > 0, x, 0.1 * x)

    y = conv(x, "stem")
    for scale in range(scales):
        for index in range(repeat):
            name = f"blocks.{scale * repeat + index}"
            stride = 2 if scale > 0 and index == 0 else 1
            x0 = y
            y = norm(x0, f"{name}.norm1")
            if scale == 0 and index == 0:
                x0 = y
            y = norm(conv(y, f"{name}.conv1", stride), f"{name}.norm2")
            y = conv(y, f"{name}.conv2")
            if f"{name}.shortcut.weight" in state:
                x0 = conv(x0, f"{name}.shortcut", stride)
            y = x0 + y
    y = norm(y, "norm").mean((2, 3))
    return y @ state["dense.weight"].T + state["dense.bias"]


@pytest.mark.parametrize(("num_classes", "in_channels"), [(10, 3), (100, 3), (10, 1)])
def test_wrn_28_2_has_the_parameters_of_its_definition(num_classes: int, in_channels: int) -> None:
    model = wideresnet28(num_classes, in_channels=in_channels)
    assert count(model) == expected_count(num_classes, in_channels, filters=32)


def test_wrn_28_2_has_the_one_and_a_half_million_parameters_of_the_paper() -> None:
    model = wideresnet28(10)
    assert round(count(model) / 1e6, 1) == 1.5
    assert WideResNet.__doc__ is not None
    assert f"{count(model):,}".replace(",", " ") in WideResNet.__doc__
    three_by_three = [
        m for m in model.modules() if isinstance(m, SameConv2d) and m.weight.shape[2] == 3
    ]
    assert len(three_by_three) == 1 + 3 * 4 * 2  # and 3 projections, as depth is counted


def test_135_filters_give_the_26_million_parameters_of_the_paper() -> None:
    with torch.device("meta"):
        model = wideresnet28(100, filters=135)
    assert count(model) == expected_count(100, 3, filters=135)
    assert round(count(model) / 1e6) == 26


def test_width_and_filters_set_the_first_stage() -> None:
    assert count(wideresnet28(10, width=1)) == expected_count(10, 3, filters=16)
    assert count(wideresnet28(10, width=9, filters=5)) == expected_count(10, 3, filters=5)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (1, 8, 8), (3, 33, 31), (3, 4, 4)])
@pytest.mark.parametrize("name", ["wrn-28-2", "cnn"])
def test_logits_are_one_row_per_image_at_any_size(name: str, shape: tuple[int, int, int]) -> None:
    model = build_model(name, 7, shape[0]).eval()
    x = torch.randn(2, *shape)
    logits = model(x)
    assert logits.shape == (2, 7)
    torch.testing.assert_close(logits, torch.cat([model(x[:1]), model(x[1:])]))


def test_each_stage_but_the_first_halves_the_resolution_rounding_up() -> None:
    model = WideResNet(10, filters=4, repeat=2)
    features = model.stem(torch.randn(2, 3, 33, 31))
    shapes = []
    for block in model.blocks:
        features = block(features)
        shapes.append(tuple(features.shape[1:]))
    assert shapes == [(4, 33, 31)] * 2 + [(8, 17, 16)] * 2 + [(16, 9, 8)] * 2


@pytest.mark.parametrize("size", [(8, 8), (9, 7), (10, 11)])
@pytest.mark.parametrize(("filters", "repeat"), [(4, 1), (4, 2), (16, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_whole_network_equals_the_reference_written_out(
    size: tuple[int, int], filters: int, repeat: int, training: bool
) -> None:
    # With 16 filters the first block has no projection, and its shortcut is still activated.
    torch.manual_seed(0)
    model = WideResNet(5, filters=filters, repeat=repeat).double().train(training)
    randomise(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(3, 3, *size, dtype=torch.float64)
    expected = reference_forward(x, state, scales=3, repeat=repeat, training=training)
    torch.testing.assert_close(model(x), expected)


def test_only_the_first_block_gives_its_shortcut_the_activated_input() -> None:
    model = WideResNet(5, filters=4, repeat=2)
    flags = [b.activate_before_residual for b in model.blocks if isinstance(b, ResidualBlock)]
    assert flags == [True] + [False] * 5


@pytest.mark.parametrize("activate", [True, False])
def test_shortcut_takes_the_activated_or_the_raw_input(activate: bool) -> None:
    block = ResidualBlock(4, 4, activate_before_residual=activate)
    nn.init.zeros_(block.conv2.weight)  # only the shortcut is left
    x = torch.randn(2, 4, 6, 6)
    expected = (
        leaky_relu(batch_norm(x, None, None, training=True, eps=1e-3), 0.1) if activate else x
    )
    torch.testing.assert_close(block(x), expected)


def test_strided_convolution_of_ones_counts_the_pixels_under_each_window() -> None:
    conv = SameConv2d(1, 1, 3, stride=2)
    nn.init.ones_(conv.weight)
    even, odd = conv(torch.ones(1, 1, 4, 4)), conv(torch.ones(1, 1, 5, 5))
    # Even: windows start at pixels 0 and 2, the last one sticks out. Odd: one sticks out each side.
    assert even[0, 0].tolist() == [[9.0, 6.0], [6.0, 4.0]]
    assert odd[0, 0].tolist() == [[4.0, 6.0, 4.0], [6.0, 9.0, 6.0], [4.0, 6.0, 4.0]]
    mixed = conv(torch.ones(1, 1, 4, 3))
    assert mixed[0, 0].tolist() == [[6.0, 6.0], [4.0, 4.0]]


@pytest.mark.parametrize(
    ("size", "kernel_size", "stride", "expected"),
    [
        (32, 3, 2, (0, 1)),
        (33, 3, 2, (1, 1)),
        (1, 3, 2, (1, 1)),
        (2, 3, 2, (0, 1)),
        (32, 3, 1, (1, 1)),
        (31, 3, 1, (1, 1)),
        (32, 1, 2, (0, 0)),
        (33, 1, 2, (0, 0)),
        (224, 7, 2, (2, 3)),
    ],
)
def test_same_padding_is_tensorflows(
    size: int, kernel_size: int, stride: int, expected: tuple[int, int]
) -> None:
    assert same_padding(size, kernel_size, stride) == expected


def test_batch_norms_keep_999_thousandths_and_add_a_thousandth_to_the_variance() -> None:
    model = wideresnet28(10)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 3 * 4 * 2 + 1
    assert {(norm.momentum, norm.eps) for norm in norms} == {(0.001, 1e-3)}
    images = torch.randn(4, 3, 8, 8) + 2.0
    mean = model.stem(images).mean((0, 2, 3))
    model(images)
    torch.testing.assert_close(norms[0].running_mean, 0.001 * mean)


def test_kernels_start_at_the_deviation_of_the_reference_and_biases_at_zero() -> None:
    torch.manual_seed(0)
    model = wideresnet28(10)
    for module in model.modules():
        if isinstance(module, SameConv2d):
            outputs, _, height, width = module.weight.shape
            measured = module.weight.std(correction=0).item()
            tolerance = 5 / math.sqrt(2 * module.weight.numel())  # five sigma
            assert measured == pytest.approx(
                math.sqrt(2 / (height * width * outputs)), rel=tolerance
            )
            assert module.bias is not None
            assert not module.bias.any()
    largest = model.blocks[-1].conv2.weight
    assert largest.std().item() == pytest.approx(math.sqrt(2 / (9 * 128)), rel=0.01)
    assert abs(largest.mean().item()) < 5 * math.sqrt(2 / (9 * 128) / largest.numel())


def test_dense_starts_normal_at_glorots_deviation() -> None:
    torch.manual_seed(0)
    dense = wideresnet28(1000).dense
    deviation = math.sqrt(2 / (128 + 1000))
    assert dense.weight.std().item() == pytest.approx(deviation, rel=0.02)
    assert dense.weight.abs().max().item() > 3 * deviation  # a uniform draw ends at sqrt(3)
    assert not dense.bias.any()


@pytest.mark.parametrize("name", ["wrn-28-2", "cnn"])
def test_kernel_parameters_are_the_weights_of_two_and_four_axes(name: str) -> None:
    model = build_model(name, 10, 3)
    kernels = {id(p) for p in kernel_parameters(model)}
    assert kernels == {id(p) for p in model.parameters() if p.ndim in (2, 4)}
    assert len(kernels) == len(kernel_parameters(model))


def test_kernel_parameters_leave_out_norms_embeddings_and_repeats() -> None:
    shared = nn.Linear(4, 4)
    twin = nn.Linear(4, 4)
    twin.weight = shared.weight
    model = nn.Sequential(
        nn.Embedding(4, 4), shared, nn.LayerNorm([4, 4]), shared, twin, nn.ConvTranspose2d(1, 1, 2)
    )
    kernels = kernel_parameters(model)
    assert [id(p) for p in kernels] == [id(shared.weight), id(model[5].weight)]


@pytest.mark.parametrize("name", ["wrn-28-2", "cnn"])
def test_gradient_reaches_every_parameter(name: str) -> None:
    # In evaluation mode: in training mode a BatchNorm subtracts every bias of a convolution.
    torch.manual_seed(0)
    model = build_model(name, 10, 3).eval()
    cross_entropy(model(torch.randn(4, 3, 16, 16)), torch.tensor([0, 1, 2, 3])).backward()
    still = [
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 1e-6
    ]
    assert still == []


def test_biases_of_convolutions_do_not_change_logits_in_training_mode() -> None:
    torch.manual_seed(0)
    model = WideResNet(5, filters=4, repeat=2).double()
    x = torch.randn(4, 3, 9, 9, dtype=torch.float64)
    before = model(x)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, SameConv2d) and module.bias is not None:
                module.bias.normal_()
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("name", ["wrn-28-2", "cnn"])
def test_channels_last_reaches_the_end_with_the_same_logits(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name, 10, 3).eval()
    x = torch.randn(2, 3, 16, 16)
    expected = model(x)
    layouts: dict[str, bool] = {}
    for layer_name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.BatchNorm2d):
            layer.register_forward_hook(
                lambda _module, _inputs, output, key=layer_name: layouts.update(
                    {key: output.is_contiguous(memory_format=torch.channels_last)}
                )
            )
    model.to(memory_format=torch.channels_last)
    actual = model(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert layouts
    assert [key for key, kept in layouts.items() if not kept] == []


@pytest.mark.parametrize("name", ["wrn-28-2", "cnn"])
def test_bfloat16_autocast_stays_near_float32_and_trains(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name, 10, 1)
    x = torch.randn(16, 1, 8, 8)
    expected = model(x).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
    assert logits.dtype == torch.bfloat16
    error = (logits.float() - expected).norm() / expected.norm()
    assert error < 0.05
    logits.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "model", [WideResNet(10, in_channels=1, filters=4, repeat=1), SmallCNN(10)], ids=["wrn", "cnn"]
)
def test_network_is_one_graph(model: nn.Module) -> None:
    model.eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for size in (8, 9):
        x = torch.randn(2, 1, size, size)
        torch.testing.assert_close(compiled(x), model(x))


def test_statistics_stay_while_tracking_is_off() -> None:
    model = WideResNet(5, filters=4, repeat=1)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    for norm in norms:
        norm.track_running_stats = False
    model(torch.randn(2, 3, 8, 8))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.named_buffers())


@pytest.mark.parametrize("name", ["wrn-28-2", "cnn"])
def test_synchronised_batch_norm_keeps_the_logits(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name, 10, 3).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert any(isinstance(m, nn.SyncBatchNorm) for m in converted.modules())
    torch.testing.assert_close(converted(x), expected)


def test_small_cnn_is_small() -> None:
    conv = 9 * (1 * 32 + 32 * 64 + 64 * 64)
    assert count(SmallCNN(10)) == conv + 2 * (32 + 64 + 64) + 64 * 10 + 10 == 56554


def test_unknown_name_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"name must be one of 'wrn-28-2', 'cnn', got 'resnet50'"):
        build_model("resnet50", 10, 3)
