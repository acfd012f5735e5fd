"""One stage of training from its first step to its last: resumed, watched, checked and kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import hashlib
import json
import pathlib
import time
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import ml_collections
import numpy as np
import optax

from jaxkd import (
    checkpoint,
    data,
    device,
    errors,
    features,
    hosts,
    metrics,
    stopping,
    train,
    watch,
)
from jaxkd import mesh as meshes
from jaxkd import progress as reaching
from jaxkd.graph.trace import Keep

# A mean loss above so many times that of guessing is absurd: no training comes back from there.
ABSURD = 100.0
# What to do where the loss is no number, or absurd.
ON_NAN = ('stop', 'rollback')
# Which of its averaged variables a stage hands on.
CHOICES = ('last', 'best')

Steer = Callable[[int, train.TrainState, Any], tuple[Any, Mapping[str, Any]]]


class Setup(NamedTuple):
    """What all stages of a run share.

    Attributes:
      config: the whole config; a stage's own part has its name; see `settings`.
      workdir: each stage keeps its states in a folder of its name.
      stages: the names of the stages, in order.
      mesh: the devices.
      train, validation: the examples.
      preprocessing: how images become inputs.
      chance: the cross-entropy of guessing.
      log, display: where metrics go.
      load: hands out a part of the data set, by its name.
      stops: what signals have asked for.
      profile: whether to write a trace of some steps of each stage.
    """

    config: ml_collections.ConfigDict
    workdir: pathlib.Path
    stages: Sequence[str]
    mesh: jax.sharding.Mesh
    train: train.Examples
    validation: train.Examples
    preprocessing: train.Preprocessing
    chance: float
    log: metrics.MetricsLog
    display: watch.Display
    load: Callable[[str], data.Split]
    stops: stopping.Requests
    profile: bool = False


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


class Point(NamedTuple):
    """Where a stage is.

    Attributes:
      state: what steps change.
      memory: what `steer` remembers.
      progress: the rest.
    """

    state: train.TrainState
    memory: Any
    progress: reaching.Progress


class Work(NamedTuple):
    """What a stage has to do: the arguments of `fit`."""

    setup: Setup
    name: str
    network: Callable[[Keep | None], Network]
    variables: Any
    loss: train.Loss | train.Objective
    facts: Callable[[Any], Mapping[str, float]]
    teacher: tuple[nn.Module | str | None, Any]
    memory: Any
    steer: Steer | None
    kept: Callable[[Any], Keep | None]
    narrow: Callable[[Any, Keep, Keep], Any] | None
    origin: str

    @property
    def config(self) -> ml_collections.ConfigDict:
        return settings(self.setup.config, self.name)

    @property
    def folder(self) -> pathlib.Path:
        return self.setup.workdir / self.name


def length(config: ml_collections.ConfigDict, name: str, size: int) -> int:
    """Steps of a stage on `size` training examples."""
    own = settings(config, name)
    epochs = own.tune_epochs if own.get('checkpoint') else own.epochs
    try:
        return max(1, round(epochs * train.steps_per_epoch(size, own.batch_size)))
    except errors.ConfigError as error:
        field = f'{part(name)}.{error.field}'
        raise errors.ConfigError(field, error.value, why=error.why) from None


def settings(config: ml_collections.ConfigDict, name: str) -> ml_collections.ConfigDict:
    """The part of the config that a stage follows: 'search2' follows that of 'search'."""
    return config[part(name)]


def part(name: str) -> str:
    return name.rstrip('0123456789')


def schedule(setup: Setup, name: str) -> tuple[int, optax.Schedule]:
    """Length of a stage in steps, and its learning rate."""
    config = settings(setup.config, name)
    size = setup.train.split.size
    steps = length(setup.config, name, size)
    per_epoch = train.steps_per_epoch(size, config.batch_size)
    return steps, train.learning_rate(config, steps, per_epoch)


def fit(
    setup: Setup,
    name: str,
    network: Callable[[Keep | None], Network],
    variables: Any,
    loss: train.Loss | train.Objective,
    *,
    facts: Callable[[Any], Mapping[str, float]],
    given: Any,
    teacher: tuple[nn.Module | str | None, Any] | None = None,
    memory: Any = None,
    steer: Steer | None = None,
    kept: Callable[[Any], Keep | None] = lambda memory: None,
    narrow: Callable[[Any, Keep, Keep], Any] | None = None,
) -> Point:
    """Trains for a stage's number of steps, from where its last checkpoint was left.

    Where the loss is no finite number, or absurd (since the last row of the log, on average more
    than `ABSURD` times that of guessing), or the state at the end of an epoch is not finite, it
    stops; with `on_nan='rollback'` it goes back to the end of the last epoch, or to its start, and
    on from there with a lower learning rate. A state that is not finite is never saved.

    Args:
      setup: what all stages share.
      name: of the stage.
      network: what to train, with the units given; None for all.
      variables: what it starts from.
      loss: see `train.Loss` and `train.Objective`.
      facts: what the log says besides, from the memory.
      given: what the stage depends on beside its teacher, as JSON: a checkpoint that was made with
        something else is refused.
      teacher: module and variables of the teacher; see `train.make_train_step`. With None or
        `train.AVERAGE` for the module the stage depends on the variables all the same.
      memory: what `steer` remembers, a pytree that checkpoints hold.
      steer: called before each step as `(steps done, state, memory)`; returns the next memory and
        further arguments of the optimizer's update.
      kept: from the memory, the units that the network has. Where these become others (which their
        identity tells), the state is cut and the step compiled anew.
      narrow: cuts, called as `(tree, units to keep, units that there are)`.

    Returns:
      Where it ends. If the stage was finished before, nothing is trained.

    Raises:
      CheckpointError: for a checkpoint made with something else, or one that cannot be written.
      Stopped: if a signal has asked to stop. What was reached is saved.
      TrainingError: if the loss is no finite number, or absurd.
    """
    teacher = teacher or (None, {})
    origin = hosts.agreed(_origin(given, teacher[1]))
    work = Work(
        setup, name, network, variables, loss, facts, teacher, memory, steer, kept, narrow, origin
    )
    say = setup.display.message
    keep = setup.config.checkpoint_keep
    with hosts.at_first(lambda: checkpoint.Stage(work.folder, keep, say)) as stage:
        found = stage.result()
        if found:
            steps, _ = schedule(setup, name)
            end = _restored(work, 'result', steps, *found)
            if setup.log.rows(name) != list(end.progress.rows):
                _put_rows(work, end.progress)
            setup.display.finish(name)
            return end._replace(state=meshes.gathered(end.state))

        found = stage.restore()
        if found:
            point = _restored(work, str(found[0]), *found)
            say(f'{name}: going on at step {found[0]} of {schedule(setup, name)[0]}')
        else:
            point = _beginning(work)
        _put_rows(work, point.progress)
        setup.display.start(name, point.progress.step)
        point, trouble = _train(work, stage, point)
        while trouble:
            point = _gone_back(work, stage, point.progress, trouble)
            point, trouble = _train(work, stage, point)
        done = point._replace(progress=point.progress._replace(anchor=None))
        stage.finish(*_packed(work, done))
        setup.display.finish(name)
        setup.stops.release(hosts.any_of)
        return point._replace(state=meshes.gathered(point.state))


def chosen(setup: Setup, name: str, end: Point) -> Any:
    """The averaged variables that a stage hands on: the last, or the best by validation.

    Adapters, which are trained with a network, are no part of it.
    """
    found = train.averaged(end.state)
    found |= {'params': features.without_adapters(found['params'])}
    best = end.progress.best
    if settings(setup.config, name).choose == 'best' and best:
        found = checkpoint.from_tree(found, best.variables, setup.workdir / name)
    return found


def outcomes(setup: Setup) -> dict[str, dict[str, Any]]:
    """What is told of each stage: 'seconds', over all the runs that it took, 'best', 'rollbacks'.

    Raises:
      CheckpointError: if the result of a stage is damaged.
    """
    found = {}
    for name in setup.stages:
        _, notes = checkpoint.read(setup.workdir / name / 'result')
        found[name] = {key: notes[key] for key in ('seconds', 'best', 'rollbacks')}
    return found


def _train(work: Work, stage: checkpoint.Stage, point: Point) -> tuple[Point, str | None]:
    """Trains to the end of the stage, or to where something is wrong: then, what."""
    setup, config = work.setup, work.config
    steps, rate = schedule(setup, work.name)
    per_epoch = train.steps_per_epoch(setup.train.split.size, config.batch_size)
    state, memory, now = point
    start = now.step
    keep = work.kept(memory)
    current = work.network(keep)
    train_step, eval_step = _compiled(work, current, state, now.factor)
    taught = _teacher(work)
    compiled = device.compile_seconds()
    began = saved = time.monotonic()
    if not now.rows:  # what it begins with, which tells what the stage before has left
        found, now = _validated(work, current, eval_step, state, now)
        now = _written(work, now, {'epoch': 0.0, **work.facts(memory), **found})

    def here(**progress: Any) -> Point:
        seconds = point.progress.seconds + time.monotonic() - began
        return Point(state, memory, now._replace(seconds=seconds, **progress))

    pending: list[Mapping[str, Any]] = list(now.pending)
    extra: Mapping[str, Any] = {}
    batches = train.batches(
        setup.train,
        config.batch_size,
        setup.mesh,
        seed=setup.config.seed,
        start=start,
        stop=steps,
        crops=True,
    )
    stopwatch = watch.Stopwatch()
    batches = stopwatch.waiting(batches)
    if setup.profile and hosts.is_first():
        traces = setup.workdir / 'profile' / work.name
        left = steps - start
        batches = watch.profiled(batches, left, traces, lambda: jax.block_until_ready(state))
    for step, batch in enumerate(batches, start + 1):
        if work.steer:
            memory, extra = work.steer(step - 1, state, memory)
            if work.kept(memory) is not keep:
                state = work.narrow(meshes.gathered(state), work.kept(memory), keep)
                state = _placed(work, state, state.params)
                keep = work.kept(memory)
                current = work.network(keep)
                train_step, eval_step = _compiled(work, current, state, now.factor)
        with jax.profiler.StepTraceAnnotation(work.name, step_num=step):
            state, measured = train_step(state, batch, taught, extra)
        if step == point.progress.step + 1:
            jax.block_until_ready(measured)
            setup.display.first_step(work.name, device.compile_seconds() - compiled)
        setup.stops.hold()  # from here on there is something to save
        pending.append(measured)
        now = now._replace(step=step)
        end_of_epoch = step % per_epoch == 0 or step == steps
        due = end_of_epoch or step % setup.config.log_every == 0
        if due:
            pending = jax.device_get(pending)  # waits for the steps
            trouble = _trouble(pending, step, setup.chance)
            if end_of_epoch and not trouble and not reaching.finite(_leaves(state)):
                trouble = f'the state was not finite after step {step}'
            if trouble:
                return here(), trouble
            row = {
                'epoch': step / per_epoch,
                **_means(pending),
                **work.facts(memory),
                'learning_rate': now.factor * float(rate(step - 1)),
                **stopwatch.read(step - start, (step - start) * config.batch_size),
            }
            if now.rollbacks:
                row['rollbacks'] = len(now.rollbacks)
            if end_of_epoch:
                found, now = _validated(work, current, eval_step, state, now)
                row |= found
            now = _written(work, now, row)
            hidden = ('learning_rate', 'share_', 'lambda_', *watch.UNSHOWN)
            shown = {k: v for k, v in row.items() if not k.startswith(hidden)}
            setup.display.update(work.name, step, **shown)
            stopwatch.start()
            pending, start = [], step
            if end_of_epoch:
                now = _anchored(work, here()).progress
        asked = asked_to_stop(setup, due)
        waited = time.monotonic() - saved >= setup.config.checkpoint_seconds
        if step < steps and (asked or (due and hosts.agreed(waited))):
            _save(work, stage, here(pending=tuple(jax.device_get(pending))))
            saved = time.monotonic()
            if asked:
                raise setup.stops.stopped(f'after step {step} of {steps} of {work.name}')
    return here(pending=()), None


def asked_to_stop(setup: Setup, due: bool) -> bool:
    """Whether to save and stop after this step.

    Of several processes all stop after the same step if one was asked to, once a row is due: they
    would have to talk to each other after every step otherwise.
    """
    asked = setup.stops.asked is not None
    return asked if not hosts.several() else due and hosts.any_of(asked)


def _beginning(work: Work) -> Point:
    state = _blank(work)
    state = _placed(work, state, state.params)
    return _anchored(work, Point(state, work.memory, reaching.Progress()))


def _blank(work: Work) -> train.TrainState:
    first = work.network(work.kept(work.memory))
    return train.create_state(work.variables, _optimizer(work, first))


def _restored(work: Work, name: str, step: int, leaves: reaching.Leaves, notes: Any) -> Point:
    """Where the stage was when it was saved under this name in its folder."""
    if notes.get('origin') != work.origin:
        raise errors.CheckpointError(
            work.folder / name,
            'it was made with another config, teacher or structure; take another workdir, or '
            f'remove {work.folder} to do this stage again',
        )
    work.setup.stops.begun = True
    state, memory = _unpacked(work, leaves)
    return Point(state, memory, reaching.unpack(step, leaves, notes))


def _unpacked(work: Work, leaves: reaching.Leaves) -> tuple[train.TrainState, Any]:
    """State and memory."""
    state, memory = (checkpoint.part(leaves, key) for key in ('state', 'memory'))
    known = checkpoint.from_tree(work.memory, memory, work.folder)
    template = _blank(work)
    if work.narrow:
        template = work.narrow(template, work.kept(known), work.kept(work.memory))
    then = checkpoint.from_tree(template, state, work.folder)
    return _placed(work, then, then.params), known


def _placed(work: Work, tree: Any, params: Any) -> Any:
    return meshes.place(tree, params, work.setup.mesh, work.setup.config.sharding)


def _teacher(work: Work) -> Any:
    """The variables of the teacher, or a tuple of those of several, on the devices."""
    module, variables = work.teacher
    if module is None or module == train.AVERAGE:
        return {}
    return _placed(work, variables, features.each(variables)[0]['params'])


def _packed(work: Work, point: Point) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tree and metadata of a checkpoint."""
    tree, notes = reaching.pack(point.progress, _leaves(point.state, point.memory))
    return tree, {**notes, 'origin': work.origin}


