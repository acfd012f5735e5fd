"""What `trivial_augment` does to an image: a table of operations, and applying them to a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import functools

import dm_pix as pix
import jax
import jax.numpy as jnp


def apply(images: jax.Array, kind: jax.Array, strength: jax.Array, sign: jax.Array) -> jax.Array:
    """One of `OPERATIONS` for each image.

    Args:
      images: [n, height, width, channels] of values 0 to 255, uint8 or float.
      kind: int32 [n], places in `OPERATIONS`.
      strength: float32 [n] in [0, 1].
      sign: float32 [n], 1 or -1: the direction, of operations that have one.

    Returns:
      An array like `images`.
    """
    shape = images.shape[1:]
    names = list(OPERATIONS)
    colours = [OPERATIONS[name] or _same for name in names]

    def one(image, kind, strength, sign):
        signed = sign * strength
        amounts = {
            name: jnp.where(kind == place, signed, 0.0)
            for place, name in enumerate(names)
            if OPERATIONS[name] is None
        }
        image = _resampled(image, *_affine(amounts, shape))
        return jax.lax.switch(kind, colours, image, strength, signed)

    changed = jax.vmap(one)(scaled(images), kind, strength, sign)
    return within(images, 255 * changed)


def _affine(amounts: Mapping[str, jax.Array], shape: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """The matrix [2, 2] about the centre and the shift [2] that lead from output to input pixels.

    `amounts` are strengths in [-1, 1], all but one of them 0.
    """
    angle = jnp.deg2rad(135.0) * amounts['rotate']
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    matrix = jnp.array(
        [[cos, sin + 0.99 * amounts['shear_y']], [0.99 * amounts['shear_x'] - sin, cos]]
    )
    shift = jnp.array([amounts['shift_y'], amounts['shift_x']])
    return matrix, shift * jnp.minimum(32, jnp.array(shape[:2]))


def _resampled(image: jax.Array, matrix: jax.Array, shift: jax.Array) -> jax.Array:
    """The image [height, width, channels] at other places, interpolated; 0 outside."""
    height, width, _ = image.shape
    centre = (jnp.array([height, width]) - 1)[:, None, None] / 2
    grid = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing='ij')) - centre
    # Written out, since a matrix product may round its numbers to fewer bits on a TPU or GPU.
    places = matrix[:, :1, None] * grid[0] + matrix[:, 1:, None] * grid[1]
    places = places + centre + shift[:, None, None]
    # Not dm-pix's affine_transform, which interpolates between channels as well: 109 ms for
    # 128x32x32x3 on two CPU cores, this 2.5 ms.
    interpolate = functools.partial(
        jax.scipy.ndimage.map_coordinates, coordinates=places, order=1, mode='constant'
    )
    return jax.vmap(interpolate, in_axes=-1, out_axes=-1)(image)


# Of an image [height, width, channels] in [0, 1], a strength in [0, 1], and one in [-1, 1].


def _same(image, strength, signed):
    return image


def _brightness(image, strength, signed):
    return image * (1 + 0.99 * signed)


def _contrast(image, strength, signed):
    return pix.adjust_contrast(image, 1 + 0.99 * signed)


def _saturation(image, strength, signed):
    return saturated(image, 1 + 0.99 * signed)


def saturated(image, factor):
    return pix.adjust_saturation(image, factor) if image.shape[-1] == 3 else image


def _sharpness(image, strength, signed):
    """Away from its mean with its neighbours, or towards it; the outermost pixels stay."""
    rows = image[:-2] + image[1:-1] + image[2:]
    around = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * image[1:-1, 1:-1]
    smooth = image.at[1:-1, 1:-1].set(around / 13)
    return smooth + (1 + 0.99 * signed) * (image - smooth)


def _posterize(image, strength, signed):
    step = 2.0 ** jnp.round(6 * strength)
    return jnp.floor(jnp.round(255 * image) / step) * step / 255


def _solarize(image, strength, signed):
    return pix.solarize(image, (1 - strength) * 256 / 255)


def _stretch(image, strength, signed):
    """Each channel from 0 to 1."""
    low, high = jnp.min(image, (0, 1)), jnp.max(image, (0, 1))
    return jnp.where(high > low, (image - low) / jnp.where(high > low, high - low, 1), image)


def _equalize(image, strength, signed):
    """Each channel with all values about as frequent: as PIL.ImageOps.equalize does it."""

    def channel(values):
        values = jnp.round(255 * values).astype(jnp.int32)
        counts = jnp.zeros(256, jnp.int32).at[values].add(1)
        step = (values.size - counts[jnp.max(values)]) // 255
        table = (step // 2 + jnp.cumsum(counts) - counts) // jnp.maximum(step, 1)
        return jnp.where(step > 0, jnp.minimum(table, 255)[values], values) / 255

    return jax.vmap(channel, in_axes=-1, out_axes=-1)(image)


# What `trivial_augment` chooses from; None for those that move pixels, see `_affine`.
OPERATIONS = {
    'identity': _same,
    'shear_x': None,
    'shear_y': None,
    'shift_x': None,
    'shift_y': None,
    'rotate': None,
    'brightness': _brightness,
    'contrast': _contrast,
    'saturation': _saturation,
    'sharpness': _sharpness,
    'posterize': _posterize,
    'solarize': _solarize,
    'stretch': _stretch,
    'equalize': _equalize,
}


def scaled(images: jax.Array) -> jax.Array:
    """Values 0 to 255 in [0, 1], in float32 at least."""
    return images.astype(jnp.promote_types(images.dtype, jnp.float32)) / 255.0


def within(images: jax.Array, values: jax.Array) -> jax.Array:
    """`values` from 0 to 255, of the dtype of `images`."""
    return like(images, jnp.clip(values, 0, 255))


def like(images: jax.Array, values: jax.Array) -> jax.Array:
    """`values` of the dtype of `images`."""
    if jnp.issubdtype(images.dtype, jnp.integer):
        values = jnp.round(values)
    return values.astype(images.dtype)
