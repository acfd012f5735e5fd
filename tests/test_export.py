"""Compact networks as files that run without their code."""

import subprocess
import sys

import jax
import numpy as np
import pytest

import jaxkd
from jaxkd import export

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


@pytest.mark.parametrize('format', ['stablehlo', 'onnx'])
def test_own_model(folder, own_model, format):
    if format == 'onnx' and not export.has_onnx():
        pytest.skip("needs jaxkd's extra `export`")
    flags = ['own', f'--format={format}', '--out=own.file', '--model=own_net:Net']
    assert export.main([*flags, "--apply={'frozen': True}"]) == 0
    called = {'stablehlo': jaxkd.load, 'onnx': export.onnx_function}[format](folder / 'own.file')
    small = jaxkd.load('own', own_model)
    right = small.apply(small.variables, images(4), frozen=True)
    assert_equal_outputs(called(images(4)), right)


def test_what_computes_something_else_is_not_kept(folder, monkeypatch):
    small = jaxkd.load('known')
    right = type(small.module).apply
    calls = []

    def drifting(self, *args, **kwargs):
        calls.append(None)
        return right(self, *args, **kwargs) * (1 + 0.01 * len(calls))

    monkeypatch.setattr(type(small.module), 'apply', drifting)
    with pytest.raises(jaxkd.ExportError, match='stablehlo: its outputs are off by .*e-0'):
        export.stablehlo(small, 'wrong.hlo')
    assert not [path for path in folder.iterdir() if 'wrong' in path.name]


def test_damaged_file(folder):
    (folder / 'damaged.hlo').write_bytes(b'not a program')
    with pytest.raises(jaxkd.CheckpointError, match='damaged.hlo: holds no StableHLO'):
        jaxkd.load('damaged.hlo')


@pytest.mark.parametrize(
    ('flags', 'status', 'words'),
    [
        (['known', '--format=gif', '--out=a'], 2, ['gif', 'stablehlo']),
        (['known', '--format=onnx'], 2, ['--out']),
        (['nowhere', '--format=stablehlo', '--out=a'], 1, ['nowhere']),
        (['known', '--format=stablehlo', '--out=no/a'], 2, ['--out', 'no folder no']),
        (['own', '--format=stablehlo', '--out=a'], 1, ['own_net:Net', 'model']),
        (['own', '--format=stablehlo', '--out=a', '--model=own_net:Net'], 1, ['frozen']),
        (['known', '--format=onnx', '--out=a'], 1, ["pip install 'jaxkd[export]'"]),
    ],
)
def test_wrong_input_is_one_sentence(folder, capsys, monkeypatch, flags, status, words):
    monkeypatch.setattr(export, 'has_onnx', lambda: False)
    try:
        returned = export.main(flags)
    except SystemExit as stop:  # argparse
        returned = stop.code
    err = capsys.readouterr().err
    assert (returned, err.count('\n')) == (status, 1), err
    assert err.startswith('jaxkd: ') and all(word in err for word in words), err
    assert not (folder / 'a').exists()
