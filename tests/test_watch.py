"""What takes time, progress lines, and the final table."""

import doctest
import io
import math
import os
import pty
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import pytest

from jaxkd import errors, watch

# Speed


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


def test_stages_to_come_will_compile_too():
    now = [0.0]
    stages = [('teacher', 4), ('search', 2), ('distil', 1)]
    with watch.Display(stages, stream=io.StringIO(), clock=lambda: now[0]) as display:
        display.first_step('teacher', 20.0)
        for step in (1, 2):
            now[0] += 1
            display.update('teacher', step)
        assert (display.eta('teacher'), display.eta()) == (2.0, 5 + 2 * 20)
        display.finish('teacher')
        display.start('search')
        assert display.eta() == 3 + 2 * 20
        now[0] += 15
        assert (display.eta('search'), display.eta()) == (2 + 5, 3 + 20 + 5)
        display.first_step('search', 15.0)
        assert display.eta() == 3 + 15


def test_a_stage_of_a_few_steps_is_profiled_too(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(jax.profiler, 'start_trace', lambda folder: called.append('start'))
    monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: called.append('stop'))
    for steps, told in ((3, 'start 0 1 2 stop'), (7, '0 1 start 2 3 4 5 6 stop')):
        called.clear()
        for batch in watch.profiled(range(steps), steps, tmp_path, lambda: None):
            called.append(str(batch))
        assert ' '.join(called) == told


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
