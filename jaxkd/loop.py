"""One stage of training from its first step to its last: resumed, watched, checked and kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import pathlib
import time
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import ml_collections
import numpy as np
import optax

from jaxkd import checkpoint, errors, hosts, train, watch
from jaxkd import mesh as meshes
from jaxkd.graph.trace import Keep


class Setup(NamedTuple):
    """What all stages of a run share.

    Attributes:
      config: the whole config; a stage's own part has its name; see `settings`.
      workdir: each stage keeps its states in a folder of its name.
      stages: the names of the stages, in order.
      mesh: the devices.
      train, validation: the examples.
      preprocessing: how images become inputs.
      log, display: where metrics go.
    """

    config: ml_collections.ConfigDict
    workdir: pathlib.Path
    stages: Sequence[str]
    mesh: jax.sharding.Mesh
    train: train.Examples
    validation: train.Examples
    preprocessing: train.Preprocessing
    log: watch.MetricsLog
    display: watch.Display


class Network(NamedTuple):
    """What a stage trains.

    Attributes:
      model: the module.
      after: gradient transformations after the optimizer's.
      fold: makes the parameters that the model sees of those that are trained.
    """

    model: nn.Module
    after: tuple[optax.GradientTransformation, ...] = ()
    fold: train.Fold | None = None


def length(config: ml_collections.ConfigDict, size: int) -> int:
    """Steps of a stage on `size` training examples."""
    return max(1, round(config.epochs * train.steps_per_epoch(size, config.batch_size)))


def settings(config: ml_collections.ConfigDict, name: str) -> ml_collections.ConfigDict:
    """The part of the config that a stage follows: 'search2' follows that of 'search'."""
    return config[part(name)]


def part(name: str) -> str:
    return name.rstrip('0123456789')


def schedule(setup: Setup, name: str) -> tuple[int, optax.Schedule]:
    """Length of a stage in steps, and its learning rate."""
    config = settings(setup.config, name)
    size = setup.train.split.size
    steps = length(config, size)
    per_epoch = train.steps_per_epoch(size, config.batch_size)
    return steps, train.learning_rate(config, steps, per_epoch)


def fit(
    setup: Setup,
    name: str,
    network: Callable[[Keep | None], Network],
    variables: Any,
    loss: train.Loss,
    *,
    facts: Callable[[Any], Mapping[str, float]],
    teacher: tuple[nn.Module, Any] | None = None,
    memory: Any = None,
    steer: Callable[[int, train.TrainState, Any], tuple[Any, Mapping[str, Any]]] | None = None,
    kept: Callable[[Any], Keep | None] = lambda memory: None,
    narrow: Callable[[Any, Keep, Keep], Any] | None = None,
) -> tuple[train.TrainState, Any]:
    """Trains for a stage's number of steps, from where its last checkpoint was left.

    Args:
      setup: what all stages share.
      name: of the stage.
      network: what to train, with the units given; None for all.
      variables: what it starts from.
      loss: see `train.Loss`.
      facts: what the log says besides, from the memory.
      teacher: module and variables of the teacher.
      memory: what `steer` remembers, a pytree that checkpoints hold.
      steer: called before each step as `(steps done, state, memory)`; returns the next memory and
        further arguments of the optimizer's update.
      kept: from the memory, the units that the network has. Where these become others (which their
        identity tells), the state is cut and the step compiled anew.
      narrow: cuts, called as `(tree, units to keep, units that there are)`.

    Returns:
      The last state, and the last memory. If the stage was finished before, nothing is trained.

    Raises:
      TrainingError: if the loss is no finite number.
    """
    config = settings(setup.config, name)
    steps, rate = schedule(setup, name)
    folder = setup.workdir / name
    teacher_model, teacher_variables = teacher or (None, {})

    def optimizer(network: Network) -> optax.GradientTransformationExtraArgs:
        return train.optimizer(config, rate, *network.after)

    def steps_of(network: Network) -> tuple[Callable[..., Any], Callable[..., Any]]:
        train_step = train.make_train_step(
            network.model,
            optimizer(network),
            loss,
            setup.preprocessing,
            setup.mesh,
            seed=setup.config.seed,
            ema_decay=config.ema_decay,
            teacher=teacher_model,
            fold=network.fold,
            accumulate=config.accumulate,
            compute_dtype=setup.config.compute_dtype,
            layout=jax.tree.map(lambda leaf: leaf.sharding, state),
        )
        return train_step, train.make_eval_step(network.model, setup.preprocessing, setup.mesh)

    def place(tree: Any, params: Any) -> Any:
        return meshes.place(tree, params, setup.mesh, setup.config.sharding)

    keep = kept(memory)
    current = network(keep)
    state = train.create_state(variables, optimizer(current))

    def restored(tree: Mapping[str, Any]) -> tuple[train.TrainState, Any]:
        parts = {key: checkpoint.part(tree, key) for key in ('state', 'memory')}
        known = checkpoint.from_tree(memory, parts['memory'], folder)
        template = narrow(state, kept(known), keep) if narrow else state
        then = checkpoint.from_tree(template, parts['state'], folder)
        return place(then, then.params), known

    with hosts.at_first(lambda: checkpoint.Stage(folder, report=setup.display.message)) as stage:
        finished = stage.result()
        if finished:
            state, memory = restored(finished[0])
            setup.display.finish(name)
            return meshes.gathered(state), memory

        start, elapsed = 0, 0.0
        saved_before = stage.restore()
        if saved_before:
            start, tree, metadata = saved_before
            state, memory = restored(tree)
            keep = kept(memory)
            current = network(keep)
            elapsed = metadata['seconds']
            setup.display.message(f'{name}: going on at step {start} of {steps}')
        else:
            state = place(state, state.params)
        setup.log.rewind(name, start or -1, later=setup.stages[setup.stages.index(name) + 1 :])
        setup.display.start(name, start)

        teacher_variables = place(teacher_variables, teacher_variables.get('params', {}))
        train_step, eval_step = steps_of(current)
        per_epoch = train.steps_per_epoch(setup.train.split.size, config.batch_size)
        batches = train.batches(
            setup.train,
            config.batch_size,
            setup.mesh,
            seed=setup.config.seed,
            start=start,
            stop=steps,
        )

        def validate() -> dict[str, float]:
            # Averages lag behind a network whose channels are being closed.
            evaluated = train.variables(state) if steer else train.averaged(state)
            if current.fold:
                evaluated |= {'params': current.fold(evaluated['params'], None)}
            found = train.evaluate(
                eval_step, evaluated, setup.validation, config.batch_size, setup.mesh
            )
            return {f'validation_{key}': value for key, value in found.items()}

        began = time.monotonic()
        if start == 0:  # what it begins with, which tells what the stage before has left
            setup.log.write({'stage': name, 'step': 0, 'epoch': 0.0, **facts(memory), **validate()})
        logged = saved = time.monotonic()
        pending: list[dict[str, jax.Array]] = []
        extra: Mapping[str, Any] = {}
        for step, batch in enumerate(batches, start + 1):
            if steer:
                memory, extra = steer(step - 1, state, memory)
                if kept(memory) is not keep:
                    state = narrow(meshes.gathered(state), kept(memory), keep)
                    state = place(state, state.params)
                    keep = kept(memory)
                    current = network(keep)
                    train_step, eval_step = steps_of(current)
            state, metrics = train_step(state, batch, teacher_variables, extra)
            pending.append(metrics)
            end_of_epoch = step % per_epoch == 0 or step == steps
            if not end_of_epoch and step % setup.config.log_every:
                continue

            means = _means(pending)  # waits for the steps
            if not np.isfinite(means['loss']):
                raise errors.TrainingError(
                    f'{name}: the loss was {means["loss"]} at step {step}; the last good state is '
                    f'kept in {folder}. Lower config.{part(name)}.learning_rate, now '
                    f'{config.learning_rate:g}, and start again in another workdir'
                )
            speed = len(pending) * config.batch_size / (time.monotonic() - logged)
            row = {
                'stage': name,
                'step': step,
                'epoch': step / per_epoch,
                **means,
                **facts(memory),
                'learning_rate': float(rate(step - 1)),
                'examples_per_second': speed,
            }
            if end_of_epoch:
                row |= validate()
            setup.log.write(row)
            hidden = ('stage', 'step', 'learning_rate', 'share_', 'lambda_')
            shown = {k: v for k, v in row.items() if not k.startswith(hidden)}
            setup.display.update(name, step, **shown)
            pending, logged = [], time.monotonic()
            due = logged - saved >= setup.config.checkpoint_seconds and step < steps
            if hosts.agreed(due):
                metadata = {'seconds': elapsed + logged - began}
                whole = {'state': meshes.gathered(state), 'memory': memory}
                stage.save(step, checkpoint.to_tree(whole), metadata)
                saved = time.monotonic()

        metadata = {'seconds': elapsed + time.monotonic() - began}
        state = meshes.gathered(state)
        stage.finish(checkpoint.to_tree({'state': state, 'memory': memory}), metadata)
        setup.display.finish(name)
        return state, memory


def seconds(setup: Setup) -> dict[str, float]:
    """How long each stage was trained, over all the runs that it took."""
    return {
        name: checkpoint.Stage(setup.workdir / name).result()[1]['seconds'] for name in setup.stages
    }


def _means(metrics: list[dict[str, jax.Array]]) -> dict[str, float]:
    fetched = jax.device_get(metrics)
    return {key: float(np.mean([m[key] for m in fetched])) for key in fetched[0]}
