"""Features of networks that were not written to give any, and losses of them in real steps."""

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkd
from jaxkd import cpu, data, features, models, precision, train
from jaxkd import mesh as meshes
from jaxkd.search import gates as gating
from tests import test_train

IMAGES = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))


class Net(nn.Module):
    """Calls one of its modules twice, and has one that returns no features."""

    out: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (3, 3), strides=2, name='stem')(x)
        act = Act(name='act')
        x = act(nn.BatchNorm(use_running_average=not train, name='bn')(x))
        x = act(nn.Conv(4, (1, 1), name='point')(x))
        size = Size(name='size')(x)
        pooled = jnp.mean(x, axis=(1, 2)) / size
        logits = nn.Dense(10, name='head')(pooled)
        return (logits, {'pooled': pooled, 'deep': {'map': x}}) if self.out else logits


class Act(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(x)


class Size(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.float32(x.shape[1])


def _variables(model, images=IMAGES):
    return model.init(jax.random.key(0), images)


def test_features_by_name():
    model, variables = Net(), _variables(Net())
    shapes = features.shapes(model, variables, IMAGES)
    assert shapes == {
        'stem': (2, 8, 8, 6),
        'bn': (2, 8, 8, 6),
        'act': (2, 8, 8, 6),
        'act:2': (2, 8, 8, 4),
        'point': (2, 8, 8, 4),
        'head': (2, 10),
    }
    said, _ = features.outputs(model, variables, IMAGES, {'bn', 'act'}.__contains__)
    chex.assert_trees_all_close(said.logits, model.apply(variables, IMAGES))
    assert set(said.features) == {'bn', 'act', 'act:2'}
    np.testing.assert_array_equal(said.features['act'], nn.relu(said.features['bn']))


def test_nothing_is_kept_that_is_not_asked_for():
    """No capture without a wish; with one, no other output leaves the program."""
    model, variables = Net(), _variables(Net())

    def program(wanted):
        return jax.make_jaxpr(lambda v, x: features.outputs(model, v, x, wanted))(variables, IMAGES)

    plain = jax.make_jaxpr(lambda v, x: model.apply(v, x).astype(jnp.float32))(variables, IMAGES)
    assert str(program(None)) == str(plain)
    assert [v.shape for v in program('stem'.__eq__).out_avals] == [(2, 10), (2, 8, 8, 6)]


def test_features_that_a_model_returns():
    variables = _variables(Net(out=True))
    said, _ = features.outputs(Net(out=True), variables, IMAGES, lambda name: name != 'stem')
    assert {'pooled', 'deep/map', 'point'} <= set(said.features) and 'stem' not in said.features
    np.testing.assert_array_equal(said.features['deep/map'], said.features['act:2'])
    chex.assert_trees_all_close(said.logits, Net().apply(variables, IMAGES))
    found = features.shapes(Net(out=True), variables, IMAGES)
    assert found['pooled'] == (2, 4) and found['deep/map'] == (2, 8, 8, 4)


def test_statistics_change_beside_features():
    model, variables = Net(), _variables(Net())
    arguments = {'train': True, 'mutable': ['batch_stats']}
    said, changed = features.outputs(model, variables, IMAGES, 'point'.__eq__, **arguments)
    expected = model.apply(variables, IMAGES, **arguments)
    chex.assert_trees_all_close((said.logits, changed), (expected[0], dict(expected[1])))


@pytest.mark.parametrize(('name', 'dtype'), [('mobilenet_v2', 'bfloat16'), ('resnet20', 'float32')])
def test_a_compact_network_has_the_features_of_the_full_one(name, dtype):
    """Of fewer channels, by interception within interception; masked, the full one's are these."""
    arguments = {'width': 0.25} if name == 'mobilenet_v2' else {'depth': 8}
    model = models.create(name, num_classes=10, **arguments)
    variables = _variables(model)
    graph = jaxkd.trace(model, variables, IMAGES)
    keep = {g.name: (np.arange(g.size) % 2 < 1) | bool(g.frozen) for g in graph.groups}
    small = jaxkd.compact(graph, variables, keep)
    masked = jaxkd.mask(graph, variables, keep)
    full, narrow = (
        features.shapes(m, v, IMAGES)
        for m, v in ((model, variables), (small.module, small.variables))
    )
    assert list(full) == list(narrow)
    assert {n: s[:-1] for n, s in full.items()} == {n: s[:-1] for n, s in narrow.items()}
    convolutions = [n for n, s in narrow.items() if s[-1] < full[n][-1]]
    assert len(convolutions) > 10

    def run(module, variables):
        def outputs(variables, images):
            with precision.computing(dtype), cpu.fast_layers():
                return features.outputs(module, variables, images, lambda name: True)[0]

        return jax.jit(outputs)(variables, IMAGES.astype(dtype))

    whole, cut = run(model, masked), run(small.module, small.variables)
    assert {f.dtype for f in cut.features.values()} == {jnp.dtype('float32')}
    tolerance = 1e-4 if dtype == 'float32' else 0.05
    np.testing.assert_allclose(whole.logits, cut.logits, rtol=tolerance, atol=tolerance)
    for feature in convolutions:
        a, b = (np.abs(one.features[feature]).sum() for one in (whole, cut))
        if not feature.endswith('bn'):  # whose closed channels are constants where it is masked
            np.testing.assert_allclose(a, b, rtol=max(tolerance, 1e-3), err_msg=feature)


def test_a_gated_network_has_its_features():
    """Gates multiply the parameters: a closed channel is a feature of zeros."""
    model, variables = Net(), _variables(Net())
    graph = jaxkd.trace(model, variables, IMAGES)
    gates = gating.find(graph, 'explicit')
    params = gating.gated(gates, variables['params'])
    params[gating.KEY] = {n: v.at[0].set(0) for n, v in params[gating.KEY].items()}
    folded = {**variables, 'params': gating.fold(gates, params)}
    said, _ = features.outputs(model, folded, IMAGES, {'bn', 'point'}.__contains__)
    for name, channels in (('bn', 6), ('point', 4)):
        closed = np.abs(said.features[name]).max(axis=(0, 1, 2)) == 0
        assert closed.tolist() == [True] + [False] * (channels - 1)


def test_several_teachers_say_the_mean_of_their_logits():
    model = Net()
    several = tuple(model.init(jax.random.key(i), IMAGES) for i in range(3))
    said = features.taught(model, several, IMAGES, 'point'.__eq__)
    logits = [model.apply(variables, IMAGES) for variables in several]
    np.testing.assert_allclose(said.logits, np.mean(logits, axis=0), rtol=1e-5, atol=1e-6)
    alone = features.taught(model, several[0], IMAGES, 'point'.__eq__)
    chex.assert_trees_all_equal(said.features, alone.features)


def test_adapters_are_for_widths_that_differ():
    student = {'a': (1, 4, 4, 3), 'b': (1, 2, 2, 8), 'gone': (1, 2, 2, 0)}
    teacher = {'a': (1, 4, 4, 5), 'b': (1, 2, 2, 8), 'gone': (1, 2, 2, 4), 'other': (1, 9)}
    made = features.adapters(student, teacher, jax.random.key(0))
    assert jax.tree.map(jnp.shape, made) == {
        'a': {'kernel': (3, 5), 'bias': (5,)},
        'gone': {'kernel': (0, 4), 'bias': (4,)},
    }
    params = {'conv': {'kernel': 1}, features.ADAPTERS: made}
    assert features.without_adapters(params) == {'conv': {'kernel': 1}}


def _steps(loss, number, params=(), model=None, **settings):
    """The state after some steps on digits, and the metrics of each."""
    model = model or test_train.Tiny()
    mesh = meshes.make_mesh()
    examples = train.put(data.load('digits', 'train'), mesh)
    tx = train.optimizer(test_train.CONFIG, lambda step: 0.05)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    start = {**variables, 'params': {**variables['params'], **dict(params)}}
    state = meshes.replicate(train.create_state(start, tx), mesh)
    step = train.make_train_step(
        model, tx, loss, test_train.PREPROCESSING, mesh, seed=0, ema_decay=0.9, **settings
    )
    measured = []
    teacher = variables if settings.get('teacher') is not train.AVERAGE else {}
    for batch in train.batches(examples, 64, mesh, seed=0, start=0, stop=number):
        state, metrics = step(state, batch, teacher, {})
        measured.append(jax.device_get(metrics))
    return state, measured


@pytest.mark.parametrize('accumulate', [1, 2])
def test_steps_train_adapters_with_the_network(accumulate):
    """The loss reads features and adapters; the model sees none of these."""
    adapters = {'Conv_0': {'kernel': 0.1 * jnp.ones((8, 8)), 'bias': jnp.zeros(8)}}

    def loss(student, teacher, labels, adapters, step):
        made = student.features['Conv_0'] @ adapters['Conv_0']['kernel']
        made += adapters['Conv_0']['bias']
        return jnp.mean((made - teacher.features['Conv_0']) ** 2, axis=(1, 2, 3)) + 0 * step

    state, measured = _steps(
        train.Objective(loss, 'Conv_0'.__eq__),
        20,
        {features.ADAPTERS: adapters},
        teacher=test_train.Tiny(),
        fold=features.without_adapters,
        accumulate=accumulate,
    )
    assert measured[-1]['loss'] < 0.7 * measured[0]['loss']
    trained = state.params[features.ADAPTERS]['Conv_0']
    assert np.all(np.ptp(trained['kernel'], axis=0) > 0) and np.any(trained['bias'])
    assert set(measured[0]) == {'loss', 'accuracy', 'cross_entropy'}
    averaged = train.averaged(state)['params'][features.ADAPTERS]
    chex.assert_trees_all_equal_shapes(averaged, {'Conv_0': trained})


def test_a_network_teaches_itself_by_its_average():
    """At first it is its average, from which it then moves away; both in evaluation mode."""
    seen = train.Objective(
        lambda student, teacher, labels, adapters, step: jnp.where(
            step == 3, teacher.logits[:, 0], train.hard_loss(0.0)(student.logits, None, labels)
        )
    )
    before, _ = _steps(seen, 3, teacher=train.AVERAGE)
    _, measured = _steps(seen, 4, teacher=train.AVERAGE)
    mesh = meshes.make_mesh()
    examples = train.put(data.load('digits', 'train'), mesh)
    *_, batch = train.batches(examples, 64, mesh, seed=0, start=3, stop=4)
    images = examples.images[batch['indices']]
    key, _ = jax.random.split(jax.random.fold_in(jax.random.key(0), 3))
    views = data.augment(key, images, padding=1, flip=False)
    inputs = data.normalize(views, *test_train.PREPROCESSING[:2])
    logits = test_train.Tiny().apply(train.averaged(before), inputs)
    np.testing.assert_allclose(measured[-1]['loss'], logits[:, 0].mean(), rtol=1e-4)
