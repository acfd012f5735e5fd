"""The fast forms compute what lax computes, and the interceptor changes nothing else."""

import ctypes
import functools
import subprocess
import sys

from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
from jax import export, lax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import cpu
from jaxkd.cpu import layers

# Compiling is most of what these tests do, and nothing here runs long enough to need fast code.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})

LAYOUTS = {
    1: ('NWC', 'WIO', 'NWC'),
    2: ('NHWC', 'HWIO', 'NHWC'),
    3: ('NDHWC', 'DHWIO', 'NDHWC'),
}


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_close(actual, expected, tolerance=2e-5):
    scale = max(1.0, float(jnp.max(jnp.abs(expected.astype(jnp.float32)), initial=0.0)))
    np.testing.assert_allclose(
        np.asarray(actual, np.float32),
        np.asarray(expected, np.float32),
        rtol=tolerance,
        atol=tolerance * scale,
    )


def assert_same_as_lax(x, kernel, strides, padding, tolerance=2e-5, **options):
    """Value and both gradients."""

    def value_and_gradients(convolve):
        def run(x, kernel, cotangent):
            out, pull_back = jax.vjp(
                lambda x, kernel: convolve(x, kernel, strides, padding, **options), x, kernel
            )
            return out, *pull_back(cotangent)

        return run

    expected_shape = jax.eval_shape(
        lambda x, kernel: lax.conv_general_dilated(x, kernel, strides, padding, **options),
        x,
        kernel,
    )
    cotangent = normal(*expected_shape.shape, seed=2, dtype=expected_shape.dtype)
    both = jit(
        lambda *operands: (
            value_and_gradients(cpu.conv_general_dilated)(*operands),
            value_and_gradients(lax.conv_general_dilated)(*operands),
        )
    )
    for actual, expected in zip(*both(x, kernel, cotangent), strict=True):
        assert actual.shape == expected.shape and actual.dtype == expected.dtype
        assert_close(actual, expected, tolerance)


