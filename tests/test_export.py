"""Compact networks as files that run without their code."""

import collections
from collections.abc import Callable
import errno
import importlib.util
import pathlib
import re
import subprocess
import sys
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
import tiny

import jaxkd
from jaxkd import benchmark, export, onnx_graph, pipeline, summary
from jaxkd import plan as planning
from jaxkd.data import split

# With JAX alone: the file says everything.
ALONE = """
import sys
from jax import export
import numpy
called = export.deserialize(bytearray(open('known.hlo', 'rb').read())).call
numpy.save('alone.npy', called(numpy.load('images.npy')))
assert 'flax' not in sys.modules and 'jaxkd' not in sys.modules
"""


def images(batch_size):
    return np.random.default_rng(1).random((batch_size, 32, 32, 3), np.float32)


def assert_equal_outputs(found, expected):
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_stablehlo(folder, capsys):
    assert export.main(['known', '--format=stablehlo', '--out=known.hlo']) == 0
    said = capsys.readouterr().out
    assert said.startswith('known.hlo: stablehlo, ') and 'of the largest output' in said
    small = jaxkd.load('known')
    called = jaxkd.load('known.hlo')
    for batch_size in (1, 5):
        right = small.apply(small.variables, images(batch_size), train=False)
        assert_equal_outputs(called(images(batch_size)), right)
    np.save('images.npy', images(5))
    done = subprocess.run([sys.executable, '-c', ALONE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_equal_outputs(np.load('alone.npy'), right)
    # As large as what it keeps.
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(small.variables))
    assert kept < (folder / 'known.hlo').stat().st_size < kept + 500_000


class Flat(nn.Module):
    size: Callable = len

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Conv(8, (3, 3))(x)).reshape(self.size(x), -1))


@pytest.mark.parametrize('size', [len, lambda x: int(x.shape[0])])
def test_a_number_of_the_batch_is_refused(tmp_path, size):
    model = Flat(size)
    variables = model.init(jax.random.key(0), images(1)[:, :4, :4])
    small = jaxkd.prune(model, variables, images(1)[:, :4, :4], flops=0.7, criterion='l1')
    with pytest.raises(jaxkd.ExportError, match=r'use x.shape\[0\], not len\(x\)'):
        export.stablehlo(small, tmp_path / 'flat.hlo')


class Odd(nn.Module):
    """A scalar and indices as inputs; outputs that are booleans, and zeros alone."""

    @nn.compact
    def __call__(self, x, scale, index):
        x = nn.relu(nn.Conv(8, (3, 3))(nn.relu(nn.Conv(8, (3, 3))(x)))).mean((1, 2))
        x = nn.Dense(3)(x + nn.Embed(2, 8)(index)) / (1 + scale)
        return x, x > 0, nn.Dense(2, kernel_init=nn.initializers.zeros)(x)


def test_inputs_and_outputs_of_all_kinds(tmp_path):
    inputs = images(1)[:, :4, :4], np.float32(1), np.zeros(1, np.int32)
    model = Odd()
    small = jaxkd.prune(model, model.init(jax.random.key(0), *inputs), *inputs, flops=0.9)
    _, scale, index = export.random_inputs(small, 9)
    assert scale.shape == () and set(index.tolist()) == {0, 1}
    assert export.stablehlo(small, tmp_path / 'odd.hlo').difference < 1e-4


class Many(nn.Module):
    """More inputs and outputs than there are digits, in an order that tells."""

    @nn.compact
    def __call__(self, x, *more):
        x = nn.Dense(3)(nn.relu(nn.Conv(8, (3, 3))(x)).mean((1, 2)))
        return x, *(i * x + other for i, other in enumerate(more))


