"""Several processes, one run: what process 0 reads, writes and decides, all of them know.

Every process of a run (`jax.distributed`) runs the same code, and where one of them did otherwise
the others would wait for it for ever. So what need not come out the same everywhere (a clock, a
file, a measurement, the last bit of a sum) is taken from process 0. It is told by a collective
operation, and no files have to be shared: process 0 alone needs the workdir.

`first`, `agreed`, `any_of` and the methods of what `at_first` returns are to be called by all
processes, in the same order. Where there is one process they are plain calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import os
import pickle
import sys
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils
import numpy as np
from orbax.checkpoint import multihost

from jaxkd import errors

T = TypeVar('T')

# How long the others wait for what process 0 does alone, such as timing all layers: milliseconds.
# If it dies meanwhile, `jax.distributed` ends them.
PATIENCE = 24 * 60 * 60 * 1000
# Processes that have met the same error come to their end within so many milliseconds.
TOGETHER = 10_000
# The least that is told, in bytes. Each size compiles a program, so sizes are powers of two.
LEAST = 1024


def join(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Makes this process one of several. To be called before anything is computed.

    Args:
      coordinator: HOST:PORT, where process 0 listens for the others.
      processes: how many there are.
      process: which of them this is. All three may be left out where `jax.distributed` finds them
        by itself: on Cloud TPU, under Slurm or Open MPI.

    Raises:
      ConfigError: if they are not all there, or do not come together.
    """
    given = {'--coordinator': coordinator, '--processes': processes, '--process': process}
    missing = [flag for flag, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        why = 'give all of --coordinator, --processes and --process, or none of them'
        raise errors.ConfigError(missing[0], None, why=why)
    if coordinator is not None and not coordinator.rpartition(':')[2].isdecimal():
        why = 'it must be HOST:PORT, where process 0 can listen'
        raise errors.ConfigError('--coordinator', coordinator, why=why)
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (RuntimeError, ValueError) as error:
        cause = str(error).strip().split('\n')[0]
        why = (
            f'the processes did not come together ({cause}); start as many as there are, with '
            '--coordinator=HOST:PORT --processes=NUMBER --process=WHICH where they cannot be found'
        )
        raise errors.ConfigError('--distributed', True, why=why) from error


def several() -> bool:
    """Whether there are others."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this is process 0, which speaks and writes."""
    return jax.process_index() == 0


def first(function: Callable[[], T]) -> T:
    """What `function` returns in process 0, which alone calls it; what it raises, all raise.

    What it returns has to be something that pickle takes.
    """
    if not several():
        return function()
    value, error = None, None
    if is_first():
        try:
            value = function()
        except Exception as raised:
            error = raised
    told = _tell((value, error))
    if is_first():
        told = value, error
    if told[1] is not None:
        raise told[1]
    return told[0]


def agreed(value: T) -> T:
    """What process 0 has for `value`; parts that are the same here stay the very same objects.

    Args:
      value: nested dicts and tuples of what pickle takes, alike in all processes.
    """
    if not several():
        return value
    told = _tell(value)
    return value if is_first() else _merged(value, told)


def any_of(value: bool) -> bool:
    """Whether it is so in any process."""
    return bool(np.any(multihost_utils.process_allgather(np.bool_(value)))) if several() else value


def at_first(make: Callable[[], T]) -> T:
    """A context manager that process 0 alone makes, for all to use.

    A call of one of its methods is made in process 0 and returns, or raises, in all.
    """
    return _AtFirst(make) if several() else make()


class _AtFirst:
    def __init__(self, make: Callable[[], Any]):
        self._made: Any = None

        def made() -> None:
            self._made = make()

        first(made)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: first(lambda: getattr(self._made, name)(*args, **kwargs))

    def __enter__(self) -> Any:
        def enter() -> None:
            self._made.__enter__()

        first(enter)
        return self

    def __exit__(self, *exception: Any) -> None:
        # Without a word to the others: what ends this need not have happened to them.
        if self._made is not None:
            self._made.__exit__(*exception)


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Inside, what processes other than the first print goes nowhere."""
    if not several() or is_first():
        yield
        return
    with (
        open(os.devnull, 'w') as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def leave(status: int, sentence: str) -> int:
    """The end of a process that has met an error, which may be its own or everybody's.

    Process 0 prints the sentence. If the others do not come to their end as well, each that does
    prints its own and ends at once, which ends the rest: otherwise it would wait for them.

    Returns:
      The exit status.
    """
    alone = not several()
    if alone or is_first():
        print(sentence, file=sys.stderr, flush=True)
    if not alone and not _come_together():
        if not is_first():
            print(f'process {jax.process_index()}: {sentence}', file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(status)
    return status


def _come_together() -> bool:
    try:
        multihost.get_barrier_sync_fn()(key='jaxkd-end', timeout_ms=TOGETHER)
    except RuntimeError:  # some are elsewhere, or gone
        return False
    return True


def _tell(value: Any) -> Any:
    """What process 0 has for `value`, in all processes."""
    content = np.frombuffer(pickle.dumps(value) if is_first() else b'', np.uint8)
    # Collective operations give up on latecomers sooner than process 0 may need for its work.
    multihost.get_barrier_sync_fn()(key='jaxkd-tell', timeout_ms=PATIENCE)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    room = np.zeros(max(LEAST, 1 << (size - 1).bit_length()), np.uint8)
    room[: len(content)] = content
    return pickle.loads(multihost_utils.broadcast_one_to_all(room)[:size].tobytes())


def _merged(mine: Any, told: Any) -> Any:
    """`told`, with the parts that are the same in `mine` as they are there."""
    if type(mine) is not type(told):
        return told
    if isinstance(told, Mapping) and mine.keys() == told.keys():
        parts = {key: _merged(mine[key], value) for key, value in told.items()}
        return mine if all(parts[key] is mine[key] for key in parts) else parts
    if isinstance(told, tuple) and len(mine) == len(told):
        merged = [_merged(a, b) for a, b in zip(mine, told, strict=True)]
        if all(a is b for a, b in zip(mine, merged, strict=True)):
            return mine
        return type(told)(*merged) if hasattr(told, '_fields') else tuple(merged)
    return mine if pickle.dumps(mine) == pickle.dumps(told) else told
