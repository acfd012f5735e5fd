"""Channel groups, costs, masks and cuts, against numbers computed by hand and against XLA."""

import dataclasses
import json
import math

from flax import core
from flax import linen as nn
import hypothesis
from hypothesis import strategies as st
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
    keep_first,
    variables_of,
    xla_multiply_adds,
    zeros,
)
import numpy as np
import optax
import pytest

import jaxkd
from jaxkd import cpu, models
from jaxkd.graph import cut as cutting
from jaxkd.search import learn


def members(graph, name):
    """[(path, axis, first position, last position)] of a group's parameters."""
    return [
        (m.path.removeprefix('params/'), m.axis, m.range[0], m.range[-1])
        for m in graph.by_name[name].members
    ]


def totals(cost):
    return cost.flops, cost.params, cost.activations


# Costs and groups by hand.


def residual(x):
    x = conv(4, name='stem')(x)
    y = conv(4, 1, name='conv2')(nn.relu(conv(6, use_bias=True, name='conv1')(x)))
    return nn.Dense(5, name='head')((x + y).mean((1, 2)))


def test_residual_by_hand():
    """Two groups: the stream that the sum ties (a units), and the branch's inside (b units).

    x [8,8,3] - stem 3x3 (4) -+- conv1 3x3 (6, bias) - relu - conv2 1x1 (4) - + - mean - head (5)
                              +-----------------------------------------------+

             multiply-adds                  parameters       bytes
    stem     64·9·3·a            = 6,912    9·3·a      108   4·64·a = 1,024
    conv1    64·9·a·b            = 13,824   9·a·b + b  222   4·64·b = 1,536
    conv2    64·b·a              = 1,536    b·a         24   4·64·a = 1,024
    head     a·5                 = 20       5·a + 5     25   4·5    = 20
    a=4 b=6                        22,292              379            3,604
    a=3 b=2  5,184+3,456+384+15  = 9,039    81+56+6+20 163   768+512+768+20 = 2,068
    """
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    model = Net(residual)
    graph = jaxkd.trace(model, variables_of(model, x), x)

    assert {g.name: g.size for g in graph.groups if not g.frozen} == {'stem': 4, 'conv1': 6}
    assert members(graph, 'stem') == [
        ('conv1/kernel', 2, 0, 3),
        ('conv2/kernel', 3, 0, 3),
        ('head/kernel', 0, 0, 3),
        ('stem/kernel', 3, 0, 3),
    ]
    assert members(graph, 'conv1') == [
        ('conv1/bias', 0, 0, 5),
        ('conv1/kernel', 3, 0, 5),
        ('conv2/kernel', 2, 0, 5),
    ]
    assert {f.group: f.reason for f in graph.frozen} == {
        'head': 'network output',
        'stem:kernel[2]': 'network input',
    }
    assert totals(graph.cost()) == (22_292, 379, 3_604)
    assert [(r.layer, r.flops, r.params, r.activations) for r in graph.cost().by_layer()] == [
        ('stem', 6_912, 108, 1_024),
        ('conv1', 13_824, 222, 1_536),
        ('conv2', 1_536, 24, 1_024),
        ('head', 20, 25, 20),
    ]
    keep = {'stem': np.array([1, 0, 1, 1], bool), **keep_first(conv1=(2, 6))}
    assert totals(graph.cost(keep)) == (9_039, 163, 2_068)
    # ∂/∂a = 64·27 + 64·9·b + 64·b + 5 and ∂/∂b = 64·9·a + 64·a; for removed units too.
    price = graph.price(keep, 'flops')
    np.testing.assert_array_equal(price['stem'], [1_728 + 1_152 + 128 + 5] * 4)
    np.testing.assert_array_equal(price['conv1'], [1_728 + 192] * 6)
    np.testing.assert_array_equal(graph.price(keep, 'params')['conv1'], [9 * 3 + 1 + 3] * 6)
    np.testing.assert_array_equal(graph.price(keep, 'activations')['stem'], [2 * 4 * 64] * 4)
    with pytest.raises(jaxkd.ConfigError, match='flops, params, activations'):
        graph.price(keep, 'flop')


def concat_squeeze_excite(x):
    x = jnp.concatenate(
        [conv(3, padding='VALID', name='left')(x), conv(2, padding='VALID', name='right')(x)], -1
    )
    gate = nn.relu(nn.Dense(2, name='squeeze')(x.mean((1, 2))))
    gate = nn.sigmoid(nn.Dense(5, name='excite')(gate))
    return conv(4, 1, name='head')(x * gate[:, None, None]).mean((1, 2))


def test_concat_and_squeeze_excite_by_hand():
    """Concatenated channels are a + b; the gate's layers see both; c inside.

    x [6,6,2] -+- left  3x3 (3) -+- concat -+------------------------------- * - head 1x1 (4)
               +- right 3x3 (2) -+          +- mean - squeeze (2) - excite (5)

             multiply-adds                          parameters
    left     16·9·2·a             = 864    576      18·a            = 54   36
    right    16·9·2·b             = 576    288      18·b            = 36   18
    squeeze  (a+b)·c              = 10       3      (a+b)·c + c     = 12    4
    excite   c·(a+b)              = 10       3      c·(a+b) + (a+b) = 15    6
    head     16·(a+b)·4           = 320    192      4·(a+b)         = 20   12
    a=3 b=2 c=2 | a=2 b=1 c=1       1,780 1,062                      137   76
    """
    x = jax.ShapeDtypeStruct((2, 6, 6, 2), jnp.float32)
    model = Net(concat_squeeze_excite)
    graph = jaxkd.trace(model, variables_of(model, x), x)
    assert {g.name: g.size for g in graph.groups if not g.frozen} == {
        'left': 3,
        'right': 2,
        'squeeze': 2,
    }
    for name, first, last in ('left', 0, 2), ('right', 3, 4):
        assert members(graph, name) == sorted(
            [
                ('excite/bias', 0, first, last),
                ('excite/kernel', 1, first, last),
                ('head/kernel', 2, first, last),
                (f'{name}/kernel', 3, 0, last - first),
                ('squeeze/kernel', 0, first, last),
            ]
        )
    assert totals(graph.cost())[:2] == (1_780, 137)
    keep = keep_first(left=(2, 3), right=(1, 2), squeeze=(1, 2))
    assert totals(graph.cost(keep))[:2] == (1_062, 76)
    price = graph.price(keep, 'flops')
    np.testing.assert_array_equal(price['left'], [16 * 9 * 2 + 1 + 1 + 64] * 3)
    np.testing.assert_array_equal(price['squeeze'], [3 + 3] * 2)