def _save(work: Work, stage: checkpoint.Stage, point: Point, *, wait: bool = False) -> None:
    """Saves a point, unless its state is not finite: then the next row of the log will say so."""
    tree, notes = _packed(work, point)
    if reaching.finite(checkpoint.part(tree, 'state')):
        stage.save(point.progress.step, tree, notes, wait=wait)


def _leaves(state: train.TrainState, memory: Any = None) -> dict[str, np.ndarray]:
    return checkpoint.to_tree({'state': meshes.gathered(state), 'memory': memory})


def _anchored(work: Work, point: Point) -> Point:
    """The point, as one to go back to where the config says so."""
    if work.setup.config.on_nan != 'rollback':
        return point
    leaves = reaching.copied(_leaves(point.state, point.memory))
    anchor = reaching.Anchor(point.progress.step, leaves)
    return point._replace(progress=point.progress._replace(anchor=anchor))


def _gone_back(work: Work, stage: checkpoint.Stage, failed: reaching.Progress, why: str) -> Point:
    """Where to go on after something went wrong; raises TrainingError if it is not to."""
    config, setup = work.config, work.setup
    field = f'config.{part(work.name)}.learning_rate'
    times = len(failed.rollbacks)
    if failed.anchor is None or times >= setup.config.nan_times:
        newest = stage.newest()
        kept = 'no state was saved yet'
        if newest is not None:
            kept = f'the last good state is {work.folder / str(newest)}'
        tried = f', after going back {times} times' if times else ''
        also = '' if failed.anchor else ", or set config.on_nan='rollback'"
        lowered = f' (at {failed.factor:g} of it in the end)' if times else ''
        raise errors.TrainingError(
            f'{work.name}: {why}{tried}; {kept}. Lower {field}, now {config.learning_rate:g}'
            f'{lowered}{also}, and start again in another workdir'
        )
    anchor = failed.anchor
    back = {
        'from': failed.step,
        'to': anchor.step,
        'why': why,
        'factor': failed.factor * setup.config.nan_factor,
    }
    state, memory = _unpacked(work, anchor.leaves)
    now = failed._replace(
        step=anchor.step,
        rows=tuple(row for row in failed.rows if row['step'] <= anchor.step),
        pending=(),
        rollbacks=(*failed.rollbacks, back),
    )
    point = Point(state, memory, now)
    # A kill in between loses the record, and the same happens again from an earlier state.
    stage.forget(anchor.step)
    _save(work, stage, point, wait=True)
    _put_rows(work, now)
    setup.display.start(work.name, now.step)
    setup.display.message(
        f'{work.name}: {why}; going on at step {now.step} with {now.factor:g} of the learning rate'
    )
    return point


