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
    Lifted modules (`nn.remat`, `nn.scan`, `nn.vmap`) and interceptors around work as before, those
    inside as well, but that they do not see such a BatchNorm. The fast layers have no forward-mode
    derivative (`jax.jvp`).

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
    if (
        type(context.module) is nn.BatchNorm
        and jax.default_backend() == 'cpu'
        and (inputs := _of_a_batch(context.module, *args, **kwargs)) is not None
    ):
        return _normalize(context.module, inputs)
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


def _of_a_batch(
    module: nn.BatchNorm,
    x: jax.Array,
    use_running_average: bool | None = None,
    *,
    mask: jax.Array | None = None,
) -> jax.Array | None:
    """The inputs of a call that `batch_norm` can stand in for, or None."""
    running = nn.merge_param('use_running_average', module.use_running_average, use_running_average)
    if (
        running
        or module.is_initializing()
        or mask is not None
        or module.axis_name is not None
        or not module.use_fast_variance
        or module.axis not in (-1, x.ndim - 1)
        or x.ndim < 3
        or x.size == 0
        or not all(module.has_variable('batch_stats', name) for name in ('mean', 'var'))
    ):
        return None
    stored = module.variables.get('params', {}).values()
    dtypes = {jnp.dtype(module.dtype or x.dtype), *(a.dtype for a in (x, *stored))}
    fast = dtypes == {jnp.dtype(jnp.float32)} or dtypes == {jnp.dtype(jnp.float64)}
    return x if fast else None


def _normalize(module: nn.BatchNorm, x: jax.Array) -> jax.Array:
    channels = x.shape[-1:]
    scale, bias = (
        module.param(name, init, channels, module.param_dtype) if used else fill(channels, x.dtype)
        for name, init, used, fill in (
            ('scale', module.scale_init, module.use_scale, jnp.ones),
            ('bias', module.bias_init, module.use_bias, jnp.zeros),
        )
    )
    y, *statistics = batch_norm(x, scale, bias, module.epsilon)
    for name, new in zip(('mean', 'var'), statistics):
        old = module.variable('batch_stats', name)
        old.value = module.momentum * old.value + (1 - module.momentum) * new
    return y
