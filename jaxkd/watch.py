"""What a person sees of a run: its parameters, what takes time, progress, the final table.

with Display([('teacher', 400), ('search', 400, 1.3)]) as display:
    display.start('teacher')
    for step in range(1, 401):
        ...
        display.update('teacher', step, loss=loss)
    display.finish('teacher')
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import io
import math
import os
import pathlib
import sys
import time
from typing import Any, TextIO

from clu import parameter_overview
import jax
import rich.console
import rich.live
import rich.progress_bar
import rich.table
import rich.text

from jaxkd import device
from jaxkd.errors import ConfigError

# Parameters


def overview(network: str, variables: Any, workdir: pathlib.Path) -> str:
    """Lists a network's parameters in `network.txt` in the workdir; a line that sums them up."""
    path = workdir / f'{network}.txt'
    table = parameter_overview.get_parameter_overview(variables['params'], include_stats=False)
    path.write_text(f'{table}\n')
    leaves = jax.tree.leaves(variables['params'])
    parameters = sum(leaf.size for leaf in leaves)
    return f'{network}: {parameters:,} parameters in {len(leaves)} arrays, listed in {path}'


# Speed

# What a row says of the machine, and not of the training.
PERFORMANCE = (
    'examples_per_second',
    'memory_bytes',
    'step_seconds',
    'data_seconds',
    'compile_seconds',
)
UNSHOWN = PERFORMANCE[2:]  # where there is little room


class Stopwatch:
    """What takes time in a loop of steps, from one row of metrics to the next."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """What is read next begins now."""
        self._began = time.monotonic()
        self._compiled = device.compile_seconds()
        self._waited = 0.0

    def waiting(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Hands on batches, and counts the time that they take to come."""
        batches = iter(batches)
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            self._waited += time.monotonic() - asked
            if batch is None:
                return
            yield batch

    def read(self, steps: int, examples: int) -> dict[str, float]:
        """The numbers named in `PERFORMANCE`, of so many steps with so many examples in all.

        `step_seconds` and `data_seconds` are means of a step, without what compiling took.
        """
        compiled = device.compile_seconds() - self._compiled
        seconds = max(time.monotonic() - self._began - compiled, 1e-9)
        return {
            'examples_per_second': examples / seconds,
            'step_seconds': seconds / steps,
            'data_seconds': self._waited / steps,
            'compile_seconds': compiled,
            'memory_bytes': device.memory(),
        }


# Steps of a stage that a profile leaves out, since the first ones compile, and those in it. Where
# there are fewer in all, it leaves out fewer.
_SKIPPED, _PROFILED = 10, 5


def profiled(
    batches: Iterable[Any], steps: int, folder: pathlib.Path, wait: Callable[[], Any]
) -> Iterator[Any]:
    """Hands on batches, and writes a trace of some of the steps that take them.

    Args:
      batches: one for each step.
      steps: how many there are.
      folder: for the trace, which TensorBoard's profile plugin and https://ui.perfetto.dev show.
      wait: returns when all steps are done that were started.
    """
    tracing, first = False, max(0, min(_SKIPPED, steps - _PROFILED))
    try:
        for number, batch in enumerate(batches):
            if number == first:
                jax.profiler.start_trace(folder)
                tracing = True
            elif number == first + _PROFILED:
                wait()
                jax.profiler.stop_trace()
                tracing = False
            yield batch
    finally:
        if tracing:
            wait()
            jax.profiler.stop_trace()


# Progress


class _Stage:
    """What the display knows of one stage."""

    def __init__(self, name: str, total: int, weight: float = 1.0):
        self.name, self.total, self.weight = name, total, weight
        self.step = 0
        self.state = 'waiting'  # then 'running', then 'finished'
        self.compiled = False  # whether its first step is done
        self.newest: dict[str, Any] = {}  # as handed in
        # What is shown, which the terminal's thread reads: replaced as a whole, never changed.
        self.values: dict[str, float | None] = {}
        # (time, step), half a second apart at least: the last of them give the present speed. The
        # first comes with the first update, so that compiling is not taken for slowness.
        self.samples: collections.deque[tuple[float, int]] = collections.deque(maxlen=60)

    def seconds_per_step(self) -> float | None:
        if len(self.samples) < 2:
            return None
        (first, start), (last, stop) = self.samples[0], self.samples[-1]
        return (last - first) / (stop - start)


