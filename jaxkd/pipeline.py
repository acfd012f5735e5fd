"""The method, stage by stage: teacher → search → compact → distil → export → report.

With `config.search.expand`, what a search found is widened until the budgets are used up again, and
may be searched once more: teacher → (search → expand) × alternations → distil → export → report.

"Compact CNN Structure Learning by Knowledge Distillation" (Ahmed, Zunino, Morerio, Murino 2020,
https://arxiv.org/abs/2104.09191). Every stage writes what it has reached to the workdir, so that a
run that was stopped goes on with the same command.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
import contextlib
import functools
import math
import os
import pathlib
from typing import Any

from flax import linen as nn
from flax import traverse_util
import jax
import ml_collections
import numpy as np

from jaxkd import (
    checkpoint,
    data,
    device,
    distill,
    errors,
    features,
    hosts,
    loop,
    metrics,
    mode,
    objective,
    outcome,
    saved,
    stopping,
    train,
    watch,
)
from jaxkd import mesh as meshes
from jaxkd import plan as planning
from jaxkd import report as telling
from jaxkd import workdir as records
from jaxkd.graph import cut, structure
from jaxkd.graph import trace as tracing
from jaxkd.graph.structure import CompactModel
from jaxkd.search import blocks as blocking
from jaxkd.search import control, criteria, learn, penalty, rounds
from jaxkd.search import expand as expanding
from jaxkd.search import gates as gating
from jaxkd.search import select as selecting

# The parts of a config that a teacher does not depend on, and a search.
AFTER_TEACHER = ('search', 'distil', 'export', 'budget', 'blocks', 'inexact')
AFTER_SEARCH = ('distil', 'export')
AFTER_DISTIL = ('export',)
# Images in each of the batches that a criterion looks at: few, for `criteria.fisher`.
SMALL_BATCH = 16
# Between the seeds of several teachers: runs whose seeds follow one another share none.
SEEDS_APART = 1_000_003


def finished(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike,
    say: Callable[[str], None] = print,
) -> dict[str, Any] | None:
    """The report of a run that came to its end, if its compact network is whole; else None.

    Args:
      config, workdir: see `run`.
      say: is told what is damaged.
    """
    workdir = pathlib.Path(workdir).expanduser()

    def look() -> dict[str, Any] | None:
        found = records.finished(workdir, config, say)
        if found:
            try:
                checkpoint.read(workdir / 'compact')
            except errors.CheckpointError as error:
                say(f'{error}; it is made again')
                return None
        return found

    return hosts.first(look)


def run(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike,
    *,
    stops: stopping.Requests | None = None,
    profile: bool = False,
) -> dict[str, Any]:
    """Learns a compact structure and its weights; the report.

    Args:
      config: as `configs/mbv2.py` makes it.
      workdir: where everything is kept; made if missing, continued if it holds a stopped run.
      stops: what signals ask for; by default they do what they do.
      profile: whether to write a profiler's trace of a few steps of each stage to its `profile/`.

    Raises:
      JaxkdError: with one sentence, for whatever the user can set right.
    """
    plan = planning.make_plan(config)
    folder = pathlib.Path(workdir).expanduser()
    with prepared(config, folder, plan, stops=stops, profile=profile) as setup:
        teacher = learn_teachers(setup, plan)
        found, expansions = find_structure(setup, plan, teacher)
        check_budgets(plan, found)
        small = distil(setup, plan, teacher, found)
        hosts.first(lambda: saved.save(setup.workdir / 'compact', small))
        hosts.first(lambda: outcome.write_exports(setup, plan, teacher, small))
        return outcome.report(setup, plan, teacher, small, expansions)


@contextlib.contextmanager
def prepared(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    plan: planning.Plan,
    *,
    stops: stopping.Requests | None = None,
    profile: bool = False,
) -> Iterator[loop.Setup]:
    """The data on the devices, the workdir claimed, the log and the display open."""
    mesh = meshes.make_mesh()
    corrupt = data.CorruptImages(config.data.corrupt_limit)
    load = data.loader(config.data, config.seed, corrupt)
    learning, validation = load('train'), load('validation')
    mean, std = hosts.first(lambda: _statistics(config, learning))
    weights = planning.stages(config)
    lengths = [
        (name, loop.length(config, name, learning.size), weight) for name, weight in weights.items()
    ]
    full = plan.graph.cost()
    display = watch.Display(lengths, full={'alive_flops': full.flops, 'alive_params': full.params})
    boards = [metrics.tensorboard]
    if config.wandb:
        record = records.record(config)
        boards.append(metrics.wandb(config.wandb, record, tuple(weights), display.message))
    with contextlib.ExitStack() as open_:

        def claim() -> None:
            images = data.fingerprint((learning, validation))
            open_.enter_context(records.claimed(workdir, config, images, display.message))

        hosts.first(claim)
        log = open_.enter_context(
            hosts.at_first(lambda: metrics.MetricsLog(workdir, boards, say=display.message))
        )
        open_.enter_context(display)
        if hosts.is_first():
            corrupt.listen(functools.partial(_tell_corrupt, corrupt, workdir, display.message))
        yield loop.Setup(
            config=config,
            workdir=workdir,
            stages=tuple(weights),
            mesh=mesh,
            train=train.put(learning, mesh),
            validation=train.put(validation, mesh),
            preprocessing=train.Preprocessing(
                mean,
                std,
                config.data.padding,
                plan.info.flip and config.data.flip,
                data.make_augmentation(config.data.augment),
            ),
            chance=math.log(plan.info.num_classes),
            log=log,
            display=display,
            load=load,
            stops=stops or stopping.Requests(),
            profile=profile,
        )


def _statistics(
    config: ml_collections.ConfigDict, learning: data.Split
) -> tuple[np.ndarray, np.ndarray]:
    """Of the training images, or those that the weights of a teacher were made with."""
    if config.data.mean is None:
        return data.statistics(learning)
    return np.float32(config.data.mean), np.float32(config.data.std)


def _tell_corrupt(
    corrupt: data.CorruptImages,
    workdir: pathlib.Path,
    say: Callable[[str], None],
    new: Mapping[str, str],
) -> None:
    # With what was met before the run was stopped, which may have been repaired since.
    known = records.corrupt_images(workdir, say) | corrupt.found
    records.write_json(workdir / records.CORRUPT_IMAGES, known)
    for name, why in new.items():
        say(f'{name} cannot be read ({why}): another of its class takes its place')


def learn_teachers(setup: loop.Setup, plan: planning.Plan) -> Any:
    """The variables of the teacher, or a tuple with those of several.

    All are the full network, trained with seeds of their own, or with the weights that are given.
    The first is the one that is searched and that the compact network is compared with; what is
    taught is the mean of their logits.
    """
    if not planning.teachers(setup.config):
        _tell_parameters(setup, 'teacher', plan.weights)
        return plan.weights
    found = []
    for index, stage in enumerate(planning.teachers(setup.config)):
        config = setup.config.copy_and_resolve_references()
        config.seed = (config.seed + index * SEEDS_APART) % 2**63
        found.append(learn_teacher(setup._replace(config=config), plan, stage))
    return found[0] if len(found) == 1 else tuple(found)


def learn_teacher(setup: loop.Setup, plan: planning.Plan, stage: str = 'teacher') -> Any:
    """The full network, trained on the labels from scratch or from given weights: its variables.

    Without label smoothing, which makes for better networks and worse teachers (Müller et al.
    2019, https://arxiv.org/abs/1906.02629).
    """
    start = plan.weights
    if start is None or setup.config.teacher.fresh is not None:
        init = device.jit_once(planning.init(plan.model, plan.graph.inputs[0]))
        new = init(jax.random.key(setup.config.seed))
        new, there = map(traverse_util.flatten_dict, (new, start or {}))
        start = traverse_util.unflatten_dict(new | there)
    # Runs that differ in what comes later may share a teacher, and in how many more there are.
    given = _settings(setup.config, AFTER_TEACHER)
    del given['teacher']['number']
    if stage == 'teacher':
        _tell_parameters(setup, 'teacher', start)
    end = loop.fit(
        setup,
        stage,
        lambda _: loop.Network(plan.model),
        start,
        train.hard_loss(setup.config.teacher.label_smoothing),
        facts=lambda _: _alive(plan.graph.cost()._asdict()),
        given=given,
        teacher=(None, plan.weights or {}),
    )
    return loop.chosen(setup, stage, end)


def _tell_parameters(setup: loop.Setup, network: str, variables: Any) -> None:
    said = hosts.first(lambda: watch.overview(network, variables, setup.workdir))
    setup.display.message(said)


def find_structure(
    setup: loop.Setup, plan: planning.Plan, teacher: Any
) -> tuple[CompactModel, list[dict[str, Any]]]:
    """The compact network; and of each expansion, what the report says."""
    config = setup.config
    search = search_structure if config.search.method in planning.LEARNED else prune_in_rounds
    graph, start, found = plan.graph, features.each(teacher)[0], None
    expansions: list[dict[str, Any]] = []
    for stage in [name for name in setup.stages if loop.part(name) == 'search']:
        if found:  # search on, from the network that was widened
            graph = trace_again(config, plan, found)
        aim = planning.make_aim(config, plan, stage, graph)
        student, keep = search(setup, plan, aim, start, teacher)
        if not config.search.expand:
            return cut.compact(graph, student, keep), expansions
        small, expansion = expanding.expanded(
            graph,
            student,
            keep,
            planning.limiting(plan),
            blocks=aim.blocks,
            round_to=config.search.round_to,
            seed=config.seed,
        )
        record = structure.composed(found.structure, small.structure) if found else small.structure
        found = CompactModel(small.module, small.variables, record)
        start = small.variables
        expansions.append(
            {
                'stage': stage,
                'factor': expansion.factor,
                'held': expansion.held,
                'search': hosts.first(
                    lambda stage=stage: telling.tracking(
                        telling.search_curves(setup.workdir, stage)
                    )
                ),
            }
        )
        setup.display.message(f'{stage}: widened by {expansion.factor:.3f}')
    return found, expansions


def check_budgets(plan: planning.Plan, found: CompactModel) -> None:
    """Refuses to go on with a network that is above a budget, however it was found.

    Raises:
      BudgetError: naming the budget and what the network has.
    """
    for budget in plan.budgets:
        if budget.block or budget.resource == 'latency':  # which a run that goes on measures anew
            continue
        has = found.structure.compact[budget.resource]
        if has > budget.most * (1 + selecting.RESOLUTION):
            raise errors.BudgetError(
                f'the compact network has {has / budget.full:.3f} of the {budget.resource} of the '
                f'full one, above its budget of {budget.most / budget.full:.3f}'
            )


def trace_again(
    config: ml_collections.ConfigDict, plan: planning.Plan, found: CompactModel
) -> tracing.Graph:
    """The graph of a network that was widened, whose groups are those of the full one.

    But for those of branches that have gone: of these nothing is left to hang together.

    Raises:
      GraphError: if it hangs together differently.
    """
    inputs = plan.graph.inputs
    graph = tracing.trace(
        found.module,
        found.variables,
        *inputs,
        inexact=config.inexact,
        **mode.arguments(found.module, train=False),
    )
    kept = {name: len(group['kept']) for name, group in found.structure.groups.items()}
    sizes = {name: number for name, number in kept.items() if number}
    if graph.sizes != sizes:
        other = sorted(dict(graph.sizes.items() ^ sizes.items()))
        raise errors.GraphError(
            f'the groups {", ".join(other)} of the widened {type(plan.model).__name__} are not '
            'those of the full one, so that it cannot be searched again; '
            'set config.search.alternations=1'
        )
    return planning.measured(config, learn.rehearse(graph, blocking.left(graph, config.blocks)))


def search_structure(
    setup: loop.Setup, plan: planning.Plan, aim: planning.Aim, start: Any, teacher: Any
) -> tuple[Any, tracing.Keep]:
    """Distils the teacher into a network whose channels have to pay for what they cost.

    The network is a copy of the teacher, or one that was widened; it begins with the variables
    `start`.

    Loss: (1-α) CE + α T² KL + Σ_blocks λ · strength · Σ price · |gate| / F(all), the last as a
    proximal step and over the gates that are to close next alone. λ is steered so that the cost
    that is alive follows a schedule to the budget. `config.search.losses` may say otherwise what
    comes before the penalty.
    Which are next is a matter of what they were worth at the start, in proportion to what is left
    of their gates, and of their price. Channels that have closed are cut away when they are many
    enough. With the method 'morphnet' the loss is without a teacher, α = 0, and worth is the size
    of gates (Gordon et al. 2018, https://arxiv.org/abs/1711.06798).

    Returns:
      The student's variables, at the widths of its graph, and what to keep of them.
    """
    config, graph = setup.config.search, aim.graph
    loss, worth = _taught_loss(setup, plan, aim.stage), config.worth
    if config.method == 'morphnet':
        loss, worth = _soft_loss(0.0, config.temperature), 'gates'
    steps, schedule = loop.schedule(setup, aim.stage)
    course = learn.course(
        graph,
        steps=steps,
        learning_rate=schedule,
        ramp=config.ramp,
        gates=config.gates,
        coupling=config.coupling,
        shrink=config.shrink,
        blocks=aim.blocks,
        round_to=config.round_to,
        min_keep=config.min_keep,
        **aim.budget,
    )
    body = learn.follow(course)
    whole = learn.body(course, graph.keep_all())

    def network(keep: tracing.Keep) -> loop.Network:
        found = body(keep)
        paid = penalty.proximal(found.gates, schedule, config.coupling)
        return loop.Network(found.module, (paid,), functools.partial(gating.fold, found.gates))

    student = {**start, 'params': gating.gated(course.gates, start['params'])}

    def steer(step: int, state: train.TrainState, memory: control.State):
        if step % course.period == 0:  # between two rounds of control nothing is looked at
            params = meshes.gathered(state.params)
            if not step and worth != 'gates':
                scores = hosts.first(
                    lambda: criteria.CRITERIA[worth](
                        graph, jax.device_get(start), evidence(setup, graph.model, worth)
                    )
                )
                memory = learn.first(whole, params, scores)
            memory = hosts.agreed(learn.press(body(memory.physical), step, params, memory))
        return memory, {'strength': learn.strength(body(memory.physical), memory)}

    def facts(memory: control.State) -> dict[str, float]:
        cost = graph.cost(control.alive(graph, memory))
        return {
            **_alive(cost._asdict()),
            'physical_flops': graph.cost(memory.physical).flops,
            'lambda': float(memory.penalty.sum()),
            **control.record(cost, memory, course.budgets),
        }

    end = loop.fit(
        setup,
        aim.stage,
        network,
        student,
        loss,
        facts=facts,
        given=[_settings(setup.config, AFTER_SEARCH), graph.sizes],
        teacher=(plan.model, teacher),
        memory=learn.first(whole, student['params']),
        steer=steer,
        kept=lambda memory: memory.physical,
        narrow=functools.partial(learn.narrow, graph),
    )
    hosts.first(
        lambda: telling.plot_search(
            telling.search_curves(setup.workdir, aim.stage),
            setup.workdir / f'{aim.stage}.png',
            say=setup.display.message,
        )
    )
    found = body(end.memory.physical)
    student = learn.whole(found, train.variables(end.state), start)
    keep = hosts.agreed(learn.choose(found, end.state.params, end.memory))
    opened = gating.reopen(course.gates, student['params'], keep, start['params'])
    return {**student, 'params': opened}, keep


def prune_in_rounds(
    setup: loop.Setup, plan: planning.Plan, aim: planning.Aim, start: Any, teacher: Any
) -> tuple[Any, tracing.Keep]:
    """Cuts a network by a criterion, in rounds, and distils the teacher into the rest.

    The network is a copy of the teacher, or one that was widened; it begins with the variables
    `start`. As long as a search, and with its loss, so that the two can be compared.

    Returns:
      The student's variables, at the widths of its graph, and what to keep of them.
    """
    config, graph = setup.config.search, aim.graph
    budgets = blocking.budgets(graph, aim.blocks, **aim.budget)
    steps, _ = loop.schedule(setup, aim.stage)

    def network(keep: tracing.Keep) -> loop.Network:
        return loop.Network(cut.narrowed(graph, keep)[0])

    def steer(step: int, state: train.TrainState, keep: tracing.Keep):
        progress = rounds.due(step, steps, config.rounds)
        if progress is not None:
            variables, there = meshes.gathered(train.variables(state)), keep
            keep = hosts.first(
                lambda: rounds.cut_down(
                    graph,
                    jax.device_get(variables),
                    there,
                    config.method,
                    evidence(setup, network(there).model, config.method),
                    budgets,
                    progress,
                    blocks=aim.blocks,
                    round_to=config.round_to,
                    min_keep=config.min_keep,
                )
            )
        return keep, {}

    end = loop.fit(
        setup,
        aim.stage,
        network,
        start,
        _taught_loss(setup, plan, aim.stage),
        facts=lambda keep: _alive(graph.cost(keep)._asdict()),
        given=[_settings(setup.config, AFTER_SEARCH), graph.sizes],
        teacher=(plan.model, teacher),
        memory=graph.keep_all(),
        steer=steer,
        kept=lambda keep: keep,
        narrow=functools.partial(cut.cut, graph),
    )
    return cut.restore(graph, train.variables(end.state), end.memory, start), end.memory


def evidence(setup: loop.Setup, model: nn.Module, criterion: str) -> criteria.Evidence:
    """What a criterion measures a network with: its loss on small batches of training images.

    Without images for criteria that look at none. On one device, however many there are.
    """
    mesh = meshes.alone()
    images = train.batches(
        setup.train._replace(images=None),
        min(SMALL_BATCH, setup.train.split.size),
        mesh,
        seed=setup.config.seed,
        start=0,
        stop=criteria.BATCHES if criterion in criteria.ON_DATA else 0,
    )
    loss = train.make_loss(model, setup.preprocessing, mesh)
    return criteria.Evidence(loss, tuple(images), setup.config.seed)


def distil(
    setup: loop.Setup, plan: planning.Plan, teacher: Any, small: CompactModel
) -> CompactModel:
    """Trains the compact network on, or from scratch, under the same teacher.

    Or taught by its own moving average. What adapts its features to the teacher's is trained with
    it and left behind.
    """
    config = setup.config.distil
    views = setup.preprocessing._replace(augmentation=planning.distil_augmentation(setup.config))
    setup = setup._replace(preprocessing=views)
    _tell_parameters(setup, 'student', small.variables)
    start = small.variables
    if config.init == 'scratch':
        init = device.jit_once(planning.init(small.module, plan.graph.inputs[0]))
        start = init(jax.random.fold_in(jax.random.key(setup.config.seed), 1))
    if config.recalibrate:
        start = train.recalibrate(
            small.module,
            start,
            setup.train,
            setup.preprocessing,
            setup.mesh,
            batch_size=config.batch_size,
            steps=config.recalibrate,
            compute_dtype=setup.config.compute_dtype,
        )
    own = config.teacher == train.AVERAGE
    adapters = {} if own else make_adapters(setup, plan, small)
    network = loop.Network(small.module)
    if adapters:
        start = {**start, 'params': {**start['params'], features.ADAPTERS: adapters}}
        network = loop.Network(small.module, fold=features.without_adapters)
    end = loop.fit(
        setup,
        'distil',
        lambda _: network,
        start,
        _taught_loss(setup, plan, 'distil'),
        facts=lambda _: _alive(small.structure.compact),
        given=[_settings(setup.config, AFTER_DISTIL), small.structure.to_json()],
        teacher=(train.AVERAGE if own else plan.model, teacher),
    )
    return CompactModel(small.module, loop.chosen(setup, 'distil', end), small.structure)


def make_adapters(setup: loop.Setup, plan: planning.Plan, small: CompactModel) -> dict[str, Any]:
    """New adapters of the features of the compact network that have lost or won channels."""
    names = objective.adapted(plan.losses['distil'])
    if not names:
        return {}
    image = plan.graph.inputs[0]
    student = features.shapes(small.module, small.variables, image)
    teacher = features.shapes(plan.model, plan.graph.variables, image)
    key = jax.random.fold_in(jax.random.key(setup.config.seed), 2)
    return features.adapters(
        {name: student[name] for name in student if name in names}, teacher, key
    )


def _settings(config: ml_collections.ConfigDict, without: Collection[str]) -> dict[str, Any]:
    """What a stage depends on of the config: runs that differ in the rest may share its folder.

    What is not set is left out, so that a field that is new parts no run from what it has reached.
    """
    record = records.record(config)
    return {part: _set(value, part) for part, value in record.items() if part not in without}


def _set(value: Any, path: str) -> Any:
    """A record without the fields that are None, and with what stands for those that may change."""
    if not isinstance(value, Mapping):
        return records.FREE.get(path, value)
    return {
        name: _set(inner, f'{path}.{name}') for name, inner in value.items() if inner is not None
    }


def _taught_loss(
    setup: loop.Setup, plan: planning.Plan, stage: str
) -> train.Loss | train.Objective:
    """What a stage with a teacher minimizes."""
    config, terms = loop.settings(setup.config, stage), plan.losses[loop.part(stage)]
    if terms:
        return objective.objective(terms, loop.schedule(setup, stage)[0])
    return _soft_loss(config.alpha, config.temperature)


def _soft_loss(alpha: float, temperature: float) -> train.Loss:
    def loss(logits, teacher_logits, labels):
        return distill.distillation(
            logits, teacher_logits, labels, alpha=alpha, temperature=temperature
        )

    return loss


def _alive(cost: Mapping[str, int]) -> dict[str, int]:
    return {'alive_flops': cost['flops'], 'alive_params': cost['params']}
