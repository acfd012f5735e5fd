"""3×3 convolutions of stride one with a quarter of the multiplications.

Winograd's minimal filtering F(4×4, 3×3), after Lavin & Gray, "Fast Algorithms for Convolutional
Neural Networks" (arXiv 1509.09308): 16 neighbouring outputs are made from a tile of 6×6 inputs by
36 multiplications instead of 144. For an input tile d and a kernel g

    y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A                                                       (eq. 7)

where the products ⊙, summed over the input channels, are 36 matrix products over all tiles. The
gradients are the adjoint maps around the same products, so they save as much. Each map runs along
the rows, then along the columns, of all tiles at once.
"""

from collections.abc import Sequence
import functools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from jaxkd.cpu import windows

# (low, high) zeros around height and width; negative: cropped.
Pads = tuple[tuple[int, int], tuple[int, int]]

# Of a tile, along an axis.
OUTPUTS, INPUTS = 4, 6
# The polynomials behind a tile are evaluated here and at infinity. In float32 the outputs are then
# as near to the true ones as plain sums are; with the usual 0, ±1, ±2 they are four times as far.
POINTS = (0.0, math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(2.0), -math.sqrt(2.0))


def _maps() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bᵀ [INPUTS, INPUTS], G [INPUTS, 3] and Aᵀ [OUTPUTS, INPUTS].

    By the construction of Cook and Toom (arXiv 1509.09308, section 4.1): the adjoint of multiplying
    two polynomials by their values at the points, divided in G by the Lagrange polynomials'
    denominators.
    """

    def powers(number):
        at_infinity = np.eye(number)[-1:]
        return np.concatenate([np.vander(POINTS, number, increasing=True), at_infinity])

    others = [[q for q in POINTS if q != p] for p in POINTS]
    denominators = [math.prod(p - q for q in rest) for p, rest in zip(POINTS, others)]
    through_others = [[*np.poly(rest)[::-1], 0.0] for rest in others]
    of_inputs = np.array([*through_others, np.poly(POINTS)[::-1]])
    # The points cancel in pairs: what is left of that is rounding.
    of_inputs[np.abs(of_inputs) < 1e-12] = 0.0
    return of_inputs, powers(3) / np.array([*denominators, 1.0])[:, None], powers(OUTPUTS).T


OF_INPUTS, OF_KERNEL, OF_PRODUCTS = _maps()


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolution(x: jax.Array, kernel: jax.Array, pads: Pads, precision: Any = None) -> jax.Array:
    """[batch, height, width, channels] by [3, 3, channels, features], float32 or wider.

    Reverse-mode differentiable, of any order; no forward mode of its own.

    Returns:
      [batch, height + low + high - 2, width + low + high - 2, features].
    """
    return _convolve(x, kernel, pads, precision)


def num_tiles(shape: Sequence[int], pads: Pads) -> int:
    """How many tiles of outputs an input [batch, height, width, …] has.

    Each takes INPUTS² values a channel and as many a feature while it is computed.
    """
    return shape[0] * math.prod(_tiles(shape, pads))


def _tiles(shape, pads):
    return tuple(-(-(n + low + high - 2) // OUTPUTS) for n, (low, high) in zip(shape[1:3], pads))


def _convolve(x, kernel, pads, precision):
    products = _matmul('ptc,pcf->ptf', _transform(x, pads), _transform_kernel(kernel), precision)
    height, width = (n + low + high - 2 for n, (low, high) in zip(x.shape[1:3], pads))
    return _outputs(products, (x.shape[0], *_tiles(x.shape, pads)))[:, :height, :width]


def _forward(x, kernel, pads, precision):
    # Not by `convolution`: that would leave the gradient without a forward-mode derivative.
    return _convolve(x, kernel, pads, precision), (x, kernel)


def _backward(pads, precision, residuals, cotangent):
    x, kernel = residuals
    rest = [
        (0, OUTPUTS * tiles - n) for tiles, n in zip(_tiles(x.shape, pads), cotangent.shape[1:3])
    ]
    products = _outputs_adjoint(lax.optimization_barrier(windows.pad(cotangent, rest)))
    of_tiles = _matmul('ptf,pcf->ptc', products, _transform_kernel(kernel), precision)
    of_kernel = _matmul('ptc,ptf->pcf', _transform(x, pads), products, precision)
    return _transform_adjoint(of_tiles, x.shape, pads), _transform_kernel_adjoint(of_kernel)


convolution.defvjp(_forward, _backward)


# Barriers, here and below, keep XLA from rewriting what is around the products into them.


def _matmul(axes, a, b, precision):
    """One matrix product for each position p in a tile."""
    return lax.optimization_barrier(jnp.einsum(axes, a, b, precision=precision))


def _apply(matrix, arrays):
    """The rows of a small matrix as sums of arrays."""

    def term(factor, a):
        return a if factor == 1 else -a if factor == -1 else float(factor) * a

    return [
        functools.reduce(jnp.add, [term(f, a) for f, a in zip(row, arrays, strict=True) if f])
        for row in matrix
    ]


def _along(a, axis):
    return [lax.index_in_dim(a, i, axis, keepdims=False) for i in range(a.shape[axis])]


# The maps work on the last axis but one. The batch stays an axis by itself: where it is divided
# among devices, each then does its own part.


def _transform(x, pads):
    """BᵀdB of all tiles, [INPUTS², tiles, channels]."""
    rows, columns = _tiles(x.shape, pads)
    whole = [
        (low, OUTPUTS * tiles + 2 - n - low)
        for n, tiles, (low, _) in zip(x.shape[1:3], (rows, columns), pads)
    ]
    x = lax.optimization_barrier(windows.pad(x, whole))
    batch, height, width, channels = x.shape
    lines = _seen(x.reshape(batch, height, width * channels), rows)
    lines = lax.optimization_barrier(jnp.stack(_apply(OF_INPUTS, lines)))
    cells = _seen(lines.reshape(INPUTS, batch, rows, width, channels), columns)
    cells = [a.reshape(INPUTS, -1, channels) for a in _apply(OF_INPUTS, cells)]
    return lax.optimization_barrier(jnp.stack(cells, 1).reshape(INPUTS**2, -1, channels))


def _transform_adjoint(of_tiles, shape, pads):
    """From [INPUTS², tiles, channels] to `shape`, that of x."""
    batch, height, width, channels = shape
    rows, columns = _tiles(shape, pads)
    grid = of_tiles.reshape(INPUTS, INPUTS, batch, rows, columns, channels)
    cells = _apply(OF_INPUTS.T, _along(grid, 1))
    lines = lax.optimization_barrier(_give_back(cells, width, pads[1]))
    lines = lines.reshape(INPUTS, batch, rows, width * channels)
    lines = _apply(OF_INPUTS.T, _along(lines, 0))
    return _give_back(lines, height, pads[0]).reshape(shape)


def _transform_kernel(kernel):
    """GgGᵀ, [INPUTS², channels, features]."""
    lines = jnp.stack(_apply(OF_KERNEL, _along(kernel, 0)))
    grid = jnp.stack(_apply(OF_KERNEL, _along(lines, 1)), 1)
    return lax.optimization_barrier(grid.reshape(INPUTS**2, *kernel.shape[2:]))


def _transform_kernel_adjoint(of_kernel):
    """From [INPUTS², channels, features] to [3, 3, channels, features]."""
    grid = of_kernel.reshape(INPUTS, INPUTS, *of_kernel.shape[1:])
    lines = jnp.stack(_apply(OF_KERNEL.T, _along(grid, 1)), 1)
    return jnp.stack(_apply(OF_KERNEL.T, _along(lines, 0)))


def _outputs(products, tiles):
    """AᵀmA, [batch, OUTPUTS · rows, OUTPUTS · columns, features]; `tiles`: batch, rows, columns."""
    batch, rows, columns = tiles
    features = products.shape[-1]
    grid = products.reshape(INPUTS, INPUTS, batch, rows, columns, features)
    lines = lax.optimization_barrier(_interleave(_apply(OF_PRODUCTS, _along(grid, 1))))
    lines = _apply(OF_PRODUCTS, _along(lines.reshape(INPUTS, batch, rows, -1), 0))
    return _interleave(lines).reshape(batch, OUTPUTS * rows, OUTPUTS * columns, features)


def _outputs_adjoint(cotangent):
    """From what `_outputs` returns to [INPUTS², tiles, features]."""
    batch, height, width, features = cotangent.shape
    lines = cotangent.reshape(batch, height // OUTPUTS, OUTPUTS, width * features)
    lines = jnp.stack(_apply(OF_PRODUCTS.T, _along(lines, 2)))
    cells = lax.optimization_barrier(lines).reshape(INPUTS, -1, OUTPUTS, features)
    cells = jnp.stack(_apply(OF_PRODUCTS.T, _along(cells, 2)), 1)
    return lax.optimization_barrier(cells.reshape(INPUTS**2, -1, features))


def _seen(x, tiles):
    """What tiles see at each of their positions."""
    others = x.shape[1:-2]
    first, ones = (0,) * len(others), (1,) * len(others)
    return [windows.seen(x, (*first, i), (*others, tiles), (*ones, OUTPUTS)) for i in range(INPUTS)]


def _give_back(pieces, size, pads):
    """The adjoint of padding to whole tiles and `_seen`."""
    others = pieces[0].shape[1:-2]
    first, ones = (0,) * len(others), (1,) * len(others)
    nothing = ((0, 0),) * len(others)
    return windows.give_back(
        {(*first, i): piece for i, piece in enumerate(pieces)},
        (*others, size),
        (*ones, OUTPUTS),
        (*nothing, pads),
    )


def _interleave(pieces):
    """The outputs of tiles at each of their positions, in their order."""
    return windows.interleave(pieces, (*(1,) * (pieces[0].ndim - 3), OUTPUTS))
