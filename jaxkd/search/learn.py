"""Learning a structure while a network is trained: for this package's loop, or one's own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
import functools
import itertools
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import numpy as np
import optax

from jaxkd import cpu, errors
from jaxkd.graph import cut, settle
from jaxkd.graph import trace as tracing
from jaxkd.graph.structure import CompactModel
from jaxkd.graph.trace import Graph, Keep, plain
from jaxkd.search import blocks as blocking
from jaxkd.search import control, criteria, matches, penalty
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


class Search:
    """A search for a training loop of one's own, which makes two calls.

        search = jaxkd.Search(graph, params, steps=2000, learning_rate=0.02, flops=0.5)
        tx = optax.chain(optax.sgd(0.02, momentum=0.9), search.transformation)
        params = search.gated(params)
        opt_state = tx.init(params)
        for step in range(2000):
            gradients = …  # in params, of the loss of search.fold(params)
            extra = search.before(step, params)
            updates, opt_state = tx.update(gradients, opt_state, params, **extra)
            params = optax.apply_updates(params, updates)
        variables = {'params': search.fold(params), …}
        keep = search.keep(params)
        small = jaxkd.compact(graph, search.reopen(variables, keep, start), keep)

    Here `start` is what the parameters were at first. `gated` and `fold` change nothing where norms
    do as gates everywhere, as in most networks with BatchNorm, and may be left out there.

    Args:
      graph: of the network that is trained.
      weights: its parameters at the start, the collection 'params'.
      steps: length of the search.
      learning_rate: the optimizer's, a number or a schedule.
      ramp: share of the search in which the cost falls to the budget.
      gates: 'norm' (the scales of norms, explicit gates where they do not do), 'explicit' or
        'sigmoid' for all; see `jaxkd.search.gates`.
      coupling: what the gate of a group with several norms is: 'max', 'mean' or 'l2'; see
        `jaxkd.search.gates.shrink`.
      blocks, round_to: see `jaxkd.select`.
      min_keep: see `jaxkd.search.select.floor`.
      worth: float [units] by group name, ≥ 0: what each unit is worth at the start, such as a score
        of `jaxkd.search.criteria`. By default what its gate says; see `jaxkd.search.control`.
      **budget: see `jaxkd.select`.

    Attributes:
      transformation: the penalty as an optax transformation, to be chained last.
      budgets: those that set a limit.
      memory: what the controller knows, a pytree of arrays: all that a checkpoint has to hold.

    Raises:
      BudgetError: for a budget that cannot be reached.
      GraphError: for a network that cannot be cut; see `rehearse`.
      ConfigError: for steps, a ramp, gates, couplings, blocks, budgets or a worth that cannot be.
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
        gates: str = 'norm',
        coupling: str = 'max',
        blocks: blocking.Blocks = (),
        round_to: int = 1,
        min_keep: float | None = None,
        worth: Mapping[str, np.ndarray] | None = None,
        **budget: float | None,
    ):
        graph = rehearse(graph, blocks)
        self._course = course(
            graph,
            steps=steps,
            learning_rate=learning_rate,
            ramp=ramp,
            gates=gates,
            coupling=coupling,
            blocks=blocks,
            round_to=round_to,
            min_keep=min_keep,
            **budget,
        )
        self._body = body(self._course, graph.keep_all())
        self.budgets = self._course.budgets
        weights = self.gated(weights)
        self.transformation = penalty.proximal(self._course.gates, learning_rate, coupling)
        self.memory = first(self._body, weights, worth)

    def gated(self, params: Any) -> Any:
        """The parameters to be trained: with the gates that are none of the model's own.

        Their entry goes through the optimizer like the others, and the model never sees it.
        """
        return gating.gated(self._course.gates, params)

    def fold(self, params: Any, key: jax.Array | None = None) -> Any:
        """The parameters for the model: multiplied by the gates; with a key, as in training.

        Of `gates='sigmoid'` the key draws a sample; other gates need none.
        """
        return gating.fold(self._course.gates, params, key)

    def before(self, step: int, params: Any) -> dict[str, Any]:
        """To be called before each step: further arguments of the optimizer's update."""
        self.memory = press(self._body, step, params, self.memory)
        return {'strength': strength(self._body, self.memory)}

    def alive(self) -> dict[str, np.ndarray]:
        """The keep of the gates that are open."""
        return control.alive(self._course.graph, self.memory)

    def keep(self, params: Any) -> dict[str, np.ndarray]:
        """The structure that was found: the best units within the budget."""
        return choose(self._body, params, self.memory)

    def reopen(self, variables: Any, keep: Keep, start: Any) -> Any:
        """The folded variables to be cut to a keep, so that all that it keeps can be trained.

        The budget is used up, if need be by units whose gates have closed. These are at exactly
        zero, where no gradient would pass the ReLU behind them: they get 1 % of what they were at
        the start, too little to change what the network computes.

        Args:
          variables: of the model at the end of the search, 'params' from `fold`.
          keep: from the method `keep`.
          start: parameters of the model at the start of the search.
        """
        opened = gating.reopen(self._course.gates, variables['params'], keep, start)
        return {**variables, 'params': opened}


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
    gates: str = 'norm',
    coupling: str = 'max',
    blocks: blocking.Blocks = (),
    round_to: int = 1,
    min_keep: float | None = None,
    worth: Mapping[str, np.ndarray] | None = None,
    seed: int = 0,
    **apply_kwargs: Any,
) -> SearchResult:
    """Trains a network whose channels have to pay for what they cost, down to a budget.

    Args:
      model: any Linen module.
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
      ramp, gates, coupling, min_keep: see `Search`.
      worth: see `Search`; by default `criteria.fisher`, by the loss of the first batches.
      seed: for the samples of `gates='sigmoid'`.
      **apply_kwargs: further arguments of `model.apply` in evaluation mode, such as `train=False`.

    Raises:
      BudgetError: for a budget that cannot be reached.
      ConfigError: for batches that end too early, or no budget.
      GraphError: for a network that cannot be traced or cut.
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
        gates=gates,
        coupling=coupling,
        blocks=blocks,
        round_to=round_to,
        min_keep=min_keep,
        **budget,
    )
    weights = search.gated(weights)
    if not search.budgets:
        why = 'give flops=, params=, activations= or latency= below the full network'
        raise errors.ConfigError('budget', budget, why=why)

    def value_and_changed(variables, batch):
        with cpu.fast_convolutions():
            result = loss(variables, batch)
        return result if isinstance(result, tuple) else (result, {})

    source = iter(batches)
    if worth is None:
        begin = list(itertools.islice(source, min(steps, criteria.BATCHES)))
        source = itertools.chain(begin, source)
        evidence = criteria.Evidence(lambda *args: value_and_changed(*args)[0], begin)
        worth = criteria.fisher(graph, variables, evidence) if begin else None
    search.memory = first(search._body, weights, worth)
    tx = optax.chain(
        optimizer or optax.sgd(learning_rate, momentum=0.9, nesterov=True), search.transformation
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def train_step(weights, rest, opt_state, batch, step, extra):
        key = jax.random.fold_in(jax.random.key(seed), step)

        def objective(weights):
            return value_and_changed({'params': search.fold(weights, key), **rest}, batch)

        (value, changed), gradients = jax.value_and_grad(objective, has_aux=True)(weights)
        updates, opt_state = tx.update(gradients, opt_state, weights, **extra)
        weights = optax.apply_updates(weights, updates)
        # In float32, because NumPy has none of JAX's half precision.
        return weights, {**rest, **changed}, opt_state, value.astype(np.float32)

    opt_state = tx.init(weights)
    losses, alive = [], []
    for step in range(steps):
        try:
            batch = next(source)
        except StopIteration:
            why = f'they ended after {step} of {steps} steps; repeat them'
            raise errors.ConfigError('batches', type(batches).__name__, why=why) from None
        extra = search.before(step, weights)
        weights, rest, opt_state, value = train_step(weights, rest, opt_state, batch, step, extra)
        losses.append(value)
        alive.append(search.budgets[0].share(graph.cost(search.alive())))
        looked_at = losses[-100:] if step % 100 == 99 or step == steps - 1 else []
        if not np.isfinite(np.asarray(looked_at)).all():
            raise errors.TrainingError(
                f'the loss is no finite number by step {step + 1}: lower the learning rate'
            )
    found = {'params': search.fold(weights), **rest}
    keep = search.keep(weights)
    found = search.reopen(found, keep, plain(variables)['params'])
    small = cut.compact(search._course.graph, found, keep)
    return SearchResult(small, keep, found, np.asarray(losses), np.asarray(alive))
