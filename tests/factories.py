"""Images, labels and small networks for tests to which any of them will do."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def random_images(
    count: int,
    shape: tuple[int, int, int] = (3, 8, 8),
    *,
    nhwc: bool = False,
    dtype: torch.dtype = torch.uint8,
    seed: int = 0,
) -> Tensor:
    """Images of ``shape`` (channels, height, width): bytes, or the same as floats in [0, 1]."""
    channels, height, width = shape
    size = (count, height, width, channels) if nhwc else (count, *shape)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    return images if dtype == torch.uint8 else (images.float() / 255).to(dtype)


def random_labels(count: int, num_classes: int, *, seed: int = 0) -> Tensor:
    return torch.randint(0, num_classes, (count,), generator=torch.Generator().manual_seed(seed))


def random_data(
    num_labelled: int = 4,
    num_unlabelled: int = 6,
    shape: tuple[int, int, int] = (3, 12, 12),
    *,
    num_classes: int,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, y and u of one step."""
    images = random_images(num_labelled + num_unlabelled, shape, seed=seed).to(device)
    labels = random_labels(num_labelled, num_classes, seed=seed).to(device)
    x, u = (part.clone() for part in images.split([num_labelled, num_unlabelled]))
    return x, labels, u


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """What is drawn inside is a function of the seed; the generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class ConvNet(nn.Module):
    """Convolution, BatchNorm, mean over the pixels, linear: for images of any size."""

    def __init__(self, num_classes: int, channels: int = 3, *, seed: int = 0) -> None:
        super().__init__()
        with _seeded(seed):
            self.conv = nn.Conv2d(channels, 4, 3)
            self.norm = nn.BatchNorm2d(4)
            self.dense = nn.Linear(4, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.dense(self.norm(self.conv(images)).mean(dim=(2, 3)))


class LinearNet(nn.Module):
    """A linear map of the pixels, with logits far enough apart that guesses are not uniform."""

    def __init__(
        self, num_classes: int, shape: tuple[int, int, int] = (3, 8, 8), *, seed: int = 0
    ) -> None:
        super().__init__()
        size = math.prod(shape)
        with _seeded(seed):
            self.dense = nn.Linear(size, num_classes, bias=False)
            nn.init.normal_(self.dense.weight, std=2.5 / size**0.5)

    def forward(self, images: Tensor) -> Tensor:
        return self.dense(images.flatten(1))


class PooledNet(nn.Module):
    """A linear map of the mean square of each channel: for images of any size, dtype and kind."""

    def __init__(self, num_classes: int, channels: int = 3, *, seed: int = 0) -> None:
        super().__init__()
        with _seeded(seed):
            self.dense = nn.Linear(channels, num_classes)
            nn.init.normal_(self.dense.weight)

    def forward(self, images: Tensor) -> Tensor:
        return self.dense(images.float().square().mean(dim=(2, 3)))


class ConstantNet(nn.Module):
    """The same logits for every image."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.register_buffer("logits", torch.tensor(logits))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits.expand(len(images), -1)
