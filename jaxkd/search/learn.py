"""Learning a structure while a network is trained: for this package's loop, or one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import functools
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import numpy as np
import optax

from jaxkd import cpu, errors
from jaxkd.graph import cut
from jaxkd.graph import trace as tracing
from jaxkd.graph.structure import CompactModel
from jaxkd.graph.trace import Graph, plain
from jaxkd.search import blocks as blocking
from jaxkd.search import control, gates, penalty
from jaxkd.search import select as selecting

# Rounds of control on the way down to the budget, and how much of the way λ looks ahead.
ROUNDS, LOOKAHEAD = 200, 0.2


class Course(NamedTuple):
    """What a search knows before it begins.

    Attributes:
      graph: the traced network.
      gates: its gates; see `gates.find`.
      effort: params → float [units] by group name: how far the gates are from closing.
      limits, budgets: what is asked; see `blocks.resolve` and `blocks.budgets`.
      rates: float [2 · steps], the learning rate of each step.
      down: steps in which the cost falls to the budget.
      period: steps between two rounds of control.
      coupling: see `gates.shrink`.
    """

    graph: Graph
    gates: gates.Gates
    effort: Callable[[Any], dict[str, jax.Array]]
    limits: Mapping[str, blocking.Limits]
    budgets: list[blocking.Budget]
    rates: np.ndarray
    down: int
    period: int
    coupling: str


def course(
    graph: Graph,
    *,
    steps: int,
    learning_rate: optax.ScalarOrSchedule,
    ramp: float = 0.8,
    coupling: str = 'max',
    blocks: blocking.Blocks = (),
    **budget: float | None,
) -> Course:
    """Plans a search of `steps` steps, of which the share `ramp` takes the cost to the budget.

    Raises:
      GraphError: for a network without gates.
      ConfigError: for blocks or budgets that cannot be.
    """
    found = find_gates(graph)
    down = max(1, round(ramp * steps))
    schedule = learning_rate if callable(learning_rate) else optax.constant_schedule(learning_rate)
    return Course(
        graph,
        found,
        jax.jit(functools.partial(gates.effort, found, coupling=coupling)),
        blocking.resolve(graph, blocks),
        blocking.budgets(graph, blocks, **budget),
        np.broadcast_to(np.asarray(schedule(np.arange(2 * steps))), (2 * steps,)),
        down,
        max(1, down // ROUNDS),
        coupling,
    )


def find_gates(graph: Graph) -> gates.Gates:
    """The network's gates; GraphError if it has none."""
    found = gates.find(graph)
    if not found:
        raise errors.GraphError(
            f'no channel group of {type(graph.model).__name__} that can be cut has a BatchNorm, '
            'whose scale would be its gate; jaxkd.prune needs none'
        )
    return found


def efforts(course: Course, params: Any) -> dict[str, np.ndarray]:
    """The score of every unit: how far its gate is from closing."""
    return jax.device_get(course.effort(params))


def first(course: Course, params: Any) -> control.State:
    """What the controller knows before the first step."""
    return control.initial(efforts(course, params), len(course.budgets))


def press(course: Course, step: int, params: Any, memory: control.State) -> control.State:
    """What the controller knows and says before step `step`; its `strength` goes to the update."""
    if step % course.period:
        return memory
    horizon = max(1, round(LOOKAHEAD * course.down))
    return control.decide(
        course.graph,
        memory,
        efforts(course, params),
        course.limits,
        course.budgets,
        progress=step / course.down,
        horizon=horizon / course.down,
        period=course.period / course.down,
        rate=float(course.rates[step : step + horizon].sum()),
    )


class Search:
    """A search for a training loop of one's own, which makes two calls.

        search = jaxkd.Search(graph, params, steps=2000, learning_rate=0.02, flops=0.5)
        tx = optax.chain(optax.sgd(0.02, momentum=0.9), search.transformation)
        for step in range(2000):
            gradients = …
            extra = search.before(step, params)
            updates, opt_state = tx.update(gradients, opt_state, params, **extra)
            params = optax.apply_updates(params, updates)
        small = jaxkd.compact(graph, variables, search.keep(params))

    Args:
      graph: of the network that is trained.
      weights: its parameters at the start, the collection 'params'.
      steps: length of the search.
      learning_rate: the optimizer's, a number or a schedule.
      ramp: share of the search in which the cost falls to the budget.
      coupling: what the gate of a group with several BatchNorms is; see `gates.shrink`.
      blocks, round_to: see `jaxkd.select`.
      **budget: see `jaxkd.select`.

    Attributes:
      transformation: the penalty as an optax transformation, to be chained last.
      budgets: those that set a limit.
      memory: what the controller knows, a pytree of arrays: all that a checkpoint has to hold.

    Raises:
      BudgetError: for a budget that cannot be reached.
      GraphError, ConfigError: see `course`.
    """

    def __init__(
        self,
        graph: Graph,
        weights: Any,
        /,
        *,
        steps: int,
        learning_rate: optax.ScalarOrSchedule,
        ramp: float = 0.8,
        coupling: str = 'max',
        blocks: blocking.Blocks = (),
        round_to: int = 1,
        **budget: float | None,
    ):
        self._course = course(
            graph,
            steps=steps,
            learning_rate=learning_rate,
            ramp=ramp,
            coupling=coupling,
            blocks=blocks,
            **budget,
        )
        self.budgets = self._course.budgets
        self._select = functools.partial(
            selecting.select, graph, blocks=blocks, round_to=round_to, **budget
        )
        self._select(efforts(self._course, weights))  # refuses what cannot be reached
        self.transformation = penalty.proximal(self._course.gates, learning_rate, coupling)
        self.memory = first(self._course, weights)

    def before(self, step: int, params: Any) -> dict[str, Any]:
        """To be called before each step: further arguments of the optimizer's update."""
        self.memory = press(self._course, step, params, self.memory)
        return {'strength': self.memory.strength}

    def alive(self) -> dict[str, np.ndarray]:
        """The keep of the gates that are open."""
        return control.alive(self._course.graph, self.memory)

    def keep(self, params: Any) -> dict[str, np.ndarray]:
        """The structure that was found: the best units within the budget."""
        return self._select(efforts(self._course, params))


