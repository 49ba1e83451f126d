"""A folder of image files as a data set: what it finds, decodes and refuses."""

import numpy as np
import pytest
import torch
from PIL import Image

from gpu_mixmatch import check_images
from gpu_mixmatch.data.datasets import FolderData, load_dataset
from gpu_mixmatch.data.images import image_folder
from gpu_mixmatch.data.index import LeftOutWarning
from tests.image_files import (
    CLASSES,
    broken_images,
    decode,
    encode,
    tile,
    unusual_images,
    write_folder,
)
from tests.skips import skip_without


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


# What does not decode, and lists


@pytest.fixture
def damaged(root):
    """The folder of 12, 6 and 9 images, with one of each part broken, and their paths."""
    broken = [root / part / "cat" / "001.png" for part in ("labelled", "unlabelled", "test")]
    contents = broken_images()
    for path, name in zip(broken, ("truncated.png", "text.jpg", "empty.jpg"), strict=True):
        path.write_bytes(contents[name])
    return root, [str(path) for path in broken]


@pytest.mark.parametrize("decoder", ["pil", "dali"])
def test_skip_leaves_out_what_does_not_decode_and_says_so(damaged, decoder):
    if decoder == "dali":
        skip_without("nvidia.dali")
    root, broken = damaged
    seen = []
    with pytest.warns(LeftOutWarning, match=f"3 of 27 images .* left out: {broken[0]}: it is dam"):
        data = load_dataset(
            "folder",
            root,
            32,
            on_error="skip",
            decoder=decoder,
            progress=lambda done, total: seen.append((done, total)),
        )
    assert list(data.skipped) == broken
    assert "damaged" in data.skipped[broken[0]]
    assert data.skipped[broken[2]] == "the file is empty"
    assert seen[-1] == (27, 27)
    assert (len(data.labelled), len(data.unlabelled), len(data.test_images)) == (11, 5, 8)
    assert data.labelled.index.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 4
    assert data.test_labels.tolist() == [0] * 3 + [1] * 2 + [2] * 3
    for images in (data.labelled, data.unlabelled):
        assert set(broken).isdisjoint(images.index.paths)
        images.load()


def test_labelled_images_to_test_on_must_decode_by_both(damaged):
    skip_without("nvidia.dali")
    root, _ = damaged
    (root / "test").rename(root / "elsewhere")
    path = root / "labelled" / "china" / "000.png"
    path.write_bytes(encode(tile(), "PNG")[:-12])  # Pillow does without the last chunk
    with pytest.warns(LeftOutWarning):
        by_pil = load_dataset("folder", root, 32, on_error="skip")
    with pytest.warns(LeftOutWarning):
        by_dali = load_dataset("folder", root, 32, on_error="skip", decoder="dali")
    assert by_dali.skipped.keys() - by_pil.skipped.keys() == {str(path)}


def test_nothing_is_skipped_of_images_that_all_decode(root):
    data = load_dataset("folder", root, 32, on_error="skip")
    assert data.skipped == {}
    assert data.left_out == {}


def test_a_class_that_loses_all_its_images_is_an_error(damaged):
    root, _ = damaged
    for path in (root / "test" / "cat").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"not empty in every class folder, got none in cat"):
        load_dataset("folder", root, 32, on_error="skip")
    for path in (root / "test" / "cat").iterdir():
        path.write_bytes(b"x")
    with (
        pytest.warns(LeftOutWarning),
        pytest.raises(ValueError, match=r"decodes in class cat of test, got none: .*cat/000.png"),
    ):
        load_dataset("folder", root, 32, on_error="skip")


def test_left_out_entries_of_all_parts_are_counted(root):
    for place in ("labelled/cat/.x.png", "test/.DS_Store", "unlabelled/notes.txt"):
        (root / place).touch()
    left_out = load_dataset("folder", root, 32).left_out
    assert left_out == {"hidden or system entries": 2, "files that are no images": 1}


def test_a_list_of_check_images_says_what_is_taken(damaged):
    root, broken = damaged
    check_images(root, root / "good.txt")
    (root / "unlabelled" / "later.png").write_bytes(encode(tile(), "PNG"))
    data = load_dataset("folder", root, 32, list_path=root / "good.txt")
    assert (len(data.labelled), len(data.unlabelled), len(data.test_images)) == (11, 5, 8)
    assert data.labelled.index.classes == CLASSES
    listed = {*data.labelled.index.paths, *data.unlabelled.index.paths}
    assert listed.isdisjoint({*broken, str(root / "unlabelled" / "later.png")})


def test_a_list_must_name_images_of_every_part_and_class(root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    check_images(root / "labelled", elsewhere / "labelled.txt")
    with pytest.raises(ValueError, match=r"name images of .*/unlabelled, got none in .* --list"):
        load_dataset("folder", root, 32, list_path=elsewhere / "labelled.txt")
    check_images(root, elsewhere / "all.txt")
    lines = (elsewhere / "all.txt").read_text().splitlines()
    kept = [line for line in lines if "test/cat" not in line]
    (elsewhere / "all.txt").write_text("\n".join(kept))
    with pytest.raises(ValueError, match=r"every class of .*/test, got none of cat in"):
        load_dataset("folder", root, 32, list_path=elsewhere / "all.txt")


def test_a_list_meets_a_folder_that_is_reached_through_a_link(root, tmp_path_factory):
    link = tmp_path_factory.mktemp("elsewhere") / "link"
    link.symlink_to(root)
    check_images(root, root / "good.txt")
    data = load_dataset("folder", link, 32, list_path=root / "good.txt")
    assert len(data.labelled) == 12


@pytest.mark.parametrize("options", [{"on_error": "skip"}, {"list_path": "good.txt"}])
def test_options_of_a_folder_are_refused_for_images_in_memory(options):
    with pytest.raises(
        ValueError, match=r"on_error must be 'raise' and list_path None .* 'digits'"
    ):
        load_dataset("digits", **options)
    with pytest.raises(ValueError, match=r"on_error must be one of \['raise', 'skip'\], got 'x'"):
        load_dataset("folder", on_error="x")
