"""The method, stage by stage: teacher → search → compact → distil → export → report.

With `config.search.expand`, what a search found is widened until the budgets are used up again, and
may be searched once more: teacher → (search → expand) × alternations → distil → export → report.

"Compact CNN Structure Learning by Knowledge Distillation" (Ahmed, Zunino, Morerio, Murino 2020,
https://arxiv.org/abs/2104.09191). Every stage writes what it has reached to the workdir, so that a
run that was stopped goes on with the same command.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import re
import statistics
from typing import Any, NamedTuple

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from jaxkd import (
    checkpoint,
    convert,
    data,
    distill,
    errors,
    export,
    features,
    hosts,
    loop,
    metrics,
    mode,
    network,
    objective,
    precision,
    saved,
    stopping,
    train,
    watch,
)
from jaxkd import mesh as meshes
from jaxkd import report as telling
from jaxkd import workdir as records
from jaxkd.graph import cut, latency, structure
from jaxkd.graph import trace as tracing
from jaxkd.graph.structure import CompactModel
from jaxkd.search import blocks as blocking
from jaxkd.search import control, criteria, learn, penalty, rounds
from jaxkd.search import expand as expanding
from jaxkd.search import gates as gating
from jaxkd.search import select as selecting

# What one step of a stage costs beside the teacher's, for the ETA; later searches begin smaller.
WEIGHTS = {'teacher': 1.0, 'search': 1.3, 'distil': 0.9}
LATER = 1.0
# How a structure is found: by gates, with the teacher or without, or by one of the criteria.
LEARNED = ('learn', 'morphnet')
# What the words in a config may be.
CHOICES = {
    'search': {
        'method': (*LEARNED, *criteria.CRITERIA),
        'worth': (*criteria.MEASURES, 'gates'),
        'gates': gating.KINDS,
        'coupling': gating.COUPLINGS,
    },
    'distil': {
        'init': ('search', 'scratch'),
        'choose': loop.CHOICES,
        'teacher': ('teacher', train.AVERAGE),
    },
    'teacher': {'choose': loop.CHOICES},
}
# The parts of a config that a teacher does not depend on, and a search.
AFTER_TEACHER = ('search', 'distil', 'export', 'budget', 'blocks', 'inexact')
AFTER_SEARCH = ('distil', 'export')
AFTER_DISTIL = ('export',)
# Images in each of the batches that a criterion looks at: few, for `criteria.fisher`.
SMALL_BATCH = 16
# How often inference is timed, the networks taking turns.
TIMINGS = 20


class Plan(NamedTuple):
    """What is known before anything is trained.

    Attributes:
      model: the full network.
      info: of the data set.
      graph: of the model, on one image; with latency where there is a budget in it.
      limits: what the blocks mean for each channel group.
      budgets: that set a limit.
      losses: of search and distillation where the config lists them; else empty.
      weights: that the teacher begins with, or has; None where it is trained from scratch.
        Without those of the layers that begin anew.
    """

    model: nn.Module
    info: data.Info
    graph: tracing.Graph
    limits: Mapping[str, blocking.Limits]
    budgets: Sequence[blocking.Budget]
    losses: Mapping[str, Sequence[objective.Term]]
    weights: Any = None


class Aim(NamedTuple):
    """What one search is after.

    Attributes:
      stage: its name.
      graph: of the network that it begins with.
      budget: by resource, a share of that network, or an absolute number above 1.
      blocks: with budgets of their own in the same terms.
    """

    stage: str
    graph: tracing.Graph
    budget: Mapping[str, float]
    blocks: blocking.Blocks


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
    workdir = pathlib.Path(workdir)

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
    plan = make_plan(config)
    folder = pathlib.Path(workdir)
    with prepared(config, folder, plan, stops=stops, profile=profile) as setup:
        teacher = learn_teachers(setup, plan)
        found, expansions = find_structure(setup, plan, teacher)
        small = distil(setup, plan, teacher, found)
        hosts.first(lambda: saved.save(setup.workdir / 'compact', small))
        hosts.first(lambda: write_exports(setup, plan, teacher, small))
        return report(setup, plan, teacher, small, expansions)


@contextlib.contextmanager
def prepared(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    plan: Plan,
    *,
    stops: stopping.Requests | None = None,
    profile: bool = False,
) -> Iterator[loop.Setup]:
    """The data on the devices, the workdir claimed, the log and the display open."""
    mesh = meshes.make_mesh()
    corrupt = data.CorruptImages(config.data.corrupt_limit)
    load = functools.partial(
        data.load,
        config.data.name,
        seed=config.seed,
        validation=config.data.validation,
        labels=config.data.labels,
        data_dir=config.data.dir,
        image_size=config.data.image_size,
        crop=config.data.crop,
        workers=config.data.workers,
        corrupt=corrupt,
    )
    learning, validation = load('train'), load('validation')
    mean, std = hosts.first(lambda: _statistics(config, learning))
    weights = stages(config)
    lengths = [
        (name, loop.length(loop.settings(config, name), learning.size), weight)
        for name, weight in weights.items()
    ]
    full = plan.graph.cost()
    display = watch.Display(lengths, full={'alive_flops': full.flops, 'alive_params': full.params})
    boards = [metrics.tensorboard]
    if config.wandb:
        record = records.record(config)
        boards.append(metrics.wandb(config.wandb, record, tuple(weights), display.message))
    with contextlib.ExitStack() as open_:
        hosts.first(lambda: open_.enter_context(records.claimed(workdir, config, display.message)))
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


def stages(config: ml_collections.ConfigDict) -> dict[str, float]:
    """The stages that train, in order, and the weight of their steps for the ETA."""
    number = config.search.alternations if config.search.expand else 1
    later = {f'search{i}': LATER for i in range(2, number + 1)}
    return {
        **dict.fromkeys(teachers(config), WEIGHTS['teacher']),
        'search': WEIGHTS['search'],
        **later,
        'distil': WEIGHTS['distil'],
    }


def teachers(config: ml_collections.ConfigDict) -> list[str]:
    """The stages that make a teacher each: 'teacher', 'teacher2', …; none where it is given."""
    if config.teacher.checkpoint and not config.teacher.tune_epochs:
        return []
    return ['teacher', *(f'teacher{i}' for i in range(2, config.teacher.number + 1))]


def make_plan(config: ml_collections.ConfigDict) -> Plan:
    """Builds the model, traces it, and refuses what cannot be, before anything is trained."""
    info = data.info(config.data.name, config.data.image_size)
    for stage, choices in CHOICES.items():
        for field, allowed in choices.items():
            if config[stage][field] not in allowed:
                raise errors.ConfigError(f'{stage}.{field}', config[stage][field], allowed=allowed)
    if config.compute_dtype not in precision.DTYPES:
        raise errors.ConfigError('compute_dtype', config.compute_dtype, allowed=precision.DTYPES)
    export.check_formats('export', config.export)
    data.make_augmentation(config.data.augment)
    distil_augmentation(config)
    _check_batches(config)
    _check_safety(config)
    _check_teacher(config)
    _check_statistics(config, info)
    _check_expansion(config)
    given = config.model.arguments.to_dict()
    model = network.make(
        config.model.name,
        given,
        defaults={'num_classes': info.num_classes},
        fields=('model.name', 'model.arguments'),
    )
    image = jax.ShapeDtypeStruct((1, *info.image_shape), jnp.float32)
    try:
        variables = jax.eval_shape(_init(model, image), jax.random.key(0))
        logits = jax.eval_shape(
            lambda *given: features.outputs(model, *given)[0].logits, variables, image
        )
    except Exception as error:  # the user's code can raise anything
        why = f'{type(model).__name__} cannot be called with an image of shape {image.shape[1:]}: '
        raise errors.ConfigError('model.arguments', given, why=why + errors.words(error)) from error
    _check_network(config, model, variables, logits, info)
    meshes.check(config.sharding, variables['params'], meshes.make_mesh())
    losses = _losses(config, functools.cache(lambda: features.shapes(model, variables, image)))
    graph = tracing.trace(
        model, variables, image, inexact=config.inexact, **mode.arguments(model, train=False)
    )
    limits = blocking.resolve(graph, config.blocks)
    learn.rehearse(graph, limits)
    graph = measured(config, graph)
    budgets = blocking.budgets(graph, config.blocks, **config.budget)
    weights = _weights(config, model, variables)
    plan = Plan(model, info, graph, limits, budgets, losses, weights)
    # A budget that no choice can meet is refused now.
    aim = make_aim(config, plan, 'search', graph)
    selecting.floor(
        graph,
        config.search.min_keep,
        blocks=aim.blocks,
        round_to=config.search.round_to,
        **aim.budget,
    )
    return plan


def _losses(
    config: ml_collections.ConfigDict, shapes: Callable[[], Mapping[str, objective.Shape]]
) -> dict[str, Sequence[objective.Term]]:
    """The losses of search and distillation, checked."""
    losses = {
        stage: objective.terms(
            f'{stage}.losses', config[stage].losses, shapes, adapters=stage == 'distil'
        )
        for stage in ('search', 'distil')
    }
    if losses['search'] and config.search.method == 'morphnet':
        why = "a search with the method 'morphnet' is without a teacher"
        raise errors.ConfigError('search.losses', config.search.losses, why=why)
    return losses


def _init(model: nn.Module, image: jax.ShapeDtypeStruct) -> Callable[[jax.Array], Any]:
    """The function that makes the model's variables of a key."""
    evaluating = mode.arguments(model, train=False)
    return lambda key: model.init(key, jnp.zeros(image.shape, image.dtype), **evaluating)