@st.composite
def convolutions(draw):
    rank = draw(st.sampled_from((1, 2, 2, 2, 2)))

    def sizes(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    kernel, strides, dilation = sizes(1, 4), sizes(1, 3), sizes(1, 3)
    spatial = sizes(1, 9)
    if draw(st.booleans()):
        padding = draw(st.sampled_from(('SAME', 'VALID', 'SAME_LOWER')))
    else:
        padding = list(zip(sizes(-2, 4), sizes(-2, 4)))
        for n, (low, high) in zip(spatial, padding):
            if n + low + high < 0 or n + min(low, 0) + min(high, 0) < 0:
                padding = 'VALID'
                break
    channels, multiplier = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    if draw(st.integers(0, 3)):
        kernel_shape, groups = (*kernel, 1, channels * multiplier), channels
    else:
        kernel_shape, groups = ((1,) * rank + (channels, draw(st.integers(1, 5)))), 1
    return (
        (draw(st.integers(1, 3)), *spatial, channels),
        kernel_shape,
        strides,
        padding,
        {
            'rhs_dilation': dilation,
            'feature_group_count': groups,
            'dimension_numbers': LAYOUTS[rank],
        },
    )


@pytest.mark.parametrize(
    ('shape', 'kernel', 'strides', 'padding', 'dilation', 'any_size'),
    [
        # Few outputs.
        ((3, 2, 2, 5, 6), (3, 3), (1, 1), 'SAME', (1, 1), False),
        ((2, 4, 3, 6, 7), (3, 2), (2, 2), [(1, 0), (-1, 2)], (1, 1), False),
        ((2, 5, 1, 5, 6), (2, 1), (1, 3), 'VALID', (3, 1), False),
        ((2, 7, 5, 6), (5,), (2,), 'SAME_LOWER', (1,), False),
        ((0, 2, 2, 5, 6), (3, 3), (1, 1), 'SAME', (1, 1), False),
        # Many features, and the few channels of an image.
        ((2, 9, 8, 6, 24), (3, 2), (2, 1), 'SAME', (1, 2), True),
        ((2, 9, 8, 16, 32), (5, 5), (1, 1), 'SAME', (1, 1), True),
        ((2, 9, 8, 3, 6), (3, 3), (2, 2), 'SAME', (1, 1), True),
        ((2, 9, 8, 4, 6), (3, 3), (1, 1), 'SAME', (1, 1), True),
        ((0, 4, 4, 16, 6), (1, 1), (1, 1), 'SAME', (1, 1), True),
    ],
)
def test_matrix_products_equal_lax(shape, kernel, strides, padding, dilation, any_size):
    *shape, features = shape
    x, kernel = normal(*shape), normal(*kernel, shape[-1], features, seed=1)
    options = {'rhs_dilation': dilation, 'dimension_numbers': LAYOUTS[len(strides)]}
    assert_same_as_lax(x, kernel, strides, padding, **options)
    program = jax.make_jaxpr(
        lambda x, k: cpu.conv_general_dilated(x, k, strides, padding, **options)
    )(x, kernel)
    assert 'conv_general_dilated' not in str(program) and 'dot_general' in str(program)
    larger = jnp.tile(x, (1, *[5] * len(strides), 1))
    program = jax.make_jaxpr(
        lambda x, k: cpu.conv_general_dilated(x, k, strides, padding, **options)
    )(larger, kernel)
    assert ('conv_general_dilated' not in str(program)) is any_size


@settings(max_examples=20, deadline=None, derandomize=True)
@given(convolutions())
def test_depthwise_and_pointwise_equal_lax(convolution):
    shape, kernel_shape, strides, padding, options = convolution
    assert_same_as_lax(normal(*shape), normal(*kernel_shape, seed=1), strides, padding, **options)


@pytest.mark.parametrize(
    ('shape', 'window', 'strides', 'padding'),
    [
        ((2, 7, 6, 3), (3, 3), (2, 2), [(1, 1), (1, 1)]),
        ((2, 7, 6, 3), (2, 2), (2, 2), 'VALID'),
        ((1, 5, 8, 2), (3, 2), (1, 3), 'SAME'),
        ((3, 9, 2), (2,), (3,), [(0, 0)]),
        ((1, 4, 4, 4, 2), (2, 2, 2), None, 'SAME'),
    ],
)
def test_max_pool_equals_flax(shape, window, strides, padding):
    # Few different values: most windows have several of the largest.
    x = jnp.round(normal(*shape))

    def both(pool, cotangent):
        out, pull_back = jax.vjp(lambda x: pool(x, window, strides, padding), x)
        return out, *pull_back(cotangent)

    out = nn.max_pool(x, window, strides, padding)
    results = jit(lambda c: (both(cpu.max_pool, c), both(nn.max_pool, c)))(
        normal(*out.shape, seed=1)
    )
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, 1e-6)
    gradient = jax.make_jaxpr(lambda c: both(cpu.max_pool, c))(out)
    assert 'select_and_scatter' not in str(gradient)


def test_max_pool_of_what_flax_alone_pools(monkeypatch):
    x = normal(2, 16, 16, 3)
    for inputs, window in [(x[0], (2, 2)), (x, (9, 9)), (x.astype(jnp.int32), (2, 2))]:
        expected = nn.max_pool(inputs, window)
        np.testing.assert_array_equal(cpu.max_pool(inputs, window), expected)
    for backend, ours in [('gpu', True), ('tpu', False)]:
        monkeypatch.setattr(jax, 'default_backend', lambda backend=backend: backend)
        program = jax.make_jaxpr(lambda x: cpu.max_pool(x, (2, 2)))(x)
        assert ('custom_vjp' in str(program)) is ours


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('dtype, tolerance', [(jnp.bfloat16, 2e-2), (jnp.float16, 4e-3)])
def test_half_precision(dtype, tolerance, stride):
    x, kernel = normal(2, 7, 6, 5, dtype=dtype), normal(3, 3, 1, 5, seed=1, dtype=dtype)
    options = {'dimension_numbers': LAYOUTS[2]}
    assert_same_as_lax(
        x, kernel, (stride,) * 2, 'SAME', tolerance, feature_group_count=5, **options
    )
    kernel = normal(1, 1, 5, 4, seed=1, dtype=dtype)
    assert_same_as_lax(x, kernel, (stride,) * 2, 'SAME', tolerance, **options)


