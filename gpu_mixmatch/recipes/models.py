"""Networks by name, the paper's Wide ResNet and a small CNN for a CPU, and their kernels.

References:
    Berthelot et al., "MixMatch", NeurIPS 2019 (arXiv 1905.02249), section 4.1.
    Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016 (arXiv 1605.07146).
    github.com/google-research/mixmatch, ``libml/models.py``, class ``ResNet``.
"""

import math

from torch import Tensor, nn
from torch.nn.functional import leaky_relu, max_pool2d, pad
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = [
    "SmallCNN",
    "WideResNet",
    "build_model",
    "fill_statistics_in",
    "kernel_parameters",
    "wideresnet28",
]

MODEL_NAMES = ("wrn-28-2", "cnn")

NEGATIVE_SLOPE = 0.1  # of every leaky ReLU

KERNEL_MODULES = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def same_padding(size: int, kernel_size: int, stride: int) -> tuple[int, int]:
    """Return the zeros before and after one axis for TensorFlow's ``"same"`` convolution.

    The output has ``ceil(size / stride)`` values, and an odd zero goes after: a 3-wide kernel of
    stride 2 pads an even axis by (0, 1) and an odd one by (1, 1). ``padding=1`` of PyTorch gives
    the same output shape on an even axis, but samples it one pixel earlier.

    Args:
        size: Length of the axis, in pixels.
        kernel_size: Length of the kernel along it.
        stride: Stride along it.

    Returns:
        The number of zeros before the axis and after it.
    """
    total = max(((size + stride - 1) // stride - 1) * stride + kernel_size - size, 0)
    return total // 2, total - total // 2


class SameConv2d(nn.Conv2d):
    """Convolve with TensorFlow's ``"same"`` padding, which depends on the size of the input.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Side of the square kernel, odd.
        stride: Stride along both axes.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1
    ) -> None:
        # At stride 1 "same" is symmetric for an odd kernel, and the convolution pads for free.
        padding = kernel_size // 2 if stride == 1 else 0
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=padding)

    def reset_parameters(self) -> None:
        """Draw the kernel as the reference does, and set the bias to zero."""
        # The reference's stddev is rsqrt(0.5 * k * k * filters): He's rule for the fan-out.
        fan_out = self.kernel_size[0] * self.kernel_size[1] * self.out_channels
        nn.init.normal_(self.weight, std=math.sqrt(2.0 / fan_out))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``input``.

        Args:
            input: Feature maps, ``[N, in_channels, H, W]``.

        Returns:
            Feature maps, ``[N, out_channels, ceil(H / stride), ceil(W / stride)]``.
        """
        if self.stride[0] > 1:
            top, bottom = same_padding(input.shape[2], self.kernel_size[0], self.stride[0])
            left, right = same_padding(input.shape[3], self.kernel_size[1], self.stride[1])
            if top + bottom + left + right > 0:
                input = pad(input, (left, right, top, bottom))
        return super().forward(input)


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """Build a BatchNorm with the reference's constants.

    Args:
        channels: Channels of the feature maps.

    Returns:
        The module; a plain one, so that ``convert_sync_batchnorm`` loses nothing.
    """
    # TensorFlow's momentum 0.999 is the share kept, PyTorch's 0.001 the share replaced; 1e-3 is
    # the default epsilon of tf.layers.batch_normalization.
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.001)


class ResidualBlock(nn.Module):
    """Add two pre-activated 3x3 convolutions to a shortcut.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output; where they differ from ``in_channels`` the shortcut
            is a 1x1 convolution, else the identity.
        stride: Stride of the first convolution and of the shortcut; 1 if ``in_channels`` equals
            ``out_channels``.
        activate_before_residual: Give the shortcut the activated input instead of the raw one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        activate_before_residual: bool = False,
    ) -> None:
        super().__init__()
        self.activate_before_residual = activate_before_residual
        self.norm1 = batch_norm(in_channels)
        self.conv1 = SameConv2d(in_channels, out_channels, 3, stride)
        self.norm2 = batch_norm(out_channels)
        self.conv2 = SameConv2d(out_channels, out_channels, 3)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = SameConv2d(in_channels, out_channels, 1, stride)

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the block.

        Args:
            inputs: Feature maps, ``[N, in_channels, H, W]``.

        Returns:
            Feature maps, ``[N, out_channels, ceil(H / stride), ceil(W / stride)]``.
        """
        activated = leaky_relu(self.norm1(inputs), NEGATIVE_SLOPE)
        residual: Tensor = self.conv1(activated)
        residual = self.conv2(leaky_relu(self.norm2(residual), NEGATIVE_SLOPE))
        shortcut: Tensor = self.shortcut(activated if self.activate_before_residual else inputs)
        return shortcut + residual


class WideResNet(nn.Module):
    """Classify images with the pre-activation Wide ResNet of the MixMatch reference.

    The defaults are its WRN-28-2, with 1 469 642 parameters for 3 channels and 10 classes. It
    differs from other ports in what the reference does: convolutions have biases, the shortcut of
    the very first block takes the activated input, and strided convolutions pad as TensorFlow's
    ``"same"`` (see `same_padding`). Images are expected normalised, in [-1, 1] in the paper.

    Args:
        num_classes: Number of classes, L.
        in_channels: Channels of an image.
        filters: Channels of the first stage; stage s has ``filters * 2**s``.
        repeat: Residual blocks in a stage.
        scales: Number of stages; all but the first halve the resolution. The reference takes
            log2(width of an image) - 2, which is 3 at 32 pixels.

    References:
        MixMatch (arXiv 1905.02249), section 4.1; google-research/mixmatch, ``libml/models.py``,
        ``ResNet.classifier``.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        in_channels: int = 3,
        filters: int = 32,
        repeat: int = 4,
        scales: int = 3,
    ) -> None:
        """Draw the initial weights from PyTorch's global generator."""
        super().__init__()
        # Biases: libml/models.py leaves use_bias of tf.layers.conv2d at True in ResNet (ShakeNet
        # alone turns it off). Every path from one to the logits meets a BatchNorm that subtracts
        # it, so in training mode they change no logit and their gradient is rounding noise.
        self.stem = SameConv2d(in_channels, 16, 3)
        blocks: list[ResidualBlock] = []
        channels = 16
        for scale in range(scales):
            for index in range(repeat):
                blocks.append(
                    ResidualBlock(
                        channels,
                        filters << scale,
                        stride=2 if scale > 0 and index == 0 else 1,
                        activate_before_residual=scale == 0 and index == 0,
                    )
                )
                channels = filters << scale
        self.blocks = nn.Sequential(*blocks)
        self.norm = batch_norm(channels)
        self.dense = nn.Linear(channels, num_classes)
        # tf.glorot_normal_initializer truncates at two deviations and rescales to this deviation.
        nn.init.xavier_normal_(self.dense.weight)
        nn.init.zeros_(self.dense.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of ``images``.

        Args:
            images: Normalised images, ``[N, C, H, W]``, of any H and W.

        Returns:
            Logits, ``[N, L]``.
        """
        features = leaky_relu(self.norm(self.blocks(self.stem(images))), NEGATIVE_SLOPE)
        logits: Tensor = self.dense(features.mean(dim=(2, 3)))
        return logits


def wideresnet28(
    num_classes: int, *, in_channels: int = 3, width: int = 2, filters: int | None = None
) -> WideResNet:
    """Build a Wide ResNet of depth 28.

    Args:
        num_classes: Number of classes, L.
        in_channels: Channels of an image.
        width: Widening factor; the first stage has ``16 * width`` channels.
        filters: Channels of the first stage, in place of ``width``: the paper's larger CIFAR-100
            network has 135.

    Returns:
        The network, from images ``[N, C, H, W]`` to logits ``[N, L]``.

    References:
        MixMatch (arXiv 1905.02249), section 4.1.
    """
    filters = 16 * width if filters is None else filters
    return WideResNet(num_classes, in_channels=in_channels, filters=filters)


class SmallCNN(nn.Module):
    """Classify images of 8 to 32 pixels with three convolutions, fast enough for a CPU.

    It is ours, not the paper's: it has 56 554 parameters for 1 channel and 10 classes. Its
    BatchNorm keeps PyTorch's momentum of 0.1, which fills the running statistics within some
    fifty steps.

    Args:
        num_classes: Number of classes, L.
        in_channels: Channels of an image.
        filters: Channels of the first convolution; the other two have twice as many.
    """

    def __init__(self, num_classes: int, *, in_channels: int = 1, filters: int = 32) -> None:
        """Draw the initial weights from PyTorch's global generator."""
        super().__init__()
        # No biases: the BatchNorm after each convolution would subtract them.
        self.conv1 = nn.Conv2d(in_channels, filters, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, 2 * filters, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * filters)
        self.conv3 = nn.Conv2d(2 * filters, 2 * filters, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(2 * filters)
        self.dense = nn.Linear(2 * filters, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of ``images``.

        Args:
            images: Normalised images, ``[N, C, H, W]``, H and W at least 4.

        Returns:
            Logits, ``[N, L]``.
        """
        features = leaky_relu(self.norm1(self.conv1(images)), NEGATIVE_SLOPE)
        features = max_pool2d(features, 2)
        features = leaky_relu(self.norm2(self.conv2(features)), NEGATIVE_SLOPE)
        features = max_pool2d(features, 2)
        features = leaky_relu(self.norm3(self.conv3(features)), NEGATIVE_SLOPE)
        logits: Tensor = self.dense(features.mean(dim=(2, 3)))
        return logits


def build_model(
    name: str, num_classes: int, in_channels: int, filters: int | None = None
) -> nn.Module:
    """Build a network by its name on the command line.

    Its BatchNorm is the paper's or PyTorch's; a run calls `fill_statistics_in` for its own length.

    Args:
        name: ``"wrn-28-2"`` for the paper's `WideResNet`, ``"cnn"`` for `SmallCNN`.
        num_classes: Number of classes, L.
        in_channels: Channels of an image.
        filters: Channels of the network's first stage; None takes 32, as both have by default.

    Returns:
        The network, from images ``[N, C, H, W]`` to logits ``[N, L]``.

    Raises:
        ValueError: If ``name`` is neither.
    """
    filters = 32 if filters is None else filters
    if name == "wrn-28-2":
        return wideresnet28(num_classes, in_channels=in_channels, filters=filters)
    if name == "cnn":
        return SmallCNN(num_classes, in_channels=in_channels, filters=filters)
    raise ValueError(f"name must be one of {', '.join(map(repr, MODEL_NAMES))}, got {name!r}")


def fill_statistics_in(model: nn.Module, steps: int) -> None:
    """Let BatchNorm's running statistics forget their start within a run of so many steps.

    They begin at mean 0 and variance 1. After n steps a share (1 - momentum)^n of that is left:
    0.86 of it after 150 steps at the paper's momentum of 0.001, and the averaged network is then
    evaluated with statistics that none of its layers has. A momentum of at least 10 / steps
    leaves less than e^-10. From 10,000 steps on this changes no layer of `WideResNet`, and from
    100 steps on none of `SmallCNN`.

    Args:
        model: Its BatchNorm layers of any kind are changed in place; those that average over all
            steps alike (momentum None) stay.
        steps: Length of the run, at least 1.
    """
    least = min(1.0, 10 / steps)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.momentum is not None:
            module.momentum = max(module.momentum, least)


def kernel_parameters(model: nn.Module) -> list[nn.Parameter]:
    """List the weights of convolutions and linear layers, which weight decay applies to.

    The reference decays the variables that have "kernel" in their name: no bias, and no scale or
    shift of a BatchNorm. A weight that a parametrization computes is not a parameter, and is left
    out.

    Args:
        model: Any module, on its own or wrapped by ``torch.compile`` or DDP.

    Returns:
        Each such weight once, also if layers share it, in the order of ``model.modules()``.

    References:
        google-research/mixmatch, ``mixmatch.py``, ``MixMatch.model``.
    """
    weights = [module.weight for module in model.modules() if isinstance(module, KERNEL_MODULES)]
    return list(dict.fromkeys(w for w in weights if isinstance(w, nn.Parameter)))
