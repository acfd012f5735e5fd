"""Learning a structure by one call, and in a loop of one's own."""

import functools
import itertools

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import nets
import numpy as np
import optax
import pytest
from sklearn import datasets

import jaxkd
from jaxkd import cpu, distill
from jaxkd.search import control, criteria, gates, learn, penalty

STEPS = 150


class Net(nn.Module):
    """Three convolutions, the last beside a shortcut."""

    norms: tuple[str, str, str] = ('batch', 'batch', 'batch')

    @nn.compact
    def __call__(self, x, train=False):
        def layer(x, features, norm, **kwargs):
            x = nn.Conv(features, (3, 3), **kwargs)(x)
            if norm == 'batch':
                x = nn.BatchNorm(not train, momentum=0.9)(x)
            if norm == 'group':
                x = nn.GroupNorm(num_groups=None, group_size=2)(x)
            return nn.relu(x)

        first, second, third = self.norms
        x = layer(layer(x, 32, first), 48, second, strides=2)
        return nn.Dense(10)((x + layer(x, 48, third)).mean((1, 2)))


MODEL = Net()
IMAGES = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)


def batches(seed=0):
    images, labels = datasets.load_digits(return_X_y=True)
    random = np.random.default_rng(seed)
    while True:
        chosen = random.integers(len(labels), size=64)
        yield {'image': (images[chosen] / 16).reshape(-1, 8, 8, 1), 'label': labels[chosen]}


def loss(variables, batch, apply=MODEL.apply):
    logits, changed = apply(variables, batch['image'], train=True, mutable=['batch_stats'])
    hard = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
    return hard.mean(), changed


@pytest.fixture(scope='module')
def teacher():
    variables = MODEL.init(jax.random.key(0), jnp.zeros(IMAGES.shape))
    params, rest = variables['params'], {'batch_stats': variables['batch_stats']}
    tx = optax.sgd(0.1, momentum=0.9)
    state = tx.init(params)

    @jax.jit
    def step(params, rest, state, batch):
        grad = jax.grad(lambda params: loss({'params': params, **rest}, batch), has_aux=True)
        gradients, changed = grad(params)
        updates, state = tx.update(gradients, state)
        return optax.apply_updates(params, updates), changed, state

    for _, batch in zip(range(STEPS), batches(), strict=False):
        params, rest, state = step(params, rest, state, batch)
    return {'params': params, **rest}


def accuracy(apply, variables):
    batch = next(batches(seed=1))
    return float(np.mean(np.argmax(apply(variables, batch['image']), -1) == batch['label']))


def test_structure_is_learned_under_a_teacher(teacher, capsys):
    def taught(variables, batch):
        logits, changed = MODEL.apply(
            variables, batch['image'], train=True, mutable=['batch_stats']
        )
        targets = MODEL.apply(teacher, batch['image'])
        return distill.distillation(logits, targets, batch['label']).mean(), changed

    result = jaxkd.learn_structure(
        MODEL, teacher, taught, batches(), IMAGES, steps=STEPS, flops=0.5, train=False
    )
    compact, full = (result.small.structure.compact, result.small.structure.full)
    # One channel of the second group costs 1.4 % of the network.
    assert 0.49 <= compact['flops'] / full['flops'] <= 0.5
    assert len(result.loss) == len(result.alive) == STEPS
    assert result.alive[0] > 0.95 and result.alive[-1] < 0.55
    assert accuracy(MODEL.apply, teacher) > 0.9  # so that there is something to lose
    assert accuracy(result.small.apply, result.small.variables) > 0.7
    # All that goes had closed before: neither the outputs nor the loss jump.
    batch = next(batches(seed=2))
    before, after = (
        apply(variables, batch['image'])
        for apply, variables in (
            (MODEL.apply, result.variables),
            (result.small.apply, result.small.variables),
        )
    )
    losses = [
        float(optax.softmax_cross_entropy_with_integer_labels(x, batch['label']).mean())
        for x in (before, after)
    ]
    with capsys.disabled():
        print(f'\nloss before removal {losses[0]:.6f}, after {losses[1]:.6f}')
    nets.assert_same(before, after, 1e-4)
    # What is compact is what was found, with its channels removed.
    graph = jaxkd.trace(MODEL, teacher, IMAGES, train=False)
    image = next(batches())['image']
    masked = MODEL.apply(jaxkd.mask(graph, result.variables, result.keep), image)
    nets.assert_same(masked, result.small.apply(result.small.variables, image), 1e-4)


