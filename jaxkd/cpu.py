"""Convolutions in a form that XLA:CPU runs fast.

XLA:CPU has fast code for matrix products and for elementwise loops, and slow code for depthwise
convolutions (10 to 40 times slower than the memory allows) and for the weight gradient of 1×1
convolutions (8 times); and for convolutions whose output is 2×2 pixels or fewer (60 times). So
depthwise convolutions are written here as sums of shifted products, one for each position of the
kernel, and 1×1 convolutions and those with few outputs as matrix products. Values and gradients
are those of `jax.lax.conv_general_dilated` to rounding.

    with jaxkd.cpu.fast_convolutions():
        logits = model.apply(variables, images)
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import ctypes
import functools
import itertools
import math
from typing import Any

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

# One shifted product for each kernel position: the program grows with their number, and with it
# the time to compile it. 7×7 kernels are still in; 9×9 and larger go to lax.
MAX_KERNEL_POSITIONS = 64
# Pixels of an output that are few. On two cores a 3×3 kernel with 512 channels and a batch of 32
# takes, by lax and as a matrix product, 269 and 4 ms for 2×2 pixels, 8.6 and 9.0 ms for 3×3.
FEW_OUTPUTS = 4


# Parameters of glibc's mallopt, from its malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def hold_memory() -> bool:
    """Keeps memory that was freed, for the next step, instead of giving it back to the system.

    XLA:CPU allocates the intermediate arrays of a step anew in each step. glibc gives arrays of
    that size back at once, so that every step has the system clear and map a gigabyte again: a
    third of the processor time of a MobileNetV2 step. A process that does so holds on to the most
    that it has ever needed. Call it before the first computation.

    Returns:
      Whether the process's allocator takes such orders; other than glibc's do not.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is None:
        return False
    # One arena, because those of threads are too small for large arrays; never mmap; never trim.
    orders = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1))
    return all(mallopt(*order) for order in orders)


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
    """`jax.lax.conv_general_dilated`, in another form where XLA:CPU runs that faster.

    Depthwise convolutions (one input channel per group, any channel multiplier, stride, padding and
    kernel dilation), 1×1 convolutions and those of one group with few pixels in the output, of
    floats in channels-last layout, have such a form. Everything else is handed to lax. Works under
    jit, vmap, checkpoint and reverse-mode differentiation, of higher order too (`jax.jvp` of
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
        return _pointwise(lhs, rhs, strides, pads, precision)
    if kind == 'few':
        return _few_outputs(lhs, rhs, strides, pads, dilation, precision)
    multiplier = rhs.shape[-1] // feature_group_count
    if multiplier > 1:
        lhs = jnp.repeat(lhs, multiplier, axis=-1)
    return _depthwise(lhs, rhs.squeeze(-2), strides, pads, dilation)


@contextlib.contextmanager
def fast_convolutions() -> Iterator[None]:
    """Makes every `flax.linen.Conv` called inside use this module's `conv_general_dilated`.

    Only where the default backend is the CPU; elsewhere nothing changes. Parameters, their names
    and initial values stay as they are, outputs too, to rounding. A layer which was given a
    `conv_general_dilated` or `conv_general_dilated_cls` of its own keeps it. Lifted modules
    (`nn.remat`, `nn.scan`, `nn.vmap`) and further interceptors, inside or around, work as before.

    What counts is where a function is traced: a `jax.jit`-compiled function that was first called
    outside this context, with arguments of the same shapes, keeps its slow convolutions, and one
    first called inside keeps its fast ones. Modules under `nn.jit` have such a cache of their own.
    """
    if jax.default_backend() != 'cpu':
        yield
        return
    with nn.intercept_methods(_use_fast_convolution):
        yield


def _use_fast_convolution(
    call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
) -> Any:
    module = context.module
    if (
        not isinstance(module, nn.Conv)
        or context.method_name != '__call__'
        or module.conv_general_dilated is not None
        or module.conv_general_dilated_cls is not None
    ):
        return call(*args, **kwargs)
    # For the length of the call the field is set on the module itself, not on a clone: parameter
    # names, scope and collections cannot change, no interceptor sees a second call, and one that
    # clones the module to change other fields hands this one on.
    object.__setattr__(module, 'conv_general_dilated', conv_general_dilated)
    try:
        return call(*args, **kwargs)
    finally:
        object.__setattr__(module, 'conv_general_dilated', None)


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
    """('depthwise', 'pointwise' or 'few', strides, pads, dilation), or None: lax has to do it.

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
        kind = 'pointwise' if math.prod(kernel) == 1 else 'few'
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
    if kind == 'few' and math.prod(outputs) > FEW_OUTPUTS:
        return None
    return kind, strides, pads, dilation


def _pointwise(
    lhs: jax.Array,
    rhs: jax.Array,
    strides: tuple[int, ...],
    pads: tuple[tuple[int, int], ...],
    precision: Any,
) -> jax.Array:
    """1×1 convolution, [batch, *spatial, channels] by [1, .., 1, channels, features]."""
    if any(map(any, pads)):
        lhs = _pad(lhs, pads)
    if any(s > 1 for s in strides):
        lhs = lhs[(slice(None), *(slice(None, None, s) for s in strides))]
    flat = lhs.reshape(-1, lhs.shape[-1])
    return _matmul(flat, rhs.reshape(rhs.shape[-2:]), precision).reshape(*lhs.shape[:-1], -1)


