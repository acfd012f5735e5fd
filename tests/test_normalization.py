"""Batch normalization: by hand, against Flax's, and where it stands in for it."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import cpu, precision
from jaxkd.cpu import fusion, normalization
from tests.test_cpu import assert_close, jit, normal


def test_by_hand():
    x = jnp.array([[1.0, 10], [3, 10]]).reshape(1, 2, 2)
    y, mean, variance = normalization.batch_norm(x, jnp.array([2.0, 5]), jnp.array([1.0, 7]), 3.0)
    # Mean 2 and variance 1; the second channel does not vary.
    np.testing.assert_allclose(y, [[[1 - 2 / 2, 7], [1 + 2 / 2, 7]]], atol=1e-6)
    np.testing.assert_allclose((mean, variance), [[2, 10], [1, 0]], atol=1e-6)


class Network(nn.Module):
    fields: dict

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.8, **self.fields)(x)
        return jnp.tanh(x)


def pulled_back(model, variables, x, cotangents):
    """What a training step computes, and the gradients, of the statistics too."""

    def train(params, x):
        y, new = model.apply({**variables, 'params': params}, x, True, mutable=['batch_stats'])
        return y, new['batch_stats']

    said, pull_back = jax.vjp(train, variables.get('params', {}), x)
    return said, pull_back(cotangents(said))


@pytest.mark.parametrize(
    'shape, fields',
    [
        ((3, 5, 4, 6), {}),
        ((4, 7, 3), {'use_bias': False, 'epsilon': 0.1, 'axis': 2}),
        ((2, 3, 2, 4, 5), {'use_scale': False}),
        ((6, 1, 1, 4), {'use_scale': False, 'use_bias': False}),
    ],
)
def test_equals_flax(shape, fields):
    model, x = Network(fields), 2.0 + 3.0 * normal(*shape)
    x = x.at[..., 0].set(0.0)  # a channel that has been cut
    variables = model.init(jax.random.key(0), x, True)
    variables = jax.tree.map(lambda a: a + 0.5 + 0.1 * normal(*a.shape), variables)

    def cotangents(said):
        leaves, tree = jax.tree.flatten(said)
        return jax.tree.unflatten(tree, [normal(*a.shape, seed=i) for i, a in enumerate(leaves)])

    def both():
        plain = pulled_back(model, variables, x, cotangents)
        with cpu.fast_layers():
            return pulled_back(model, variables, x, cotangents), plain

    assert 'reduce[' in str(jax.make_jaxpr(both)())  # of two arrays at once
    fast, plain = jit(both)()
    assert jax.tree.structure(fast) == jax.tree.structure(plain)
    for actual, expected in zip(jax.tree.leaves(fast), jax.tree.leaves(plain), strict=True):
        assert_close(actual, expected)


def test_gradients_of_gradients_equal_flax():
    model, x = Network({}), normal(2, 3, 3, 2)
    variables = model.init(jax.random.key(0), x, True)

    def curvature():
        def loss(x):
            return jnp.sum(model.apply(variables, x, True, mutable=['batch_stats'])[0] ** 3)

        return jax.jvp(jax.grad(loss), (x,), (normal(*x.shape, seed=1),))[1]

    def both():
        expected = curvature()
        with cpu.fast_layers():
            return curvature(), expected

    assert_close(*jit(both)())


class Doubled(nn.BatchNorm):
    pass


def test_flax_has_the_rest(monkeypatch):
    def ours(model, x, train=True, init=False, **options):
        variables = nn.BatchNorm().init(jax.random.key(0), x, use_running_average=False)

        def call(x):
            if init:
                return model.init(jax.random.key(0), x, use_running_average=False)
            options['use_running_average'] = not train
            return model.apply(variables, x, mutable=['batch_stats'], **options)

        with cpu.fast_layers():
            return 'custom_vjp' in str(jax.make_jaxpr(call)(x))

    x = normal(2, 4, 4, 3)
    assert ours(nn.BatchNorm(), x)
    assert not ours(nn.BatchNorm(), x, train=False)
    assert not ours(nn.BatchNorm(), x, init=True)
    assert not ours(nn.BatchNorm(), x, mask=jnp.ones((2, 4, 4, 1), bool))
    assert not ours(nn.BatchNorm(use_fast_variance=False), x)
    assert not ours(nn.BatchNorm(dtype=jnp.bfloat16), x)
    assert not ours(nn.BatchNorm(), x.astype(jnp.bfloat16))
    assert not ours(nn.BatchNorm(), x[:, 0, 0])
    assert not ours(nn.BatchNorm(axis=1), normal(2, 3, 3))
    assert not ours(Doubled(), x)
    with precision.computing('bfloat16'):
        assert not ours(nn.BatchNorm(), x)
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    assert not ours(nn.BatchNorm(), x)


@pytest.mark.parametrize('stored', [jnp.float32, jnp.bfloat16])
def test_variables_that_are_missing_or_of_another_dtype_are_left_to_flax(stored):
    model, x = nn.BatchNorm(use_running_average=False), normal(2, 4, 4, 3)
    variables = model.init(jax.random.key(0), x)
    params = jax.tree.map(lambda a: a.astype(stored), variables['params'])
    rest = {} if stored == jnp.float32 else {'batch_stats': variables['batch_stats']}

    def gradient(params):
        def loss(params):
            y, new = model.apply({'params': params, **rest}, x, mutable=['batch_stats'])
            return jnp.sum(y**3), new

        return jax.grad(loss, has_aux=True)(params)

    expected = gradient(params)
    with cpu.fast_layers():
        actual = gradient(params)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert jax.tree.map(lambda a: a.dtype, actual) == jax.tree.map(lambda a: a.dtype, expected)


def test_statistics_that_may_not_change_are_refused_as_by_flax():
    model, x = nn.BatchNorm(use_running_average=False), normal(2, 4, 4, 3)
    variables = model.init(jax.random.key(0), x)
    with cpu.fast_layers(), pytest.raises(Exception, match='batch_stats'):
        model.apply(variables, x)


def test_materialize_is_the_identity_and_stays_in_the_program(optimized):
    x = jnp.array([jnp.inf, jnp.nan, -1.0])
    np.testing.assert_array_equal(fusion.materialize(x, x), x)
    program = jax.jit(fusion.materialize).lower(normal(8, 16, 4), jnp.ones(4)).compile()
    assert 'conditional(' in program.as_text(), 'XLA knows the condition'