def grouped_flatten(x):
    x = conv(4, 1, name='stem')(x)
    x = conv(8, feature_group_count=4, name='depthwise')(x)
    x = conv(6, 1, feature_group_count=2, name='grouped')(x)
    return nn.Dense(2, name='head')(nn.sigmoid(x).reshape(x.shape[0], -1))


def test_depthwise_grouped_and_flatten_by_hand():
    """Two outputs of the depthwise layer go with each stem channel, and the grouped convolution
    wants the same of each half: u units of stem channels {0, 2} and {1, 3}, w units of outputs
    {0, 3}, {1, 4}, {2, 5}.

        x [4,4,3] - stem 1x1 - depthwise 3x3 - grouped 1x1, 2 groups - flatten - head
                    4 = 2u     8 = 4u          6 = 2w                  16·2w     2

                   multiply-adds                    parameters
        stem       16·3·2u    = 192          96     3·2u        = 12     6
        depthwise  16·9·4u    = 1,152       576     9·4u        = 72    36
        grouped    16·2u·2w   = 384         128     2u·2w       = 24     8
        head       32w·2      = 192         128     32w·2 + 2   = 194  130
        u=2 w=3 | u=1 w=2       1,920       928                   302  180
    """
    x = jax.ShapeDtypeStruct((2, 4, 4, 3), jnp.float32)
    model = Net(grouped_flatten)
    variables = variables_of(model, x)
    graph = jaxkd.trace(model, variables, x)
    assert {g.name: g.size for g in graph.groups if not g.frozen} == {'stem': 2, 'grouped': 3}

    def positions(name):
        group = graph.by_name[name]
        pairs = zip(group.members, group.positions, strict=True)
        return {(m.path.removeprefix('params/'), m.axis): p.tolist() for m, p in pairs}

    assert positions('stem') == {
        ('depthwise/kernel', 3): [[0, 1, 4, 5], [2, 3, 6, 7]],
        ('grouped/kernel', 2): [[0, 1], [2, 3]],
        ('stem/kernel', 3): [[0, 2], [1, 3]],
    }
    assert positions('grouped') == {
        ('grouped/kernel', 3): [[0, 3], [1, 4], [2, 5]],
        ('head/kernel', 0): [[6 * i + c for i in range(16) for c in (k, k + 3)] for k in range(3)],
    }
    assert totals(graph.cost())[:2] == (1_920, 302)
    keep = {'stem': np.array([False, True]), 'grouped': np.array([True, False, True])}
    assert totals(graph.cost(keep))[:2] == (928, 180)
    price = graph.price(keep, 'flops')
    np.testing.assert_array_equal(price['stem'], [96 + 576 + 64 * 2] * 2)
    np.testing.assert_array_equal(price['grouped'], [64 + 64] * 3)
    assert_compact_is_masked(model, variables, keep, x)


@pytest.fixture(scope='module')
def mobilenet():
    model = models.create('mobilenet_v2', num_classes=1000)
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    return jaxkd.trace(model, jax.eval_shape(lambda: model.init(jax.random.key(0), zeros(x))), x)


def test_mobilenet_v2_costs_what_the_field_says(mobilenet):
    """300.8 M multiply-adds and 3.50 M parameters, as torchvision and the paper's Table 4 have."""
    assert mobilenet.cost().flops == 300_774_272
    assert mobilenet.cost().params == 3_504_872
    # Seven residual streams, 16 expansions (the first block has none), the head.
    assert sum(not g.frozen for g in mobilenet.groups) == 7 + 1 + 16 + 1
    assert mobilenet.unknown == {}


def test_batch_is_not_in_the_cost():
    model = models.create('mobilenet_v2', num_classes=10)
    costs = []
    for batch in 1, 32:
        x = jax.ShapeDtypeStruct((batch, 32, 32, 3), jnp.float32)
        variables = jax.eval_shape(lambda x=x: model.init(jax.random.key(0), zeros(x)))
        costs.append(jaxkd.trace(model, variables, x).cost())
    assert costs[0].params == 2_236_682
    assert costs[0] == costs[1]


def test_a_batch_that_the_model_fixes():
    model = Net(lambda x: nn.Dense(10)(conv(8, name='stem')(x).reshape(4, -1)))
    images = jax.ShapeDtypeStruct((4, 8, 8, 3), jnp.float32)
    graph = jaxkd.trace(model, variables_of(model, images), images)
    assert jaxkd.verify(graph, keep_first(stem=(5, 8))) < 1e-5


def test_a_tiled_token_does_not_bring_the_batch_into_the_cost():
    def body(x):
        x = conv(8)(x).reshape(x.shape[0], -1, 8)
        token = nn.Embed(1, 8)(jnp.zeros((1, 1), int))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
        return nn.Dense(3)(nn.Dense(5)(x)[:, 0])

    costs = []
    for batch in 1, 4:
        x = jax.ShapeDtypeStruct((batch, 4, 4, 3), jnp.float32)
        costs.append(jaxkd.trace(Net(body), variables_of(Net(body), x), x).cost())
    assert costs[0] == costs[1]


