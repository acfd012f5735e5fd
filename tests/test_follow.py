"""Fields of a model's own modules that say a width, where the code asks them."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest

import jaxkd
from jaxkd.search import learn

IMAGES = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)


class Inverted(nn.Module):
    """An inverted residual block, which asks a field whether it may add its input."""

    features: int
    strides: int = 1
    scale: int = 16  # as wide as the stem, and none of its width

    @nn.compact
    def __call__(self, x):
        inner = 2 * x.shape[-1]
        y = nn.relu(nn.Conv(inner, (1, 1))(x))
        y = nn.relu(nn.Conv(inner, (3, 3), self.strides, feature_group_count=inner)(y))
        y = nn.BatchNorm(True)(nn.Conv(self.features, (1, 1))(y))
        y = y * (self.scale / 16)
        return x + y if self.strides == 1 and x.shape[-1] == self.features else y


class Projected(nn.Module):
    """A residual block, which asks its field whether its input has to be projected."""

    width: int

    def setup(self):
        self.first = nn.Conv(self.width, (3, 3))
        self.second = nn.Conv(self.width, (3, 3))
        self.shortcut = nn.Conv(self.width, (1, 1))

    def __call__(self, x):
        y = self.second(nn.relu(self.first(x)))
        return nn.relu(y + (x if x.shape[-1] == self.width else self.shortcut(x)))


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (3, 3))(x)
        x = Inverted(16, name='same')(x)
        x = Inverted(24, 2, name='wider')(x)
        x = Inverted(24, name='again')(x)
        x = Projected(32, name='projected')(x)
        x = Projected(32, name='plain')(x)
        return nn.Dense(10)(x.mean((1, 2)))


STREAMS = ('Conv_0', 'wider/Conv_2', 'projected/second')


@pytest.fixture(scope='module')
def network():
    model = Network()
    variables = model.init(jax.random.key(0), nets.zeros(IMAGES))
    return jaxkd.trace(model, variables, IMAGES), variables


def test_fields_follow_the_widths_of_residual_streams(network, tmp_path):
    graph, variables = network
    assert not any(graph.by_name[name].frozen for name in STREAMS)
    keep = nets.keep_first(**{name: (11 + i, graph.sizes[name]) for i, name in enumerate(STREAMS)})
    small = jaxkd.compact(graph, variables, keep)
    fields = small.structure.fields
    assert fields['same'] == {'features': 11}  # and not its scale
    assert fields['again'] == {'features': 12}
    assert fields['projected'] == fields['plain'] == {'width': 13}
    images = np.random.default_rng(0).normal(size=IMAGES.shape).astype(np.float32)
    masked = graph.model.apply(jaxkd.mask(graph, variables, keep), images)
    nets.assert_same(masked, small.apply(small.variables, images), 1e-5)

    # In a file, and cut once more.
    jaxkd.save(tmp_path / 'small', small)
    loaded = jaxkd.load(tmp_path / 'small', model=Network())
    assert loaded.structure == small.structure
    nets.assert_same(masked, loaded.apply(loaded.variables, images), 1e-5)
    smaller = jaxkd.prune(loaded.module, loaded.variables, IMAGES, flops=0.5)
    assert smaller.structure.fields['same']['features'] <= 11
    assert smaller.structure.compact['flops'] <= 0.5 * small.structure.compact['flops']


def test_a_search_and_pruning_cut_the_streams(network):
    graph, variables = network
    settled = learn.rehearse(graph)
    assert {(f.layer, f.field): f.group for f in settled.follows} == {
        ('same', 'features'): 'Conv_0',
        ('wider', 'features'): 'wider/Conv_2',
        ('again', 'features'): 'wider/Conv_2',
        ('projected', 'width'): 'projected/second',
        ('plain', 'width'): 'projected/second',
    }
    small = jaxkd.prune(graph.model, variables, IMAGES, flops=0.3)
    kept = {name: len(group['kept']) for name, group in small.structure.groups.items()}
    assert all(kept[name] < graph.sizes[name] for name in STREAMS)


def test_what_is_cut_by_no_field_needs_none(network):
    graph, variables = network
    small = jaxkd.compact(graph, variables, nets.keep_first(**{'same/Conv_0': (9, 32)}))
    assert small.structure.fields == {}
