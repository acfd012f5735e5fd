"""The penalty price × |gate| as a proximal step after the optimizer's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxkd.search import gates as gating


def proximal(
    gates: gating.Gates, learning_rate: optax.ScalarOrSchedule, coupling: str = 'max'
) -> optax.GradientTransformationExtraArgs:
    """Shrinks gates after the step that the transformations before it have made.

    Chain it last: `optax.chain(optax.sgd(lr, 0.9), proximal(gates, lr))`. The penalty
    Σ strength · |gate| never enters the gradient, so that momentum or Adam don't blur it and gates
    reach exact zero (Parikh and Boyd 2014, Proximal Algorithms, section 4.2).

    `update` takes a further argument `strength`: float [units] by group name, which is λ times
    the price of a unit over the cost of the full network; `inf` closes a unit.

    Args:
      gates: what `gates.find` returned.
      learning_rate: the optimizer's learning rate or schedule: the step's length.
      coupling: see `gates.shrink`.
    """

    def init(params: Any) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32))

    def update(
        updates: Any,
        state: optax.ScaleByScheduleState,
        params: Any = None,
        *,
        strength: Mapping[str, jax.Array],
        **extra: Any,
    ) -> tuple[Any, optax.ScaleByScheduleState]:
        del extra
        if params is None:
            raise ValueError(optax.NO_PARAMS_MSG)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        # A rate of zero must not turn an infinite strength into NaN.
        thresholds = {
            name: jnp.where(jnp.isinf(s), jnp.inf, rate * jnp.where(jnp.isinf(s), 0.0, s))
            for name, s in strength.items()
        }
        stepped = optax.apply_updates(params, updates)
        shrunk = gating.shrink(gates, stepped, thresholds, coupling)
        updates = jax.tree.map(
            lambda update, before, after, old: update if after is before else after - old,
            updates,
            stepped,
            shrunk,
            params,
        )
        return updates, optax.ScaleByScheduleState(count=state.count + 1)

    return optax.GradientTransformationExtraArgs(init, update)
