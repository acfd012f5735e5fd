"""A run told to people, and several runs beside each other: the numbers, and the command.

python -m jaxkd.report DIR             makes the run's report.html again
python -m jaxkd.report DIR DIR …       compares the runs
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
import json
import os
import pathlib
import sys
from typing import Any, NamedTuple

import numpy as np

from jaxkd import command, errors, metrics, page, watch
from jaxkd import workdir as records
from jaxkd.graph import table as tables

# With more classes than this, a report has what is right in each, but not what is taken for what.
MOST_CONFUSED = 100


class Curve(NamedTuple):
    """What a search did for one budget, by the rows of its log.

    Attributes:
      steps: int [rows].
      alive: float [rows], the share that was alive.
      scheduled: float [rows], the share that was to be.
      penalty: float [rows], λ.
    """

    steps: np.ndarray
    alive: np.ndarray
    scheduled: np.ndarray
    penalty: np.ndarray


def search_curves(workdir: str | os.PathLike, stage: str = 'search') -> dict[str, Curve]:
    """The curves of a run's search by the name of the budget, from its `metrics.jsonl`.

    A budget is named by its resource, such as 'flops', one of a block 'flops[block1/]'.

    Raises:
      CheckpointError: for a damaged file.
    """
    rows = [row for row in metrics.read_metrics(workdir) if row['stage'] == stage]
    prefix = 'scheduled_'
    names = [key.removeprefix(prefix) for key in (rows or [{}])[0] if key.startswith(prefix)]

    def column(key: str) -> np.ndarray:
        return np.array([row[key] for row in rows])

    return {
        name: Curve(
            column('step'),
            column(f'share_{name}'),
            column(f'{prefix}{name}'),
            column(f'lambda_{name}'),
        )
        for name in names
    }


def tracking(curves: Mapping[str, Curve]) -> dict[str, Any]:
    """How closely a search followed its schedule.

    Args:
      curves: as `search_curves` returns them.

    Returns:
      'error': the largest deviation of the share alive from the one scheduled after the first
      tenth of the search; None without a budget. Of several budgets, the one most above its
      schedule, or least below, is the one that has to be followed: it pulls the others below
      theirs. 'budgets': what was 'alive' and 'scheduled' of each in the last row.
    """
    last = {
        name: {'alive': float(curve.alive[-1]), 'scheduled': float(curve.scheduled[-1])}
        for name, curve in curves.items()
    }
    error = None
    if curves:
        steps = next(iter(curves.values())).steps
        above = np.max([curve.alive - curve.scheduled for curve in curves.values()], axis=0)
        error = float(np.abs(above[steps > steps[-1] / 10]).max())
    return {'error': error, 'budgets': last}


def removals(workdir: str | os.PathLike) -> dict[str, Any]:
    """What became of a run's network where channels were removed, from its `metrics.jsonl`.

    Returns:
      'cuts': how often a search cut closed channels away. 'before' and 'after': the validation
      metrics of the network at the end of the search, and cut to its structure.
    """
    rows = metrics.read_metrics(workdir)
    searched = [row for row in rows if row['stage'].startswith('search')]
    sizes = {(row['stage'], row.get('physical_flops')) for row in searched}
    cuts = len(sizes) - len({row['stage'] for row in searched})
    ends = {'before': searched[-1]}
    ends['after'] = next(row for row in rows if row['stage'] == 'distil')
    told = ('validation_accuracy', 'validation_loss')
    return {'cuts': cuts} | {end: {key: row[key] for key in told} for end, row in ends.items()}


def plot_search(
    curves: Mapping[str, Curve], path: pathlib.Path, say: Callable[[str], None] = print
) -> None:
    """Draws what was alive against the schedule, and below it λ. Without a budget there is nothing.

    Args:
      curves: as `search_curves` returns them.
      path: of the picture, which is never half-written.
      say: is told what to install where matplotlib is missing; nothing is drawn then.
    """
    if not curves:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say(f"{path.name} is not drawn: it needs matplotlib, pip install 'jaxkd[plot]'")
        return
    figure = Figure(figsize=(7, 6), layout='constrained')
    shares, penalties = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for i, (name, curve) in enumerate(curves.items()):
        colour = f'C{i}'
        shares.plot(curve.steps, curve.alive, color=colour, label=f'{name}, alive')
        shares.plot(
            curve.steps, curve.scheduled, '--', color=colour, lw=1, label=f'{name}, scheduled'
        )
        penalties.plot(curve.steps, curve.penalty, color=colour, label=name)
    shares.set(title=path.stem, ylabel='share at the start', ylim=(0, 1.05))
    penalties.set(xlabel='step', ylabel='λ')
    for axes in (shares, penalties):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    with records.written_aside(path) as aside:
        figure.savefig(aside, format=path.suffix[1:], dpi=150)


def by_class(
    labels: np.ndarray, answers: Mapping[str, np.ndarray], names: Sequence[str]
) -> dict[str, Any]:
    """What networks answer for the images of each class.

    Args:
      labels: int [images].
      answers: int [images] by network.
      names: of the classes.

    Returns:
      'classes': their 'names', how many 'images' are of each, and by network how many of these are
      right. 'confusion', of up to `MOST_CONFUSED` classes: by network a row for each class, with
      how often each class was the answer.
    """
    size = len(names)
    right = {
        name: np.bincount(labels[found == labels], minlength=size).tolist()
        for name, found in answers.items()
    }
    images = np.bincount(labels, minlength=size).tolist()
    told: dict[str, Any] = {'classes': {'names': list(names), 'images': images, **right}}
    if size <= MOST_CONFUSED:
        told['confusion'] = {
            name: np.bincount(size * labels + found, minlength=size**2).reshape(size, -1).tolist()
            for name, found in answers.items()
        }
    return told


def write_page(
    workdir: str | os.PathLike, report: Mapping[str, Any], path: pathlib.Path | None = None
) -> pathlib.Path:
    """Writes the page of a run, of its report and of what else is in its workdir.

    Args:
      workdir: of the run.
      report: of the run.
      path: of the page; by default `report.html` in the workdir.

    Returns:
      The path.

    Raises:
      CheckpointError: for a damaged file.
    """
    workdir = pathlib.Path(workdir)
    path = path or workdir / 'report.html'
    rows = metrics.read_metrics(workdir)
    stages = dict.fromkeys(row['stage'] for row in rows)
    curves = {name: search_curves(workdir, name) for name in stages if name.startswith('search')}
    started = records.look_up(workdir / 'config.json') or {}
    records.write_text(path, page.run(report, rows, curves, started.get('command')))
    return path


def read_report(folder: str | os.PathLike) -> dict[str, Any]:
    """The report of a finished run.

    Raises:
      CheckpointError: if the folder holds none, or a damaged one.
    """
    path = pathlib.Path(folder) / 'report.json'
    found = records.look_up(path)
    if found is None:
        raise errors.CheckpointError(folder, 'holds no report.json; name the workdir of a run')
    if not {'teacher', 'compact', 'budget', 'config'} <= found.keys():
        raise errors.CheckpointError(path, 'is no report of a run')
    return found


# Runs beside each other


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points, (cost, accuracy), that no other is as good as in both; in the order of cost.

    >>> pareto([(2.0, 0.8), (1.0, 0.7), (3.0, 0.75), (1.0, 0.6)])
    [1, 0]
    """
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