@pytest.mark.parametrize('format', export.OPENED)
def test_more_than_ten_inputs_and_outputs(tmp_path, format):
    skip_without(format)
    inputs = images(1)[:, :4, :4], *[np.zeros((1, 3), np.float32)] * 11
    model = Many()
    small = jaxkd.prune(model, model.init(jax.random.key(0), *inputs), *inputs, flops=0.9)
    assert export.FORMATS[format](small, tmp_path / 'many').difference < 1e-4


@pytest.mark.parametrize(
    'pattern', ['input_{}', 'serving_default_args_{}:0', 'StatefulPartitionedCall:{}']
)
def test_names_in_tensorflow_lite_are_in_the_order_of_their_numbers(pattern):
    names = [pattern.format(number) for number in range(12)]
    assert sorted(sorted(names), key=export._counted) == names
    assert export._counted('Identity') < export._counted('Identity_1')


class Half(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = nn.Conv(16, (3, 3), use_bias=False, dtype=jnp.bfloat16)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True, dtype=jnp.bfloat16)(x))
        return nn.Dense(3, dtype=jnp.bfloat16)(x.mean((1, 2)))


def test_half_precision_rounds_wherever_it_is_computed(tmp_path):
    model, inputs = Half(), images(1)[:, :8, :8]
    variables = nets.variables_of(model, inputs)
    small = jaxkd.prune(model, variables, inputs, flops=0.6, criterion='l1')
    folded = export.stablehlo(small, tmp_path / 'half.hlo', fold=True)
    assert 1e-4 < folded.difference < 4 * 2.0**-7
    # The same bits, computed alike.
    assert export.safetensors(small, tmp_path / 'half.safetensors').difference == 0


