"""Sums of losses as a config says them, and whole runs with them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkd
from jaxkd import (
    checkpoint,
    distill,
    errors,
    features,
    loop,
    metrics,
    objective,
    pipeline,
)
from jaxkd import plan as planning
from tests import tiny

SHAPES = {
    'stem': (1, 4, 4, 8),
    'block1/expand': (1, 2, 2, 8),
    'block12/expand': (1, 2, 2, 8),
    'head': (1, 1, 1, 8),
    'classifier': (1, 10),
}
RANDOM = np.random.default_rng(0)
LABELS = jnp.array([1, 0, 2, 2])


def _terms(losses, adapters=True):
    return objective.terms('distil.losses', losses, lambda: SHAPES, adapters=adapters)


def _outputs(channels):
    maps = {
        name: jnp.float32(RANDOM.normal(size=(4, *SHAPES[name][1:-1], channels)))
        for name in ('block1/expand', 'block12/expand')
    }
    return features.Outputs(jnp.float32(RANDOM.normal(size=(4, 3))), maps)


def test_losses_are_added_up():
    student, teacher = _outputs(5), _outputs(8)
    kernel = jnp.float32(RANDOM.normal(size=(5, 8)))
    adapters = {'block1/expand': {'kernel': kernel, 'bias': jnp.ones(8)}}
    terms = _terms(
        (
            ('labels', {'weight': 0.5}),
            ('dkd', {'beta': 2.0, 'temperature': 3.0, 'standardized': True}),
            ('fitnet', {'weight': 10, 'features': 'block1/'}),
            ('attention_transfer', {'weight': 100.0, 'features': '^block', 'power': 3.0}),
        )
    )
    assert objective.adapted(terms) == {'block1/expand'}
    found = objective.objective(terms, 100)
    assert {name for name in SHAPES if found.wanted(name)} == {'block1/expand', 'block12/expand'}
    value = found.loss(student, teacher, LABELS, adapters, 7)
    hard = -jax.nn.log_softmax(student.logits)[jnp.arange(4), LABELS]
    logits = [distill.standardized(one.logits) for one in (student, teacher)]
    maps = [(student.features[n], teacher.features[n]) for n in teacher.features]
    expected = (
        0.5 * hard
        + distill.dkd(*logits, LABELS, beta=2.0, temperature=3.0)
        + 10 * distill.fitnet(*maps[0], adapters['block1/expand'])
        + 100 * sum(distill.attention_transfer(*pair, power=3.0) for pair in maps)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_labels_count_one_unless_told_otherwise():
    assert [(t.name, t.weight) for t in _terms((('hinton', {'weight': 9.0}),))] == [
        ('labels', 1.0),
        ('hinton', 9.0),
    ]
    only = _terms((('labels', {'weight': 0.0}), ('logit_mse', {})))
    assert [term.name for term in only] == ['logit_mse']
    assert objective.objective(only, 10).wanted is None
    assert _terms(()) == ()


def test_weights_grow_and_fall():
    """Of 100 steps 20 up to the weight, and 10 at the end down from it."""
    (term,) = _terms((('labels', {'weight': 3.0, 'warmup': 0.2, 'decay': 0.1}),))
    weights = [objective.weight(term, step, 100) for step in (0, 5, 20, 50, 90, 95, 99)]
    np.testing.assert_allclose(weights, [0.0, 0.75, 3.0, 3.0, 3.0, 1.5, 0.3], rtol=1e-6)
    (always,) = _terms((('labels', {'weight': 3.0}),))
    assert objective.weight(always, 0, 100) == 3.0


def test_one_entry_of_a_config_is_as_good_as_a_list():
    """A config that was read back from JSON has lists."""
    losses = (('fitnet', {'features': 'expand$', 'weight': 2}), ('labels', {'weight': 0.1}))
    assert _terms(losses) == _terms(json.loads(json.dumps(losses)))


@pytest.mark.parametrize(
    ('losses', 'words'),
    [
        ((('dkt', {}),), ['distil.losses', 'dkt', 'did you mean dkd', 'attention_transfer']),
        ((('dkd', {'gama': 1.0}),), ["distil.losses['dkd']", 'gama', 'temperature', 'warmup']),
        ((('fitnet', {'standardized': True, 'features': ''}),), ['standardized', 'features']),
        ((('labels', {'standardized': True}),), ['standardized', 'weight']),
        ((('dkd', {'temperature': 0}),), ["distil.losses['dkd'].temperature", '> 0']),
        ((('hinton', {'weight': -1.0}),), ["['hinton'].weight", '≥ 0']),
        ((('hinton', {'weight': 'much'}),), ["['hinton'].weight", 'much']),
        ((('hinton', {'weight': True}),), ["['hinton'].weight", 'True']),
        ((('hinton', {'weight': float('nan')}),), ["['hinton'].weight", 'nan']),
        ((('dist', {'warmup': 1.5}),), ["['dist'].warmup", 'share']),
        ((('dist', {'warmup': 0.6, 'decay': 0.5}),), ["['dist'].warmup", '0.5', 'whole stage']),
        ((('hinton', {'standardized': 1}),), ['standardized', 'True or False']),
        ((('fitnet', {}),), ["['fitnet'].features", 'stem, block1/expand']),
        ((('fitnet', {'features': 'blocks'}),), ['blocks', 'stem, block1/expand', 'classifier']),
        ((('fitnet', {'features': '('}),), ["['fitnet'].features", 'regular expression']),
        ((('attention_transfer', {'features': 'head|classifier'}),), ['head', 'stem, block1/exp']),
        ((('attention_transfer', {'features': 'stem', 'power': 0.5}),), ['power', '≥ 1']),
        ((('labels', {'weight': 0.0}),), ['distil.losses', 'none of them has a weight']),
        (('dkd', {'beta': 2.0}), ['distil.losses', 'tuple of pairs']),
        ('dkd', ['distil.losses', 'tuple of pairs']),
    ],
)
def test_what_cannot_be_is_refused(losses, words):
    with pytest.raises(errors.ConfigError) as refused:
        _terms(losses)
    assert all(word in str(refused.value) for word in words), str(refused.value)


def test_a_large_weight_is_no_absurd_loss():
    """It is the cross-entropy that is compared with that of guessing."""
    measured = [{'loss': 1e6, 'cross_entropy': 1.0}] * 3
    assert loop._trouble(measured, 3, np.log(10)) is None
    assert '2.3e+04' in loop._trouble([{'loss': 1.0, 'cross_entropy': 2.3e4}], 3, np.log(10))
    assert 'nan at step 3' in loop._trouble([{'loss': np.nan, 'cross_entropy': 1.0}], 3, 1.0)


def test_a_search_has_no_adapters():
    with pytest.raises(errors.ConfigError, match='use it in distil.losses'):
        _terms((('fitnet', {'features': 'stem'}),), adapters=False)


@pytest.mark.parametrize(
    ('stage', 'fields', 'words'),
    [
        (
            'distil',
            {'losses': (('fitnet', {'features': 'Konv'}),)},
            ['Konv', 'Conv_0, BatchNorm_0'],
        ),
        ('search', {'losses': (('kd', {}),)}, ['search.losses', 'hinton']),
        ('search', {'losses': (('dkd', {}),), 'method': 'morphnet'}, ['search.losses', 'morphnet']),
        ('distil', {'teacher': 'averages'}, ['distil.teacher', 'did you mean average']),
        ('teacher', {'number': 0}, ['teacher.number', '≥ 1']),
    ],
)
def test_a_plan_refuses_it_too(stage, fields, words):
    config = tiny.get_config()
    config[stage].update(fields)
    with pytest.raises(errors.ConfigError) as refused:
        planning.make_plan(config)
    assert all(word in str(refused.value) for word in words), str(refused.value)


def _told(report):
    return {
        key: {k: v for k, v in value.items() if k != 'milliseconds'}
        if isinstance(value, dict)
        else value
        for key, value in report.items()
        if key not in ('seconds', 'sha256')
    }


def test_features_teach_from_stage_to_stage(tmp_path):
    """Stopped in the middle of the distillation, it ends as it would have; no adapter is left.

    640 images make 9 steps for each of the three stages.
    """
    config = tiny.get_config()
    config.search.losses = (('dkd', {'beta': 2.0}), ('similarity_preserving', {'features': 'Conv'}))
    config.search.shrink = 0.9
    config.distil.update(
        choose='best',
        losses=(
            ('labels', {'weight': 0.5}),
            ('dkd', {'beta': 2.0, 'temperature': 2.0, 'warmup': 0.5}),
            ('attention_transfer', {'weight': 100.0, 'features': 'BatchNorm', 'decay': 0.5}),
            ('fitnet', {'weight': 0.5, 'features': 'Conv_[01]$'}),
        ),
    )
    with pytest.raises(errors.Stopped, match='of distil'):
        pipeline.run(config, tmp_path / 'stopped', stops=tiny.After(22))
    newest = max((tmp_path / 'stopped' / 'distil').glob('[0-9]*'), key=lambda p: int(p.name))
    leaves, _ = checkpoint.read(newest)
    kernels = {
        name: leaf.shape
        for name, leaf in leaves.items()
        if name.startswith(f'state/params/{features.ADAPTERS}') and name.endswith('kernel')
    }
    resumed = pipeline.run(config, tmp_path / 'stopped')
    whole = pipeline.run(config, tmp_path / 'whole')
    assert _told(resumed) == _told(whole)

    small = jaxkd.load(tmp_path / 'whole' / 'compact')
    assert not any(features.ADAPTERS in name for name in checkpoint.to_tree(small.variables))
    count = sum(leaf.size for leaf in jax.tree.leaves(small.variables['params']))
    assert count == whole['compact']['params']
    widths = [small.variables['params'][f'Conv_{i}']['kernel'].shape[-1] for i in (0, 1)]
    assert sorted(kernels.values()) == sorted(zip(widths, (16, 32)))
    rows = [row for row in metrics.read_metrics(tmp_path / 'whole') if row['stage'] != 'teacher']
    assert all(0 < row['cross_entropy'] < 10 for row in rows if row['step'])
    physical = [row['physical_flops'] for row in rows if row['stage'] == 'search']
    assert physical[-1] < physical[0]


def test_several_teachers_and_a_network_that_teaches_itself(tmp_path):
    config = tiny.get_config()
    config.teacher.number = 2
    config.distil.update(teacher='average', losses=(('hinton', {'warmup': 0.5}),))
    with pytest.raises(errors.Stopped, match='of teacher2'):
        pipeline.run(config, tmp_path / 'work', stops=tiny.After(12))
    report = pipeline.run(config, tmp_path / 'work')
    assert list(report['seconds']) == ['teacher', 'teacher2', 'search', 'distil']
    assert 0 < report['ensemble']['accuracy'] < 1

    def kernel(stage):
        return checkpoint.read(tmp_path / stage / 'result')[0]['state/params/Conv_0/kernel']

    first, second = kernel('work/teacher'), kernel('work/teacher2')
    assert first.shape == second.shape and np.any(first != second)
    # One more teacher changes nothing for the first.
    config.teacher.number = 1
    alone = pipeline.run(config, tmp_path / 'alone')
    assert alone['teacher']['accuracy'] == report['teacher']['accuracy']
    assert 'ensemble' not in alone
    # Nor is it the one of a run with the next seed, from which it has to be independent.
    config.seed += 1
    with pytest.raises(errors.Stopped, match='of search'):
        pipeline.run(config, tmp_path / 'next', stops=tiny.After(12))
    assert np.any(kernel('next/teacher') != second)
