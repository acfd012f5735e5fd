"""Evaluates a program in double precision, whatever precision it was written in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd.graph import rules

# They look at the bits of numbers of one size.
_BITWISE = {'bitcast_convert_type', 'nextafter'}


def doubled(function: Callable[..., Any]) -> Callable[..., list[jax.Array]]:
    """`function` with every floating-point array in it float64; returns its leaves.

    Rounding to a smaller type, as half precision does, is left out. To be called where
    `jax.enable_x64` is on.
    """

    def run(*args: Any) -> list[jax.Array]:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
        with jax.enable_x64(False):  # the program as it was written
            program = jax.make_jaxpr(function)(*shapes)
        return _evaluate(program.jaxpr, program.consts, jax.tree.leaves(args))

    return run


def _evaluate(jaxpr: Any, consts: Sequence[Any], operands: Sequence[Any]) -> list[jax.Array]:
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, map(_widen, consts), strict=True))
    values.update(zip(jaxpr.invars, map(_widen, operands), strict=True))

    def read(atom: Any) -> Any:
        return _widen(atom.val) if isinstance(atom, jax.extend.core.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        results = _bind(eqn, [read(atom) for atom in eqn.invars])
        values.update(zip(eqn.outvars, map(_widen, results), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _bind(eqn: Any, operands: Sequence[Any]) -> Sequence[Any]:
    name = eqn.primitive.name
    inner = rules.called(eqn)
    if inner:  # what has several programs, or one of many rounds, runs as it is
        return _evaluate(*inner, operands)
    if name == 'reduce_precision':
        return operands
    params = dict(eqn.params)
    if name in _BITWISE or any(jax.extend.core.jaxprs_in_params(params)):
        operands = [
            jax.lax.convert_element_type(x, atom.aval.dtype) if _floating(x) else x
            for x, atom in zip(operands, eqn.invars, strict=True)
        ]
    else:
        for key in ('new_dtype', 'dtype', 'preferred_element_type'):
            if params.get(key) is not None and jnp.issubdtype(params[key], jnp.floating):
                params[key] = np.dtype(np.float64)
    results = eqn.primitive.bind(*operands, **params)
    return results if eqn.primitive.multiple_results else [results]


def _floating(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def _widen(x: Any) -> Any:
    return jax.lax.convert_element_type(x, np.float64) if _floating(x) else x