@pytest.mark.parametrize(
    'shape, kernel_shape, options',
    [
        ((2, 6, 5, 4), (3, 3, 4, 3), {}),
        ((2, 6, 5, 4), (3, 3, 2, 6), {'feature_group_count': 2}),
        ((2, 6, 5, 4), (3, 3, 1, 4), {'feature_group_count': 4, 'lhs_dilation': (2, 2)}),
        ((4, 6, 5, 1), (3, 3, 1, 4), {'batch_group_count': 2}),
        ((2, 4, 5, 3, 2), (2, 3, 1, 1, 2), {'feature_group_count': 2}),
        ((2, 12, 12, 2), (9, 9, 1, 2), {'feature_group_count': 2}),
        ((2, 2, 2, 3), (3, 3, 1, 3), {'feature_group_count': 3}),  # an output without elements
    ],
)
def test_other_convolutions(shape, kernel_shape, options):
    options = {'dimension_numbers': LAYOUTS[len(shape) - 2], **options}
    rank = len(shape) - 2
    assert_same_as_lax(
        normal(*shape), normal(*kernel_shape, seed=1), (1,) * rank, [(0, 0)] * rank, **options
    )


def test_channels_first_and_integers_are_handed_to_lax():
    x, kernel = normal(2, 4, 6, 5), normal(4, 1, 3, 3, seed=1)
    assert_same_as_lax(x, kernel, (1, 1), 'SAME', feature_group_count=4)
    x, kernel = jnp.ones((1, 4, 4, 2), jnp.int32), jnp.ones((3, 3, 1, 2), jnp.int32)
    options = {'dimension_numbers': LAYOUTS[2], 'feature_group_count': 2}
    np.testing.assert_array_equal(
        cpu.conv_general_dilated(x, kernel, (1, 1), 'SAME', **options),
        lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', **options),
    )


@pytest.mark.parametrize('strides, padding', [((1,), 'SAME'), ((1, 1), [(1, 1)])])
def test_errors_are_those_of_lax(strides, padding):
    operands = normal(1, 4, 4, 2), normal(3, 3, 1, 2)
    options = {'dimension_numbers': LAYOUTS[2], 'feature_group_count': 2}
    with pytest.raises((TypeError, ValueError)) as expected:
        lax.conv_general_dilated(*operands, strides, padding, **options)
    with pytest.raises(expected.type):
        cpu.conv_general_dilated(*operands, strides, padding, **options)


@pytest.mark.parametrize('depthwise', [True, False])
def test_transformations(depthwise):
    x, kernel = normal(3, 5, 5, 2), normal(*((3, 3, 1, 2) if depthwise else (1, 1, 2, 2)), seed=1)
    options = {'dimension_numbers': LAYOUTS[2], 'feature_group_count': 2 if depthwise else 1}

    def loss(convolve, kernel, x):
        y = convolve(x, kernel, (2, 2), 'SAME', **options)
        return jnp.sum(jnp.sin(y) ** 2)

    def results(convolve):
        def of_image(kernel, image):
            return loss(convolve, kernel, image[None])

        gradient = jax.grad(of_image)
        return (
            jax.vmap(gradient, (None, 0))(kernel, x),
            jax.grad(jax.checkpoint(lambda k: loss(convolve, k, x)))(kernel),
            jax.grad(lambda k: jnp.sum(gradient(k, x[0]) ** 2))(kernel),
            jax.jvp(lambda k: gradient(k, x[0]), (kernel,), (kernel,))[1],
        )

    fast, slow = jit(
        lambda: (results(cpu.conv_general_dilated), results(lax.conv_general_dilated))
    )()
    for actual, expected in zip(fast, slow):
        assert_close(actual, expected, 1e-4)


