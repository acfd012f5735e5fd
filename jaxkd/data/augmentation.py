"""Random changes of images on the device, inside the jitted step."""

from __future__ import annotations

from collections.abc import Mapping
import math
from typing import Any, NamedTuple

import dm_pix as pix
import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from jaxkd.data import operations
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


class Augmentation(NamedTuple):
    """What `vary` does; nothing by default. Static under `jax.jit`.

    Attributes:
      color_jitter: see `color_jitter`; 0.4 is usual.
      trivial_augment: whether to do `trivial_augment`.
      erasing: the probability of `random_erasing`; 0.25 is usual.
      mixup: α of `mixup`; 0.2 is usual.
      cutmix: α of `cutmix`; 1 is usual. Where both α are set, each image is mixed in one of the two
        ways, with the same probability.
    """

    color_jitter: float = 0.0
    trivial_augment: bool = False
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0


def make_augmentation(settings: Mapping[str, Any], field: str = 'data.augment') -> Augmentation:
    """Takes the settings from a config's field, `data.augment` unless another is named.

    Raises:
      ConfigError: for a name that is no field of `Augmentation`, and a value out of its range.
    """
    for name, value in settings.items():
        where = f'{field}.{name}'
        if name not in Augmentation._fields:
            raise ConfigError(where, value, why=f'the fields are {", ".join(Augmentation._fields)}')
        if not 0 <= value < math.inf:
            raise ConfigError(where, value, why='it must be 0, which changes nothing, or more')
        if name in ('color_jitter', 'erasing') and value > 1:
            raise ConfigError(where, value, why='it must be at most 1')
    return Augmentation(**settings)


def vary(
    key: jax.Array, images: jax.Array, augmentation: Augmentation
) -> tuple[jax.Array, jax.Array | None]:
    """Changes colours and shapes, erases, and mixes images, as far as each is asked for.

    Args:
      key: a JAX random key.
      images: [n, height, width, channels] of values 0 to 255, uint8 or float.
      augmentation: what to do.

    Returns:
      An array like `images`, and how much of each image is its own, float32 [n] in [0, 1]; the rest
      is its partner's, see `partners`. None instead where images are not mixed.
    """
    trivial_key, jitter_key, erasing_key, mixing_key = jax.random.split(key, 4)
    if augmentation.trivial_augment:
        images = trivial_augment(trivial_key, images)
    images = color_jitter(jitter_key, images, augmentation.color_jitter)
    images = random_erasing(erasing_key, images, augmentation.erasing)
    if not augmentation.mixup and not augmentation.cutmix:
        return images, None
    if not augmentation.cutmix:
        return mixup(mixing_key, images, augmentation.mixup)
    if not augmentation.mixup:
        return cutmix(mixing_key, images, augmentation.cutmix)
    choice_key, mixup_key, cutmix_key = jax.random.split(mixing_key, 3)
    mixed, share = mixup(mixup_key, images, augmentation.mixup)
    pasted, share_left = cutmix(cutmix_key, images, augmentation.cutmix)
    mixes = jax.random.bernoulli(choice_key, 0.5, share.shape)
    images = jnp.where(mixes[:, None, None, None], mixed, pasted)
    return images, jnp.where(mixes, share, share_left)


def partners(batch: jax.Array) -> jax.Array:
    """What each example of a batch [n, …] is mixed with: the one before it.

    The order of training is random, and so is this choice; on several devices it moves one example
    from each to the next, where a permutation would move all.
    """
    return jnp.roll(batch, 1, axis=0)


def mixup(key: jax.Array, images: jax.Array, alpha: float) -> tuple[jax.Array, jax.Array]:
    """Blends each image with its partner, in random proportions.

    Args:
      key: a JAX random key.
      images: [n, height, width, channels], uint8 or float of any range.
      alpha: the share that is an image's own is drawn from Beta(α, α); 0 blends nothing. Static
        under `jax.jit`.

    Returns:
      An array like `images`, and that share, float32 [n].

    References:
      Zhang et al. 2017, mixup: Beyond Empirical Risk Minimization, https://arxiv.org/abs/1710.09412
    """
    if not alpha:
        return images, jnp.ones(len(images), jnp.float32)
    share = _beta(jax.random.uniform(key, (len(images),)), alpha)
    own = share[:, None, None, None]
    return operations.like(images, own * images + (1 - own) * partners(images)), share


def cutmix(key: jax.Array, images: jax.Array, alpha: float) -> tuple[jax.Array, jax.Array]:
    """Pastes a rectangle of its partner into each image.

    Args:
      key: a JAX random key.
      images: [n, height, width, channels], of any dtype.
      alpha: the share of the area left is drawn from Beta(α, α), and is more where the rectangle,
        whose centre may be anywhere, goes over the edge; 0 pastes nothing. Static under `jax.jit`.

    Returns:
      An array like `images`, and the share of the area that is left, float32 [n].

    References:
      Yun et al. 2019, CutMix, https://arxiv.org/abs/1905.04899
    """
    number, height, width, _ = images.shape
    if not alpha:
        return images, jnp.ones(number, jnp.float32)
    chance = jax.random.uniform(key, (3, number))
    share = _beta(chance[0], alpha)
    size = jnp.array([[height], [width]])
    half = (size * jnp.sqrt(1 - share)).astype(jnp.int32) // 2
    centre = _whole(chance[1:], size)
    start, stop = jnp.clip(centre - half, 0, size), jnp.clip(centre + half, 0, size)
    pasted = _rectangle(start, stop, images)
    area = jnp.prod(stop - start, axis=0) / (height * width)
    return jnp.where(pasted, partners(images), images), 1 - area.astype(jnp.float32)


