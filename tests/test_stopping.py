"""Signals: the first waits for what is to be saved, the second does not."""

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import hashlib, os, signal, sys, time
from jaxkd import errors, stopping

stops = stopping.Requests()
with stops.listening('here'):
    # That a forked worker is ended is no request.
    begun, begin = os.pipe()
    worker = os.fork()
    if not worker:
        os.write(begin, b'.')
        time.sleep(60)
        os._exit(1)
    os.read(begun, 1)
    os.kill(worker, signal.SIGTERM)
    assert os.WTERMSIG(os.wait()[1]) == signal.SIGTERM
    assert stops.asked is None
    if 'hold' in sys.argv:
        stops.hold()
    print('ready', flush=True)
    if 'busy' in sys.argv:  # no bytecode of the main thread runs meanwhile, as in a compiler
        hashlib.pbkdf2_hmac('sha256', b'', b'', 10**8)
    time.sleep(2)
    try:
        stops.release()
    except errors.Stopped as error:
        print(error, file=sys.stderr)
        sys.exit(stopping.status(error.signal))
"""


@pytest.mark.parametrize(
    ('arguments', 'signals', 'status', 'words'),
    [
        ((), [signal.SIGTERM], 143, ['the same command goes on from here']),
        (('busy',), [signal.SIGINT], 130, ['the same command goes on from here']),
        (('hold',), [signal.SIGTERM], 143, ['SIGTERM: this step is', 'stopped by SIGTERM at the']),
        (('hold',), [signal.SIGTERM, signal.SIGINT], 130, ['once more', 'the same command goes']),
    ],
)
def test_signals(arguments, signals, status, words):
    process = subprocess.Popen(
        [sys.executable, '-c', PROGRAM, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever runs the tests in the background may have them ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == 'ready\n'
    for number in signals:
        process.send_signal(number)
        if len(signals) > 1 and number == signals[0]:
            assert words[0] in process.stderr.readline()
    _, said = process.communicate(timeout=60)
    assert process.returncode == status
    said = said.splitlines()
    assert len(said) == len(words) - (len(signals) - 1)
    assert all(word in line for word, line in zip(words[len(signals) - 1 :], said))
