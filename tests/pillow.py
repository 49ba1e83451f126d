"""Strong views by Pillow, one image at a time: what operations and chains of them must equal."""

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

# Operations that FixMatch runs on images without their transparency
THROUGH_RGB = ("autocontrast", "equalize", "invert", "posterize", "solarize")


def apply(image, name, magnitude):
    """One operation on an image of any mode that it takes."""
    if name in THROUGH_RGB:
        plain = image.convert("RGB") if image.mode == "RGBA" else image
        level = {"posterize": [int(magnitude)], "solarize": [magnitude]}.get(name, [])
        return getattr(ImageOps, name)(plain, *level).convert(image.mode)
    if name in ("brightness", "color", "contrast", "sharpness"):
        return getattr(ImageEnhance, name.capitalize())(image).enhance(magnitude)
    if name == "hue":
        hue, saturation, value = image.convert("HSV").split()
        turned = (np.asarray(hue).astype(int) + int(magnitude * 255)) % 256
        hue = Image.fromarray(turned.astype(np.uint8))
        return Image.merge("HSV", (hue, saturation, value)).convert(image.mode)
    if name == "rotate":
        return image.rotate(magnitude)
    if name == "identity":
        return image
    width, height = image.size
    matrix = {
        "shear_x": (1, magnitude, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, magnitude, 1, 0),
        "translate_x": (1, 0, magnitude, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, magnitude),
        "translate_x_rel": (1, 0, int(magnitude * width), 0, 1, 0),
        "translate_y_rel": (1, 0, 0, 0, 1, int(magnitude * height)),
    }[name]
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


def changed(pixels, program, transparent=False):
    """Run (name, magnitude) pairs on ``[H, W, C]`` bytes; return bytes and what lies outside."""
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    picture = picture.convert("RGBA") if transparent else picture
    for name, magnitude in program:
        picture = apply(picture, name, magnitude)
    found = np.asarray(picture).reshape(*pixels.shape[:2], -1)
    return found[..., : pixels.shape[2]], found[..., 3] == 0 if transparent else None


def pictures(count, height, width, channels=3, seed=0):
    """Bytes ``[n, H, W, C]`` with slopes, edges, noise and, in some, few values."""
    rng = np.random.default_rng(seed)
    down, across = np.mgrid[:height, :width] / max(height, width)
    found = np.empty((count, height, width, channels), dtype=np.uint8)
    for number, picture in enumerate(found):
        slopes = rng.normal(size=(3, channels)) * 200
        plane = slopes[0] * down[..., None] + slopes[1] * across[..., None] + rng.uniform(0, 255)
        plane += slopes[2] * (np.hypot(down - 0.5, across - 0.4) < rng.uniform(0.1, 0.5))[..., None]
        plane += rng.normal(size=picture.shape) * rng.choice([0, 5, 40])
        if number % 5 == 0:
            plane = plane // 8 + rng.uniform(0, 200)
        picture[:] = plane.clip(0, 255)
    return found
