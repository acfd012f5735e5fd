"""Each criterion against a case computed by hand, and all of them at work."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest

import jaxkd
from jaxkd import errors
from jaxkd.search import criteria
from jaxkd.search.criteria import CRITERIA, Evidence

DATA = ('taylor', 'group_taylor', 'fisher', 'activation', 'sensitivity')


class Line(nn.Module):
    """x[2] → hidden[3] → out[1], without an activation function: loss(x) = mean of out."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1, use_bias=False, name='out')(nn.Dense(3, name='hidden')(x))


HIDDEN = np.array([[1.0, 0.0, 3.0], [2.0, -1.0, 4.0]])  # filters (1, 2), (0, -1), (3, 4)
BIAS = np.array([0.5, 1.0, 0.0])
OUT = np.array([[2.0], [-1.0], [1.0]])


@functools.cache
def line():
    """The graph, its variables, and the score of its only group as a function of the criterion."""
    model = Line()
    variables = {
        'params': {
            'hidden': {'kernel': jnp.array(HIDDEN), 'bias': jnp.array(BIAS)},
            'out': {'kernel': jnp.array(OUT)},
        }
    }
    graph = jaxkd.trace(model, variables, jnp.ones((1, 2)))

    def score(criterion, *batches):
        evidence = Evidence(lambda v, x: model.apply(v, x).mean(), batches)
        return CRITERIA[criterion](graph, variables, evidence)['hidden']

    return graph, variables, score


class Sum(nn.Module):
    """Convolutions with BatchNorm, two of which are summed, and a head."""

    width: int = 4

    @nn.compact
    def __call__(self, x):
        def layer(x, name, features, norm=True):
            x = nn.Conv(features, (3, 3), strides=2, use_bias=False, name=name)(x)
            return nn.BatchNorm(use_running_average=True, name=f'{name}_bn')(x) if norm else x

        x = nn.relu(layer(x, 'stem', 3 * self.width))
        x = nn.relu(layer(x, 'left', 4 * self.width) + layer(x, 'right', 4 * self.width))
        x = nn.relu(layer(x, 'plain', 5 * self.width, norm=False))
        return nn.Dense(5, name='head')(x.mean((1, 2)))


IMAGES = jax.ShapeDtypeStruct((4, 12, 12, 3), jnp.float32)


@functools.cache
def summed():
    model = Sum()
    variables = nets.variables_of(model, IMAGES)
    batches = [(nets.images_for(IMAGES, seed), jnp.arange(4) % 5) for seed in range(2)]
    return model, variables, Evidence(jax.jit(cross_entropy), batches)


def cross_entropy(variables, batch):
    images, labels = batch
    logits = Sum().apply(variables, images)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()


def test_norms_of_filters():
    """|1|+|2|, |-1|, |3|+|4| = 3, 1, 7 with mean 11/3; norms √5, 1, 5."""
    _, _, score = line()
    np.testing.assert_allclose(score('l1'), np.array([3, 1, 7]) / (11 / 3))
    norms = np.array([5**0.5, 1, 5])
    np.testing.assert_allclose(score('l2'), norms / norms.mean())


def test_fpgm_sums_distances():
    """(1,2)–(0,-1): √10; (1,2)–(3,4): √8; (0,-1)–(3,4): √34."""
    a, b, c = 10**0.5, 8**0.5, 34**0.5
    expected = np.array([a + b, a + c, b + c])
    np.testing.assert_allclose(line()[2]('fpgm'), expected / expected.mean())


def test_lamp_divides_by_what_is_as_large():
    """Squares 5, 1, 25: 5/30, 1/31, 25/25. Equal ones count one another."""
    graph, variables, score = line()
    np.testing.assert_allclose(score('lamp'), [5 / 30, 1 / 31, 1])
    params = dict(variables['params'])
    params['hidden'] = {**params['hidden'], 'kernel': jnp.array([[2.0, 0.0, -2.0], [0, 0, 0]])}
    scores = criteria.lamp(graph, {'params': params})['hidden']
    np.testing.assert_allclose(scores, [1 / 2, 0, 1 / 2])


def test_taylor_squares_what_the_filter_adds():
    """∂loss/∂W_ic = x_i·v_c. With x = (1, 2): Σ g·w is v_c·Σ x_i W_ic = 2·5, -1·-2, 1·11."""
    score = line()[2]
    first, second = jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 0.0]])
    np.testing.assert_allclose(score('taylor', first), [100, 4, 121])
    # With x = (1, 0): 2·1, 0, 3. The mean of the squares, not the square of the mean.
    np.testing.assert_allclose(score('taylor', first, second), [104 / 2, 2, 130 / 2])


