"""Both decoders read the same kinds of images, and an image that does not decode is named."""

import io
import re
import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from gpu_mixmatch import DaliLoader, ImageFiles, SemiSupervisedLoader, check_images, collate
from gpu_mixmatch.data.decoding import (
    MAX_PIXELS,
    UndecodableError,
    dali_error,
    pil_error,
    why_refused,
)
from gpu_mixmatch.data.index import ImageIndex
from tests.image_files import broken_images, encode, tile, unusual_images, write_folder
from tests.skips import skip_without

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def as_array(content):
    return np.frombuffer(content, dtype=np.uint8)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, bits=8, colours=2, data=b""):
    """A PNG whose header says what it likes, of few bytes."""
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    return (
        SIGNATURE
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(data or bytes(1000)))
        + chunk(b"IEND", b"")
    )


def jpeg(width, height, bits=8):
    content = bytearray(encode(tile()))
    frame = content.index(b"\xff\xc0")
    content[frame + 4 : frame + 9] = struct.pack(">BHH", bits, height, width)
    return bytes(content)


def tiff(width, height, *, bits=8, samples=1, colours=1, number=1, order="<", big=False):
    tags = {256: width, 257: height, 258: bits, 262: colours, 277: samples, 339: number}
    mark = b"II" if order == "<" else b"MM"
    if big:
        content = mark + struct.pack(f"{order}HHHQQ", 43, 8, 0, 16, len(tags))
        entries = [struct.pack(f"{order}HHQQ", tag, 16, 1, value) for tag, value in tags.items()]
    else:
        content = mark + struct.pack(f"{order}HIH", 42, 8, len(tags))
        entries = [struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items()]
    return content + b"".join(entries) + bytes(8)


def bmp(width, height, bits=24):
    return b"BM" + bytes(12) + struct.pack("<IiiHH", 40, width, height, 1, bits) + bytes(24)


def webp(width, height):
    sizes = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + bytes(4) + b"WEBPVP8X" + struct.pack("<II", 10, 0) + sizes


def levels(kind):
    return Image.fromarray((np.asarray(tile().convert("L")).astype(kind) * 257).astype(kind))


DEEP = {
    "grey.png": encode(levels(np.uint16), "PNG"),
    "colour.png": png(8, 8, bits=16),
    "grey.tif": encode(levels(np.uint16), "TIFF"),
    "integers.tif": encode(levels(np.int32), "TIFF"),
    "floats.tif": encode(levels(np.float32), "TIFF"),
    "colour.tif": tiff(8, 8, bits=16, samples=3, colours=2),
    "half.tif": tiff(8, 8, bits=16, number=3, order=">"),
    "twelve.jpg": jpeg(40, 32, bits=12),
    "sixty_four.bmp": bmp(8, 8, bits=64),
}
HUGE = {
    "huge.png": png(60_000, 60_000),
    "wide.png": png(2**31 - 1, 2**31 - 1),
    "bits.png": png(15_000, 15_000, 1, 0),
    "huge.jpg": jpeg(65_535, 65_535),
    "huge.webp": webp(2**24, 2**24),
    "huge.bmp": bmp(2**31 - 1, -(2**31)),
    "huge.tif": tiff(2**31, 2**31, order=">"),
    "huge_big.tif": tiff(2**40, 2**40, big=True),
}
OTHERS = {
    "gif.jpg": encode(tile().convert("P"), "GIF"),
    "avif.jpg": encode(tile(), "AVIF"),
    "jpeg2000.jpg": encode(tile(), "JPEG2000"),
    "ppm.png": encode(tile(), "PPM"),
    "ico.png": encode(tile(), "ICO"),
    "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "page.jpg": b"<!DOCTYPE html><html>not found</html>",
    "wave.webp": b"RIFF\x24\0\0\0WAVEfmt ",
    "zeros.png": bytes(100),
}
ODD = {
    "grey_alpha.tif": encode(tile().convert("LA"), "TIFF"),
    "lab.tif": encode(Image.merge("LAB", tile().split()), "TIFF"),
    "no_size.png": png(0, 8),
    "apple.png": SIGNATURE + chunk(b"CgBI", bytes(4)) + png(8, 8)[8:],
    "no_frame.jpg": b"\xff\xd8\xff\xd9",
    "twice.tif": encode(tile(), "TIFF").replace(
        struct.pack("<HHII", 257, 4, 1, 32), struct.pack("<HHII", 256, 4, 1, 32)
    ),
}
REFUSED = {**DEEP, **HUGE, **OTHERS, **ODD, **broken_images()}


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (DEEP, r"more than 8 bits per channel, (12|16|32|64)|signed or floating-point numbers"),
        (HUGE, rf"pixels, more than the {MAX_PIXELS} that are read"),
        (OTHERS, r"it is no JPEG, PNG, WebP, BMP or TIFF"),
        (ODD, r"decoders read differently|it has 0 x 8 pixels|it is damaged"),
    ],
    ids=["deep", "huge", "others", "odd"],
)
def test_headers_tell_what_is_not_read(files, reason):
    for name, content in files.items():
        assert re.search(reason, why_refused(as_array(content))), name


