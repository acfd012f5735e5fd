"""How much a channel matters, without training for it. Each criterion: graph, variables → scores.

A score is float [size] by group name, for every group that may be cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxkd import errors
from jaxkd.graph.trace import Graph
from jaxkd.search import gates as gating

Scores = dict[str, np.ndarray]


def l1(graph: Graph, variables: Any) -> Scores:
    """Σ|w| of the filters that make a channel, relative to the group's mean.

    Li et al. 2017, Pruning Filters for Efficient ConvNets, https://arxiv.org/abs/1608.08710;
    relative, because filters of different layers have different sizes.
    """
    return _filter_norm(graph, variables, 1)


def l2(graph: Graph, variables: Any) -> Scores:
    """The Euclidean norm of the filters that make a channel, relative to the group's mean.

    He et al. 2018, Soft Filter Pruning, https://arxiv.org/abs/1808.06866.
    """
    return _filter_norm(graph, variables, 2)


def bn_scale(graph: Graph, variables: Any) -> Scores:
    """|γ| of the BatchNorms of a channel: the mean over those of a group.

    Liu et al. 2017, Network Slimming, https://arxiv.org/abs/1708.06519. Groups without a BatchNorm
    have no score, so they are kept.

    Raises:
      GraphError: for a network without BatchNorm.
    """
    gates = gating.find(graph)
    if not gates:
        raise errors.GraphError(
            'the criterion bn_scale needs BatchNorm scales, and no channel group has one; '
            "criterion='l1' needs none"
        )
    return {
        name: np.asarray(gating.scales(group, variables['params'])).mean(0)
        for name, group in gates.items()
    }


CRITERIA: dict[str, Callable[[Graph, Any], Scores]] = {'l1': l1, 'l2': l2, 'bn_scale': bn_scale}


def _filter_norm(graph: Graph, variables: Any, order: int) -> Scores:
    scores = {}
    for group in graph.groups:
        if group.frozen:
            continue
        total = np.zeros(group.size)
        for member, positions in zip(group.members, group.positions, strict=True):
            leaf = variables
            for key in member.path.split('/'):
                leaf = leaf[key]
            weights = np.asarray(leaf, np.float64)
            # The filters that make the channels: kernels, by their last axis.
            if weights.ndim > 1 and member.axis == weights.ndim - 1:
                power = (np.abs(weights) ** order).reshape(-1, weights.shape[-1]).sum(0)
                total += power[positions].sum(1)
        score = total ** (1 / order)
        scores[group.name] = score / max(score.mean(), 1e-30)
    return scores