def _put_rows(work: Work, now: reaching.Progress) -> None:
    stages = work.setup.stages
    work.setup.log.put(work.name, now.rows, later=stages[stages.index(work.name) + 1 :])


def _written(work: Work, now: reaching.Progress, row: Mapping[str, Any]) -> reaching.Progress:
    row = work.setup.log.write({'stage': work.name, 'step': now.step, **row})
    return now._replace(rows=(*now.rows, row))


def _validated(
    work: Work,
    network: Network,
    eval_step: Callable[..., jax.Array],
    state: train.TrainState,
    now: reaching.Progress,
) -> tuple[dict[str, float], reaching.Progress]:
    """Metrics of the validation part; and the progress, with the best variables so far."""
    # Averages lag behind a network whose channels are being closed.
    evaluated = train.variables(state) if work.steer else train.averaged(state)
    if network.fold:
        evaluated |= {'params': network.fold(evaluated['params'], None)}
    setup = work.setup
    found = train.evaluate(
        eval_step, evaluated, setup.validation, work.config.batch_size, setup.mesh
    )
    told = {f'validation_{key}': value for key, value in found.items()}
    if not work.steer:
        whole = meshes.gathered(evaluated)
        now = now._replace(best=reaching.improved(now.best, now.step, told, whole))
    return told, now


