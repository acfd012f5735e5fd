"""Batch normalization with the fewest passes over memory.

On a CPU a layer of BatchNorm costs what it reads. Differentiated as it is written, it reads its
input and its gradient once for each of five sums; here there is one pass for both sums of the way
forward and one for both of the way back (Ioffe & Szegedy, arXiv 1502.03167, section 3).
"""

import functools

import jax
from jax import lax
import jax.numpy as jnp

from jaxkd.cpu import fusion


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def batch_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalizes each channel by its mean and variance over the batch and the spatial axes.

    Reverse-mode differentiable, of any order; no forward mode of its own.

    Args:
      x: [batch, *spatial, channels], float32 or wider, of one spatial axis at least.
      scale: [channels].
      bias: [channels].
      epsilon: added to the variance.

    Returns:
      The normalized x, times scale, plus bias; mean and (biased) variance, [channels].
    """
    return _forward(x, scale, bias, epsilon)[0]


def _forward(x, scale, bias, epsilon):
    # Or each of the passes that follow would compute x anew from what it is made of.
    x = lax.optimization_barrier(x)
    sums, squares = _sums(x, x)
    number = x.size // x.shape[-1]
    mean = sums / number
    excess = squares / number - mean * mean
    variance = jnp.maximum(excess, 0.0)
    inverse = lax.rsqrt(variance + epsilon)
    y = (x - mean) * (inverse * scale) + bias
    return (y, mean, variance), (x, scale, mean, inverse, excess > 0)


def _backward(epsilon, residuals, cotangents):
    x, scale, mean, inverse, varies = residuals
    of_y, of_mean, of_variance = cotangents
    of_y = fusion.materialize(of_y, scale)
    of_bias, moments = _sums(of_y, x)
    of_inverse = moments - mean * of_bias
    of_variance = of_variance - scale * of_inverse * inverse**3 / 2
    of_variance = jnp.where(varies, of_variance, 0.0)
    of_mean = of_mean - inverse * scale * of_bias - 2 * mean * of_variance
    number = x.size // x.shape[-1]
    of_x = (inverse * scale) * of_y + (2 * of_variance / number) * x + of_mean / number
    return of_x, inverse * of_inverse, of_bias


batch_norm.defvjp(_forward, _backward)


def _sums(a, b):
    """Of a and of a·b, by channel, in one pass.

    Along the last spatial axis first: XLA:CPU runs a reduction of two arrays over several axes at a
    third of the speed.
    """
    zero = jnp.zeros((), a.dtype)
    lines = lax.reduce(
        (a, a * b), (zero, zero), lambda s, t: (s[0] + t[0], s[1] + t[1]), (a.ndim - 2,)
    )
    return [part.sum(range(part.ndim - 1)) for part in lax.optimization_barrier(lines)]