def test_blocks_shift_what_is_learned(teacher):
    """Within the same budget, who is charged more keeps less; a block can have its own budget."""

    def kept(**settings):
        result = jaxkd.learn_structure(
            MODEL,
            teacher,
            loss,
            batches(),
            IMAGES,
            steps=60,
            flops=0.3,
            blocks=[('^Conv_0', settings)],
            train=False,
        )
        assert result.small.structure.compact['flops'] <= 0.3 * result.small.structure.full['flops']
        return int(result.keep['Conv_0'].sum())

    plain = kept()
    assert kept(strength=4.0) < plain < kept(strength=0.1)
    assert kept(budget={'flops': 0.2}) <= 0.2 * 32


def test_a_loop_of_ones_own_finds_the_same(teacher):
    result = jaxkd.learn_structure(
        MODEL, teacher, loss, batches(), IMAGES, steps=20, params=0.7, train=False
    )
    graph = jaxkd.trace(MODEL, teacher, IMAGES, train=False)

    def fast(variables, batch):  # as learn_structure does it: the same rounding
        with cpu.fast_layers():
            return loss(variables, batch)

    params, rest = teacher['params'], {'batch_stats': teacher['batch_stats']}
    evidence = criteria.Evidence(
        lambda variables, batch: fast(variables, batch)[0], list(itertools.islice(batches(), 20))
    )
    worth = criteria.fisher(graph, teacher, evidence)
    search = jaxkd.Search(graph, params, steps=20, learning_rate=0.02, worth=worth, params=0.7)
    tx = optax.chain(optax.sgd(0.02, momentum=0.9, nesterov=True), search.transformation)
    state = tx.init(params)

    @jax.jit
    def step(params, rest, state, batch, extra):
        grad = jax.grad(lambda params: fast({'params': params, **rest}, batch), has_aux=True)
        gradients, changed = grad(params)
        updates, state = tx.update(gradients, state, params, **extra)
        return optax.apply_updates(params, updates), changed, state

    for number, batch in zip(range(20), batches(), strict=False):
        extra = search.before(number, params)
        params, rest, state = step(params, rest, state, batch, extra)
    keep = search.keep(params)
    assert graph.cost(keep).params <= 0.7 * graph.cost().params
    nets.assert_same(keep, result.keep)
    found = search.reopen({'params': params, **rest}, keep, teacher['params'])
    nets.assert_same(found['params'], result.variables['params'], 1e-3)


def test_cutting_while_searching_changes_nothing(teacher, capsys, optimized):
    """The same curve with and without cutting, and no jump where channels go."""
    graph = jaxkd.trace(MODEL, teacher, IMAGES, train=False)
    fixed = next(batches(seed=2))

    def search(teacher, fixed, shrink):
        course = learn.course(graph, steps=STEPS, learning_rate=0.02, shrink=shrink, flops=0.3)
        body = learn.follow(course)
        params, rest = teacher['params'], {'batch_stats': teacher['batch_stats']}
        memory = learn.first(body(graph.keep_all()), params)
        now = body(memory.physical)

        def made(now):
            proximal = penalty.proximal(now.gates, 0.02)
            tx = optax.chain(optax.sgd(0.02, momentum=0.9), proximal)

            @jax.jit
            def step(params, rest, state, batch, extra):
                def objective(params):
                    variables = {'params': params, **rest}
                    logits, changed = now.module.apply(
                        variables, batch['image'], train=True, mutable=['batch_stats']
                    )
                    hard = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
                    return hard.mean(), changed

                (value, changed), gradients = jax.value_and_grad(objective, has_aux=True)(params)
                updates, state = tx.update(gradients, state, params, **extra)
                return optax.apply_updates(params, updates), changed, state, value

            return tx, step

        tx, step = made(now)
        state = tx.init(params)
        losses, jumps = [], []
        for number, batch in zip(range(STEPS), batches(), strict=False):
            memory = learn.press(now, number, params, memory)
            if memory.physical is not now.keep:
                variables = {'params': params, **rest}
                before = now.module.apply(variables, fixed['image'])
                variables, state = jaxkd.graph.cut.cut(
                    graph, (variables, state), memory.physical, among=now.keep
                )
                now = body(memory.physical)
                _, step = made(now)
                after = now.module.apply(variables, fixed['image'])
                jumps.append(float(jnp.max(jnp.abs(after - before)) / jnp.max(jnp.abs(before))))
                params, rest = variables['params'], {'batch_stats': variables['batch_stats']}
            extra = {'strength': learn.strength(now, memory)}
            params, rest, state, value = step(params, rest, state, batch, extra)
            losses.append(float(value))
        whole = learn.whole(now, {'params': params, **rest}, teacher)
        return losses, jumps, learn.efforts(now, params), MODEL.apply(whole, fixed['image'])

    with jax.enable_x64(True):  # in float32, rounding moves the step in which a gate closes
        teacher, fixed = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (teacher, fixed))
        plain, none, efforts, logits = search(teacher, fixed, 0.0)
        cut, jumps, efforts_cut, logits_cut = search(teacher, fixed, 0.7)
    with capsys.disabled():
        print(f'\n{len(jumps)} cuts, largest change of an output {max(jumps):.1e} of the largest')
    assert not none and 2 <= len(jumps) <= 5
    assert max(jumps) < 1e-12
    np.testing.assert_allclose(cut, plain, rtol=1e-6)
    nets.assert_same(efforts, efforts_cut, 1e-6)
    nets.assert_same(logits, logits_cut, 1e-6)


