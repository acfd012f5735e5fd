"""Widened networks: their weights by hand, what they compute, what they cost, how wide they get."""

import functools
import json
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
from nets import (
    Net,
    assert_same,
    conv,
    images_for,
    keep_first,
    variables_of,
)
import numpy as np
import pytest

import jaxkd
from jaxkd import models
from jaxkd.graph import structure, widen
from jaxkd.search import blocks, expand

IMAGES = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)


def residual(x):
    x = conv(4, name='stem')(x)
    y = conv(4, 1, name='conv2')(nn.relu(conv(6, use_bias=True, name='conv1')(x)))
    return nn.Dense(5, name='head')((x + y).mean((1, 2)))


def traced(body, x=IMAGES):
    model = Net(body)
    variables = variables_of(model, x)
    return variables, jaxkd.trace(model, variables, x)


def assert_widened(graph, variables, copies, tolerance=1e-4):
    """Computes what the masked network does, and costs what tracing it anew says; the model."""
    small = widen.widen(graph, variables, copies, noise=0)
    complete = widen.complete(graph, copies)
    masked = jaxkd.mask(graph, variables, {name: n > 0 for name, n in complete.items()})
    x = [images_for(leaf) for leaf in graph.inputs]
    expected, found = (
        jax.jit(functools.partial(module.apply, **graph.apply_kwargs))(weights, *x)
        for module, weights in ((graph.model, masked), (small.module, small.variables))
    )
    assert_same(expected, found, tolerance)
    again = jaxkd.trace(small.module, small.variables, *graph.inputs, **graph.apply_kwargs)
    cost = again.cost()
    assert small.structure.compact == {r: getattr(cost, r) for r in small.structure.compact}
    assert cost.rows == graph.polynomial.cost(complete).rows
    return small


def test_widened_weights_by_hand():
    """Of stem's units 0 twice and 2 once, of conv1's 1 once and 5 three times."""
    variables, graph = traced(residual)
    copies = {'stem': np.array([2, 0, 1, 0]), 'conv1': np.array([0, 1, 0, 0, 0, 3])}
    small = assert_widened(graph, variables, copies)
    old, new = variables['params'], small.variables['params']
    stem, conv1 = [0, 0, 2], [1, 5, 5, 5]
    of_stem, of_conv1 = np.array([2, 2, 1.0]), np.array([1, 3, 3, 3.0])
    np.testing.assert_array_equal(new['stem']['kernel'], old['stem']['kernel'][..., stem])
    np.testing.assert_array_equal(new['conv1']['bias'], old['conv1']['bias'][np.array(conv1)])
    np.testing.assert_allclose(
        new['conv1']['kernel'],
        old['conv1']['kernel'][:, :, stem][..., conv1] / of_stem[:, None],
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        new['conv2']['kernel'],
        old['conv2']['kernel'][:, :, conv1][..., stem] / of_conv1[:, None],
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        new['head']['kernel'], old['head']['kernel'][np.array(stem)] / of_stem[:, None], rtol=1e-6
    )
    assert small.structure.groups['stem'] == {'size': 4, 'kept': [0, 0, 2]}
    np.testing.assert_array_equal(small.structure.keep['stem'], [True, False, True, False])
    np.testing.assert_array_equal(small.structure.copies['conv1'], copies['conv1'])
    record = json.loads(json.dumps(small.structure.to_json()))
    assert jaxkd.Structure.from_json(record) == small.structure


def test_only_further_copies_are_disturbed():
    variables, graph = traced(residual)
    copies = {'stem': np.array([2, 0, 1, 0])}
    exact = widen.widen(graph, variables, copies, noise=0).variables['params']
    noisy = widen.widen(graph, variables, copies, seed=3).variables['params']
    again = widen.widen(graph, variables, copies, seed=3).variables['params']
    assert_same(noisy, again, 0)
    ratio = np.asarray(noisy['stem']['kernel'] / exact['stem']['kernel'])
    np.testing.assert_array_equal(ratio[..., [0, 2]], 1)
    assert 0.5 * widen.NOISE < np.std(ratio[..., 1]) < 2 * widen.NOISE
    np.testing.assert_array_equal(noisy['head']['kernel'], exact['head']['kernel'])


def test_the_factor_by_hand():
    """Multiply-adds are a · (1,733 + 640 b), of a = 2 units of stem and b = 3 of conv1: 7,306.

    Under 30,000: ω = 2 is a=4 b=6 22,292; 2⅙ is a=4 b=7 24,852; 2¼ would be a=5 b=7 31,065. So ω is
    just below 2¼. A fifth unit of stem does not fit; conv1 goes on to b=9: 29,972.
    """
    variables, graph = traced(residual)
    keep = keep_first(stem=(2, 4), conv1=(3, 6))
    budgets = blocks.every_budget(graph, flops=30_000)
    small, found = expand.expanded(graph, variables, keep, budgets)
    assert math.isclose(found.factor, 2.25, rel_tol=1e-6)
    assert {name: found.counts[name] for name in keep} == {'stem': 4, 'conv1': 9}
    assert small.structure.compact['flops'] == 29_972
    copies = small.structure.copies
    np.testing.assert_array_equal(copies['stem'], [2, 2, 0, 0])
    np.testing.assert_array_equal(copies['conv1'], [3, 3, 3, 0, 0, 0])
    # 1 is what the full network has: a=4, b=6.
    same = jaxkd.expand(graph, variables, keep, flops=1.0)
    assert same.structure.compact['flops'] == graph.cost().flops == 22_292


