"""How an array of a Flax network lies in memory in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
import math
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]


class Order(NamedTuple):
    """`ours.reshape(split).transpose(axes).reshape(shape)` is theirs.

    >>> ours = np.arange(24).reshape(1, 2, 3, 4)  # height, width, inputs, outputs
    >>> order = kernel(ours.shape, {})
    >>> theirs = to_theirs(ours, order)
    >>> theirs.shape, bool((to_ours(theirs, order, ours.shape) == ours).all())
    ((4, 3, 1, 2), True)
    """

    split: Shape
    axes: Shape
    shape: Shape


# From the shape of an array of ours, and the shapes of all arrays by path.
Layout = Callable[[Shape, Mapping[str, Shape]], Order]


def to_theirs(ours: np.ndarray, order: Order) -> np.ndarray:
    return np.ascontiguousarray(ours.reshape(order.split).transpose(order.axes)).reshape(
        order.shape
    )


def to_ours(theirs: np.ndarray, order: Order, shape: Shape) -> np.ndarray:
    moved = theirs.reshape([order.split[axis] for axis in order.axes])
    return np.ascontiguousarray(moved.transpose(np.argsort(order.axes))).reshape(shape)


def same(shape: Shape, shapes: Mapping[str, Shape]) -> Order:
    return Order(shape, tuple(range(len(shape))), shape)


def vector(shape: Shape, shapes: Mapping[str, Shape]) -> Order:
    """Biases, which attention has for each head."""
    return Order((math.prod(shape),), (0,), (math.prod(shape),))


def column(shape: Shape, shapes: Mapping[str, Shape]) -> Order:
    """Factors of channels as [c, 1, 1]."""
    return Order(shape, (0,), (*shape, 1, 1))


def kernel(shape: Shape, shapes: Mapping[str, Shape]) -> Order:
    """Of a convolution, grouped or not, or a Dense: [..., in, out] to [out, in, ...]."""
    *window, inputs, outputs = range(len(shape))
    axes = (outputs, inputs, *window)
    return Order(shape, axes, tuple(shape[axis] for axis in axes))


def dense_window(shape: Shape, shapes: Mapping[str, Shape]) -> Order:
    """Of a Dense that is a 1×1 convolution in PyTorch."""
    order = kernel(shape, shapes)
    return order._replace(shape=(*order.shape, 1, 1))


def into_heads(shape: Shape, shapes: Mapping[str, Shape]) -> Order:
    """Of what makes queries, keys or values: [in, heads, width] to [heads · width, in]."""
    return kernel((shape[0], math.prod(shape[1:])), shapes)


def out_of_heads(shape: Shape, shapes: Mapping[str, Shape]) -> Order:
    """Of what reads attention: [heads, width, out] to [out, heads · width]."""
    return kernel((math.prod(shape[:-1]), shape[-1]), shapes)


def flattened(bias: str, *, window: bool = False) -> Layout:
    """Of a Dense that reads pixels, each with the channels of the layer that has this `bias`.

    PyTorch flattens [channels, height, width], Flax [height, width, channels]. With `window` it is
    a convolution in PyTorch, over square images.
    """
    return functools.partial(_flattened, bias, window)


def _flattened(bias: str, window: bool, shape: Shape, shapes: Mapping[str, Shape]) -> Order:
    (channels,), (inputs, outputs) = shapes[bias], shape
    pixels = inputs // channels
    side = math.isqrt(pixels)
    theirs = (outputs, channels, side, side) if window else (outputs, inputs)
    return Order((pixels, channels, outputs), (2, 1, 0), theirs)