@pytest.mark.parametrize(
    ("name", "kind"),
    [("gif.jpg", "a GIF"), ("avif.jpg", "an AVIF, HEIF"), ("page.jpg", "text such as HTML")],
)
def test_a_file_of_another_kind_is_told_what_it_is(name, kind):
    assert f", but {kind}" in why_refused(as_array(OTHERS[name]))


def test_both_decoders_take_and_refuse_the_same_files():
    skip_without("nvidia.dali")
    for kind in ("TIFF", "BMP"):
        content = encode(tile(), kind)
        assert not why_refused(as_array(content))
        assert dali_error([as_array(content)]) == pil_error(as_array(content)) == ""
    for name, content in unusual_images().items():
        assert not why_refused(as_array(content)), name
    damaged = [name for name in REFUSED if not why_refused(as_array(REFUSED[name]))]
    assert sorted(damaged) == ["truncated.jpg", "truncated.png", "truncated.webp"]
    for name in damaged:
        assert pil_error(as_array(REFUSED[name])), name
        assert dali_error([as_array(REFUSED[name])]), name


ON_GPU = pytest.param(
    *("dali", 0),
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)


@pytest.mark.parametrize(("decoder", "device_id"), [("pil", None), ("dali", None), ON_GPU])
def test_check_images_and_loaders_of_a_decoder_agree(tmp_path, decoder, device_id):
    if decoder == "dali":
        skip_without("nvidia.dali")
    write_folder(tmp_path / "labelled", 1)
    (tmp_path / "unlabelled").mkdir()
    for name, content in REFUSED.items():
        (tmp_path / "unlabelled" / name).write_bytes(content)
    checked = check_images(tmp_path / "unlabelled", decoder=decoder)
    assert [path.rpartition("/")[2] for path in checked.bad] == sorted(REFUSED)
    if decoder == "pil":
        images = ImageFiles(tmp_path / "unlabelled", 8)
        for number, reason in enumerate(checked.bad.values()):
            with pytest.raises(UndecodableError) as error:
                images[number]
            assert f"{images.index.paths[number]} must be an image" in str(error.value)
            assert reason in str(error.value)
            assert "check-images" in str(error.value)
        return
    size, folders = len(REFUSED), (tmp_path / "labelled", tmp_path / "unlabelled")
    with (
        DaliLoader(*folders, size, 8, device_id=device_id) as loader,
        pytest.raises(UndecodableError, match=f"{size} of {2 * size} images") as error,
    ):
        next(iter(loader))
    assert all(f"{path}: " in str(error.value) for path in checked.bad)


def test_a_folder_is_checked_without_dali(tmp_path, monkeypatch):
    for module in ("nvidia.dali", "nvidia.dali.experimental", "nvidia.dali.experimental.dynamic"):
        monkeypatch.setitem(sys.modules, module, None)
    write_folder(tmp_path, 1)
    assert len(check_images(tmp_path).good) == 3
    with pytest.raises(ImportError, match="needs NVIDIA DALI"):
        check_images(tmp_path, decoder="dali")
    with pytest.raises(ValueError, match=r"decoder must be one of \['pil', 'dali'\], got 'cv2'"):
        check_images(tmp_path, decoder="cv2")