def _check_network(
    config: ml_collections.ConfigDict,
    model: nn.Module,
    variables: Any,
    logits: jax.ShapeDtypeStruct,
    info: data.Info,
) -> None:
    """Refuses a network whose variables or outputs are none that can be trained here."""
    wanted = (1, info.num_classes)
    if logits.shape != wanted:
        why = (
            f'its logits are of shape {logits.shape}; {config.data.name}, with '
            f'{info.num_classes} classes, needs {wanted}'
        )
        raise errors.ConfigError('model.name', config.model.name, why=why)
    other = sorted(variables.keys() - {'params', 'batch_stats'})
    if other:
        why = (
            f'{type(model).__name__} has variables in {", ".join(other)}; '
            "only those in 'params' and 'batch_stats' can be trained"
        )
        raise errors.ConfigError('model.name', config.model.name, why=why)


def _check_teacher(config: ml_collections.ConfigDict) -> None:
    teacher = config.teacher
    if teacher.number < 1:
        raise errors.ConfigError('teacher.number', teacher.number, why='it must be ≥ 1')
    if teacher.tune_epochs is not None and not teacher.checkpoint:
        why = 'they are for the weights of a teacher.checkpoint; set teacher.epochs'
        raise errors.ConfigError('teacher.tune_epochs', teacher.tune_epochs, why=why)
    if teacher.fresh is not None and not teacher.tune_epochs:
        why = 'new weights have to be trained: set teacher.checkpoint and teacher.tune_epochs'
        raise errors.ConfigError('teacher.fresh', teacher.fresh, why=why)
    if teacher.number > 1 and not teachers(config):
        why = 'teacher.checkpoint has one network; set teacher.tune_epochs, and each is tuned apart'
        raise errors.ConfigError('teacher.number', teacher.number, why=why)