class SearchResult(NamedTuple):
    """What `learn_structure` found.

    Attributes:
      small: the compact network, verified; to be trained on.
      keep: what it keeps, bool [units] by group name.
      variables: the full network's at the end of the search.
      loss: float [steps], of each step.
      alive: float [steps], the share of the first budget that was alive after each step.
    """

    small: CompactModel
    keep: dict[str, np.ndarray]
    variables: Any
    loss: np.ndarray
    alive: np.ndarray


def learn_structure(
    model: nn.Module,
    variables: Any,
    loss: Callable[[Any, Any], Any],
    batches: Iterable[Any],
    *inputs: Any,
    steps: int,
    learning_rate: optax.ScalarOrSchedule = 0.02,
    optimizer: optax.GradientTransformation | None = None,
    flops: float | None = None,
    params: float | None = None,
    activations: float | None = None,
    latency: float | None = None,
    ramp: float = 0.8,
    coupling: str = 'max',
    blocks: blocking.Blocks = (),
    round_to: int = 1,
    **apply_kwargs: Any,
) -> SearchResult:
    """Trains a network whose channels have to pay for what they cost, down to a budget.

    Args:
      model: any Linen module with BatchNorms.
      variables: its trained variables.
      loss: `loss(variables, batch)`, in training mode: the mean loss as a scalar, or that and a
        dict of the collections that the model changed, such as `{'batch_stats': …}`. Distillation
        goes in here; see `jaxkd.distill`.
      batches: `steps` batches at least, whatever `loss` takes.
      *inputs: what `model.apply` takes, arrays or `jax.ShapeDtypeStruct`s; leading axis = batch.
      steps: how many.
      learning_rate: a number or a schedule.
      optimizer: with this learning rate; SGD with Nesterov momentum 0.9 by default.
      flops, params, activations, latency, blocks, round_to: see `jaxkd.select`.
      ramp, coupling: see `Search`.
      **apply_kwargs: further arguments of `model.apply` in evaluation mode, such as `train=False`.

    Raises:
      BudgetError: for a budget that cannot be reached.
      ConfigError: for batches that end too early, or no budget.
      GraphError: for a network that cannot be traced or cut, or has no gates.
      TrainingError: for a loss that is no finite number.
    """
    budget = {'flops': flops, 'params': params, 'activations': activations, 'latency': latency}
    graph = tracing.trace(model, variables, *inputs, **apply_kwargs)
    graph = blocking.measured(graph, latency, blocks)
    rest = jax.tree.map(jax.numpy.array, plain(variables))  # copies, because steps donate
    weights = rest.pop('params')
    search = Search(
        graph,
        weights,
        steps=steps,
        learning_rate=learning_rate,
        ramp=ramp,
        coupling=coupling,
        blocks=blocks,
        round_to=round_to,
        **budget,
    )
    if not search.budgets:
        why = 'give flops=, params=, activations= or latency= below the full network'
        raise errors.ConfigError('budget', budget, why=why)
    tx = optax.chain(
        optimizer or optax.sgd(learning_rate, momentum=0.9, nesterov=True), search.transformation
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def train_step(weights, rest, opt_state, batch, extra):
        def objective(weights):
            with cpu.fast_convolutions():
                result = loss({'params': weights, **rest}, batch)
            return result if isinstance(result, tuple) else (result, {})

        (value, changed), gradients = jax.value_and_grad(objective, has_aux=True)(weights)
        updates, opt_state = tx.update(gradients, opt_state, weights, **extra)
        return optax.apply_updates(weights, updates), {**rest, **changed}, opt_state, value

    opt_state = tx.init(weights)
    losses, alive = [], []
    source = iter(batches)
    for step in range(steps):
        try:
            batch = next(source)
        except StopIteration:
            why = f'they ended after {step} of {steps} steps; repeat them'
            raise errors.ConfigError('batches', type(batches).__name__, why=why) from None
        extra = search.before(step, weights)
        weights, rest, opt_state, value = train_step(weights, rest, opt_state, batch, extra)
        losses.append(value)
        alive.append(search.budgets[0].share(graph.cost(search.alive())))
        looked_at = losses[-100:] if step % 100 == 99 or step == steps - 1 else []
        if not np.isfinite(np.asarray(looked_at)).all():
            raise errors.TrainingError(
                f'the loss is no finite number by step {step + 1}: lower the learning rate'
            )
    found = {'params': weights, **rest}
    keep = search.keep(weights)
    small = cut.compact(graph, found, keep)
    return SearchResult(small, keep, found, np.asarray(losses), np.asarray(alive))