def test_group_taylor_adds_biases_and_readers():
    """b_c·v_c = 1, -1, 0; the reading weight's v_c·h_c, with h = (5.5, -1, 11), is 11, 1, 11."""
    score = line()[2]('group_taylor', jnp.array([[1.0, 2.0]]))
    np.testing.assert_allclose(score, [100 + 1 + 121, 4 + 1 + 1, 121 + 0 + 121])


def test_fisher_is_of_what_is_read():
    """v_c·h_c, with h = (5.5, -1, 11) for x = (1, 2) and (1.5, 1, 3) for x = (1, 0)."""
    score = line()[2]
    first, second = jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 0.0]])
    np.testing.assert_allclose(score('fisher', first), [121, 1, 121])
    np.testing.assert_allclose(score('fisher', first, second), [130 / 2, 1, 130 / 2])
    # Of several readers the sum counts: here what they read cancels out.

    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            hidden = nn.Dense(3, use_bias=False, name='hidden')(x)
            out = [nn.Dense(1, use_bias=False, name=name)(hidden) for name in ('plus', 'minus')]
            return out[0] - out[1]

    params = {'hidden': {'kernel': jnp.array(HIDDEN)}}
    params |= {'plus': {'kernel': jnp.array(OUT)}, 'minus': {'kernel': jnp.array(OUT)}}
    graph = jaxkd.trace(Twice(), {'params': params}, first)
    evidence = Evidence(lambda v, x: Twice().apply(v, x).mean(), [first])
    np.testing.assert_array_equal(criteria.fisher(graph, {'params': params}, evidence)['hidden'], 0)


def test_activation_is_the_mean_magnitude():
    """x = (1, 2): h = (5.5, -1, 11); x = (-1, 0): h = (-0.5, 1, -3). Means 3, 1, 7."""
    score = line()[2]
    together = score('activation', jnp.array([[1.0, 2.0], [-1.0, 0.0]]))
    np.testing.assert_allclose(together, np.array([3, 1, 7]) / (11 / 3), rtol=1e-6)
    apart = score('activation', jnp.array([[1.0, 2.0]]), jnp.array([[-1.0, 0.0]]))
    np.testing.assert_allclose(apart, together, rtol=1e-6)


def test_activation_is_taken_after_the_norm():
    model, variables, evidence = summed()
    scores = criteria.activation(jaxkd.trace(model, variables, IMAGES), variables, evidence)
    images = jnp.concatenate([images for images, _ in evidence.batches])
    _, state = model.apply(variables, images, capture_intermediates=True)
    outputs = state['intermediates']

    def means(name):
        return np.abs(outputs[name]['__call__'][0]).mean((0, 1, 2))

    expected = {
        'stem': means('stem_bn'),
        'left': (means('left_bn') + means('right_bn')) / 2,
        'plain': means('plain'),
    }
    assert scores.keys() == expected.keys()
    for name, mean in expected.items():
        np.testing.assert_allclose(scores[name], mean / mean.mean(), rtol=1e-4)


def test_activation_sees_what_is_lifted():
    """Under `nn.remat` and a jitted loss that has run before, and with two calls of one layer."""

    class Lifted(nn.Module):
        @nn.compact
        def __call__(self, x):
            hidden = nn.remat(nn.Dense)(3, name='hidden')
            return nn.Dense(1, use_bias=False, name='out')(hidden(x) + hidden(-x))

    _, variables, _ = line()
    x = jnp.array([[1.0, 2.0]])
    loss = jax.jit(lambda v, x: Lifted().apply(v, x).mean())
    loss(variables, x)
    graph = jaxkd.trace(Lifted(), variables, x)
    scores = criteria.activation(graph, variables, Evidence(loss, [x]))
    # W'x = (5, -2, 11) and b = (0.5, 1, 0): |W'x + b| and |-W'x + b| have the means 5, 2, 11.
    np.testing.assert_allclose(scores['hidden'], np.array([5, 2, 11]) / 6, rtol=1e-6)


