"""Depthwise convolutions as sums of shifted products."""

import functools
import itertools

import jax
from jax import lax
import jax.numpy as jnp

from jaxkd.cpu import fusion, windows


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def convolution(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, ...],
    pads: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
) -> jax.Array:
    """[batch, *spatial, channels] by [*kernel, channels], channel by channel."""
    return _shift_and_sum(x, kernel, strides, pads, dilation)


def _shift_and_sum(x, kernel, strides, pads, dilation):
    sizes, pads = windows.output_sizes_and_tight_pads(
        x.shape[1:-1], kernel.shape[:-1], strides, pads, dilation
    )
    x = lax.optimization_barrier(windows.pad(x, pads))
    shifts = [
        (_at(kernel, k), [i * d for i, d in zip(k, dilation)])
        for k in windows.positions(kernel.shape[:-1])
    ]
    return _shifted_sum(x, shifts, sizes, strides).astype(kernel.dtype)


def _forward(x, kernel, strides, pads, dilation):
    # Not by `convolution`: that would leave the gradient without a forward-mode derivative.
    return _shift_and_sum(x, kernel, strides, pads, dilation), (x, kernel)


def _backward(strides, pads, dilation, residuals, cotangent):
    x, kernel = residuals
    cotangent = fusion.materialize(cotangent, kernel)
    return (
        _input_gradient(cotangent, kernel, x.shape[1:-1], strides, pads, dilation),
        _kernel_gradient(x, cotangent, kernel, strides, pads, dilation),
    )


convolution.defvjp(_forward, _backward)


def _input_gradient(cotangent, kernel, input_sizes, strides, pads, dilation):
    """Input position s·a + r sees only the kernel positions that fit its phase r of the stride s.

    So each phase is a shifted sum of stride one over its share of the kernel, and the phases are
    interleaved afterwards. With stride one there is one phase: a convolution by the mirrored
    kernel.
    """
    rank = len(strides)
    phase_sizes = [-(-n // s) for n, s in zip(input_sizes, strides)]
    phases = []
    for phase in itertools.product(*map(range, strides)):
        offsets = []  # (kernel position, offset into the cotangent) of this phase
        for position in windows.positions(kernel.shape[:-1]):
            ahead = [
                r + low - i * d
                for r, (low, _), i, d in zip(phase, pads, position, dilation, strict=True)
            ]
            if all(a % s == 0 for a, s in zip(ahead, strides)):
                offsets.append((position, [a // s for a, s in zip(ahead, strides)]))
        phases.append(offsets)
    every = [offset for offsets in phases for _, offset in offsets]
    lows = [-min(offset[axis] for offset in every) for axis in range(rank)]
    highs = [
        phase_sizes[axis] + max(offset[axis] for offset in every) - cotangent.shape[axis + 1]
        for axis in range(rank)
    ]
    padded = lax.optimization_barrier(windows.pad(cotangent, tuple(zip(lows, highs))))
    results = []
    for offsets in phases:
        shifts = [
            (_at(kernel, position), [low + o for low, o in zip(lows, offset)])
            for position, offset in offsets
        ]
        if shifts:
            total = _shifted_sum(padded, shifts, phase_sizes, (1,) * rank).astype(kernel.dtype)
        else:
            total = jnp.zeros((padded.shape[0], *phase_sizes, padded.shape[-1]), kernel.dtype)
        results.append(total)
    interleaved = windows.interleave(results, strides)
    return interleaved[(slice(None), *(slice(n) for n in input_sizes))]


def _kernel_gradient(x, cotangent, kernel, strides, pads, dilation):
    """Sums of products over batch and space, one for each kernel position, in two stages.

    A single reduction of all kernel positions over each image reads x and the cotangent once; a
    separate reduction for each position reads them as often, and does so with large steps.
    """
    sizes, pads = windows.output_sizes_and_tight_pads(
        x.shape[1:-1], kernel.shape[:-1], strides, pads, dilation
    )
    x = lax.optimization_barrier(windows.pad(x, pads))
    accumulate = jnp.promote_types(kernel.dtype, jnp.float32)
    cotangent = cotangent.astype(accumulate)
    products = [
        windows.seen(x, [i * d for i, d in zip(k, dilation)], sizes, strides).astype(accumulate)
        * cotangent
        for k in windows.positions(kernel.shape[:-1])
    ]
    zeros = [jnp.zeros((), accumulate)] * len(products)
    spatial_axes = tuple(range(1, x.ndim - 1))
    per_image = lax.reduce(products, zeros, _add_each, spatial_axes)
    per_image = lax.optimization_barrier(per_image)
    return jnp.stack([p.sum(0) for p in per_image]).reshape(kernel.shape).astype(kernel.dtype)


def _add_each(first, second):
    return [a + b for a, b in zip(first, second)]


def _shifted_sum(x, shifts, sizes, strides):
    """Sum of `x` from each shift's offset on, times the shift's vector of channels."""
    accumulate = jnp.promote_types(x.dtype, jnp.float32)
    terms = [
        windows.seen(x, offset, sizes, strides).astype(accumulate) * weight.astype(accumulate)
        for weight, offset in shifts
    ]
    return functools.reduce(jnp.add, terms)


def _at(kernel, position):
    return lax.index_in_dim(kernel.reshape(-1, kernel.shape[-1]), _flat(kernel, position), 0, False)


def _flat(kernel, position):
    index = 0
    for i, n in zip(position, kernel.shape):
        index = index * n + i
    return index
