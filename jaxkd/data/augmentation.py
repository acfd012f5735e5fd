"""Random changes of images on the device, inside the jitted step."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxkd.errors import ConfigError


def augment(key: jax.Array, images: jax.Array, *, padding: int, flip: bool) -> jax.Array:
    """Shifts each image at random, and flips each left to right with probability one half.

    A shift of up to `padding` pixels each way is the usual random crop of an image padded by that
    many. What moves in from outside is 0 in the images' own values, so before `normalize` it is
    black.

    Args:
      key: a JAX random key.
      images: [n, height, width, channels], of any dtype.
      padding: largest shift in pixels; 0 shifts nothing. Static under `jax.jit`.
      flip: whether to flip; see `Info.flip`. Static under `jax.jit`.

    Returns:
      An array like `images`.

    Raises:
      ConfigError: for a negative padding.
    """
    if padding < 0:
        raise ConfigError('padding', padding, why='it must be 0 or more pixels')
    if not padding and not flip:
        return images
    number, height, width, channels = images.shape
    key_shift, key_flip = jax.random.split(key)
    shift = jax.random.randint(key_shift, (2, number, 1), -padding, padding + 1)
    row = jnp.arange(height) + shift[0]
    column = jnp.broadcast_to(jnp.arange(width), (number, width))
    if flip:
        flipped = jax.random.bernoulli(key_flip, 0.5, (number, 1))
        column = jnp.where(flipped, width - 1 - column, column)
    column = column + shift[1]

    # One gather by index arrays, black put in afterwards. On two CPU cores a batch of
    # 128x32x32x3 uint8 takes 0.24 ms; padding and vmapped dynamic_slice 0.55 ms, one-hot
    # matrix products 1.6 ms, choosing among shifted copies 13 ms.
    inside = ((row >= 0) & (row < height))[:, :, None] & ((column >= 0) & (column < width))[
        :, None, :
    ]
    row = jnp.clip(row, 0, height - 1)[:, :, None]
    column = jnp.clip(column, 0, width - 1)[:, None, :]
    pixel = (jnp.arange(number)[:, None, None] * height + row) * width + column
    moved = jnp.asarray(images).reshape(-1, channels).at[pixel].get(mode='promise_in_bounds')
    return jnp.where(inside[..., None], moved, jnp.zeros((), images.dtype))
