"""What a run has measured: rows in a file, and drawn on boards while it goes on.

with MetricsLog(workdir) as log:
    log.write({'stage': 'teacher', 'step': 1, 'loss': 2.3})
read_metrics(workdir)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import errno
import io
import json
import math
import os
import pathlib
import time
from typing import Any, NamedTuple, Protocol
import uuid

from jaxkd.errors import CheckpointError, ConfigError
from jaxkd.workdir import read_json, write_json, write_text


class Board(Protocol):
    """Where the numbers of rows are drawn while a run goes on."""

    def add(self, row: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


# Opens a board for the run in a workdir, of which these rows have been written before.
OpenBoard = Callable[[pathlib.Path, Sequence[Mapping[str, Any]]], Board]


class MetricsLog:
    """Rows of metrics in `workdir/metrics.jsonl`, and their numbers on boards.

    A context manager. The JSON lines are the record: each row is on disk when `write` returns, and
    lines that are damaged, or were left half written by a kill, are taken away on opening: whoever
    goes on with a run has its rows, see `put`. The boards are opened with what is on record, when
    the first row is written.

    Args:
      workdir: made if it is missing.
      boards: `tensorboard`, by default, and others like it.
      say: is told of damaged lines; by default nobody is.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        boards: Sequence[OpenBoard] | None = None,
        *,
        say: Callable[[str], None] = lambda _: None,
    ):
        self._openers = (tensorboard,) if boards is None else tuple(boards)
        self._workdir = pathlib.Path(workdir)
        self._workdir.mkdir(parents=True, exist_ok=True)
        self._path = self._workdir / 'metrics.jsonl'
        if self._path.exists():
            content = self._path.read_bytes()
            rows, damaged = _parse(content)
            if damaged:
                say(f'{self._path}: line {damaged[0]} is damaged; checkpoints have its row')
            if content.count(b'\n') != len(rows) or not content.endswith(b'\n'):
                _rewrite(self._path, rows)
        self._file: io.FileIO | None = None
        self._boards: list[Board] | None = None

    def __enter__(self) -> MetricsLog:
        self._file = open(self._path, 'ab', buffering=0)  # noqa: SIM115 (closed in __exit__)
        return self

    def __exit__(self, *exception: Any) -> None:
        for board in self._boards or ():
            board.close()
        self._boards = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def write(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Appends a row, and returns it as it will be read back.

        Args:
          row: 'stage': str, 'step': int, and further numbers, texts or None by name. Numbers may be
            scalars of Python, NumPy or JAX; one that is not finite is written as null.

        Raises:
          ValueError: without 'stage' or 'step', or for values that are not scalars.
          OSError: when the disk is full.
        """
        row = {key: _plain(key, value) for key, value in row.items()}
        if not isinstance(row.get('stage'), str) or not isinstance(row.get('step'), int):
            raise ValueError(f"a row needs 'stage', a text, and 'step', a whole number; got {row}")
        if self._file is None:
            raise ValueError('a MetricsLog is written inside its with statement')
        if self._boards is None:
            self._open_boards()
        line = (json.dumps(row, allow_nan=False) + '\n').encode()
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        for board in self._boards:
            board.add(row)
        return row

    def _open_boards(self) -> None:
        rows = read_metrics(self._workdir)
        self._boards = [open_board(self._workdir, rows) for open_board in self._openers]

    def rows(self, stage: str) -> list[dict[str, Any]]:
        """The rows of a stage that are on disk."""
        return [row for row in read_metrics(self._workdir) if row['stage'] == stage]

    def put(
        self, stage: str, rows: Sequence[Mapping[str, Any]], *, later: Sequence[str] = ()
    ) -> None:
        """Sets the rows of a stage that goes on: a resumed run leaves those of an unkilled one.

        Args:
          stage: whose rows are to be `rows`.
          rows: as `write` returned them.
          later: stages whose rows are dropped.
        """
        before = read_metrics(self._workdir)
        others = [row for row in before if row['stage'] not in (stage, *later)]
        if before == [*others, *rows]:
            return
        opened = self._file is not None
        self.__exit__()
        _rewrite(self._path, [*others, *rows])
        self._open_boards()
        if opened:
            self.__enter__()
        else:
            self.__exit__()


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of `workdir/metrics.jsonl` in the order they were written; [] without such a file.

    A last line that is half written is left out. What was not a finite number is None.

    Raises:
      CheckpointError: when any other line is damaged.
    """
    path = pathlib.Path(workdir) / 'metrics.jsonl'
    if not path.exists():
        return []
    rows, damaged = _parse(path.read_bytes())
    if damaged:
        raise CheckpointError(path, f'line {damaged[0]} is damaged; delete that line')
    return rows


def _parse(content: bytes) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows, and the numbers of damaged lines other than a last one that is half written."""
    rows, damaged = [], []
    lines = content.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not {'stage', 'step'} <= row.keys():
                raise ValueError('no row')
            rows.append(row)
        except ValueError:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            if number < len(lines) or content.endswith(b'\n'):
                damaged.append(number)
    return rows, damaged


def _rewrite(path: pathlib.Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, ''.join(json.dumps(row) + '\n' for row in rows))


def _plain(key: str, value: Any) -> Any:
    """A value as JSON knows it."""
    if hasattr(value, 'item') and getattr(value, 'ndim', 0) == 0:  # NumPy's and JAX's scalars
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise ValueError(f'metrics are numbers and texts, but {key} is a {type(value).__name__}')


_EVENTS_SUFFIX = '.jaxkd'  # tells these event files from other people's


class _TensorBoard(NamedTuple):
    writer: Any

    def add(self, row: Mapping[str, Any]) -> None:
        from tensorboardX import summary
        from tensorboardX.proto import event_pb2

        for key, value in _numeric(row).items():
            event = event_pb2.Event(
                wall_time=time.time(),
                step=row['step'],
                summary=summary.scalar(f'{row["stage"]}/{key}', value),
            )
            self.writer.write_event(event)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def tensorboard(workdir: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> Board:
    """TensorBoard event files in the workdir, made anew from the rows (with the present time; steps
    are what they were)."""
    # It takes 0.3 s to import, and not all who import this module write events. Its SummaryWriter
    # would write in a thread, whose errors nobody hears, and for which a full queue waits forever.
    from tensorboardX import event_file_writer

    # Names contain the second. A writer that is opened within the same one would append.
    for path in list(workdir.glob(f'events.*{_EVENTS_SUFFIX}')):
        path.unlink()
    board = _TensorBoard(event_file_writer.EventsWriter(str(workdir / 'events'), _EVENTS_SUFFIX))
    for row in rows:
        board.add(row)
    return board


class _WeightsAndBiases(NamedTuple):
    run: Any

    def add(self, row: Mapping[str, Any]) -> None:
        stage = row['stage']
        self.run.log(
            {f'{stage}/{key}': value for key, value in _numeric(row).items()}
            | {f'{stage}/step': row['step']}
        )

    def close(self) -> None:
        self.run.finish()


def wandb(
    project: str,
    config: Mapping[str, Any],
    stages: Sequence[str],
    say: Callable[[str], None] = lambda _: None,
) -> OpenBoard:
    """Weights & Biases, in a project of that name.

    A run that goes on is the same run there, known by the id that `wandb.json` in its workdir
    keeps; what it had drawn stays, and steps that are trained again are drawn again.

    Raises:
      ConfigError: if it is not installed.
    """
    try:
        import wandb as weights_and_biases
    except ImportError:
        raise ConfigError('wandb', project, why='it needs `pip install wandb`') from None

    def open_board(workdir: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> Board:
        del rows
        known = workdir / 'wandb.json'
        same = read_json(known, say) or {'id': uuid.uuid4().hex[:12]}
        write_json(known, same)
        run = weights_and_biases.init(
            project=project,
            name=workdir.name,
            id=same['id'],
            resume='allow',
            dir=str(workdir),
            config=dict(config),
        )
        for stage in stages:
            run.define_metric(f'{stage}/step')
            run.define_metric(f'{stage}/*', step_metric=f'{stage}/step')
        return _WeightsAndBiases(run)

    return open_board


def _numeric(row: Mapping[str, Any]) -> dict[str, float]:
    return {
        key: value
        for key, value in row.items()
        if key != 'step' and isinstance(value, (int, float)) and not isinstance(value, bool)
    }
