"""Metrics on disk and on boards."""

import glob
import json
import math
import resource
import struct
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from jaxkd import errors, metrics


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
    with metrics.MetricsLog(tmp_path / 'new' / 'run') as log:
        log.write({**row('teacher', 1), 'accuracy': np.float32(0.25), 'note': 'first'})
        # A row is on disk at once, not only when the log is closed.
        assert len(metrics.read_metrics(tmp_path / 'new' / 'run')) == 1
        log.write({**row('teacher', np.int64(2), jnp.asarray(math.nan)), 'grad': -math.inf})
    rows = metrics.read_metrics(tmp_path / 'new' / 'run')
    assert rows == [
        {'stage': 'teacher', 'step': 1, 'loss': 0.5, 'accuracy': 0.25, 'note': 'first'},
        {'stage': 'teacher', 'step': 2, 'loss': None, 'grad': None},
    ]
    assert read_events(tmp_path / 'new' / 'run') == {
        ('teacher/loss', 1, 0.5),
        ('teacher/accuracy', 1, 0.25),
    }
    assert metrics.read_metrics(tmp_path) == []


@pytest.mark.parametrize(
    'bad', [{'step': 1}, {'stage': 'a', 'step': 1.5}, {'stage': 'a', 'step': 1, 'x': np.ones(2)}]
)
def test_what_is_no_row_is_refused_and_leaves_no_trace(bad, tmp_path):
    with metrics.MetricsLog(tmp_path) as log:
        with pytest.raises(ValueError, match='row needs|numbers and texts'):
            log.write(bad)
        log.write(row('a', 1))
    assert metrics.read_metrics(tmp_path) == [row('a', 1)]


def test_a_resumed_run_leaves_what_an_unkilled_one_leaves(tmp_path):
    stages = ['teacher', 'search']

    def run(workdir, stage, start, stop):
        before = [row(stage, step, step / 8) for step in range(1, start + 1)]
        with metrics.MetricsLog(workdir) as log:
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
    assert len(metrics.read_metrics(killed)) == 8
    run(killed, 'search', 2, 4)
    assert metrics.read_metrics(killed) == metrics.read_metrics(tmp_path / 'whole')
    assert read_events(killed) == read_events(tmp_path / 'whole')
    assert len(read_events(killed)) == 9

    run(killed, 'teacher', 3, 5)  # the last save of the teacher was the only one left
    assert metrics.read_metrics(killed) == [row('teacher', n, n / 8) for n in range(1, 6)]
    assert len(read_events(killed)) == 5
    assert {path.name.split('.')[0] for path in killed.iterdir()} == {'metrics', 'events'}


def test_damaged_lines_are_reported_and_put_right_by_whoever_has_the_rows(tmp_path):
    good = json.dumps(row('a', 1))
    (tmp_path / 'metrics.jsonl').write_text(f'{good}\n{good[:9]}\n{good}\n')
    with pytest.raises(errors.CheckpointError, match='metrics.jsonl: line 2 is damaged'):
        metrics.read_metrics(tmp_path)
    said = []
    with metrics.MetricsLog(tmp_path, say=said.append) as log:
        assert len(said) == 1 and 'metrics.jsonl: line 2 is damaged' in said[0]
        log.put('a', [row('a', 1), row('a', 3)])
    assert metrics.read_metrics(tmp_path) == [row('a', 1), row('a', 3)]
    # A whole line that lacks nothing but its end is kept.
    (tmp_path / 'metrics.jsonl').write_text(f'{good}\n{good}')
    with metrics.MetricsLog(tmp_path) as log:
        log.write(row('a', 2))
    assert metrics.read_metrics(tmp_path) == [row('a', 1), row('a', 1), row('a', 2)]


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
    boards = [metrics.wandb('small', {'seed': 0}, ('teacher', 'search'))]
    for step in (1, 2):  # a run, and the same one going on
        with metrics.MetricsLog(tmp_path / 'run', boards) as log:
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
        metrics.wandb('small', {}, ())


def test_a_full_disk_is_heard_of_at_once(tmp_path):
    """A limit on the size of files stands for it: of the log, and of the event files."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    values = {f'value_{i}': 0.1 for i in range(20)}  # fill more of the event file
    for many in ({}, values):
        workdir = tmp_path / str(len(many))
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
            with pytest.raises(OSError, match='large'), metrics.MetricsLog(workdir) as log:
                for step in range(100):
                    log.write(row('a', step) | many)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        rows = metrics.read_metrics(workdir)
        assert rows == [row('a', step) | many for step in range(len(rows))] != []