def comparison(reports: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The rows of a table of runs, below the names of its columns, from their reports by folder."""
    cells = [
        (
            '',
            'run',
            'accuracy',
            'points',
            'teacher',
            'multiply-adds',
            'of teacher',
            'parameters',
            'of teacher',
            'budget',
        )
    ]
    for number, (name, report) in enumerate(reports.items(), 1):
        teacher, compact = report['teacher'], report['compact']
        costs = (
            cell
            for key in ('flops', 'params')
            for cell in (watch.count(compact[key]), f'{compact[key] / teacher[key]:.1%}')
        )
        cells.append(
            (
                str(number),
                name,
                f'{compact["accuracy"]:.2%}',
                f'{100 * (compact["accuracy"] - teacher["accuracy"]):+.2f}',
                f'{teacher["accuracy"]:.2%}',
                *costs,
                ', '.join(f'{key} {most:g}' for key, most in report['budget'].items()),
            )
        )
    return cells


def differences(reports: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The rows of a table of the settings that not all runs have in common, below the runs' numbers
    in `comparison`; empty without any."""
    configs = [records.flat(report['config']) for report in reports.values()]
    cells = []
    for key in dict.fromkeys(key for config in configs for key in config):
        values = [json.dumps(config.get(key)) for config in configs]
        if len(set(values)) > 1:
            cells.append((key, *values))
    return [('setting', *map(str, range(1, len(configs) + 1))), *cells] if cells else []


def compare(reports: Mapping[str, Mapping[str, Any]], path: pathlib.Path) -> str:
    """Writes the page that compares some runs, of their reports by folder; its tables as text."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for number, report in enumerate(reports.values(), 1):
        for kind in ('teacher', 'compact'):
            told = report[kind]
            key = kind, told['accuracy'], told['flops'], told['params']
            found.setdefault(key, []).append(str(number))  # runs may share their teacher
    networks = [page.Network(', '.join(numbers), *key) for key, numbers in found.items()]
    fronts = {
        resource: pareto([(getattr(n, resource), n.accuracy) for n in networks])
        for resource in ('flops', 'params')
    }
    data = list(dict.fromkeys(report['config']['data']['name'] for report in reports.values()))
    results, settings = comparison(reports), differences(reports)
    records.write_text(path, page.comparison(results, settings, networks, fronts, data))
    text = tables.grid(results, left=(1, len(results[0]) - 1))
    return f'{text}\n\n{tables.grid(settings, left=(0,))}' if settings else text


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m jaxkd.report`; returns its exit status."""
    return command.run(_run, _parse(arguments))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command.Parser(
        prog='python -m jaxkd.report',
        description='Makes the page of a finished run again, or compares several runs: a table, '
        'and accuracy against cost.',
        epilog='exit status: 0 done, 1 a report cannot be read, 2 a wrong command line',
    )
    parser.add_argument('folders', nargs='+', metavar='DIR', help='the workdir of a finished run')
    parser.add_argument(
        '--out',
        type=pathlib.Path,
        metavar='FILE.html',
        help='the page (default: report.html in the workdir of one run, comparison.html here of '
        'several)',
    )
    return parser.parse_args(arguments)


def _run(flags: argparse.Namespace) -> None:
    folders = list(dict.fromkeys(map(os.path.normpath, flags.folders)))
    reports = {folder: read_report(folder) for folder in folders}
    path = flags.out
    if path and not path.name:
        raise errors.ConfigError('--out', str(path), why='it is a folder; name a file')
    try:
        if len(folders) == 1:
            path = write_page(folders[0], reports[folders[0]], path)
            text = watch.compare(reports[folders[0]])
        else:
            path = path or pathlib.Path('comparison.html')
            text = compare(reports, path)
    except OSError as error:
        why = f'it cannot be written: {error.strerror or error}'
        raise errors.ConfigError('--out', str(path or folders[0]), why=why) from None
    print(f'{text}\nwrote {path}')


if __name__ == '__main__':
    sys.exit(main())