def test_sensitivity_is_the_growth_of_the_loss():
    """x = (1, 2): out = 11 + 1 + 11. The weakest third, channel 1, masked: 23 - 1.

    So the loss falls by 1, and rises if its sign is turned, by 1 for the one channel masked.
    """
    graph, variables, _ = line()
    x = jnp.array([[1.0, 2.0]])
    rank = np.array([2, 1, 3]) / 3
    grows = Evidence(lambda v, x: -Line().apply(v, x).mean(), [x])
    scores = criteria.sensitivity(graph, variables, grows)['hidden']
    np.testing.assert_allclose(scores, rank, rtol=1e-5)
    falls = Evidence(lambda v, x: Line().apply(v, x).mean(), [x])
    scores = criteria.sensitivity(graph, variables, falls)['hidden']
    assert 0 < scores.max() < 1e-6  # its half can go, but still the weakest first
    np.testing.assert_allclose(scores / scores.max(), rank)


def test_transposed_kernels_and_heads_make_their_output_axes():
    """The channels of a transposed kernel (…, out, in) are on its last axis but one; a kernel
    (in, heads, width) makes heads and widths."""

    def body(x):
        x = nn.ConvTranspose(4, (1, 1), transpose_kernel=True, use_bias=False, name='up')(x)
        x = nn.DenseGeneral((2, 5), use_bias=False, name='heads')(x)
        return nn.DenseGeneral(3, axis=(-2, -1), use_bias=False, name='join')(x)

    model = nets.Net(body)
    variables = nets.variables_of(model, IMAGES)
    graph = jaxkd.trace(model, variables, IMAGES)
    evidence = Evidence(lambda v, x: model.apply(v, x).sum(), [nets.images_for(IMAGES)])
    norms = criteria.l1(graph, variables)
    activations = criteria.activation(graph, variables, evidence)
    _, state = model.apply(variables, evidence.batches[0], capture_intermediates=True)
    for group, kernel_axes, out_axes in (
        ('up', (0, 1, 3), (0, 1, 2)),
        ('heads', (0, 2), (0, 1, 2, 4)),
        ('heads#2', (0, 1), (0, 1, 2, 3)),
    ):
        layer = group.split('#')[0]
        norm = np.abs(variables['params'][layer]['kernel']).sum(kernel_axes)
        np.testing.assert_allclose(norms[group], norm / norm.mean(), rtol=1e-5)
        mean = np.abs(state['intermediates'][layer]['__call__'][0]).mean(out_axes)
        np.testing.assert_allclose(activations[group], mean / mean.mean(), rtol=1e-4)


@pytest.mark.parametrize('criterion', sorted(CRITERIA.keys() - {'random'}))
def test_permuting_the_channels_permutes_the_scores(criterion):
    model, variables, evidence = summed()
    graph = jaxkd.trace(model, variables, IMAGES)
    random = np.random.default_rng(0)
    orders = {g.name: random.permutation(g.size) for g in graph.groups if not g.frozen}
    leaves = jax.tree_util.tree_flatten_with_path(variables)[0]
    permuted = {'/'.join(entry.key for entry in path): np.array(leaf) for path, leaf in leaves}
    for group in graph.groups:
        for member in group.members if not group.frozen else ():
            leaf = permuted[member.path]
            permuted[member.path] = np.take(leaf, orders[group.name], member.axis)
    shuffled = jax.tree.unflatten(jax.tree.structure(variables), list(permuted.values()))

    before = CRITERIA[criterion](graph, variables, evidence)
    after = CRITERIA[criterion](graph, shuffled, evidence)
    assert before.keys() == after.keys() and before
    for name, order in orders.items():
        if name in before:
            np.testing.assert_allclose(after[name], before[name][order], rtol=2e-2, atol=1e-9)


@pytest.mark.parametrize('criterion', CRITERIA)
def test_prune_with_each_criterion(criterion):
    model, variables, evidence = summed()
    graph = jaxkd.trace(model, variables, IMAGES)
    scores = CRITERIA[criterion](graph, variables, evidence)
    unsaid = {'plain'} if criterion == 'bn_scale' else set()
    assert scores.keys() == {g.name for g in graph.groups if not g.frozen} - unsaid
    for name, score in scores.items():
        assert score.dtype == np.float64 and score.shape == (graph.sizes[name],)
        assert np.isfinite(score).all() and (score >= 0).all() and np.ptp(score) > 0

    data = {'loss': evidence.loss, 'batches': iter(evidence.batches)} if criterion in DATA else {}
    small = jaxkd.prune(model, variables, IMAGES, flops=0.5, criterion=criterion, **data)
    share = small.structure.compact['flops'] / small.structure.full['flops']
    assert 0.4 < share <= 0.5
    assert np.isfinite(small.apply(small.variables, evidence.batches[0][0])).all()


