"""Residual branches that go whole: which may, what is left, and how they are chosen."""

import itertools

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
)
import numpy as np
import optax
import pytest

import jaxkd
from jaxkd import models
from jaxkd.graph import cut as cutting
from jaxkd.search import blocks, control, criteria
from jaxkd.search import select as selecting

REMOVABLE = {'removable': True}


def norm(name, train=False):
    return nn.BatchNorm(use_running_average=not train, name=name)


class TwoBlocks(nn.Module):
    """x [6,6,3] - stem 1×1 - + - a_out(relu(a_in(·))) - + - b_out(dw(relu(b_in(·)))) - mean - head

    with s channels in the stream, a in the first branch and b in the second, whose last layer has
    a bias.

              multiply-adds                    parameters
    stem      36·3·s           = 432           3·s          = 12
    a_in      36·9·s·a         = 6,480  0      9·s·a        = 180  0     a_norm  2·a = 10  0
    a_out     36·a·s           = 720    0      a·s          = 20   0     s_norm  2·s = 8   8
    b_in      36·s·b           = 864           s·b          = 24
    b_dw      36·9·b           = 1,944         9·b          = 54
    b_out     36·b·s           = 864           b·s + s      = 28
    head      s·2              = 8             s·2 + 2      = 10
    s=4 a=5 b=6                  11,312 4,112                346  136
    a=0 b=0                      440    440                                 30
    """

    @nn.compact
    def __call__(self, x, train=False):
        x = conv(4, 1, name='stem')(x)
        y = nn.relu(norm('a_norm', train)(conv(5, name='a_in')(x)))
        x = x + norm('s_norm', train)(conv(4, 1, name='a_out')(y))
        y = nn.relu(conv(6, 1, name='b_in')(x))
        y = conv(6, feature_group_count=6, name='b_dw')(y)
        x = x + conv(4, 1, use_bias=True, name='b_out')(y)
        return nn.Dense(2, name='head')(x.mean((1, 2)))


NONE = {'a_in': np.zeros(5, bool), 'b_in': np.zeros(6, bool)}


@pytest.fixture(scope='module')
def two():
    variables = variables_of(TwoBlocks(), IMAGES)
    return jaxkd.trace(TwoBlocks(), variables, IMAGES), variables


def test_two_blocks_by_hand(two):
    graph, variables = two
    assert {g.name: g.size for g in graph.groups if not g.frozen} == {
        'stem': 4,
        'a_in': 5,
        'b_in': 6,
    }
    assert graph.removable() == {'a_in', 'b_in'}
    first = {'a_in': NONE['a_in']}
    assert graph.cost()[:2] == (11_312, 346)
    assert graph.cost(first)[:2] == (4_112, 136)
    assert graph.cost(NONE)[:2] == (440, 30 + 8 - 8 + 4)
    for keep in first, NONE, {**NONE, **keep_first(stem=(3, 4))}:
        _, small = assert_compact_is_masked(TwoBlocks(), variables, keep, IMAGES)
        anew = jaxkd.trace(small.module, small.variables, IMAGES)
        assert anew.cost() == graph.cost(keep)
        assert anew.sizes == {n: k.sum() for n, k in graph.complete(keep).items() if k.any()}
    # What is left of the branches is a constant for each channel: the norm's, and the bias.
    constant = variables['params']['b_out']['bias']
    statistics, scales = variables['batch_stats']['s_norm'], variables['params']['s_norm']
    constant += scales['bias'] - statistics['mean'] * scales['scale'] / jnp.sqrt(
        statistics['var'] + 1e-5
    )
    small = jaxkd.compact(graph, variables, NONE)
    kernel = variables['params']['stem']['kernel'][0, 0]
    stream = images_for().mean((1, 2)) @ kernel + constant
    head = variables['params']['head']
    expected = stream @ head['kernel'] + head['bias']
    assert_same(expected, small.apply(small.variables, images_for()))


def test_what_is_left_of_a_branch_is_the_same_in_training(two):
    """Running statistics of a norm behind nothing would otherwise count in evaluation alone."""
    graph, variables = two
    cut_alone = jaxkd.cut(graph, variables, NONE)
    small = jaxkd.compact(graph, variables, NONE)
    assert abs(cut_alone['batch_stats']['s_norm']['mean']).min() > 0.01
    assert not small.variables['batch_stats']['s_norm']['mean'].any()
    evaluated = small.apply(small.variables, images_for())
    assert_same(small.apply(cut_alone, images_for()), evaluated)
    trained, changed = small.apply(
        small.variables, images_for(), train=True, mutable=['batch_stats']
    )
    assert_same(evaluated, trained)
    assert not changed['batch_stats']['s_norm']['mean'].any()


