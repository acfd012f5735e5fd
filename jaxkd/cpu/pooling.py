"""Pooling by the largest value, with a gradient that XLA:CPU runs fast."""

from collections.abc import Sequence
import functools
import math

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from jaxkd.cpu import windows

# The program grows with their number.
MAX_POSITIONS = 64


def max_pool(
    inputs: jax.Array,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: str | Sequence[tuple[int, int]] = 'VALID',
) -> jax.Array:
    """`flax.linen.max_pool`, with a gradient 4 to 10 times faster on XLA:CPU.

    Left to itself, JAX scatters the gradient, one element after the other. Here it is a sum of
    masked copies, elementwise. Values and gradients are the same; among equal values the first of
    a window has the gradient, too. No forward-mode derivative. Where the default backend is
    another than the CPU, and for windows of more than 64 positions, this is `flax.linen.max_pool`.

    Args:
      inputs: float [batch, *spatial, channels].
      window_shape: one int per spatial axis.
      strides: between windows; None: 1 for each axis.
      padding: 'SAME', 'VALID' or (low, high) per spatial axis.

    Returns:
      [batch, *output spatial, channels].
    """
    window = tuple(window_shape)
    strides = (1,) * len(window) if strides is None else tuple(strides)
    if (
        jax.default_backend() != 'cpu'
        or inputs.ndim != len(window) + 2
        or not jnp.issubdtype(inputs.dtype, jnp.floating)
        or math.prod(window) > MAX_POSITIONS
    ):
        return nn.max_pool(inputs, window, strides, padding)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(inputs.shape[1:-1], window, strides, padding)
    return _max_pool(inputs, window, strides, tuple((int(p[0]), int(p[1])) for p in padding))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _max_pool(x, window, strides, pads):
    return nn.max_pool(x, window, strides, pads)


def _forward(x, window, strides, pads):
    largest = nn.max_pool(x, window, strides, pads)
    return largest, (x, largest)


def _backward(window, strides, pads, residuals, cotangent):
    x, largest = residuals
    sizes, tight = windows.output_sizes_and_tight_pads(x.shape[1:-1], window, strides, pads)
    padded = lax.optimization_barrier(windows.pad(x, tight, -math.inf))
    pieces, looking = {}, jnp.ones(largest.shape, bool)
    for position in windows.positions(window):
        here = windows.seen(padded, position, sizes, strides) == largest
        pieces[position] = jnp.where(here & looking, cotangent, 0)
        looking &= ~here
    return (windows.give_back(pieces, x.shape[1:-1], strides, pads),)


_max_pool.defvjp(_forward, _backward)