def test_blocks_and_roundings_hold():
    variables, graph = traced(residual)
    keep = keep_first(stem=(2, 4), conv1=(2, 6))

    def counts(**asked):
        small = jaxkd.expand(graph, variables, keep, flops=60_000, **asked)
        assert small.structure.compact['flops'] <= 60_000
        return {name: len(small.structure.groups[name]['kept']) for name in keep}

    assert counts(round_to=4) == {'stem': 8, 'conv1': 8}  # 54,824; neither 12 fits
    whole = keep | {'stem': np.ones(4, bool)}
    frozen = jaxkd.expand(
        graph, variables, whole, flops=60_000, blocks=(('stem', {'freeze': True}),)
    )
    kept = {name: len(group['kept']) for name, group in frozen.structure.groups.items()}
    assert kept['stem'] == 4 and kept['conv1'] == 20  # 4 · (1,733 + 12,800) = 58,132
    capped = counts(blocks=(('conv1', {'max_keep': 5}),))
    assert capped['conv1'] == 5 and capped['stem'] == 12  # 12 · (1,733 + 3,200) = 59,196
    assert counts(blocks=(('conv1', {'max_keep': 0.5}),))['conv1'] == 3
    own = (('conv2', {'budget': {'flops': 2_000}}),)  # of 64 · a · b
    wide = counts(blocks=own)
    assert 64 * wide['stem'] * wide['conv1'] <= 2_000


def test_what_cannot_be_widened_is_said():
    variables, graph = traced(residual)
    keep = keep_first(stem=(2, 4), conv1=(3, 6))
    with pytest.raises(jaxkd.BudgetError, match=r'what was found uses 1\.0\d+ of the budget'):
        jaxkd.expand(graph, variables, keep, flops=7_000)
    with pytest.raises(jaxkd.GraphError, match='nothing of Net can be widened'):
        jaxkd.expand(graph, variables, keep, flops=7_310)
    with pytest.raises(jaxkd.ConfigError, match='give flops='):
        jaxkd.expand(graph, variables, keep)
    with pytest.raises(jaxkd.ConfigError, match='noise is nan'):
        jaxkd.expand(graph, variables, keep, flops=8_000, noise=np.nan)
    with pytest.raises(jaxkd.GraphError, match="'head' cannot be widened: network output"):
        widen.widen(graph, variables, {'head': np.full(5, 2)})
    with pytest.raises(jaxkd.GraphError, match='whole numbers'):
        widen.widen(graph, variables, {'stem': np.full(4, 1.5)})
    with pytest.raises(jaxkd.GraphError, match="'stem' must be"):
        widen.widen(graph, variables, {'stem': np.full(5, 2)})


