"""A search in a training of one's own: in two calls of its loop, or with a loop that is there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import functools
import itertools
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import numpy as np
import optax

from jaxkd import cpu, errors
from jaxkd.graph import cut
from jaxkd.graph import trace as tracing
from jaxkd.graph.structure import CompactModel
from jaxkd.graph.trace import Graph, Keep, plain
from jaxkd.search import blocks as blocking
from jaxkd.search import control, criteria, learn, penalty
from jaxkd.search import gates as gating


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
      GraphError: for a network that cannot be cut; see `jaxkd.search.learn.rehearse`.
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
        graph = learn.rehearse(graph, blocks)
        self._course = learn.course(
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
        self._body = learn.body(self._course, graph.keep_all())
        self.budgets = self._course.budgets
        weights = self.gated(weights)
        self.transformation = penalty.proximal(self._course.gates, learning_rate, coupling)
        self.memory = learn.first(self._body, weights, worth)

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
        self.memory = learn.press(self._body, step, params, self.memory)
        return {'strength': learn.strength(self._body, self.memory)}

    def alive(self) -> dict[str, np.ndarray]:
        """The keep of the gates that are open."""
        return control.alive(self._course.graph, self.memory)

    def keep(self, params: Any) -> dict[str, np.ndarray]:
        """The structure that was found: the best units within the budget."""
        return learn.choose(self._body, params, self.memory)

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
        with cpu.fast_layers():
            result = loss(variables, batch)
        return result if isinstance(result, tuple) else (result, {})

    source = iter(batches)
    if worth is None:
        begin = list(itertools.islice(source, min(steps, criteria.BATCHES)))
        source = itertools.chain(begin, source)
        evidence = criteria.Evidence(lambda *args: value_and_changed(*args)[0], begin)
        worth = criteria.fisher(graph, variables, evidence) if begin else None
    search.memory = learn.first(search._body, weights, worth)
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