def chain(x):
    for i, width in enumerate((4, 5, 6)):
        x = nn.relu(norm(f'norm{i}')(conv(width, name=f'conv{i}')(x)))
    return nn.Dense(2, name='head')(x.mean((1, 2)))


def test_a_chain_keeps_something_of_everything():
    graph = jaxkd.trace(Net(chain), variables_of(Net(chain), IMAGES), IMAGES)
    assert graph.removable() == set()
    with pytest.raises(jaxkd.GraphError, match="'conv1' must keep at least one unit: nothing else"):
        graph.cost({'conv1': np.zeros(5, bool)})
    with pytest.raises(jaxkd.ConfigError, match=r"conv.'\].removable .*residual branch.* lie none"):
        blocks.resolve(graph, [('conv1', {}), ('conv.', REMOVABLE)])


def excited(x, name):
    gate = nn.relu(nn.Dense(2, name=f'{name}_squeeze')(x.mean((1, 2), keepdims=True)))
    return x * nn.sigmoid(nn.Dense(x.shape[-1], name=f'{name}_excite')(gate))


def bottleneck(x):
    """Three convolutions, a GroupNorm, and a squeeze-excite inside; another outside."""
    x = excited(conv(4, name='stem')(x), 'outer')
    y = nn.relu(nn.GroupNorm(2, name='groups')(conv(4, 1, name='one')(x)))
    y = excited(nn.softplus(conv(5, name='two', strides=1)(y)), 'inner')
    x = nn.relu(x + norm('last')(conv(4, 1, name='three')(y)))
    return nn.Dense(2, name='head')(x.mean((1, 2)))


def test_the_rest_of_a_branch_goes_with_it():
    model = Net(bottleneck)
    variables = variables_of(model, IMAGES)
    graph = jaxkd.trace(model, variables, IMAGES)
    branch = {'one', 'two', 'inner_squeeze'}
    # What the outer squeeze-excite multiplies could be zero without it.
    assert graph.removable() == branch
    for name in branch:
        keep = {name: np.zeros(graph.sizes[name], bool)}
        assert graph.emptied([name]) == branch
        assert {n for n, alive in graph.complete(keep).items() if not alive.any()} == branch
        _, small = assert_compact_is_masked(model, variables, keep, IMAGES)
        assert jaxkd.trace(small.module, small.variables, IMAGES).cost() == graph.cost(keep)
    with pytest.raises(jaxkd.ConfigError, match='inner_squeeze, two would go, which are not rem'):
        blocks.resolve(graph, [('one', REMOVABLE)])
    with pytest.raises(jaxkd.ConfigError, match='freeze keeps all of the block'):
        blocks.resolve(graph, [('one', {**REMOVABLE, 'freeze': True})])
    settings = {**REMOVABLE, 'min_keep': 2}
    limits = blocks.resolve(graph, [('one|two|inner', settings), ('.', settings)][:1])
    assert {n for n, limit in limits.items() if limit.least == 0} == branch
    assert limits['one'].some == 2 and limits['stem'].least == 1


def test_parallel_branches_cannot_all_go():
    """One of the two that are joined has to stay, and where both go nothing between them does."""

    def body(x):
        x = conv(4, name='stem')(x)
        left, right = (nn.relu(conv(3, name=name)(x)) for name in ('left', 'right'))
        y = conv(5, name='merge')(jnp.concatenate([left, right], -1))
        x = jnp.concatenate([x, conv(4, name='joined')(y)], -1)
        return nn.Dense(2, name='head')(conv(3, name='last')(x).mean((1, 2)))

    model = Net(body)
    variables = variables_of(model, IMAGES)
    graph = jaxkd.trace(model, variables, IMAGES)
    # The stem's channels go around what is joined to them, and the other way nothing does.
    assert graph.removable() == {'left', 'right', 'merge', 'joined'}
    assert graph.emptied(['left']) == {'left'}
    assert graph.emptied(['left', 'right']) == {'left', 'right', 'merge', 'joined'}
    for names in ['left'], ['merge'], ['left', 'right']:
        keep = {name: np.zeros(graph.sizes[name], bool) for name in names}
        assert_compact_is_masked(model, variables, keep, IMAGES)

    def inception(x):
        x = jnp.concatenate([conv(3, name='left')(x), conv(3, name='right')(x)], -1)
        return nn.Dense(2, name='head')(x.mean((1, 2)))

    graph = jaxkd.trace(Net(inception), variables_of(Net(inception), IMAGES), IMAGES)
    assert graph.removable() == {'left'} and graph.removable(['right']) == {'right'}
    with pytest.raises(jaxkd.GraphError, match='nothing else leads .* once right are gone'):
        graph.complete({'left': np.zeros(3, bool), 'right': np.zeros(3, bool)})