def _check_statistics(config: ml_collections.ConfigDict, info: data.Info) -> None:
    channels = info.image_shape[-1]
    for field, other in (('mean', 'std'), ('std', 'mean')):
        value = config.data[field]
        if value is not None and config.data[other] is None:
            raise errors.ConfigError(f'data.{field}', value, why=f'data.{other} is needed, too')
        if value is not None and len(value) != channels:
            why = f'images of {config.data.name} have {channels} channels'
            raise errors.ConfigError(f'data.{field}', value, why=why)
    if config.data.std is not None and min(config.data.std) <= 0:
        raise errors.ConfigError('data.std', config.data.std, why='each must be above 0')


def _weights(config: ml_collections.ConfigDict, model: nn.Module, variables: Any) -> Any:
    """What teacher.checkpoint holds, if it is given, without what teacher.fresh names."""
    path, fresh = config.teacher.checkpoint, config.teacher.fresh
    if not path:
        return None
    if fresh is not None:
        layers = sorted(structure.widths(variables))
        try:
            found = any(re.search(fresh, f'{layer}/') for layer in layers)
        except re.error as error:
            why = f'it is no regular expression ({error})'
            raise errors.ConfigError('teacher.fresh', fresh, why=why) from None
        if not found:
            raise errors.ConfigError('teacher.fresh', fresh, why=f'it names none of {layers}')
    return hosts.first(lambda: convert.read(path, model, variables, fresh=fresh))


