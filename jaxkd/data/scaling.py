"""From pixels to the numbers that a network takes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd.data.split import Split
from jaxkd.errors import ConfigError


def statistics(split: Split, limit: int = 10_000) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each colour channel, of pixels scaled to [0, 1].

    Args:
      split: the training part; measuring any other would let its images into the training.
      limit: measure at most this many images, taken at even distances.

    Returns:
      (mean, std), each float32 [channels]. A channel that never changes has std 1, so that
      `normalize` makes it zero.
    """
    if limit < 1 or split.size < 1:
        raise ConfigError('limit', min(limit, split.size), why='at least one image is needed')
    chosen = np.unique(np.linspace(0, split.size - 1, min(limit, split.size)).astype(np.int64))
    count = 0
    total = squares = 0.0
    for start in range(0, len(chosen), 256):
        images = split.fetch(chosen[start : start + 256]).astype(np.float64) / 255
        count += images[..., 0].size
        total = total + images.sum((0, 1, 2))
        squares = squares + (images**2).sum((0, 1, 2))
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return mean.astype(np.float32), np.where(std < 1e-6, 1, std).astype(np.float32)


def normalize(images: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """Scales uint8 images [..., channels] to float32 of about zero mean and unit deviation.

    Args:
      images: values 0 to 255.
      mean: float32 [channels], as `statistics` returns it.
      std: float32 [channels], likewise.
    """
    return (images.astype(jnp.float32) / 255 - mean) / std