def test_symbolic_batch():
    kernels = normal(3, 3, 1, 4), normal(1, 1, 4, 3)

    def run(x):
        y = cpu.conv_general_dilated(
            x, kernels[0], (2, 2), 'SAME', dimension_numbers=LAYOUTS[2], feature_group_count=4
        )
        return cpu.conv_general_dilated(y, kernels[1], (1, 1), 'SAME', dimension_numbers=LAYOUTS[2])

    (batch,) = export.symbolic_shape('batch')
    exported = export.export(jax.jit(run))(jax.ShapeDtypeStruct((batch, 6, 6, 4), jnp.float32))
    x = normal(5, 6, 6, 4)
    assert_close(exported.call(x), run(x))


class Block(nn.Module):
    """Every kind of convolution, and a BatchNorm. `copy` only tells nn.jit's cache two apart."""

    copy: int = 0

    @nn.compact
    def __call__(self, x, train: bool = False):
        y = nn.Conv(6, (3, 1), name='general')(x)
        y = nn.BatchNorm(use_running_average=not train, name='bn')(y)
        y = nn.Conv(6, (2, 2), feature_group_count=6, name='depthwise')(y)
        return nn.Conv(x.shape[-1], 1, dtype=jnp.float32, name='project')(y)


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Block(name='block')(x)


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat(Block)(name='block')(x)


class Jitted(nn.Module):
    copy: int = 0

    @nn.compact
    def __call__(self, x):
        return nn.jit(Block)(self.copy, name='block')(x)


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            lambda module, x, _: (module(x), None),
            variable_axes={'params': 0, 'batch_stats': 0},
            split_rngs={'params': True},
            length=2,
        )
        return layers(Block(name='block'), x, None)[0]


class Setup(nn.Module):
    def setup(self):
        self.layers = [nn.Conv(4, 1), nn.Conv(4, 3, feature_group_count=4)]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def record_calls(monkeypatch):
    """Counts what reaches the fast function, which goes on working."""
    calls = []
    original = cpu.conv_general_dilated

    def recorded(*args, **kwargs):
        calls.append(kwargs.get('feature_group_count', 1))
        return original(*args, **kwargs)

    monkeypatch.setattr(layers, 'conv_general_dilated', recorded)
    return calls


def on_cpu(monkeypatch):
    monkeypatch.setattr(jax, 'default_backend', lambda: 'cpu')


@pytest.mark.parametrize(
    'model, reference',
    [
        (Block(), Block()),
        (Remat(), Plain()),
        (Jitted(0), Jitted(1)),
        (Scanned(), Scanned()),
        (Setup(), Setup()),
    ],
)
def test_interceptor_keeps_parameters_and_outputs(model, reference, monkeypatch):
    on_cpu(monkeypatch)
    calls, x = record_calls(monkeypatch), normal(2, 4, 4, 4)

    def run(model):
        variables = model.init(jax.random.key(0), x)

        def loss(params):
            out = model.apply({**variables, 'params': params}, x)
            return jnp.sum(out**2), out

        return variables, jax.value_and_grad(loss, has_aux=True)(variables['params'])

    def both():
        expected = run(reference)
        assert not calls
        with cpu.fast_layers():
            return run(model), expected

    (variables, actual), (expected_variables, expected) = jit(both)()
    assert calls
    assert jax.tree.structure(variables) == jax.tree.structure(expected_variables)
    for a, e in zip(jax.tree.leaves(variables), jax.tree.leaves(expected_variables)):
        np.testing.assert_array_equal(a, e)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(a, e, 1e-4)


def test_mutable_collections(monkeypatch):
    on_cpu(monkeypatch)
    model, x = Block(), normal(2, 4, 4, 4)

    def both():
        variables = model.init(jax.random.key(0), x)
        options = {'train': True, 'mutable': ['batch_stats', 'intermediates']}
        expected = model.apply(variables, x, capture_intermediates=True, **options)
        with cpu.fast_layers():
            return model.apply(variables, x, capture_intermediates=True, **options), expected

    actual, expected = jit(both)()
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert_close(a, e)


def trace_init(model):
    jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 2))))


