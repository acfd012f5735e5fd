"""Blocks that are found, not written: `blocks='auto'`."""

import re

from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkd
from jaxkd import models, summary
from jaxkd.search import blocks, repeated

IMAGE = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)


def _of_groups(model, asked='auto', image=IMAGE):
    """The block of each group."""
    graph = summary.trace(model, [image], {})
    return {name: limit.block for name, limit in blocks.resolve(graph, asked).items()}


@pytest.mark.parametrize(
    ('name', 'number', 'module', 'example', 'outside'),
    [
        ('mobilenet_v1', 13, r'block\d+_', 'block3_pointwise/conv', 'classifier'),
        ('mobilenet_v2', 17, r'block\d+/', 'block5/expand/conv', 'head/conv'),
        ('resnet20', 9, r'stage\d_block\d/', 'stage2_block1/conv1/conv', 'classifier'),
        ('vgg11_bn', 5, r'stage\d_', 'stage3_conv1/conv', 'hidden1'),
        # 48 layers of three dense blocks, and what comes between these.
        (
            'densenet_bc_100_12',
            50,
            r'(block\d_layer\d+_|transition\d/)',
            'block2_layer3_conv1/conv',
            'classifier',
        ),
        ('efficientnet_b0', 16, r'block\d+/', 'block2/expand/conv', 'head/conv'),
        ('squeezenet1_1', 8, r'stage\d_fire\d/', 'stage1_fire0/squeeze', 'stem'),
        ('mobilevit_xxs', 10, r'block\d+/', 'block5/local/conv', 'head/conv'),
    ],
)
def test_blocks_of_networks_by_name(name, number, module, example, outside):
    of_group = _of_groups(models.create(name), image=IMAGE)
    found = set(of_group.values()) - {''}
    assert len(found) == number
    begins = re.match(module, example).group().rstrip('/')
    assert re.search(of_group[example], begins + '/x') or of_group[example] == f'^{begins}[^0-9]'
    assert of_group[outside] == ''
    assert all(re.match(module, pattern[1:].replace('(/|$)', '/')) for pattern in found)


class ConvBlock(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.BatchNorm(True)(nn.Conv(self.features, (3, 3))(x)))


class Bottleneck(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(self.features, (1, 1))(ConvBlock(8)(x))
        return x + nn.Conv(self.features, (1, 1))(nn.sigmoid(nn.Conv(4, (1, 1))(y)))


class Stage(nn.Module):
    features: int

    def setup(self):
        self.downsample = nn.Conv(self.features, (2, 2), 2)
        self.blocks = [Bottleneck(self.features) for _ in range(2)]

    def __call__(self, x):
        x = self.downsample(x)
        for block in self.blocks:
            x = block(x)
        return x


class Stages(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = ConvBlock(6)(x)
        for features in (8, 12):
            x = Stage(features)(x)
        return nn.Dense(10)(x.mean((1, 2)))


class Plain(nn.Module):
    """Its layers are all that it repeats; the third is summed into the second."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3))(x))
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        return nn.Dense(10)((x + nn.Conv(8, (3, 3))(x)).mean((1, 2)))


class Blocks(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(5, (1, 1))(nn.Conv(4, (1, 1))(x))
        return nn.Dense(10)(ConvBlock(8)(ConvBlock(6)(x)).mean((1, 2)))


class Bare(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.Conv(4, (3, 3))(x).mean((1, 2)))


def test_blocks_of_networks_never_seen():
    """Bottlenecks in stages, single ones, and layers where there is nothing else."""
    stages = _of_groups(Stages())
    assert set(stages.values()) - {''} == {
        f'^Stage_{i}/blocks_{j}(/|$)' for i in range(2) for j in range(2)
    }
    assert stages['ConvBlock_0/Conv_0'] == ''  # of its kind there is one
    assert set(_of_groups(Blocks()).values()) == {'', '^ConvBlock_0(/|$)', '^ConvBlock_1(/|$)'}
    # The third layer decides on no channels of its own.
    assert set(_of_groups(Plain()).values()) == {'', '^Conv_0(/|$)', '^Conv_1(/|$)'}
    with pytest.raises(jaxkd.ConfigError, match="'auto': no module repeats.*Conv_0, Dense_0"):
        _of_groups(Bare())


_NAME = st.builds(
    lambda *words: '_'.join(filter(None, words)),
    st.sampled_from(['block', 'conv', 'Stage', 'a']),
    st.sampled_from(['', '0', '1', '2', '10', '1a']),
    st.sampled_from(['', 'conv1', 'bn', '3']),
)
_PATHS = st.lists(st.lists(_NAME, min_size=1, max_size=3).map('/'.join), min_size=1, max_size=20)


@given(_PATHS)
@settings(max_examples=300, deadline=None)
def test_found_modules_are_apart(layers):
    """No layer belongs to two, and every pattern covers the whole of what it names."""
    layers = list(dict.fromkeys(layers))
    found = repeated.find(layers)
    owners = [[pattern for pattern in found if re.search(pattern, layer)] for layer in layers]
    assert max(map(len, owners)) <= 1
    assert list(dict.fromkeys(o[0] for o in owners if o)) == found
    for pattern in found:
        name = pattern[1:].partition('(')[0].removesuffix('_[^0-9]')
        inside = [path for path in layers if path == name or path.startswith(f'{name}/')]
        assert all(re.search(pattern, path) for path in inside)


def test_auto_is_taken_wherever_blocks_are():
    model = models.create('resnet20')
    graph = summary.trace(model, [IMAGE], {})
    scores = {g.name: np.ones(g.size) for g in graph.groups if not g.frozen}
    # Without settings they are for looking at: nothing else is selected.
    for asked in ('auto', ('auto',)):  # as it is written, and as a flag has it
        chosen = jaxkd.select(graph, scores, flops=0.5, blocks=asked)
        for name, keep in jaxkd.select(graph, scores, flops=0.5).items():
            np.testing.assert_array_equal(chosen[name], keep)
    for wrong in ('automatic', ['auto', 'auto'], 3, [('x',)]):
        with pytest.raises(jaxkd.ConfigError, match=r"it must be 'auto' or a tuple of pairs"):
            jaxkd.select(graph, scores, flops=0.5, blocks=wrong)
    # What is found can be written, and given settings.
    patterns = [pattern for pattern, _ in blocks.pairs(graph, 'auto')]
    written = blocks.resolve(graph, [(pattern, {'min_keep': 0.5}) for pattern in patterns])
    assert {n: l.block for n, l in written.items()} == {
        n: l.block for n, l in blocks.resolve(graph, 'auto').items()
    }
