"""Networks that compute in bfloat16 with parameters in float32."""

import functools
from typing import Any

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkd
from jaxkd import cpu, data, models, precision, train
from jaxkd import mesh as meshes
from tests.test_train import CONFIG, PREPROCESSING, Tiny

IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 8)), jnp.float32)


def _returned(model):
    """The dtypes that modules return, by path, if they compute in bfloat16."""
    seen = {}

    def watch(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if context.method_name == '__call__':
            seen['/'.join(context.module.path)] = str(out.dtype)
        return out

    variables = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    with nn.intercept_methods(watch):
        jax.eval_shape(functools.partial(_half, model), variables, IMAGES)
    return seen


def _half(model, variables, images):
    with precision.computing('bfloat16'), cpu.fast_layers():
        return model.apply(variables, images.astype(jnp.bfloat16))


class Assembled(nn.Module):
    """Layers from `setup`, one of which has a dtype of its own; a norm, attention, depthwise."""

    def setup(self):
        self.depthwise = nn.Conv(8, (3, 3), feature_group_count=8)
        self.pointwise = nn.Conv(8, (1, 1))
        self.norm = nn.LayerNorm()
        self.chosen = nn.Dense(8, dtype=jnp.float32)
        self.attention = nn.MultiHeadDotProductAttention(2)
        self.last = nn.Dense(3)

    def __call__(self, x):
        x = self.norm(self.pointwise(self.depthwise(x)))
        x = self.chosen(x)
        x = x.reshape(len(x), -1, x.shape[-1])
        return self.last(self.attention(x).mean(1))


class Custom(nn.Module):
    """By custom: a field that is handed on, with float32 as its default."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, dtype=self.dtype, name='follows')(x)
        x = models.layers.ConvBN(4, dtype=jnp.float32, name='chosen')(x)
        return nn.Dense(3, dtype=self.dtype, name='last')(x.mean((1, 2)))


class Around(nn.Module):
    """A module without a dtype around one that has its default."""

    @nn.compact
    def __call__(self, x):
        return Custom(name='inside')(x)


def test_layers_compute_in_bfloat16_but_those_with_a_dtype_of_their_own():
    model = Assembled()
    seen = _returned(model)
    assert seen.pop('chosen') == 'float32'
    assert set(seen.values()) == {'bfloat16'} and {'depthwise', 'attention/query'} <= seen.keys()

    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
    rounded = jax.jit(functools.partial(_half, model))(variables, IMAGES)
    exact = jax.jit(model.apply)(variables, IMAGES)  # which is as before
    assert exact.dtype == jnp.float32 and np.any(rounded != exact)
    np.testing.assert_allclose(np.asarray(rounded, np.float32), exact, atol=0.03 * np.ptp(exact))


def test_the_field_that_a_network_hands_on_is_set_where_nobody_has():
    for model, prefix in ((Custom(), ''), (Around(), 'inside/')):
        seen = _returned(model)
        assert seen[f'{prefix}follows'] == seen[f'{prefix}last'] == 'bfloat16'
        assert seen[f'{prefix}chosen'] == 'float32'
    assert _returned(Custom(dtype=jnp.float16))['follows'] == 'float16'


def test_norms_measure_in_float32():
    """Far from zero: in bfloat16 the squares are two apart, and their mean would be lost."""
    x = 16 + jnp.asarray(np.random.default_rng(0).normal(size=(64, 3)), jnp.bfloat16)
    norm = nn.BatchNorm(use_running_average=False, momentum=0.0)
    variables = norm.init(jax.random.key(0), x)
    with precision.computing('bfloat16'):
        out, new = norm.apply(variables, x, mutable=['batch_stats'])
    assert out.dtype == jnp.bfloat16
    chex.assert_trees_all_equal_dtypes(new['batch_stats'], variables['batch_stats'])
    var = np.asarray(x, np.float32).var(0)
    np.testing.assert_allclose(new['batch_stats']['var'], var, rtol=1e-3)


def test_a_compact_network_computes_in_bfloat16():
    images = jnp.zeros((1, 8, 8, 1))
    model = Tiny()
    small = jaxkd.prune(model, model.init(jax.random.key(0), images), images, flops=0.5)
    assert small.variables['params']['Conv_0']['kernel'].shape[-1] < 8
    jaxpr = jax.make_jaxpr(functools.partial(_half, small.module))(small.variables, images)
    wide = [
        eqn
        for eqn in _equations(jaxpr.jaxpr)
        if eqn.primitive.name in ('conv_general_dilated', 'dot_general')
        and eqn.outvars[0].aval.dtype != jnp.bfloat16
    ]
    assert not wide and jaxpr.out_avals[0].dtype == jnp.bfloat16


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from _equations(inner)


@pytest.fixture(scope='module')
def learned():
    """By dtype: losses of the first steps on digits, taught by the network itself; last state."""
    mesh = meshes.make_mesh()
    examples = train.put(data.load('digits', 'train'), mesh)
    tx = train.optimizer(CONFIG, train.learning_rate(CONFIG, 40, 20))
    model = Tiny()
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    teachers = []

    def loss(logits, teacher_logits, labels):
        teachers.append((logits.dtype, teacher_logits.dtype))
        return train.hard_loss(0.0)(logits, teacher_logits, labels)

    found = {}
    for dtype in precision.DTYPES:
        state = meshes.replicate(train.create_state(variables, tx), mesh)
        step = train.make_train_step(
            model,
            tx,
            loss,
            PREPROCESSING,
            mesh,
            seed=0,
            ema_decay=0.9,
            teacher=model,
            compute_dtype=dtype,
        )
        losses = []
        for batch in train.batches(examples, 64, mesh, seed=0, start=0, stop=15):
            state, metrics = step(state, batch, variables, {})
            losses.append(float(metrics['loss']))
        found[dtype] = losses, state
    assert set(teachers) == {(jnp.dtype('float32'),) * 2}
    return found


def test_training_in_bfloat16_learns_alike_and_keeps_float32(learned):
    (exact, reference), (losses, state) = (learned[dtype] for dtype in precision.DTYPES)
    assert losses != exact
    np.testing.assert_allclose(losses, exact, rtol=0.05)
    assert losses[-1] < 0.8 * losses[0]
    chex.assert_trees_all_equal_shapes_and_dtypes(state, reference)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} <= {
        jnp.dtype('float32'),
        jnp.dtype('int32'),
    }


def test_gradients_of_fast_layers_in_bfloat16():
    """Depthwise and 1×1, in the form for CPUs: float32, and near those in float32."""
    model = models.layers.ConvBN(8, 3, groups=8)
    variables = model.init(jax.random.key(0), IMAGES)

    def gradients(dtype):
        def loss(params):
            with precision.computing(dtype), cpu.fast_layers():
                out, _ = model.apply(
                    {**variables, 'params': params},
                    IMAGES.astype(dtype),
                    train=True,
                    mutable=['batch_stats'],
                )
            return jnp.mean(out.astype(jnp.float32) ** 2 * jnp.arange(8.0))

        return jax.jit(jax.grad(loss))(variables['params'])

    exact, rounded = gradients('float32'), gradients('bfloat16')
    chex.assert_trees_all_equal_shapes_and_dtypes(exact, rounded)
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(rounded), strict=True):
        assert np.any(a != b) or not np.any(a)
        np.testing.assert_allclose(a, b, atol=0.03 * np.abs(a).max())