def test_own_convolution_is_left_alone(monkeypatch):
    on_cpu(monkeypatch)
    calls, own = record_calls(monkeypatch), []

    def own_convolution(*args, **kwargs):
        own.append(1)
        return lax.conv_general_dilated(*args, **kwargs)

    with cpu.fast_layers():
        trace_init(nn.Conv(2, 1, conv_general_dilated=own_convolution))
        trace_init(nn.Conv(2, 1, conv_general_dilated_cls=lambda: own_convolution))
    assert len(own) == 2 and not calls


def test_nothing_happens_on_a_tpu_or_after_the_context(monkeypatch):
    calls = record_calls(monkeypatch)
    monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
    with cpu.fast_layers():
        trace_init(Setup())
    on_cpu(monkeypatch)
    with cpu.fast_layers():
        pass
    trace_init(Setup())
    assert not calls


def test_a_gpu_has_its_own_forms(monkeypatch):
    """Depthwise and 1×1 convolutions of few pixels are written anew there, in float32; others not,
    such as strided ones of 3×3."""
    key = jax.random.key(0)
    pointwise, strided = nn.Conv(16, (1, 1)), nn.Conv(24, (3, 3), 2)
    depthwise = nn.Conv(16, (3, 3), feature_group_count=16)

    def anew(backend, x, dtype=jnp.float32):
        monkeypatch.setattr(jax, 'default_backend', lambda: backend)
        with cpu.fast_layers():
            programs = [
                str(jax.make_jaxpr(layer.clone(dtype=dtype).init_with_output)(key, x))
                for layer in (pointwise, depthwise, strided)
            ]
        return ['conv_general_dilated' not in program for program in programs]

    few, many = (jnp.ones((2, size, size, 16)) for size in (14, 16))
    assert anew('cpu', few) == anew('cpu', many) == [True, True, True]
    assert anew('gpu', few) == [True, True, False]
    none = [False, False, False]
    assert anew('gpu', many) == anew('gpu', few, jnp.bfloat16) == anew('tpu', few) == none


def test_the_field_is_restored_after_an_error(monkeypatch):
    on_cpu(monkeypatch)
    seen = []

    class Failing(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Conv(2, (1, 1, 1, 1, 1))
            try:
                layer(x)
            finally:
                seen.append(layer.conv_general_dilated)

    with cpu.fast_layers(), pytest.raises(Exception):  # noqa: B017
        trace_init(Failing())
    assert seen == [None]


@pytest.mark.parametrize('fast_outside', [True, False])
def test_together_with_an_interceptor_that_clones(monkeypatch, fast_outside):
    on_cpu(monkeypatch)
    calls, model, x = record_calls(monkeypatch), Block(), normal(2, 4, 4, 4)

    def narrower(call, args, kwargs, context):
        module = context.module
        wide = isinstance(module, nn.Conv) and module.features == 6
        if not wide or context.method_name != '__call__':
            return call(*args, **kwargs)
        groups = 3 if module.feature_group_count == 6 else 1
        clone = module.clone(features=3, feature_group_count=groups, parent=module.scope)
        return clone(*args, **kwargs)

    def both():
        with nn.intercept_methods(narrower):
            variables = model.init(jax.random.key(0), x)
            expected = model.apply(variables, x)
        first, second = cpu.fast_layers(), nn.intercept_methods(narrower)
        if not fast_outside:
            first, second = second, first
        with first, second:
            return variables, model.apply(variables, x), expected

    variables, actual, expected = jit(both)()
    assert variables['params']['depthwise']['kernel'].shape == (2, 2, 1, 3)
    assert_close(actual, expected)
    assert sorted(calls) == [1, 1, 3]


FAULTS = """
import ctypes, resource
from jaxkd import cpu

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
held = cpu.hold_memory()
faults = []
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(1 << 26)))
    ctypes.memset(block, 1, 1 << 26)
    libc.free(block)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(held, faults[-1])
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), 'mallopt'), reason='not the GNU C library')
def test_memory_is_held():
    """64 MiB that were freed are there again without the system's help: 16,384 pages otherwise."""
    held, faults = subprocess.check_output([sys.executable, '-c', FAULTS], text=True).split()
    assert held == 'True' and int(faults) < 100
