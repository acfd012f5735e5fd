"""Small networks for tests, and what is asserted of them."""

from collections.abc import Callable
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxkd

IMAGES = jax.ShapeDtypeStruct((2, 6, 6, 3), jnp.float32)


class Net(nn.Module):
    """A module whose code is `body(x)`."""

    body: Callable[[jax.Array], Any]

    @nn.compact
    def __call__(self, x):
        return self.body(x)


def conv(features, kernel=3, **fields):
    return nn.Conv(features, (kernel, kernel), use_bias=fields.pop('use_bias', False), **fields)


def variables_of(model, *inputs, seed=0, **kwargs):
    """Random variables, BatchNorm statistics too; nothing is near a special value."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *map(zeros, inputs), **kwargs))
    random = np.random.default_rng(seed)

    def leaf(path, shape):
        if path[-1].key == 'var':
            return jnp.asarray(random.uniform(0.5, 2, shape.shape), shape.dtype)
        return jnp.asarray(random.normal(0, 0.5, shape.shape), shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, nn.meta.unbox(shapes))


def zeros(shape):
    return jnp.zeros(shape.shape, shape.dtype)


def images_for(shape=IMAGES, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape.shape), shape.dtype)


def keep_first(**kept):
    """keep_first(stem=(2, 5)): the first 2 of 5 units of the group 'stem'."""
    return {name.replace('__', '/'): np.arange(n) < k for name, (k, n) in kept.items()}


def half(graph, seed=0):
    """Keeps a random half of what may be cut, and something of each group."""
    random = np.random.default_rng(seed)
    keep = {}
    for group in graph.groups:
        if not group.frozen:
            alive = random.random(group.size) < 0.5
            alive[random.integers(group.size)] = True
            keep[group.name] = alive
    return keep


def assert_same(a, b, tolerance=1e-5):
    """Equal trees, to `tolerance` of the largest value of each leaf."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        assert x.shape == y.shape
        assert np.isfinite(x).all()
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(x).max(initial=1e-6))


def assert_compact_is_masked(model, variables, keep, *inputs, **kwargs):
    """Compacts, compares with the masked network on `variables` themselves; (graph, small)."""
    graph = jaxkd.trace(model, variables, *inputs, **kwargs)
    small = jaxkd.compact(graph, variables, keep)
    masked = jaxkd.mask(graph, variables, keep)
    x = [images_for(shape, seed=i) for i, shape in enumerate(inputs)]
    expected = jax.jit(lambda v: model.apply(v, *x, **kwargs))(masked)
    # A comparison of constants would prove nothing.
    assert all(np.asarray(leaf).std() > 1e-6 for leaf in jax.tree.leaves(expected))
    assert_same(expected, jax.jit(lambda v: small.apply(v, *x, **kwargs))(small.variables), 1e-4)
    return graph, small


def xla_multiply_adds(graph):
    """What XLA counts for each convolution and dot of one example (it counts two a multiply-add).

    XLA leaves out the products with padding, and we don't: so the input is padded beforehand. Of a
    transposed convolution we count every input position under the whole window, so it gets an
    output that is large enough for that.
    """
    counted = {}

    def count(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name not in ('conv_general_dilated', 'dot_general'):
                for inner in jax.extend.core.jaxprs_in_params(eqn.params):
                    yield from count(inner)
                continue
            lhs, rhs = (jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars)
            params = dict(eqn.params)
            if 'padding' in params:
                shape, padding = list(lhs.shape), list(params['padding'])
                numbers = params['dimension_numbers']
                for i, (axis, window) in enumerate(
                    zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], strict=True)
                ):
                    if params['lhs_dilation'][i] > 1:
                        reach = (rhs.shape[window] - 1) * params['rhs_dilation'][i]
                        padding[i] = (reach, reach)
                    else:
                        shape[axis] += sum(padding[i])
                        padding[i] = (0, 0)
                lhs = jax.ShapeDtypeStruct(tuple(shape), lhs.dtype)
                params['padding'] = tuple(padding)
            key = lhs.shape, rhs.shape, str(params)
            if key not in counted:
                one = jax.jit(functools.partial(eqn.primitive.bind, **params))
                counted[key] = one.lower(lhs, rhs).cost_analysis()['flops'] / 2
            yield counted[key] / graph.inputs[0].shape[0]

    return list(count(graph.program.jaxpr))