class Display:
    """Shows the progress of a run of several stages.

    A context manager. On a terminal it is a block of lines that stays in place, one for each stage;
    elsewhere, such as in a file or a CI log, plain lines: the first and last of each stage and
    otherwise one each ten seconds. An exception leaves the terminal as it was found.

    Args:
      stages: (name, number of steps) of each stage in order, with the relative cost of one of its
        steps as an optional third element (1 by default), by which the time of stages that have not
        begun is foretold.
      stream: where to write; standard error by default, so that standard output is left to results.
      full: the whole network's numbers, such as {'alive_flops': 312_000_000}; values of that name
        are shown as fractions of them, too.
      clock: seconds, for tests.
    """

    def __init__(
        self,
        stages: Sequence[tuple[str, int] | tuple[str, int, float]],
        *,
        stream: TextIO | None = None,
        full: Mapping[str, float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._stages = {stage[0]: _Stage(*stage) for stage in stages}
        self._stream = sys.stderr if stream is None else stream
        self._full = dict(full or {})
        self._clock = clock
        self._speed: tuple[float, float] | None = None  # (seconds per step, weight) measured last
        self._measured = 0.0  # when the steps left were last known
        self._compiled = 0.0  # seconds, for the first step of the last stage
        self._ended = clock() - device.seconds_running()  # of what came before this stage
        self._shown = -math.inf  # when values were last taken or a line was printed
        self._line: tuple[str, int] | None = None  # stage and step of the last plain line
        self._live: rich.live.Live | None = None
        self._console = rich.console.Console(file=self._stream, force_terminal=True)
        self._terminal = self._stream.isatty() and os.environ.get('TERM') not in ('dumb', 'unknown')

    def __enter__(self) -> Display:
        if self._terminal:
            self._live = rich.live.Live(
                console=self._console,
                get_renderable=self._render,
                refresh_per_second=4,
                # Printed text goes above the lines, but not to the terminal if it went elsewhere.
                redirect_stdout=sys.stdout.isatty(),
                redirect_stderr=sys.stderr.isatty(),
            )
            self._live.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def start(self, stage: str, done: int = 0) -> None:
        """Begins a stage, or goes on with it after `done` steps."""
        now = self._stage(stage)
        if now.state == 'running':  # it goes back
            self._ended = self._clock()
        now.state, now.step, now.compiled = 'running', done, False
        now.samples.clear()
        self._measured = self._clock()  # what came between two stages is not taken off the ETA
        self._shown = -math.inf

    def update(self, stage: str, step: int, **values: Any) -> None:
        """Tells how far a stage is, and the newest values.

        Cheap enough for every step: a JAX scalar is waited for only when it is shown.

        Args:
          stage: its name.
          step: number of steps done.
          **values: numbers by name. 'loss', 'accuracy' and others are shown as they are,
            'alive_flops', 'alive_params', 'flops', 'params' as counts or, up to 1, as fractions,
            'examples_per_second' as a rate, 'memory_bytes' as a size. None is left out.
        """
        now = self._stage(stage)
        if now.state != 'running':
            self.start(stage, step)
        now.step, now.compiled = step, True
        clock = self._clock()
        samples = now.samples
        if not samples or (clock - samples[-1][0] >= 0.5 and step > samples[-1][1]):
            samples.append((clock, step))
            self._measured = clock
            speed = now.seconds_per_step()
            if speed is not None:
                self._speed = speed, now.weight
        now.newest |= values
        if clock - self._shown < (0.2 if self._terminal else 10.0):
            return
        self._shown = clock
        now.values = _numbers(now.newest)
        if not self._terminal:
            self._print(now)

    def first_step(self, stage: str, compiled: float) -> None:
        """Says how long the first step of a stage took to come, and compiling in that."""
        clock = self._clock()
        self._stage(stage).compiled = True
        self._compiled, self._measured = compiled, clock
        seconds = clock - self._ended
        self.message(f'{stage}: first step after {seconds:.1f} s, {compiled:.1f} s of it compiling')

    def finish(self, stage: str) -> None:
        """Ends a stage; one that was not begun is taken to have been done by an earlier run."""
        now = self._stage(stage)
        before = now.state != 'running'
        now.state = 'finished'
        self._ended = self._clock()
        now.step = now.total if before else now.step
        now.values = _numbers(now.newest)
        if self._terminal:
            return
        if before:
            print(f'[{stage}] done before', file=self._stream, flush=True)
        elif self._line != (stage, now.step):
            self._print(now)

    def message(self, text: str) -> None:
        """Shows a line that stays."""
        if self._live is not None:
            self._console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def eta(self, stage: str | None = None) -> float | None:
        """Seconds that a stage, or the whole run, will still take; None before it can be known.

        A stage whose first step is not done is taken to compile for as long as the last one did.
        """
        stages = list(self._stages.values()) if stage is None else [self._stage(stage)]
        if self._speed is None:
            return None
        since = self._clock() - self._measured
        steps = self._speed[0] / self._speed[1] * sum(map(self._left, stages))
        compiling = sum(one.state != 'finished' and not one.compiled for one in stages)
        return max(0.0, steps + self._compiled * compiling - since)

    def _left(self, stage: _Stage) -> float:
        """Steps left, in steps of weight 1."""
        done = stage.step
        if stage.state == 'running' and stage.samples:
            done = stage.samples[-1][1]  # the time since then is taken off elsewhere
        return 0.0 if stage.state == 'finished' else max(0, stage.total - done) * stage.weight

    def _stage(self, name: str) -> _Stage:
        if name not in self._stages:
            raise ConfigError('stage', name, allowed=self._stages)
        return self._stages[name]

    def _words(self, stage: _Stage) -> list[str]:
        return [
            _word(key, value, self._full.get(key))
            for key, value in stage.values.items()
            if value is not None
        ]

    def _print(self, stage: _Stage) -> None:
        percent = 100 * stage.step // max(1, stage.total)
        line = f'[{stage.name} {stage.step}/{stage.total} {percent}%] '
        line += ' '.join(self._words(stage))
        whole = self.eta()
        if whole is not None:
            line += f' eta {duration(self.eta(stage.name))}, all {duration(whole)}'
        print(line.rstrip(), file=self._stream, flush=True)
        self._line = stage.name, stage.step

    def _render(self) -> rich.table.Table:
        names = max(3, *map(len, self._stages))
        steps = max(len(f'{stage.total}/{stage.total}') for stage in self._stages.values())
        # Where it gets narrow, only the values may lose their end, which a table doesn't see to.
        room = self._console.width - names - _BAR - steps - _ETA - 5
        table = rich.table.Table.grid(padding=(0, 1))
        table.add_column(width=names)
        table.add_column(width=_BAR)
        table.add_column(width=steps, justify='right')
        table.add_column(width=_ETA, justify='right')
        table.add_column(no_wrap=True)
        for stage in self._stages.values():
            eta = self.eta(stage.name) if stage.state == 'running' else None
            words = rich.text.Text(' '.join(self._words(stage)), 'dim')
            words.truncate(max(0, room), overflow='ellipsis')
            table.add_row(
                rich.text.Text(stage.name, 'bold' if stage.state == 'running' else ''),
                rich.progress_bar.ProgressBar(max(1, stage.total), stage.step, width=_BAR),
                f'{stage.step}/{stage.total}',
                'done' if stage.state == 'finished' else '' if eta is None else duration(eta),
                words,
            )
        whole = self.eta()
        running = any(stage.state != 'finished' for stage in self._stages.values())
        if whole is not None and running:
            table.add_row('all', '', '', duration(whole), '')
        return table


def _numbers(values: Mapping[str, Any]) -> dict[str, float | None]:
    return {key: None if value is None else float(value) for key, value in values.items()}


_BAR, _ETA = 12, 6  # widths of columns: a bar, a duration such as 12m34s
_COUNTS = ('alive_flops', 'alive_params', 'flops', 'params')


def _word(key: str, value: Any, full: float | None) -> str:
    """A value for people, such as 'loss 0.412' or 'flops 152.3M (51.2%)'."""
    value = float(value)
    if not math.isfinite(value):
        return f'{key} {value}'
    if key == 'examples_per_second':
        return f'{count(value)} examples/s'
    if key == 'memory_bytes':
        return f'memory {count(value)}B'
    if key in _COUNTS:
        name = key.removeprefix('alive_')
        if value <= 1:
            return f'{name} {value:.1%}'
        return f'{name} {count(value)}' + (f' ({value / full:.1%})' if full else '')
    if 'accuracy' in key:
        return f'{key} {value:.4f}'
    return f'{key} {value:.3g}'


def count(number: float) -> str:
    """A number with a unit: 950, 1.5k, 152.3M, 3.1G.

    >>> [count(n) for n in (0.41, 950, 1500, 999_960, 152_310_000)]
    ['0.41', '950', '1.5k', '1.0M', '152.3M']
    """
    for unit in ('', 'k', 'M', 'G'):
        text = f'{number:.1f}' if unit else f'{number:.0f}' if number >= 10 else f'{number:.2g}'
        if float(text) < 1000:
            return text + unit
        number /= 1000
    return f'{number:.1f}T'


def duration(seconds: float | None) -> str:
    """A duration in two units: 42s, 1m20s, 5h02m, 3d04h.

    >>> [duration(s) for s in (0.4, 42, 80, 18_130, 273_600, None)]
    ['0s', '42s', '1m20s', '5h02m', '3d04h', '?']
    """
    if seconds is None:
        return '?'
    seconds = round(seconds)
    if seconds < 60:
        return f'{seconds}s'
    if seconds < 3600:
        return f'{seconds // 60}m{seconds % 60:02}s'
    minutes = seconds // 60
    if minutes < 24 * 60:
        return f'{minutes // 60}h{minutes % 60:02}m'
    return f'{minutes // 1440}d{minutes // 60 % 24:02}h'


# The final table


def compare(report: Mapping[str, Any], *, stream: TextIO | None = None) -> str:
    """The teacher and the compact network beside each other, as a table to print.

    Args:
      report: has 'teacher' and 'compact', each with 'accuracy' (a fraction), 'flops', 'params',
        'activations' (bytes) and optionally 'milliseconds'. What both lack is left out. With
        'inference_batch', the table says how many images the milliseconds are for. With 'latency',
        it shows the seconds for one image that were 'predicted' and 'measured'.
      stream: where it will be printed (standard output by default): a terminal gets lines and
        colours, anything else plain text.

    Returns:
      Lines without a newline at the end.
    """
    batch = report.get('inference_batch')
    rows = [
        ('accuracy', 'accuracy', lambda value: f'{value:.2%}'),
        ('FLOPs (multiply-adds)', 'flops', count),
        ('parameters', 'params', count),
        ('activations (bytes)', 'activations', count),
        (
            f'inference of {batch} (ms)' if batch else 'inference (ms)',
            'milliseconds',
            lambda value: f'{value:.3g}',
        ),
    ]
    cells = [('', 'teacher', 'compact', 'compact / teacher')]
    pairs = [
        (label, key, shape, [report[name].get(key) for name in ('teacher', 'compact')])
        for label, key, shape in rows
    ]
    pairs += [
        (
            f'latency of 1, {kind} (ms)',
            'latency',
            lambda value: f'{1000 * value:.3g}',
            [seconds['teacher'], seconds['compact']],
        )
        for kind, seconds in report.get('latency', {}).items()
    ]
    for label, key, shape, pair in pairs:
        if pair == [None, None]:
            continue
        shown = ['-' if value is None else shape(value) for value in pair]
        cells.append((label, *shown, _relation(key, *pair)))

    stream = sys.stdout if stream is None else stream
    if stream.isatty():
        table = rich.table.Table()
        for column, title in enumerate(cells[0]):
            table.add_column(title, justify='right' if column else 'left')
        for row in cells[1:]:
            table.add_row(*row)
        console = rich.console.Console(file=io.StringIO(), force_terminal=True)
        console.print(table)
        return console.file.getvalue().rstrip('\n')
    widths = [max(map(len, column)) for column in zip(*cells)]
    return '\n'.join(
        row[0].ljust(widths[0])
        + ''.join(f'  {cell:>{width}}' for cell, width in zip(row[1:], widths[1:]))
        for row in cells
    )


def _relation(key: str, teacher: float | None, compact: float | None) -> str:
    """How the compact network's number stands to the teacher's."""
    if teacher is None or compact is None:
        return '-'
    if key == 'accuracy':
        return f'{100 * (compact - teacher):+.2f} points'
    if not teacher or not compact:
        return '-'
    ratio = compact / teacher
    return f'1/{1 / ratio:.2f}' if ratio < 1 else f'{ratio:.2f}'
