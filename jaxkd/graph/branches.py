"""Which channel groups may lose all of their units: those that something leads around.

A residual branch adds to what runs beside it. Without any of its channels it adds a constant, and
what the network computes still depends on its inputs. Where nothing leads around, as in a plain
chain of layers, the outputs would become constants: such a group keeps at least one unit. Which is
which is read off the flow of the data that the walk on names has recorded.

Only a sum and a concatenation go on where one of the things that they are made of has gone. Of a
product with a constant nobody knows that it isn't zero, so a squeeze-excite counts as a part of
what it multiplies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Step(NamedTuple):
    """An array that depends on the network's inputs.

    Attributes:
      axes: for each axis all of whose positions belong to groups: these. Without all units of all
        of them the array is empty.
      read: the steps that it is computed from.
      sums: whether it goes on depending on what is left of these, if some have become constant.
    """

    axes: tuple[frozenset[str], ...]
    read: tuple[int, ...]
    sums: bool


class Flow(NamedTuple):
    """How data runs through a network.

    Attributes:
      steps: in the order of the computation; inputs read nothing.
      new: for each step the groups in its axes that are in none of what it reads.
      outputs: the steps that are outputs.
      whole: groups inside of loops and choices, into which the steps don't look: they stay.
    """

    steps: tuple[Step, ...]
    new: tuple[frozenset[str], ...]
    outputs: tuple[int, ...]
    whole: frozenset[str]


def flow(steps: Sequence[Step | None], outputs: Iterable[int], whole: Iterable[str]) -> Flow:
    """The flow of `steps` without those that add nothing.

    Args:
      steps: as in `Flow`, and those that may not depend on any input; None for an input.
      outputs, whole: as in `Flow`.
    """
    kept: list[Step] = []
    place: dict[int, int] = {}  # of a step, or of the one that it only hands on, in `kept`
    for i, step in enumerate(steps):
        step = Step((), (), True) if step is None else step
        read = tuple(dict.fromkeys(place[j] for j in step.read if j in place))
        if not read and steps[i] is not None:
            continue
        if len(read) == 1 and set(kept[read[0]].axes) == set(step.axes):
            place[i] = read[0]
        else:
            place[i] = len(kept)
            kept.append(step._replace(read=read))
    members = [frozenset[str]().union(*step.axes) for step in kept]
    new = tuple(
        mine.difference(*(members[j] for j in step.read))
        for mine, step in zip(members, kept, strict=True)
    )
    last = dict.fromkeys(place[i] for i in outputs if i in place)
    return Flow(tuple(kept), new, tuple(last), frozenset(whole))


def emptied(flow: Flow, movable: frozenset[str], names: frozenset[str]) -> frozenset[str] | None:
    """All groups that go when the groups `names` lose all of their units.

    They are `names`, and the rest of the branches that `names` interrupt: groups that only feed, or
    are only fed by, what has gone.

    Args:
      flow: of the network.
      movable: the groups that may go at all.
      names: some of the groups.

    Returns:
      The names; or None where an output would no longer depend on an input that it depends on.
    """
    if not names <= movable:
        return None
    while True:
        found = useful(flow, names)
        if found is None:
            return None
        more = names | (movable - found)
        if more == names:
            return names
        names = more


def useful(flow: Flow, empty: frozenset[str] = frozenset()) -> frozenset[str] | None:
    """The groups with channels that carry something from an input to an output.

    Without all units of the groups `empty`; None where an output then depends on fewer inputs.
    """
    full, _ = _reach(flow, frozenset())
    inputs, live = _reach(flow, empty)
    if any(inputs[i] != full[i] for i in flow.outputs):
        return None
    used = [False] * len(flow.steps)
    for i in flow.outputs:
        used[i] = True
    groups: set[str] = set()
    for i in reversed(range(len(flow.steps))):
        if used[i] and inputs[i]:
            groups |= live[i]
            for j in flow.steps[i].read:
                used[j] = True
    return frozenset(groups)


def _reach(flow: Flow, empty: frozenset[str]) -> tuple[list[int], list[frozenset[str]]]:
    """For each step the inputs that it depends on, a bit for each, and the groups in whose channels
    that shows."""
    inputs: list[int] = []
    live: list[frozenset[str]] = []
    sources = 0
    nothing = frozenset[str]()
    for step, new in zip(flow.steps, flow.new, strict=True):
        reached, groups = 0, nothing
        if not any(axis <= empty for axis in step.axes):
            if not step.read:
                reached, sources = 1 << sources, sources + 1
            elif step.sums or all(inputs[j] for j in step.read):
                for j in step.read:
                    reached |= inputs[j]
            if reached:
                mine = nothing.union(*step.axes)
                groups = mine & new.union(*(live[j] for j in step.read))
        inputs.append(reached)
        live.append(groups)
    return inputs, live
