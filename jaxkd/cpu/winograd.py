"""3×3 convolutions of stride one with 4/9 of the multiplications.

Winograd's minimal filtering F(2×2, 3×3), after Lavin & Gray, "Fast Algorithms for Convolutional
Neural Networks" (arXiv 1509.09308): four neighbouring outputs are made from a tile of 4×4 inputs
by 16 multiplications instead of 36. For an input tile d and a kernel g

    y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A                                                       (eq. 7)

where the products ⊙, summed over the input channels, are 16 matrix products over all tiles. The
gradients are the adjoint maps around the same 16 products, so they save as much. The transforms
only add, subtract and halve: in float32 the results are as near to the true ones as those of the
plain sums.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from jaxkd.cpu import windows

# (low, high) zeros around height and width; negative: cropped.
Pads = tuple[tuple[int, int], tuple[int, int]]
# A function from a list of arrays to a list of arrays, linear.
Linear = Callable[[Sequence[Any]], list[Any]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolution(x: jax.Array, kernel: jax.Array, pads: Pads, precision: Any = None) -> jax.Array:
    """[batch, height, width, channels] by [3, 3, channels, features], float32 or wider.

    Reverse-mode differentiable, of any order; no forward mode of its own.

    Returns:
      [batch, height + low + high - 2, width + low + high - 2, features].
    """
    return _outputs(x, kernel, pads, precision)


def num_tiles(shape: Sequence[int], pads: Pads) -> int:
    """How many tiles of outputs an input [batch, height, width, …] has.

    Each takes 16 values a channel and 16 a feature while it is computed.
    """
    rows, columns = _tiles(shape, pads)
    return shape[0] * rows * columns


def _tiles(shape, pads):
    return tuple(-(-(n + low + high - 2) // 2) for n, (low, high) in zip(shape[1:3], pads))


def _outputs(x, kernel, pads, precision):
    rows, columns = _tiles(x.shape, pads)
    seen, transformed = _input_tiles(x, pads), _kernel_tiles(kernel)
    # The barriers, here and below, keep what is elementwise out of the products' operands, where
    # XLA:CPU would compute it once for each use, one element at a time.
    products = lax.optimization_barrier(
        [jnp.matmul(v, u, precision=precision) for v, u in zip(seen, transformed)]
    )
    outputs = _both_axes(_sum_products, _split(products, rows, columns))
    height, width = (n + low + high - 2 for n, (low, high) in zip(x.shape[1:3], pads))
    return windows.interleave([y for row in outputs for y in row], (2, 2))[:, :height, :width]


def _forward(x, kernel, pads, precision):
    # Not by `convolution`: that would leave the gradient without a forward-mode derivative. The
    # tiles are made again in the backward pass: they are four times as large as x.
    return _outputs(x, kernel, pads, precision), (x, kernel)


def _backward(pads, precision, residuals, cotangent):
    x, kernel = residuals
    rows, columns = _tiles(x.shape, pads)
    seen, transformed = _input_tiles(x, pads), _kernel_tiles(kernel)
    whole = [(0, 2 * tiles - n) for tiles, n in zip((rows, columns), cotangent.shape[1:3])]
    cotangent = lax.optimization_barrier(windows.pad(cotangent, whole))
    phases = [[cotangent[:, i::2, j::2] for j in range(2)] for i in range(2)]
    products = _flat(_both_axes(_sum_products_adjoint, phases))

    of_seen = [jnp.matmul(m, u.T, precision=precision) for m, u in zip(products, transformed)]
    of_tiles = _both_axes(_transform_input_adjoint, _split(of_seen, rows, columns))
    # Neighbouring tiles overlap by two.
    of_x = windows.give_back(
        {(i, j): of_tiles[i][j] for i in range(4) for j in range(4)}, x.shape[1:3], (2, 2), pads
    )

    of_kernel_tiles = [jnp.matmul(v.T, m, precision=precision) for v, m in zip(seen, products)]
    grid = [of_kernel_tiles[4 * i : 4 * i + 4] for i in range(4)]
    of_kernel = _both_axes(_transform_kernel_adjoint, grid)
    return of_x, jnp.stack([jnp.stack(row) for row in of_kernel])


convolution.defvjp(_forward, _backward)


# The maps Bᵀ, G and Aᵀ of one axis (arXiv 1509.09308, section 4.1) and their adjoints.


def _transform_input(d):
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _transform_input_adjoint(v):
    return [v[0], v[1] - v[2] + v[3], v[1] + v[2] - v[0], -v[3]]


def _transform_kernel(g):
    return [g[0], (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[2]]


def _transform_kernel_adjoint(u):
    return [u[0] + (u[1] + u[2]) / 2, (u[1] - u[2]) / 2, (u[1] + u[2]) / 2 + u[3]]


def _sum_products(m):
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _sum_products_adjoint(y):
    return [y[0], y[0] + y[1], y[0] - y[1], -y[1]]


def _both_axes(linear: Linear, grid: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """`linear` along the rows, then along the columns, of a grid of arrays."""
    along_rows = [linear(row) for row in grid]
    along_columns = [linear(column) for column in zip(*along_rows)]
    return [list(row) for row in zip(*along_columns)]


def _input_tiles(x, pads):
    """BᵀdB: 16 times [tiles, channels]."""
    rows, columns = _tiles(x.shape, pads)
    x = lax.optimization_barrier(windows.pad(x, _whole_tiles(x, pads)))
    grid = [[windows.seen(x, (i, j), (rows, columns), (2, 2)) for j in range(4)] for i in range(4)]
    return _flat(_both_axes(_transform_input, grid))


def _kernel_tiles(kernel):
    """GgGᵀ: 16 times [channels, features]."""
    grid = _both_axes(_transform_kernel, [[kernel[i, j] for j in range(3)] for i in range(3)])
    return lax.optimization_barrier([u for row in grid for u in row])


def _whole_tiles(x, pads):
    """The pads, with as much after as an even number of outputs needs."""
    return [
        (low, 2 * tiles + 2 - n - low)
        for n, tiles, (low, _) in zip(x.shape[1:3], _tiles(x.shape, pads), pads)
    ]


def _flat(grid):
    """A grid of [batch, rows, columns, channels] as a list of [tiles, channels]."""
    return lax.optimization_barrier([a.reshape(-1, a.shape[-1]) for row in grid for a in row])


def _split(flat, rows, columns):
    """A list of 16 times [tiles, channels] as a grid of [batch, rows, columns, channels]."""
    arrays = [a.reshape(-1, rows, columns, a.shape[-1]) for a in flat]
    return [arrays[4 * i : 4 * i + 4] for i in range(4)]
