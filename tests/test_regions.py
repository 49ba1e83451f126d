"""Windows of random resized crops are Philox words: recorded bits, keyed by id, evenly spread."""

import numpy as np
import pytest
import torch

from gpu_mixmatch.sampling import draw_regions

NO_IDS = torch.empty(0, dtype=torch.int64)


def test_regions_have_the_bits_that_were_recorded():
    regions = draw_regions(
        7, 123, torch.tensor([0, 5, 2**40 + 3]), torch.tensor([5, -1]), (0.2, 0.9)
    )
    assert regions.view(np.uint32).tolist() == [
        [1060745705, 1064006464, 1056751556, 1042615924],
        [1057014361, 1065728550, 1058776387, 1064836892],
        [1058110726, 1063295572, 1059241073, 1059182405],
        [1055862793, 1065578205, 1015957952, 1050785220],
        [1060000853, 1067646087, 1054351736, 1036114424],
    ]
    last = draw_regions(2**62 + 11, 2**32 - 1, torch.tensor([1]), NO_IDS, (0.5, 0.5))
    assert last.view(np.uint32).tolist() == [[1056964608, 1062752767, 1060214383, 1037388208]]


def test_regions_depend_on_seed_step_id_and_part_alone():
    ids_x, ids_u = torch.arange(5, 9), torch.tensor([2**40, 5, 6])
    limits = (0.2, 0.7)
    whole = draw_regions(1, 2, ids_x, ids_u, limits)
    assert whole.shape == (7, 4)
    assert whole.dtype == np.float32
    assert np.array_equal(draw_regions(1, 2, ids_x[[3, 0]], ids_u[:1], limits), whole[[3, 0, 4]])
    assert not np.isclose(whole[0], whole[5]).any()  # id 5, labelled and unlabelled
    for seed, step in ((2, 2), (1, 3)):
        assert not np.isclose(draw_regions(seed, step, ids_x, ids_u, limits), whole).any()


@pytest.mark.parametrize("aspect", [(3 / 4, 4 / 3), (0.5, 0.6)])
def test_regions_fill_their_limits_evenly(aspect):
    area, ratio, down, across = draw_regions(
        0, 0, torch.arange(20_000), NO_IDS, (0.2, 0.7), aspect=aspect
    ).T
    for values, low, high in (
        (area, 0.2, 0.7),
        (np.log(ratio), *np.log(aspect)),
        (down, 0, 1),
        (across, 0, 1),
    ):
        counts, _ = np.histogram(values, bins=10, range=(low, high))
        assert counts.sum() == 20_000
        assert (np.abs(counts - 2000) < 5 * 2000**0.5).all()