def test_what_has_gone_leads_around_nothing():
    """Of a sum of two branches, one goes; then the other has to stay in the compact network."""

    def body(x):
        hidden = (nn.relu(conv(3, name=f'{name}_in')(x)) for name in ('left', 'right'))
        x = sum(conv(4, 1, name=f'{i}_out')(y) for i, y in enumerate(hidden))
        return nn.Dense(2, name='head')(x.mean((1, 2)))

    variables = variables_of(Net(body), IMAGES)
    graph = jaxkd.trace(Net(body), variables, IMAGES)
    assert graph.removable() == {'left_in'}
    small = jaxkd.compact(graph, variables, {'left_in': np.zeros(3, bool)})
    again = jaxkd.trace(small.module, small.variables, IMAGES)
    assert again.by_name['right_in'].size == 3 and again.removable() == set()


def test_every_input_stays():
    """The sum of two towers would go on without one of them, but not without its input."""

    class Towers(nn.Module):
        @nn.compact
        def __call__(self, x, y):
            x = conv(4, 1, name='a2')(conv(3, name='a1')(x))
            y = conv(4, 1, name='b2')(conv(3, name='b1')(y))
            return nn.Dense(2)((x + y).mean((1, 2)))

    variables = variables_of(Towers(), IMAGES, IMAGES)
    assert jaxkd.trace(Towers(), variables, IMAGES, IMAGES).removable() == set()


def test_inside_of_loops_nothing_goes():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + conv(4, 1, name='out')(conv(3, name='in')(x)), None

    def body(x):
        loop = nn.scan(Block, variable_axes={'params': 0}, split_rngs={'params': True}, length=2)
        x, _ = loop(name='loop')(conv(4, name='stem')(x), None)
        x = x + conv(4, 1, name='out')(conv(3, name='in')(x))
        return nn.Dense(2)(x.mean((1, 2)))

    graph = jaxkd.trace(Net(body), variables_of(Net(body), IMAGES), IMAGES)
    assert not graph.by_name['loop/in'].frozen and graph.removable() == {'in'}


def test_constants_are_no_part_of_a_branch():
    """What a network makes of parameters alone stays when a branch beside it goes."""

    def body(x):
        x = conv(4, 1, name='stem')(x)
        places = nn.Embed(36, 3, name='places')(jnp.arange(36)).reshape(1, 6, 6, 3)
        x = x + nn.Dense(4, name='placed')(nn.relu(nn.Dense(5, name='hidden')(places)))
        x = x + conv(4, 1, name='out')(nn.relu(conv(3, name='in')(x)))
        return nn.Dense(2, name='head')(nn.relu(x).mean((1, 2)))

    model = Net(body)
    variables = variables_of(model, IMAGES)
    graph = jaxkd.trace(model, variables, IMAGES)
    assert not graph.by_name['hidden'].frozen
    assert graph.removable() == graph.emptied(['in']) == {'in'}
    assert_compact_is_masked(model, variables, {'in': np.zeros(3, bool)}, IMAGES)


