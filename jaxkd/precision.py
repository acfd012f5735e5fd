"""Networks that compute in bfloat16, with parameters in float32, without a word in their code.

    with precision.computing('bfloat16'):
        logits = model.apply(variables, inputs.astype('bfloat16'))

Layers get the dtype of the computation by their field `dtype`, which Flax's own have and other
people's by custom. It casts what a layer reads, its parameters and its inputs, and says what it
returns; gradients come back in the parameters' float32. What norms measure stays in float32, and so
does the softmax of attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
from typing import Any

from flax import linen as nn
import jax.numpy as jnp

DTYPES = ('float32', 'bfloat16')


@contextlib.contextmanager
def computing(dtype: str) -> Iterator[None]:
    """Makes Linen modules that are called inside compute in `dtype`, where they leave it open.

    A module leaves it open if its field `dtype` is None; or if it has its class's default, float32,
    and the module around it has no such field, which could have said otherwise (many networks have
    one that they hand on to their layers). A dtype that somebody has chosen stays. With 'float32'
    nothing changes.

    As with `jaxkd.cpu.fast_layers`, what counts is where a function is traced.

    Args:
      dtype: one of `DTYPES`.
    """
    if dtype == 'float32':
        yield
        return
    with nn.intercept_methods(functools.partial(_compute, jnp.dtype(dtype))):
        yield


def _compute(
    dtype: jnp.dtype,
    call: Callable,
    args: tuple,
    kwargs: dict,
    context: nn.module.InterceptorContext,
) -> Any:
    module = context.module
    if not _is_open(module):
        return call(*args, **kwargs)
    fields = {'dtype': dtype}
    if hasattr(module, 'force_fp32_for_softmax'):
        fields['force_fp32_for_softmax'] = True
    before = {name: getattr(module, name) for name in fields}
    # On the module itself, for the length of the call, as `jaxkd.cpu` does it.
    try:
        for name, value in fields.items():
            object.__setattr__(module, name, value)
        return call(*args, **kwargs)
    finally:
        for name, value in before.items():
            object.__setattr__(module, name, value)


def _is_open(module: nn.Module) -> bool:
    field = _dtype_field(module)
    if field is None:
        return False
    if module.dtype is None:
        return True
    handed_on = isinstance(module.parent, nn.Module) and _dtype_field(module.parent) is not None
    return not handed_on and module.dtype is field.default and field.default == jnp.float32


def _dtype_field(module: nn.Module) -> dataclasses.Field | None:
    return next((f for f in dataclasses.fields(module) if f.name == 'dtype'), None)
