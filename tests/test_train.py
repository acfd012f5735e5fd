"""Real steps on a tiny network."""

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import data, errors, train
from jaxkd import mesh as meshes

CONFIG = {
    'learning_rate': 0.1,
    'warmup_epochs': 1.0,
    'final_fraction': 0.1,
    'momentum': 0.9,
    'weight_decay': 0.0,
}
PREPROCESSING = train.Preprocessing(np.full(1, 0.3), np.full(1, 0.4), 1, False)


class Tiny(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), strides=2, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


def _learn(steps, in_memory=True, teacher=False):
    """Losses of the first steps on digits, and the last state."""
    mesh = meshes.make_mesh()
    split = data.load('digits', 'train')
    examples = train.put(split if in_memory else split._replace(images=None), mesh)
    schedule = train.learning_rate(CONFIG, 40, 20)
    tx = train.optimizer(CONFIG, schedule)
    model = Tiny()
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    state = meshes.replicate(train.create_state(variables, tx), mesh)
    step = train.make_train_step(
        model,
        tx,
        train.hard_loss(0.0),
        PREPROCESSING,
        mesh,
        seed=0,
        ema_decay=0.9,
        teacher=model if teacher else None,
    )
    losses = []
    for batch in train.batches(examples, 64, mesh, seed=0, start=0, stop=steps):
        state, metrics = step(state, batch, variables if teacher else {}, {})
        losses.append(float(metrics['loss']))
    return losses, state, model, examples, mesh


def test_steps_learn_and_move_everything():
    losses, state, model, examples, mesh = _learn(30)
    assert losses[-1] < 0.6 * losses[0]
    assert int(state.step) == 30
    chex.assert_trees_all_equal_shapes(train.variables(state), train.averaged(state))
    assert np.any(state.batch_stats['BatchNorm_0']['mean'])
    eval_step = train.make_eval_step(model, PREPROCESSING, mesh)
    everything = train.evaluate(eval_step, train.averaged(state), examples, 64, mesh)
    odd = train.evaluate(eval_step, train.averaged(state), examples, 77, mesh)
    assert everything['accuracy'] > 0.5
    assert everything['accuracy'] == odd['accuracy']  # the filled-up batch counts nobody twice
    np.testing.assert_allclose(everything['loss'], odd['loss'], rtol=1e-5)
    predict_step = train.make_predict_step(model, PREPROCESSING, mesh)
    found = train.predict(predict_step, train.averaged(state), examples, 77, mesh)
    assert np.mean(found == examples.split.labels) == everything['accuracy']


def test_images_from_the_host_train_alike():
    np.testing.assert_allclose(_learn(5)[0], _learn(5, in_memory=False)[0], rtol=1e-5)


def test_a_teacher_changes_nothing_that_the_loss_does_not_use():
    np.testing.assert_allclose(_learn(5)[0], _learn(5, teacher=True)[0], rtol=1e-5)


def test_learning_rate_by_hand():
    """Peak 0.1 after 20 steps of warm-up from 0.1/21, cosine to 0.01 at step 40."""
    schedule = train.learning_rate(CONFIG, 40, 20)
    np.testing.assert_allclose(schedule(0), 0.1 / 21, rtol=1e-6)
    np.testing.assert_allclose(schedule(20), 0.1, rtol=1e-6)
    np.testing.assert_allclose(schedule(30), 0.055, rtol=1e-6)
    np.testing.assert_allclose(schedule(40), 0.01, rtol=1e-6)


def test_weight_decay_is_for_kernels():
    tx = train.optimizer({**CONFIG, 'weight_decay': 0.5, 'momentum': 0.0}, lambda step: 1.0)
    params = {'kernel': jnp.ones((2, 2)), 'scale': jnp.ones(2)}
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates['kernel'], -0.5)
    np.testing.assert_allclose(updates['scale'], 0.0)


def test_smoothed_labels_by_hand():
    """Smoothing 0.2 of 2 classes: targets (0.9, 0.1); uniform logits cost ln 2 in any case."""
    logits = jnp.array([[0.0, 0.0], [np.log(3.0), 0.0]])
    loss = train.hard_loss(0.2)(logits, None, jnp.array([0, 0]))
    expected = [np.log(2), -0.9 * np.log(0.75) - 0.1 * np.log(0.25)]
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_batches_depend_on_the_step_alone():
    mesh = meshes.make_mesh()
    examples = train.put(data.load('digits', 'train'), mesh)
    whole = [b['indices'] for b in train.batches(examples, 64, mesh, seed=3, start=0, stop=40)]
    rest = [b['indices'] for b in train.batches(examples, 64, mesh, seed=3, start=25, stop=40)]
    chex.assert_trees_all_equal(whole[25:], rest)
    first_epoch = np.concatenate(whole[: train.steps_per_epoch(examples.split.size, 64)])
    assert len(set(first_epoch.tolist())) == len(first_epoch)


def test_batch_larger_than_the_data():
    with pytest.raises(errors.ConfigError, match='batch_size'):
        train.steps_per_epoch(10, 64)


class Plain(nn.Module):
    """Without BatchNorm, so that the parts of a batch do not see one another."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dense(16)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


class Noted(nn.Module):
    """Remembers in training how often it was called, with what mean, and a random number."""

    @nn.compact
    def __call__(self, x, train=False):
        calls = self.variable('batch_stats', 'calls', jnp.zeros, ())
        means = self.variable('batch_stats', 'means', jnp.zeros, 4)
        draws = self.variable('batch_stats', 'draws', jnp.zeros, 4)
        if train:
            place = calls.value.astype(int)
            means.value = means.value.at[place].set(x.mean())
            draws.value = draws.value.at[place].set(jax.random.uniform(self.make_rng('dropout')))
            calls.value += 1
        return nn.Dense(10)(x.reshape(len(x), -1))


def _one_step(model, accumulate):
    """The state after one step with augmentation, the batch's metrics, and the batch itself."""
    mesh = meshes.make_mesh()
    examples = train.put(data.load('digits', 'train'), mesh)
    tx = train.optimizer(CONFIG, lambda step: 0.1)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    state = meshes.replicate(train.create_state(variables, tx), mesh)
    loss, views = train.hard_loss(0.0), PREPROCESSING._replace(padding=0)
    views = PREPROCESSING if isinstance(model, Plain) else views
    step = train.make_train_step(
        model, tx, loss, views, mesh, seed=0, ema_decay=0.9, accumulate=accumulate
    )
    (batch,) = train.batches(examples, 64, mesh, seed=0, start=0, stop=1)
    return *step(state, batch, {}, {}), examples.split.images[np.asarray(batch['indices'])]


def test_accumulated_gradients_are_those_of_the_whole_batch():
    whole, metrics, _ = _one_step(Plain(), 1)
    parts, same, _ = _one_step(Plain(), 4)
    chex.assert_trees_all_close(parts, whole, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_close(same, metrics, rtol=1e-6)


def test_parts_of_a_batch_come_in_turn_with_keys_of_their_own():
    state, _, images = _one_step(Noted(), 4)
    inputs = (images / 255 - PREPROCESSING.mean) / PREPROCESSING.std
    seen = state.batch_stats
    assert seen['calls'] == 4 and len(set(seen['draws'].tolist())) == 4
    np.testing.assert_allclose(seen['means'], [inputs[i::4].mean() for i in range(4)], rtol=1e-5)