def test_a_disk_that_is_full(folder, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(pathlib.Path, 'write_bytes', full)
    with pytest.raises(jaxkd.ExportError, match='full.hlo cannot be written: No space left'):
        export.stablehlo(jaxkd.load('known'), 'full.hlo')


def skip_without(format):
    if export.missing(format):
        pytest.skip(export.missing(format))


@pytest.mark.parametrize('format', export.OPENED)
def test_own_model(folder, own_model, format):
    skip_without(format)
    flags = ['own', f'--format={format}', '--out=own.file', '--model=own_net:Net']
    assert export.main([*flags, "--apply={'frozen': True}"]) == 0
    called = export.OPENED[format](folder / 'own.file')
    small = jaxkd.load('own', own_model)
    right = small.apply(small.variables, images(4), frozen=True)
    assert_equal_outputs(called(images(4)), right)


class Pooling(nn.Module):
    """Every way to call Flax's pooling."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (3, 3))(x)
        x = nn.max_pool(x - 5.0, (3, 3), (2, 2), ((1, 1), (1, 1)))
        y = nn.avg_pool(x, (3, 3), padding='SAME', count_include_pad=False)
        x = (
            y
            + nn.avg_pool(x, (3, 3), padding=((1, 1), (1, 1)))
            + nn.max_pool(x, (3, 3), padding='SAME')
        )
        return nn.Dense(3)(nn.avg_pool(x, (2, 2), strides=(2, 2)).mean((1, 2)))


def test_pooling_of_all_kinds(tmp_path):
    skip_without('onnx')
    model = Pooling()
    variables = model.init(jax.random.key(0), images(2))
    small = jaxkd.prune(model, variables, images(2), flops=0.5)
    before = nn.max_pool, nn.avg_pool
    export.onnx(small, tmp_path / 'pooling.onnx')
    assert (nn.max_pool, nn.avg_pool) == before
    right = small.apply(small.variables, images(3))
    assert_equal_outputs(export.onnx_function(tmp_path / 'pooling.onnx')(images(3)), right)


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
@pytest.mark.parametrize('format', export.OPENED)
def test_half_the_size(folder, format, dtype):
    skip_without(format)
    small = jaxkd.load('known')
    if (format, dtype) == ('tflite', 'bfloat16'):
        with pytest.raises(jaxkd.ConfigError, match='stores no such weights'):
            export.tflite(small, 'half', dtype=dtype)
        return
    whole = export.FORMATS[format](small, None)
    half = export.FORMATS[format](small, 'half', dtype=dtype)
    kernels = [x.size for x in jax.tree.leaves(small.variables) if x.ndim > 1]
    assert 1.8 * sum(kernels) < whole.bytes - half.bytes < 2.2 * sum(kernels)
    # Kernels have been rounded, no more than they have to be.
    bits = {'float16': 11, 'bfloat16': 8}[dtype]
    assert 1e-6 < half.difference < len(kernels) * 2.0**-bits
    found = export.OPENED[format]('half')(images(2))
    assert np.asarray(found).dtype == np.float32


def test_folded_stablehlo(folder, capsys):
    flags = ['known', '--format=stablehlo', '--out=folded.hlo', '--fold', '--dtype=bfloat16']
    assert export.main(flags) == 0
    # 19 BatchNorms of four vectors became a bias each.
    assert '40 arrays of variables, 97 before' in capsys.readouterr().out
    small = jaxkd.load('known')
    right = np.asarray(small.apply(small.variables, images(2), train=False))
    np.testing.assert_allclose(
        jaxkd.load('folded.hlo')(images(2)), right, atol=0.05 * np.abs(right).max()
    )


def test_onnx_graph_is_tidy(folder):
    skip_without('onnx')
    import onnx

    model = jaxkd.models.create('mobilenet_v2', width=0.25)
    image = np.zeros((1, 32, 32, 3), np.float32)
    variables = jax.jit(lambda key: model.init(key, image, train=False))(jax.random.key(0))
    small = jaxkd.prune(model, variables, image, flops=0.7, criterion='l1', train=False)
    assert export.onnx(small, 'tidy.onnx').difference < 1e-5
    graph = onnx.load('tidy.onnx')
    onnx.checker.check_model(graph, full_check=True)
    kinds = collections.Counter(node.op_type for node in graph.graph.node)
    assert kinds['Conv'] == 52 and kinds['Clip'] == 35
    assert kinds['Transpose'] <= 2
    assert kinds.keys() <= {'Conv', 'Clip', 'Add', 'Transpose', 'ReduceMean', 'Gemm'}


def test_what_a_branch_alone_reads_stays():
    onnx = pytest.importorskip('onnx')
    made, info, floats = onnx.helper, onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    then, other = (
        made.make_graph([made.make_node(*node)], 'branch', [], [info(node[2][0], floats, [2])])
        for node in (('Add', ['x', 'w'], ['t']), ('Identity', ['x'], ['e']))
    )
    graph = made.make_graph(
        [made.make_node('If', ['c'], ['y'], then_branch=then, else_branch=other)],
        'whole',
        [info('x', floats, [2]), info('c', onnx.TensorProto.BOOL, [])],
        [info('y', floats, [2]), info('out', floats, [2])],
        [onnx.numpy_helper.from_array(np.ones(2, np.float32), name) for name in ('w', 'out', 'no')],
    )
    onnx_graph._drop_unread(graph)
    assert [stored.name for stored in graph.initializer] == ['w', 'out']


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The folder of a finished run, which could not write one of the formats it was to."""
    workdir = tmp_path_factory.mktemp('run')
    config = tiny.get_config()
    config.export = ('stablehlo', 'onnx')

    def failing(*args):
        raise TypeError('no such operation')

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(export.FORMATS, 'onnx', failing)
        patch.setattr(export, 'missing', lambda name: None)
        return workdir, pipeline.run(config, workdir)


def test_run_exports_and_a_failure_is_told(run):
    workdir, report = run
    assert report['export']['onnx'] == {'error': 'TypeError: no such operation'}
    told = report['export']['stablehlo']
    assert told['bytes'] == (workdir / 'export' / 'model.stablehlo').stat().st_size
    assert told['bytes'] < told['full_bytes'] and told['difference'] < 1e-4
    small = jaxkd.load(workdir / 'compact')
    image = np.random.default_rng(0).random((2, 8, 8, 1), np.float32)
    right = small.apply(small.variables, image, train=False)
    assert_equal_outputs(jaxkd.load(workdir / 'export' / 'model.stablehlo')(image), right)
    # What the file has to be given is told, too.
    assert report['normalization'].keys() == {'mean', 'std'}


@pytest.mark.parametrize('format', ['onnx', 'tflite'])
def test_int8(run, format, tmp_path, capsys):
    skip_without(format)
    workdir, report = run
    flags = [str(workdir), f'--format={format}', f'--out={tmp_path / "int8"}', '--int8']
    assert export.main(flags) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    found = [float(number) for number in re.findall(r'0\.\d+', said)]
    assert found[0] == pytest.approx(report['compact']['accuracy'], abs=1e-4)
    assert found[1] == pytest.approx(found[0], abs=0.03)
    called = export.OPENED[format](tmp_path / 'int8')
    assert called(np.zeros((3, 8, 8, 1), np.float32)).shape == (3, 10)


def test_int8_saturates_on_no_processor():
    """Fused, on any instructions, as the file says it: in two steps of its coarsest rounding."""
    onnx, onnxruntime = map(pytest.importorskip, ('onnx', 'onnxruntime'))
    random, made, floats = np.random.default_rng(0), onnx.helper, onnx.TensorProto.FLOAT
    kernels = [np.abs(random.normal(size=(8, 8, 3, 3))).astype(np.float32) for _ in 'kl']
    graph = made.make_graph(
        [
            made.make_node(kind, inputs, outputs)
            for kind, inputs, outputs in (
                ('Conv', ['x', 'k'], ['a']),
                ('Relu', ['a'], ['b']),
                ('Conv', ['b', 'l'], ['y']),
            )
        ],
        'two',
        [made.make_tensor_value_info('x', floats, ['batch', 8, 8, 8])],
        [made.make_tensor_value_info('y', floats, None)],
        [onnx.numpy_helper.from_array(*pair) for pair in zip(kernels, 'kl', strict=True)],
    )
    model = made.make_model(graph, opset_imports=[made.make_opsetid('', 17)], ir_version=8)
    x = random.random((64, 8, 8, 8), np.float32)
    small = onnx_graph.quantized(model, x)
    stored = [onnx.numpy_helper.to_array(one) for one in small.graph.initializer]
    assert [np.abs(one).max() for one in stored if one.shape == (8, 8, 3, 3)] == [64, 64]
    levels = onnxruntime.GraphOptimizationLevel
    found = []
    for level in (levels.ORT_DISABLE_ALL, levels.ORT_ENABLE_ALL):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        session = onnxruntime.InferenceSession(
            small.SerializeToString(), options, providers=['CPUExecutionProvider']
        )
        found.append(session.run(None, {'x': x})[0])
    np.testing.assert_allclose(found[1], found[0], atol=2 * np.ptp(found[0]) / 255)


@pytest.mark.parametrize('several', [tuple, list])
def test_accuracy_is_that_of_the_first_output(several):
    labels = np.array([0, 1, 2, 0])
    pixels = np.zeros((4, 8, 8, 3), np.uint8)
    part = split.in_memory(pixels, labels)
    found = export._Images(lambda name: part, np.zeros(3, np.float32), np.ones(3, np.float32))
    outputs = several([np.eye(3)[[0, 1, 2, 1]], np.zeros((4, 16))])
    assert found.accuracy(lambda images: outputs) == 0.75


@pytest.mark.parametrize(
    ('formats', 'words'),
    [(('gif',), ['gif', 'stablehlo, onnx, tflite']), (('onnx',), ["pip install 'jaxkd[export]'"])],
)
def test_run_refuses_formats_at_once(monkeypatch, formats, words):
    config = tiny.get_config()
    config.export = formats
    monkeypatch.setattr(importlib.util, 'find_spec', lambda _: None)
    with pytest.raises(jaxkd.ConfigError) as error:
        planning.make_plan(config)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(('drift', 'words'), [(0.01, 'off by .*e-0'), (np.nan, 'off by nan')])
def test_what_computes_something_else_is_not_kept(folder, monkeypatch, drift, words):
    small = jaxkd.load('known')
    right = type(small.module).apply
    calls = []

    def drifting(self, *args, **kwargs):
        calls.append(None)
        return right(self, *args, **kwargs) * (1 + drift * len(calls))

    monkeypatch.setattr(type(small.module), 'apply', drifting)
    with pytest.raises(jaxkd.ExportError, match=f'stablehlo: its outputs are {words}'):
        export.stablehlo(small, 'wrong.hlo')
    assert not [path for path in folder.iterdir() if 'wrong' in path.name]


def test_damaged_file(folder):
    (folder / 'damaged.hlo').write_bytes(b'not a program')
    with pytest.raises(jaxkd.CheckpointError, match='damaged.hlo: holds no StableHLO'):
        jaxkd.load('damaged.hlo')


def test_folder_of_a_run(tmp_path):
    (tmp_path / 'compact').mkdir()
    with pytest.raises(jaxkd.CheckpointError, match=r'its compact model is in .*compact$'):
        jaxkd.load(tmp_path)


@pytest.mark.parametrize(
    ('flags', 'status', 'words'),
    [
        (['known', '--format=gif', '--out=a'], 2, ['gif', 'stablehlo']),
        (['known', '--format=onnx'], 2, ['--out']),
        (['nowhere', '--format=stablehlo', '--out=a'], 1, ['nowhere']),
        (['known', '--format=stablehlo', '--out=no/a'], 2, ['--out', 'no folder no']),
        (['known', '--format=stablehlo', '--out=known'], 2, ['--out', 'name a file']),
        (['own_net.py', '--format=stablehlo', '--out=a'], 1, ['own_net.py: is a file']),
        (
            ['own', '--format=stablehlo', '--out=a'],
            1,
            ['own_net:Net', '--model=package.module:function', '--arguments'],
        ),
        (
            ['own', '--format=stablehlo', '--out=a', '--model=own_net:Net', '--arguments={}'],
            1,
            ["padding ('SAME' there, 'VALID' now)", "--arguments=\"{'padding': 'SAME'}\""],
        ),
        (['own', '--format=stablehlo', '--out=a', '--model=own_net:Net'], 1, ['frozen']),
        (['known', '--format=onnx', '--out=a'], 1, ["pip install 'jaxkd[export]'"]),
        (['known', '--format=tflite', '--out=a'], 1, ["pip install 'jaxkd[tensorflow]'"]),
        (['known', '--format=onnx', '--out=a', '--fold'], 2, ['--fold is for stablehlo']),
        (
            ['known', '--format=stablehlo', '--out=a', '--int8'],
            2,
            ['--int8 is for onnx and tflite'],
        ),
        (['known', '--format=onnx', '--out=a', '--int8'], 2, ['known', 'report.json']),
        (['known', '--format=stablehlo', '--out=a', '--dtype=int4'], 2, ['int4', 'bfloat16']),
    ],
)
def test_wrong_input_is_one_sentence(folder, capsys, monkeypatch, flags, status, words):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda _: None)
    try:
        returned = export.main(flags)
    except SystemExit as stop:  # argparse
        returned = stop.code
    err = capsys.readouterr().err
    assert (returned, err.count('\n')) == (status, 1), err
    assert err.startswith('jaxkd: ') and all(word in err for word in words), err
    assert not (folder / 'a').exists()


