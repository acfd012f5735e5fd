"""The order in which images are read."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from jaxkd.errors import ConfigError


def epoch_order(size: int, batch_size: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch, int32 [size // batch_size, batch_size]: a row of indices a step.

    A pure function of its arguments, so a resumed run needs to remember only the step. The
    remainder, other images in each epoch, is left out.

    Raises:
      ConfigError: when there are fewer images than one batch holds.
    """
    check_seed('seed', seed)
    steps = _steps(size, batch_size)
    order = np.random.default_rng([seed, epoch]).permutation(size).astype(np.int32)
    return order[: steps * batch_size].reshape(steps, batch_size)


def _steps(size: int, batch_size: int) -> int:
    """Steps in an epoch."""
    _check_batch_size(batch_size)
    if size < batch_size:
        raise ConfigError(
            'batch_size',
            batch_size,
            why=f'the training part has only {size} images; use a batch_size of at most {size}, '
            'or keep more labels',
        )
    return size // batch_size


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps from `start` to `stop` of a training: a sequence of (step, indices int32 [batch]).

    Each is a function of the step alone, so that a resumed run reads what an unkilled one would.
    With `rows`, int [n], the indices are those rows of the batch.
    """

    size: int
    batch_size: int
    seed: int
    start: int
    stop: int
    rows: np.ndarray | None = None

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, place: int) -> tuple[int, np.ndarray]:
        if not 0 <= place < len(self):
            raise IndexError(place)
        step = self.start + place
        epoch, position = divmod(step, _steps(self.size, self.batch_size))
        batch = _known_order(self.size, self.batch_size, self.seed, epoch)[position]
        return step, batch if self.rows is None else batch[self.rows]


@functools.lru_cache(maxsize=2)
def _known_order(size: int, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    return epoch_order(size, batch_size, seed=seed, epoch=epoch)


def eval_batches(size: int, batch_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """All indices in order, in batches of one shape, so that evaluation compiles once.

    Returns:
      A list of (indices int32 [batch_size], valid bool [batch_size]). The last batch is filled up
      with index 0, marked as not valid.
    """
    _check_batch_size(batch_size)
    position = np.arange(math.ceil(size / batch_size) * batch_size, dtype=np.int32)
    valid = (position < size).reshape(-1, batch_size)
    indices = np.where(position < size, position, 0).astype(np.int32).reshape(-1, batch_size)
    return list(zip(indices, valid))


def check_seed(field: str, seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ConfigError(field, seed, why='it must be a whole number of at least 0')


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ConfigError('batch_size', batch_size, why='it must be at least 1')