def test_parameters_with_a_slash_in_their_names():
    """A `nn.WeightNorm` calls its own Conv_0/kernel/scale."""

    def body(x):
        for features in (8, 6):
            x = nn.relu(nn.WeightNorm(nets.conv(features))(x))
        return nn.Dense(3)(x.mean((1, 2)))

    model = nets.Net(body)
    variables = nets.variables_of(model, IMAGES)
    data = {
        'loss': lambda v, x: jnp.square(model.apply(v, x)).mean(),
        'batches': [nets.images_for(IMAGES)],
    }
    small = jaxkd.prune(model, variables, IMAGES, flops=0.5, criterion='fisher', **data)
    kept = small.structure.keep['Conv_1'].sum()
    scale = small.variables['params']['WeightNorm_1']['Conv_1/kernel/scale']
    assert scale.shape == (kept,) and kept < 6
    graph = jaxkd.trace(model, variables, IMAGES)
    assert criteria.activation(graph, variables, Evidence(*data.values()))['Conv_1'].shape == (6,)
    search = jaxkd.Search(graph, variables['params'], steps=1, learning_rate=0.1, flops=0.5)
    params = search.gated(variables['params'])
    nets.assert_same(search.fold(params), variables['params'])


def test_uniform_takes_the_same_share_of_every_group():
    """A channel of `left` costs several times one of `plain`, and it makes no difference."""
    model = Sum(32)
    variables = nets.variables_of(model, IMAGES)
    graph = jaxkd.trace(model, variables, IMAGES)
    price = graph.price(None, 'flops')
    assert price['left'][0] > 4 * price['plain'][0]
    keep = jaxkd.select(graph, criteria.uniform(graph, variables), flops=0.5)
    shares = [keep[name].mean() for name in ('stem', 'left', 'plain')]
    assert max(shares) - min(shares) < 0.03 and max(shares) < 0.75


def test_random_is_seeded():
    model, variables, _ = summed()
    graph = jaxkd.trace(model, variables, IMAGES)
    first, again, other = (
        criteria.random(graph, variables, Evidence(seed=seed))['left'] for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(np.argsort(first), np.argsort(other))


@pytest.mark.parametrize('criterion', DATA)
def test_what_needs_data_says_how_to_give_it(criterion):
    graph, variables, _ = line()
    function = CRITERIA[criterion]
    for evidence in (None, Evidence(seed=3)):
        with pytest.raises(errors.ConfigError, match=rf"'{criterion}'.*loss=, batches="):
            function(graph, variables, evidence)
    with pytest.raises(errors.ConfigError, match='at least one batch'):
        function(graph, variables, Evidence(lambda v, x: Line().apply(v, x).mean(), []))
    x = jnp.ones((2, 2))
    with pytest.raises(errors.ConfigError, match=r'loss.*scalar.*\[2, 1\]'):
        function(graph, variables, Evidence(Line().apply, [x]))
    with pytest.raises(errors.ConfigError, match='loss.*scalar alone, not a tuple'):
        function(graph, variables, Evidence(lambda v, x: (Line().apply(v, x).mean(), {}), [x]))
    broken = Evidence(lambda v, x: Line().apply(v, x).mean(), [x * jnp.nan])
    with pytest.raises(errors.ConfigError, match=f"'{criterion}'.*not finite"):
        function(graph, variables, broken)


def test_a_loss_that_runs_another_model_is_refused():
    graph, variables, _ = line()
    evidence = Evidence(
        lambda v, x: (x @ v['params']['hidden']['kernel']).mean(), [jnp.ones((1, 2))]
    )
    with pytest.raises(errors.ConfigError, match='ran none of the layers.*Line.apply'):
        criteria.activation(graph, variables, evidence)


def test_prune_asks_for_data_and_knows_its_criteria():
    model, variables, _ = summed()
    with pytest.raises(errors.ConfigError, match='taylor.*loss=, batches='):
        jaxkd.prune(model, variables, IMAGES, flops=0.5, criterion='taylor')
    with pytest.raises(errors.ConfigError, match='did you mean taylor'):
        jaxkd.prune(model, variables, IMAGES, flops=0.5, criterion='tailor')
