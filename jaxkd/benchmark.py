"""`python -m jaxkd.benchmark`: how long full and compact networks take on this machine."""

from __future__ import annotations

import argparse
import collections
from collections.abc import Callable, Iterator, Sequence
import contextlib
import functools
from importlib import metadata
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

from jaxkd import command, cpu, device, errors, export, mode, workdir
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


class Layer(NamedTuple):
    """A node of a network's graph, as ONNX Runtime computes it.

    Attributes:
      folder, network, batch: see `Row`.
      node: its name.
      kind: its operation.
      shape: of its output.
      milliseconds: of a batch, the mean.
      share: of the time of all nodes.
    """

    folder: str
    network: str
    batch: int
    node: str
    kind: str
    shape: tuple[int, ...]
    milliseconds: float
    share: float


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

    By XLA on JAX's default device, and on the CPU by ONNX Runtime and TensorFlow Lite where they
    are installed and the network can be written for them. Weights of the full network and inputs
    are random: they change no time. On a CPU, XLA runs convolutions in the form that is fast there.

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
    networks, inputs, apply_kwargs = _networks(small, batch_size, apply_kwargs)
    costs = {'full': small.structure.full, 'compact': small.structure.compact}
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for runtime, call in RUNTIMES.items():
        if export.missing(FILES.get(runtime, '')):
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


def layers(
    small: CompactModel, *, batch_size: int = 1, folder: str = '', **apply_kwargs: Any
) -> list[Layer]:
    """Times the nodes of both networks by ONNX Runtime's profiler, the slowest first.

    Arguments and errors as those of `measure`.

    Raises:
      ExportError: for a network that cannot be written as ONNX, or without ONNX Runtime.
    """
    networks, inputs, apply_kwargs = _networks(small, batch_size, apply_kwargs)
    arrays = [np.asarray(array) for array in inputs]
    rows: list[Layer] = []
    for name, network in networks.items():
        with tempfile.TemporaryDirectory() as within:
            path = os.path.join(within, 'network.onnx')
            export.onnx(network, path, **apply_kwargs)
            session = export.onnx_session(path, profile=os.path.join(within, 'profile'))
            names = [given.name for given in session.get_inputs()]
            for _ in range(PROFILED + 1):
                session.run(None, dict(zip(names, arrays, strict=True)))
            events = json.loads(pathlib.Path(session.end_profiling()).read_text())
        nodes = collections.defaultdict(list)
        for event in events:
            if event['cat'] == 'Node' and event['name'].endswith(TIMED):
                nodes[event['name'].removesuffix(TIMED)].append(event)
        # The first run finds memory.
        times = {
            node: 1e-3 * statistics.mean(event['dur'] for event in runs[1:])
            for node, runs in nodes.items()
        }
        whole = sum(times.values())
        for node in sorted(times, key=times.get, reverse=True):
            about = nodes[node][0]['args']
            shape = tuple(*about['output_type_shape'][0].values())
            rows.append(
                Layer(
                    *(folder, name, batch_size, node, about['op_name'], shape),
                    *(times[node], times[node] / whole),
                )
            )
    return rows


def _networks(
    small: CompactModel, batch_size: int, apply_kwargs: dict[str, Any]
) -> tuple[dict[str, CompactModel], list[jax.Array], dict[str, Any]]:
    """The full network and the compact one, inputs, and what they are called with beside these."""
    module = structure.full_module(small.module)
    apply_kwargs = mode.evaluating(module, apply_kwargs)
    inputs = export.random_inputs(small, batch_size)
    try:
        init = device.jit_once(functools.partial(module.init, **mode.initializing(apply_kwargs)))
        variables = init(jax.random.key(0), *inputs)
    except Exception as error:
        why = f'{type(module).__name__} cannot be called with them: {errors.words(error)}'
        raise errors.ConfigError('--apply', apply_kwargs, why=why) from error
    networks = {'full': CompactModel(module, variables, small.structure), 'compact': small}
    return networks, inputs, apply_kwargs


def _xla(
    network: CompactModel, inputs: Sequence[jax.Array], apply_kwargs: dict[str, Any]
) -> Callable[[], Any]:
    run = export.network(network, apply_kwargs, cpu.fast_layers)
    # The variables are in the program, as in a file: to hand in hundreds of arrays takes as long as
    # a small network does.
    whole = jax.jit(functools.partial(run, jax.device_put(network.variables)))
    return lambda: jax.block_until_ready(whole(*inputs))


def _file(
    format: str,
    network: CompactModel,
    inputs: Sequence[jax.Array],
    apply_kwargs: dict[str, Any],
) -> Callable[[], Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'network')
        export.FORMATS[format](network, path, **apply_kwargs)
        call = export.OPENED[format](path)
    arrays = [np.asarray(array) for array in inputs]
    return lambda: call(*arrays)


