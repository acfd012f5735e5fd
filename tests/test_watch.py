"""Metrics on disk, progress lines, and the final table."""

import doctest
import glob
import io
import json
import math
import os
import pty
import re
import resource
import struct
import subprocess
import sys
import textwrap
import types

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from jaxkd import errors, watch

# Metrics


def read_events(workdir):
    """All scalars in TensorBoard's files: a set of (tag, step, value)."""
    found = []
    for path in glob.glob(f'{workdir}/events.*'):
        with open(path, 'rb') as file:
            content = file.read()
        # Records: length (8 bytes), its checksum (4), the event, its checksum (4).
        position = 0
        while position < len(content):
            (length,) = struct.unpack_from('<Q', content, position)
            event = event_pb2.Event.FromString(content[position + 12 : position + 12 + length])
            for value in event.summary.value:
                found.append((value.tag, event.step, round(value.simple_value, 6)))
            position += length + 16
    assert len(found) == len(set(found))
    return set(found)


def row(stage, step, loss=0.5):
    return {'stage': stage, 'step': step, 'loss': loss}


def test_metrics_are_read_back_as_written(tmp_path):
    with watch.MetricsLog(tmp_path / 'new' / 'run') as log:
        log.write({**row('teacher', 1), 'accuracy': np.float32(0.25), 'note': 'first'})
        # A row is on disk at once, not only when the log is closed.
        assert len(watch.read_metrics(tmp_path / 'new' / 'run')) == 1
        log.write({**row('teacher', np.int64(2), jnp.asarray(math.nan)), 'grad': -math.inf})
    rows = watch.read_metrics(tmp_path / 'new' / 'run')
    assert rows == [
        {'stage': 'teacher', 'step': 1, 'loss': 0.5, 'accuracy': 0.25, 'note': 'first'},
        {'stage': 'teacher', 'step': 2, 'loss': None, 'grad': None},
    ]
    assert read_events(tmp_path / 'new' / 'run') == {
        ('teacher/loss', 1, 0.5),
        ('teacher/accuracy', 1, 0.25),
    }
    assert watch.read_metrics(tmp_path) == []


@pytest.mark.parametrize(
    'bad', [{'step': 1}, {'stage': 'a', 'step': 1.5}, {'stage': 'a', 'step': 1, 'x': np.ones(2)}]
)
def test_what_is_no_row_is_refused_and_leaves_no_trace(bad, tmp_path):
    with watch.MetricsLog(tmp_path) as log:
        with pytest.raises(ValueError, match='row needs|numbers and texts'):
            log.write(bad)
        log.write(row('a', 1))
    assert watch.read_metrics(tmp_path) == [row('a', 1)]


def test_a_resumed_run_leaves_what_an_unkilled_one_leaves(tmp_path):
    stages = ['teacher', 'search']

    def run(workdir, stage, start, stop):
        before = [row(stage, step, step / 8) for step in range(1, start + 1)]
        with watch.MetricsLog(workdir) as log:
            log.put(stage, before, later=stages[stages.index(stage) + 1 :])
            for step in range(start + 1, stop + 1):
                written = log.write(row(stage, step, step / 8))
                assert log.rows(stage)[-1] == written

    run(tmp_path / 'whole', 'teacher', 0, 5)
    run(tmp_path / 'whole', 'search', 0, 4)

    killed = tmp_path / 'killed'
    run(killed, 'teacher', 0, 5)
    run(killed, 'search', 0, 3)
    with open(killed / 'metrics.jsonl', 'a') as file:
        file.write('{"stage": "search", "st')  # killed while writing
    assert len(watch.read_metrics(killed)) == 8
    run(killed, 'search', 2, 4)
    assert watch.read_metrics(killed) == watch.read_metrics(tmp_path / 'whole')
    assert read_events(killed) == read_events(tmp_path / 'whole')
    assert len(read_events(killed)) == 9

    run(killed, 'teacher', 3, 5)  # the last save of the teacher was the only one left
    assert watch.read_metrics(killed) == [row('teacher', n, n / 8) for n in range(1, 6)]
    assert len(read_events(killed)) == 5
    assert {path.name.split('.')[0] for path in killed.iterdir()} == {'metrics', 'events'}


def test_damaged_lines_are_reported_and_put_right_by_whoever_has_the_rows(tmp_path):
    good = json.dumps(row('a', 1))
    (tmp_path / 'metrics.jsonl').write_text(f'{good}\n{good[:9]}\n{good}\n')
    with pytest.raises(errors.CheckpointError, match='metrics.jsonl: line 2 is damaged'):
        watch.read_metrics(tmp_path)
    said = []
    with watch.MetricsLog(tmp_path, say=said.append) as log:
        assert len(said) == 1 and 'metrics.jsonl: line 2 is damaged' in said[0]
        log.put('a', [row('a', 1), row('a', 3)])
    assert watch.read_metrics(tmp_path) == [row('a', 1), row('a', 3)]
    # A whole line that lacks nothing but its end is kept.
    (tmp_path / 'metrics.jsonl').write_text(f'{good}\n{good}')
    with watch.MetricsLog(tmp_path) as log:
        log.write(row('a', 2))
    assert watch.read_metrics(tmp_path) == [row('a', 1), row('a', 1), row('a', 2)]