def _check_batches(config: ml_collections.ConfigDict) -> None:
    devices = jax.device_count()
    for name in WEIGHTS:
        size, parts = config[name].batch_size, config[name].accumulate
        if parts < 1:
            raise errors.ConfigError(f'{name}.accumulate', parts, why='it must be ≥ 1')
        if size % (devices * parts):
            why = f'it must be a multiple of the number of devices, {devices}'
            if parts > 1:
                why += f', times {name}.accumulate, {parts}'
            raise errors.ConfigError(f'{name}.batch_size', size, why=why)


def _check_safety(config: ml_collections.ConfigDict) -> None:
    if config.on_nan not in loop.ON_NAN:
        raise errors.ConfigError('on_nan', config.on_nan, allowed=loop.ON_NAN)
    if not 0 < config.nan_factor < 1:
        raise errors.ConfigError('nan_factor', config.nan_factor, why='it must lie in (0, 1)')
    for field, least in (('nan_times', 0), ('checkpoint_keep', 1)):
        if config[field] < least:
            raise errors.ConfigError(field, config[field], why=f'it must be ≥ {least}')


def _check_expansion(config: ml_collections.ConfigDict) -> None:
    search = config.search
    if not 0 < search.expand_from < 1:
        why = 'it must be a share of the budgets in (0, 1)'
        raise errors.ConfigError('search.expand_from', search.expand_from, why=why)
    if search.alternations < 1:
        raise errors.ConfigError('search.alternations', search.alternations, why='it must be ≥ 1')
    if search.alternations > 1 and not search.expand:
        why = 'searches alternate with expansions: set search.expand=True'
        raise errors.ConfigError('search.alternations', search.alternations, why=why)
    if search.alternations > 1 and not isinstance(config.blocks, str):
        for pattern, settings in config.blocks:
            for limit in ('min_keep', 'max_keep'):
                if isinstance(dict(settings).get(limit), float):
                    why = (
                        'groups change their size from one alternation to the next: say how many '
                        'channels, as an int'
                    )
                    raise errors.ConfigError(
                        f'blocks[{pattern!r}].{limit}', settings[limit], why=why
                    )


def make_aim(
    config: ml_collections.ConfigDict, plan: Plan, stage: str, graph: tracing.Graph
) -> Aim:
    """What a search of the network with this graph is after.

    What will be widened is searched for less: the share `expand_from` of every budget.
    """
    if not config.search.expand:
        return Aim(stage, graph, dict(config.budget), config.blocks)
    cost = graph.cost()

    def lower(budget: blocking.Budget) -> float:
        now = budget.share(cost) * budget.full
        return min(1.0, config.search.expand_from * budget.most / now)

    budgets = limiting(plan)
    blocks = blocking.pairs(graph, config.blocks)
    for pattern, settings in blocks:
        if 'budget' in settings:
            settings['budget'] = {b.resource: lower(b) for b in budgets if b.block == pattern}
    return Aim(stage, graph, {b.resource: lower(b) for b in budgets if not b.block}, blocks)


def limiting(plan: Plan) -> list[blocking.Budget]:
    """The budgets to widen to: where none is set, the multiply-adds of the full network."""
    whole = any(not budget.block for budget in plan.budgets)
    return [*plan.budgets, *([] if whole else blocking.every_budget(plan.graph, flops=1.0))]


def learn_teachers(setup: loop.Setup, plan: Plan) -> Any:
    """The variables of the teacher, or a tuple with those of several.

    All are the full network, trained with seeds of their own, or with the weights that are given.
    The first is the one that is searched and that the compact network is compared with; what is
    taught is the mean of their logits.
    """
    if not teachers(setup.config):
        _tell_parameters(setup, 'teacher', plan.weights)
        return plan.weights
    found = []
    for index, stage in enumerate(teachers(setup.config)):
        config = setup.config.copy_and_resolve_references()
        config.seed += index
        found.append(learn_teacher(setup._replace(config=config), plan, stage))
    return found[0] if len(found) == 1 else tuple(found)


