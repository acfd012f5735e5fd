"""What a stage of training has reached, beside its state: all of it goes into each checkpoint.

So a run that is killed at any moment goes on as if it had not been: with the metrics of the steps
since the last row, with the rows of the log (which is a copy of them), with the best variables so
far, and with what it goes back to when its loss explodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxkd import checkpoint

Leaves = Mapping[str, np.ndarray]  # of a pytree, as `checkpoint.to_tree` names them


class Best(NamedTuple):
    """The averaged variables with the best validation accuracy.

    Attributes:
      step: after which they were.
      metrics: of the validation part.
      variables: their leaves, on the host.
    """

    step: int
    metrics: dict[str, float]
    variables: Leaves


class Anchor(NamedTuple):
    """What a stage goes back to: the end of its last epoch, or its start.

    Attributes:
      step: after which it was.
      leaves: of state and memory, on the host.
    """

    step: int
    leaves: Leaves


class Progress(NamedTuple):
    """What a stage has reached.

    Attributes:
      step: steps done.
      seconds: that they took, over all the runs.
      rows: of the log.
      pending: metrics of each step since the last row, float32 [] by name.
      best: the best variables so far, of stages that look for them.
      anchor: what to go back to, if the config says so.
      rollbacks: of each time that the stage went back, from which step to which, why, and the
        factor of the learning rate from there on.
    """

    step: int = 0
    seconds: float = 0.0
    rows: tuple[dict[str, Any], ...] = ()
    pending: tuple[Mapping[str, Any], ...] = ()
    best: Best | None = None
    anchor: Anchor | None = None
    rollbacks: tuple[dict[str, Any], ...] = ()

    @property
    def factor(self) -> float:
        """Of the learning rate."""
        return self.rollbacks[-1]['factor'] if self.rollbacks else 1.0


def improved(
    best: Best | None, step: int, metrics: Mapping[str, float], variables: Any
) -> Best | None:
    """The better one: by validation accuracy, of equals by validation loss.

    Args:
      best: so far.
      step: steps done.
      metrics: 'validation_accuracy' and 'validation_loss' now.
      variables: now, a pytree.
    """

    def rank(metrics: Mapping[str, float]) -> tuple[float, float]:
        return metrics['validation_accuracy'], -metrics['validation_loss']

    if not np.isfinite(rank(metrics)).all() or (best and rank(metrics) <= rank(best.metrics)):
        return best
    return Best(step, dict(metrics), copied(variables))


def copied(pytree: Any) -> dict[str, np.ndarray]:
    """The leaves, copied to the host: the next step may overwrite what they are on the device."""
    return {name: np.array(leaf) for name, leaf in checkpoint.to_tree(pytree).items()}


def finite(leaves: Leaves) -> bool:
    """Whether all numbers are."""
    return all(bool(np.isfinite(leaf).all()) for leaf in leaves.values())


def pack(progress: Progress, leaves: Leaves) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tree and metadata of a checkpoint.

    Args:
      progress: of the stage.
      leaves: of its state and memory.
    """
    best, anchor = progress.best, progress.anchor
    names = progress.pending[0] if progress.pending else ()
    tree = {
        **leaves,
        **{f'pending/{key}': np.array([m[key] for m in progress.pending]) for key in names},
        **_under('best', best.variables if best else {}),
        **_under('anchor', anchor.leaves if anchor else {}),
    }
    notes = progress._asdict() | {
        'best': best and best._replace(variables=None)._asdict(),
        'anchor': anchor and anchor.step,
    }
    del notes['step'], notes['pending']
    return tree, notes


def unpack(step: int, leaves: Leaves, notes: Mapping[str, Any]) -> Progress:
    """What `pack` packed, after so many steps."""
    columns = checkpoint.part(leaves, 'pending')
    pending = [dict(zip(columns, values)) for values in zip(*columns.values())]
    best, anchor = notes['best'], notes['anchor']
    return Progress(
        step=step,
        seconds=notes['seconds'],
        rows=tuple(notes['rows']),
        pending=tuple(pending),
        best=best and Best(best['step'], best['metrics'], checkpoint.part(leaves, 'best')),
        anchor=None if anchor is None else Anchor(anchor, checkpoint.part(leaves, 'anchor')),
        rollbacks=tuple(notes['rollbacks']),
    )


def _under(key: str, leaves: Leaves) -> dict[str, np.ndarray]:
    return {f'{key}/{name}': leaf for name, leaf in leaves.items()}
