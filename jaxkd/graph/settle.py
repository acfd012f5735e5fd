"""Freezes what a model's own code cannot do at other widths, before anything is cut.

A program shows which channels hang together, but not that the code that made it takes a size from
elsewhere: a reshape to a width from the config, a division by the root of a width, a pad up to a
fixed number of channels. So the model is traced once more with some of every group removed, and
what does not come out the same is traced back to the groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import itertools
from typing import Any

import jax
import numpy as np

from jaxkd.graph import cut, rules, structure
from jaxkd.graph.names import Frozen
from jaxkd.graph.trace import Graph, Keep, applied

# Of each group, a share between these two is removed: sizes should not come to match by chance.
SHARES = (0.25, 0.6)


def settle(graph: Graph) -> Graph:
    """The graph, with the groups frozen that the model's code cannot cut."""
    random = np.random.default_rng(0)
    while True:
        keep = {g.name: _some(random, g.size) for g in graph.groups if not g.frozen and g.size > 1}
        if not keep or _problem(graph, keep) is None:
            return graph

        def differs(names: Sequence[str], graph: Graph = graph, keep: Keep = keep) -> bool:
            return _problem(graph, {name: keep[name] for name in names}) is not None

        reasons = {}
        for name in cut.at_fault(list(keep), differs):
            why = _problem(graph, {name: keep[name]})
            reasons[name] = why or Frozen('the model fails without some of it and others', '', '')
        graph = dataclasses.replace(
            graph,
            groups=tuple(
                dataclasses.replace(
                    g, frozen=reasons[g.name].reason, source=reasons[g.name].source, inexact=None
                )
                if g.name in reasons
                else g
                for g in graph.groups
            ),
        )


def _some(random: np.random.Generator, size: int) -> np.ndarray:
    keep = np.ones(size, bool)
    number = min(max(round(random.uniform(*SHARES) * size), 1), size - 1)
    keep[random.permutation(size)[:number]] = False
    return keep


def _problem(graph: Graph, keep: Keep) -> Frozen | None:
    """Why the model's code cannot run, or runs differently, with this keep."""
    try:
        program = _program(graph, keep)
    except Exception as error:  # whatever the model's code may raise
        layer, line = cut.where(error)
        reason = f'layer {layer} fixes a size in its own code instead of taking it from its input'
        return Frozen(reason, '', line)
    exact = {name: alive for name, alive in keep.items() if not graph.by_name[name].inexact}
    if len(exact) < len(keep):
        program = _program(graph, exact)
    suspect = next(_differences(graph.program.jaxpr, program.jaxpr), None)
    # Another program may compute the same, as a layer does that makes up for its own width.
    if suspect and not cut.agrees(graph, exact):
        return suspect
    return None


def _program(graph: Graph, keep: Keep) -> Any:
    """The program of the compact network."""
    shapes = cut.cut(graph, graph.variables, keep)
    found = structure.record(graph, keep, shapes)
    small = applied(structure.module(graph.model, found), graph.apply_kwargs)
    return jax.make_jaxpr(small)(shapes, graph.inputs)


def _differences(full: Any, small: Any) -> Iterator[Frozen]:
    """Where two programs differ by more than the shapes of their arrays."""
    left, right = rules.live(full), rules.live(small)
    for a, b in itertools.zip_longest(left, right):
        if a is None or b is None or a.primitive is not b.primitive:
            line = rules.source(a or b) or 'an unknown line'
            yield Frozen('the model decides by its width what it computes', '', line)
            return
        for x, y in zip(a.invars, b.invars, strict=True):
            values = [v.val for v in (x, y) if isinstance(v, jax.extend.core.Literal)]
            if len(values) == 2 and not np.array_equal(*values, equal_nan=False):
                line = rules.source(a) or 'an unknown line'
                yield Frozen('the model computes with its width', a.primitive.name, line)
        inner = [jax.extend.core.jaxprs_in_params(eqn.params) for eqn in (a, b)]
        for pair in zip(*inner, strict=False):
            yield from _differences(*pair)
