"""Learning a structure while a network is trained: what happens before, between and after steps.

Pure functions, of which the recipe's search (`jaxkd.pipeline`) and that for a loop of one's own
(`jaxkd.search.training`) are made.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
import functools
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import numpy as np
import optax

from jaxkd import errors
from jaxkd.graph import cut, settle
from jaxkd.graph import trace as tracing
from jaxkd.graph.trace import Graph, Keep
from jaxkd.search import blocks as blocking
from jaxkd.search import control, matches
from jaxkd.search import gates as gating
from jaxkd.search import select as selecting

# Rounds of control on the way down to the budget, and how much of the way λ looks ahead.
ROUNDS, LOOKAHEAD = 60, 0.2


class Course(NamedTuple):
    """What a search knows before it begins.

    Attributes:
      graph: the traced network.
      gates: its gates; see `gates.find`.
      limits, budgets: what is asked; see `blocks.resolve` and `blocks.budgets`.
      rates: float [2 · steps], the learning rate of each step.
      down: steps in which the cost falls to the budget.
      period: steps between two rounds of control.
      coupling: see `gates.shrink`.
      select: scores → keep, within the budgets; see `select.select`.
      shrink: how far the multiply-adds of the open gates may fall, as a share of those that are
        computed, before the network is cut; 0 never cuts.
    """

    graph: Graph
    gates: gating.Gates
    limits: Mapping[str, blocking.Limits]
    budgets: list[blocking.Budget]
    rates: np.ndarray
    down: int
    period: int
    coupling: str
    select: Callable[..., dict[str, np.ndarray]]
    shrink: float


def course(
    graph: Graph,
    *,
    steps: int,
    learning_rate: optax.ScalarOrSchedule,
    ramp: float = 0.8,
    gates: str = 'norm',
    coupling: str = 'max',
    shrink: float = 0.0,
    blocks: blocking.Blocks = (),
    round_to: int = 1,
    min_keep: float | None = None,
    **budget: float | None,
) -> Course:
    """Plans a search of `steps` steps, of which the share `ramp` takes the cost to the budget.

    Raises:
      BudgetError: for a budget that cannot be reached.
      ConfigError: for steps, a ramp, gates, couplings, blocks or budgets that cannot be.
    """
    if not errors.is_whole(steps) or steps < 0:
        raise errors.ConfigError('steps', steps, why='it must be an int ≥ 0')
    if not errors.is_number(ramp) or not 0 <= ramp <= 1:
        raise errors.ConfigError('ramp', ramp, why='it must be a share in [0, 1]')
    if coupling not in gating.COUPLINGS:
        raise errors.ConfigError('coupling', coupling, allowed=gating.COUPLINGS)
    found = gating.find(graph, gates)
    min_keep = selecting.floor(graph, min_keep, blocks=blocks, round_to=round_to, **budget)
    down = max(1, round(ramp * steps))
    schedule = learning_rate if callable(learning_rate) else optax.constant_schedule(learning_rate)
    # One step at a time, as an optimizer asks: some schedules compare the step with an array.
    rates = np.asarray(jax.vmap(schedule)(np.arange(2 * steps)))
    return Course(
        graph,
        found,
        selecting.rounded(graph, blocking.resolve(graph, blocks, min_keep), round_to),
        blocking.budgets(graph, blocks, **budget),
        rates,
        down,
        max(1, down // ROUNDS),
        coupling,
        functools.partial(
            selecting.select,
            graph,
            blocks=blocks,
            round_to=round_to,
            min_keep=min_keep,
            **budget,
        ),
        shrink,
    )


def rehearse(graph: Graph, blocks: blocking.Blocks = ()) -> Graph:
    """Refuses a network that cannot be cut before it is trained, and not when it is to be cut.

    Returns:
      The graph; where the model's code cannot do with about half of some groups, or computes
      something else then, with these frozen.

    Raises:
      GraphError: if no group can be cut, or not without the branches that `blocks` let go.
    """
    if _whole(graph):
        raise errors.GraphError(
            f'no channel group of {type(graph.model).__name__} can be cut; see the reasons in '
            'jaxkd.trace(…).frozen'
        )
    try:
        cut.rehearse(graph)
    except errors.GraphError:
        settled = settle.settle(graph)
        if settled is graph or _whole(settled):
            raise
        cut.rehearse(settled)
        tracing.warn_if_frozen(settled)
        graph = settled
    limits = blocking.resolve(graph, blocks)
    if gone := [name for name, limit in limits.items() if not limit.least]:
        cut.rehearse(graph, gone)
    return graph


def _whole(graph: Graph) -> bool:
    return all(group.frozen for group in graph.groups)


class Body(NamedTuple):
    """The network that is trained: what has not been cut away yet.

    Attributes:
      course: of the search.
      keep: which units of the full network it has.
      module: at these widths.
      gates: its gates.
      effort: params → float [units] by group name: how far its gates are from closing.
    """

    course: Course
    keep: dict[str, np.ndarray]
    module: nn.Module
    gates: gating.Gates
    effort: Callable[[Any], dict[str, jax.Array]]


def body(course: Course, keep: dict[str, np.ndarray]) -> Body:
    """The network of a search that has these units."""
    graph = course.graph
    found, module = course.gates, graph.model
    if not all(alive.all() for alive in keep.values()):
        found = gating.narrow(graph, found, keep)
        module, _ = cut.narrowed(graph, keep)
    effort = jax.jit(functools.partial(gating.effort, found, coupling=course.coupling))
    return Body(course, keep, module, found, effort)


def follow(course: Course) -> Callable[[dict[str, np.ndarray]], Body]:
    """`body` for one keep after the other, made anew where it is another."""
    latest: list[Body] = []

    def of(keep: dict[str, np.ndarray]) -> Body:
        if not latest or latest[0].keep is not keep:
            latest[:] = [body(course, keep)]
        return latest[0]

    return of


def narrow(graph: Graph, tree: Any, keep: Keep, among: Keep) -> Any:
    """Cuts a tree of a body with the units `among`, its gates too, to that with `keep`."""
    left = {name: keep[name][units] for name, units in among.items()}
    return gating.cut(cut.cut(graph, tree, keep, among=among), left)


def whole(body: Body, variables: Any, into: Any) -> Any:
    """The full network's variables: the body's, its gates folded in, and closed ones elsewhere.

    Args:
      body: of the search.
      variables: the body's.
      into: variables of the full network, for what has been cut away.
    """
    folded = {**variables, 'params': gating.fold(body.gates, variables['params'])}
    restored = cut.restore(body.course.graph, folded, body.keep, into)
    return {**restored, 'params': gating.close(body.course.gates, restored['params'], body.keep)}


def efforts(body: Body, params: Any) -> dict[str, np.ndarray]:
    """How far the gate of every unit of the full network is from closing.

    Units that have been cut away are at 0.
    """
    scores = {}
    for name, effort in jax.device_get(body.effort(params)).items():
        scores[name] = np.zeros(len(body.keep[name]))
        scores[name][body.keep[name]] = effort
    return scores


def first(body: Body, params: Any, worth: Mapping[str, np.ndarray] | None = None) -> control.State:
    """What the controller knows before the first step.

    Args:
      body: of the full network.
      params: at the start.
      worth: float [units] by group name, ≥ 0, what each unit is worth now; see `control.weigh`.
    """
    course, found = body.course, efforts(body, params)
    memory = control.initial(course.graph, found, len(course.budgets))
    return control.weigh(memory, found, worth) if worth else memory


def press(body: Body, step: int, params: Any, memory: control.State) -> control.State:
    """What the controller knows and says before step `step`.

    Its `physical` is another than the body's where the time has come to cut it.
    """
    course = body.course
    if step % course.period:
        return memory
    horizon = max(1, round(LOOKAHEAD * course.down))
    memory = control.decide(
        course.graph,
        memory,
        control.valued(memory, efforts(body, params)),
        course.limits,
        course.budgets,
        progress=step / course.down,
        horizon=horizon / course.down,
        period=course.period / course.down,
        rate=float(course.rates[step : step + horizon].sum()),
    )
    if course.shrink:
        alive = control.alive(course.graph, memory)
        left, computed = (
            course.graph.amount(course.graph.vector(keep), 'flops')
            for keep in (alive, memory.physical)
        )
        if left < course.shrink * computed and settle.works(course.graph, alive):
            memory = memory._replace(physical=alive)
    return memory


def strength(body: Body, memory: control.State) -> dict[str, np.ndarray]:
    """What the penalty of the body's units is, for the optimizer's update."""
    return {name: s[body.keep[name]] for name, s in memory.strength.items()}


def choose(body: Body, params: Any, memory: control.State) -> dict[str, np.ndarray]:
    """The structure that was found: the units whose gates are open, as far as the budgets allow.

    What they leave over of a budget is used up by others: `select.FULL` of it is promised. Where
    the open gates leave no way to that, those that are worth least give way, at most twice as
    many as have to, if without them there is one; else they all stay.
    """
    course = body.course
    scores = control.valued(memory, efforts(body, params))
    alive = control.alive(course.graph, memory)
    return matches.apart(
        course.graph, lambda avoided: _within(course, scores, alive, avoided), scores
    )


def _within(
    course: Course,
    scores: Mapping[str, np.ndarray],
    alive: Keep,
    avoided: Mapping[str, Collection[int]],
) -> dict[str, np.ndarray]:
    """What `choose` keeps where these numbers of units are avoided."""
    select = functools.partial(course.select, scores, avoided=avoided)

    def used(keep: Keep) -> float:
        """The share of the budget that is used up most."""
        cost = course.graph.cost(keep)
        return max(b.share(cost) * b.full / b.most for b in course.budgets)

    if not course.budgets or used(alive) > 1:
        return select()
    keep = select(held=alive)
    # In a network of few channels, those that are open can leave no room for any other.
    open_ = course.graph.vector(alive)
    least = np.argsort(np.where(open_, course.graph.vector(scores), np.inf), kind='stable')
    fewer = 1
    while used(keep) < selecting.FULL and fewer < 2 * open_.sum():
        held = open_.copy()
        held[least[:fewer]] = False
        other = select(held=course.graph.by_group(held))
        if used(other) >= selecting.FULL:
            return other
        fewer *= 2
    return keep
