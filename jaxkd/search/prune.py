"""Pruning in one call, without training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
import functools
from typing import Any

from flax import linen as nn

from jaxkd import errors
from jaxkd.graph import cut, settle
from jaxkd.graph import trace as tracing
from jaxkd.graph.structure import CompactModel
from jaxkd.graph.trace import Graph, Keep
from jaxkd.search import blocks as blocking
from jaxkd.search import criteria, matches
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
    round_to: int = 1,
    min_keep: float | None = None,
    loss: Callable[[Any, Any], Any] | None = None,
    batches: Iterable[Any] = (),
    seed: int = 0,
    **apply_kwargs: Any,
) -> CompactModel:
    """Traces a trained network, scores its channels, selects the best and cuts away the rest.

    Args:
      model: any Linen module.
      variables: its trained variables.
      *inputs: arguments of the module, arrays or `jax.ShapeDtypeStruct`s; leading axis = batch.
      flops, params, activations, latency: budgets; see `jaxkd.select`. For a budget in latency, the
        network is measured on the present device, at batch size 1; see `jaxkd.with_latency`.
      criterion: how much a channel matters, a name from `jaxkd.search.criteria.CRITERIA`, where
        each says what it computes. 'random', 'uniform', 'l1', 'l2', 'bn_scale', 'fpgm' and 'lamp'
        look at the variables alone; 'taylor', 'group_taylor', 'fisher', 'activation' and
        'sensitivity' need `loss` and `batches`.
      blocks, round_to: see `jaxkd.select`.
      min_keep: of every group to which no block gives another, a float is a share; by default an
        eighth of what a network as narrow everywhere would keep; see `jaxkd.search.select.floor`.
      loss: `loss(variables, batch)`, the mean loss of a batch as a scalar that JAX can
        differentiate, with the model in its evaluation mode.
      batches: some batches of data, whatever `loss` takes.
      seed: for the criterion 'random'.
      **apply_kwargs: further arguments of `model.apply`; see `jaxkd.trace`.

    Returns:
      The compact network, verified. Its accuracy comes back by training it on, best with
      `jaxkd.distill` and the original as the teacher.

    Raises:
      ConfigError: for an unknown criterion or one that lacks its data, or without any budget,
        not even of a block.
      BudgetError: if the budget cannot be reached.
      GraphError: if the model cannot be traced or cut.
    """
    if criterion not in criteria.CRITERIA:
        raise errors.ConfigError('criterion', criterion, allowed=criteria.CRITERIA)
    asked = {'flops': flops, 'params': params, 'activations': activations, 'latency': latency}
    evidence = criteria.Evidence(loss, tuple(batches), seed)

    def chosen(graph: Graph) -> Keep:
        scores = criteria.CRITERIA[criterion](graph, variables, evidence)
        within = {**asked, 'blocks': blocks, 'round_to': round_to}
        least = selecting.floor(graph, min_keep, scores=scores, **within)
        select = functools.partial(selecting.select, graph, scores, min_keep=least, **within)
        return matches.apart(graph, lambda avoided: select(avoided=avoided), scores)

    graph = tracing.trace(model, variables, *inputs, **apply_kwargs)
    of_blocks = any(settings.get('budget') for _, settings in blocking.pairs(graph, blocks))
    if not of_blocks and all(budget is None for budget in asked.values()):
        why = 'give flops=, params=, activations= or latency=, or a block a budget'
        raise errors.ConfigError('budget', None, why=why)
    graph = blocking.measured(graph, latency, blocks)
    try:
        return cut.compact(graph, variables, chosen(graph))
    except errors.GraphError:
        settled = settle.settle(graph)
        if settled is graph:
            raise
    tracing.warn_if_frozen(settled)
    return cut.compact(settled, variables, chosen(settled))
