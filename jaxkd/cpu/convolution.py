"""`jax.lax.conv_general_dilated` in the form that XLA runs fastest on a CPU, or on a GPU."""

from collections.abc import Sequence
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from jaxkd.cpu import depthwise, products, winograd

# One shifted product for each kernel position: the program grows with their number, and with it
# the time to compile it. 7×7 kernels are still in; 9×9 and larger go to lax.
MAX_KERNEL_POSITIONS = 64
# Pixels of an output that are few. On two cores a 3×3 kernel with 512 channels and a batch of 32
# takes, by lax and as a matrix product, 269 and 4 ms for 2×2 pixels, 8.6 and 9.0 ms for 3×3.
FEW_OUTPUTS = 4
# With as many features, or as few channels (an image's), the product takes 0.4 to 0.7 of lax's
# time, forward and backward, with or without a stride; it is the gradient of the kernel that lax is
# slow at. With 16 features or fewer it is slower.
PRODUCT_FEATURES, PRODUCT_CHANNELS = 24, 4
# Winograd's transforms cost as much a channel however many there are, and the products cost less
# the fewer there are. On two cores, forward and backward, its time is 0.25 to 0.5 of lax's, and 0.4
# to 0.9 of the product's, from 12 channels on; with 8 it is level with them. A layer of it takes
# 1 to 2 s more to compile: with fewer multiply-adds than WINOGRAD_WORK no more than 2 ms a step
# are saved, and a short run ends later.
WINOGRAD_CHANNELS, WINOGRAD_TILES, WINOGRAD_WORK = 12, 32, 2**26
# What those two may hold meanwhile: memory may be dearer than time.
MAX_BYTES = 2**30
# On a GPU, in float32 and with few pixels: cuDNN's kernels are many there, and each is launched by
# itself. On an H100 a training step of MobileNetV2 with at most 14×14 pixels, batch 128, takes 4.9
# instead of 7.5 ms. With up to 112×112 pixels in bfloat16 its kernels would take 30 instead of 15.
GPU_FORMS, GPU_OUTPUTS = ('depthwise', 'pointwise'), 14 * 14


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, in another form where XLA runs that faster.

    Depthwise convolutions (one input channel per group, any channel multiplier, stride, padding and
    kernel dilation), 1×1 convolutions and those of one group with many features or few channels or
    outputs, of floats in channels-last layout, have such a form; 3×3 convolutions of one group and
    stride one in float32 or float64, too. On a GPU the first two have it, in float32 and with
    few outputs. Everything else, and all on other backends, is handed to lax. Works under jit,
    vmap, checkpoint and reverse-mode differentiation, of higher order too (`jax.jvp` of
    `jax.grad` included). The fast forms have no forward-mode derivative of their own (`jax.jvp`,
    `jax.jacfwd`), because their gradients are written by hand.

    Args:
        lhs: input, float [batch, *spatial, channels] for a fast form.
        rhs: kernel, [*kernel, channels / feature_group_count, features], of the same dtype.
        window_strides: one int per spatial dimension.
        padding: 'SAME', 'VALID', 'SAME_LOWER' or (low, high) per spatial dimension; may be
            negative.
        lhs_dilation: as in lax; other than ones: lax.
        rhs_dilation: one int per spatial dimension, or None for ones.
        dimension_numbers: as in lax; other than NHWC, HWIO, NHWC: lax.
        feature_group_count: number of groups of channels.
        batch_group_count: as in lax; other than one: lax.
        precision: of the matrix product, as in lax; the shifted products are in full precision.
        preferred_element_type: as in lax; other than None and the operands' dtype: lax.

    Returns:
        [batch, *output spatial, features] of the operands' dtype. Half-precision depthwise
        convolutions are summed in float32.

    Raises:
        TypeError, ValueError: those of lax, for operands that don't fit together.
    """
    form = _fast_form(
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        batch_group_count,
        preferred_element_type,
    )
    if form is None:
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            batch_group_count=batch_group_count,
            precision=precision,
            preferred_element_type=preferred_element_type,
        )
    kind, strides, pads, dilation = form
    if kind == 'pointwise':
        return products.pointwise(lhs, rhs, strides, pads, precision)
    if kind == 'winograd':
        return winograd.convolution(lhs, rhs, pads, precision)
    if kind == 'product':
        return products.dense(lhs, rhs, strides, pads, dilation, precision)
    multiplier = rhs.shape[-1] // feature_group_count
    if multiplier > 1:
        lhs = jnp.repeat(lhs, multiplier, axis=-1)
    return depthwise.convolution(lhs, rhs.squeeze(-2), strides, pads, dilation)


def _fast_form(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None,
    rhs_dilation: Sequence[int] | None,
    dimension_numbers: Any,
    feature_group_count: int,
    batch_group_count: int,
    preferred_element_type: Any,
) -> tuple[str, tuple[int, ...], tuple[tuple[int, int], ...], tuple[int, ...]] | None:
    """(kind, strides, pads, dilation), or None: lax has to do it.

    Kinds: 'depthwise', 'pointwise', 'product', 'winograd'.

    Operands that don't fit together are None too: lax has the error message.
    """
    rank = lhs.ndim
    dtype = lhs.dtype
    if (
        rank < 3
        or rhs.ndim != rank
        or dtype != rhs.dtype
        or not jnp.issubdtype(dtype, jnp.floating)
        or jnp.finfo(dtype).bits < 16
        or batch_group_count != 1
        or (lhs_dilation is not None and any(d != 1 for d in lhs_dilation))
        or (preferred_element_type is not None and jnp.dtype(preferred_element_type) != dtype)
        # Symbolic sizes (jax.export) are welcome in the batch only.
        or not all(isinstance(size, int) for size in (*lhs.shape[1:], *rhs.shape))
    ):
        return None
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    spatial_axes = tuple(range(1, rank - 1))
    channels_last = (0, rank - 1, *spatial_axes)
    if (
        tuple(numbers.lhs_spec) != channels_last
        or tuple(numbers.rhs_spec) != (rank - 1, rank - 2, *range(rank - 2))
        or tuple(numbers.out_spec) != channels_last
    ):
        return None
    channels, kernel = lhs.shape[-1], rhs.shape[:-2]
    per_group, features = rhs.shape[-2:]
    if (
        feature_group_count == channels > 1 == per_group
        and features % channels == 0
        and 1 < math.prod(kernel) <= MAX_KERNEL_POSITIONS
    ):
        kind = 'depthwise'
    elif (
        feature_group_count == 1
        and per_group == channels
        and math.prod(kernel) <= MAX_KERNEL_POSITIONS
    ):
        kind = 'pointwise' if math.prod(kernel) == 1 else 'dense'
    else:
        return None
    strides = tuple(window_strides)
    dilation = (1,) * (rank - 2) if rhs_dilation is None else tuple(rhs_dilation)
    if len(strides) != rank - 2 or len(dilation) != rank - 2 or min(strides + dilation) < 1:
        return None
    extents = tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True))
    if isinstance(padding, str):
        pads = lax.padtype_to_pads(lhs.shape[1:-1], extents, strides, padding)
    else:
        pads = padding
    pads = tuple((int(low), int(high)) for low, high in pads)
    if len(pads) != rank - 2 or features == 0:
        return None
    padded = [n + low + high for n, (low, high) in zip(lhs.shape[1:-1], pads, strict=True)]
    if any(n == 0 for n in lhs.shape[1:]) or any(p < e for p, e in zip(padded, extents)):
        return None  # an output without elements
    outputs = [(p - e) // s + 1 for p, e, s in zip(padded, extents, strides, strict=True)]
    if kind == 'dense':
        few = math.prod(outputs) <= FEW_OUTPUTS
        plain = kernel == (3, 3) and max(strides + dilation) == 1
        if plain and not few and _worth_winograd(lhs, rhs, outputs, pads):
            kind = 'winograd'
        elif few or _worth_product(lhs, rhs, outputs):
            kind = 'product'
        else:
            return None
    if not _faster(kind, dtype, math.prod(outputs)):
        return None
    return kind, strides, pads, dilation


def _faster(kind: str, dtype: jnp.dtype, outputs: int) -> bool:
    """Whether the default backend runs this form faster than lax's."""
    backend = jax.default_backend()
    if backend == 'gpu':
        return kind in GPU_FORMS and dtype == jnp.float32 and outputs <= GPU_OUTPUTS
    return backend == 'cpu'


def _worth_product(lhs: jax.Array, rhs: jax.Array, outputs: Sequence[int]) -> bool:
    channels, features = rhs.shape[-2:]
    rows = math.prod(outputs) * math.prod(rhs.shape[:-1]) * lhs.dtype.itemsize
    return (
        isinstance(lhs.shape[0], int)
        and (features >= PRODUCT_FEATURES or channels <= PRODUCT_CHANNELS)
        and lhs.shape[0] * rows <= MAX_BYTES
    )


def _worth_winograd(
    lhs: jax.Array, rhs: jax.Array, outputs: Sequence[int], pads: winograd.Pads
) -> bool:
    if not isinstance(lhs.shape[0], int) or jnp.finfo(lhs.dtype).bits < 32:
        return False
    tiles = winograd.num_tiles(lhs.shape, pads)
    return (
        min(rhs.shape[-2:]) >= WINOGRAD_CHANNELS
        and tiles >= WINOGRAD_TILES
        and lhs.shape[0] * math.prod(outputs) * rhs.size >= WINOGRAD_WORK
        and winograd.INPUTS**2 * tiles * sum(rhs.shape[-2:]) * lhs.dtype.itemsize <= MAX_BYTES
    )
