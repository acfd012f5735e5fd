"""The command that times compact networks beside the full ones."""

import functools
import json
import subprocess
import sys

from flax import linen as nn
import jax
import numpy as np
import pytest

import jaxkd
from jaxkd import benchmark, models

MODULE = """
from flax import linen as nn


class Net(nn.Module):
    @nn.compact
    def __call__(self, image, deterministic):
        x = nn.relu(nn.Conv(64, (3, 3), name='first')(image))
        x = nn.relu(nn.Conv(64, (3, 3), name='second')(x))
        return nn.Dense(5, name='head')(x.mean((1, 2)))
"""


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """What jaxkd.save wrote: `own`, of a model that jaxkd doesn't know, and `known`."""
    folder = tmp_path_factory.mktemp('saved')
    (folder / 'own_net.py').write_text(MODULE)
    image = np.zeros((2, 32, 32, 3), np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        import own_net
    for name, model, flags in (
        ('own', own_net.Net(), {'deterministic': True}),
        ('known', models.create('resnet20', num_classes=3), {'train': False}),
    ):
        init = jax.jit(functools.partial(model.init, **flags))
        variables = init(jax.random.key(0), image)
        small = jaxkd.prune(model, variables, image, flops=0.3, criterion='l1', **flags)
        jaxkd.save(folder / name, small)
    return folder, own_net.Net()


@pytest.fixture
def folder(made, monkeypatch):
    monkeypatch.chdir(made[0])
    return made[0]


def test_both_networks_are_timed(folder, capsys):
    flags = ['known', '--batch', '1', '3', '--rounds=2', '--out=found.json']
    assert benchmark.main(flags) == 0
    said = capsys.readouterr().out
    assert 'known   compact      3' in said and 'wrote found.json' in said
    found = json.loads((folder / 'found.json').read_text())
    assert found['runtime'] == 'XLA' and found['threads'] >= 1
    rows = found['rows']
    words = [(row['network'], row['batch']) for row in rows]
    assert words == [('full', 1), ('compact', 1), ('full', 3), ('compact', 3)]
    for full, compact in (rows[:2], rows[2:]):
        assert full['speedup'] == full['of_saving'] == 1.0
        assert compact['flops'] <= 0.3 * full['flops']
        share = compact['flops'] / full['flops']
        assert compact['of_saving'] == pytest.approx(compact['speedup'] * share)
        assert all(row['spread'][0] <= row['milliseconds'] <= row['spread'][1] for row in rows)


def test_own_model(folder, made):
    small = jaxkd.load('own', model=made[1])
    rows = benchmark.measure(small, batch_size=32, rounds=20, deterministic=True)
    # 0.3 of the multiply-adds, in layers of which they are the most work.
    assert rows[1].milliseconds < rows[0].milliseconds
    assert isinstance(benchmark.full_module(small), nn.Module)
    command = [sys.executable, '-m', 'jaxkd.benchmark', 'own', '--model=own_net:Net']
    command += ["--apply={'deterministic': True}", '--batch=1', '--rounds=1', '--threads=1']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'compact' in done.stdout


@pytest.mark.parametrize(
    ('flags', 'status', 'words'),
    [
        ([], 2, ['DIR']),
        (['nowhere'], 1, ['nowhere']),
        (['own'], 1, ['own_net:Net', 'model']),
        (['own', '--model=own_net:Net', '--batch=1'], 2, ['--apply', 'deterministic']),
        (['known', '--batch', '0'], 2, ['--batch', 'at least 1']),
        (['known', '--threads=0'], 2, ['--threads']),
    ],
)
def test_wrong_input_is_one_sentence(folder, capsys, flags, status, words):
    try:
        returned = benchmark.main(flags)
    except SystemExit as stop:  # argparse
        returned = stop.code
    err = capsys.readouterr().err
    assert (returned, err.count('\n')) == (status, 1), err
    assert err.startswith('jaxkd: ') and all(word in err for word in words), err
