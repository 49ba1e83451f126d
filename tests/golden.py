"""Draws and batches that every version gives to the last bit: ``python -m tests.golden`` records.

A run that was resumed, or repeated with a later version, must see the batches that it would have
seen. What is integers, or one product and one sum per value, is held by a digest of its bytes;
what goes through matrix products or exponentials, whose order and last bit depend on the processor,
by a few of its values.
"""

import hashlib
import json
from pathlib import Path

import torch

from gpu_mixmatch import ColorJitter, MixMatch, RandAugment, WeakAugment, sampling
from gpu_mixmatch.data.formats.common import split_labels
from gpu_mixmatch.types import AugmentPolicy, DrawPlan

FILE = Path(__file__).with_suffix(".json")
NUM_CLASSES = 3
# padding, its mode, zoom, flip, blur
POLICIES = {
    "reflect": (2, "reflect", (0, 0), 0.5, None),
    "zeros": (1, "zeros", (0, 0), 0.0, None),
    "edge, zoom": (1, "edge", (0, 3), 0.5, None),
    "zoom, blur": (0, "reflect", (1, 2), 0.5, (0.3, 1.2)),
}
EXACT = ("reflect", "zeros")
IMPLS = ("eager", "numba")
DTYPES = (torch.float32, torch.bfloat16)


def digest(*tensors):
    """The first 16 hexadecimal digits of SHA-256 of the tensors' bytes in row-major order."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def samples(tensor, count=12):
    """Values at places that are spread over a tensor."""
    flat = tensor.detach().double().reshape(-1)
    return [round(value, 7) for value in flat[:: max(1, len(flat) // count)].tolist()]


def draws():
    """Digests of draws by what they are for."""
    ids = torch.tensor([5, 2**33 + 1, 2**63 - 1, 0])
    found = {}
    for name, policy in POLICIES.items():
        padding, _, zoom, flip, blur = policy
        plan = DrawPlan(policy=AugmentPolicy(padding, zoom, flip, blur))
        drawn = sampling.draw_batch(7, 3, ids, 5, plan)
        found[f"batch, {name}"] = digest(*drawn[0], *drawn[1])
    for mix in ("all", "separate", "labelled", "unlabelled", "none"):
        for lam in ("sample", "batch"):
            params = sampling.draw_mixup(2**62, 2**31, 3, 70, mix=mix, lam=lam, alpha=0.75)
            found[f"mixup, {mix}, λ per {lam}"] = digest(*params)
    for alpha in (0.1, 2.0, 16.0):
        found[f"mixup, α = {alpha}"] = digest(*sampling.draw_mixup(1, 2, ids, ids, alpha=alpha))
    for name, engine in strong_engines().items():
        params, _ = sampling.draw_batch(7, 3, ids, 5, DrawPlan(policy=engine.policy))
        found[f"batch, {name}"] = digest(*params)
    augment = sampling.draw_augment(3, 9, 6, (0, 1, 2), padding=4, flip=0.3)
    found["augment, three views"] = digest(*augment)
    for view in (0, 1):
        found[f"epoch, view {view}"] = digest(sampling.epoch_order(5, 2, 1000, view=view))
    labels = torch.arange(100) % 7
    found["split of labels"] = digest(split_labels(labels, 17, 11, 7))
    seeds = sampling.generator_seed(1, 2), sampling.batch_seed(1, 2, ids, 4)
    found["seeds of foreign generators"] = " ".join(map(str, seeds))
    return found


def strong_engines():
    """Engines whose views are bytes until the last step, by name."""
    presets = ("fixmatch", "uda", "kekmodel", "usb", "torchvision", "trivial")
    found = {f"RandAugment.{name}": getattr(RandAugment, name)() for name in presets}
    found["ColorJitter"] = ColorJitter(WeakAugment.imagenet(24), gray=0.2, prob=0.8)
    found["crop"] = RandAugment.fixmatch(WeakAugment(2, size=(24, 20), mean=0.4, std=0.3))
    return found


def strong_views():
    """Digests of the views of an image in 40 steps, by engine."""
    down, across, channel = torch.meshgrid(
        torch.arange(36), torch.arange(32), torch.arange(3), indexing="ij"
    )
    image = (7 * down + 3 * across * (channel + 1) + (down * across) % 23).remainder(256).byte()
    images = image.permute(2, 0, 1).repeat(40, 1, 1, 1)
    return {name: digest(engine(images, 3, 1)) for name, engine in strong_engines().items()}


class _Net(torch.nn.Module):
    """Logits by one product: sums of pixels."""

    def forward(self, images):
        return torch.stack([part.float().mean(dim=(1, 2, 3)) for part in images.split(2, 2)], 1)


def _data(num_x, num_u, size):
    generator = torch.Generator().manual_seed(0)
    shape = (num_x + num_u, 3, *size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return images[:num_x], torch.arange(num_x) % NUM_CLASSES, images[num_x:]


def batch(policy, impl, dtype, size=(6, 5), num_x=3, num_u=4):
    """The second batch of a builder."""
    fields = {"mean": (0.4, 0.5, 0.45), "std": (0.3, 0.25, 0.2), "dtype": dtype, "impl": impl}
    mixmatch = MixMatch(WeakAugment(*POLICIES[policy], **fields), NUM_CLASSES, seed=11, impl=impl)
    model = _Net() if size == (6, 5) else lambda images: images[:, :, 0, 0].float()
    for _ in range(2):
        built = mixmatch(*_data(num_x, num_u, size), model)
    return built


def batches():
    """What is held of a batch by policy, implementation and dtype."""
    found = {}
    for policy in POLICIES:
        for impl in IMPLS:
            for dtype in DTYPES:
                built = batch(policy, impl, dtype)
                name = f"{policy}, {impl}, {str(dtype).removeprefix('torch.')}"
                inputs = digest(built.inputs.view(torch.uint8)) if policy in EXACT else None
                found[name] = {
                    "inputs": inputs or samples(built.inputs),
                    "targets": samples(built.targets),
                }
    for impl in IMPLS:  # large enough to be mixed from bytes
        built = batch("reflect", impl, torch.float32, (64, 64), 64, 64)
        found[f"reflect, {impl}, 64 px"] = {
            "inputs": digest(built.inputs),
            "targets": samples(built.targets),
        }
    return found


def main():
    """Record."""
    content = {"draws": draws(), "batches": batches(), "strong views": strong_views()}
    FILE.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {FILE.name}")


if __name__ == "__main__":
    main()