def test_an_image_that_pillow_would_warn_of_is_read_in_silence(monkeypatch):
    content, large = (encode(tile(width=width), "PNG") for width in (40, 80))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # twice as many are refused
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(io.BytesIO(content))
    assert pil_error(as_array(content)) == ""  # a warning would be an error
    assert "exceeds limit" in pil_error(as_array(large))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_no_damage_escapes_without_the_name_of_the_file(tmp_path, kind):
    whole = bytearray(encode(tile(), kind))
    generator = np.random.default_rng(0)
    path = tmp_path / "image.png"
    images = ImageFiles(ImageIndex([str(path)]), 8)
    refused = 0
    for number in range(60):
        content = whole.copy()
        for place in generator.integers(0, min(len(content), 400), 1 + number % 6):
            content[place] = generator.integers(256)
        path.write_bytes(bytes(content[: len(content) - number % 3 * 40]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, on damage that it reads over
            try:
                assert images[0].size == (8, 8)
            except UndecodableError as error:
                refused += str(error).startswith(f"{path} must be an image that decodes, got: ")
    assert refused >= 5


@pytest.mark.parametrize(
    "error",
    [EOFError, KeyError("x"), struct.error("short"), IndexError, MemoryError, RecursionError],
    ids=str,
)
def test_whatever_a_decoder_raises_becomes_one_kind_of_error(tmp_path, monkeypatch, error):
    (tmp_path / "0.png").write_bytes(encode(tile(), "PNG"))

    def fails(*arguments, **options):
        raise error

    monkeypatch.setattr(Image, "open", fails)
    with pytest.raises(UndecodableError, match=r"0\.png must be an image"):
        ImageFiles(tmp_path, 8)[0]


def test_an_interrupt_is_not_taken_for_damage(tmp_path, monkeypatch):
    (tmp_path / "0.png").write_bytes(encode(tile(), "PNG"))

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image, "open", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ImageFiles(tmp_path, 8)[0]


def test_an_error_of_a_worker_is_one_line_with_the_file(tmp_path):
    write_folder(tmp_path / "labelled", 2)
    write_folder(tmp_path / "unlabelled", 2)
    bad = tmp_path / "unlabelled" / "cat" / "000.png"
    bad.write_bytes(encode(tile(), "PNG")[:500])
    labelled = ImageFiles(tmp_path / "labelled", 8, labelled=True)
    unlabelled = ImageFiles(tmp_path / "unlabelled", 8)
    messages = []
    for workers in (0, 1):
        loader = SemiSupervisedLoader(labelled, unlabelled, 6, num_workers=workers)
        with pytest.raises(UndecodableError) as error:
            next(iter(loader))
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"{bad} must be an image that decodes, got: it is damaged")
    assert "\n" not in messages[0]


def test_collate_names_an_image_that_does_not_decode(tmp_path):
    (tmp_path / "0.jpg").write_bytes(encode(tile())[:-200])
    good = tile()
    with (
        Image.open(tmp_path / "0.jpg") as bad,
        pytest.raises(
            ValueError, match=r"samples\[1\] must be an image that decodes, got .*0\.jpg: "
        ),
    ):
        collate([good, bad])
    with (
        Image.open(io.BytesIO(encode(tile())[:-200])) as unnamed,
        pytest.raises(ValueError, match=r"samples\[0\]\['image'\] must be .* got its file: "),
    ):
        collate([{"image": unnamed}])


def test_image_files_take_a_folder_and_bring_images_to_one_size(tmp_path):
    for name, width, height in (("a/wide", 60, 20), ("a/tall", 20, 50), ("b/small", 5, 5)):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(Image.new("RGB", (width, height), (10, 200, 30)), "PNG"))
    labelled, unlabelled = ImageFiles(tmp_path, 16, labelled=True), ImageFiles(str(tmp_path), 16)
    assert [label for _, label in labelled] == [0, 0, 1]
    assert torch.equal(labelled.load(), unlabelled.load())
    colour = torch.tensor([10, 200, 30], dtype=torch.uint8)[None, :, None, None]
    assert torch.equal(labelled.load(), colour.expand(3, 3, 16, 16))
    assert repr(labelled) == "ImageFiles(3 images, size=16, classes ('a', 'b'))"
    batch = next(iter(SemiSupervisedLoader(labelled, unlabelled, 2)))
    assert batch.x.shape == batch.u.shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"size must be in 1 \.\. 32768, got 0"):
        ImageFiles(tmp_path, 0)
    with pytest.raises(TypeError, match=r"size must be an integer, got 1\.5"):
        ImageFiles(tmp_path, 1.5)