def _few_outputs(
    lhs: jax.Array,
    rhs: jax.Array,
    strides: tuple[int, ...],
    pads: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
    precision: Any,
) -> jax.Array:
    """[batch, *spatial, channels] by [*kernel, channels, features]: what each output sees, in a
    row, times the kernel as a matrix."""
    features = rhs.shape[-1]
    kernel = rhs.reshape(*rhs.shape[:-2], -1)
    sizes, pads = _output_sizes_and_tight_pads(lhs, kernel, strides, pads, dilation)
    x = _pad(lhs, pads)
    seen = [
        _window(x, [i * d for i, d in zip(k, dilation)], sizes, strides)
        for k in _positions(kernel.shape)
    ]
    rows = jnp.concatenate(seen, -1)
    product = _matmul(rows.reshape(-1, rows.shape[-1]), rhs.reshape(-1, features), precision)
    return product.reshape(*rows.shape[:-1], features)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _depthwise(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, ...],
    pads: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
) -> jax.Array:
    """[batch, *spatial, channels] by [*kernel, channels], channel by channel."""
    return _shift_and_sum(x, kernel, strides, pads, dilation)


def _shift_and_sum(x, kernel, strides, pads, dilation):
    sizes, pads = _output_sizes_and_tight_pads(x, kernel, strides, pads, dilation)
    x = lax.optimization_barrier(_pad(x, pads))
    shifts = [
        (_at(kernel, k), [i * d for i, d in zip(k, dilation)]) for k in _positions(kernel.shape)
    ]
    return _shifted_sum(x, shifts, sizes, strides).astype(kernel.dtype)


def _depthwise_forward(x, kernel, strides, pads, dilation):
    # Not by _depthwise: that would leave the gradient without a forward-mode derivative.
    return _shift_and_sum(x, kernel, strides, pads, dilation), (x, kernel)


def _depthwise_backward(strides, pads, dilation, residuals, cotangent):
    x, kernel = residuals
    cotangent = lax.optimization_barrier(cotangent)
    return (
        _input_gradient(cotangent, kernel, x.shape[1:-1], strides, pads, dilation),
        _kernel_gradient(x, cotangent, kernel, strides, pads, dilation),
    )


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


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
        for position in _positions(kernel.shape):
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
    padded = lax.optimization_barrier(_pad(cotangent, tuple(zip(lows, highs))))
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
    if len(results) == 1:
        return results[0]
    # [batch, A, B, .., s·t.., channels] -> [batch, A, s, B, t, .., channels] -> interleaved
    stacked = jnp.stack(results, axis=-2)
    stacked = stacked.reshape(*stacked.shape[: rank + 1], *strides, stacked.shape[-1])
    order = [0, *itertools.chain(*((1 + i, 1 + rank + i) for i in range(rank))), 2 * rank + 1]
    merged = [p * s for p, s in zip(phase_sizes, strides)]
    interleaved = stacked.transpose(order).reshape(stacked.shape[0], *merged, stacked.shape[-1])
    return interleaved[(slice(None), *(slice(n) for n in input_sizes))]


def _kernel_gradient(x, cotangent, kernel, strides, pads, dilation):
    """Sums of products over batch and space, one for each kernel position, in two stages.

    A single reduction of all kernel positions over each image reads x and the cotangent once; a
    separate reduction for each position reads them as often, and does so with large steps.
    """
    sizes, pads = _output_sizes_and_tight_pads(x, kernel, strides, pads, dilation)
    x = lax.optimization_barrier(_pad(x, pads))
    accumulate = jnp.promote_types(kernel.dtype, jnp.float32)
    cotangent = cotangent.astype(accumulate)
    products = [
        _window(x, [i * d for i, d in zip(k, dilation)], sizes, strides).astype(accumulate)
        * cotangent
        for k in _positions(kernel.shape)
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
        _window(x, offset, sizes, strides).astype(accumulate) * weight.astype(accumulate)
        for weight, offset in shifts
    ]
    return functools.reduce(jnp.add, terms)


def _window(x, offset, sizes, strides):
    limits = [o + (n - 1) * s + 1 for o, n, s in zip(offset, sizes, strides)]
    return lax.slice(x, (0, *offset, 0), (x.shape[0], *limits, x.shape[-1]), (1, *strides, 1))


def _pad(x, pads):
    """Zeros around the spatial axes; negative pads crop."""
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((*p, 0) for p in pads), (0, 0, 0)])


def _at(kernel, position):
    return lax.index_in_dim(kernel.reshape(-1, kernel.shape[-1]), _flat(kernel, position), 0, False)


def _flat(kernel, position):
    index = 0
    for i, n in zip(position, kernel.shape):
        index = index * n + i
    return index


def _positions(kernel_shape):
    return itertools.product(*map(range, kernel_shape[:-1]))


def _output_sizes_and_tight_pads(x, kernel, strides, pads, dilation):
    """Sizes of the output, and the pads without what no window reaches."""
    sizes, tight = [], []
    for n, k, s, (low, high), d in zip(
        x.shape[1:-1], kernel.shape[:-1], strides, pads, dilation, strict=True
    ):
        extent = d * (k - 1) + 1
        size = (n + low + high - extent) // s + 1
        sizes.append(size)
        tight.append((low, (size - 1) * s + extent - n - low))
    return sizes, tuple(tight)
