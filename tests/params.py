"""Draws of an augmentation that tests write by hand, and what the oracle makes of any draws."""

import numpy as np
import torch

from gpu_mixmatch.types import AugmentParams
from tests import oracle


def still_params(rows, padding=0, **fields):
    """Params that leave an image as it is, unless told otherwise."""
    params = AugmentParams(
        top=torch.full((rows,), padding, dtype=torch.int32),
        left=torch.full((rows,), padding, dtype=torch.int32),
        flip=torch.zeros(rows, dtype=torch.int32),
        zoom=torch.zeros(rows, 4, dtype=torch.int32),
        sigma=torch.zeros(rows),
    )
    dtypes = {name: field.dtype for name, field in params._asdict().items()}
    return params._replace(
        **{name: torch.as_tensor(value, dtype=dtypes[name]) for name, value in fields.items()}
    )


def oracle_draws(params):
    """One mapping per row, as `oracle.augment` wants it."""
    return [
        {
            "top": int(params.top[row]),
            "left": int(params.left[row]),
            "flip": bool(params.flip[row]),
            "zoom": tuple(params.zoom[row].tolist()),
            "sigma": float(params.sigma[row]),
        }
        for row in range(len(params.top))
    ]


def oracle_policy(augment, channels):
    def spread(values):
        return values * channels if len(values) == 1 else values

    return {
        "padding": augment.padding,
        "padding_mode": augment.padding_mode,
        "blur_radius": augment.blur_radius,
        "mean": spread(augment.mean),
        "std": spread(augment.std),
    }


def oracle_rows(images, params, augment):
    """The oracle on the NCHW image of each row, in float64, with the crops cut to fit."""
    channels, height, width = images.shape[1:]
    policy = oracle_policy(augment, channels)
    rows = np.zeros(images.shape, dtype=np.float64)
    for row, (image, draws) in enumerate(zip(images, oracle_draws(params), strict=True)):
        top, bottom, left, right = draws["zoom"]
        top, left = min(top, height - 1), min(left, width - 1)
        bottom, right = min(bottom, height - 1 - top), min(right, width - 1 - left)
        pixels = image.numpy() if image.dtype == torch.uint8 else image.double().numpy() * 255
        rows[row] = oracle.augment(pixels, draws | {"zoom": (top, bottom, left, right)}, policy)
    return torch.from_numpy(rows)
