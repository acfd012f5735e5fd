"""What each primitive and each kind of layer does to channels: cut, and compared with the mask."""

import functools
import warnings

from flax import linen as nn
import jax
import jax.numpy as jnp
from nets import (
    IMAGES,
    Net,
    assert_compact_is_masked,
    assert_same,
    conv,
    half,
    images_for,
    variables_of,
)
import numpy as np
import pytest

import jaxkd

stem = functools.partial(conv, name='stem')


def shuffle(x, groups):
    x = x.reshape(*x.shape[:3], groups, x.shape[-1] // groups)
    return x.swapaxes(-1, -2).reshape(*x.shape[:3], -1)


def split(x):
    left, right = jnp.split(stem(8)(x), 2, axis=-1)
    return jnp.concatenate([conv(3, name='left')(left), right], axis=-1)


def halves(x):
    x = stem(8)(x)
    middle = x.shape[-1] // 2
    return x[..., :middle] * nn.sigmoid(x[..., middle:])


def every_other(x):
    x = stem(8)(x)
    return x[..., ::2] * nn.sigmoid(x[..., 1::2])


def res2net(x):
    pieces = jnp.split(stem(8)(x), 4, axis=-1)
    for i in range(1, 4):
        pieces[i] = pieces[i] + nn.relu(conv(pieces[i].shape[-1])(pieces[i - 1]))
    return jnp.concatenate(pieces, axis=-1)


def shuffled(x):
    x = shuffle(nn.relu(stem(12)(x)), 3)
    return conv(x.shape[-1], feature_group_count=x.shape[-1], name='depthwise')(x)


def grouped_and_shuffled(x):
    x = conv(8, feature_group_count=2, name='grouped')(nn.relu(stem(6)(x)))
    return conv(8, feature_group_count=2, name='again')(shuffle(x, 2))


def pixel_shuffle(x):
    x = stem(12)(x)
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5)
    return conv(3, name='next')(x.reshape(b, 2 * h, 2 * w, c // 4))


def pixel_shuffle_channels_first(x):
    x = stem(12)(x)
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, c // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    return conv(3, name='next')(x.reshape(b, 2 * h, 2 * w, c // 4))


def space_to_depth(x):
    x = stem(5)(x)
    b, h, w, c = x.shape
    x = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
    return conv(3, name='next')(x.reshape(b, h // 2, w // 2, 4 * c))


def maxout(x):
    x = stem(8)(x)
    return x.reshape(*x.shape[:3], x.shape[-1] // 2, 2).max(-1)


def unflatten(x):
    x = nn.Dense(36 * 5, name='stem')(x.reshape(x.shape[0], -1))
    return conv(3, name='next')(x.reshape(-1, 6, 6, x.shape[-1] // 36))


def padded_on_both_sides(x):
    narrow, wide = stem(4)(x), conv(8, name='wide')(x)
    more = (wide.shape[-1] - narrow.shape[-1]) // 2
    return wide + jnp.pad(narrow, [(0, 0)] * 3 + [(more, more)])


def padded_on_one_side(x):
    narrow, wide = stem(4)(x), conv(7, name='wide')(x)
    return wide + jnp.pad(narrow, [(0, 0)] * 3 + [(0, wide.shape[-1] - narrow.shape[-1])])


def beside_the_image(x):
    return conv(5, name='next')(jnp.concatenate([x, stem(4)(x), jnp.ones((*x.shape[:3], 2))], -1))


def group_norm(x, **arguments):
    return nn.relu(nn.GroupNorm(**arguments)(stem(8)(x)))


def instance_norm(x):
    return nn.relu(nn.InstanceNorm()(stem(8)(x)))


class OwnBatchNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        scale = self.param('scale', nn.initializers.ones, x.shape[-1:])
        mean = self.variable('batch_stats', 'mean', jnp.zeros, x.shape[-1:])
        return (x - mean.value) * scale


class OwnConv(nn.Module):
    """Channels first, with its width in a field."""

    planes: int

    @nn.compact
    def __call__(self, x):
        kernel = self.param(
            'weight', nn.initializers.normal(), (self.planes, x.shape[1], 3, 3), x.dtype
        )
        bias = self.param('offset', nn.initializers.normal(), (self.planes, 1, 1))
        return jax.lax.conv(x, kernel, (1, 1), 'SAME') + bias


class SquareConv(nn.Module):
    """One number in its fields for two axes."""

    inputs: int
    outputs: int

    @nn.compact
    def __call__(self, x):
        shape = (3, 3, self.inputs, self.outputs)
        kernel = self.param('kernel', nn.initializers.normal(), shape)
        numbers = ('NHWC', 'HWIO', 'NHWC')
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=numbers)


def square(x):
    x = nn.relu(SquareConv(8, 6, name='stem')(conv(8, name='first')(x)))
    return SquareConv(6, 6, name='next')(x)


def channels_first(x):
    x = OwnConv(6, name='stem')(x.transpose(0, 3, 1, 2))
    x = OwnConv(5, name='next')(nn.relu(x))
    return x.transpose(0, 2, 3, 1)


def layer_scale(x):
    x = OwnBatchNorm(name='norm')(stem(6)(x))
    gamma = nn.module._context.module_stack[-1].param('gamma', nn.initializers.ones, x.shape[-1:])
    return x + gamma * conv(x.shape[-1], name='inner')(nn.relu(x))


class SetupStyle(nn.Module):
    width: int = 6

    def setup(self):
        self.stem = conv(self.width)
        self.blocks = [conv(self.width) for _ in range(2)]
        self.table = nn.Embed(4, self.width)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + nn.relu(block(x))
        return x * self.table(jnp.arange(4)).mean(0)


def sequential(x):
    return nn.Sequential([stem(6), nn.relu, lambda x: x[:, ::2, ::2], conv(5, name='next')])(x)


def twice(x):
    layer = conv(3, name='stem')
    return conv(5, name='next')(nn.relu(layer(nn.relu(layer(x[..., :3])))))


def transposed(x):
    return nn.ConvTranspose(5, (3, 3), strides=(2, 2), name='next')(nn.relu(stem(6)(x)))


def local(x):
    return nn.ConvLocal(4, (3, 3), name='next')(nn.relu(stem(6)(x)))


def two_axes(x):
    x = nn.DenseGeneral((4, 6), name='stem')(x)
    return nn.DenseGeneral(5, axis=(-2, -1), name='next')(nn.relu(x))


def einsum(x):
    x = nn.Einsum((3, 6), 'bhwc,cd->bhwd', name='stem')(x)
    return nn.Einsum((5, 6), 'bhwc,dc->bhwd', name='next')(nn.relu(x))


def embedding(x):
    tokens = jnp.int32(jnp.clip(x[..., 0] * 3, 0, 6))
    return conv(4, name='next')(nn.Embed(7, 6, name='stem')(tokens))


def attention(x, **arguments):
    x = stem(6)(x)
    tokens = x.reshape(x.shape[0], -1, x.shape[-1])
    heads = nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=20, **arguments)
    return x + heads(tokens).reshape(x.shape)


def own_attention(x):
    """A fused projection, and heads whose number is fixed."""
    x = stem(6)(x)
    b, h, w, _ = x.shape
    qkv = nn.Dense(3 * 2 * 4, name='qkv')(x.reshape(b, h * w, -1))
    q, k, v = jnp.moveaxis(qkv.reshape(b, h * w, 3, 2, -1), 2, 0)
    weights = nn.softmax(jnp.einsum('bqhd,bkhd->bhqk', q, k) / 2.0)
    out = jnp.einsum('bhqk,bkhd->bqhd', weights, v)
    return nn.Dense(5, name='out')(out.reshape(b, h, w, -1))


def resized(x, method):
    x = stem(5)(x)
    return conv(3, name='next')(jax.image.resize(x, (x.shape[0], 9, 12, x.shape[-1]), method))


def looped(x):
    y = conv(x.shape[-1] + 2, name='inner')(stem(5)(x))
    y = jax.lax.fori_loop(0, 2, lambda i, y: nn.relu(y) * 0.5, y)
    y = jax.lax.while_loop(lambda y: y.shape[0] < 1, jnp.abs, y)
    return jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, y)


def upsampled_by_index(x):
    x = stem(5)(x)
    return x[:, np.array([0, 0, 1, 1])].at[:, 1].set(2.0)


def stacked(x):
    """Two branches, weighted against each other."""
    branches = jnp.stack([conv(6, k, name=f'window{k}')(x) for k in (1, 3)], axis=1)
    weights = jnp.stack([nn.Dense(branches.shape[-1])(x.mean((1, 2))) for _ in range(2)], axis=1)
    first, second = jnp.unstack(branches * nn.softmax(weights, 1)[:, :, None, None], axis=1)
    return first + second


def vmapped(x):
    """Three layers at once: their kernels are one array, transposed and merged."""
    branches = nn.vmap(
        nn.Conv,
        in_axes=None,
        axis_size=3,
        variable_axes={'params': 0},
        split_rngs={'params': True},
    )
    return nn.relu(branches(6, (3, 3), name='branches')(nn.relu(stem(8)(x)))).sum(0)


class NormedBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.relu(nn.BatchNorm(use_running_average=True)(conv(6, name='inner')(x)))
        return x + conv(x.shape[-1], name='outer')(y), None


def scanned(x):
    """Three blocks whose norms' vectors are rows of one array."""
    blocks = nn.scan(
        NormedBlock,
        variable_axes={'params': 0, 'batch_stats': 0},
        split_rngs={'params': True},
        length=3,
    )
    return blocks(name='blocks')(stem(5)(x), None)[0]


class Written(nn.Module):
    """Its sizes are numbers in its code."""

    @nn.compact
    def __call__(self, x):
        return x @ self.param('kernel', nn.initializers.lecun_normal(), (8, 6)) + self.param(
            'shift', nn.initializers.zeros, (1, 1, 1, 6)
        )


def tiled(x):
    """A blur whose filter is tiled, and every channel twice."""
    x = stem(4)(x)
    blur = jnp.tile(jnp.ones((3, 3, 1, 1)) / 9, (1, 1, 1, x.shape[-1]))
    numbers = ('NHWC', 'HWIO', 'NHWC')
    x = jax.lax.conv_general_dilated(
        x, blur, (2, 2), 'SAME', dimension_numbers=numbers, feature_group_count=x.shape[-1]
    )
    return conv(3, name='next')(jnp.tile(x, 2) + jnp.concatenate([x, x], axis=-1))


class LowRank(nn.Module):
    """In one scope with the layer that it adds to."""

    features: int
    rank: int = 2

    def setup(self):
        self.child = nn.Dense(self.features)
        nn.share_scope(self, self.child)

    @nn.compact
    def __call__(self, x):
        a = self.param('a', nn.initializers.normal(), (x.shape[-1], self.rank))
        b = self.param('b', nn.initializers.normal(), (self.rank, self.features))
        return self.child(x) + x @ a @ b


class Own(nn.Module):
    """A layer with an array among its fields, and a width that is no Python int."""

    features: np.int64
    seed: np.ndarray

    @nn.compact
    def __call__(self, x):
        kernel = self.param('w', nn.initializers.normal(), (3, 3, x.shape[-1], self.features))
        numbers = ('NHWC', 'HWIO', 'NHWC')
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=numbers)


class NeverBound(nn.Module):
    def __init__(self):
        pass

    def __call__(self, x):
        return x


def own(x):
    return NeverBound()(Own(np.int64(6), np.array([0, 1]), name='stem')(x))


def beside_constants(x):
    """Dead code, and a layer as wide as another's input that keeps its own width."""
    x = stem(6)(x)
    kernel = nn.Conv(6, (1, 1), name='other', use_bias=False)
    y = kernel(x)
    kernel.variables['params']['kernel'][..., 0].sum()
    label = nn.Dense(x.shape[-1], name='label')(jnp.ones((len(x), 1, 1, 5)))
    return jnp.concatenate([y, jnp.broadcast_to(label, (*y.shape[:-1], label.shape[-1]))], -1)


# What is built, and how many units of each group there should be.
CUT = {
    'split': (split, {'stem': 4, 'left': 3}),
    'halves': (halves, {'stem': 4}),
    'every other': (every_other, {'stem': 4}),
    'res2net': (res2net, {'stem': 2}),
    'shuffled': (shuffled, {'stem': 4}),
    'grouped and shuffled': (grouped_and_shuffled, {'stem': 3, 'grouped': 2, 'again': 4}),
    'pixel shuffle': (pixel_shuffle, {'stem': 3, 'next': 3}),
    'pixel shuffle, channels first': (pixel_shuffle_channels_first, {'stem': 3, 'next': 3}),
    'space to depth': (space_to_depth, {'stem': 5, 'next': 3}),
    'maxout': (maxout, {'stem': 4}),
    'unflatten': (unflatten, {'stem': 5, 'next': 3}),
    'padded on both sides': (padded_on_both_sides, {'stem': 4, 'wide': 2}),
    'padded on one side': (padded_on_one_side, {'stem': 4, 'wide': 3}),
    'beside the image': (beside_the_image, {'stem': 4, 'next': 5}),
    'norm of 4 groups': (functools.partial(group_norm, num_groups=4), {'stem': 4}),
    'norm of groups of 2': (
        functools.partial(group_norm, num_groups=None, group_size=2),
        {'stem': 4},
    ),
    'instance norm': (instance_norm, {'stem': 8}),
    'channels first': (channels_first, {'stem': 6, 'next': 5}),
    'layer scale': (layer_scale, {'stem': 6}),
    'setup': (lambda x: SetupStyle(name='inner')(x), {'inner/stem': 6}),
    'sequential': (sequential, {'stem': 6, 'next': 5}),
    'twice': (twice, {'next': 5}),
    'transposed': (transposed, {'stem': 6, 'next': 5}),
    'local': (local, {'stem': 6, 'next': 4}),
    'two axes': (two_axes, {'stem': 4, 'stem#2': 6, 'next': 5}),
    'einsum': (einsum, {'stem': 6, 'next': 5}),
    'embedding': (embedding, {'stem:embedding[1]': 6, 'next': 4}),
    'attention': (
        attention,
        {
            'stem': 6,
            'MultiHeadDotProductAttention_0/query': 4,
            'MultiHeadDotProductAttention_0/query#2': 5,
            'MultiHeadDotProductAttention_0/value': 5,
        },
    ),
    'own attention': (own_attention, {'stem': 6, 'qkv': 4, 'out': 5}),
    'resized, linear': (functools.partial(resized, method='linear'), {'stem': 5, 'next': 3}),
    'resized, nearest': (functools.partial(resized, method='nearest'), {'stem': 5, 'next': 3}),
    'looped': (looped, {'stem': 5, 'inner': 5}),
    'stacked': (stacked, {'window1': 6}),
    'vmapped': (vmapped, {'stem': 8, 'branches': 6}),
    'scanned': (scanned, {'stem': 5, 'blocks/inner': 6}),
    'written': (lambda x: Written(name='next')(stem(8)(x)), {'stem': 8, 'next': 6}),
    'tiled': (tiled, {'stem': 4, 'next': 3}),
    'shared scope': (lambda x: LowRank(6, name='stem')(x), {'stem': 6, 'stem#2': 2}),
    'list of layers': (
        lambda x: nn.Sequential([conv(6), nn.Sequential([nn.relu, conv(5)])])(x),
        {'Conv_0': 6, 'Conv_1': 5},
    ),
    'own': (own, {'stem': 6}),
    'square': (square, {'first': 8, 'stem': 6, 'next': 6}),
    'beside constants': (beside_constants, {'stem': 6, 'other': 6, 'label': 6}),
    'norm of weights': (
        lambda x: nn.relu(nn.WeightNorm(conv(6, use_bias=True), name='stem')(x)),
        {'Conv_0': 6},
    ),
    'upsampled by index': (upsampled_by_index, {'stem': 5}),
}


@pytest.mark.parametrize('name', CUT)
def test_cut(name):
    body, units = CUT[name]

    def net(x):
        x = body(x)
        return nn.Dense(3, name='head')(x.mean(range(1, x.ndim - 1)))

    model = Net(net)
    variables = variables_of(model, IMAGES)
    graph = jaxkd.trace(model, variables, IMAGES)
    assert not graph.unknown
    assert {g.name: g.size for g in graph.groups if not g.frozen} == units
    for seed in range(2):
        keep = half(graph, seed)
        _, small = assert_compact_is_masked(model, variables, keep, IMAGES)
        again = jaxkd.trace(small.module, small.variables, IMAGES)
        assert again.cost() == graph.cost(keep)
        anew = jax.eval_shape(small.module.init, jax.random.key(0), IMAGES)
        assert jax.tree.map(jnp.shape, anew) == jax.tree.map(jnp.shape, small.variables)


def test_several_inputs_and_outputs():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, image, more, scale=1.0):
            x = stem(5)(image) + conv(5, name='other')(more['deep'])
            y = conv(4, name='next')(nn.relu(x))
            return {'logits': nn.Dense(3)(y.mean((1, 2))) * scale}, (conv(2, name='map')(y),)

    model = Two()
    more = {'deep': jax.ShapeDtypeStruct((2, 6, 6, 4), jnp.float32)}
    x = images_for(), {'deep': images_for(more['deep'])}
    variables = model.init(jax.random.key(0), *x)
    graph = jaxkd.trace(model, variables, IMAGES, more, scale=2.0)
    assert {g.name: g.size for g in graph.groups if not g.frozen} == {'stem': 5, 'next': 4}
    keep = half(graph)
    small = jaxkd.compact(graph, variables, keep)
    masked = model.apply(jaxkd.mask(graph, variables, keep), *x, scale=2.0)
    for a, b in zip(
        jax.tree.leaves(masked),
        jax.tree.leaves(small.apply(small.variables, *x, scale=2.0)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_dropout_is_traced():
    def body(x):
        x = nn.Dropout(0.5, deterministic=False)(stem(6)(x))
        return nn.Dense(3, name='head')(x.mean((1, 2)))

    model = Net(body)
    variables = {'params': model.init(jax.random.key(0), images_for())['params']}
    graph = jaxkd.trace(model, variables, IMAGES, rngs={'dropout': jax.random.key(0)})
    assert graph.by_name['stem'].frozen is None and not graph.unknown


class Standardized(nn.Conv):
    def param(self, name, init, *args, **kwargs):
        value = super().param(name, init, *args, **kwargs)
        if name != 'kernel':
            return value
        return (value - value.mean((0, 1, 2))) / (value.std((0, 1, 2)) + 1e-5)


def test_standardized_weights_keep_their_inputs():
    def body(x):
        x = Standardized(6, (3, 3), name='stem')(x)
        x = Standardized(5, (3, 3), name='next')(nn.relu(x))
        return nn.Dense(3, name='head')(x.mean((1, 2)))

    model = Net(body)
    variables = variables_of(model, IMAGES)
    graph = jaxkd.trace(model, variables, IMAGES)
    assert graph.by_name['stem'].frozen == 'one value is made of all its channels'
    assert_compact_is_masked(model, variables, {'next': np.arange(5) < 2}, IMAGES)


def layer_norm(x):
    x = nn.LayerNorm()(stem(8)(x))
    return nn.Dense(3, name='head')(nn.relu(conv(6, name='next')(x)).mean((1, 2)))


def test_layer_norm_is_inexact():
    model = Net(layer_norm)
    variables = variables_of(model, IMAGES)
    with pytest.raises(jaxkd.ConfigError, match="'freeze', 'allow'|freeze, allow"):
        jaxkd.trace(model, variables, IMAGES, inexact='perhaps')
    assert jaxkd.trace(model, variables, IMAGES).by_name['stem'].frozen
    graph = jaxkd.trace(model, variables, IMAGES, inexact='allow')
    norm = graph.by_name['stem']
    assert not norm.frozen and norm.inexact == 'one value is made of all its channels'
    assert 'inexact' in graph.table()
    keep = half(graph)
    small = jaxkd.compact(graph, variables, keep)
    assert small.structure.inexact == {'stem': norm.inexact}
    again = jaxkd.trace(small.module, small.variables, IMAGES)
    assert again.cost() == graph.cost(keep)
    # What is exact in the same network is still verified.
    assert not jaxkd.compact(graph, variables, {'next': keep['next']}).structure.inexact


def test_a_norm_of_groups_stays_exact_where_inexact_is_allowed():
    def body(x):
        return nn.Dense(3)(group_norm(x, num_groups=4).mean((1, 2)))

    model = Net(body)
    variables = variables_of(model, IMAGES)
    graph = jaxkd.trace(model, variables, IMAGES, inexact='allow')
    assert graph.by_name['stem'].size == 4 and not graph.by_name['stem'].inexact
    jaxkd.verify(graph, half(graph))


def test_a_norm_of_groups_loses_whole_groups_where_nothing_is_exact():
    def body(x):
        x = nn.GroupNorm(4)(Standardized(8, (3, 3), name='stem')(x))
        return nn.Dense(3)(Standardized(5, (3, 3), name='next')(nn.relu(x)).mean((1, 2)))

    model = Net(body)
    graph = jaxkd.trace(model, variables_of(model, IMAGES), IMAGES, inexact='allow')
    group = graph.by_name['stem']
    assert group.size == 4 and group.inexact and not group.frozen


def test_most_of_it_frozen_is_warned_about():
    model = Net(lambda x: nn.Dense(3)(nn.LayerNorm()(conv(8, name='stem')(x)).mean((1, 2))))
    with pytest.warns(UserWarning, match='no channel can be removed:\n.*stem: one value') as caught:
        jaxkd.trace(model, variables_of(model, IMAGES), IMAGES)
    assert __file__ in str(caught[0].message)


@pytest.mark.parametrize(
    'body, frozen, reason',
    [
        (
            lambda x: jnp.pad(x, ((0, 0),) * 3 + ((0, 12 - x.shape[-1]),)) + conv(12)(x),
            'stem',
            'layer "/" fixes a size in its own code',
        ),
        (
            lambda x: x.reshape(*x.shape[:3], 2, 4).sum(-2),
            'stem',
            'layer "/" fixes a size in its own code',
        ),
        (
            lambda x: nn.dot_product_attention(
                *(nn.DenseGeneral((2, 6), name=name)(x.reshape(2, -1, 8)) for name in 'qkv')
            ),
            'q#2',
            'the model computes with its width',
        ),
    ],
)
def test_what_the_code_cannot_do_is_frozen(body, frozen, reason):
    """The rest is cut, and verified."""

    def net(x):
        x = body(stem(8)(x))
        return nn.DenseGeneral(3, axis=tuple(range(1, x.ndim)), name='head')(x)

    model = Net(net)
    variables = variables_of(model, IMAGES)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that there is little left
        graph = jaxkd.trace(model, variables, IMAGES)
    assert reason in graph.by_name[frozen].frozen
    assert __file__ in graph.by_name[frozen].source
    assert_compact_is_masked(model, variables, half(graph), IMAGES)


def test_what_is_compact_is_cut_further():
    model = Net(lambda x: nn.Dense(3)(grouped_and_shuffled(x).mean((1, 2))))
    variables = variables_of(model, IMAGES)
    graph = jaxkd.trace(model, variables, IMAGES)
    name = next(g.name for g in graph.groups if g.size > 3 and not g.frozen)
    once = jaxkd.compact(graph, variables, {name: np.arange(graph.sizes[name]) > 0})
    graph = jaxkd.trace(once.module, once.variables, IMAGES)
    twice = jaxkd.compact(graph, once.variables, {name: np.arange(graph.sizes[name]) > 0})
    again = jaxkd.trace(model, variables, IMAGES)
    both = jaxkd.compact(again, variables, {name: np.arange(again.sizes[name]) > 1})
    x = images_for()
    assert_same(both.apply(both.variables, x), twice.apply(twice.variables, x))
    assert twice.structure.full_widths == both.structure.full_widths
    assert twice.structure.model == both.structure.model


def test_windows_are_no_channels_where_inexact_is_allowed():
    class Standardized(nn.Conv):
        def param(self, name, *args, **kwargs):
            value = super().param(name, *args, **kwargs)
            return value - value.mean((0, 1, 2)) if name == 'kernel' else value

    def body(x):
        x = nn.relu(Standardized(6, (3, 3), name='stem')(x))
        return nn.Dense(3)(Standardized(5, (3, 3), name='next')(x).mean((1, 2)))

    model = Net(body)
    graph = jaxkd.trace(model, variables_of(model, IMAGES), IMAGES, inexact='allow')
    assert {g.name for g in graph.groups if not g.frozen} == {'stem', 'next'}


def test_refusals_name_layer_and_line():
    class Fixed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x.reshape(*x.shape[:3], 2, 4).sum(-2)

    model = Net(lambda x: nn.Dense(3)(Fixed(name='fixed')(stem(8)(x)).mean((1, 2))))
    variables = variables_of(model, IMAGES)
    graph = jaxkd.trace(model, variables, IMAGES)
    with pytest.raises(
        jaxkd.GraphError, match=rf'layer "/fixed" fixes .*{__file__}:\d+ \(__call__'
    ):
        jaxkd.compact(graph, variables, {'stem': np.arange(4) < 2})


def test_peak_by_hand():
    """The largest of what is alive at once: an input, its three convolutions' outputs, their sum.

    image [6,6,3] - stem 1x1 (4) -+- left 1x1 (2) ---------- + - mean - head
                                  +- right 1x1 (2) - relu -- +

    bytes    432      576           288 + 288
    Most are alive while right is computed: stem's 576, left's 288, right's 288.
    """

    def body(x):
        x = stem(4, 1)(x)
        left, right = conv(2, 1, name='left')(x), conv(2, 1, name='right')(x)
        return nn.Dense(3)((left + nn.relu(right)).mean((1, 2)))

    model = Net(body)
    graph = jaxkd.trace(model, variables_of(model, IMAGES), IMAGES)
    assert graph.cost().peak_activations == 576 + 288 + 288
    assert graph.cost({'stem': np.arange(4) < 1}).peak_activations == 144 + 288 + 288
