"""Windows over the spatial axes of [batch, *spatial, channels], as slices."""

from collections.abc import Iterator, Mapping, Sequence
import functools
import itertools

import jax
from jax import lax
import jax.numpy as jnp

# (low, high) for each spatial axis; negative: cropped.
Pads = Sequence[tuple[int, int]]


def positions(window: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All positions in a window, the last axis fastest."""
    return itertools.product(*map(range, window))


def output_sizes_and_tight_pads(
    input_sizes: Sequence[int],
    window: Sequence[int],
    strides: Sequence[int],
    pads: Pads,
    dilation: Sequence[int] | None = None,
) -> tuple[list[int], list[tuple[int, int]]]:
    """Sizes of the output, and the pads without what no window reaches."""
    sizes, tight = [], []
    for n, k, s, (low, high), d in zip(
        input_sizes, window, strides, pads, dilation or [1] * len(window), strict=True
    ):
        extent = d * (k - 1) + 1
        size = (n + low + high - extent) // s + 1
        sizes.append(size)
        tight.append((low, (size - 1) * s + extent - n - low))
    return sizes, tight


def pad(x: jax.Array, pads: Pads, value: float = 0.0) -> jax.Array:
    """`value` around the spatial axes."""
    edges = [(0, 0, 0), *((*p, 0) for p in pads), (0, 0, 0)]
    return lax.pad(x, jnp.asarray(value, x.dtype), edges)


def seen(
    x: jax.Array, offset: Sequence[int], sizes: Sequence[int], strides: Sequence[int]
) -> jax.Array:
    """What `sizes` windows, `strides` apart, see at `offset` from where they begin."""
    limits = [o + (n - 1) * s + 1 for o, n, s in zip(offset, sizes, strides)]
    return lax.slice(x, (0, *offset, 0), (x.shape[0], *limits, x.shape[-1]), (1, *strides, 1))


def give_back(
    pieces: Mapping[tuple[int, ...], jax.Array],
    input_sizes: Sequence[int],
    strides: Sequence[int],
    pads: Pads,
) -> jax.Array:
    """The adjoint of padding and seeing: adds what was seen to where it was seen.

    Args:
      pieces: for each position in the window, [batch, *output sizes, channels].
      input_sizes: without the pads.
      strides: between windows.
      pads: with which the windows were taken.

    Returns:
      [batch, *input_sizes, channels].
    """
    first = next(iter(pieces.values()))
    batch, *outputs, channels = first.shape
    furthest = [max(axis) // s for axis, s in zip(zip(*pieces), strides)]
    sizes = [n + far for n, far in zip(outputs, furthest)]
    phases = []
    # Input position s·a + r is seen at positions r, s + r, 2·s + r, … by windows a, a - 1, …
    for phase in itertools.product(*map(range, strides)):
        terms = [
            pad(piece, [(p // s, far - p // s) for p, s, far in zip(position, strides, furthest)])
            for position, piece in pieces.items()
            if all(p % s == r for p, s, r in zip(position, strides, phase))
        ]
        nothing = jnp.zeros((batch, *sizes, channels), first.dtype)
        phases.append(functools.reduce(jnp.add, terms) if terms else nothing)
    padded = interleave(phases, strides)
    crop = [(-low, low + n - m) for n, m, (low, _) in zip(input_sizes, padded.shape[1:-1], pads)]
    return pad(padded, crop)


def interleave(phases: Sequence[jax.Array], strides: Sequence[int]) -> jax.Array:
    """Every s-th element along each spatial axis from another of the phases.

    Args:
      phases: [batch, *sizes, channels], one for each of `positions(strides)`, in that order.
      strides: s for each axis.

    Returns:
      [batch, *(sizes · strides), channels].
    """
    if len(phases) == 1:
        return phases[0]
    rank = len(strides)
    batch, *sizes, channels = phases[0].shape
    # [batch, A, B, .., s·t.., channels] -> [batch, A, s, B, t, .., channels] -> interleaved
    stacked = jnp.stack(phases, axis=-2).reshape(batch, *sizes, *strides, channels)
    order = [0, *itertools.chain(*((1 + i, 1 + rank + i) for i in range(rank))), 2 * rank + 1]
    merged = [n * s for n, s in zip(sizes, strides)]
    return stacked.transpose(order).reshape(batch, *merged, channels)
