"""Real image files for tests: tiles of scikit-image's and scikit-learn's sample photographs."""

import io
import tarfile
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageOps

CLASSES = ("astronaut", "cat", "china")


@lru_cache(maxsize=1)
def photographs():
    """Three photographs by class, PIL images in RGB."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    arrays = data.astronaut(), data.chelsea(), load_sample_image("china.jpg")
    return {name: Image.fromarray(array) for name, array in zip(CLASSES, arrays, strict=True)}


def tile(name="astronaut", number=0, width=40, height=32):
    """Cut a tile out of a photograph; each number below 60 is another one."""
    row, column = divmod(number, 6)
    left, top = 10 + 64 * column, 10 + 28 * row
    return photographs()[name].crop((left, top, left + width, top + height))


def encode(image, kind="JPEG", **options):
    """Encode an image as JPEG, PNG or (lossless) WebP."""
    stream = io.BytesIO()
    defaults = {"JPEG": {"quality": 92}, "WEBP": {"lossless": True}}.get(kind, {})
    image.save(stream, kind, **{**defaults, **options})
    return stream.getvalue()


def decode(content):
    """Decode by PIL to an upright RGB array, ``[H, W, 3]``."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def with_orientation(value):
    """EXIF that says how the camera was held, 1 .. 8."""
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def unusual_images():
    """Files that decode, by name: other colours, orientations and sizes."""
    image = tile()
    files = {
        "gray.jpg": encode(image.convert("L")),
        "cmyk.jpg": encode(image.convert("CMYK")),
        "progressive.jpg": encode(image, progressive=True),
        "alpha.png": encode(transparent(image), "PNG"),
        "gray_alpha.png": encode(image.convert("LA"), "PNG"),
        "palette.png": encode(image.convert("P"), "PNG"),
        "one_bit.png": encode(image.convert("1"), "PNG"),
        "alpha.webp": encode(transparent(image), "WEBP"),
        "lossy.webp": encode(image, "WEBP", lossless=False),
        "rotated.png": encode(image, "PNG", exif=with_orientation(6)),
        "rotated.webp": encode(image, "WEBP", lossless=False, exif=with_orientation(6)),
    }
    for orientation in range(1, 9):
        files[f"orientation{orientation}.jpg"] = encode(image, exif=with_orientation(orientation))
    for kind in ("jpg", "png", "webp"):
        name = {"jpg": "JPEG"}.get(kind, kind.upper())
        files[f"1x1.{kind}"] = encode(image.crop((0, 0, 1, 1)), name)
    return files


def transparent(image):
    """The image with alpha that falls from left to right."""
    ramp = np.linspace(255, 0, image.width, dtype=np.uint8)
    alpha = Image.fromarray(np.tile(ramp, (image.height, 1)))
    return Image.merge("RGBA", (*image.split(), alpha))


def broken_images():
    """Files that do not decode, by name."""
    jpeg, png, webp = (encode(tile(), kind) for kind in ("JPEG", "PNG", "WEBP"))
    return {
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "header_only.jpg": jpeg[:100],
        "truncated.png": png[: len(png) // 2],
        "truncated.webp": webp[: len(webp) // 2],
        "empty.jpg": b"",
        "text.jpg": b"not an image, whatever the name says\n" * 5,
    }


def write_folder(root, count, kind="png", **size):
    """Write ``count`` tiles per class below ``root``; return the path of each with its label."""
    name = {"jpg": "JPEG"}.get(kind, kind.upper())
    written = []
    for label, class_name in enumerate(CLASSES):
        (root / class_name).mkdir(parents=True)
        for number in range(count):
            path = root / class_name / f"{number:03d}.{kind}"
            path.write_bytes(encode(tile(class_name, number, **size), name))
            written.append((path, label))
    return written


def write_parts(root, **counts):
    """Write so many JPEG tiles per class into each part of a folder to train on; return it."""
    for part, count in counts.items():
        write_folder(root / part, count, "jpg")
    return root


def write_tar(path, samples):
    """Write (encoded image, suffix, label or None) as a WebDataset."""
    with tarfile.open(path, "w") as archive:
        for number, (content, suffix, label) in enumerate(samples):
            files = {f"sample{number:04d}.{suffix}": content}
            if label is not None:
                files[f"sample{number:04d}.cls"] = f"{label}\n".encode()
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def write_tfrecord(path, samples, image_key="image/encoded", label_key="image/class/label"):
    """Write (encoded image, label or None) as a TFRecord of ``tf.train.Example``."""
    with open(path, "wb") as file:
        for content, label in samples:
            features = feature("image/height", message(3, message(1, varint(32))))
            features += feature(image_key, message(1, message(1, content)))
            if label is not None:
                features += feature(label_key, message(3, message(1, varint(label))))
            example = message(1, features)
            checksum = b"\0\0\0\0"  # nobody here verifies it
            file.write(len(example).to_bytes(8, "little") + checksum + example + checksum)


def feature(name, value):
    return message(1, message(1, name.encode()) + message(2, value))


def message(number, content):
    """A length-delimited protocol buffer field."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value):
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def as_tensor(images):
    """Stack PIL images or arrays to ``[M, 3, H, W]`` uint8."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
