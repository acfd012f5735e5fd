"""`python -m jaxkd.benchmark`: how long full and compact networks take on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
import functools
from importlib import metadata
import importlib.util
import json
import os
import pathlib
import statistics
import sys
import tempfile
from typing import Any, NamedTuple
import warnings

import jax
import numpy as np

from jaxkd import command, cpu, device, errors, export, mode, saved
from jaxkd.graph import latency, structure
from jaxkd.graph import table as tables
from jaxkd.graph.structure import CompactModel


class Row(NamedTuple):
    """What was measured of one network.

    Attributes:
      folder: where it is from.
      network: 'full' or 'compact'.
      runtime: what ran it.
      batch: images at a time.
      flops: multiply-adds of one image.
      milliseconds: of a batch, the median.
      spread: its first and third quartile.
      speedup: how much faster than the full network in the same turns: the median of the ratios.
    """

    folder: str
    network: str
    runtime: str
    batch: int
    flops: float
    milliseconds: float
    spread: tuple[float, float]
    speedup: float


def measure(
    small: CompactModel,
    *,
    batch_size: int = 1,
    rounds: int = 50,
    seconds: float = 20.0,
    folder: str = '',
    **apply_kwargs: Any,
) -> list[Row]:
    """Times the full network and the compact one, in turns.

    By XLA on JAX's default device, and by ONNX Runtime on the CPU where that is installed and the
    network can be written for it. Weights of the full network and inputs are random: they change no
    time. On a CPU, XLA runs convolutions in the form that is fast there.

    Args:
      small: the compact network, with the shapes of its inputs.
      batch_size: images at a time.
      rounds: turns that each of them has at most.
      seconds: after so many, no further turn is begun.
      folder: for the rows.
      **apply_kwargs: further arguments of the model. Those that tell it not to train are
        added; see `jaxkd.mode`.

    Raises:
      ConfigError: for a network that cannot be called so.
    """
    module = structure.full_module(small.module)
    apply_kwargs = {**mode.arguments(module, train=False), **apply_kwargs}
    inputs = export.random_inputs(small, batch_size)
    try:
        init = jax.jit(functools.partial(module.init, **apply_kwargs))
        variables = init(jax.random.key(0), *inputs)
    except Exception as error:
        why = f'{type(module).__name__} cannot be called with them: {errors.words(error)}'
        raise errors.ConfigError('--apply', apply_kwargs, why=why) from error
    networks = {'full': CompactModel(module, variables, small.structure), 'compact': small}
    costs = {'full': small.structure.full, 'compact': small.structure.compact}
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for runtime, call in RUNTIMES.items():
        if runtime == ONNX and not export.has_onnx():
            continue
        try:
            ready = {
                (runtime, name): call(network, inputs, apply_kwargs)
                for name, network in networks.items()
            }
        except errors.ExportError as error:
            warnings.warn(f'{runtime} is left out: {error}', stacklevel=2)
        else:
            calls |= ready
    taken = dict(zip(calls, latency.take_turns([*calls.values()], rounds, seconds), strict=True))
    return [
        Row(
            folder,
            name,
            runtime,
            batch_size,
            costs[name]['flops'],
            1e3 * statistics.median(times),
            tuple(1e3 * float(q) for q in np.quantile(times, (0.25, 0.75))),
            statistics.median(
                first / own for first, own in zip(taken[runtime, 'full'], times, strict=True)
            ),
        )
        for (runtime, name), times in taken.items()
    ]


def _xla(
    network: CompactModel, inputs: Sequence[jax.Array], apply_kwargs: dict[str, Any]
) -> Callable[[], Any]:
    run = jax.jit(export.network(network, apply_kwargs, cpu.fast_convolutions))
    # As arguments: constants would be folded into the program.
    placed = jax.device_put(network.variables)
    return lambda: jax.block_until_ready(run(placed, *inputs))


def _onnx(
    network: CompactModel, inputs: Sequence[jax.Array], apply_kwargs: dict[str, Any]
) -> Callable[[], Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'network.onnx')
        export.onnx(network, path, **apply_kwargs)
        call = export.onnx_function(path)
    arrays = [np.asarray(array) for array in inputs]
    return lambda: call(*arrays)


ONNX = 'ONNX Runtime'
RUNTIMES = {'XLA': _xla, ONNX: _onnx}


def table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    lines = [
        (
            'folder',
            'network',
            'runtime',
            'batch',
            'multiply-adds',
            'ms',
            'quartiles',
            'images/s',
            'faster',
        ),
        *(
            (
                row.folder,
                row.network,
                row.runtime,
                str(row.batch),
                f'{row.flops:,.0f}',
                f'{row.milliseconds:.3f}',
                f'{row.spread[0]:.3f} – {row.spread[1]:.3f}',
                f'{1e3 * row.batch / row.milliseconds:,.0f}',
                f'{row.speedup:.2f}×',
            )
            for row in rows
        ),
    ]
    return tables.grid(lines, left=(0, 1, 2))


def record(rows: Sequence[Row], threads: int) -> dict[str, Any]:
    """The rows as JSON, with what they were measured on.

    `of_saving` is the speed-up over what the multiply-adds would make of it.
    """
    full = {row.folder: row.flops for row in rows if row.network == 'full'}
    return {
        'device': jax.devices()[0].device_kind,
        'threads': threads,
        'versions': {
            package: metadata.version(package)
            for package in ('jax', 'flax', 'onnxruntime')
            if importlib.util.find_spec(package)
        },
        'rows': [
            row._asdict() | {'of_saving': row.speedup * row.flops / full[row.folder]}
            for row in rows
        ],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m jaxkd.benchmark`; returns its exit status."""
    return command.run(_run, _parse(arguments))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command.Parser(
        prog='python -m jaxkd.benchmark',
        description='Times compact networks beside the full ones that they were cut from: by XLA '
        'on the default device, and by ONNX Runtime on the CPU where that is installed; in turns, '
        'so that whatever else the machine does hurts all alike.',
        epilog='exit status: 0 done, 1 a network cannot be loaded, 2 a wrong command line',
    )
    parser.add_argument(
        'folders', nargs='+', metavar='DIR', help='a finished run, or what jaxkd.save wrote'
    )
    parser.add_argument(
        '--batch', nargs='+', type=int, default=[1, 64], metavar='N', help='images at a time'
    )
    parser.add_argument('--rounds', type=int, default=50, help='turns at most (%(default)s)')
    parser.add_argument(
        '--seconds', type=float, default=20.0, help='a network and batch at most (%(default)s)'
    )
    parser.add_argument('--threads', type=int, help='cores to use (default: all)')
    parser.add_argument('--out', type=pathlib.Path, metavar='FILE', help='write JSON, too')
    command.add_model(parser, required=False)
    return parser.parse_args(arguments)


def _run(flags: argparse.Namespace) -> None:
    numbers = {'--batch': flags.batch, '--rounds': [flags.rounds], '--threads': [flags.threads]}
    for flag, values in numbers.items():
        if any(value is not None and value < 1 for value in values):
            raise errors.ConfigError(flag, values[0], why='it must be at least 1')
    cores = sorted(os.sched_getaffinity(0))[: flags.threads]
    if flags.threads:
        os.sched_setaffinity(0, cores)  # XLA starts a thread on each core that it may use
    cpu.hold_memory()
    device.keep_compiled()
    model, apply_kwargs = command.model(flags), command.apply(flags)
    rows: list[Row] = []
    for folder in flags.folders:
        small = saved.load(saved.within(folder), model)
        for batch_size in flags.batch:
            rows += measure(
                small,
                batch_size=batch_size,
                rounds=flags.rounds,
                seconds=flags.seconds,
                folder=folder,
                **apply_kwargs,
            )
    print(table(rows))
    if flags.out:
        flags.out.write_text(json.dumps(record(rows, len(cores)), indent=2) + '\n')
        print(f'wrote {flags.out}')


if __name__ == '__main__':
    sys.exit(main())