def test_attention_has_more_heads_but_no_wider_ones():
    """Copies of what queries and keys are compared by would count twice; heads share their sum."""

    class Attend(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(8, name='stem')(x)
            x = nn.MultiHeadDotProductAttention(4, qkv_features=24, out_features=8, name='att')(x)
            return nn.Dense(3, name='head')(x.mean(1))

    model = Attend()
    x = jax.ShapeDtypeStruct((2, 5, 3), jnp.float32)
    variables = variables_of(model, x)
    graph = jaxkd.trace(model, variables, x)
    heads, compared, values = 'att/query', 'att/query#2', 'att/value'
    copies = {heads: np.array([2, 1, 0, 3]), values: np.array([1, 2, 1, 1, 2, 0])}
    assert_widened(graph, variables, copies)
    with pytest.raises(jaxkd.GraphError, match='no weights read its channels'):
        widen.widen(graph, variables, {compared: np.full(6, 2)})


def test_code_that_is_not_right_with_copies_is_found():
    """A product of channels with each other, by no weights: copies make it larger."""

    def body(x):
        x = conv(4, name='stem')(x)
        energy = jnp.einsum('bhwc,bhwc->bhw', x, x)
        return nn.Dense(5, name='head')((x * energy[..., None]).mean((1, 2)))

    variables, graph = traced(body)
    copies = {'stem': np.array([2, 1, 1, 1])}
    assert not graph.by_name['stem'].frozen
    assert widen.at_fault(graph, copies) == ['stem']
    with pytest.raises(
        jaxkd.GraphError, match='something else with copies of the channels of stem'
    ):
        widen.widen(graph, variables, copies)
    with pytest.raises(jaxkd.GraphError, match='nothing of Net can be widened.*something else'):
        jaxkd.expand(graph, variables, {'stem': np.arange(4) < 2}, flops=1.0)


def layouts(x):
    """Groups of a GroupNorm, a depthwise multiplier, groups of a convolution, flattened pixels."""
    x = nn.GroupNorm(3, name='norm')(conv(12, name='stem')(x))
    x = conv(24, 3, feature_group_count=12, name='depthwise')(x)
    x = jnp.concatenate([conv(6, 1, name='left')(x), conv(4, 1, name='right')(x)], -1)
    x = nn.relu(conv(8, 1, name='mix')(x))
    x = conv(12, feature_group_count=4, name='grouped')(x)
    return nn.Dense(5, name='head')(x.reshape(x.shape[0], -1))


ZOO = {
    'mobilenet_v2': {'width': 0.35},
    'resnet20': {},
    'densenet_bc_100_12': {'depths': (2, 2, 2)},
    'vgg11_bn': {},
    'resnext50_32x4d': {'depths': (1, 1, 1, 1)},
}


def random_copies(graph, seed=0):
    random = np.random.default_rng(seed)
    copies = {}
    for group in graph.groups:
        if not widen.stays(group):
            copies[group.name] = random.integers(0, 4, group.size)
            copies[group.name][random.integers(group.size)] = 2
    return copies


@pytest.mark.parametrize('seed', range(2))
def test_layouts(seed):
    variables, graph = traced(layouts)
    assert {g.name for g in graph.groups if not widen.stays(g)} >= {
        'stem',
        'left',
        'mix',
        'grouped',
    }
    assert_widened(graph, variables, random_copies(graph, seed))


@pytest.mark.parametrize('name', ZOO)
def test_the_zoo_widened(name):
    model = models.create(name, num_classes=10, **ZOO[name])
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = variables_of(model, x)
    graph = jaxkd.trace(model, variables, x)
    # Statistics that are drawn at random let values grow a thousandfold, and rounding with them.
    assert_widened(graph, variables, random_copies(graph), tolerance=1e-3)


def test_a_widened_network_is_saved_cut_and_widened_again(tmp_path):
    """The structure is always that of the full network, in which units stand several times."""
    model = models.create('resnet20', num_classes=10)
    x = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    variables = variables_of(model, x)
    graph = jaxkd.trace(model, variables, x)
    scores = {group.name: np.arange(group.size, 0, -1.0) for group in graph.groups}
    keep = jaxkd.select(graph, scores, flops=0.3)
    small = jaxkd.expand(graph, variables, keep, flops=0.5)
    assert 0.99 * 0.5 <= small.structure.compact['flops'] / graph.cost().flops <= 0.5
    jaxkd.save(tmp_path / 'small', small)
    loaded = jaxkd.load(tmp_path / 'small')
    assert loaded.structure == small.structure
    np.testing.assert_array_equal(
        loaded.apply(loaded.variables, images_for(x)), small.apply(small.variables, images_for(x))
    )

    again = jaxkd.trace(small.module, small.variables, x)
    assert again.sizes == {n: len(g['kept']) for n, g in small.structure.groups.items()}
    scores = {group.name: np.arange(group.size, 0, -1.0) for group in again.groups}
    keep = jaxkd.select(again, scores, flops=0.6)
    wider = jaxkd.expand(again, small.variables, keep, flops=graph.cost().flops // 2)
    whole = structure.composed(small.structure, wider.structure)
    assert whole.full == small.structure.full and whole.widths == wider.structure.widths
    assert whole.compact == wider.structure.compact
    counted = graph.polynomial.cost(whole.copies)
    assert counted.flops == whole.compact['flops'] and counted.params == whole.compact['params']


class Branches(nn.Module):
    """Two residual branches, whose norms keep what is left of them."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), name='stem')(x)
        for name in ('first', 'second'):
            y = nn.relu(nn.Conv(8, (3, 3), name=f'{name}_in')(x))
            y = nn.Conv(8, (3, 3), use_bias=False, name=f'{name}_out')(y)
            x = x + nn.BatchNorm(use_running_average=not train, name=f'{name}_bn')(y)
        return nn.Dense(2, name='head')(x.mean((1, 2)))


def test_a_branch_that_has_gone_stays_away():
    model, images = Branches(), images_for(IMAGES)
    variables = variables_of(model, IMAGES)
    graph = jaxkd.trace(model, variables, images)
    keep = keep_first(stem=(5, 8), first_in=(0, 8), second_in=(4, 8))
    small = jaxkd.expand(graph, variables, keep, flops=0.6, noise=0.0)
    assert 0.5 < small.structure.compact['flops'] / small.structure.full['flops'] <= 0.6
    assert not small.structure.groups['first_in']['kept']
    assert len(small.structure.groups['stem']['kept']) > 5
    cut = jaxkd.compact(graph, variables, keep)
    assert_same(cut.apply(cut.variables, images), small.apply(small.variables, images), 1e-4)
    trained = [
        one.apply(one.variables, images, train=True, mutable=['batch_stats'])[0]
        for one in (cut, small)
    ]
    assert_same(*trained, 1e-4)
