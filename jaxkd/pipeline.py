"""The method, stage by stage: teacher → search → compact → distil → report.

"Compact CNN Structure Learning by Knowledge Distillation" (Ahmed, Zunino, Morerio, Murino 2020,
https://arxiv.org/abs/2104.09191). Every stage writes what it has reached to the workdir, so that a
run that was stopped goes on with the same command.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import time
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from jaxkd import checkpoint, data, distill, errors, models, saved, train, watch
from jaxkd.graph import cut, structure
from jaxkd.graph import trace as tracing
from jaxkd.search import blocks as blocking
from jaxkd.search import control, gates, penalty
from jaxkd.search import select as selecting

STAGES = ('teacher', 'search', 'distil')
# Rounds of control on the way down to the budget, and how many of them λ looks ahead.
ROUNDS, LOOKAHEAD = 200, 40
# Passes over the batch when inference is timed, networks taking turns.
TIMINGS = 20


class Run(NamedTuple):
    """What all stages share."""

    config: ml_collections.ConfigDict
    workdir: pathlib.Path
    mesh: jax.sharding.Mesh
    model: nn.Module
    train: train.Examples
    validation: train.Examples
    preprocessing: train.Preprocessing
    graph: tracing.Graph
    limits: Mapping[str, blocking.Limits]
    budget: Mapping[str, float]
    log: watch.MetricsLog
    display: watch.Display


def run(config: ml_collections.ConfigDict, workdir: str | os.PathLike) -> dict[str, Any]:
    """Learns a compact structure and its weights; the report.

    Args:
      config: as `configs/mbv2.py` makes it.
      workdir: where everything is kept; made if missing, continued if it holds a stopped run.

    Raises:
      JaxkdError: with one sentence, for whatever the user can set right.
    """
    workdir = pathlib.Path(workdir)
    finished = _read_report(workdir, config)
    if finished:
        return finished
    mesh = train.make_mesh()
    model, info, graph, limits, budget = _plan(config)
    part = {
        name: data.load(
            config.data.name,
            name,
            seed=config.seed,
            validation=config.data.validation,
            labels=config.data.labels,
            data_dir=config.data.dir,
        )
        for name in ('train', 'validation')
    }
    mean, std = data.statistics(part['train'])
    lengths = [
        (name, _steps(config[name], part['train']), weight)
        for name, weight in zip(STAGES, (1.0, 1.3, 0.9), strict=True)
    ]
    full = {
        f'alive_{resource}': getattr(graph.cost(), resource) for resource in ('flops', 'params')
    }
    with watch.MetricsLog(workdir) as log, watch.Display(lengths, full=full) as display:
        run_ = Run(
            config=config,
            workdir=workdir,
            mesh=mesh,
            model=model,
            train=train.put(part['train'], mesh),
            validation=train.put(part['validation'], mesh),
            preprocessing=train.Preprocessing(
                mean, std, config.data.padding, info.flip and config.data.flip
            ),
            graph=graph,
            limits=limits,
            budget=budget,
            log=log,
            display=display,
        )
        teacher = learn_teacher(run_)
        student, scores = search_structure(run_, teacher)
        keep = selecting.select(graph, scores, **config.budget, blocks=_blocks(config))
        small = cut.compact(graph, student, keep)
        small = distil(run_, teacher, small)
        saved.save(workdir / 'compact', small)
        return report(run_, teacher, small)


def learn_teacher(run: Run) -> Any:
    """The full network, trained on the labels: its variables.

    Without label smoothing, which makes for better networks and worse teachers (Müller et al.
    2019, https://arxiv.org/abs/1906.02629).
    """
    config = run.config.teacher
    inputs = jnp.zeros((1, *run.graph.inputs[0].shape[1:]))
    init = jax.jit(lambda key: run.model.init(key, inputs, train=False))
    state, _ = _fit(
        run,
        'teacher',
        run.model,
        init(jax.random.key(run.config.seed)),
        train.hard_loss(config.label_smoothing),
        cost=run.graph.cost(),
    )
    return train.averaged(state)


def search_structure(run: Run, teacher: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """Distils the teacher into a copy of itself whose channels have to pay for what they cost.

    Returns:
      The student's variables, and the score of every unit: how far its gate is from closing.
    """
    config = run.config.search
    found = gates.find(run.graph)
    steps, schedule = _schedule(run, 'search')
    rates = np.asarray(schedule(np.arange(2 * steps)))
    down = max(1, round(config.ramp * steps))
    period = max(1, down // ROUNDS)
    effort = jax.jit(lambda params: gates.effort(found, params, config.coupling))

    def steer(step: int, state: train.TrainState, memory: control.State) -> control.State:
        if step % period:
            return memory
        return control.decide(
            run.graph,
            memory,
            jax.device_get(effort(state.params)),
            run.limits,
            run.budget,
            progress=step / down,
            horizon=LOOKAHEAD * period / down,
            period=period / down,
            rate=float(rates[step : step + LOOKAHEAD * period].sum()),
        )

    state, _ = _fit(
        run,
        'search',
        run.model,
        teacher,
        _soft_loss(config),
        penalty.proximal(found, schedule, config.coupling),
        teacher=teacher,
        memory=control.initial(jax.device_get(effort(teacher['params']))),
        steer=steer,
    )
    scores = jax.device_get(effort(state.params))
    return train.variables(state), scores


def distil(run: Run, teacher: Any, small: structure.CompactModel) -> structure.CompactModel:
    """Trains the compact network on, under the same teacher."""
    state, _ = _fit(
        run,
        'distil',
        small.module,
        small.variables,
        _soft_loss(run.config.distil),
        teacher=teacher,
        cost=small.structure.compact,
    )
    return structure.CompactModel(small.module, train.averaged(state), small.structure)


def report(run: Run, teacher: Any, small: structure.CompactModel) -> dict[str, Any]:
    """Reads the test part, for the first and last time, and writes down what came out."""
    config = run.config
    test = train.put(data.load(config.data.name, 'test', data_dir=config.data.dir), run.mesh)
    batch_size = config.distil.batch_size
    networks = {
        'teacher': (run.model, teacher, run.graph.cost()._asdict()),
        'compact': (small.module, small.variables, small.structure.compact),
    }
    rows: dict[str, dict[str, Any]] = {}
    inference = {}
    for name, (module, variables, cost) in networks.items():
        step = train.make_eval_step(module, run.preprocessing, run.mesh)
        accuracy = train.evaluate(step, variables, test, batch_size, run.mesh)['accuracy']
        batch = train.make_batch(test, np.arange(batch_size) % test.split.size, run.mesh)
        inference[name] = functools.partial(step, variables, batch, np.ones(batch_size, bool))
        plain = jax.jit(functools.partial(module.apply, train=False))
        one = jax.ShapeDtypeStruct((1, *run.graph.inputs[0].shape[1:]), jnp.float32)
        analysis = plain.lower(variables, one).compile().cost_analysis() or {}
        rows[name] = {
            'accuracy': accuracy,
            **{resource: cost[resource] for resource in ('flops', 'params', 'activations')},
            'xla_flops': analysis.get('flops'),
        }
    for name, milliseconds in _time(inference).items():
        rows[name]['milliseconds'] = milliseconds

    result = {
        **rows,
        'budget': {r: b for r, b in config.budget.items() if b not in (None, 1)},
        'reached': {
            r: rows['compact'][r] / rows['teacher'][r] for r in ('flops', 'params', 'activations')
        },
        'blocks': [
            {'group': g.name, 'block': run.limits[g.name].block, 'size': g.size, 'kept': kept}
            for g in run.graph.groups
            for kept in [len(small.structure.groups[g.name]['kept'])]
        ],
        'seconds': _seconds(run.workdir),
        'input_shape': list(run.graph.inputs[0].shape[1:]),
        'inference_batch': batch_size,
        'config': _record(config),
        'seed': config.seed,
        'versions': _versions(),
        'device': f'{jax.device_count()} × {jax.devices()[0].device_kind}',
    }
    _write_json(run.workdir / 'report.json', result)
    return result


def _soft_loss(config: ml_collections.ConfigDict) -> train.Loss:
    def loss(logits, teacher_logits, labels):
        return distill.distillation(
            logits, teacher_logits, labels, alpha=config.alpha, temperature=config.temperature
        )

    return loss


def _fit(
    run: Run,
    name: str,
    model: nn.Module,
    variables: Any,
    loss: train.Loss,
    *after: Any,
    teacher: Any = None,
    cost: Any = None,
    memory: control.State | None = None,
    steer: Callable[[int, train.TrainState, Any], Any] | None = None,
) -> tuple[train.TrainState, Any]:
    """Trains for a stage's number of steps, from where its last checkpoint was left.

    Args:
      run: the run.
      name: of the stage, and of its part of the config.
      model, variables: the network to train, and what it starts from.
      loss: see `train.Loss`.
      *after: gradient transformations after the optimizer's.
      teacher: variables of the teacher, if there is one.
      cost: what the network costs, for the log; with `steer` the alive cost is logged.
      memory, steer: the controller's state, and its round `(step, state, memory) -> memory`.

    Returns:
      The last state, and the last memory.
    """
    config = run.config[name]
    steps, schedule = _schedule(run, name)
    tx = train.optimizer(config, schedule, *after)
    state = train.replicate(train.create_state(variables, tx), run.mesh)
    stage = checkpoint.Stage(run.workdir / name)
    try:
        finished = stage.result()
        if finished:
            tree, _ = finished
            state, memory = checkpoint.from_tree((state, memory), tree)
            run.display.finish(name)
            return train.replicate(state, run.mesh), memory

        start, elapsed = 0, 0.0
        restored = stage.restore()
        if restored:
            start, tree, facts = restored
            state, memory = checkpoint.from_tree((state, memory), tree)
            state = train.replicate(state, run.mesh)
            elapsed = facts['seconds']
            run.display.message(f'{name}: going on at step {start} of {steps}')
        run.log.rewind(name, start, later=STAGES[STAGES.index(name) + 1 :])
        run.display.start(name, start)

        teacher = train.replicate(teacher or {}, run.mesh)
        train_step = train.make_train_step(
            model,
            tx,
            loss,
            run.preprocessing,
            run.mesh,
            seed=run.config.seed,
            ema_decay=config.ema_decay,
            teacher=run.model if teacher else None,
        )
        eval_step = train.make_eval_step(model, run.preprocessing, run.mesh)
        per_epoch = train.steps_per_epoch(run.train.split.size, config.batch_size)
        pending: list[dict[str, jax.Array]] = []
        began = logged = saved = time.monotonic()
        batches = train.batches(
            run.train, config.batch_size, run.mesh, seed=run.config.seed, start=start, stop=steps
        )
        for step, batch in enumerate(batches, start + 1):
            extra = {}
            if steer:
                memory = steer(step - 1, state, memory)
                extra = {'strength': memory.strength}
            state, metrics = train_step(state, batch, teacher, extra)
            pending.append(metrics)
            end_of_epoch = step % per_epoch == 0 or step == steps
            if not end_of_epoch and step % run.config.log_every:
                continue

            means = _means(pending)  # waits for the steps
            now = time.monotonic()
            if not np.isfinite(means['loss']):
                stage.wait()
                raise errors.TrainingError(
                    f'{name}: the loss was {means["loss"]} at step {step}; the last good state is '
                    f'in {stage.directory}. Lower config.{name}.learning_rate '
                    f'(now {config.learning_rate:g}) and start again in another workdir'
                )
            alive = run.graph.cost(control.alive(run.graph, memory))._asdict() if steer else cost
            row = {
                'stage': name,
                'step': step,
                'epoch': step / per_epoch,
                **means,
                'learning_rate': float(schedule(step - 1)),
                'alive_flops': _get(alive, 'flops'),
                'alive_params': _get(alive, 'params'),
                'examples_per_second': len(pending) * config.batch_size / (now - logged),
            }
            if steer:
                row['lambda'] = float(memory.penalty)
            if end_of_epoch:
                kind = train.variables if steer else train.averaged
                validation = train.evaluate(
                    eval_step, kind(state), run.validation, config.batch_size, run.mesh
                )
                row |= {f'validation_{key}': value for key, value in validation.items()}
            pending, logged = [], time.monotonic()
            run.log.write(row)
            run.display.update(
                name,
                step,
                **{k: v for k, v in row.items() if k not in ('stage', 'step', 'learning_rate')},
            )
            if logged - saved >= run.config.checkpoint_seconds and step < steps:
                facts = {'seconds': elapsed + logged - began}
                stage.save(step, checkpoint.to_tree((state, memory)), facts)
                saved = time.monotonic()

        facts = {'seconds': elapsed + time.monotonic() - began}
        stage.finish(checkpoint.to_tree((state, memory)), facts)
        run.display.finish(name)
        return state, memory
    finally:
        stage.close()


def _get(cost: Any, resource: str) -> int:
    return cost[resource] if isinstance(cost, Mapping) else getattr(cost, resource)


def _means(metrics: list[dict[str, jax.Array]]) -> dict[str, float]:
    fetched = jax.device_get(metrics)
    return {key: float(np.mean([m[key] for m in fetched])) for key in fetched[0]}


def _steps(config: ml_collections.ConfigDict, split: data.Split) -> int:
    return max(1, round(config.epochs * train.steps_per_epoch(split.size, config.batch_size)))


def _schedule(run: Run, name: str) -> tuple[int, Callable[..., Any]]:
    """Length of a stage in steps, and its learning rate."""
    config = run.config[name]
    steps = _steps(config, run.train.split)
    per_epoch = train.steps_per_epoch(run.train.split.size, config.batch_size)
    return steps, train.learning_rate(config, steps, per_epoch)


def _blocks(config: ml_collections.ConfigDict) -> blocking.Blocks:
    try:
        return [(str(pattern), dict(settings)) for pattern, settings in config.blocks]
    except (TypeError, ValueError):
        raise errors.ConfigError(
            'blocks',
            config.blocks,
            why="it must be a tuple of pairs, such as (('block1/', {'strength': 2.0}),)",
        ) from None


def _plan(config: ml_collections.ConfigDict) -> tuple[Any, ...]:
    """What can be known before anything is trained, and refused."""
    info = data.info(config.data.name)
    if config.model.name not in models.REGISTRY:
        raise errors.ConfigError('model.name', config.model.name, allowed=models.REGISTRY)
    model = models.create(config.model.name, num_classes=info.num_classes, **config.model.arguments)
    image = jax.ShapeDtypeStruct((1, *info.image_shape), jnp.float32)
    variables = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros(image.shape), train=False)
    )
    graph = tracing.trace(model, variables, image, train=False)
    blocks = _blocks(config)
    limits = blocking.resolve(graph, blocks)
    budget = blocking.budgets(graph, **config.budget)
    gated = gates.find(graph)
    smallest = {
        name: alive if name in gated else np.ones_like(alive)
        for name, alive in blocking.least(graph, limits).items()
    }
    blocking.check_reachable(graph, limits, budget, smallest)
    for name in STAGES:
        devices = jax.device_count()
        if config[name].batch_size % devices:
            raise errors.ConfigError(
                f'{name}.batch_size',
                config[name].batch_size,
                why=f'it must be a multiple of the number of devices, {devices}',
            )
    return model, info, graph, limits, budget


def _record(config: ml_collections.ConfigDict) -> dict[str, Any]:
    return json.loads(config.to_json_best_effort())


def _claim(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Makes the workdir this config's, or refuses one that is another's."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not os.access(workdir, os.W_OK):
            raise PermissionError(f'no permission to write in {workdir}')
    except OSError as error:
        raise errors.ConfigError(
            '--workdir', str(workdir), why=f'it cannot be written: {error.strerror or error}'
        ) from None
    path = workdir / 'config.json'
    if path.exists():
        _check_same(path, config)
    else:
        _write_json(path, {'config': _record(config), 'versions': _versions()})


def _check_same(path: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    try:
        known = _flat(json.loads(path.read_text())['config'])
    except (OSError, ValueError, KeyError) as error:
        raise errors.CheckpointError(path, f'is no config of a run ({error})') from None
    now = _flat(_record(config))
    differing = [
        f'{key} ({known.get(key)!r} there, {now.get(key)!r} now)'
        for key in sorted(known.keys() | now.keys())
        if known.get(key) != now.get(key)
    ]
    if differing:
        raise errors.ConfigError(
            '--workdir',
            str(path.parent),
            why='it belongs to a run with another config; take another workdir, or set back '
            + ', '.join(differing),
        )


def _flat(tree: Any, prefix: str = '') -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {
        path: leaf
        for key, value in tree.items()
        for path, leaf in _flat(value, f'{prefix}.{key}' if prefix else key).items()
    }


def _read_report(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> dict[str, Any] | None:
    """The report of a finished run, or None."""
    if not (workdir / 'report.json').exists():
        return None
    _check_same(workdir / 'config.json', config)
    return json.loads((workdir / 'report.json').read_text())


def _write_json(path: pathlib.Path, record: Any) -> None:
    """Whole or not at all."""
    aside = path.with_suffix('.tmp')
    aside.write_text(json.dumps(record, indent=2) + '\n')
    aside.replace(path)


def _seconds(workdir: pathlib.Path) -> dict[str, float]:
    """Training time of each stage, over all the runs that it took."""
    result = {}
    for name in STAGES:
        stage = checkpoint.Stage(workdir / name)
        result[name] = stage.result()[1]['seconds']
        stage.close()
    return result


def _time(calls: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Median milliseconds of each call; they take turns, so that a busy machine hurts all alike."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(TIMINGS + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if repetition:  # the first one compiles
                taken[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(times) for name, times in taken.items()}


def _versions() -> dict[str, str]:
    packages = ('jaxkd', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
    found = {'python': platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = 'not installed'
    return found
