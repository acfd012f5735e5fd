"""Convolutions as one matrix product."""

import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from jaxkd.cpu import fusion, windows


def pointwise(
    lhs: jax.Array,
    rhs: jax.Array,
    strides: tuple[int, ...],
    pads: tuple[tuple[int, int], ...],
    precision: Any,
) -> jax.Array:
    """1×1 convolution, [batch, *spatial, channels] by [1, .., 1, channels, features]."""
    if any(map(any, pads)):
        lhs = windows.pad(lhs, pads)
    if any(s > 1 for s in strides):
        lhs = lhs[(slice(None), *(slice(None, None, s) for s in strides))]
    flat = lhs.reshape(-1, lhs.shape[-1])
    product = _matmul(flat, rhs.reshape(rhs.shape[-2:]), precision)
    return product.reshape(*lhs.shape[:-1], rhs.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def dense(
    lhs: jax.Array,
    rhs: jax.Array,
    strides: tuple[int, ...],
    pads: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
    precision: Any,
) -> jax.Array:
    """[batch, *spatial, channels] by [*kernel, channels, features]: what each output sees, in a
    row, times the kernel as a matrix."""
    return _dense(lhs, rhs, strides, pads, dilation, precision)


def _dense(lhs, rhs, strides, pads, dilation, precision):
    rows = lax.optimization_barrier(_rows(lhs, rhs.shape[:-2], strides, pads, dilation))
    kernel = rhs.reshape(-1, rhs.shape[-1])
    product = jnp.matmul(rows.reshape(-1, rows.shape[-1]), kernel, precision=precision)
    return product.reshape(*rows.shape[:-1], rhs.shape[-1])


def _rows(lhs, kernel, strides, pads, dilation):
    """[batch, *output sizes, kernel positions · channels]."""
    sizes, pads = windows.output_sizes_and_tight_pads(
        lhs.shape[1:-1], kernel, strides, pads, dilation
    )
    x = windows.pad(lhs, pads)
    seen = [
        windows.seen(x, [i * d for i, d in zip(k, dilation)], sizes, strides)
        for k in windows.positions(kernel)
    ]
    return jnp.concatenate(seen, -1)


def _dense_forward(lhs, rhs, strides, pads, dilation, precision):
    return _dense(lhs, rhs, strides, pads, dilation, precision), (lhs, rhs)


def _dense_backward(strides, pads, dilation, precision, residuals, cotangent):
    lhs, rhs = residuals
    # Or XLA would keep the rows, a multiple of lhs, until here.
    lhs = fusion.materialize(lhs, cotangent)
    rows, give_back = jax.vjp(lambda x: _rows(x, rhs.shape[:-2], strides, pads, dilation), lhs)
    cotangent = cotangent.reshape(-1, rhs.shape[-1])
    of_rows, of_kernel = _matmul_backward(
        precision, (rows.reshape(-1, rows.shape[-1]), rhs.reshape(-1, rhs.shape[-1])), cotangent
    )
    return *give_back(of_rows.reshape(rows.shape)), of_kernel.reshape(rhs.shape)


dense.defvjp(_dense_forward, _dense_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x: jax.Array, kernel: jax.Array, precision: Any) -> jax.Array:
    """[positions, channels] by [channels, features].

    Left to itself, JAX writes the kernel's gradient as cotangentᵀ·x, then transposed, over as many
    axes as x has. XLA:CPU runs xᵀ·cotangent on matrices up to nine times faster. The barriers keep
    what comes before from being computed inside the operands, and in transposed copies of them.
    """
    return jnp.matmul(lax.optimization_barrier(x), kernel, precision=precision)


def _matmul_forward(x, kernel, precision):
    x = lax.optimization_barrier(x)
    return jnp.matmul(x, kernel, precision=precision), (x, kernel)


def _matmul_backward(precision, residuals, cotangent):
    x, kernel = lax.optimization_barrier(residuals)
    cotangent = lax.optimization_barrier(cotangent)
    return (
        jnp.matmul(cotangent, kernel.T, precision=precision),
        jnp.matmul(x.T, cotangent, precision=precision),
    )


_matmul.defvjp(_matmul_forward, _matmul_backward)
