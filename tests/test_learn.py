"""Learning a structure by one call, and in a loop of one's own."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import nets
import numpy as np
import optax
import pytest
from sklearn import datasets

import jaxkd
from jaxkd import distill

STEPS = 150


class Net(nn.Module):
    norm: bool = True

    @nn.compact
    def __call__(self, x, train=False):
        def layer(x, features, **kwargs):
            x = nn.Conv(features, (3, 3), **kwargs)(x)
            return nn.relu(nn.BatchNorm(not train, momentum=0.9)(x) if self.norm else x)

        x = layer(layer(x, 32), 48, strides=2)
        return nn.Dense(10)((x + layer(x, 48)).mean((1, 2)))


MODEL = Net()
IMAGES = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)


def batches(seed=0):
    images, labels = datasets.load_digits(return_X_y=True)
    random = np.random.default_rng(seed)
    while True:
        chosen = random.integers(len(labels), size=64)
        yield {'image': (images[chosen] / 16).reshape(-1, 8, 8, 1), 'label': labels[chosen]}


def loss(variables, batch):
    logits, changed = MODEL.apply(variables, batch['image'], train=True, mutable=['batch_stats'])
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


def test_structure_is_learned_under_a_teacher(teacher):
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
    assert 0.99 * 0.5 <= compact['flops'] / full['flops'] <= 0.5
    assert len(result.loss) == len(result.alive) == STEPS
    assert result.alive[0] > 0.95 and result.alive[-1] < 0.55
    assert accuracy(MODEL.apply, teacher) > 0.9  # so that there is something to lose
    assert accuracy(result.small.apply, result.small.variables) > 0.7
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
            flops=0.6,
            blocks=[('^Conv_0', settings)],
            train=False,
        )
        assert result.small.structure.compact['flops'] <= 0.6 * result.small.structure.full['flops']
        return int(result.keep['Conv_0'].sum())

    plain = kept()
    assert kept(strength=4.0) < plain < kept(strength=0.1)
    assert kept(budget={'flops': 0.3}) <= 0.3 * 32


def test_a_loop_of_ones_own_finds_the_same(teacher):
    result = jaxkd.learn_structure(
        MODEL, teacher, loss, batches(), IMAGES, steps=20, params=0.7, train=False
    )
    graph = jaxkd.trace(MODEL, teacher, IMAGES, train=False)
    params, rest = teacher['params'], {'batch_stats': teacher['batch_stats']}
    search = jaxkd.Search(graph, params, steps=20, learning_rate=0.02, params=0.7)
    tx = optax.chain(optax.sgd(0.02, momentum=0.9, nesterov=True), search.transformation)
    state = tx.init(params)

    @jax.jit
    def step(params, rest, state, batch, extra):
        grad = jax.grad(lambda params: loss({'params': params, **rest}, batch), has_aux=True)
        gradients, changed = grad(params)
        updates, state = tx.update(gradients, state, params, **extra)
        return optax.apply_updates(params, updates), changed, state

    for number, batch in zip(range(20), batches(), strict=False):
        extra = search.before(number, params)
        params, rest, state = step(params, rest, state, batch, extra)
    keep = search.keep(params)
    assert graph.cost(keep).params <= 0.7 * graph.cost().params
    nets.assert_same(keep, result.keep)
    nets.assert_same(params, result.variables['params'], 1e-3)


def test_what_cannot_be_searched_is_refused(teacher):
    def learn(model, variables, source, **budget):
        return jaxkd.learn_structure(
            model, variables, loss, source, IMAGES, steps=3, train=False, **budget
        )

    bare = Net(norm=False)
    variables = bare.init(jax.random.key(0), jnp.zeros(IMAGES.shape))
    with pytest.raises(jaxkd.GraphError, match='has a BatchNorm.*jaxkd.prune needs none'):
        learn(bare, variables, batches(), flops=0.5)
    with pytest.raises(jaxkd.ConfigError, match='ended after 2 of 3 steps'):
        learn(MODEL, teacher, [b for _, b in zip(range(2), batches(), strict=False)], flops=0.5)
    with pytest.raises(jaxkd.ConfigError, match='give flops=, params='):
        learn(MODEL, teacher, batches())
    with pytest.raises(jaxkd.BudgetError, match='cannot be reached'):
        learn(MODEL, teacher, batches(), flops=0.001)
    with pytest.raises(jaxkd.TrainingError, match='lower the learning rate'):
        learn(MODEL, teacher, batches(), flops=0.5, learning_rate=1e30)
