"""Linen's layers in the form that XLA runs fast, without a change to a model's code."""

from collections.abc import Callable, Iterator
import contextlib
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from jaxkd.cpu.convolution import conv_general_dilated
from jaxkd.cpu.normalization import batch_norm


@contextlib.contextmanager
def fast_layers() -> Iterator[None]:
    """Makes what is called inside use jaxkd.cpu's convolutions and batch normalization.

    Every `flax.linen.Conv`, where the default backend is a CPU or a GPU, and every
    `flax.linen.BatchNorm` that computes statistics of a batch in float32 or float64, on a CPU.
    Parameters, their names and initial values stay as they are, outputs too, to rounding. A layer
    which was given a `conv_general_dilated` or `conv_general_dilated_cls` of its own keeps it.
    Lifted modules (`nn.remat`, `nn.scan`, `nn.vmap`) and further interceptors, inside or around,
    work as before.

    What counts is where a function is traced: a `jax.jit`-compiled function that was first called
    outside this context, with arguments of the same shapes, keeps its slow layers, and one first
    called inside keeps its fast ones. Modules under `nn.jit` have such a cache of their own.
    """
    if jax.default_backend() not in ('cpu', 'gpu'):
        yield
        return
    with nn.intercept_methods(_use_fast_layer):
        yield


def _use_fast_layer(
    call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
) -> Any:
    if context.method_name != '__call__':
        return call(*args, **kwargs)
    if isinstance(context.module, nn.Conv):
        return _convolve(context.module, call, args, kwargs)
    if type(context.module) is nn.BatchNorm and jax.default_backend() == 'cpu':
        return _normalize(context.module, call, *args, **kwargs)
    return call(*args, **kwargs)


def _convolve(module: nn.Conv, call: Callable, args: tuple, kwargs: dict) -> Any:
    if module.conv_general_dilated is not None or module.conv_general_dilated_cls is not None:
        return call(*args, **kwargs)
    # For the length of the call the field is set on the module itself, not on a clone: parameter
    # names, scope and collections cannot change, no interceptor sees a second call, and one that
    # clones the module to change other fields hands this one on.
    object.__setattr__(module, 'conv_general_dilated', conv_general_dilated)
    try:
        return call(*args, **kwargs)
    finally:
        object.__setattr__(module, 'conv_general_dilated', None)


def _normalize(
    module: nn.BatchNorm,
    call: Callable,
    x: jax.Array,
    use_running_average: bool | None = None,
    *,
    mask: jax.Array | None = None,
) -> jax.Array:
    running = nn.merge_param('use_running_average', module.use_running_average, use_running_average)
    dtypes = {x.dtype, jnp.dtype(module.dtype or x.dtype), jnp.dtype(module.param_dtype)}
    if (
        running
        or module.is_initializing()
        or mask is not None
        or module.axis_name is not None
        or not module.use_fast_variance
        or module.axis not in (-1, x.ndim - 1)
        or x.ndim < 3
        or x.size == 0
        or not dtypes <= {jnp.dtype(jnp.float32)}
        and not dtypes <= {jnp.dtype(jnp.float64)}
    ):
        return call(x, use_running_average, mask=mask)
    channels = x.shape[-1:]
    scale = (
        module.param('scale', module.scale_init, channels, module.param_dtype)
        if module.use_scale
        else jnp.ones(channels, x.dtype)
    )
    bias = (
        module.param('bias', module.bias_init, channels, module.param_dtype)
        if module.use_bias
        else jnp.zeros(channels, x.dtype)
    )
    y, *statistics = batch_norm(x, scale, bias, module.epsilon)
    for name, new in zip(('mean', 'var'), statistics):
        old = module.variable('batch_stats', name)
        old.value = module.momentum * old.value + (1 - module.momentum) * new
    return y
