"""What is known before anything is trained: the network traced, the config checked, the stages.

What cannot be is refused here, in one sentence, and not after hours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import os
import re
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from jaxkd import (
    convert,
    data,
    errors,
    export,
    features,
    hosts,
    loop,
    mode,
    network,
    objective,
    precision,
    train,
)
from jaxkd import mesh as meshes
from jaxkd.graph import structure
from jaxkd.graph import trace as tracing
from jaxkd.search import blocks as blocking
from jaxkd.search import criteria, learn
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

_ONE = lambda x: x >= 1, 'it must be ≥ 1'
_NOT_NEGATIVE = lambda x: x >= 0, 'it must be a number ≥ 0'
_POSITIVE = lambda x: x > 0, 'it must be a number > 0'
_SHARE = lambda x: 0 <= x <= 1, 'it must be a share in [0, 1]'
_PART = lambda x: 0 < x < 1, 'it must lie in (0, 1)'
_DECAY = lambda x: 0 <= x < 1, 'it must lie in [0, 1)'
# What the numbers in a config may be, in every part that has them, and what to say of others.
NUMBERS: Mapping[str, tuple[Callable[[float], bool], str]] = {
    'seed': (lambda x: 0 <= x < 2**63, 'it must be in [0, 2⁶³)'),
    'log_every': _ONE,
    'checkpoint_seconds': _NOT_NEGATIVE,
    'checkpoint_keep': _ONE,
    'nan_factor': _PART,
    'nan_times': _NOT_NEGATIVE,
    'corrupt_limit': _NOT_NEGATIVE,
    'padding': _NOT_NEGATIVE,
    'batch_size': _ONE,
    'accumulate': _ONE,
    'epochs': _POSITIVE,
    'tune_epochs': _NOT_NEGATIVE,
    'warmup_epochs': _NOT_NEGATIVE,
    'learning_rate': _POSITIVE,
    'final_fraction': _SHARE,
    'momentum': _DECAY,
    'weight_decay': _NOT_NEGATIVE,
    'ema_decay': _DECAY,
    'label_smoothing': _SHARE,
    'number': _ONE,
    'alpha': _SHARE,
    'temperature': _POSITIVE,
    'rounds': _ONE,
    'ramp': (lambda x: 0 < x <= 1, 'it must be a share of the search in (0, 1]'),
    'shrink': _SHARE,
    'min_keep': _SHARE,
    'expand_from': _PART,
    'alternations': _ONE,
    'round_to': _ONE,
    'recalibrate': _NOT_NEGATIVE,
}
# Of these, those that need not be set.
OPTIONAL = ('tune_epochs', 'min_keep')


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


def make_plan(config: ml_collections.ConfigDict) -> Plan:
    """Builds the model, traces it, and refuses what cannot be, before anything is trained."""
    info = data.info(config.data.name, config.data.image_size)
    for stage, choices in CHOICES.items():
        for field, allowed in choices.items():
            if config[stage][field] not in allowed:
                raise errors.ConfigError(f'{stage}.{field}', config[stage][field], allowed=allowed)
    for field, allowed in (('compute_dtype', precision.DTYPES), ('on_nan', loop.ON_NAN)):
        if config[field] not in allowed:
            raise errors.ConfigError(field, config[field], allowed=allowed)
    _check_numbers(config)
    export.check_formats('export', config.export)
    data.make_augmentation(config.data.augment)
    distil_augmentation(config)
    _check_batches(config)
    _check_teacher(config)
    _check_statistics(config, info)
    given = config.model.arguments.to_dict()
    model = network.make(
        config.model.name,
        given,
        defaults={'num_classes': info.num_classes},
        fields=('model.name', 'model.arguments'),
    )
    image = jax.ShapeDtypeStruct((1, *info.image_shape), jnp.float32)
    try:
        variables = jax.eval_shape(init(model, image), jax.random.key(0))
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
    graph = measured(config, learn.rehearse(graph, config.blocks))
    limits = blocking.resolve(graph, config.blocks)
    _check_alternations(config, graph)
    budgets = blocking.budgets(graph, config.blocks, **config.budget)
    if not budgets:
        _check_unlimited(config, graph)
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


def init(model: nn.Module, image: jax.ShapeDtypeStruct) -> Callable[[jax.Array], Any]:
    """The function that makes the model's variables of a key."""
    evaluating = mode.arguments(model, train=False)
    return lambda key: model.init(key, jnp.zeros(image.shape, image.dtype), **evaluating)


def make_aim(
    config: ml_collections.ConfigDict, plan: Plan, stage: str, graph: tracing.Graph
) -> Aim:
    """What a search of the network with this graph is after.

    What will be widened is searched for less: the share `expand_from` of every budget. Of the
    blocks there are those that a network that has lost branches still has.
    """
    if not config.search.expand:
        return Aim(stage, graph, dict(config.budget), config.blocks)
    cost = graph.cost()

    def lower(budget: blocking.Budget) -> float:
        now = budget.share(cost) * budget.full
        goal = config.search.expand_from * budget.most
        return goal / now if now > goal else 1.0  # of layers that have gone there is nothing now

    budgets = limiting(plan)
    blocks = blocking.left(graph, config.blocks)
    for pattern, settings in blocks:
        if 'budget' in settings:
            settings['budget'] = {b.resource: lower(b) for b in budgets if b.block == pattern}
    return Aim(stage, graph, {b.resource: lower(b) for b in budgets if not b.block}, blocks)


