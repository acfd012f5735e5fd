"""Freezes what a model's own code cannot do at other widths, before anything is cut.

A program shows which channels hang together, but not that the code that made it takes a size from
elsewhere: a reshape to a width from the config, a division by the root of a width, a pad up to a
fixed number of channels. So the model is traced once more with some of every group removed, and
what does not come out the same is traced back to the groups. Some can be helped: fields of the
model's own modules that say a width can follow it (see `jaxkd.graph.follow`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import itertools
from typing import Any

import jax
import numpy as np

from jaxkd import errors
from jaxkd.graph import cut, follow, rules, structure
from jaxkd.graph.names import Frozen
from jaxkd.graph.trace import ChannelGroup, Graph, Keep, applied

# Of each group, a share between these two is removed: sizes should not come to match by chance.
SHARES = (0.25, 0.6)
DECIDES = 'the model decides by its width what it computes'
COMPUTES = 'the model computes with its width'
# Of the fields that may have to follow a group's width, so many choices are tried.
FIELDS = 16
TOGETHER = Frozen('the model fails without some of it and of others', 'several', 'several lines')


def works(graph: Graph, keep: Keep) -> bool:
    """Whether the model's code computes with this keep what it does at full width."""
    return _problem(graph, graph.complete(keep)) is None


def at_random(graph: Graph, seed: int = 0) -> Keep:
    """A keep that says something of others: where no two widths match but by a rare chance."""
    return graph.complete(_some(graph, np.random.default_rng(seed)))


def compact(graph: Graph, variables: Any, keep: Keep) -> structure.CompactModel:
    """The physically smaller network, verified.

    Raises:
      GraphError: where the model's code cannot run at these widths, or where the compact network
        does not compute what the masked one does; the message names the layer and the line, or the
        groups.
    """
    keep = graph.complete(keep)
    try:
        return cut.compact(graph, variables, keep)
    except errors.GraphError:
        settled = settle(graph)
        frozen = any(settled.by_name[n].frozen for n, units in keep.items() if not units.all())
        if frozen or settled.follows == graph.follows:
            raise
    return cut.compact(settled, variables, keep)


def settle(graph: Graph) -> Graph:
    """The graph, with what the model's code cannot cut frozen, and fields that follow a width."""
    random = np.random.default_rng(0)
    while True:
        keep = _some(graph, random)
        if not keep or _problem(graph, keep) is None:
            return graph

        # Whether the programs differ is told without running them, so that comes first.
        suspects = _blame(graph, keep, _suspicion)
        reasons = {n: why for n in suspects if (why := _problem(graph, {n: keep[n]}))}
        reasons = reasons or _blame(graph, keep, _problem)
        graph, found = _followed(graph, {name: keep[name] for name in reasons})
        reasons = {name: why for name, why in reasons.items() if name not in found}
        graph = dataclasses.replace(
            graph,
            groups=tuple(
                _frozen(group, reasons[group.name]) if group.name in reasons else group
                for group in graph.groups
            ),
        )


def _followed(graph: Graph, keep: Keep) -> tuple[Graph, list[str]]:
    """The graph with the fields that have to follow the widths of these groups, and which can."""
    found = []
    candidates = [f for f in follow.candidates(graph) if f not in graph.follows]
    for name in keep:
        new = [f for f in candidates if f.group == name]
        fields = sorted({f.field for f in new})
        # A field that is as wide may say something else, a number of heads for instance.
        chosen = itertools.chain.from_iterable(
            itertools.combinations(fields, number) for number in range(len(fields), 0, -1)
        )
        for names in itertools.islice(chosen, FIELDS):
            follows = (*graph.follows, *(f for f in new if f.field in names))
            trial = dataclasses.replace(graph, follows=follows)
            if _problem(trial, {name: keep[name]}) is None:
                graph = trial
                found.append(name)
                break
    return graph, found


def _blame(
    graph: Graph, keep: Keep, test: Callable[[Graph, Keep], Frozen | None]
) -> dict[str, Frozen]:
    """Which groups have the problem that `test` finds by themselves, and what it is."""

    def problem(names: Sequence[str]) -> Frozen | None:
        return test(graph, {name: keep[name] for name in names})

    if problem(list(keep)) is None:
        return {}
    found = cut.at_fault(list(keep), lambda names: problem(names) is not None)
    return {name: problem([name]) or TOGETHER for name in found}


def _frozen(group: ChannelGroup, why: Frozen) -> ChannelGroup:
    return dataclasses.replace(
        group, frozen=why.reason, primitive=why.primitive, source=why.source, inexact=None
    )


def _some(graph: Graph, random: np.random.Generator) -> Keep:
    """A keep with some of every group that can be cut."""
    keep = {}
    for group in graph.groups:
        if not group.frozen and group.size > 1:
            number = min(max(round(random.uniform(*SHARES) * group.size), 1), group.size - 1)
            keep[group.name] = np.ones(group.size, bool)
            keep[group.name][random.permutation(group.size)[:number]] = False
    return keep


def _problem(graph: Graph, keep: Keep) -> Frozen | None:
    """Why the model's code cannot run with this keep, or computes something else."""
    suspect = _suspicion(graph, keep)
    # Another program may compute the same, as a layer does that makes up for its own width.
    if suspect and suspect.reason in (DECIDES, COMPUTES) and cut.agrees(graph, _exact(graph, keep)):
        return None
    return suspect


def _suspicion(graph: Graph, keep: Keep) -> Frozen | None:
    """Why the model's code cannot run with this keep, or what differs in its program."""
    exact = _exact(graph, keep)
    try:
        program = _program(graph, keep)
        if len(exact) < len(keep):
            program = _program(graph, exact)
    except Exception as error:  # whatever the model's code may raise
        layer, line = cut.where(error)
        reason = f'layer {layer} fixes a size in its own code instead of taking it from its input'
        return Frozen(reason, type(error).__name__, line)
    return next(_differences(graph.program.jaxpr, program.jaxpr), None)


def _exact(graph: Graph, keep: Keep) -> Keep:
    """The keep without the groups whose removal changes the others anyway."""
    return {name: alive for name, alive in keep.items() if not graph.by_name[name].inexact}


def _program(graph: Graph, keep: Keep) -> Any:
    """The program of the compact network."""
    module, _ = cut.narrowed(graph, keep)
    small = applied(module, graph.apply_kwargs)
    return jax.make_jaxpr(small)(cut.cut(graph, graph.variables, keep), graph.inputs)


def _differences(full: Any, small: Any, caller: str = 'an unknown line') -> Iterator[Frozen]:
    """Where two programs differ by more than the shapes of their arrays.

    What stands inside a jitted function of JAX has no line of the model; its `caller` has.
    """
    left, right = rules.live(full), rules.live(small)
    for a, b in itertools.zip_longest(left, right):
        line = rules.source(a or b) or caller
        if a is None or b is None or a.primitive is not b.primitive:
            yield Frozen(DECIDES, (a or b).primitive.name, line)
            return
        for x, y in zip(a.invars, b.invars, strict=True):
            values = [v.val for v in (x, y) if isinstance(v, jax.extend.core.Literal)]
            if len(values) == 2 and not np.array_equal(*values, equal_nan=False):
                yield Frozen(COMPUTES, a.primitive.name, line)
        inner = [jax.extend.core.jaxprs_in_params(eqn.params) for eqn in (a, b)]
        for pair in zip(*inner, strict=False):
            yield from _differences(*pair, line)
