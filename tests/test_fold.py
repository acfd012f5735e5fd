"""BatchNorms folded into the layers before them."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import fold, models
from jaxkd.graph import cut


class Cases(nn.Module):
    """What can be folded and what cannot, by the names of the layers."""

    @nn.compact
    def __call__(self, x, train):
        def norm(name, **settings):
            return nn.BatchNorm(use_running_average=not train, name=name, **settings)

        x = nn.relu(norm('yes_norm')(nn.Conv(8, (3, 3), use_bias=False, name='yes')(x)))
        x = norm('grouped_norm', use_scale=False)(
            nn.Conv(8, (3, 3), feature_group_count=4, name='grouped')(x)
        )
        x = norm('transposed_norm', use_bias=False, epsilon=0.1)(
            nn.ConvTranspose(6, (2, 2), strides=(2, 2), name='transposed')(x)
        )
        read_twice = nn.Conv(6, (1, 1), name='read_twice')(x)
        x = nn.tanh(norm('read_twice_norm')(read_twice)) + read_twice
        x = norm('joined_norm')(jnp.concatenate([nn.Conv(3, (1, 1), name='joined')(x), x], -1))
        again = nn.Conv(9, (1, 1), name='again')
        x = norm('again_norm')(again(again(x)))
        x = norm('one_value_norm', axis=1)(nn.Conv(7, (1, 1), name='rows')(x))
        return norm('dense_norm')(nn.Dense(4, name='dense')(x.mean((1, 2))))


def assert_folds(model, shape, folded, left):
    """Folds the network at random variables and compares; what the variables then are."""
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    random = np.random.default_rng(1)
    variables = jax.tree.map(lambda leaf: cut.random_leaf(random, leaf), shapes)

    def run(variables, x):
        return model.apply(variables, x, train=False)

    found = fold.fold(run, variables, x)
    assert len(found.norms) == folded and found.left == left
    with found.within():
        outputs = jax.jit(lambda *arguments: run(*arguments))(found.variables, x)
    right = np.asarray(jax.jit(run)(variables, x))
    np.testing.assert_allclose(outputs, right, atol=1e-5 * np.abs(right).max())
    return found


def test_what_alone_reads_a_layer_is_folded():
    found = assert_folds(Cases(), (2, 6, 6, 3), 4, 4)
    layers = {norm.layer for norm in found.norms.values()}
    assert layers == {('yes',), ('grouped',), ('transposed',), ('dense',)}
    assert found.variables['params']['yes'].keys() == {'kernel', 'bias'}
    assert not {f'{path[0]}_norm' for path in layers} & found.variables['batch_stats'].keys()


@pytest.mark.parametrize(
    ('name', 'folded', 'left'), [('mobilenet_v2', 52, 0), ('wide_resnet16_4', 7, 6)]
)
def test_networks(name, folded, left):
    assert_folds(models.create(name), (1, 32, 32, 3), folded, left)


class Unit(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3))(x))


def test_stacked_layers_stay():
    axes = {'params': 0, 'batch_stats': 0}
    stacked = nn.vmap(
        Unit, variable_axes=axes, split_rngs={'params': True}, in_axes=None, axis_size=3
    )
    model, x = stacked(), jnp.ones((1, 6, 6, 3))
    variables = model.init(jax.random.key(0), x)
    found = fold.fold(model.apply, variables, x)
    assert not found.norms and found.left == 1
    assert jax.tree.structure(found.variables) == jax.tree.structure(variables)