# Runtimes of files, and the formats of these.
FILES = {'ONNX Runtime': 'onnx', 'TensorFlow Lite': 'tflite'}
RUNTIMES = {
    'XLA': _xla,
    **{runtime: functools.partial(_file, format) for runtime, format in FILES.items()},
}
# How often a network is run to time its nodes, and what the events that say so end in.
PROFILED = 20
TIMED = '_kernel_time'


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


def layer_table(rows: Sequence[Layer], number: int) -> str:
    """The slowest nodes of each network, so many of each, as text."""
    groups = collections.defaultdict(list)
    for row in rows:
        groups[row.folder, row.network, row.batch].append(row)
    lines = [
        ('folder', 'network', 'batch', 'node', 'operation', 'output', 'ms', 'share'),
        *(
            (
                row.folder,
                row.network,
                str(row.batch),
                row.node,
                row.kind,
                '×'.join(map(str, row.shape)),
                f'{row.milliseconds:.3f}',
                f'{row.share:.1%}',
            )
            for group in groups.values()
            for row in group[:number]
        ),
    ]
    return tables.grid(lines, left=(0, 1, 3, 4, 5))


def record(rows: Sequence[Row], threads: int, layers: Sequence[Layer] = ()) -> dict[str, Any]:
    """The rows as JSON, with what they were measured on.

    `of_saving` is the speed-up over what the multiply-adds would make of it.
    """
    full = {row.folder: row.flops for row in rows if row.network == 'full'}
    return {
        'device': jax.devices()[0].device_kind,
        'threads': threads,
        'versions': dict(_versions()),
        'rows': [
            row._asdict() | {'of_saving': row.speedup * row.flops / full[row.folder]}
            for row in rows
        ],
        **({'layers': [layer._asdict() for layer in layers]} if layers else {}),
    }


def _versions() -> Iterator[tuple[str, str]]:
    """Of what is installed under these names: modules may come from packages of others."""
    for package in ('jax', 'flax', 'onnxruntime', 'tensorflow'):
        with contextlib.suppress(metadata.PackageNotFoundError):
            yield package, metadata.version(package)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m jaxkd.benchmark`; returns its exit status."""
    return command.run(_run, _parse(arguments))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command.Parser(
        prog='python -m jaxkd.benchmark',
        description='Times compact networks beside the full ones that they were cut from: by XLA '
        'on the default device, and by ONNX Runtime and TensorFlow Lite on the CPU where those are '
        'installed; in turns, so that whatever else the machine does hurts all alike.',
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
    parser.add_argument(
        '--layers',
        type=int,
        metavar='N',
        help="list the N slowest nodes, too, by ONNX Runtime's profiler (all of them in JSON)",
    )
    parser.add_argument('--out', type=pathlib.Path, metavar='FILE', help='write JSON, too')
    command.add_model(parser, required=False)
    return parser.parse_args(arguments)


def _run(flags: argparse.Namespace) -> None:
    numbers = {
        '--batch': flags.batch,
        '--rounds': [flags.rounds],
        '--threads': [flags.threads],
        '--layers': [flags.layers],
    }
    for flag, values in numbers.items():
        for value in values:
            if value is not None and value < 1:
                raise errors.ConfigError(flag, value, why='it must be at least 1')
    if flags.layers and export.missing('onnx'):
        raise errors.ConfigError('--layers', flags.layers, why=export.missing('onnx'))
    if flags.out:
        export.check_out(flags.out)
    cores = sorted(os.sched_getaffinity(0))[: flags.threads]
    if flags.threads:
        os.sched_setaffinity(0, cores)  # XLA starts a thread on each core that it may use
    cpu.hold_memory()
    device.keep_compiled()
    apply_kwargs = command.apply(flags)
    rows: list[Row] = []
    nodes: list[Layer] = []
    for folder in flags.folders:
        small = command.load(flags, folder)
        for batch_size in flags.batch:
            rows += measure(
                small,
                batch_size=batch_size,
                rounds=flags.rounds,
                seconds=flags.seconds,
                folder=folder,
                **apply_kwargs,
            )
            if flags.layers:
                nodes += layers(small, batch_size=batch_size, folder=folder, **apply_kwargs)
    print(table(rows))
    if nodes:
        print(layer_table(nodes, flags.layers))
    if flags.out:
        found = {'command': workdir.command(), **record(rows, len(cores), nodes)}
        flags.out.write_text(json.dumps(found, indent=2) + '\n')
        print(f'wrote {flags.out}')


if __name__ == '__main__':
    sys.exit(main())
