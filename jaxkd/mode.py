"""How networks are told whether they train."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import inspect
from typing import Any

from flax import linen as nn

from jaxkd.graph import structure

# Arguments of a Linen module's call that say so, and what they are in training.
NAMES = {
    'train': True,
    'training': True,
    'is_training': True,
    'deterministic': False,
    'use_running_average': False,
}


def arguments(
    model: nn.Module, *, train: bool, method: str | Callable | None = None
) -> dict[str, bool]:
    """What tells the model, compact or not, whether it trains; {} where its call has none of NAMES.

    Or where a method of it has none, given itself or by name.

    >>> arguments(nn.Dropout(0.5), train=True)
    {'deterministic': False}
    """
    called = method or '__call__'
    if isinstance(called, str):
        called = getattr(structure.full_module(model), called, None)
    has = inspect.signature(called).parameters if callable(called) else {}
    return {name: value == train for name, value in NAMES.items() if name in has}


def evaluating(model: nn.Module, apply: Mapping[str, Any]) -> dict[str, Any]:
    """What a model is called with beside its inputs: `apply`, and what tells it not to train."""
    return {**arguments(model, train=False, method=apply.get('method')), **apply}


def initializing(apply: Mapping[str, Any]) -> dict[str, Any]:
    """What of `apply` `model.init` takes as well."""
    return {name: value for name, value in apply.items() if name not in ('mutable', 'rngs')}
