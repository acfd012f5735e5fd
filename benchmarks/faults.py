"""Runs that are killed, damaged and denied disk space at random: what becomes of them.

    python benchmarks/faults.py [--kills 50] [--damages 20] [--seed 0] [--out FILE]

All stages of configs/mbv2.py on digits, with a narrow network and few epochs, saving at every
chance. One run is left alone. Others are killed (SIGKILL, SIGTERM) after a random time, or at the
moment when a stage's result, the compact network or the report appears; between two starts a random
file of the workdir may be truncated, have a bit flipped or be deleted; a start may find the disk
full, as a limit on the size of its files. Then the same command goes on. In the end each run's
report, log and compact network must be those of the run that was left alone, to the bit but for
times; or a start refuses, with one sentence and a status that is not 0: the damage is then undone,
and the run goes on. All else is a loss: another result, a traceback, a hang, a refusal without a
fault, or a wrong exit status.

What is done to a trial follows from the seed and its number. Trials whose outcome is known from an
earlier report of the same settings are not done again.
"""

from __future__ import annotations

import argparse
import collections
from collections.abc import Iterable
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import machine

from jaxkd import checkpoint, errors, metrics, watch

ROOT = pathlib.Path(__file__).resolve().parent.parent
SETTING = [
    '--config=configs/mbv2.py',
    '--config.model.name=resnet20',
    "--config.model.arguments={'depth': 14}",
    '--config.teacher.epochs=2',
    '--config.search.epochs=2',
    '--config.search.shrink=0.7',
    '--config.distil.epochs=1',
    '--config.log_every=4',
    '--config.checkpoint_seconds=0.0',
]
KILLS_A_TRIAL = 5
# What a kill may wait for, and for how many seconds more at most.
MOMENTS = (
    'teacher/result',
    'search/result',
    'search.png',
    'distil/result',
    'compact',
    '.report.json.{pid}',
)
AFTER = 0.2
# Otherwise it comes after at most this share of the seconds that a run takes that is left alone.
EARLY = 0.6
# How likely a start is to find something damaged, or the disk full, and the logarithms of the least
# and the largest size of files, in bytes, that stands for that.
HURT, FULL, LIMITS = 0.5, 0.2, (3.0, 6.0)
# A process that takes so many times as long as a whole run has hung.
PATIENCE = 20
DAMAGES = ('truncate', 'flip', 'delete')
ENDED = {signal.SIGKILL: (-signal.SIGKILL,), signal.SIGTERM: (143, -signal.SIGTERM)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--kills', type=int, default=50)
    parser.add_argument('--damages', type=int, default=20)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--workdir', type=pathlib.Path, default=pathlib.Path('runs/faults'))
    results = pathlib.Path(__file__).parent / 'results' / 'faults.json'
    parser.add_argument('--out', type=pathlib.Path, default=results)
    arguments = parser.parse_args()

    arguments.workdir.mkdir(parents=True, exist_ok=True)
    whole = arguments.workdir / 'whole'
    start(arguments.workdir, whole).wait()  # which fills the cache of compiled programs
    shutil.rmtree(whole)
    began = time.monotonic()
    if start(arguments.workdir, whole).wait():
        raise RuntimeError('the run that was left alone failed: ' + said(whole)[-1])
    length = time.monotonic() - began
    expected = outcome(whole)

    report: dict[str, Any] = {**machine.about(), 'setting': SETTING, 'seed': arguments.seed}
    trials: list[dict[str, Any]] = []
    before = known(arguments.out, report)
    while True:
        report |= {**summary(trials), 'trials': trials}
        if trials:
            machine.write_report(arguments.out, report)
        kills, damages = (sum(report[what].values()) for what in ('kills', 'damages'))
        if kills >= arguments.kills and damages >= arguments.damages:
            break
        number = len(trials)
        if number < len(before):
            trials.append(before[number])
            continue
        folder = arguments.workdir / str(number)
        shutil.rmtree(folder, ignore_errors=True)
        draw = random.Random(f'{arguments.seed}-{number}')
        began = time.monotonic()
        events = trial(arguments.workdir, folder, draw, length, expected)
        trials.append({'seconds': round(time.monotonic() - began), 'events': events})
        print(json.dumps(trials[-1]), flush=True)
        if not any(event['end'] == 'loss' for event in events):
            shutil.rmtree(folder)
    print({key: value for key, value in report.items() if key != 'trials'})


def known(path: pathlib.Path, report: dict[str, Any]) -> list[dict[str, Any]]:
    """The trials of an earlier report of the same settings."""
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    same = all(found.get(key) == report[key] for key in ('setting', 'seed'))
    return found['trials'] if same else []


def summary(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """What was done and what came of it, counted."""
    events = [event for trial in trials for event in trial['events']]

    def count(values: Iterable[str]) -> dict[str, int]:
        return dict(sorted(collections.Counter(values).items()))

    ends = collections.Counter(event['end'] for event in events)
    return {
        'runs': len(trials),
        'starts': len(events),
        'kills': count(e['kill']['signal'] for e in events if e['end'] == 'killed'),
        'killed in': count(e['stage'] for e in events if e['end'] == 'killed'),
        'full disks': sum('limit' in e and e['end'] == 'refused' for e in events),
        'damages': count(e['damage']['kind'] for e in events if 'damage' in e),
        'damages refused': sum('limit' not in e and e['end'] == 'refused' for e in events),
        'same': ends['same'],
        'losses': ends['loss'],
        'seconds': sum(trial['seconds'] for trial in trials),
    }


def trial(
    base: pathlib.Path,
    folder: pathlib.Path,
    draw: random.Random,
    length: float,
    expected: dict[str, Any],
) -> list[dict[str, Any]]:
    """One run from its first start to its end, and once more: what was done to it, and what it did.

    Args:
      base: holds the cache of compiled programs.
      folder: of the run.
      draw: decides all.
      length: seconds that a run takes that is left alone.
      expected: what has to come out.
    """
    events: list[dict[str, Any]] = []
    undo: dict[pathlib.Path, bytes] = {}

    def attempt(kill: bool, hurt: bool, limit: int | None = None) -> str:
        """One start, after some damage perhaps; in a word, how it ended."""
        event: dict[str, Any] = {}
        # Of a run that has ended, the log is not looked at any more.
        log = not (folder / 'report.json').exists()
        if hurt and (folder / 'config.json').exists():  # not before anything is there
            event['damage'] = damage(folder, draw, undo)
        plan = draw_kill(draw, length) if kill else None
        process = start(base, folder, limit)
        try:
            if plan:
                event['kill'] = send(process, folder, plan)
            status = process.wait(PATIENCE * length)
        except subprocess.TimeoutExpired:
            process.kill()
            status = None
        lines = said(folder)
        event |= {'status': status, 'stage': stage(folder)}
        if limit:
            event['limit'] = limit
        if event.get('kill') and status in ENDED[plan['signal']]:
            event['end'] = 'killed'
        elif status == 0 and same(folder, expected, log):
            event['end'] = 'same'
        elif status in (1, 2) and (undo or limit) and lines[-1].startswith('jaxkd: '):
            event |= {'end': 'refused', 'sentence': lines[-1].replace(f'{ROOT}/', '')}
            if not limit:
                for path, content in undo.items():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
                undo.clear()
        else:
            event['end'] = 'loss'
        if any('Traceback' in line for line in lines):
            event['end'] = 'loss'
        if event['end'] == 'loss':
            event['said'] = lines[-5:]
        events.append(event)
        return event['end']

    for turn in range(KILLS_A_TRIAL):
        if turn and draw.random() < FULL:
            limit = round(10 ** draw.uniform(*LIMITS))
            if attempt(kill=False, hurt=False, limit=limit) in ('same', 'loss'):
                break
        if attempt(kill=True, hurt=turn > 0 and draw.random() < HURT) in ('same', 'loss'):
            break
    for hurt in (draw.random() < HURT, False, True, False):  # to the end; damaged there; and again
        if events[-1]['end'] == 'loss':
            break
        attempt(kill=False, hurt=hurt)
    if events[-1]['end'] != 'same':
        events[-1]['end'] = 'loss'
    return events


def draw_kill(draw: random.Random, length: float) -> dict[str, Any]:
    """Which signal, and when: after some time, or when a path appears and a little later."""
    return {
        'signal': draw.choice((signal.SIGKILL, signal.SIGTERM)),
        'moment': draw.choice((None, draw.choice(MOMENTS))),
        'delay': draw.uniform(0, EARLY) * length,
        'after': draw.uniform(0, AFTER),
    }


def send(
    process: subprocess.Popen, folder: pathlib.Path, plan: dict[str, Any]
) -> dict[str, Any] | None:
    """Sends the signal at its time, unless the process ends before; what was done."""
    began = time.monotonic()
    path = folder / plan['moment'].format(pid=process.pid) if plan['moment'] else None
    if path and path.exists():  # that moment has passed
        path = None
    while process.poll() is None:
        seconds = time.monotonic() - began
        if path.exists() if path else seconds >= plan['delay']:
            time.sleep(plan['after'] if path else 0)
            process.send_signal(plan['signal'])
            moment = plan['moment'] if path else None
            return {'signal': plan['signal'].name, 'seconds': round(seconds, 1), 'moment': moment}
        time.sleep(0.002)
    return None


def damage(
    folder: pathlib.Path, draw: random.Random, undo: dict[pathlib.Path, bytes]
) -> dict[str, str]:
    """Damages a file of the workdir, and remembers what was there."""
    files = sorted(path for path in folder.rglob('*') if path.is_file() and path.stat().st_size)
    path, kind = draw.choice(files), draw.choice(DAMAGES)
    content = path.read_bytes()
    undo.setdefault(path, content)
    if kind == 'delete':
        path.unlink()
    elif kind == 'truncate':
        path.write_bytes(content[: draw.randrange(len(content))])
    else:
        flipped = bytearray(content)
        flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
    return {'kind': kind, 'file': str(path.relative_to(folder))}


def start(
    base: pathlib.Path, folder: pathlib.Path, limit: int | None = None
) -> subprocess.Popen[bytes]:
    """The command, with a limit on the size of files that it writes."""

    def restrict() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    environment = os.environ | machine.compile_once(base / 'cache') | {'PYTHONPATH': str(ROOT)}
    command = [sys.executable, '-m', 'jaxkd.main', *SETTING, f'--workdir={folder.absolute()}']
    with open(f'{folder}.stderr', 'w') as stderr:
        return subprocess.Popen(
            command,
            env=environment,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            preexec_fn=restrict,
        )


def said(folder: pathlib.Path) -> list[str]:
    lines = pathlib.Path(f'{folder}.stderr').read_text().splitlines()
    return [line for line in lines if line.strip()] or ['']


def stage(folder: pathlib.Path) -> str:
    """How far a run has come."""
    for name in ('report.json', 'compact', 'distil', 'search', 'teacher'):
        if (folder / name).exists():
            return name
    return 'start'


def same(folder: pathlib.Path, expected: dict[str, Any], log: bool) -> bool:
    """Whether a run came to what it should, with or without its log."""
    try:
        found = outcome(folder, log)
    except (errors.CheckpointError, OSError, ValueError, KeyError):
        return False
    return all(found[key] == expected[key] for key in found)


def outcome(folder: pathlib.Path, log: bool = True) -> dict[str, Any]:
    """All that a run leaves but times."""
    report = json.loads((folder / 'report.json').read_text())
    del report['seconds'], report['sha256']
    for name in ('teacher', 'compact'):
        del report[name]['milliseconds']
    tree, _ = checkpoint.read(folder / 'compact')
    found = {'report': report, 'compact': checkpoint.fingerprint(checkpoint.to_tree(tree))}
    if log:
        found['log'] = [
            {key: value for key, value in row.items() if key not in watch.PERFORMANCE}
            for row in metrics.read_metrics(folder)
        ]
    return found


if __name__ == '__main__':
    main()
