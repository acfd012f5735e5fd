"""Pruning by a criterion in rounds: score, cut, train on (Han et al. 2015,
https://arxiv.org/abs/1506.02626; one round is one-shot pruning)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from jaxkd import errors
from jaxkd.graph import cut
from jaxkd.graph import trace as tracing
from jaxkd.graph.trace import Graph, Keep
from jaxkd.search import blocks as blocking
from jaxkd.search import control, criteria, matches
from jaxkd.search import select as selecting


def due(step: int, steps: int, rounds: int) -> float | None:
    """How far down the schedule to cut before step `step`: in (0, 1], or None at most steps."""
    starts = [number * steps // rounds for number in range(rounds)]
    # Of rounds that begin with the same step, the last.
    return sum(start <= step for start in starts) / rounds if step in starts else None


def cut_down(
    graph: Graph,
    variables: Any,
    keep: Keep,
    criterion: str,
    evidence: criteria.Evidence,
    budgets: Sequence[blocking.Budget],
    progress: float,
    *,
    blocks: blocking.Blocks = (),
    round_to: int = 1,
    min_keep: float | None = None,
) -> dict[str, np.ndarray]:
    """What to keep of what is left.

    Args:
      graph: of the full network.
      variables: of the network that is cut to `keep`.
      keep: bool [units] by group name.
      criterion, evidence: see `criteria`; the loss takes the variables given here.
      budgets: see `blocks.budgets`.
      progress: in (0, 1]; see `control.schedule`. At 1 all budgets hold. Those of blocks hold from
        the first round.
      blocks, round_to: see `select`.
      min_keep: see `select.floor`.

    Raises:
      GraphError: if the network hangs together differently after it was cut.
    """
    keep = graph.complete(keep)
    left = graph
    if not all(units.all() for units in keep.values()):
        module, _ = cut.narrowed(graph, keep)
        left = tracing.trace(
            module, variables, *graph.inputs, inexact=graph.inexact, **graph.apply_kwargs
        )
    scores = {}
    for name, score in criteria.CRITERIA[criterion](left, variables, evidence).items():
        if name not in keep or keep[name].sum() != len(score):
            raise errors.GraphError(
                f'group {name} of the compact {type(graph.model).__name__} is not what is left of '
                'one of the full network; prune it in a single round'
            )
        scores[name] = np.zeros(len(keep[name]))
        scores[name][keep[name]] = score
    goals = {b.resource: b.most / b.full for b in budgets if not b.block}
    within = {'scores': scores, 'blocks': blocks, 'round_to': round_to, 'among': keep}
    least = selecting.floor(graph, min_keep, **within, **goals)
    shares = {resource: control.schedule(progress, goal) for resource, goal in goals.items()}

    def choose(avoided: Mapping[str, Collection[int]]) -> dict[str, np.ndarray]:
        return selecting.select(graph, **within, **shares, min_keep=least, avoided=avoided)

    return matches.apart(graph, choose, scores)
