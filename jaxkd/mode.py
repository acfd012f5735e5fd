"""How networks are told whether they train."""

from __future__ import annotations

import inspect

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


def arguments(model: nn.Module, *, train: bool) -> dict[str, bool]:
    """What tells the model, compact or not, whether it trains; {} where its call has none of NAMES.

    >>> arguments(nn.Dropout(0.5), train=True)
    {'deterministic': False}
    """
    has = inspect.signature(structure.full_module(model).__call__).parameters
    return {name: value == train for name, value in NAMES.items() if name in has}