def limiting(plan: Plan) -> list[blocking.Budget]:
    """The budgets to widen to: where none is set, the multiply-adds of the full network."""
    whole = any(not budget.block for budget in plan.budgets)
    return [*plan.budgets, *([] if whole else blocking.every_budget(plan.graph, flops=1.0))]


def measured(config: ml_collections.ConfigDict, graph: tracing.Graph) -> tracing.Graph:
    """The graph, with latency if there is a budget in it: that of process 0's device."""
    polynomial = hosts.first(
        lambda: blocking.measured(graph, config.budget.get('latency'), config.blocks).polynomial
    )
    return dataclasses.replace(graph, polynomial=polynomial)


def distil_augmentation(config: ml_collections.ConfigDict) -> data.Augmentation:
    """How images are varied in the distillation: as everywhere, but for what it says itself.

    Under a teacher, who answers for whatever it is shown, images may be mixed that no label would
    fit (Beyer et al. 2021, https://arxiv.org/abs/2106.05237).
    """
    own = {name: value for name, value in config.distil.augment.items() if value is not None}
    return data.make_augmentation({**config.data.augment, **own}, 'distil.augment')


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


def _check_numbers(config: ml_collections.ConfigDict) -> None:
    parts = {'': config, **{f'{name}.': config[name] for name in ('data', *WEIGHTS)}}
    for prefix, part in parts.items():
        for field, (right, why) in NUMBERS.items():
            value = part.get(field)
            unset = field not in part or (value is None and field in OPTIONAL)
            if not unset and not (errors.is_number(value) and right(value)):
                raise errors.ConfigError(prefix + field, value, why=why)


def _check_teacher(config: ml_collections.ConfigDict) -> None:
    teacher = config.teacher
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
        if value is not None and not all(map(errors.is_number, value)):
            raise errors.ConfigError(f'data.{field}', value, why='each must be a finite number')
    if config.data.std is not None and min(config.data.std) <= 0:
        raise errors.ConfigError('data.std', config.data.std, why='each must be above 0')


def _weights(config: ml_collections.ConfigDict, model: nn.Module, variables: Any) -> Any:
    """What teacher.checkpoint holds, if it is given, without what teacher.fresh names."""
    given, fresh = config.teacher.checkpoint, config.teacher.fresh
    if not given:
        return None
    path = os.path.expanduser(given)
    if fresh is not None:
        try:
            found = convert.named(variables, fresh)
        except re.error as error:
            why = f'it is no regular expression ({error})'
            raise errors.ConfigError('teacher.fresh', fresh, why=why) from None
        if not found:
            layers = sorted(structure.widths(variables))
            why = f'it names no parameter of {layers}'
            raise errors.ConfigError('teacher.fresh', fresh, why=why)
        if len(found) == len(jax.tree.leaves(variables)):
            why = 'it names every parameter; leave out teacher.checkpoint, and all begin anew'
            raise errors.ConfigError('teacher.fresh', fresh, why=why)

    def read() -> Any:
        if not os.path.exists(path):
            why = 'there is no such file or folder'
            raise errors.ConfigError('teacher.checkpoint', given, why=why)
        return convert.read(path, model, variables, fresh=fresh)

    return hosts.first(read)


def _check_batches(config: ml_collections.ConfigDict) -> None:
    devices = jax.device_count()
    for name in WEIGHTS:
        size, parts = config[name].batch_size, config[name].accumulate
        if size % (devices * parts):
            why = f'it must be a multiple of the number of devices, {devices}'
            if parts > 1:
                why += f', times {name}.accumulate, {parts}'
            raise errors.ConfigError(f'{name}.batch_size', size, why=why)


def _check_unlimited(config: ml_collections.ConfigDict, graph: tracing.Graph) -> None:
    """Refuses budgets above what the full network has, where nothing else sets a limit."""
    for budget in blocking.every_budget(graph, **config.budget):
        if budget.most > budget.full:
            asked = config.budget[budget.resource]
            has = asked * budget.full / budget.most  # in the unit that was asked in
            why = f'the full network has {has:,.10g}, so that nothing is limited; less is needed'
            raise errors.ConfigError(f'budget.{budget.resource}', asked, why=why)


def _check_alternations(config: ml_collections.ConfigDict, graph: tracing.Graph) -> None:
    if config.search.alternations == 1:
        return
    if not config.search.expand:
        why = 'searches alternate with expansions: set search.expand=True'
        raise errors.ConfigError('search.alternations', config.search.alternations, why=why)
    for pattern, settings in blocking.pairs(graph, config.blocks):
        for limit in ('min_keep', 'max_keep'):
            if isinstance(settings.get(limit), float):
                why = (
                    'groups change their size from one alternation to the next: say how many '
                    'channels, as an int'
                )
                raise errors.ConfigError(f'blocks[{pattern!r}].{limit}', settings[limit], why=why)
