"""`python -m jaxkd.export`: a compact network as one file that runs without its code.

Each file is run before it is called done, and compared with the network itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import functools
import importlib.util
import json
import os
import pathlib
import sys
import tempfile
from typing import Any, NamedTuple

import jax
from jax import export, lax
import jax.numpy as jnp
import numpy as np

from jaxkd import command, convert, cpu, errors, mode, saved
from jaxkd.graph import structure
from jaxkd.graph.structure import CompactModel

PLATFORMS = ('cpu', 'cuda', 'tpu')
# Batches that a file is compared with, and how far it may be from the network: rounding, as a
# share of the largest output.
COMPARED = (1, 3)
TOLERANCE = 1e-4


class Exported(NamedTuple):
    """A file that has been written and compared.

    Attributes:
      path: of the file.
      format: one of `FORMATS`.
      bytes: its size.
      difference: the largest from the network's own outputs, as a share of the largest of these.
    """

    path: pathlib.Path
    format: str
    bytes: int
    difference: float


def stablehlo(small: CompactModel, path: str | os.PathLike, **apply_kwargs: Any) -> Exported:
    """Writes the network as StableHLO for CPU, CUDA and TPU, with a free batch size.

    `jaxkd.load` reads it, and `jax.export.deserialize`, for which neither the model's code,
    Flax nor jaxkd is needed. On a CPU, convolutions run in the form that is fast there.

    Args:
      small: the compact network.
      path: of the file.
      **apply_kwargs: further arguments of the model. Those that tell it not to train are
        added; see `jaxkd.mode`.

    Raises:
      ExportError: where the network cannot be written, or the file computes something else.
    """
    run = network(small, apply_kwargs)
    fast = network(small, apply_kwargs, cpu.fast_convolutions)
    scope = export.SymbolicScope()

    def symbolic(spec: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
        sizes = ', '.join(map(str, ('batch', *spec['shape'][1:])))
        return jax.ShapeDtypeStruct(export.symbolic_shape(sizes, scope=scope), spec['dtype'])

    def everywhere(*inputs):
        return lax.platform_dependent(small.variables, *inputs, cpu=fast, default=run)

    inputs = [symbolic(spec) for spec in small.structure.inputs]
    with _failing('stablehlo', small):
        written = export.export(jax.jit(everywhere), platforms=PLATFORMS)(*inputs).serialize()
    return _compared('stablehlo', small, path, written, saved.load, run)


def onnx(small: CompactModel, path: str | os.PathLike, **apply_kwargs: Any) -> Exported:
    """Writes the network as ONNX in one file, with a free batch size; images stay channels-last.

    Needs jax2onnx and onnxruntime: `pip install 'jaxkd[export]'`. Arguments and errors as those of
    `stablehlo`.
    """
    if not has_onnx():
        raise errors.ExportError('onnx', "it needs `pip install 'jaxkd[export]'`")
    import jax2onnx

    run = network(small, apply_kwargs)
    inputs = [
        jax.ShapeDtypeStruct(('batch', *spec['shape'][1:]), spec['dtype'])
        for spec in small.structure.inputs
    ]

    with _failing('onnx', small):
        # Not by its own way to write a file, which puts large weights into a second one.
        written = jax2onnx.to_onnx(
            functools.partial(run, small.variables), inputs, return_mode='proto'
        ).SerializeToString()
    return _compared('onnx', small, path, written, onnx_function, run)


def has_onnx() -> bool:
    """Whether ONNX can be written and run."""
    return all(importlib.util.find_spec(name) for name in ('jax2onnx', 'onnxruntime'))


def onnx_function(path: str | os.PathLike) -> Callable[..., Any]:
    """The function in an ONNX file, by ONNX Runtime on the cores of this process."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of shapes that it then infers itself
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    # Its threads would go on waiting busily while something else is computed.
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    session = onnxruntime.InferenceSession(
        os.fspath(path), options, providers=['CPUExecutionProvider']
    )
    names = [given.name for given in session.get_inputs()]

    def call(*inputs: Any) -> Any:
        found = session.run(None, dict(zip(names, map(np.asarray, inputs), strict=True)))
        return found[0] if len(found) == 1 else found

    return call


