"""scikit-learn's handwritten digits."""

import numpy as np
import numpy.typing as npt

from gpu_mixmatch._extras import need
from gpu_mixmatch.data.formats.common import ImageData, Labels, image_data


def load_digits_data() -> ImageData:
    """Load 8x8 grey digits, 1297 to train and 500 to test; see `data.datasets.load_dataset`."""
    digits = need("sklearn.datasets", "the digits data set").load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]  # [1797, 1, 8, 8]
    labels = digits.target.astype(np.int64)
    is_test = _spread_test_rows(labels, num_classes=10, num_test=500)
    train = images[~is_test], labels[~is_test]
    return image_data("digits", 10, train, (images[is_test], labels[is_test]))


def _spread_test_rows(labels: Labels, num_classes: int, num_test: int) -> npt.NDArray[np.bool_]:
    """Mark the rows to test on: of each class its share, evenly over the file."""
    shares = np.bincount(labels, minlength=num_classes) * num_test
    quotas = shares // len(labels)
    largest_remainders = np.argsort(-(shares % len(labels)), kind="stable")
    quotas[largest_remainders[: num_test - quotas.sum()]] += 1
    is_test = np.zeros(len(labels), dtype=np.bool_)
    for class_index, quota in enumerate(quotas):
        rows = np.flatnonzero(labels == class_index)
        steps = np.arange(len(rows) + 1) * quota // len(rows)  # rises from 0 to quota
        is_test[rows[np.diff(steps) == 1]] = True
    return is_test
