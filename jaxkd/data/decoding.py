"""From the bytes of an image file to pixels of a given shape."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image, ImageOps

Shape = tuple[int, int, int]


def decode(encoded: bytes, shape: Shape) -> np.ndarray:
    """The image as it is, uint8 of `shape`, which it must have.

    This and the others read what Pillow reads: grey and palettes become colours, of which grey is
    taken where `shape` has one channel; 16 bits become 8; what is transparent lies on white; a
    photograph is turned as its EXIF data say.

    Raises:
      ValueError: for another shape, and pixels whose range is not known (32 bits, floats).
      Exception: whatever Pillow raises on a damaged file.
    """
    return _array(_plain(Image.open(io.BytesIO(encoded)), shape), shape)


def centre(encoded: bytes, shape: Shape, shorter: int) -> np.ndarray:
    """The centre of the image, uint8 of `shape`, its shorter side resized to `shorter` pixels.

    Raises like `decode`.
    """
    height, width, _ = shape
    image = Image.open(io.BytesIO(encoded))
    # Lets a JPEG decode at 1/2, 1/4 or 1/8 scale where that is still large enough.
    image.draft('RGB', (shorter, shorter))
    image = _plain(image, shape)
    scale = shorter / min(image.size)
    size = [max(shorter, round(side * scale)) for side in image.size]
    image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return _array(image.crop((left, top, left + width, top + height)), shape)


def random_crop(encoded: bytes, shape: Shape, least: float, rng: np.random.Generator) -> np.ndarray:
    """A random part of the image, resized to uint8 of `shape`.

    Its share of the area is drawn between `least` and 1, its width over its height between 3/4 and
    4/3 (Szegedy et al. 2014, https://arxiv.org/abs/1409.4842, section 6). Raises like `decode`.
    """
    height, width, _ = shape
    image = Image.open(io.BytesIO(encoded))
    whole = np.array(image.size)
    turned = image.getexif().get(_ORIENTATION, 1) >= 5
    box = _part(whole[::-1] if turned else whole, least, rng)
    left, top, right, bottom = box
    smaller = max(1.0, min((right - left) / width, (bottom - top) / height))
    image.draft('RGB', tuple(int(side) for side in whole / smaller))
    drafted = np.array(image.size) / whole
    box = box * np.tile(drafted[::-1] if turned else drafted, 2)
    image = _plain(image, shape).resize((width, height), Image.Resampling.BILINEAR, box=tuple(box))
    return _array(image, shape)


_ORIENTATION = 0x0112  # the EXIF tag; from 5 on, width and height are exchanged


def _part(size: np.ndarray, least: float, rng: np.random.Generator) -> np.ndarray:
    """A random box (left, top, right, bottom) in an image of a size (width, height)."""
    for _ in range(10):
        area = rng.uniform(least, 1) * math.prod(size)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        part = np.array([math.sqrt(area * ratio), math.sqrt(area / ratio)])
        if (part <= size).all():
            start = rng.uniform(size=2) * (size - part)
            return np.concatenate([start, start + part])
    return np.concatenate([[0, 0], size])  # so long an image that no part of it has such a shape


def _plain(image: Image.Image, shape: Shape) -> Image.Image:
    """The image upright, without transparency, in 8 bits grey or RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith('I;16'):
        image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    elif image.mode in ('I', 'F'):
        raise ValueError(f'its pixels are 32-bit numbers ({image.mode}) of an unknown range')
    if image.has_transparency_data:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image.convert('L' if shape[-1] == 1 else 'RGB')


def _array(image: Image.Image, shape: Shape) -> np.ndarray:
    array = np.asarray(image, np.uint8).reshape(image.height, image.width, shape[-1])
    if array.shape != shape:
        raise ValueError(f'an image of shape {array.shape}, {shape} expected')
    return array