def random_erasing(key: jax.Array, images: jax.Array, probability: float) -> jax.Array:
    """Paints over a rectangle, in some of the images, in a colour drawn at random.

    One colour, where the paper's best has noise: as many random numbers as there are pixels would
    take longer than all else, to compile as well as to draw. The rectangle's area is 2 to 33 % of
    the image's, its height 0.3 to 3.3 times its width where that fits in.

    Args:
      key: a JAX random key.
      images: [n, height, width, channels] of values 0 to 255, uint8 or float.
      probability: that an image loses a rectangle; 0 changes nothing. Static under `jax.jit`.

    Returns:
      An array like `images`.

    References:
      Zhong et al. 2017, Random Erasing Data Augmentation, https://arxiv.org/abs/1708.04896
    """
    if not probability:
        return images
    number, height, width, channels = images.shape
    chance = jax.random.uniform(key, (5 + channels, number))
    area = height * width * (0.02 + 0.31 * chance[0])
    ratio = jnp.exp((2 * chance[1] - 1) * jnp.log(3.3))
    ratio = jnp.clip(ratio, area / width**2, height**2 / area)
    sides = jnp.stack([jnp.sqrt(area * ratio), jnp.sqrt(area / ratio)])
    sides = jnp.maximum(jnp.round(sides).astype(jnp.int32), 1)
    size = jnp.array([[height], [width]])
    start = _whole(chance[2:4], size - sides + 1)
    erased = _rectangle(start, start + sides * (chance[4] < probability), images)
    colour = _whole(chance[5:].T, 256)[:, None, None]
    return jnp.where(erased, colour.astype(images.dtype), images)


def color_jitter(key: jax.Array, images: jax.Array, strength: float) -> jax.Array:
    """Changes brightness, contrast and, of images with three channels, saturation at random.

    Args:
      key: a JAX random key.
      images: [n, height, width, channels] of values 0 to 255, uint8 or float.
      strength: s in [0, 1]: brightness changes by up to s times the largest value, the others by
        factors in [1 - s, 1 + s]; 0 changes nothing. Static under `jax.jit`.

    Returns:
      An array like `images`.
    """
    if not strength:
        return images

    def jitter(image, brightness, contrast, saturation):
        image = jnp.clip(pix.adjust_brightness(image, brightness), 0, 1)
        image = jnp.clip(pix.adjust_contrast(image, 1 + contrast), 0, 1)
        return operations.saturated(image, 1 + saturation)

    changes = strength * (2 * jax.random.uniform(key, (3, len(images))) - 1)
    return operations.within(images, 255 * jax.vmap(jitter)(operations.scaled(images), *changes))


def trivial_augment(key: jax.Array, images: jax.Array) -> jax.Array:
    """Does one thing to each image, drawn from fourteen, as strongly as chance has it.

    TrivialAugment rather than RandAugment: as good or better in its authors' comparison, with no
    number to tune, and with one operation an image all shapes are static at the cost of one
    resampling and eight operations on colours.

    The operations and their strengths are the paper's wide ones: identity, shears by up to 0.99,
    shifts by up to 32 pixels (at most the image's side), rotation by up to 135°; brightness,
    contrast, saturation and sharpness by factors from 0.01 to 1.99; posterizing to 2 to 8 bits,
    solarizing, stretching the contrast, equalizing. Shears are about the centre; contrast and
    saturation as dm-pix has them. What moves in from outside is black, as in `augment`. Saturation
    changes nothing in an image without three channels.

    Args:
      key: a JAX random key.
      images: [n, height, width, channels] of values 0 to 255, uint8 or float.

    Returns:
      An array like `images`.

    References:
      Müller, Hutter 2021, TrivialAugment: Tuning-free Yet State-of-the-Art Data Augmentation,
      https://arxiv.org/abs/2103.10158
    """
    kind, strength, side = jax.random.uniform(key, (3, len(images)))
    kind = _whole(kind, len(operations.OPERATIONS))
    return operations.apply(images, kind, strength, jnp.where(side < 0.5, -1.0, 1.0))


# Random numbers of other kinds from uniform ones in [0, 1): each draw is a hash to compile.


def _beta(chance: jax.Array, alpha: float) -> jax.Array:
    """As from Beta(α, α), float32, by a table of the inverse of its distribution.

    `jax.random.beta` takes 2.5 s to compile.
    """
    places = np.linspace(0, 1, 4097)
    table = scipy.special.betaincinv(alpha, alpha, places)
    return jnp.interp(chance, jnp.asarray(places, jnp.float32), jnp.asarray(table, jnp.float32))


def _whole(chance: jax.Array, stop: jax.Array | int) -> jax.Array:
    """Whole numbers from 0 to stop - 1, int32."""
    return jnp.minimum((chance * stop).astype(jnp.int32), stop - 1)


def _rectangle(start: jax.Array, stop: jax.Array, images: jax.Array) -> jax.Array:
    """Where rectangles are: bool [n, height, width, 1], from their corners int32 [2, n]."""
    rows = jnp.arange(images.shape[1])
    columns = jnp.arange(images.shape[2])
    inside_rows = (rows >= start[0][:, None]) & (rows < stop[0][:, None])
    inside_columns = (columns >= start[1][:, None]) & (columns < stop[1][:, None])
    return (inside_rows[:, :, None] & inside_columns[:, None, :])[..., None]