def _slices(gate):
    return gate.closes or [(scale.path, 0, scale.positions) for scale in gate.scales]


def _open(graph, gate, variables):
    """Which units have a parameter that is not zero among those that their gate closes."""
    leaves = traverse_util.flatten_dict(variables['params'])
    return np.any(
        [
            np.any(
                np.moveaxis(leaves[path], axis, 0)[positions],
                axis=tuple(range(1, leaves[path].ndim + 1)),
            )
            for path, axis, positions in _slices(gate)
        ],
        axis=0,
    )


@pytest.mark.parametrize(
    ('norms', 'kind', 'closed'),
    [
        (('', '', ''), 'norm', ['Conv_0', 'Conv_1', 'Conv_2']),
        (('group', 'group', 'group'), 'norm', ['GroupNorm_0', 'GroupNorm_1', 'GroupNorm_2']),
        (('batch', '', 'batch'), 'norm', ['BatchNorm_0', 'BatchNorm_1', 'Conv_1']),
        (('batch', 'batch', 'batch'), 'explicit', ['BatchNorm_0', 'BatchNorm_1', 'BatchNorm_2']),
        (('batch', '', 'batch'), 'sigmoid', ['BatchNorm_0', 'BatchNorm_1', 'Conv_1']),
    ],
)
def test_a_closed_channel_is_gone_whatever_its_gate(norms, kind, closed):
    model = Net(norms)
    variables = model.init(jax.random.key(0), jnp.zeros(IMAGES.shape))
    graph = jaxkd.trace(model, variables, IMAGES, train=False)
    found = gates.find(graph, kind)
    assert sorted({path[0] for gate in found.values() for path, *_ in _slices(gate)}) == closed

    result = jaxkd.learn_structure(
        model,
        variables,
        functools.partial(loss, apply=model.apply),
        batches(),
        IMAGES,
        steps=60,
        flops=0.5,
        gates=kind,
        train=False,
    )
    small = result.small
    # Two of the second convolution's channels, a unit of GroupNorm, cost 4 % of the network.
    assert 0.45 < small.structure.compact['flops'] / small.structure.full['flops'] <= 0.5
    assert jax.tree.structure(result.variables) == jax.tree.structure(variables)
    # The units with closed gates can go, and nothing jumps: neither in evaluation nor in training.
    keep = {name: _open(graph, gate, result.variables) for name, gate in found.items()}
    assert graph.cost(keep).flops <= 0.55 * graph.cost().flops
    small = jaxkd.compact(graph, result.variables, keep)
    batch = next(batches())
    nets.assert_same(
        model.apply(result.variables, batch['image']), small.apply(small.variables, batch['image'])
    )
    before, _ = loss(result.variables, batch, model.apply)
    after, _ = loss(small.variables, batch, small.apply)
    np.testing.assert_allclose(before, after, rtol=1e-5)