class FakeRun:
    def __init__(self, **arguments):
        self.arguments, self.metrics, self.rows, self.finished = arguments, [], [], False

    def define_metric(self, *names, **settings):
        self.metrics.append((names, settings))

    def log(self, row):
        self.rows.append(row)

    def finish(self):
        self.finished = True


def test_weights_and_biases_draws_what_is_written(tmp_path, monkeypatch):
    runs = []

    def init(**arguments):
        runs.append(FakeRun(**arguments))
        return runs[-1]

    monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=init))
    boards = [watch.wandb('small', {'seed': 0}, ('teacher', 'search'))]
    for step in (1, 2):  # a run, and the same one going on
        with watch.MetricsLog(tmp_path / 'run', boards) as log:
            log.write({**row('teacher', step), 'note': 'text'})
    first, second = runs
    assert first.arguments['project'] == 'small' and first.arguments['config'] == {'seed': 0}
    assert first.arguments['id'] == second.arguments['id'] and first.finished
    assert first.rows == [{'teacher/loss': 0.5, 'teacher/step': 1}]
    assert second.rows == [{'teacher/loss': 0.5, 'teacher/step': 2}]
    assert (('search/*',), {'step_metric': 'search/step'}) in first.metrics
    assert not list((tmp_path / 'run').glob('events.*'))


def test_weights_and_biases_has_to_be_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    with pytest.raises(errors.ConfigError, match='pip install wandb'):
        watch.wandb('small', {}, ())


def test_a_stopwatch_tells_waiting_and_compiling_from_steps(monkeypatch):
    now, compiled = [0.0], [7.0]
    monkeypatch.setattr(watch.time, 'monotonic', lambda: now[0])
    monkeypatch.setattr(watch.device, 'compile_seconds', lambda: compiled[0])
    stopwatch = watch.Stopwatch()

    def batches():
        for number in range(4):
            now[0] += 0.5
            yield number

    for number in stopwatch.waiting(batches()):
        now[0] += 1.0
        if number == 1:
            now[0] += 10.0
            compiled[0] += 10.0
    told = stopwatch.read(4, 32)
    assert told.pop('memory_bytes') > 1e6
    assert told == {
        'examples_per_second': 32 / 6,
        'step_seconds': 1.5,
        'data_seconds': 0.5,
        'compile_seconds': 10.0,
    }
    stopwatch.start()
    now[0] += 1.0
    assert stopwatch.read(1, 8)['data_seconds'] == stopwatch.read(1, 8)['compile_seconds'] == 0


