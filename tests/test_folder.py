"""A folder of image files as a data set: what it finds, decodes and refuses."""

import numpy as np
import pytest
import torch
from PIL import Image

from gpu_mixmatch.data.datasets import FolderData, load_dataset
from gpu_mixmatch.data.images import image_folder
from tests.image_files import (
    CLASSES,
    broken_images,
    decode,
    encode,
    tile,
    unusual_images,
    write_folder,
)


@pytest.fixture
def root(tmp_path):
    for part, count in (("labelled", 4), ("unlabelled", 2), ("test", 3)):
        write_folder(tmp_path / part, count, width=32)
    return tmp_path


def test_parts_come_with_their_images_labels_and_classes(root):
    data = load_dataset("folder", root, 32)
    assert isinstance(data, FolderData)
    assert (len(data.labelled), len(data.unlabelled)) == (12, 6)
    assert data.class_names == CLASSES
    assert data.num_classes == 3
    assert data.test_labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    for number, label in enumerate(data.test_labels.tolist()):
        expected = torch.from_numpy(np.asarray(tile(CLASSES[label], number % 3, width=32)).copy())
        assert torch.equal(data.test_images[number].permute(1, 2, 0), expected)
    image, label = data.labelled[5]
    assert label == 1
    assert np.array_equal(np.asarray(image), np.asarray(tile(CLASSES[1], 1, width=32)))


def test_unlabelled_images_have_no_labels_whatever_folders_they_lie_in(root):
    data = load_dataset("folder", root, 32)
    assert data.unlabelled.index.labels is None
    assert data.unlabelled[0].size == (32, 32)
    (root / "unlabelled" / "outside.png").write_bytes(encode(tile(), "PNG"))
    assert len(load_dataset("folder", root, 32).unlabelled) == 7


def test_the_largest_centred_square_is_resized(tmp_path):
    picture = np.zeros((20, 60, 3), np.uint8)
    picture[:, 20:40] = (10, 200, 30)
    for part in ("labelled/a", "unlabelled"):
        (tmp_path / part).mkdir(parents=True)
        (tmp_path / part / "1.png").write_bytes(encode(Image.fromarray(picture), "PNG"))
    for size in (5, 20, 31):
        image = load_dataset("folder", tmp_path, size).unlabelled.load()
        assert image.shape == (1, 3, size, size)
        inside = image[0][:, :, 1:-1]  # at the edge the filter sees what is beside the square
        assert torch.equal(
            inside, torch.tensor([10, 200, 30]).byte()[:, None, None].expand_as(inside)
        )


def test_unusual_images_become_upright_rgb(tmp_path):
    (tmp_path / "labelled" / "a").mkdir(parents=True)
    (tmp_path / "unlabelled").mkdir()
    files = {name: content for name, content in unusual_images().items() if "1x1" not in name}
    for name, content in files.items():
        (tmp_path / "unlabelled" / name).write_bytes(content)
    (tmp_path / "labelled" / "a" / "1.png").write_bytes(encode(tile(), "PNG"))
    images = load_dataset("folder", tmp_path, 32).unlabelled
    for number, path in enumerate(images.index.paths):
        pixels = decode(files[path.rpartition("/")[2]])  # [40, 32, 3] or [32, 40, 3]
        tall, wide = pixels.shape[0] - 32, pixels.shape[1] - 32
        centre = pixels[tall // 2 : tall // 2 + 32, wide // 2 : wide // 2 + 32]
        assert np.array_equal(np.asarray(images[number]), centre), path


@pytest.mark.parametrize("name", sorted(broken_images()))
def test_a_file_that_does_not_decode_is_named(root, name):
    path = root / "unlabelled" / f"broken_{name}"
    path.write_bytes(broken_images()[name])
    images = load_dataset("folder", root, 32).unlabelled
    with pytest.raises(ValueError, match=rf"broken_{name} must be an image.* check-images lists"):
        images.load()


def test_sixteen_bits_are_refused(root):
    deep = Image.fromarray(np.full((8, 8), 40_000, np.uint16))
    (root / "unlabelled" / "deep.png").write_bytes(encode(deep, "PNG"))
    with pytest.raises(ValueError, match=r"deep.png .* more than 8 bits per channel, 16"):
        load_dataset("folder", root, 32).unlabelled.load()


def test_split_is_balanced_and_all_of_it_by_default(root):
    data = load_dataset("folder", root, 32)
    labelled, unlabelled = data.split(6, seed=0)
    assert torch.bincount(labelled.index.labels).tolist() == [2, 2, 2]
    for number in range(6):
        path = labelled.index.paths[number]
        assert f"/{CLASSES[int(labelled.index.labels[number])]}/" in path
    assert unlabelled is data.unlabelled
    assert data.split(None, seed=0) == (data.labelled, data.unlabelled)
    assert {tuple(data.split(6, seed)[0].index.paths) for seed in range(5)} != {
        tuple(labelled.index.paths)
    }
    with pytest.raises(ValueError, match=r"num_labels must be at most len\(labels\) = 12, got 20"):
        data.split(20, seed=0)


def test_root_without_the_parts_is_refused(tmp_path, root):
    for part in ("labelled", "unlabelled"):
        (root / part).rename(root / "elsewhere")
        with pytest.raises(FileNotFoundError, match=r"labelled/CLASS/ and unlabelled/ for folder"):
            load_dataset("folder", root)
        (root / "elsewhere").rename(root / part)
    with pytest.raises(ValueError, match=r"root must be a folder with labelled/CLASS/.* got None"):
        load_dataset("folder")


def test_other_classes_to_test_on_are_refused(root):
    (root / "test" / "china").rename(root / "test" / "dog")
    with pytest.raises(ValueError, match=r"same classes in test as in labelled, .* 'dog'\]"):
        load_dataset("folder", root)


def test_labelled_images_outside_of_classes_are_refused(root):
    (root / "labelled" / "1.png").write_bytes(encode(tile(), "PNG"))
    with pytest.raises(ValueError, match=r"a folder of images per class, got the image 1.png"):
        load_dataset("folder", root)


@pytest.mark.parametrize("labels", [None, 5])
def test_digits_split_into_some_labelled_and_all_unlabelled(labels):
    data = load_dataset("digits")
    if labels is None:
        labelled, unlabelled = data.split(None, seed=0)
        assert labelled.tensors[0] is data.train_images
    else:
        labelled, unlabelled = data.split(20, seed=0)
        assert torch.bincount(labelled.tensors[1]).tolist() == [2] * 10
    assert unlabelled.tensors == (data.train_images,)


def test_images_are_found_where_check_images_finds_them(root):
    assert load_dataset("folder", root).unlabelled.index.paths == (
        image_folder(root / "unlabelled").paths
    )