def test_a_loss_in_half_precision(teacher):
    half = lambda *args: loss(*args)[0].astype(jnp.bfloat16)  # noqa: E731
    result = jaxkd.learn_structure(
        MODEL, teacher, half, batches(), IMAGES, steps=2, flops=0.5, train=False
    )
    assert result.loss.dtype == np.float32 and np.isfinite(result.loss).all()


def test_gates_are_carried_folded_and_cut_with_the_parameters():
    model = Net(('batch', '', ''))
    variables = model.init(jax.random.key(0), jnp.zeros(IMAGES.shape))
    graph = jaxkd.trace(model, variables, IMAGES, train=False)
    search = jaxkd.Search(graph, variables['params'], steps=5, learning_rate=0.1, flops=0.5)
    with pytest.raises(jaxkd.ConfigError, match='search.gated'):
        search.before(0, variables['params'])
    params = search.gated(variables['params'])
    nets.assert_same(search.fold(params), variables['params'])
    number = np.linspace(-1, 1, 48, dtype=np.float32)
    params[gates.KEY]['Conv_1:gate'] = jnp.array(number)
    assert search.gated(params)[gates.KEY]['Conv_1:gate'] is params[gates.KEY]['Conv_1:gate']
    # Multiplying the parameters multiplies the channels, and their gradient reaches the gates.
    folded = search.fold(params)
    for layer in ('Conv_1', 'Conv_2'):
        for leaf in ('kernel', 'bias'):
            nets.assert_same(folded[layer][leaf], number * params[layer][leaf])
    batch = next(batches())

    def value(params):
        return loss({**variables, 'params': search.fold(params)}, batch, model.apply)[0]

    gradient = jax.grad(value)(params)[gates.KEY]['Conv_1:gate']
    assert np.count_nonzero(gradient) > 40

    keep = {'Conv_0': np.arange(32) < 9, 'Conv_1': number > 0}
    momentum = optax.trace(0.9).init(params)
    for tree in (params, momentum.trace):
        cut = gates.cut(jaxkd.cut(graph, tree, keep), keep)
        assert cut[gates.KEY]['Conv_1:gate'].shape == (24,)
        assert cut['Conv_1']['kernel'].shape == (3, 3, 9, 24)
    assert gates.cut(momentum, keep).trace[gates.KEY]['Conv_1:gate'].shape == (24,)


class Eight(nn.Module):
    @nn.compact
    def __call__(self, x):
        assert x.shape[-1] == 8
        return x


def test_what_cannot_be_searched_is_refused(teacher):
    def learn(model, variables, source, steps=3, **settings):
        return jaxkd.learn_structure(
            model, variables, loss, source, IMAGES, steps=steps, train=False, **settings
        )

    linear = nn.Dense(10)
    with pytest.warns(UserWarning), pytest.raises(jaxkd.GraphError, match='of Dense can be cut'):
        jaxkd.learn_structure(
            linear,
            linear.init(jax.random.key(0), jnp.zeros((1, 64))),
            loss,
            batches(),
            jax.ShapeDtypeStruct((1, 64), jnp.float32),
            steps=3,
            flops=0.5,
        )
    fixed = nn.Sequential([nn.Conv(8, (3, 3)), Eight(), lambda x: x.mean((1, 2)), nn.Dense(10)])
    with pytest.raises(jaxkd.GraphError, match='fixes a size'):  # before a batch is taken
        jaxkd.learn_structure(
            fixed,
            fixed.init(jax.random.key(0), nets.zeros(IMAGES)),
            loss,
            [],
            IMAGES,
            steps=3,
            flops=0.5,
        )
    with pytest.raises(jaxkd.ConfigError, match='gates is .norms.*did you mean norm'):
        learn(MODEL, teacher, batches(), flops=0.5, gates='norms')
    for ramp in (np.nan, 3.0, -1.0):
        with pytest.raises(jaxkd.ConfigError, match='ramp is .* share'):
            learn(MODEL, teacher, batches(), flops=0.5, ramp=ramp)
    for steps in (2.5, -1):
        with pytest.raises(jaxkd.ConfigError, match='steps is .* int'):
            learn(MODEL, teacher, batches(), flops=0.5, steps=steps)
    with pytest.raises(jaxkd.ConfigError, match='coupling is .sum.* max, mean, l2'):
        learn(MODEL, teacher, batches(), flops=0.5, coupling='sum')
    with pytest.raises(jaxkd.ConfigError, match='ended after 2 of 3 steps'):
        learn(MODEL, teacher, [b for _, b in zip(range(2), batches(), strict=False)], flops=0.5)
    with pytest.raises(jaxkd.ConfigError, match='give flops=, params='):
        learn(MODEL, teacher, batches())
    with pytest.raises(jaxkd.BudgetError, match='cannot be reached'):
        learn(MODEL, teacher, batches(), flops=0.001)
    with pytest.raises(jaxkd.BudgetError, match='cannot be reached'):
        learn(MODEL, teacher, [], flops=0.3, min_keep=0.9)  # before a batch is taken
    with pytest.raises(jaxkd.TrainingError, match='lower the learning rate'):
        learn(MODEL, teacher, batches(), flops=0.5, learning_rate=1e30)


