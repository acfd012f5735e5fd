"""Pruning in one call, without training."""

from __future__ import annotations

from typing import Any

from flax import linen as nn

from jaxkd import errors
from jaxkd.graph import cut
from jaxkd.graph import trace as tracing
from jaxkd.graph.structure import CompactModel
from jaxkd.search import blocks as blocking
from jaxkd.search import criteria
from jaxkd.search import select as selecting


def prune(
    model: nn.Module,
    variables: Any,
    *inputs: Any,
    flops: float | None = None,
    params: float | None = None,
    activations: float | None = None,
    latency: float | None = None,
    criterion: str = 'l1',
    blocks: blocking.Blocks = (),
    **apply_kwargs: Any,
) -> CompactModel:
    """Traces a trained network, scores its channels, selects the best and cuts away the rest.

    Args:
      model: any Linen module.
      variables: its trained variables.
      *inputs: arguments of the module, arrays or `jax.ShapeDtypeStruct`s; leading axis = batch.
      flops, params, activations, latency: budgets; see `jaxkd.select`. For a budget in latency, the
        network is measured on the present device, at batch size 1; see `jaxkd.with_latency`.
      criterion: a name from `jaxkd.search.criteria.CRITERIA`.
      blocks: see `jaxkd.search.blocks.resolve`.
      **apply_kwargs: further arguments of `model.apply`.

    Returns:
      The compact network, verified. Its accuracy comes back by training it on, best with
      `jaxkd.distill` and the original as the teacher.

    Raises:
      ConfigError: for an unknown criterion, or without any budget.
      BudgetError: if the budget cannot be reached.
      GraphError: if the model cannot be traced or cut.
    """
    if criterion not in criteria.CRITERIA:
        raise errors.ConfigError('criterion', criterion, allowed=criteria.CRITERIA)
    asked = {'flops': flops, 'params': params, 'activations': activations, 'latency': latency}
    if all(budget is None for budget in asked.values()):
        raise errors.ConfigError(
            'budget', None, why='give flops=, params=, activations= or latency='
        )
    graph = tracing.trace(model, variables, *inputs, **apply_kwargs)
    graph = blocking.measured(graph, latency)
    scores = criteria.CRITERIA[criterion](graph, variables)
    keep = selecting.select(graph, scores, **asked, blocks=blocks)
    return cut.compact(graph, variables, keep)