class Groups(nn.Module):
    """Layers with numbers of groups, in a branch that can go and outside of it."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.GroupNorm(8)(nn.Conv(16, (3, 3))(x)))
        x = nn.relu(nn.Conv(16, (3, 3), feature_group_count=16)(x))
        y = nn.relu(nn.Conv(12, (1, 1), name='branch')(x))
        y = nn.Conv(12, (3, 3), strides=2, feature_group_count=12, use_bias=False)(y)
        y = nn.GroupNorm(num_groups=3)(y)
        x = nn.max_pool(x, (2, 2), (2, 2)) + nn.Conv(16, (1, 1))(y)
        return nn.Dense(3)(x.mean((1, 2)))


@pytest.mark.parametrize('gone', [False, True])
def test_groups_of_a_compact_network_in_onnx(tmp_path, gone):
    skip_without('onnx')
    model, inputs = Groups(), images(1)[:, :8, :8]
    variables = nets.variables_of(model, inputs)
    graph = jaxkd.trace(model, variables, inputs)
    fixed = {group.group for group in graph.frozen}
    keep = {group.name: np.ones(group.size, bool) for group in graph.groups}
    for name in keep.keys() - fixed:
        keep[name][keep[name].size // 2 :] = False
    for name in graph.removable():
        keep[name][:] &= not gone
    small = jaxkd.compact(graph, variables, keep)
    before = nn.Conv.__call__, nn.GroupNorm.__call__
    assert export.onnx(small, tmp_path / 'groups.onnx').difference < 1e-5
    assert (nn.Conv.__call__, nn.GroupNorm.__call__) == before


class Gone(nn.Module):
    """A branch with what runtimes do not compute of no channels."""

    kind: str

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        y = nn.relu(nn.Conv(6, (3, 3), name='branch')(x))
        if self.kind == 'pool':
            y = nn.max_pool(y, (3, 3), padding='SAME')
        elif self.kind == 'squeeze':
            z = nn.Dense(6)(nn.relu(nn.Dense(4)(y.mean((1, 2)))))
            y = y * nn.sigmoid(z).reshape(z.shape[0], 1, 1, -1)
        else:
            y = nn.avg_pool(y, (3, 3), padding='SAME')
            return nn.Dense(3)(nn.Conv(8, (1, 1))(jnp.concatenate([x, y], -1)).mean((1, 2)))
        return nn.Dense(3)((x + nn.Conv(8, (1, 1))(y)).mean((1, 2)))


@pytest.mark.parametrize('kind', ['pool', 'squeeze', 'concatenate'])
def test_a_branch_that_has_gone_is_not_computed_in_onnx(tmp_path, kind):
    skip_without('onnx')
    import onnx

    model, inputs = Gone(kind), images(1)[:, :8, :8]
    variables = nets.variables_of(model, inputs)
    graph = jaxkd.trace(model, variables, inputs)
    small = jaxkd.compact(graph, variables, {'branch': np.zeros(6, bool)})
    assert export.onnx(small, tmp_path / 'gone.onnx').difference < 1e-5
    kinds = [node.op_type for node in onnx.load(tmp_path / 'gone.onnx').graph.node]
    assert not {'MaxPool', 'AveragePool', 'Sigmoid'} & set(kinds)


class Resized(nn.Module):
    method: str

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        x = jax.image.resize(x, (x.shape[0], 12, 5, x.shape[-1]), self.method)
        return nn.Dense(3)(x.mean((1, 2)))


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.BatchNorm(use_running_average=True)(nn.Conv(6, (3, 3))(x))
        y = x + nn.Conv(8, (1, 1))(nn.relu(y))
        return y, y.mean((1, 2))


class Loop(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes = {'params': 0, 'batch_stats': 0}
        steps = nn.scan(Step, variable_axes=axes, split_rngs={'params': True}, length=3)
        x, features = steps()(nn.relu(nn.Conv(8, (3, 3))(x)), None)
        return nn.Dense(3)(x.mean((1, 2)) + features.sum(0))


class Coarse(nn.Module):
    """Variables in half precision, and what is computed in it."""

    stored: Any
    computed: Any

    @nn.compact
    def __call__(self, x):
        types = {'param_dtype': self.stored, 'dtype': self.computed}
        x = nn.Conv(8, (3, 3), **types)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, **types)(x))
        return nn.Dense(3, **types)(x.mean((1, 2)))


@pytest.mark.parametrize(
    'model',
    [
        Resized('nearest'),
        Resized('bilinear'),
        Loop(),
        Coarse(jnp.float16, jnp.float16),
        Coarse(jnp.bfloat16, None),
    ],
    ids=['nearest', 'bilinear', 'scan', 'float16', 'bfloat16'],
)
def test_what_jax2onnx_alone_does_not_take(tmp_path, model):
    skip_without('onnx')
    inputs = images(1)[:, :8, :8]
    variables = nets.variables_of(model, inputs)
    small = jaxkd.prune(model, variables, inputs, flops=0.9, criterion='l1')
    before = jax.image.resize, jnp.shape, jnp.full
    limit = 4 * 2.0**-10 if getattr(model, 'computed', None) else 1e-5
    assert export.onnx(small, tmp_path / 'taken.onnx').difference < limit
    assert (jax.image.resize, jnp.shape, jnp.full) == before


class Mapped(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes = {'variable_axes': {'params': 0}, 'split_rngs': {'params': True}}
        each = nn.vmap(nn.Conv, in_axes=None, out_axes=-1, axis_size=2, **axes)
        return nn.Dense(3)(each(4, (3, 3))(nn.relu(nn.Conv(8, (3, 3))(x))).mean((1, 2, 4)))


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        noise = jax.random.normal(jax.random.key(0), (*x.shape[:-1], 1))
        return nn.Dense(3)((x + noise).mean((1, 2)))


@pytest.mark.parametrize(
    ('model', 'words'),
    [
        (Mapped(), 'no layer under nn.vmap: ask for stablehlo'),
        (Coarse(jnp.float32, jnp.bfloat16), 'make it with float32'),
        (Noisy(), 'for a fixed batch size alone: ask for stablehlo'),
    ],
)
def test_what_onnx_cannot_do_is_said(tmp_path, model, words):
    skip_without('onnx')
    inputs = images(1)[:, :8, :8]
    variables = nets.variables_of(model, inputs)
    small = jaxkd.prune(model, variables, inputs, flops=0.9, criterion='l1')
    with pytest.raises(jaxkd.ExportError, match=words):
        export.onnx(small, tmp_path / 'no.onnx')
    assert export.stablehlo(small, tmp_path / 'yes.hlo').path


class Parts(nn.Module):
    def setup(self):
        self.first, self.second, self.head = nn.Conv(8, (3, 3)), nn.Conv(8, (1, 1)), nn.Dense(3)

    def features(self, x):
        return nn.relu(self.second(nn.relu(self.first(x)))).mean((1, 2))

    def __call__(self, x, train=False):
        return self.head(self.features(x))


def test_a_method_that_is_not_told_whether_it_trains(tmp_path):
    model, inputs = Parts(), images(1)[:, :4, :4]
    variables = model.init(jax.random.key(0), inputs)
    small = jaxkd.prune(model, variables, inputs, flops=0.8, criterion='l1')
    export.stablehlo(small, tmp_path / 'features.hlo', method='features')
    right = small.apply(small.variables, inputs, method='features')
    assert_equal_outputs(jaxkd.load(tmp_path / 'features.hlo')(inputs), right)
    asked = {'method': 'features', 'rngs': {'dropout': jax.random.key(0)}, 'mutable': ['sown']}
    rows = benchmark.measure(small, rounds=1, seconds=1, **asked)
    assert {row.network for row in rows} == {'full', 'compact'}
    shapes = [jax.ShapeDtypeStruct(inputs.shape, inputs.dtype)]
    assert summary.trace(model, shapes, asked).cost().params == 224 + 72  # without the head