def learn_teacher(setup: loop.Setup, plan: Plan, stage: str = 'teacher') -> Any:
    """The full network, trained on the labels from scratch or from given weights: its variables.

    Without label smoothing, which makes for better networks and worse teachers (Müller et al.
    2019, https://arxiv.org/abs/1906.02629).
    """
    start = jax.jit(_init(plan.model, plan.graph.inputs[0]))(jax.random.key(setup.config.seed))
    if plan.weights is not None:
        new, there = map(traverse_util.flatten_dict, (start, plan.weights))
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
    setup: loop.Setup, plan: Plan, teacher: Any
) -> tuple[CompactModel, list[dict[str, Any]]]:
    """The compact network; and of each expansion, what the report says."""
    config = setup.config
    search = search_structure if config.search.method in LEARNED else prune_in_rounds
    graph, start, found = plan.graph, features.each(teacher)[0], None
    expansions: list[dict[str, Any]] = []
    for stage in [name for name in setup.stages if loop.part(name) == 'search']:
        if found:  # search on, from the network that was widened
            graph = trace_again(config, plan, found)
        aim = make_aim(config, plan, stage, graph)
        student, keep = search(setup, plan, aim, start, teacher)
        if not config.search.expand:
            return cut.compact(graph, student, keep), expansions
        small, expansion = expanding.expanded(
            graph,
            student,
            keep,
            limiting(plan),
            blocks=config.blocks,
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


def trace_again(
    config: ml_collections.ConfigDict, plan: Plan, found: CompactModel
) -> tracing.Graph:
    """The graph of a network that was widened, whose groups are those of the full one.

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
    sizes = {name: len(group['kept']) for name, group in found.structure.groups.items()}
    if graph.sizes != sizes:
        other = sorted(dict(graph.sizes.items() ^ sizes.items()))
        raise errors.GraphError(
            f'the groups {", ".join(other)} of the widened {type(plan.model).__name__} are not '
            'those of the full one, so that it cannot be searched again; '
            'set config.search.alternations=1'
        )
    return measured(config, graph)


def measured(config: ml_collections.ConfigDict, graph: tracing.Graph) -> tracing.Graph:
    """The graph, with latency if there is a budget in it: that of process 0's device."""
    polynomial = hosts.first(
        lambda: blocking.measured(graph, config.budget.get('latency'), config.blocks).polynomial
    )
    return dataclasses.replace(graph, polynomial=polynomial)


def search_structure(
    setup: loop.Setup, plan: Plan, aim: Aim, start: Any, teacher: Any
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
    return student, hosts.agreed(learn.choose(found, end.state.params, end.memory))


def prune_in_rounds(
    setup: loop.Setup, plan: Plan, aim: Aim, start: Any, teacher: Any
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
        SMALL_BATCH,
        mesh,
        seed=setup.config.seed,
        start=0,
        stop=criteria.BATCHES if criterion in criteria.ON_DATA else 0,
    )
    loss = train.make_loss(model, setup.preprocessing, mesh)
    return criteria.Evidence(loss, tuple(images), setup.config.seed)


def distil(setup: loop.Setup, plan: Plan, teacher: Any, small: CompactModel) -> CompactModel:
    """Trains the compact network on, or from scratch, under the same teacher.

    Or taught by its own moving average. What adapts its features to the teacher's is trained with
    it and left behind.
    """
    config = setup.config.distil
    views = setup.preprocessing._replace(augmentation=distil_augmentation(setup.config))
    setup = setup._replace(preprocessing=views)
    _tell_parameters(setup, 'student', small.variables)
    start = small.variables
    if config.init == 'scratch':
        init = jax.jit(_init(small.module, plan.graph.inputs[0]))
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


def distil_augmentation(config: ml_collections.ConfigDict) -> data.Augmentation:
    """How images are varied in the distillation: as everywhere, but for what it says itself.

    Under a teacher, who answers for whatever it is shown, images may be mixed that no label would
    fit (Beyer et al. 2021, https://arxiv.org/abs/2106.05237).
    """
    own = {name: value for name, value in config.distil.augment.items() if value is not None}
    return data.make_augmentation({**config.data.augment, **own}, 'distil.augment')


def make_adapters(setup: loop.Setup, plan: Plan, small: CompactModel) -> dict[str, Any]:
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


def write_exports(setup: loop.Setup, plan: Plan, teacher: Any, small: CompactModel) -> None:
    """Writes the compact network as files that run without its code, and a record of them.

    A format that fails is said and recorded: the network itself is safe by now. What a run that was
    stopped has written is written again.
    """
    folder = setup.workdir / 'export'
    if not setup.config.export:
        return
    folder.mkdir(exist_ok=True)
    # As one process holds them, whatever they were trained on.
    full, compact = (
        CompactModel(module, jax.device_get(variables), small.structure)
        for module, variables in (
            (plan.model, features.each(teacher)[0]),
            (small.module, small.variables),
        )
    )
    rows: dict[str, dict[str, Any]] = {}
    for name in setup.config.export:
        path = folder / f'model.{name}'
        try:
            done = export.FORMATS[name](compact, path)
            whole = export.FORMATS[name](full, None)
        except errors.ExportError as error:
            rows[name] = {'error': error.why}
            setup.display.message(f'export: {error}')
        else:
            rows[name] = {
                'bytes': done.bytes,
                'full_bytes': whole.bytes,
                'difference': done.difference,
            }
            setup.display.message(f'export: {path}, {done.bytes:,} bytes')
    records.write_json(setup.workdir / 'export.json', rows)


def report(
    setup: loop.Setup,
    plan: Plan,
    teacher: Any,
    small: CompactModel,
    expansions: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Reads the test part, for the first and last time, and writes down what came out.

    The networks compute in float32, as they are handed on, whatever they were trained in.
    """
    config = setup.config
    test = train.put(setup.load('test'), setup.mesh)
    batch_size = config.distil.batch_size
    batch = train.make_batch(test, np.arange(batch_size) % test.split.size, setup.mesh)
    labels = test.split.labels
    networks = {
        'teacher': (plan.model, features.each(teacher)[0], plan.graph.cost()._asdict()),
        'compact': (small.module, small.variables, small.structure.compact),
    }
    rows: dict[str, dict[str, Any]] = {}
    answers: dict[str, np.ndarray] = {}
    inference: dict[str, Callable[[], Any]] = {}
    for name, (module, variables, cost) in networks.items():
        step = train.make_predict_step(module, setup.preprocessing, setup.mesh)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
        variables = meshes.place(variables, variables['params'], setup.mesh)
        inference[name] = functools.partial(step, variables, batch)
        answers[name] = train.predict(step, variables, test, batch_size, setup.mesh)
        plain = jax.jit(functools.partial(module.apply, **mode.arguments(module, train=False)))
        analysis = plain.lower(shapes, plan.graph.inputs[0]).compile().cost_analysis() or {}
        rows[name] = {
            'accuracy': float(np.mean(answers[name] == labels)),
            **{
                resource: cost[resource] for resource in (*plan.graph.resources, 'peak_activations')
            },
            'xla_flops': analysis.get('flops'),
        }
    for name, milliseconds in _time(inference).items():
        rows[name]['milliseconds'] = milliseconds
    if isinstance(teacher, tuple):
        step = train.make_predict_step(plan.model, setup.preprocessing, setup.mesh)
        several = meshes.place(teacher, features.each(teacher)[0]['params'], setup.mesh)
        found = train.predict(step, several, test, batch_size, setup.mesh)
        rows['ensemble'] = {'accuracy': float(np.mean(found == labels))}
    classes = telling.by_class(labels, answers, plan.info.class_names)

    return hosts.first(
        lambda: write_down(setup, plan, networks, rows, classes, small.structure, expansions)
    )


def write_down(
    setup: loop.Setup,
    plan: Plan,
    networks: Mapping[str, tuple[nn.Module, Any, Mapping[str, Any]]],
    rows: Mapping[str, Mapping[str, Any]],
    classes: Mapping[str, Any],
    found: structure.Structure,
    expansions: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Writes the report, with what the workdir tells of the run."""
    config = setup.config
    outcomes = loop.outcomes(setup)
    kept = {name: len(group['kept']) for name, group in found.groups.items()}
    layers = zip(plan.graph.cost().rows, plan.graph.polynomial.cost(found.copies).rows, strict=True)
    result = {
        **rows,
        'budget': {b.resource: config.budget[b.resource] for b in plan.budgets if not b.block},
        'reached': {r: rows['compact'][r] / rows['teacher'][r] for r in plan.graph.resources},
        'blocks': [
            {
                'group': group.name,
                'block': plan.limits[group.name].block,
                'size': group.size,
                'kept': kept[group.name],
            }
            for group in plan.graph.groups
        ],
        'layers': [
            {
                'layer': full.layer,
                **{
                    resource: {
                        'teacher': getattr(full, resource),
                        'compact': getattr(left, resource),
                    }
                    for resource in plan.graph.resources
                },
            }
            for full, left in layers
        ],
        'search': telling.tracking(telling.search_curves(setup.workdir)),
        'removal': telling.removals(setup.workdir),
        'inexact': found.inexact,
        'seconds': {name: outcome['seconds'] for name, outcome in outcomes.items()},
        'best': {
            name: {'step': outcome['best']['step'], **outcome['best']['metrics']}
            for name, outcome in outcomes.items()
            if outcome['best']
        },
        'rollbacks': {
            name: outcome['rollbacks'] for name, outcome in outcomes.items() if outcome['rollbacks']
        },
        'input_shape': list(plan.info.image_shape),
        # What a pixel in [0, 1] becomes before a network, or a file of `export`, is given it.
        'normalization': {
            'mean': setup.preprocessing.mean.tolist(),
            'std': setup.preprocessing.std.tolist(),
        },
        'inference_batch': config.distil.batch_size,
        'config': records.record(config),
        'seed': config.seed,
        'versions': records.versions(),
        'device': f'{jax.device_count()} × {jax.devices()[0].device_kind}',
    }
    if expansions:
        result['expand'] = list(expansions)
    corrupt = records.corrupt_images(setup.workdir, setup.display.message)
    if corrupt:
        result['corrupt_images'] = corrupt
    exported = records.read_json(setup.workdir / 'export.json', setup.display.message)
    if exported:
        result['export'] = exported
    if 'latency' in plan.graph.resources:
        result['latency'] = _latency(plan.graph, networks)
    result |= classes  # last, since they can be long
    records.write_json(setup.workdir / 'report.json', result)
    setup.display.message(f'report: {telling.write_page(setup.workdir, result)}')
    return result


def _latency(
    graph: tracing.Graph, networks: Mapping[str, tuple[nn.Module, Any, Mapping[str, Any]]]
) -> dict[str, dict[str, float]]:
    """Seconds for one image, as the fitted model predicts them and as they are now."""
    probes = [
        latency.network(module, variables, graph.inputs, graph.apply_kwargs)
        for module, variables, _ in networks.values()
    ]
    times = {
        'predicted': {name: cost['latency'] for name, (*_, cost) in networks.items()},
        'measured': dict(zip(networks, latency.time_probes(probes), strict=True)),
    }
    return {
        kind: seconds | {'ratio': seconds['compact'] / seconds['teacher']}
        for kind, seconds in times.items()
    }


def _settings(config: ml_collections.ConfigDict, without: Collection[str]) -> dict[str, Any]:
    """What a stage depends on of the config: runs that differ in the rest may share its folder.

    What is not set is left out, so that a field that is new parts no run from what it has reached.
    """
    record = records.record(config)
    return {part: _set(value) for part, value in record.items() if part not in without}


def _set(value: Any) -> Any:
    """A record without the fields that are None."""
    if not isinstance(value, Mapping):
        return value
    return {name: _set(inner) for name, inner in value.items() if inner is not None}


def _taught_loss(setup: loop.Setup, plan: Plan, stage: str) -> train.Loss | train.Objective:
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


def _time(calls: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Median milliseconds of each call."""
    waiting = [lambda call=call: jax.block_until_ready(call()) for call in calls.values()]
    taken = latency.take_turns(waiting, TIMINGS)
    return {name: 1e3 * statistics.median(t) for name, t in zip(calls, taken, strict=True)}
