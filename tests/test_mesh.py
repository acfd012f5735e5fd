"""Devices and processes: how many there are changes nothing but rounding."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import mbv2
from jaxkd import data, errors, hosts, metrics, train, watch
from jaxkd import mesh as meshes
from jaxkd import plan as planning
from tests import test_train

ROOT = pathlib.Path(__file__).resolve().parent.parent
EIGHT = jax.sharding.AbstractMesh((8,), ('data',))
RULES = (('Conv_0/kernel', (None, None, None, 'data')), ('Dense', ('data',)))


def _spec(shardings):
    return jax.tree.map(lambda sharding: tuple(sharding.spec), shardings)


def test_what_belongs_to_a_parameter_lies_where_it_does():
    model = test_train.Tiny()
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    tx = train.optimizer(test_train.CONFIG, lambda step: 0.1)
    state = train.create_state(variables, tx)
    found = _spec(meshes.shardings(state, state.params, EIGHT, RULES))
    conv = {'kernel': (None, None, None, 'data')}
    assert found.params['Conv_0'] == conv
    assert found.params['Dense_0'] == {'bias': (), 'kernel': ('data',)}  # 10 do not divide by 8
    assert found.params['BatchNorm_0'] == {'bias': (), 'scale': ()}
    assert found.ema['params'] == found.opt_state[1][0].trace == found.params
    assert found.step == () and set(jax.tree.leaves(found.batch_stats)) <= {()}
    for part in (found.ema['batch_stats'], found.batch_stats):
        assert part == {'BatchNorm_0': {'mean': (), 'var': ()}}
    # Cut to five channels, it is everywhere.
    cut = {'Conv_0': {'kernel': np.zeros((3, 3, 1, 5))}}
    assert _spec(meshes.shardings(cut, cut, EIGHT, RULES)) == {'Conv_0': {'kernel': ()}}
    none = {'Conv_0': {'kernel': np.zeros((3, 3, 1, 0))}}
    assert _spec(meshes.shardings(none, none, EIGHT, RULES)) == {'Conv_0': {'kernel': ()}}


@pytest.mark.parametrize(
    ('rules', 'words'),
    [
        ((('Dense_7', ('data',)),), ['Dense_7', 'matches no parameter', 'stem/kernel']),
        ((('stem', ()), ('stem/k', ())), ['stem/k', 'that is left']),
        ((('kernel', ('data',)),), ['stem/kernel is [3, 3, 1, 8]', '8 devices']),
        ((('bias', (None, 'data')),), ['stem/bias is [8]']),
        ((('bias', ('model',)),), ['bias', 'model', 'data']),
        ((('kernel', (None, None, 'data', 'data')),), ['twice']),
        ((('kernel', 'data'),), ['kernel', 'tuple']),
        ((('(', ()),), ['(', 'no pattern']),
        (('kernel', ()), ['pairs']),
    ],
)
def test_rules_that_cannot_be(rules, words):
    params = {'stem': {'kernel': np.zeros((3, 3, 1, 8)), 'bias': np.zeros(8)}}
    with pytest.raises(errors.ConfigError) as error:
        meshes.check(rules, params, EIGHT)
    assert all(word in str(error.value) for word in words), str(error.value)
    meshes.check((('kernel', (None, None, None, 'data')), ('.*', ())), params, EIGHT)


@pytest.mark.parametrize(
    ('changes', 'field'),
    [
        ({'compute_dtype': 'float8'}, 'compute_dtype'),
        ({'sharding': (('nothing', ()),)}, 'sharding'),
        ({'search.accumulate': 3}, 'search.batch_size'),
        ({'distil.accumulate': 0}, 'distil.accumulate'),
    ],
)
def test_a_plan_is_refused(changes, field):
    config = mbv2.get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(errors.ConfigError, match=field):
        planning.make_plan(config)


def test_processes_are_all_told_or_none():
    with pytest.raises(errors.ConfigError, match='--process '):
        hosts.join('127.0.0.1:1', 2)
    with pytest.raises(errors.ConfigError, match='HOST:PORT'):
        hosts.join('127.0.0.1', 2, 0)


def steps():
    """Losses of steps on digits, and what the last state evaluates to: replicated, and by rules."""
    mesh = meshes.make_mesh()
    model = test_train.Tiny()
    tx = train.optimizer(test_train.CONFIG, train.learning_rate(test_train.CONFIG, 40, 20))
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    split = data.load('digits', 'train')
    evaluate = train.make_eval_step(model, test_train.PREPROCESSING, mesh)
    found = {'devices': jax.device_count()}
    for name, rules, part in (('whole', (), split), ('ruled', RULES, split._replace(images=None))):
        examples = train.put(part, mesh)
        state = train.create_state(variables, tx)
        state = meshes.place(state, state.params, mesh, rules)
        step = train.make_train_step(
            model,
            tx,
            train.hard_loss(0.0),
            test_train.PREPROCESSING,
            mesh,
            seed=0,
            ema_decay=0.9,
            accumulate=2,
            layout=jax.tree.map(lambda leaf: leaf.sharding, state),
        )
        losses = []
        for batch in train.batches(examples, 64, mesh, seed=0, start=0, stop=6):
            state, metrics = step(state, batch, {}, {})
            losses.append(float(metrics['loss']))
        result = train.evaluate(evaluate, train.averaged(state), examples, 64, mesh)
        kernels = [
            tree['Conv_0']['kernel'].addressable_shards[0].data.shape
            for tree in (state.params, state.ema['params'], state.opt_state[1][0].trace)
        ]
        found[name] = {'numbers': [*losses, result['loss']], 'kernels': kernels}
    return found


def _environment(devices):
    return os.environ | {
        'JAX_NUM_CPU_DEVICES': str(devices),
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': '--xla_backend_optimization_level=0',  # compiles in half the time
        'PYTHONPATH': str(ROOT),
    }


def test_number_of_devices_does_not_change_the_steps():
    program = 'import json; from tests import test_mesh; print(json.dumps(test_mesh.steps()))'
    output = subprocess.run(
        [sys.executable, '-c', program],
        env=_environment(8),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    many, one = json.loads(output.splitlines()[-1]), steps()
    assert (many['devices'], one['devices']) == (8, 1)
    assert many['whole']['kernels'] == [[3, 3, 1, 8]] * 3
    assert many['ruled']['kernels'] == [[3, 3, 1, 1]] * 3
    for found in (many['whole'], many['ruled'], one['ruled']):
        np.testing.assert_allclose(found['numbers'], one['whole']['numbers'], rtol=2e-4)


class Run:
    """A run of the command line as so many processes."""

    def __init__(self, workdir, processes, devices, *flags):
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        command = [
            sys.executable,
            '-m',
            'jaxkd.main',
            '--config=tests/tiny.py',
            '--config.search.shrink=0.65',
            '--config.teacher.accumulate=2',
            "--config.sharding=(('Conv_./kernel', (None, None, None, 'data')),)",
            f'--workdir={workdir}',
            *flags,
        ]
        several = [
            '--distributed',
            f'--coordinator=127.0.0.1:{port}',
            f'--processes={processes}',
        ]
        self.processes = [
            subprocess.Popen(
                [*command, *([*several, f'--process={i}'] if processes > 1 else [])],
                env=_environment(devices),
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(processes)
        ]

    def kill(self):
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
        for process in self.processes:
            process.communicate()

    def end(self):
        """Exit statuses, and the lines of each process, without those of its collectives."""
        outputs = [process.communicate(timeout=600) for process in self.processes]
        lines = [
            [line for part in output for line in part.splitlines() if '[Gloo]' not in line]
            for output in outputs
        ]
        return [process.returncode for process in self.processes], lines


def test_two_processes_killed_and_resumed_end_where_one_does(tmp_path):
    """Two devices each, parameters split over all four, cut to widths that four do not divide;
    through the command line, against one process with one device."""
    workdir = tmp_path / 'two'
    alone, killed = Run(tmp_path / 'alone', 1, 1), Run(workdir, 2, 2)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and killed.processes[0].poll() is None:
        if any(entry.name.isdigit() for entry in (workdir / 'search').glob('*')):
            break
        time.sleep(0.02)
    assert killed.processes[0].poll() is None, 'the run ended before the search saved a state'
    killed.kill()
    statuses, lines = Run(workdir, 2, 2).end()
    assert statuses == [0, 0], lines
    assert any('search: going on at step' in line for line in lines[0])
    assert any('compact network' in line for line in lines[0]) and not lines[1]
    assert alone.end()[0] == [0]

    rows, expected = (metrics.read_metrics(folder) for folder in (workdir, tmp_path / 'alone'))
    for row in (*rows, *expected):
        for key in watch.PERFORMANCE:
            row.pop(key, None)
        row['stage'] = ('teacher', 'search', 'distil').index(row['stage'])
    assert [row.keys() for row in rows] == [row.keys() for row in expected]
    for row, one in zip(rows, expected, strict=True):
        assert row == pytest.approx(one, rel=1e-3)
    report, one = (
        json.loads((folder / 'report.json').read_text()) for folder in (workdir, tmp_path / 'alone')
    )
    assert report['device'].startswith('4') and one['device'].startswith('1')
    assert report['blocks'] == one['blocks']
    assert any(row['kept'] % 4 for row in report['blocks'])
    for name in ('teacher', 'compact'):
        assert report[name]['accuracy'] == pytest.approx(one[name]['accuracy'], abs=2 / 540)
        assert np.sum(report['confusion'][name]) == 540
    assert (workdir / 'compact').is_dir() and (workdir / 'search.png').exists()

    statuses, lines = Run(workdir, 2, 2, '--config.seed=5').end()
    assert statuses == [2, 2] and not lines[1], lines
    assert len(lines[0]) == 1 and 'seed (0 there, 5 now)' in lines[0][0]
