"""All randomness of the package: pure functions of (seed, step, sample id, view, purpose)."""

from gpu_mixmatch.sampling.beta import FoldedBetaQuantile, folded_beta_quantile
from gpu_mixmatch.sampling.draws import (
    draw_augment,
    draw_batch,
    draw_mixup,
    draw_regions,
    epoch_order,
    split_order,
)
from gpu_mixmatch.sampling.packing import augment_to_device, pack, unpack, words_per_row
from gpu_mixmatch.sampling.philox import (
    Purpose,
    Words,
    batch_seed,
    check_key,
    generator_seed,
    philox,
)
from gpu_mixmatch.sampling.shuffle import shuffle_grid, shuffled_parts

__all__ = [
    "FoldedBetaQuantile",
    "Purpose",
    "Words",
    "augment_to_device",
    "batch_seed",
    "check_key",
    "draw_augment",
    "draw_batch",
    "draw_mixup",
    "draw_regions",
    "epoch_order",
    "folded_beta_quantile",
    "generator_seed",
    "pack",
    "philox",
    "shuffle_grid",
    "shuffled_parts",
    "split_order",
    "unpack",
    "words_per_row",
]
