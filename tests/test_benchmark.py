"""The command that times compact networks beside the full ones."""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys

import pytest

import jaxkd
from jaxkd import benchmark, export


def test_both_networks_are_timed(folder, capsys):
    flags = ['known', '--batch', '1', '3', '--rounds=2', '--out=found.json']
    assert benchmark.main(flags) == 0
    said = capsys.readouterr().out
    assert 'known   compact  XLA' in said and 'wrote found.json' in said
    found = json.loads((folder / 'found.json').read_text())
    assert found['command'].startswith('python ')
    assert found['threads'] >= 1
    rows = [row for row in found['rows'] if row['runtime'] == 'XLA']
    words = [(row['network'], row['batch']) for row in rows]
    assert words == [('full', 1), ('compact', 1), ('full', 3), ('compact', 3)]
    for full, compact in (rows[:2], rows[2:]):
        assert full['speedup'] == full['of_saving'] == 1.0
        assert compact['flops'] <= 0.3 * full['flops']
        share = compact['flops'] / full['flops']
        assert compact['of_saving'] == pytest.approx(compact['speedup'] * share)
        assert all(row['spread'][0] <= row['milliseconds'] <= row['spread'][1] for row in rows)


def test_modules_of_other_packages_have_no_version(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, 'version', version)
    assert benchmark.record([], 1)['versions'] == {}


def test_own_model(folder, own_model):
    small = jaxkd.load('own', model=own_model)
    rows = benchmark.measure(small, batch_size=32, rounds=20, frozen=True)
    # 0.3 of the multiply-adds, in layers of which they are the most work.
    assert rows[1].speedup > 1
    command = [sys.executable, '-m', 'jaxkd.benchmark', 'own', '--model=own_net:Net']
    command += ["--apply={'frozen': True}", '--batch=1', '--rounds=1', '--threads=1']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'compact' in done.stdout


def test_a_network_without_onnx_is_timed_by_xla(folder, monkeypatch):
    def refused(*args, **kwargs):
        raise jaxkd.ExportError('onnx', 'no such operation')

    monkeypatch.setattr(export, 'missing', lambda name: 'absent' if name == 'tflite' else None)
    monkeypatch.setitem(export.FORMATS, 'onnx', refused)
    with pytest.warns(UserWarning, match='ONNX Runtime is left out: onnx: no such operation'):
        rows = benchmark.measure(jaxkd.load('known'), rounds=1)
    assert [(row.network, row.runtime) for row in rows] == [('full', 'XLA'), ('compact', 'XLA')]


def test_layers(folder, capsys):
    if export.missing('onnx'):
        pytest.skip(export.missing('onnx'))
    flags = ['known', '--batch=2', '--rounds=1', '--layers=3', '--out=layers.json']
    assert benchmark.main(flags) == 0
    lines = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert lines.count(['known', 'compact', '2']) == 3
    rows = json.loads((folder / 'layers.json').read_text())['layers']
    for network in ('full', 'compact'):
        own = [row for row in rows if row['network'] == network]
        assert sum(row['share'] for row in own) == pytest.approx(1)
        times = [row['milliseconds'] for row in own]
        assert times == sorted(times, reverse=True) and len(times) > 19
        assert sum('Conv' in row['kind'] and row['shape'][0] == 2 for row in own) == 19


@pytest.mark.parametrize(
    ('flags', 'status', 'words'),
    [
        ([], 2, ['DIR']),
        (['nowhere'], 1, ['nowhere']),
        (['own'], 1, ['own_net:Net', 'model']),
        (['own', '--model=own_net:Net', '--batch=1'], 2, ['--apply', 'frozen']),
        (['known', '--batch', '1', '0'], 2, ['--batch is 0', 'at least 1']),
        (['known', '--out=no/a.json'], 2, ['--out', 'no folder no']),
        (['own_net.py'], 1, ['own_net.py: is a file']),
        (['known', '--threads=0'], 2, ['--threads']),
        (['known', '--layers=0'], 2, ['--layers', 'at least 1']),
        (['known', '--layers=3'], 2, ['--layers', "pip install 'jaxkd[export]'"]),
    ],
)
def test_wrong_input_is_one_sentence(folder, capsys, monkeypatch, flags, status, words):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda _: None)
    try:
        returned = benchmark.main(flags)
    except SystemExit as stop:  # argparse
        returned = stop.code
    err = capsys.readouterr().err
    assert (returned, err.count('\n')) == (status, 1), err
    assert err.startswith('jaxkd: ') and all(word in err for word in words), err