def test_a_full_disk_is_heard_of_at_once(tmp_path):
    """A limit on the size of files stands for it: of the log, and of the event files."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    values = {f'value_{i}': 0.1 for i in range(20)}  # fill more of the event file
    for many in ({}, values):
        workdir = tmp_path / str(len(many))
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
            with pytest.raises(OSError, match='large'), watch.MetricsLog(workdir) as log:
                for step in range(100):
                    log.write(row('a', step) | many)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        rows = watch.read_metrics(workdir)
        assert rows == [row('a', step) | many for step in range(len(rows))] != []


# Progress


def play(speeds, *, stages, full=None, done=0):
    """Runs a display without a terminal on a clock of its own; returns the lines."""
    now = [0.0]
    stream = io.StringIO()
    with watch.Display(stages, stream=stream, full=full, clock=lambda: now[0]) as display:
        for (name, total, *_), seconds in zip(stages, speeds):
            display.start(name, done)
            now[0] += 30  # compiling
            for step in range(done + 1, total + 1):
                now[0] += seconds
                display.update(name, step, loss=jnp.asarray(1 / step), alive_flops=300e6 / step)
            display.finish(name)
            done = 0
    return stream.getvalue().splitlines()


def test_lines_are_few_and_have_what_matters():
    lines = play([1, 2], stages=[('teacher', 60), ('search', 20, 2.0)], full={'alive_flops': 300e6})
    assert lines[0] == '[teacher 1/60 1%] loss 1 flops 300.0M (100.0%)'
    assert lines[1].startswith('[teacher 11/60 18%] loss 0.0909 flops 27.3M (9.1%) ')
    # 49 steps of 1 s and, at twice the cost, 20 steps of 2 s. Compiling is not counted.
    assert lines[1].endswith(' eta 49s, all 1m29s')
    # First, one each 10 s, last.
    steps = [int(re.search(r' (\d+)/', line)[1]) for line in lines]
    assert steps == [1, 11, 21, 31, 41, 51, 60, 1, 6, 11, 16, 20]
    assert lines[6].endswith(' eta 0s, all 40s')
    assert lines[8].endswith(' eta 28s, all 28s')
    assert lines[-1].startswith('[search 20/20 100%]') and lines[-1].endswith('eta 0s, all 0s')


def test_a_resumed_run_starts_in_the_middle():
    lines = play([1], stages=[('search', 40)], done=20)
    assert lines[0].startswith('[search 21/40 52%]')
    assert lines[1].endswith('eta 9s, all 9s')

    stream = io.StringIO()
    with watch.Display([('teacher', 10), ('search', 10)], stream=stream) as display:
        display.finish('teacher')
        display.message('search: going on at step 5 of [10]')
        assert display.eta() is None
        with pytest.raises(errors.ConfigError, match='did you mean search'):
            display.update('serch', 1)
    assert stream.getvalue() == '[teacher] done before\nsearch: going on at step 5 of [10]\n'


def test_values_are_for_people():
    assert not doctest.testmod(watch).failed
    stream = io.StringIO()
    with watch.Display([('a', 9)], stream=stream) as display:
        values = {'accuracy': 0.97126, 'lambda': 1.234e-5, 'examples_per_second': 1234.5}
        display.update('a', 9, alive_flops=0.5, params=2_240_000, hint=None, x=math.nan, **values)
    assert stream.getvalue() == (
        '[a 9/9 100%] flops 50.0% params 2.2M x nan accuracy 0.9713 lambda 1.23e-05 '
        '1.2k examples/s\n'
    )


def test_a_terminal_shows_every_stage_and_is_given_back_after_an_error():
    """In a pseudo-terminal: live lines, messages above them, and the cursor shown again."""
    script = """
        import sys, time
        from jaxkd import watch
        with watch.Display([('teacher', 4), ('search', 4)]) as display:
            for step in range(1, 5):
                time.sleep(0.6)
                display.update('teacher', step, loss=0.125, alive_flops=0.5)
            display.finish('teacher')
            display.message('a [bold] message')
            raise RuntimeError('in the middle')
    """
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, '-c', textwrap.dedent(script)],
        stdout=follower,
        stderr=follower,
        env={**os.environ, 'TERM': 'xterm-256color', 'COLUMNS': '100', 'JAX_PLATFORMS': 'cpu'},
    )
    os.close(follower)
    output = b''
    while True:
        try:
            chunk = os.read(leader, 4096)
        except OSError:  # how Linux says that the other end is closed
            break
        if not chunk:
            break
        output += chunk
    os.close(leader)
    assert process.wait() == 1
    text = output.decode()
    assert text.rindex('\x1b[?25h') > text.rindex('\x1b[?25l')  # the cursor, shown after hidden
    plain = re.sub(r'\x1b\[[0-9;?]*[a-zA-Z]', '', text)
    assert re.search(r'teacher ━+ +4/4\s+done\s+loss 0.125 flops 50.0%', plain)
    assert re.search(r'search\s.*0/4', plain) and re.search(r'all\s+\d+s', plain)
    assert 'a [bold] message' in plain and 'RuntimeError: in the middle' in plain


# The final table


def test_compare_puts_both_networks_beside_each_other():
    report = {
        'teacher': {
            'accuracy': 0.9412,
            'flops': 312_000_000,
            'params': 2_240_000,
            'activations': 5_300_000,
            'milliseconds': 148.0,
        },
        'compact': {'accuracy': 0.952, 'flops': 156_000_000, 'params': 430_769},
        'inference_batch': 64,
        'latency': {'measured': {'teacher': 0.004, 'compact': 0.003, 'ratio': 0.75}},
    }
    lines = watch.compare(report, stream=io.StringIO()).split('\n')
    assert [line.split('  ')[0] for line in lines[1:]] == [
        'accuracy',
        'FLOPs (multiply-adds)',
        'parameters',
        'activations (bytes)',
        'inference of 64 (ms)',
        'latency of 1, measured (ms)',
    ]
    assert lines[1].split()[1:] == ['94.12%', '95.20%', '+1.08', 'points']
    assert lines[2].split()[-3:] == ['312.0M', '156.0M', '1/2.00']
    assert lines[3].split()[-1] == '1/5.20'
    assert lines[4].split()[-3:] == ['5.3M', '-', '-']
    assert lines[6].split()[-3:] == ['4', '3', '1/1.33']
    assert len({len(line) for line in lines}) == 1

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    drawn = watch.compare(report, stream=Terminal())
    assert '\x1b[' in drawn and '1/5.20' in drawn and len(drawn.split('\n')) == 10
