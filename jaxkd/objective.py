"""What a stage minimizes where its config says `losses`: a sum of weighted losses.

    (
        ('labels', {'weight': 0.1}),
        ('dkd', {'beta': 2.0, 'temperature': 4.0, 'warmup': 0.2}),
        ('fitnet', {'weight': 10.0, 'features': 'block1[0-9]$'}),
    )

Pairs of a name in `LOSSES` and settings. 'labels' is the cross-entropy with the labels; where it is
not among them it is one of them, of weight 1. Settings that all have: `weight`, by default 1;
`warmup`, the share of the stage in which the weight grows from 0, and `decay`, the share at the end
in which it falls to 0. Losses of features have a pattern, a regular expression that is searched in
the names of features (see `jaxkd.features`); what the loss is for each that matches is added up.
Losses of logits may be those of `standardized` ones. The others are arguments of the functions of
`jaxkd.distill`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxkd import distill, errors, features, train

Losses = Sequence[tuple[str, Mapping[str, Any]]]
Shape = tuple[int, ...]

_NOT_NEGATIVE = 'it must be a number ≥ 0'
_SHARE = 'it must be a share of the stage in [0, 1]'
# What is right for a setting, whatever loss it is of, and what to say of others.
_RIGHT: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    'weight': (lambda x: errors.is_number(x) and x >= 0, _NOT_NEGATIVE),
    'warmup': (lambda x: errors.is_number(x) and 0 <= x <= 1, _SHARE),
    'decay': (lambda x: errors.is_number(x) and 0 <= x <= 1, _SHARE),
    'alpha': (lambda x: errors.is_number(x) and x >= 0, _NOT_NEGATIVE),
    'beta': (lambda x: errors.is_number(x) and x >= 0, _NOT_NEGATIVE),
    'gamma': (lambda x: errors.is_number(x) and x >= 0, _NOT_NEGATIVE),
    'temperature': (lambda x: errors.is_number(x) and x > 0, 'it must be a number > 0'),
    'power': (lambda x: errors.is_number(x) and x >= 1, 'it must be a number ≥ 1'),
    'standardized': (lambda x: isinstance(x, bool), 'it must be True or False'),
    'features': (lambda x: isinstance(x, str), "it must be a pattern, such as 'block1[0-9]$'"),
}
COMMON = ('weight', 'warmup', 'decay')


class Kind(NamedTuple):
    """One of the losses.

    Attributes:
      function: of student and teacher, in logits or features; one value for each example.
      settings: further arguments that it takes from the config.
      labels: whether it takes the labels, too.
      fits: of losses of features, whether one of this shape will do.
      adapts: whether it takes an adapter where widths differ.
    """

    function: Callable[..., jax.Array]
    settings: tuple[str, ...] = ()
    labels: bool = False
    fits: Callable[[Shape], bool] | None = None
    adapts: bool = False

    @property
    def allowed(self) -> tuple[str, ...]:
        """The names of all settings."""
        if self.fits:
            return (*COMMON, 'features', *self.settings)
        taught = self.function is not _cross_entropy
        return (*COMMON, *(('standardized',) if taught else ()), *self.settings)


def _cross_entropy(student: jax.Array, teacher: jax.Array, labels: jax.Array) -> jax.Array:
    del teacher
    return optax.softmax_cross_entropy_with_integer_labels(student, labels)


LOSSES: Mapping[str, Kind] = {
    'labels': Kind(_cross_entropy, labels=True),
    'hinton': Kind(distill.hinton, ('temperature',)),
    'dkd': Kind(distill.dkd, ('alpha', 'beta', 'temperature'), labels=True),
    'dist': Kind(distill.dist, ('beta', 'gamma', 'temperature')),
    'logit_mse': Kind(distill.logit_mse),
    'hard_label': Kind(distill.hard_label),
    'fitnet': Kind(distill.fitnet, fits=lambda shape: True, adapts=True),
    'attention_transfer': Kind(
        # At a single position there is nothing to attend to.
        distill.attention_transfer,
        ('power',),
        fits=lambda shape: math.prod(shape[1:-1]) > 1,
    ),
    'similarity_preserving': Kind(distill.similarity_preserving, fits=lambda shape: True),
}


class Term(NamedTuple):
    """One of the losses that are added up.

    Attributes:
      name: in `LOSSES`.
      weight, warmup, decay: see above.
      settings: arguments of the function.
      standardized: whether its logits are standardized.
      features: the names of those that it is for.
    """

    name: str
    weight: float = 1.0
    warmup: float = 0.0
    decay: float = 0.0
    settings: Mapping[str, Any] = {}
    standardized: bool = False
    features: tuple[str, ...] = ()


def terms(
    field: str, losses: Losses, shapes: Callable[[], Mapping[str, Shape]], *, adapters: bool
) -> tuple[Term, ...]:
    """What a config says, checked. Those without weight are left out.

    Args:
      field: the name of the config's field, for errors.
      losses: see above; () gives ().
      shapes: finds the features of the teacher; called if a loss needs them.
      adapters: whether losses may have some.

    Raises:
      ConfigError: for unknown losses, settings and values, a pattern that no feature matches, and
        if nothing has a weight.
    """
    pairs = _pairs(field, losses)
    if not pairs:
        return ()
    if all(name != 'labels' for name, _ in pairs):
        pairs.insert(0, ('labels', {}))
    found = [_term(field, name, settings, shapes, adapters) for name, settings in pairs]
    weighted = tuple(term for term in found if term.weight)
    if not weighted:
        raise errors.ConfigError(field, losses, why='none of them has a weight above 0')
    return weighted


def objective(terms: Sequence[Term], steps: int) -> train.Objective:
    """The weighted sum of the terms, in a stage of so many steps."""
    paths = {features.path(name) for term in terms for name in term.features}

    def loss(student, teacher, labels, adapters, step):
        return sum(
            weight(term, step, steps) * _value(term, student, teacher, labels, adapters)
            for term in terms
        )

    return train.Objective(loss, paths.__contains__ if paths else None)


def weight(term: Term, step: jax.Array | int, steps: int) -> jax.Array | float:
    """What a term counts in the step after `step` steps of a stage with so many."""
    factor = term.weight
    if term.warmup:
        factor *= jnp.minimum(step / (term.warmup * steps), 1)
    if term.decay:
        factor *= jnp.minimum((steps - step) / (term.decay * steps), 1)
    return factor


def adapted(terms: Sequence[Term]) -> set[str]:
    """The features whose widths have to be those of the teacher, with an adapter if need be."""
    return {name for term in terms if LOSSES[term.name].adapts for name in term.features}


def _value(
    term: Term,
    student: features.Outputs,
    teacher: features.Outputs,
    labels: jax.Array,
    adapters: Mapping[str, Any],
) -> jax.Array:
    """The loss, without its weight, for each example."""
    kind = LOSSES[term.name]
    if kind.fits:
        return sum(
            kind.function(
                student.features[name],
                teacher.features[name],
                **term.settings,
                **({'adapter': adapters.get(name)} if kind.adapts else {}),
            )
            for name in term.features
        )
    logits = [student.logits, teacher.logits]
    if term.standardized:
        logits = [distill.standardized(one) for one in logits]
    return kind.function(*logits, *((labels,) if kind.labels else ()), **term.settings)


def _pairs(field: str, losses: Losses) -> list[tuple[str, dict[str, Any]]]:
    try:
        return [(str(name), dict(settings)) for name, settings in losses]
    except (TypeError, ValueError):
        why = "it must be a tuple of pairs, such as (('dkd', {'weight': 1.0, 'beta': 2.0}),)"
        raise errors.ConfigError(field, losses, why=why) from None


def _term(
    field: str,
    name: str,
    settings: dict[str, Any],
    shapes: Callable[[], Mapping[str, Shape]],
    adapters: bool,
) -> Term:
    if name not in LOSSES:
        raise errors.ConfigError(field, name, allowed=LOSSES)
    kind, field = LOSSES[name], f'{field}[{name!r}]'
    for setting, value in settings.items():
        if setting not in kind.allowed:
            raise errors.ConfigError(field, setting, allowed=kind.allowed)
        right, why = _RIGHT[setting]
        if not right(value):
            raise errors.ConfigError(f'{field}.{setting}', value, why=why)
    warmup, decay = (settings.get(part, 0.0) for part in ('warmup', 'decay'))
    if warmup + decay > 1:
        why = f'with decay, {decay}, it is more than the whole stage'
        raise errors.ConfigError(f'{field}.warmup', warmup, why=why)
    if kind.adapts and not adapters:
        why = 'a search changes the widths that it adapts to one another; use it in distil.losses'
        raise errors.ConfigError(field.partition('[')[0], name, why=why)
    return Term(
        name,
        settings.get('weight', 1.0),
        warmup,
        decay,
        {setting: settings[setting] for setting in kind.settings if setting in settings},
        settings.get('standardized', False),
        _matching(field, kind, settings.get('features'), shapes()) if kind.fits else (),
    )


def _matching(
    field: str, kind: Kind, pattern: str | None, shapes: Mapping[str, Shape]
) -> tuple[str, ...]:
    """The names of the features that a pattern is found in, of those that the loss can be of."""
    known = [name for name, shape in shapes.items() if kind.fits(shape)]
    there = f'the features are {", ".join(known) or "none"}'
    if pattern is None:
        why = f'say which features it is for, by a pattern; {there}'
        raise errors.ConfigError(f'{field}.features', pattern, why=why)
    try:
        matching = tuple(name for name in known if re.search(pattern, name))
    except re.error as error:
        why = f'no regular expression: {error}'
        raise errors.ConfigError(f'{field}.features', pattern, why=why) from None
    if not matching:
        why = f'it matches no feature that this loss can be of; {there}'
        raise errors.ConfigError(f'{field}.features', pattern, why=why)
    return matching
