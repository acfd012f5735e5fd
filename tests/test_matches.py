"""Widths that come to match by chance, in a network whose code decides by a match."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest

import jaxkd
from jaxkd.graph import settle
from jaxkd.search import blocks, control, criteria, gates, learn, matches

IMAGES = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)


class Projected(nn.Module):
    """Residual sums with a projection where the shapes differ, as they do in the full network."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(24, (3, 3))(x))
        for width in (32, 48, 64):
            y = nn.relu(nn.Conv(width, (3, 3))(x))
            y = nn.Conv(width, (3, 3))(y)
            if x.shape != y.shape:
                x = nn.Conv(width, (1, 1), name=f'project_{width}')(x)
            x = nn.relu(x + y)
        return nn.Dense(10)(x.mean((1, 2)))


@pytest.fixture(scope='module')
def projected():
    model = Projected()
    variables = model.init(jax.random.key(0), nets.zeros(IMAGES))
    return jaxkd.trace(model, variables, IMAGES), variables


@pytest.mark.parametrize('flops', [0.4, 0.45])
def test_a_width_is_avoided_where_it_would_decide(projected, flops):
    """With multiples of 8 they match often; at 0.45 both are as narrow as they may be."""
    graph, variables = projected
    scores = criteria.CRITERIA['l1'](graph, variables, criteria.Evidence(None, ()))

    def choose(avoided):
        return jaxkd.select(graph, scores, flops=flops, round_to=8, min_keep=0.08, avoided=avoided)

    assert not settle.works(graph, choose({}))
    keep = matches.apart(graph, choose, scores)
    small = jaxkd.compact(graph, variables, keep)
    assert flops - 0.03 < small.structure.compact['flops'] / graph.cost().flops <= flops
    assert all(units.sum() % 8 == 0 for name, units in keep.items() if graph.sizes[name] > 10)


class Narrowing(nn.Module):
    """A block that would add its input, if that were as wide as its field says."""

    features: int = 6

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(12, (3, 3), name='stem')(x))
        y = nn.Conv(self.features, (3, 3), name='narrow')(x)
        return nn.Dense(6)((x + y if x.shape[-1] == self.features else y).mean((1, 2)))


@pytest.mark.parametrize('narrow', [4, 6])
def test_a_width_is_avoided_that_a_field_holds(narrow):
    model = Narrowing()
    variables = model.init(jax.random.key(0), nets.zeros(IMAGES))
    graph = jaxkd.trace(model, variables, IMAGES)
    scores = {'stem': np.ones(12), 'narrow': np.ones(6)}
    most = [(name, {'max_keep': number}) for name, number in (('stem', 6), ('narrow', narrow))]

    def choose(avoided):
        return jaxkd.select(graph, scores, blocks=most, avoided=avoided)

    assert not settle.works(graph, choose({}))
    keep = matches.apart(graph, choose, scores)
    assert (keep['stem'].sum(), keep['narrow'].sum()) == (5, narrow)
    jaxkd.compact(graph, variables, keep)


def test_what_is_not_a_matter_of_widths_is_left_alone(projected):
    graph, _ = projected
    spread = settle.at_random(graph)
    assert matches.apart(graph, lambda avoided: spread, {}) is spread
    # Nothing else can be kept: it is for `compact` to say what is wrong.
    narrow = graph.keep_all() | nets.keep_first(Conv_2=(24, 32))
    assert not settle.works(graph, narrow)
    assert matches.apart(graph, lambda avoided: narrow, {}) is narrow


def test_a_search_neither_cuts_to_such_widths_nor_ends_with_them(projected):
    graph, variables = projected
    course = learn.course(graph, steps=100, learning_rate=1e-3, flops=0.6, shrink=1.0)
    body = learn.body(course, graph.keep_all())
    params = gates.gated(course.gates, variables['params'])
    memory = learn.first(body, params)

    def closed(**keep):
        """The parameters with these gates shut, and what the controller then knows."""
        shut = {name: ~units for name, units in nets.keep_first(**keep).items()}
        thresholds = {
            name: np.where(shut.get(name, False), np.inf, np.zeros(size))
            for name, size in graph.sizes.items()
        }
        return (
            gates.shrink(course.gates, params, thresholds),
            memory._replace(closed=memory.closed | shut),
        )

    for width, cuts in ((23, True), (24, False)):
        after = learn.press(body, 0, *closed(Conv_2=(width, 32)))
        assert control.alive(graph, after)['Conv_2'].sum() == width
        assert after.physical['Conv_2'].sum() == (width if cuts else 32)
    keep = learn.choose(body, *closed(Conv_2=(24, 32), Conv_1=(16, 32)))
    jaxkd.compact(graph, variables, keep)


def test_numbers_of_units_are_avoided(projected):
    graph, _ = projected
    scores = {name: np.ones(size) for name, size in graph.sizes.items()}
    keep = jaxkd.select(graph, scores, flops=0.5)
    count = int(keep['Conv_3'].sum())
    other = jaxkd.select(graph, scores, flops=0.5, avoided={'Conv_3': {count, count + 1}})
    assert other['Conv_3'].sum() not in (count, count + 1)
    assert 0.495 <= graph.cost(other).flops / graph.cost().flops <= 0.5
    with pytest.raises(jaxkd.ConfigError, match="avoided is 'Conv'"):
        jaxkd.select(graph, scores, flops=0.5, avoided={'Conv': {1}})
    assert blocks.resolve(graph)['Conv_3'].avoided == frozenset()