def test_open_gates_make_room_where_they_are_in_the_way():
    """Two groups of few channels: 32 and 41 are open, and one more would be over the budget."""

    def body(x):
        for features in (32, 64):
            x = nn.relu(nn.BatchNorm(True)(nets.conv(features)(x)))
        return nn.Dense(10)((x + nn.BatchNorm(True)(nets.conv(64)(x))).mean((1, 2)))

    model = nets.Net(body)
    variables = nets.variables_of(model, IMAGES)
    graph = jaxkd.trace(model, variables, IMAGES)
    course = learn.course(graph, steps=10, learning_rate=0.1, flops=0.5)
    whole = learn.body(course, graph.keep_all())
    memory = learn.first(whole, variables['params'])
    open_ = nets.keep_first(Conv_0=(32, 32), Conv_1=(41, 64))
    closed = {name: ~open_.get(name, ~units) for name, units in memory.closed.items()}
    memory = memory._replace(closed=closed)
    assert graph.cost(control.alive(graph, memory)).flops / graph.cost().flops < 0.495
    keep = learn.choose(whole, variables['params'], memory)
    assert 0.495 <= graph.cost(keep).flops / graph.cost().flops <= 0.5
    # Four give way. The best of all, open or not, would be 23 and 45.
    assert (keep['Conv_0'].sum(), keep['Conv_1'].sum()) == (28, 43)


@pytest.mark.parametrize('norms', [('batch', 'batch', 'batch'), ('batch', '', '')])
def test_what_only_uses_the_budget_up_can_be_trained(norms):
    """Half of the open units close in the last step: what they leave is filled up with closed."""
    model = Net(norms)
    variables = model.init(jax.random.key(0), jnp.zeros((64, *IMAGES.shape[1:])))
    graph = jaxkd.trace(model, variables, IMAGES, train=False)
    search = jaxkd.Search(graph, variables['params'], steps=1, learning_rate=0.1, flops=0.5)
    params = search.gated(variables['params'])
    thresholds = {name: jnp.where(np.arange(n) % 3, np.inf, 0) for name, n in graph.sizes.items()}
    params = gates.shrink(search._course.gates, params, thresholds)
    search.before(0, params)
    keep = search.keep(params)
    assert 0.495 <= graph.cost(keep).flops / graph.cost().flops <= 0.5
    filled = {name: keep[name] & ~units for name, units in search.alive().items()}
    assert any(units.any() for units in filled.values())

    found = {**variables, 'params': search.fold(params)}
    opened = search.reopen(found, keep, variables['params'])
    nets.assert_same(found['params']['Dense_0'], opened['params']['Dense_0'])
    batch = next(batches())
    before, after = (model.apply(v, batch['image']) for v in (found, opened))
    assert 0 < np.abs(before - after).max() < 0.02 * np.abs(before).max()

    def dead(variables):
        small = jaxkd.compact(graph, variables, keep)
        value = lambda p: loss({**small.variables, 'params': p}, batch, small.apply)[0]  # noqa: E731
        slopes = jax.grad(value)(small.variables['params'])
        return sum(
            (np.asarray(slopes[f'Conv_{i}']['kernel']) == 0).all((0, 1, 2)).sum() for i in range(3)
        )

    assert dead(found) > 0 and not dead(opened)