def upsample(x):
    x = nn.ConvTranspose(5, (2, 2), (2, 2), name='up')(conv(4, strides=2, name='down')(x))
    return conv(4, feature_group_count=1, kernel_dilation=2, name='wide')(x)


@pytest.mark.parametrize('body', [residual, concat_squeeze_excite, grouped_flatten, upsample])
def test_small_nets_cost_what_xla_says(body):
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    model = Net(body)
    graph = jaxkd.trace(model, variables_of(model, x), x)
    assert graph.cost().flops == pytest.approx(sum(xla_multiply_adds(graph)), rel=0.02)


def test_mobilenet_v2_costs_what_xla_says(mobilenet):
    assert mobilenet.cost().flops == pytest.approx(sum(xla_multiply_adds(mobilenet)), rel=0.02)


def test_programs_inside_the_program_are_counted():
    """Three rounds of a loop, the dearer branch of a choice, and a block that is recomputed."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.relu(conv(4, name='conv')(x)), None

    def body(x):
        x = nn.remat(nn.Conv)(4, (1, 1), use_bias=False, name='stem')(x)
        loop = nn.scan(Block, variable_axes={'params': 0}, split_rngs={'params': True}, length=3)
        x, _ = loop(name='loop')(x, None)
        dear, cheap = (self_made(name, (4, 4)) for name in ('dear', 'cheap'))
        x = jax.lax.cond(x[0, 0, 0, 0] > 0, lambda x: x @ dear @ cheap, lambda x: x @ cheap, x)
        return x.mean((1, 2))

    model = Net(body)
    graph = jaxkd.trace(model, variables_of(model, IMAGES), IMAGES)
    assert graph.cost().flops == 36 * (3 * 4 + 3 * 9 * 4 * 4 + 2 * 4 * 4)
    assert graph.unknown == {}

    def loop_only(x):
        x = nn.remat(nn.Conv)(4, (1, 1), name='stem')(x)
        loop = nn.scan(Block, variable_axes={'params': 0}, split_rngs={'params': True}, length=3)
        return nn.Dense(2, name='head')(loop(name='loop')(x, None)[0].mean((1, 2)))

    model = Net(loop_only)
    _, small = assert_compact_is_masked(
        model, variables_of(model, IMAGES), keep_first(stem=(3, 4)), IMAGES
    )
    assert small.variables['params']['loop']['conv']['kernel'].shape == (3, 3, 3, 3, 3)


def self_made(name, shape):
    module = nn.module._context.module_stack[-1]
    return module.param(name, nn.initializers.normal(), shape)


def test_what_is_not_counted_is_said():
    def body(x):
        w = self_made('w', (3, 3))
        return jax.lax.while_loop(lambda x: x.sum() > 9, lambda x: x @ w, x).mean((1, 2))

    model = Net(body)
    graph = jaxkd.trace(model, variables_of(model, IMAGES), IMAGES)
    assert graph.cost().flops == 36 * 9
    assert 'one round' in graph.unknown['while']
    assert 'one round' in graph.table()


# Compact and masked networks compute the same.


@dataclasses.dataclass(frozen=True)
class Op:
    kind: str
    features: int
    groups: int = 1
    activation: str = 'relu'


ACTIVATIONS = {  # three of them are not zero at zero
    'relu': nn.relu,
    'sigmoid': nn.sigmoid,
    'softplus': nn.softplus,
    'hard_sigmoid': nn.hard_sigmoid,
    'swish': nn.swish,
}


@st.composite
def random_nets(draw):
    """Operations with their widths written out, and whether to flatten or to pool at the end."""
    ops, channels = [], 0
    for i in range(draw(st.integers(1, 4))):
        kinds = ['conv', 'conv_bn'] if i == 0 else [*KINDS]
        kind = draw(st.sampled_from(kinds))
        features, groups = draw(st.integers(1, 6)), 1
        if kind == 'depthwise':
            groups, features = channels, channels * draw(st.integers(1, 2))
        elif kind == 'grouped':
            kind = 'grouped' if channels % 2 == 0 else 'conv'
            groups, features = (2, 2 * features) if kind == 'grouped' else (1, features)
        ops.append(Op(kind, features, groups, draw(st.sampled_from(sorted(ACTIVATIONS)))))
        if kind in ('conv', 'conv_bn', 'depthwise', 'grouped'):
            channels = features
        elif kind == 'concat':
            channels += features
    return RandomNet(tuple(ops), draw(st.booleans()))


KINDS = ('conv', 'conv_bn', 'depthwise', 'grouped', 'residual', 'concat', 'squeeze_excite', 'pool')


class RandomNet(nn.Module):
    ops: tuple[Op, ...]
    flatten: bool

    @nn.compact
    def __call__(self, x):
        for op in self.ops:
            act = ACTIVATIONS[op.activation]
            if op.kind == 'residual':
                x = x + conv(x.shape[-1])(act(conv(op.features, 1, use_bias=True)(x)))
            elif op.kind == 'concat':
                x = jnp.concatenate([act(conv(op.features)(x)), x], -1)
            elif op.kind == 'squeeze_excite':
                gate = act(nn.Dense(op.features)(x.mean((1, 2), keepdims=True)))
                x = x * nn.hard_sigmoid(nn.Dense(x.shape[-1])(gate))
            elif op.kind == 'pool':
                x = act(nn.max_pool(x, (2, 2)))
            else:
                x = conv(op.features, feature_group_count=op.groups, use_bias=op.features > 3)(x)
                x = nn.BatchNorm(use_running_average=True)(x) if op.kind == 'conv_bn' else x
                x = act(x)
        return nn.Dense(3)(x.reshape(x.shape[0], -1) if self.flatten else x.mean((1, 2)))


@hypothesis.settings(
    max_examples=15, deadline=None, derandomize=True, database=None, print_blob=False
)
@hypothesis.given(random_nets(), st.integers(0, 1000))
def test_compact_is_masked_and_costs_what_was_promised(model, seed):
    variables = variables_of(model, IMAGES, seed=seed)
    full = jaxkd.trace(model, variables, IMAGES)
    keep = half(full, seed)
    graph, small = assert_compact_is_masked(model, variables, keep, IMAGES)
    anew = jaxkd.trace(small.module, small.variables, IMAGES)
    assert anew.cost() == graph.cost(keep)
    for resource in ('flops', 'params', 'activations'):
        assert graph.amount(graph.vector(keep), resource) == getattr(graph.cost(keep), resource)
    # A convolution whose groups have one channel left is depthwise: it can be cut more finely.
    # An axis of size one says nothing about what it is flattened with.
    if not any(op.kind == 'grouped' for op in model.ops) and all(
        k.sum() > 1 for k in keep.values()
    ):
        expected = {name: int(alive.sum()) for name, alive in graph.complete(keep).items()}
        assert anew.sizes == expected


def test_zero_is_no_special_value():
    """sigmoid(0) = 0.5: zeroing producers alone would leave half a unit to the consumers."""

    def body(x):
        x = nn.sigmoid(conv(5, name='stem')(x))
        return nn.Dense(2, name='head')(nn.softplus(conv(4, name='next')(x)).mean((1, 2)))

    model = Net(body)
    variables = variables_of(model, IMAGES)
    keep = keep_first(stem=(2, 5), next=(3, 4))
    graph, _ = assert_compact_is_masked(model, variables, keep, IMAGES)
    producers = jax.tree.map(lambda leaf: leaf, variables)
    kernel = producers['params']['stem']['kernel']
    producers['params']['stem']['kernel'] = kernel.at[..., 2:].set(0)
    masked = jaxkd.mask(graph, variables, keep_first(stem=(2, 5)))
    x = images_for()
    assert np.abs(model.apply(producers, x) - model.apply(masked, x)).max() > 1e-2


def test_gradients_and_optimizer_state_are_cut_alike():
    """A step of the masked network, then cut, is a step of the compact network."""
    model = Net(concat_squeeze_excite)
    variables = variables_of(model, IMAGES)
    keep = keep_first(left=(2, 3), right=(1, 2), squeeze=(1, 2))
    graph = jaxkd.trace(model, variables, IMAGES)
    small = jaxkd.compact(graph, variables, keep)
    optimizer = optax.chain(optax.clip(0.1), optax.adam(0.1))
    x = images_for()

    def step(apply, variables):
        def loss(params):
            return jnp.square(apply({'params': params}, x) - 1).sum()

        params = variables['params']
        grads = jax.grad(loss)(params)
        updates, state = optimizer.update(grads, optimizer.init(params), params)
        return grads, state, optax.apply_updates(params, updates)

    large = jax.jit(lambda v: step(model.apply, v))(jaxkd.mask(graph, variables, keep))
    expected = jax.jit(lambda v: step(small.apply, v))(small.variables)
    assert_same(jaxkd.cut(graph, large, keep), expected, 1e-4)
    state = large[1]
    assert jaxkd.cut(graph, state, keep)[1][0].count == state[1][0].count == 1
    # Shapes are cut as arrays are, and masks may be traced.
    shapes = jaxkd.cut(graph, graph.variables, keep)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, small.variables)
    traced = jax.jit(lambda v: jaxkd.mask(graph, v, keep))(variables)
    assert_same(traced, jaxkd.mask(graph, variables, keep), 0)
    with pytest.raises(jaxkd.GraphError, match='excite/bias.*same shapes'):
        jaxkd.cut(graph, small.variables, keep)


def test_mobilenet_v2_in_half_precision():
    """Verified like any other: bfloat16 outputs of the same sums agree."""
    model = models.create('mobilenet_v2', num_classes=10, width=0.35, dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = variables_of(model, x)
    graph = jaxkd.trace(model, variables, x)
    keep = half(graph)
    small = jaxkd.compact(graph, variables, keep)
    anew = jaxkd.trace(small.module, small.variables, x)
    assert anew.cost() == graph.cost(keep)
    assert anew.sizes == {name: int(alive.sum()) for name, alive in graph.complete(keep).items()}


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_rounding_that_is_amplified_is_no_difference(dtype):
    """Sums in another order differ in their last bit, which is all that is left of them here."""

    def body(x):
        x = conv(64, name='stem', dtype=dtype)(x)
        x = jax.lax.scan(lambda x, _: (nn.relu(x), None), jnp.sin(1e6 * x), length=2)[0]
        noise = jax.random.normal(jax.random.key(0), x.shape[:-1])
        return nn.Dense(2, dtype=dtype)(conv(3, name='next')(x).mean((1, 2)) + noise.mean())

    model = Net(body)
    graph = jaxkd.trace(model, variables_of(model, IMAGES), IMAGES)
    assert jaxkd.verify(graph, half(graph)) < 1e-6


# What cannot be cut is refused, or frozen with its reason.


def test_a_model_that_decides_by_a_width_is_refused():
    def body(x):
        x = nn.relu(conv(8, name='stem')(x))
        y = conv(8, name='inner')(x)
        y = y + x if x.shape[-1] == 8 else y
        return nn.Dense(2)(conv(5, name='other')(y).mean((1, 2)))

    model = Net(body)
    variables = variables_of(model, IMAGES)
    graph = jaxkd.trace(model, variables, IMAGES)
    jaxkd.compact(graph, variables, keep_first(other=(2, 5)))
    with pytest.raises(jaxkd.GraphError, match=r'at fault: stem\. .*decides by a width'):
        jaxkd.compact(graph, variables, keep_first(stem=(5, 8), other=(2, 5)))


@pytest.mark.parametrize('way', ['prune', 'rehearse'])
def test_what_decides_by_a_width_is_found_and_frozen(way):
    """Where the caller has not chosen what to keep, what cannot be cut stays, and the rest goes."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = conv(8, 1, name='project')(nn.relu(conv(12, 1, name='expand')(x)))
            return x + y if x.shape[-1] == 8 else y

    model = Net(lambda x: nn.Dense(2)(Block(name='block')(conv(8, name='stem')(x)).mean((1, 2))))
    variables = variables_of(model, IMAGES)
    if way == 'prune':
        small = jaxkd.prune(model, variables, IMAGES, flops=0.7)
        kept = {name: len(group['kept']) for name, group in small.structure.groups.items()}
        assert kept['stem'] == 8
        assert kept['block/expand'] < 12
    else:
        graph = learn.rehearse(jaxkd.trace(model, variables, IMAGES))
        assert 'decides by its width' in graph.by_name['stem'].frozen
        assert graph.by_name['block/expand'].frozen is None


