"""A run told to people: how its search followed the schedule, as numbers and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from jaxkd import metrics


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
    aside = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        figure.savefig(aside, format=path.suffix[1:], dpi=150)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