def test_attention_goes_with_all_of_its_heads():
    def body(x):
        x = conv(6, name='stem')(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        y = nn.MultiHeadDotProductAttention(2, qkv_features=8, name='attention')(x, x)
        return nn.Dense(2, name='head')((x + y).mean(1))

    model = Net(body)
    variables = variables_of(model, IMAGES)
    graph = jaxkd.trace(model, variables, IMAGES)
    keep = {name: np.zeros(graph.sizes[name], bool) for name in graph.removable()}
    assert len(keep) == 3
    keep |= keep_first(stem=(4, 6))
    _, small = assert_compact_is_masked(model, variables, keep, IMAGES)
    assert jaxkd.trace(small.module, small.variables, IMAGES).cost() == graph.cost(keep)


NETWORKS = {
    'resnet20': (11, {}),
    'resnet50': (32, {}),
    'mobilenet_v2': (10, {'width': 0.35}),
    'efficientnet_b0': (18, {'width': 0.35}),
}


@pytest.mark.parametrize('name', NETWORKS)
def test_networks(name):
    """All branches at once, and some beside halves of the other groups."""
    number, arguments = NETWORKS[name]
    model = models.create(name, num_classes=10, **arguments)
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = variables_of(model, x)
    graph = jaxkd.trace(model, variables, x)
    every = graph.removable()
    assert len(every) == number
    cutting.rehearse(graph, every)
    some = graph.removable(sorted(every)[: number // 2])
    keep = half(graph) | {n: np.zeros(graph.sizes[n], bool) for n in some}
    small = jaxkd.compact(graph, variables, keep)
    anew = jaxkd.trace(small.module, small.variables, x)
    assert anew.cost() == graph.cost(keep)
    assert not some & anew.sizes.keys()


@st.composite
def residual_nets(draw):
    """Blocks of a kind and a width around a stream of four channels, and a seed."""
    kinds = st.sampled_from(['plain', 'depthwise', 'grouped', 'excited', 'twice', 'dense', 'pre'])
    found = draw(st.lists(st.tuples(kinds, st.integers(1, 5)), min_size=1, max_size=3))
    return RandomBlocks(tuple(found), draw(st.booleans())), draw(st.integers(0, 1000))


class RandomBlocks(nn.Module):
    blocks: tuple[tuple[str, int], ...]
    activated: bool

    @nn.compact
    def __call__(self, x):
        x = conv(4, name='stem')(x)
        for i, (kind, width) in enumerate(self.blocks):
            width *= 2 if kind == 'grouped' else 1
            y = conv(width, use_bias=True)(norm(f'pre{i}')(x) if kind == 'pre' else x)
            y = nn.softplus(norm(f'norm{i}')(y))
            if kind == 'depthwise':
                y = conv(width, feature_group_count=width, strides=1)(y)
            elif kind == 'grouped':
                y = conv(2 * width, feature_group_count=2)(y)
            elif kind == 'excited':
                y = excited(y, f'block{i}')
            elif kind == 'twice':
                y = y + conv(width)(nn.relu(conv(3)(y)))
            if kind == 'dense':
                x = jnp.concatenate([x, y], -1)
            else:
                x = x + conv(x.shape[-1], use_bias=width > 2)(y)
            x = nn.relu(x) if self.activated else x
        return nn.Dense(3)(x.mean((1, 2)))


@hypothesis.settings(
    max_examples=15, deadline=None, derandomize=True, database=None, print_blob=False
)
@hypothesis.given(residual_nets())
def test_compact_is_masked_and_costs_what_was_promised(drawn):
    model, seed = drawn
    variables = variables_of(model, IMAGES, seed=seed)
    graph = jaxkd.trace(model, variables, IMAGES)
    random = np.random.default_rng(seed)
    keep = half(graph, seed)
    gone = {name for name in sorted(graph.removable()) if random.random() < 0.6}
    keep |= {name: np.zeros(graph.sizes[name], bool) for name in gone}
    _, small = assert_compact_is_masked(model, variables, keep, IMAGES)
    anew = jaxkd.trace(small.module, small.variables, IMAGES)
    assert anew.cost() == graph.cost(keep)
    empty = {name for name, alive in graph.complete(keep).items() if not alive.any()}
    assert empty == graph.emptied(gone) and not empty & anew.sizes.keys()
    # The branches are gone once and for all, and what is left can be cut on.
    jaxkd.compact(anew, small.variables, half(anew, seed))


def test_a_network_without_a_branch_is_used_like_any_other(two, tmp_path):
    graph, variables = two
    small = jaxkd.compact(graph, variables, NONE)
    fresh = jax.jit(small.module.init)(jax.random.key(0), images_for())
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, small.variables)
    assert small.structure.groups['a_in'] == {'size': 5, 'kept': []}
    assert jaxkd.Structure.from_json(small.structure.to_json()) == small.structure
    jaxkd.save(tmp_path / 'small', small)
    again = jaxkd.load(tmp_path / 'small', model=TwoBlocks())
    assert_same(
        small.apply(small.variables, images_for()), again.apply(again.variables, images_for()), 0
    )

    # A step of the masked network, then cut, is a step of the compact one.
    optimizer = optax.adam(0.1)

    def step(apply, variables):
        def loss(params):
            out, changed = apply(
                {**variables, 'params': params}, images_for(), train=True, mutable=['batch_stats']
            )
            return jnp.square(out - 1).sum(), changed

        params = variables['params']
        grads, changed = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, optimizer.init(params), params)
        return state, optax.apply_updates(params, updates), changed

    large = jax.jit(lambda v: step(graph.model.apply, v))(jaxkd.mask(graph, variables, NONE))
    expected = jax.jit(lambda v: step(small.apply, v))(jaxkd.cut(graph, variables, NONE))
    assert_same(jaxkd.cut(graph, large, NONE), expected, 1e-4)


def test_layers_of_a_branch_that_has_gone_take_no_time(two, tmp_path):
    graph, _ = two
    graph = jaxkd.with_latency(
        graph, batch_size=2, cache=tmp_path, measure=lambda probes: [1e-3] * len(probes)
    )
    assert all(row.latency > 0 for row in graph.cost().rows if row.flops)
    rows = {row.layer: row for row in graph.cost(NONE).rows}
    assert {name for name, row in rows.items() if row.latency} == {'stem', 'head'}


# How branches are chosen.


def test_select_removes_what_is_worth_least(two):
    """A unit of a costs 1,440 multiply-adds, one of b 612, and without both 440 of 11,312 are left.

    6,787 are enough for a of 4 units and none of b, or for a of 2 and all of b, and so on.
    """
    graph, _ = two
    scores = {'stem': np.full(4, 5.0), 'a_in': np.ones(5), 'b_in': np.full(6, 0.2)}
    settings = [('_in', REMOVABLE)]
    keep = jaxkd.select(graph, scores, flops=0.6, blocks=settings)
    assert not keep['b_in'].any() and keep['a_in'].sum() == 4
    assert all(k.any() for k in jaxkd.select(graph, scores, flops=0.6).values())
    with pytest.raises(jaxkd.BudgetError):
        jaxkd.select(graph, scores, flops=0.03)
    assert graph.cost(jaxkd.select(graph, scores, flops=0.03, blocks=settings)).flops <= 339
    # All of the branch or at least as much as the block wants.
    settings = [('_in', {**REMOVABLE, 'min_keep': 1.0})]
    for budget in 0.1, 0.4, 0.6, 0.8:
        keep = jaxkd.select(graph, scores, flops=budget, blocks=settings)
        assert all(keep[name].all() or not keep[name].any() for name in NONE)
    # Without a budget nothing goes, and without scores a branch stays.
    assert all(k.all() for k in jaxkd.select(graph, scores, blocks=settings).values())
    del scores['a_in']
    assert jaxkd.select(graph, scores, flops=0.8, blocks=settings)['a_in'].all()


def test_the_unscored_rest_of_a_branch_goes_only_with_it():
    model = Net(bottleneck)
    graph = jaxkd.trace(model, variables_of(model, IMAGES), IMAGES)
    scores = {'stem': np.ones(4), 'one': np.ones(2), 'two': np.full(5, 0.1)}
    settings = [('one|two|inner', REMOVABLE)]
    for budget in 0.9, 0.7, 0.5, 0.3, 0.1:
        keep = jaxkd.select(graph, scores, flops=budget, blocks=settings)
        kept = [keep[name].any() for name in ('one', 'two', 'inner_squeeze')]
        assert all(kept) or not any(kept)
        assert not any(kept) or keep['inner_squeeze'].all()
    assert not any(kept)


def _brute_force(graph, scores, budget, names, removable):
    """The most worth of all keeps within the budget, best units first."""
    best = -1.0
    sizes = [range(0 if name in removable else 1, graph.sizes[name] + 1) for name in names]
    cost = graph.cost().flops
    for counts in itertools.product(*sizes):
        alive = dict(zip(names, counts, strict=True))
        keep = {
            name: np.isin(np.arange(graph.sizes[name]), np.argsort(-scores[name])[:number])
            for name, number in alive.items()
        }
        worth = sum(scores[name][graph.complete(keep)[name]].sum() for name in names)
        if graph.cost(keep).flops <= budget * cost:
            best = max(best, worth)
    return best


@pytest.mark.parametrize('tried', [20_000, 0])
@pytest.mark.parametrize('seed', range(6))
def test_near_the_best_that_there_is(two, monkeypatch, seed, tried):
    """Brute force over all counts, none at all among them; with all tried, and without."""
    monkeypatch.setattr(selecting, 'TRIED', tried)
    graph, _ = two
    random = np.random.default_rng(seed)
    names = ['stem', 'a_in', 'b_in']
    scores = {name: random.uniform(0, random.uniform(0.2, 3), graph.sizes[name]) for name in names}
    budget = random.uniform(0.05, 0.8)
    best = _brute_force(graph, scores, budget, names, {'a_in', 'b_in'})
    keep = jaxkd.select(graph, scores, flops=budget, blocks=[('_in', REMOVABLE)])
    assert graph.cost(keep).flops <= budget * graph.cost().flops
    worth = sum(scores[name][keep[name]].sum() for name in names)
    assert worth >= (selecting.DISCOUNT if tried else 0.95) * best


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('budget', [0.2, 0.3, 0.5])
def test_an_order_alone_removes_no_branches_for_its_first_unit(two, budget, seed):
    """Scores so far apart that a sum of them is the largest: what they leave over is still used."""
    graph, variables = two
    scores = criteria.random(graph, variables, criteria.Evidence(seed=seed))
    keep = jaxkd.select(graph, scores, flops=budget, blocks=[('_in', REMOVABLE)])
    assert 0.75 * budget <= graph.cost(keep).flops / graph.cost().flops <= budget


@pytest.mark.parametrize('seed', range(4))
def test_select_lands_just_below_the_budget(seed):
    """Branches are large; the units of the others use up what they leave."""
    model = models.create('resnet20', num_classes=10)
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    graph = jaxkd.trace(model, variables, x)
    random = np.random.default_rng(seed)
    scores = {
        g.name: random.exponential() ** 2 * random.exponential(size=g.size)
        for g in graph.groups
        if not g.frozen
    }
    scores['stage2_block1/conv1/conv'] *= 1e-3
    worth = {}
    for settings in (), [('block', REMOVABLE)]:
        keep = jaxkd.select(graph, scores, flops=0.15, blocks=settings)
        share = graph.cost(keep).flops / graph.cost().flops
        assert 0.99 * 0.15 <= share <= 0.15
        worth[bool(settings)] = sum(s[keep[name]].sum() for name, s in scores.items())
    assert not keep['stage2_block1/conv1/conv'].any()
    assert worth[True] >= worth[False]


def test_the_search_closes_whole_branches():
    """Two weak groups of one branch, of which the second has gates that the first takes along."""
    model = models.create('resnet50', num_classes=10)
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    graph = jaxkd.trace(model, jax.eval_shape(model.init, jax.random.key(0), x), x)
    random = np.random.default_rng(0)
    efforts = {g.name: random.uniform(0.8, 1.2, g.size) for g in graph.groups if not g.frozen}
    efforts['stage1_block1/conv1/conv'] *= 0.0
    efforts['stage3_block2/conv2/conv'] *= 0.1
    settings = [('block', REMOVABLE)]
    limits = blocks.resolve(graph, settings)
    budgets = blocks.budgets(graph, settings, flops=0.6)
    state = control.initial(graph, efforts)
    for i in range(130):
        state = control.decide(
            graph,
            state,
            efforts,
            limits,
            budgets,
            progress=i / 100,
            horizon=0.1,
            period=0.01,
            rate=0.5,
        )
        if i == 0:  # the rest of a branch that is interrupted is closed at once
            assert state.closed['stage1_block1/conv2/conv'].all()
        efforts = {n: np.maximum(e - 0.05 * state.strength[n], 0.0) for n, e in efforts.items()}
    keep = control.alive(graph, state)
    gone = {f'stage{i}/{j}/conv' for i in ('1_block1', '3_block2') for j in ('conv1', 'conv2')}
    assert gone <= {name for name, alive in keep.items() if not alive.any()}
    assert graph.cost(keep).flops <= 0.6 * 1.03 * graph.cost().flops
    keep = jaxkd.select(graph, efforts, flops=0.6, blocks=settings)
    assert gone <= {name for name, alive in keep.items() if not alive.any()}
    assert 0.99 * 0.6 <= graph.cost(keep).flops / graph.cost().flops <= 0.6