@pytest.mark.parametrize(
    'last', [lambda x: jnp.log(-jnp.abs(x)), lambda x: nn.relu(-1 - jnp.abs(x))]
)
def test_outputs_that_prove_nothing_are_refused(last):
    """Two networks that both give NaN, or zero, have not been shown to be the same."""
    model = Net(lambda x: last(nn.Dense(2)(conv(4, name='stem')(x).mean((1, 2)))))
    graph = jaxkd.trace(model, variables_of(model, IMAGES), IMAGES)
    with pytest.raises(jaxkd.GraphError, match='zero or not finite'):
        jaxkd.verify(graph, keep_first(stem=(2, 4)))


def test_a_small_output_is_not_hidden_by_a_large_one():
    def body(x):
        x = conv(4, name='stem')(x)
        wrong = nn.Dense(2)(x.mean((1, 2))) / x.shape[-1]
        return wrong, 1e6 * conv(2, name='features')(x)

    model = Net(body)
    graph = jaxkd.trace(model, variables_of(model, IMAGES), IMAGES)
    with pytest.raises(jaxkd.GraphError, match='at fault: stem'):
        jaxkd.verify(graph, keep_first(stem=(2, 4)))


def test_a_wrong_tie_is_noticed(monkeypatch):
    """One BatchNorm mean of one channel in 48 cut at its neighbour, somewhere in 53 layers."""
    model = models.create('mobilenet_v2', num_classes=10, width=0.35)
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    graph = jaxkd.trace(model, variables_of(model, x), x)
    name = 'block3/expand/conv'
    right = graph.by_name[name]
    keep = {name: np.arange(right.size) != right.size // 2}
    assert jaxkd.verify(graph, keep) < cutting.TOLERANCE
    vector = [m.path for m in right.members].index('batch_stats/block3/expand/bn/mean')
    positions = list(right.positions)
    swapped = positions[vector].copy()
    swapped[[0, right.size // 2]] = swapped[[right.size // 2, 0]]
    positions[vector] = swapped
    wrong = dataclasses.replace(right, positions=tuple(positions))
    groups = tuple(wrong if group is right else group for group in graph.groups)
    broken = dataclasses.replace(graph, groups=groups)
    mask = jaxkd.mask
    monkeypatch.setattr(cutting, 'mask', lambda _, tree, keep: mask(graph, tree, keep))
    with pytest.raises(jaxkd.GraphError, match=f'at fault: {name}'):
        jaxkd.verify(broken, keep)


FROZEN = {
    'sort': (lambda x: jnp.sort(x, -1), 'depends on the channels beside it'),
    'fft': (lambda x: jnp.abs(jnp.fft.fft(x, axis=-1)), 'fft has no rule'),
    'cumsum': (lambda x: jnp.cumsum(x, -1), 'depends on the channels beside it'),
    'top_k': (lambda x: jax.lax.top_k(x, 3)[0], 'the largest of its channels are taken'),
    'argmax': (lambda x: jnp.argmax(x, -1)[..., None] * 1.0, 'its channels are counted'),
    'rev': (lambda x: x[..., ::-1], 'its channels are reversed'),
    'slice': (lambda x: x[..., :3], 'a slice of its channels is taken at a fixed place'),
    'split': (lambda x: jnp.split(x, [3], -1)[1], 'its channels are split at fixed places'),
    'dynamic_slice': (
        lambda x: jax.lax.dynamic_slice_in_dim(x, 2, 3, 3),
        'a slice of its channels is taken',
    ),
    'dynamic_update_slice': (
        lambda x: jax.lax.dynamic_update_slice(x, jnp.ones((2, 6, 6, 2)), (0, 0, 0, 3)),
        'some of its channels are replaced',
    ),
    'gather': (lambda x: x[..., np.array([3, 1, 2])], 'its channels are picked by an index'),
    'scatter': (lambda x: x.at[..., np.array([3, 1])].set(0.0), 'are written to by an index'),
    'pad': (lambda x: jnp.pad(x, [(0, 0)] * 3 + [(1, 2)]), 'its channels are padded'),
    'reshape': (lambda x: x.reshape(*x.shape[:2], 16, 3), 'a reshape splits its channels'),
    'reduce_max': (lambda x: x / x.max(-1, keepdims=True), 'one value is made of all'),
    'mul': (lambda x: x * np.arange(8.0), 'combined with something'),
    'dot_general': (lambda x: x @ jnp.ones((8, 5)), 'contracted with something'),
    'conv_general_dilated': (
        lambda x: jax.lax.conv(
            x[:, None], jnp.arange(9.0).reshape(1, 1, 3, 3, 1), (1,) * 3, 'SAME'
        ),
        'a convolution window runs over',
    ),
}


@pytest.mark.parametrize('primitive', FROZEN)
def test_frozen_with_a_reason(primitive):
    operation, reason = FROZEN[primitive]

    def body(x):
        x = conv(7, name='free')(x)
        x = operation(conv(8, name='stem')(x))
        return nn.Dense(2, name='head')(x.mean(range(1, x.ndim - 1)))

    model = Net(body)
    variables = variables_of(model, IMAGES)
    graph = jaxkd.trace(model, variables, IMAGES)
    stem = graph.by_name['stem']
    assert reason in stem.frozen
    assert stem.primitive == primitive
    assert __file__ in stem.source and f':{operation.__code__.co_firstlineno}' in stem.source
    assert (primitive in graph.unknown) == ('has no rule' in reason)
    with pytest.raises(jaxkd.GraphError, match=f"'stem' cannot be cut: .*{reason}"):
        jaxkd.compact(graph, variables, keep_first(stem=(2, 8)))
    assert not graph.by_name['free'].frozen
    jaxkd.compact(graph, variables, keep_first(free=(2, 7)))


@pytest.mark.parametrize('multiplier', [1, 2])
def test_constant_filters(multiplier):
    """A blur takes its channels from its input; where it makes two of one, both go with it."""

    def body(x):
        y = conv(4, name='stem')(x)
        kernel = jnp.ones((3, 3, 1, y.shape[-1] * multiplier))
        numbers = ('NHWC', 'HWIO', 'NHWC')
        y = jax.lax.conv_general_dilated(
            y, kernel, (1, 1), 'SAME', dimension_numbers=numbers, feature_group_count=y.shape[-1]
        )
        return nn.Dense(2)((y + conv(4 * multiplier, name='other')(x)).mean((1, 2)))

    model = Net(body)
    variables = variables_of(model, IMAGES)
    assert_compact_is_masked(model, variables, keep_first(stem=(2, 4)), IMAGES)


def test_what_a_model_sows_is_traced_along():
    """`init` leaves tuples in the collections that a model sows into."""

    class Sows(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = conv(6, name='stem')(x)
            self.sow('losses', 'size', (x**2).mean())
            return nn.Dense(2)(x.mean((1, 2)))

    variables = Sows().init(jax.random.key(0), images_for())
    graph, small = assert_compact_is_masked(Sows(), variables, keep_first(stem=(4, 6)), IMAGES)
    assert 'losses/size/0' in graph.shapes
    assert isinstance(small.variables['losses']['size'], tuple)


def test_random_keys_are_no_variables():
    class Keeps(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.variable('noise', 'key', lambda: jax.random.key(0))
            return conv(4)(x)

    variables = Keeps().init(jax.random.key(0), images_for())
    with pytest.raises(jaxkd.GraphError, match='noise/key is a random key: hand it in by rngs='):
        jaxkd.trace(Keeps(), variables, IMAGES)


def test_a_mask_as_input_hides_nothing_while_verifying():
    """A mean over what is not hidden would be 0 / 0."""

    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x, mask):
            x = nn.relu(nn.Dense(8, name='stem')(x)) * mask[..., None]
            return nn.Dense(2)(x.sum(1) / mask.sum(1, keepdims=True))

    inputs = jnp.ones((2, 5, 3)), jnp.ones((2, 5), bool)
    variables = Masked().init(jax.random.key(0), *inputs)
    graph = jaxkd.trace(Masked(), variables, *inputs)
    assert jaxkd.verify(graph, keep_first(stem=(4, 8))) < 1e-6


def test_half_precision_that_overflows_is_verified_in_double():
    def body(x):
        x = nn.Conv(4, (3, 3), dtype=jnp.float16, name='stem')(x)
        return nn.Dense(2, dtype=jnp.float16)((1e4 * x * x).mean((1, 2)))

    model = Net(body)
    graph = jaxkd.trace(model, variables_of(model, IMAGES), IMAGES)
    assert jaxkd.verify(graph, keep_first(stem=(2, 4))) < 1e-6


def test_variables_that_are_not_used_are_not_cut():
    class Auxiliary(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = conv(4, name='stem')(x)
            if train:
                conv(5, name='auxiliary')(x)
            return nn.Dense(2, name='head')(x.mean((1, 2)))

    model = Auxiliary()
    variables = variables_of(model, IMAGES, train=True)
    with pytest.warns(UserWarning, match='its layers auxiliary as .*train that without them'):
        graph = jaxkd.trace(model, variables, IMAGES)
    unused = [f for f in graph.frozen if f.group.startswith('auxiliary')]
    assert len(unused) == 4 and {f.reason for f in unused} == {'not used when traced'}


@pytest.mark.parametrize(
    ('keep', 'message'),
    [
        ({'stam': np.ones(4, bool)}, "named 'stam'; there are: stem, conv1"),
        ({'stem': np.ones(5, bool)}, r"'stem' must be bool \[4\], not bool \[5\]"),
        ({'stem': np.ones(4)}, r"'stem' must be bool \[4\], not float64 \[4\]"),
        ({'stem': np.zeros(4, bool)}, "'stem' must keep at least one unit"),
        ({'head': np.arange(5) < 3}, "'head' cannot be cut: network output"),
    ],
)
def test_bad_keeps(keep, message):
    model = Net(residual)
    variables = variables_of(model, IMAGES)
    graph = jaxkd.trace(model, variables, IMAGES)
    for use in (
        lambda: graph.cost(keep),
        lambda: graph.price(keep, 'flops'),
        lambda: jaxkd.mask(graph, variables, keep),
        lambda: jaxkd.cut(graph, variables, keep),
        lambda: jaxkd.compact(graph, variables, keep),
    ):
        with pytest.raises(jaxkd.GraphError, match=message):
            use()


def test_wrong_inputs():
    model = Net(residual)
    variables = variables_of(model, IMAGES)
    wrong = jax.ShapeDtypeStruct((2, 6, 6, 5), jnp.float32)
    with pytest.raises(jaxkd.GraphError, match=r'Net cannot be applied to inputs .*2, 6, 6, 5'):
        jaxkd.trace(model, variables, wrong)


def test_arrays_are_inputs_and_flags_are_not():
    class Biased(nn.Module):
        @nn.compact
        def __call__(self, x, bias, keep=False):
            x = nn.relu(conv(8, name='stem')(x) + nn.Dense(8)(bias)[:, None, None])
            return nn.Dropout(0.5)(nn.Dense(3)(x.mean((1, 2))), deterministic=keep)

    model, x, bias = Biased(), jnp.ones((4, 6, 6, 3)), jnp.ones((4, 5))
    variables = model.init(jax.random.key(0), x, bias, keep=True)
    flags = {'keep': np.bool_(False), 'rngs': {'dropout': jax.random.PRNGKey(0)}}
    assert jaxkd.trace(model, variables, x, bias, **flags).cost().flops == 36 * 27 * 8 + 40 + 24
    for inputs, arrays in (((x,), {'bias': bias}), ((), {'bias': bias, 'x': x})):
        with pytest.raises(jaxkd.ConfigError, match=r'bias is .*4, 5.* by position'):
            jaxkd.prune(model, variables, *inputs, flops=0.6, **arrays, **flags)
    small = jaxkd.prune(
        model,
        variables,
        x,
        bias,
        flops=0.6,
        keep=True,
        method=lambda m, x, b, keep: m(x, bias=b, keep=keep),
    )
    assert small.apply(small.variables, x, bias=bias, keep=True).shape == (4, 3)


# The compact network is used like the model.


class Classifier(nn.Module):
    """Deep, in both styles: a list of blocks made in `setup`, layers made where used."""

    class Block(nn.Module):
        features: int

        @nn.compact
        def __call__(self, x, train):
            x = conv(self.features, name='conv')(x)
            return nn.relu(nn.BatchNorm(use_running_average=not train, name='bn')(x))

    def setup(self):
        self.layers = [self.Block(6), self.Block(5), nn.remat(self.Block, static_argnums=2)(4)]
        self.dropout = nn.Dropout(0.5)
        self.shared = nn.Dense(4)
        self.head = nn.Dense(3)

    def features(self, x, train=False):
        for layer in self.layers:
            x = layer(x, train)
        return x.mean((1, 2))

    def __call__(self, x, train=False):
        x = nn.relu(self.shared(self.features(x, train)))
        x = self.dropout(self.shared(x), deterministic=not train)
        return self.head(x)


@pytest.fixture(scope='module')
def classifier():
    model = Classifier()
    variables = variables_of(model, IMAGES)
    graph = jaxkd.trace(model, variables, IMAGES, train=False)
    return model, variables, graph, jaxkd.compact(graph, variables, half(graph, 3))


def test_shared_weights_lists_and_nesting(classifier):
    """The shared layer's output is its own input, so both are the last block's channels."""
    model, variables, graph, small = classifier
    free = {g.name: g.size for g in graph.groups if not g.frozen}
    assert free == {'layers_0/conv': 6, 'layers_1/conv': 5, 'layers_2/conv': 4}
    assert {
        ('shared/kernel', 0, 0, 3),
        ('shared/kernel', 1, 0, 3),
        ('head/kernel', 0, 0, 3),
    } <= set(members(graph, 'layers_2/conv'))
    assert ('batch_stats/layers_1/bn/var', 0, 0, 4) in members(graph, 'layers_1/conv')
    # 36·9·(3·6 + 6·5 + 5·4) + twice 4·4 + 4·3: a layer that is called twice costs twice, and has
    # its parameters once.
    assert graph.cost().flops == 22_032 + 32 + 12
    # ∂/∂c of 36·9·5·c + 2·c·c + 3·c at c = 4: the shared layer's two axes are one group.
    price = graph.price(None, 'flops')['layers_2/conv']
    np.testing.assert_array_equal(price, [1_620 + 4 * 4 + 3] * 4)
    rows = {row.layer: row for row in graph.cost().by_layer()}
    assert rows['shared'].params == 20
    assert_compact_is_masked(model, variables, small.structure.keep, IMAGES, train=False)


def test_apply_takes_what_apply_takes(classifier):
    model, variables, graph, small = classifier
    keep = small.structure.keep
    masked = jaxkd.mask(graph, variables, keep)
    x = images_for()
    rngs = {'dropout': jax.random.key(1)}
    alive = keep['layers_2/conv']  # `features` gives the channels that the head consumes
    for method in 'features', Classifier.features, model.features:
        expected = model.apply(masked, x, method=method)[:, alive]
        assert_same(expected, small.apply(small.variables, x, method=method))
    # In training: new statistics are those of the masked network, cut.
    features, new = small.apply(
        small.variables, x, train=True, mutable=['batch_stats'], method='features'
    )
    expected, new_full = model.apply(
        masked, x, train=True, mutable=['batch_stats'], method='features'
    )
    assert_same(expected[:, alive], features, 1e-4)
    assert_same(jaxkd.cut(graph, new_full, keep), new, 1e-4)
    # Dropout draws as many numbers as there are channels; without its key it is an error.
    logits, _ = small.apply(small.variables, x, train=True, mutable=['batch_stats'], rngs=rngs)
    again, _ = small.apply(small.variables, x, True, mutable=['batch_stats'], rngs=rngs)
    assert logits.shape == (2, 3)
    np.testing.assert_array_equal(logits, again)
    with pytest.raises(Exception, match='dropout'):
        small.apply(small.variables, x, train=True, mutable=['batch_stats'])
    assert_same(small.apply(core.freeze(small.variables), x), small.apply(small.variables, x), 0)


@pytest.mark.parametrize('method', ['features', Classifier.features])
def test_a_method_is_traced_and_cut(classifier, method):
    model, variables, *_ = classifier
    small = jaxkd.prune(model, variables, IMAGES, flops=0.6, method=method)
    assert small.structure.compact['flops'] < small.structure.full['flops']
    # What it returns is the network's output, and stays whole.
    assert small.apply(small.variables, images_for(), method=method).shape == (2, 4)
    with pytest.raises(jaxkd.GraphError, match='no_such'):
        jaxkd.trace(model, variables, IMAGES, method='no_such')


def test_init_and_use_as_a_submodule(classifier):
    _, _, _, small = classifier
    x = images_for()
    fresh = jax.jit(small.module.init)(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, small.variables)
    assert np.std(fresh['params']['layers_1']['conv']['kernel']) > 0.01

    class Outer(nn.Module):
        inner: nn.Module

        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(self.inner(x))

    outer = Outer(small.module)
    variables = jax.jit(outer.init)(jax.random.key(1), x)
    inner = variables['params']['inner']
    assert jax.tree.map(jnp.shape, inner) == jax.tree.map(jnp.shape, small.variables['params'])
    variables['params']['inner'] = small.variables['params']
    variables['batch_stats']['inner'] = small.variables['batch_stats']
    dense = variables['params']['Dense_0']

    def loss(params, apply):
        return jnp.square(apply(params)).sum()

    alone = jax.jit(
        jax.grad(
            lambda p: loss(
                p,
                lambda p: (
                    small.apply({**small.variables, 'params': p}, x) @ dense['kernel']
                    + dense['bias']
                ),
            )
        )
    )(small.variables['params'])
    within = jax.jit(
        jax.grad(lambda p: loss(p, lambda p: outer.apply({**variables, 'params': p}, x)))
    )(variables['params'])
    assert_same(alone, within['inner'], 1e-4)


def test_training_mode_can_be_traced(classifier):
    """With what is mutable in training, and BatchNorm on the batch's statistics."""

    class Train(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train)(conv(5, name='stem')(x))
            return nn.Dense(2)(nn.relu(x).mean((1, 2)))

    model = Train()
    variables = variables_of(model, IMAGES, train=False)
    graph = jaxkd.trace(model, variables, IMAGES, train=True, mutable=['batch_stats'])
    assert len(graph.by_name['stem'].members) == 6
    small = jaxkd.compact(graph, variables, keep_first(stem=(2, 5)))
    assert small.variables['batch_stats']['BatchNorm_0']['mean'].shape == (2,)


def test_boxed_variables_are_cut():
    """Parameters with the names of mesh axes (nn.with_partitioning) are cut like any other."""
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, None, None, 'model'))
    model = Net(lambda x: nn.Dense(2)(conv(4, kernel_init=init, name='stem')(x).mean((1, 2))))
    boxed = model.init(jax.random.key(0), images_for())
    assert isinstance(boxed['params']['stem']['kernel'], nn.Partitioned)
    graph = jaxkd.trace(model, boxed, IMAGES)
    keep = keep_first(stem=(3, 4))
    small = jaxkd.compact(graph, boxed, keep)
    assert small.variables['params']['stem']['kernel'].shape == (3, 3, 3, 3)
    state = optax.adam(0.1).init(boxed['params'])
    assert jaxkd.cut(graph, state, keep)[0].mu['stem']['kernel'].value.shape == (3, 3, 3, 3)


def test_structure_round_trip(classifier):
    _, _, graph, small = classifier
    record = json.loads(json.dumps(small.structure.to_json()))
    again = jaxkd.Structure.from_json(record)
    assert again == small.structure
    for name, alive in half(graph, 3).items():
        np.testing.assert_array_equal(again.keep[name], alive)
    assert again.compact['flops'] == graph.cost(again.keep).flops < again.full['flops']
    assert again.model['class'] == 'Classifier' and again.model['arguments'] == {}


def depthwise_convolutions(jaxpr):
    return sum(
        eqn.primitive.name == 'conv_general_dilated' and eqn.params['feature_group_count'] > 1
        for eqn in jaxpr.jaxpr.eqns
    )


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='the CPU form is for the CPU')
def test_the_fast_form_of_the_cpu_runs_but_is_not_traced():
    model = Net(grouped_flatten)
    variables = variables_of(model, IMAGES)
    graph = jaxkd.trace(model, variables, IMAGES)
    with cpu.fast_layers():
        within = jaxkd.trace(model, variables, IMAGES)
        keep = half(graph)
        small = jaxkd.compact(within, variables, keep)
    assert within.cost() == graph.cost()
    assert within.sizes == graph.sizes
    x = images_for()
    plain = jax.make_jaxpr(small.module.apply)(small.variables, x)
    fast = jax.make_jaxpr(small.apply)(small.variables, x)
    assert depthwise_convolutions(plain) == depthwise_convolutions(graph.program) == 2
    assert depthwise_convolutions(fast) < 2
    assert_same(small.module.apply(small.variables, x), small.apply(small.variables, x))
    assert math.isclose(jaxkd.verify(graph, keep), jaxkd.verify(within, keep), abs_tol=1e-5)


class Methods(nn.Module):
    """A layer with sizes in fields, one of which is another one's when cut in half."""

    width: int = 32
    hidden: int = 16

    def setup(self):
        normal = nn.initializers.normal()
        self.first = self.param('first', normal, (self.width, self.hidden))
        self.second = self.param('second', normal, (self.hidden, 7))

    def __call__(self, x):
        return nn.relu(self.inner(x) @ self.second)

    def inner(self, x):
        return nn.relu(x.reshape(-1, self.width) @ self.first)


def test_methods_that_call_one_another_have_the_same_sizes():
    model, x = nn.Sequential([nn.Dense(32), nn.relu, Methods(), nn.Dense(5)]), jnp.ones((2, 8))
    variables = variables_of(model, x)
    graph = jaxkd.trace(model, variables, x)
    keep = {'layers_0': np.arange(32) < 16, 'layers_2': np.arange(16) < 8}
    small = jaxkd.compact(graph, variables, keep)
    assert small.variables['params']['layers_2']['first'].shape == (16, 8)