def _optimizer(
    work: Work, network: Network, factor: float = 1.0
) -> optax.GradientTransformationExtraArgs:
    _, rate = schedule(work.setup, work.name)
    slower = rate if factor == 1 else lambda count: factor * rate(count)
    return train.optimizer(work.config, slower, *network.after)


def _compiled(
    work: Work, network: Network, state: train.TrainState, factor: float
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Training step and evaluation step."""
    setup = work.setup
    train_step = train.make_train_step(
        network.model,
        _optimizer(work, network, factor),
        work.loss,
        setup.preprocessing,
        setup.mesh,
        seed=setup.config.seed,
        ema_decay=work.config.ema_decay,
        teacher=work.teacher[0],
        fold=network.fold,
        accumulate=work.config.accumulate,
        compute_dtype=setup.config.compute_dtype,
        layout=jax.tree.map(lambda leaf: leaf.sharding, state),
    )
    return train_step, train.make_eval_step(network.model, setup.preprocessing, setup.mesh)


def _origin(given: Any, teacher_variables: Any) -> str:
    """SHA-256 of what a stage depends on; of a teacher that is read back it is the same."""
    taught = checkpoint.fingerprint(checkpoint.to_tree(meshes.gathered(teacher_variables)))
    return hashlib.sha256(json.dumps([given, taught]).encode()).hexdigest()


def _trouble(measured: Sequence[Mapping[str, Any]], step: int, chance: float) -> str | None:
    """What is wrong with the losses of the steps up to `step`, in words; None if nothing is."""
    losses = [float(one['loss']) for one in measured]
    for at, loss in enumerate(losses, step - len(losses) + 1):
        if not np.isfinite(loss):
            return f'the loss was {loss} at step {at}'
    # A sum of weighted losses is of no size that guessing could be compared with.
    mean = float(np.mean([one.get('cross_entropy', one['loss']) for one in measured]))
    if mean > ABSURD * chance:
        return (
            f'the mean loss up to step {step} was {mean:.4g}, more than {ABSURD:g} times that of '
            'guessing'
        )
    return None


def _means(measured: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {key: float(np.mean([one[key] for one in measured])) for key in measured[0]}
