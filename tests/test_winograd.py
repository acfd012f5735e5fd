"""Winograd's 3×3 convolution: the algorithm on a case by hand, and against lax."""

import itertools
import os
import subprocess
import sys

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import cpu
from jaxkd.cpu import winograd
from tests.test_cpu import assert_close, assert_same_as_lax, jit, normal

NUMBERS = ('NHWC', 'HWIO', 'NHWC')


def plain(x, kernel, pads):
    return lax.conv_general_dilated(x, kernel, (1, 1), pads, dimension_numbers=NUMBERS)


def test_one_tile_by_hand():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    kernel = jnp.array([[1.0, 0, 0], [0, 0, 2], [0, -1, 0]]).reshape(3, 3, 1, 1)
    # Output (0, 0): x[0, 0] + 2·x[1, 2] - x[2, 1] = 0 + 12 - 9; each step adds 1 or 4, twice.
    expected = np.array([[3, 5], [11, 13]]).reshape(1, 2, 2, 1)
    none = ((0, 0), (0, 0))
    assert_close(winograd.convolution(x, kernel, none), jnp.asarray(expected))
    assert winograd.num_tiles(x.shape, none) == 1
    assert winograd.num_tiles((5, 4, 9, 3), ((1, 1), (1, 1))) == 5 * 1 * 3


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(3, 9), st.integers(3, 9)),
    # No more than two: the kernel's extent less one. XLA:CPU's gradient is wrong beyond it.
    pads=st.tuples(*[st.tuples(st.integers(-1, 2), st.integers(0, 2))] * 2),
    channels=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_value_and_gradients_equal_lax(size, pads, channels):
    pads = tuple((max(low, 3 - n), high) for n, (low, high) in zip(size[1:], pads))
    x, kernel = normal(*size, channels[0]), normal(3, 3, *channels, seed=1)

    def value_and_gradients(convolve, cotangent):
        value, pull_back = jax.vjp(lambda x, k: convolve(x, k, pads), x, kernel)
        return value, *pull_back(cotangent)

    cotangent = normal(*jax.eval_shape(lambda: plain(x, kernel, pads)).shape, seed=2)
    both = jit(lambda c: [value_and_gradients(f, c) for f in (winograd.convolution, plain)])
    for actual, expected in zip(*both(cotangent), strict=True):
        assert_close(actual, expected)


def test_gradient_where_padding_exceeds_the_kernel():
    x, kernel = normal(1, 3, 3, 1), normal(3, 3, 1, 1, seed=1)
    cotangent = normal(1, 5, 5, 1, seed=2)
    expected = np.zeros((3, 3))
    for row, column, i, j in itertools.product(range(5), range(5), range(3), range(3)):
        seen = (row + i - 2, column + j - 3)
        if all(0 <= n < 3 for n in seen):
            expected[seen] += kernel[i, j, 0, 0] * cotangent[0, row, column, 0]
    _, pull_back = jax.vjp(lambda x: winograd.convolution(x, kernel, ((2, 2), (3, 1))), x)
    assert_close(pull_back(cotangent)[0][0, :, :, 0], jnp.asarray(expected))


def test_gradients_of_gradients_equal_lax():
    x, kernel = normal(2, 5, 4, 3), normal(3, 3, 3, 2, seed=1)
    pads = ((1, 1), (1, 1))

    def curvature(convolve):
        loss = lambda k: jnp.sum(jnp.sin(convolve(x, k, pads)))  # noqa: E731
        return jax.jvp(jax.grad(loss), (kernel,), (jnp.ones_like(kernel),))[1]

    assert_close(curvature(winograd.convolution), curvature(plain))


DIVIDED = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxkd.cpu import winograd
mesh = jax.make_mesh((4,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
split, everywhere = NamedSharding(mesh, P('data')), NamedSharding(mesh, P())
pads = ((1, 1), (1, 1))
loss = lambda k, x: jnp.sum(jnp.sin(winograd.convolution(x, k, pads)))
given = jnp.ones((3, 3, 5, 6)), jnp.ones((8, 9, 7, 5))
step = jax.jit(jax.grad(loss, (0, 1)), in_shardings=(everywhere, split))
text = step.lower(*given).compile().as_text()
print('gathered' if 'all-gather' in text else 'divided', 'all-reduce' in text)
"""


def test_devices_share_the_batch():
    environment = {
        **os.environ,
        'XLA_FLAGS': '--xla_force_host_platform_device_count=4',
        'JAX_PLATFORMS': 'cpu',
    }
    done = subprocess.run(
        [sys.executable, '-c', DIVIDED], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ['divided', 'True']


def uses_winograd(x, kernel, strides=(1, 1), **options):
    convolve = lambda x, k: cpu.conv_general_dilated(  # noqa: E731
        x, k, strides, 'SAME', dimension_numbers=NUMBERS, **options
    )
    # Its products are as many as a tile has positions.
    return f'f32[36,{kernel.shape[2]}' in str(jax.make_jaxpr(convolve)(x, kernel))


@pytest.mark.parametrize('channels', [(32, 40), (40, 32)])
def test_used_where_it_is_faster(channels):
    x, kernel = normal(64, 12, 11, channels[0]), normal(3, 3, *channels, seed=1)
    assert uses_winograd(x, kernel)
    assert_same_as_lax(x, kernel, (1, 1), 'SAME', dimension_numbers=NUMBERS)
    assert not uses_winograd(x, kernel, (2, 2))
    assert not uses_winograd(x, kernel, rhs_dilation=(2, 2))
    for few in [(11, 40), (40, 11)]:
        many = jax.ShapeDtypeStruct((1024, 12, 11, few[0]), jnp.float32)
        assert not uses_winograd(many, jax.ShapeDtypeStruct((3, 3, *few), jnp.float32)), 'channels'
    assert not uses_winograd(x, kernel[:, :2])
    assert not uses_winograd(x[:24], kernel), 'little work'
    few = jax.ShapeDtypeStruct((1, 12, 11, 512), jnp.float32)
    assert not uses_winograd(few, jax.ShapeDtypeStruct((3, 3, 512, 512), jnp.float32)), 'few tiles'
    assert not uses_winograd(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    huge = jax.ShapeDtypeStruct((2**16, 64, 64, channels[0]), jnp.float32)
    assert not uses_winograd(huge, kernel), 'memory'


def test_as_exact_as_plain_sums():
    x, kernel = normal(2, 16, 16, 48), normal(3, 3, 48, 32, seed=1)
    pads = ((1, 1), (1, 1))
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    exact = sum(
        padded[:, i : i + 16, j : j + 16] @ np.asarray(kernel[i, j], np.float64)
        for i in range(3)
        for j in range(3)
    )
    actual = jit(lambda x, k: winograd.convolution(x, k, pads))(x, kernel)
    assert np.abs(actual - exact).max() < 2e-6 * np.abs(exact).max()