def safetensors(small: CompactModel, path: str | os.PathLike, **apply_kwargs: Any) -> Exported:
    """Writes the weights with PyTorch's names and layouts, and beside them the widths as JSON.

    What `convert.describe` says stands in the file's metadata, too. Here it is read back into the
    network. Needs safetensors: `pip install 'jaxkd[export]'`. Arguments and errors as those of
    `stablehlo`.
    """
    if not importlib.util.find_spec('safetensors'):
        raise errors.ExportError('safetensors', "it needs `pip install 'jaxkd[export]'`")
    from safetensors import numpy as file_format

    run, model = network(small, apply_kwargs), structure.full_module(small.module)
    with _failing('safetensors', small):
        tensors = convert.to_torch(small.variables, model)
        described = convert.describe(run, small.variables, random_inputs(small, 1), model)
        metadata = {convert.KEY: json.dumps(described)}
        written = file_format.save(tensors, metadata)

    def opened(file: pathlib.Path) -> Callable[..., Any]:
        return functools.partial(run, convert.read(file, model, small.variables))

    done = _compared('safetensors', small, path, written, opened, run)
    beside = done.path.with_suffix('.json')
    beside.write_text(json.dumps(described, indent=2) + '\n')
    return done


FORMATS: dict[str, Callable[..., Exported]] = {
    'stablehlo': stablehlo,
    'onnx': onnx,
    'safetensors': safetensors,
}


def random_inputs(small: CompactModel, batch_size: int) -> list[jax.Array]:
    """Inputs of the shapes that the network was traced with, but for the batch."""
    random = np.random.default_rng(0)
    return [
        jnp.asarray(random.random((batch_size, *spec['shape'][1:])), spec['dtype'])
        for spec in small.structure.inputs
    ]


def network(
    small: CompactModel,
    apply_kwargs: Mapping[str, Any],
    within: Callable[[], Any] = contextlib.nullcontext,
) -> Callable[..., Any]:
    """The network as a function of its variables and inputs, traced `within` a context."""
    kwargs = {**mode.arguments(small.module, train=False), **apply_kwargs}

    def run(variables, *inputs):
        with within():
            return small.module.apply(variables, *inputs, **kwargs)

    return run


@contextlib.contextmanager
def _failing(name: str, small: CompactModel) -> Iterator[None]:
    """Whatever a converter raises, as one sentence."""
    try:
        yield
    except Exception as error:
        full = type(structure.full_module(small.module)).__name__
        raise errors.ExportError(name, f'{full}: {errors.words(error)}') from error


def _compared(
    name: str,
    small: CompactModel,
    path: str | os.PathLike,
    written: bytes,
    opened: Callable[[pathlib.Path], Callable[..., Any]],
    run: Callable[..., Any],
) -> Exported:
    """Writes a file aside, runs it, and gives it its name if it computes what it should."""
    path = pathlib.Path(path)
    if not path.parent.is_dir():
        raise errors.ConfigError('--out', str(path), why=f'there is no folder {path.parent}')
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f'.{path.name}.') as folder:
        file = pathlib.Path(folder) / path.name
        file.write_bytes(written)
        call, expected = opened(file), jax.jit(run)
        difference = 0.0
        for batch_size in COMPARED:
            inputs = random_inputs(small, batch_size)
            pairs = zip(
                jax.tree.leaves(call(*inputs)),
                jax.tree.leaves(expected(small.variables, *inputs)),
                strict=True,
            )
            for found, right in pairs:
                far = np.abs(np.asarray(found) - np.asarray(right)).max()
                difference = max(difference, float(far / np.abs(right).max()))
        if not difference <= TOLERANCE:
            why = f'its outputs are off by {difference:.1e} of the largest'
            raise errors.ExportError(name, why)
        size = file.stat().st_size
        file.replace(path)
    return Exported(path, name, size, difference)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m jaxkd.export`; returns its exit status."""
    return command.run(_run, _parse(arguments))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command.Parser(
        prog='python -m jaxkd.export',
        description='Writes a compact network as one file that runs without its code: StableHLO '
        'for CPU, CUDA and TPU, or ONNX; or its weights for PyTorch, as safetensors. The file is '
        'run and compared before it is kept.',
        epilog='exit status: 0 done, 1 it cannot be written, 2 a wrong command line',
    )
    parser.add_argument('folder', metavar='DIR', help='a finished run, or what jaxkd.save wrote')
    parser.add_argument('--format', required=True, choices=FORMATS)
    parser.add_argument('--out', required=True, metavar='FILE')
    command.add_model(parser, required=False)
    return parser.parse_args(arguments)


def _run(flags: argparse.Namespace) -> None:
    small = saved.load(saved.within(flags.folder), command.model(flags))
    done = FORMATS[flags.format](small, flags.out, **command.apply(flags))
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(small.variables))
    print(
        f'{done.path}: {done.format}, {done.bytes:,} bytes ({parameters:,} of them variables), '
        f'at most {done.difference:.0e} of the largest output from the network itself'
    )


if __name__ == '__main__':
    sys.exit(main())
