"""`python -m jaxkd.export`: a compact network as one file that runs without its code.

Each file is run before it is called done, and compared with the network itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import functools
import importlib.util
import inspect
import json
import os
import pathlib
import re
import sys
import tempfile
import textwrap
import traceback
from typing import Any, NamedTuple
import warnings

import jax
from jax import export, lax
import jax.numpy as jnp
import numpy as np

from jaxkd import command, convert, cpu, data, errors, mode, onnx_graph, saved
from jaxkd import fold as folding
from jaxkd import workdir as records
from jaxkd.graph import resize, structure
from jaxkd.graph.structure import CompactModel

PLATFORMS = ('cpu', 'cuda', 'tpu')
# What kernels may be stored in.
DTYPES = ('float32', 'float16', 'bfloat16')
# What formats need beside jaxkd: an extra of it, and the packages in that.
EXTRAS = {
    'onnx': ('export', ('jax2onnx', 'onnx', 'onnxruntime')),
    'tflite': ('tensorflow', ('tensorflow',)),
    'safetensors': ('export', ('safetensors',)),
}
# Batches that a file is compared with, and how far it may be from the network: float32's rounding,
# as a share of the largest output.
COMPARED = (1, 3)
TOLERANCE = 1e-4
# Images that calibrate an int8 network, and a batch of those that it is judged by.
CALIBRATION = 256
JUDGED = 256
# What JAX says where a model's code makes a number of a size that is free.
_NUMBER_WANTED = (
    "'_DimExpr' object cannot be interpreted as an integer",
    'used in a context that requires a constant',
)
# What to do about what jax2onnx and ONNX Runtime cannot do, by what they say.
_OTHER = 'jax2onnx {}: ask for stablehlo'
_FIXED = _OTHER.format('has an operation of the model for a fixed batch size alone')
_ADVICE = {
    '_DynamicDimSentinel': _FIXED,
    'Batching rule for': _OTHER.format('writes no layer under nn.vmap')
    + ', or call the layers one after the other',
    'NOT_IMPLEMENTED : Could not find an implementation': 'ONNX Runtime computes this on a CPU in '
    'other types alone: where the model has dtype bfloat16, make it with float32 (the dtype of the '
    'export may be bfloat16 all the same), or ask for stablehlo',
}


class Exported(NamedTuple):
    """A file that has been written and compared.

    Attributes:
      path: of the file; None if none was asked for.
      format: one of `FORMATS`.
      bytes: its size.
      difference: the largest from the network's own outputs, as a share of the largest of these;
        None if there is no file.
      variables: how many arrays of variables the network was written with.
    """

    path: pathlib.Path | None
    format: str
    bytes: int
    difference: float | None
    variables: int


def stablehlo(
    small: CompactModel,
    path: str | os.PathLike | None,
    *,
    fold: bool = False,
    dtype: str = 'float32',
    **apply_kwargs: Any,
) -> Exported:
    """Writes the network as StableHLO for CPU, CUDA and TPU, with a free batch size.

    `jaxkd.load` reads it, and `jax.export.deserialize`, for which neither the model's code,
    Flax nor jaxkd is needed. On a CPU, convolutions run in the form that is fast there.

    Args:
      small: the compact network.
      path: of the file; with None nothing is written or compared, and its size alone is told.
      fold: whether BatchNorms go into the layers before them.
      dtype: what kernels (whatever has two axes or more) are stored in; the network computes in
        its own type all the same.
      **apply_kwargs: further arguments of the model. Those that tell it not to train are
        added; see `jaxkd.mode`.

    Raises:
      ConfigError: for a type that is none of `DTYPES`.
      ExportError: where the network cannot be written, or the file computes something else. It
        may be off by rounding; where kernels are rounded to another type, by as much more for each
        of them as that type rounds a number: relative errors of layers add up.
    """
    _check_there('stablehlo', path, dtype)
    own, inputs = network(small, apply_kwargs), _inputs(small)
    variables, within = small.variables, contextlib.nullcontext
    if fold:
        with _failing('stablehlo', small):
            folded = folding.fold(own, variables, *inputs)
        variables, within = folded.variables, folded.within
    stored = jax.tree.map(
        lambda leaf: leaf.astype(jnp.dtype(dtype)) if _is_kernel(leaf) else leaf, variables
    )

    @contextlib.contextmanager
    def fast():
        with within(), cpu.fast_layers():
            yield

    run, run_fast = (network(small, apply_kwargs, context) for context in (within, fast))
    scope = export.SymbolicScope()

    def symbolic(spec: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sizes = ', '.join(map(str, _batches(spec.shape, 'batch')))
        return jax.ShapeDtypeStruct(export.symbolic_shape(sizes, scope=scope), spec.dtype)

    def restored():
        return jax.tree.map(
            lambda leaf, was: lax.convert_element_type(leaf, was.dtype), stored, variables
        )

    def everywhere(*inputs):
        return lax.platform_dependent(restored(), *inputs, cpu=run_fast, default=run)

    with _failing('stablehlo', small):
        exporting = export.export(jax.jit(everywhere), platforms=PLATFORMS)
        written = exporting(*map(symbolic, inputs)).serialize()
    rounding = _rounding(small, own)
    return _compared(
        *('stablehlo', small, path, written, saved.load, own),
        rounding,
        variables=variables,
        tolerance=rounding + _stored(small, dtype),
        exactly=None if dtype == 'float32' else lambda _, *inputs: run(restored(), *inputs),
    )


def onnx(
    small: CompactModel,
    path: str | os.PathLike | None,
    *,
    dtype: str = 'float32',
    int8: np.ndarray | None = None,
    **apply_kwargs: Any,
) -> Exported:
    """Writes the network as ONNX in one file, with a free batch size; images stay channels-last.

    BatchNorms behind convolutions are folded into them. Needs jax2onnx and onnxruntime:
    `pip install 'jaxkd[export]'`.

    Args:
      small, path, dtype, **apply_kwargs: see `stablehlo`.
      int8: images, float32 [number, height, width, channels] as the network takes them. Weights and
        activations become int8, and their ranges are those that these images make.

    Raises:
      ConfigError, ExportError: see `stablehlo`. Before it is made int8 the network is compared;
        after that nothing bounds what rounding does, and the difference is told alone.
    """
    _check_there('onnx', path, dtype, int8)
    own = network(small, apply_kwargs)
    inputs = [jax.ShapeDtypeStruct(_batches(x.shape, 'batch'), x.dtype) for x in _inputs(small)]
    with _failing('onnx', small):
        variables = _widened(own, small.variables, _inputs(small))
        model = onnx_graph.converted(functools.partial(own, variables), inputs)
        written = model.SerializeToString()
    rounding = _rounding(small, own)
    if dtype != 'float32' or int8 is not None:
        _check('onnx', small, onnx_function(written), own, rounding)
        with _failing('onnx', small):
            model = (
                onnx_graph.stored_in(model, dtype)
                if int8 is None
                else onnx_graph.quantized(model, int8)
            )
            written = model.SerializeToString()
    return _compared(
        *('onnx', small, path, written, onnx_function, own),
        tolerance=rounding + _stored(small, dtype, int8),
    )


def tflite(
    small: CompactModel,
    path: str | os.PathLike | None,
    *,
    dtype: str = 'float32',
    int8: np.ndarray | None = None,
    **apply_kwargs: Any,
) -> Exported:
    """Writes the network for TensorFlow Lite (LiteRT), for one image at a time.

    With a free batch size its converter would leave BatchNorms unfolded and shapes to be computed
    at run time. Needs TensorFlow: `pip install 'jaxkd[tensorflow]'`. Arguments and errors as those
    of `onnx`; there is no bfloat16.
    """
    _check_there('tflite', path, dtype, int8)
    if dtype == 'bfloat16':
        raise errors.ConfigError('dtype', dtype, why='TensorFlow Lite stores no such weights')
    with _failing('tflite', small):
        from jax.experimental import jax2tf
        import tensorflow as tf

    own, inputs = network(small, apply_kwargs), _inputs(small)
    function = tf.function(
        jax2tf.convert(
            functools.partial(own, small.variables),
            with_gradient=False,
        ),
        input_signature=[
            tf.TensorSpec(_batches(spec.shape, 1), spec.dtype, f'input_{i}')
            for i, spec in enumerate(inputs)
        ],
        autograph=False,
    )

    def converted(**settings: Any) -> bytes:
        with _failing('tflite', small):
            concrete = function.get_concrete_function()
            converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete], function)
            for name, value in settings.items():
                setattr(converter, name, value)
            return converter.convert()

    written, rounding = converted(), _rounding(small, own)
    if dtype != 'float32' or int8 is not None:
        _check('tflite', small, tflite_function(written), own, rounding)
        smaller = {'optimizations': [tf.lite.Optimize.DEFAULT]}
        if int8 is None:
            smaller['target_spec'] = tf.lite.TargetSpec(supported_types=[tf.float16])
        else:
            smaller['representative_dataset'] = lambda: ([image[None]] for image in int8)
        written = converted(**smaller)
    return _compared(
        *('tflite', small, path, written, tflite_function, own),
        tolerance=rounding + _stored(small, dtype, int8),
    )


def safetensors(
    small: CompactModel, path: str | os.PathLike | None, **apply_kwargs: Any
) -> Exported:
    """Writes the weights with PyTorch's names and layouts, and beside them the widths as JSON.

    What `convert.describe` says stands in the file's metadata, too. Here it is read back into the
    network. Needs safetensors: `pip install 'jaxkd[export]'`. Arguments and errors as those of
    `stablehlo`.
    """
    _check_there('safetensors', path)
    from safetensors import numpy as file_format

    if path:
        _check_name(pathlib.Path(path))
    run, model = network(small, apply_kwargs), structure.full_module(small.module)
    with _failing('safetensors', small):
        tensors = convert.to_torch(small.variables, model)
        described = convert.describe(run, small.variables, random_inputs(small, 1), model)
        metadata = {convert.KEY: json.dumps(described)}
        written = file_format.save(tensors, metadata)

    def opened(file: pathlib.Path) -> Callable[..., Any]:
        # Compiled, as what it is compared with: in half precision that rounds elsewhere.
        return functools.partial(jax.jit(run), convert.read(file, model, small.variables))

    def write_widths():
        text = json.dumps(described, indent=2) + '\n'
        records.write_text(pathlib.Path(path).with_suffix('.json'), text)

    rounding = _rounding(small, run)
    return _compared(
        'safetensors', small, path, written, opened, run, rounding, before=write_widths
    )


def _check_name(path: pathlib.Path) -> None:
    """Refuses a name of weights beside which their widths have no place."""
    why = None
    if path.suffix != '.safetensors':
        why = 'the name has to end in .safetensors'
    elif (beside := path.with_suffix('.json')).exists():
        try:
            known = json.loads(beside.read_bytes()).keys() >= {'names', 'settings', 'layers'}
        except (OSError, ValueError, AttributeError):
            known = False
        if not known:
            why = f'the widths of its layers would replace {beside}; take another name'
    if why:
        raise errors.ConfigError('--out', str(path), why=why)


FORMATS: dict[str, Callable[..., Exported]] = {
    'stablehlo': stablehlo,
    'onnx': onnx,
    'tflite': tflite,
    'safetensors': safetensors,
}


def missing(name: str) -> str | None:
    """What has to be installed for a format to be written and run; None if all is there."""
    extra, packages = EXTRAS.get(name, ('', ()))
    there = all(map(importlib.util.find_spec, packages))
    return None if there else f"it needs `pip install 'jaxkd[{extra}]'`"


def check_formats(field: str, formats: Sequence[str]) -> None:
    """Refuses what is no format, or cannot be written here.

    Raises:
      ConfigError: naming the config's `field`.
    """
    for name in formats:
        if name not in FORMATS:
            raise errors.ConfigError(field, name, allowed=FORMATS)
        if missing(name):
            raise errors.ConfigError(field, name, why=missing(name))


def check_out(path: str | os.PathLike) -> None:
    """Refuses a file that cannot be written, before the work that it is to hold is done.

    Raises:
      ConfigError: naming the flag --out.
    """
    path, why = pathlib.Path(path), None
    if path.is_dir():
        why = 'it is a folder; name a file'
    elif not path.parent.is_dir():
        why = f'there is no folder {path.parent}'
    elif not os.access(path.parent, os.W_OK):
        why = f'no permission to write in {path.parent}'
    if why:
        raise errors.ConfigError('--out', str(path), why=why)


def onnx_function(source: str | os.PathLike | bytes) -> Callable[..., Any]:
    """The function in an ONNX file, or in its bytes, by ONNX Runtime on this process's cores."""
    session = onnx_session(source)
    names = [given.name for given in session.get_inputs()]

    def call(*inputs: Any) -> Any:
        found = session.run(None, dict(zip(names, map(np.asarray, inputs), strict=True)))
        return found[0] if len(found) == 1 else found

    return call


def onnx_session(source: str | os.PathLike | bytes, profile: str | None = None) -> Any:
    """An `onnxruntime.InferenceSession` on this process's cores.

    With `profile` it times its nodes, for a file whose name begins so.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of shapes that it then infers itself
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    # Its threads would go on waiting busily while something else is computed.
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    if not isinstance(source, bytes):
        source = os.fspath(source)
    return onnxruntime.InferenceSession(source, options, providers=['CPUExecutionProvider'])


def tflite_function(source: str | os.PathLike | bytes) -> Callable[..., Any]:
    """The function in a TensorFlow Lite file, or in its bytes, on this process's cores.

    It takes batches, of which it computes one image after the other.
    """
    import tensorflow as tf

    if not isinstance(source, bytes):
        source = pathlib.Path(source).read_bytes()
    with warnings.catch_warnings():
        # It announces another package for itself.
        warnings.filterwarnings('ignore', message='.*tf.lite.Interpreter is deprecated')
        interpreter = tf.lite.Interpreter(
            model_content=source, num_threads=len(os.sched_getaffinity(0))
        )
    takes, gives = (
        [entry['index'] for entry in sorted(details, key=lambda entry: _counted(entry['name']))]
        for details in (interpreter.get_input_details(), interpreter.get_output_details())
    )
    interpreter.allocate_tensors()

    def one(*images: np.ndarray) -> list[np.ndarray]:
        for index, image in zip(takes, images, strict=True):
            interpreter.set_tensor(index, image[None])
        interpreter.invoke()
        return [interpreter.get_tensor(index) for index in gives]

    def call(*inputs: Any) -> Any:
        each = [one(*images) for images in zip(*map(np.asarray, inputs), strict=True)]
        found = [np.concatenate(outputs) for outputs in zip(*each, strict=True)]
        return found[0] if len(found) == 1 else found

    return call


def _counted(name: str) -> list[str | int]:
    """What sorts names with numbers in them by these numbers: as text, 10 is before 2.

    >>> sorted(['Identity_10', 'Identity_2', 'Identity'], key=_counted)
    ['Identity', 'Identity_2', 'Identity_10']
    """
    return [int(part) if part.isdecimal() else part for part in re.split(r'(\d+)', name)]


# What runs a file of each format: a function of its path.
OPENED: dict[str, Callable[..., Callable[..., Any]]] = {
    'stablehlo': saved.load,
    'onnx': onnx_function,
    'tflite': tflite_function,
}


def random_inputs(small: CompactModel, batch_size: int) -> list[jax.Array]:
    """Inputs of the shapes that the network was traced with, but for the batch."""
    random = np.random.default_rng(0)

    def draw(shape: Sequence[int], dtype: str) -> jax.Array:
        shape = _batches(shape, batch_size)
        if jnp.issubdtype(dtype, jnp.floating):
            return jnp.asarray(random.random(shape), dtype)
        # Indices may be as few as two.
        return jnp.asarray(random.integers(0, 2, shape), dtype)

    return [draw(spec['shape'], spec['dtype']) for spec in small.structure.inputs]


def _batches(shape: Sequence[int], batch: Any) -> tuple[Any, ...]:
    """The shape of an input for a batch of another size; what has no axis has no batch."""
    return (batch, *shape[1:]) if shape else ()


def network(
    small: CompactModel,
    apply_kwargs: Mapping[str, Any],
    within: Callable[[], Any] = contextlib.nullcontext,
) -> Callable[..., Any]:
    """The network as a function of its variables and inputs, traced `within` a context."""
    kwargs = mode.evaluating(small.module, apply_kwargs)

    def run(variables, *inputs):
        with within():
            return resize.apply(small.module, variables, *inputs, **kwargs)

    return run


@contextlib.contextmanager
def _failing(name: str, small: CompactModel) -> Iterator[None]:
    """Whatever a converter raises, as one sentence: some add the whole graph."""
    try:
        yield
    except Exception as error:
        full = type(structure.full_module(small.module)).__name__
        why = textwrap.shorten(errors.words(error), 400, placeholder=' …')
        if advice := _advice(error, why):
            why = f'{advice} ({why})'
        raise errors.ExportError(name, f'{full}: {why}') from error


def _advice(error: Exception, why: str) -> str | None:
    """What to do about what a converter raised; None if that is not known.

    A number that is wanted for the batch size is wanted by the model's code, or by the converter's.
    """
    if any(words in why for words in _NUMBER_WANTED):
        asking = False
        for frame in traceback.extract_tb(error.__traceback__):
            folders = pathlib.PurePath(frame.filename).parts
            if 'jax2onnx' in folders or 'jax' not in folders:  # JAX asks for others
                asking = 'jax2onnx' in folders
        if asking:
            return _FIXED
        return 'the batch size is free: use x.shape[0], not len(x) or int(…)'
    return next((advice for words, advice in _ADVICE.items() if words in why), None)


def _inputs(small: CompactModel) -> list[jax.ShapeDtypeStruct]:
    """Those that the network was traced with."""
    return [jax.ShapeDtypeStruct(spec['shape'], spec['dtype']) for spec in small.structure.inputs]


def _check_there(
    name: str,
    path: str | os.PathLike | None,
    dtype: str = 'float32',
    int8: np.ndarray | None = None,
) -> None:
    """Refuses a format or a path that cannot be written, and types that there are not."""
    if missing(name):
        raise errors.ExportError(name, missing(name))
    if dtype not in DTYPES:
        raise errors.ConfigError('dtype', dtype, allowed=DTYPES)
    if int8 is not None and dtype != 'float32':
        raise errors.ConfigError('dtype', dtype, why='int8 is a type of its own; ask for one')
    if path is not None:
        check_out(path)


def _rounding(small: CompactModel, run: Callable[..., Any]) -> float:
    """How far two ways to compute the network itself may be apart.

    A network that stores or computes anything in a coarser type than float32 rounds to it in each
    layer, elsewhere in one way than in the other: by half of the type's eps in each of them.
    """
    program = jax.make_jaxpr(run)(small.variables, *_inputs(small))
    types = {kind for kind in _types(program.jaxpr) if jnp.issubdtype(kind, jnp.floating)}
    eps = max((float(jnp.finfo(kind).eps) for kind in types), default=0.0)
    if eps <= float(jnp.finfo(np.float32).eps):
        return TOLERANCE
    layers = sum(leaf.ndim > 1 for leaf in jax.tree.leaves(small.variables))
    return TOLERANCE + layers * eps


def _widened(run: Callable[..., Any], variables: Any, inputs: Sequence[Any]) -> Any:
    """The variables with float32 for coarser types, if the outputs are of the same types so.

    Layers that compute in another type round them to it again. jax2onnx takes no kernels of a
    convolution in half precision, and ONNX Runtime no statistics of a BatchNorm.
    """

    def wide(leaf):
        coarse = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
        return leaf.astype(np.float32) if coarse else leaf

    widened = jax.tree.map(wide, variables)
    made, right = (
        [leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(run, given, *inputs))]
        for given in (widened, variables)
    )
    return widened if made == right else variables


def _types(jaxpr: Any) -> Iterator[Any]:
    """Of all arrays in a program."""
    made = (x for eqn in jaxpr.eqns for x in eqn.outvars)
    for x in (*jaxpr.constvars, *jaxpr.invars, *made):
        if hasattr(x.aval, 'dtype'):
            yield x.aval.dtype
    for eqn in jaxpr.eqns:
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from _types(inner)


def _stored(small: CompactModel, dtype: str, int8: np.ndarray | None = None) -> float:
    """How much further a file may be from the network, for what it stores kernels in."""
    if int8 is not None:
        return float('inf')
    if dtype == 'float32':
        return 0.0
    kernels = sum(map(_is_kernel, jax.tree.leaves(small.variables)))
    return kernels * float(jnp.finfo(dtype).eps) / 2


def _is_kernel(leaf: Any) -> bool:
    """Whether an array is stored in another type: vectors are few, and norms need them whole."""
    return leaf.ndim > 1 and leaf.dtype == np.float32


def _compared(
    name: str,
    small: CompactModel,
    path: str | os.PathLike | None,
    written: bytes,
    opened: Callable[[pathlib.Path], Callable[..., Any]],
    run: Callable[..., Any],
    rounding: float = TOLERANCE,
    *,
    variables: Any = None,
    tolerance: float | None = None,
    exactly: Callable[..., Any] | None = None,
    before: Callable[[], None] = lambda: None,
) -> Exported:
    """Writes a file aside, runs it, and gives it its name if it computes what it should.

    That is what `run` does with the network's variables, but for `tolerance` (by default
    `rounding`), and what `exactly` does, where it is given, but for `rounding`. `variables` are
    those written, if others. `before` the file has its name, what belongs to it is written: where
    that fails, or all stops in between, there is no file without it.
    """
    number = len(jax.tree.leaves(small.variables if variables is None else variables))
    if path is None:
        return Exported(None, name, len(written), None, number)
    path = pathlib.Path(path)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f'.{path.name}.') as folder:
            file = pathlib.Path(folder) / path.name
            file.write_bytes(written)
            with _failing(name, small):
                call = opened(file)
            if exactly:
                _check(name, small, call, exactly, rounding)
            difference = _check(
                name, small, call, run, rounding if tolerance is None else tolerance
            )
            size = file.stat().st_size
            before()
            file.replace(path)
    except OSError as error:
        why = f'{path} cannot be written: {error.strerror or error}'
        raise errors.ExportError(name, why) from error
    return Exported(path, name, size, difference, number)


def _check(
    name: str,
    small: CompactModel,
    call: Callable[..., Any],
    run: Callable[..., Any],
    tolerance: float,
) -> float:
    """The largest difference of what two functions make of random inputs.

    As a share of the largest output. `call` is of the inputs, and `run` of the network's variables
    and the inputs.

    Raises:
      ExportError: if it is more than the tolerance.
    """
    expected = jax.jit(run)
    difference = 0.0
    for batch_size in COMPARED:
        inputs = random_inputs(small, batch_size)
        with _failing(name, small):
            outputs = call(*inputs)
        rights = expected(small.variables, *inputs)
        pairs = zip(jax.tree.leaves(outputs), jax.tree.leaves(rights), strict=True)
        for found, right in pairs:
            found, right = _numbers(found), _numbers(right)
            far, largest = np.abs(found - right).max(initial=0), np.abs(right).max(initial=0)
            with np.errstate(divide='ignore'):  # nothing is near to zeros but zeros
                share = np.divide(far, largest) if far else 0.0
            # `max` would pass over what is no number.
            difference = float(np.maximum(difference, share))
    if not difference <= tolerance:
        why = f'its outputs are off by {difference:.1e} of the largest'
        raise errors.ExportError(name, why)
    return difference


def _numbers(x: Any) -> np.ndarray:
    """An array that can be subtracted: booleans cannot."""
    x = np.asarray(x)
    return x.astype(np.result_type(x.dtype, np.float32))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m jaxkd.export`; returns its exit status."""
    return command.run(_run, _parse(arguments))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command.Parser(
        prog='python -m jaxkd.export',
        description='Writes a compact network as one file that runs without its code: StableHLO '
        'for CPU, CUDA and TPU, ONNX, or TensorFlow Lite; or its weights for PyTorch, as '
        'safetensors. The file is run and compared before it is kept.',
        epilog='exit status: 0 done, 1 it cannot be written, 2 a wrong command line',
    )
    parser.add_argument('folder', metavar='DIR', help='a finished run, or what jaxkd.save wrote')
    parser.add_argument('--format', required=True, choices=FORMATS)
    parser.add_argument('--out', required=True, metavar='FILE')
    parser.add_argument(
        '--fold',
        action='store_true',
        help='fold BatchNorms into the layers before them, as is done for ONNX and TensorFlow Lite '
        'in any case',
    )
    parser.add_argument(
        '--dtype',
        choices=DTYPES,
        default='float32',
        help='what kernels are stored in (%(default)s)',
    )
    parser.add_argument(
        '--int8',
        action='store_true',
        help='weights and activations in int8, calibrated on training images of the run in DIR; '
        'tells the accuracy on its test part',
    )
    command.add_model(parser, required=False)
    return parser.parse_args(arguments)


def _run(flags: argparse.Namespace) -> None:
    small = command.load(flags, flags.folder)
    write, apply_kwargs = FORMATS[flags.format], command.apply(flags)
    asked = {'fold': flags.fold, 'dtype': flags.dtype, 'int8': flags.int8}
    options = {name: value for name, value in asked.items() if value not in (False, 'float32')}
    for name in options.keys() - inspect.signature(write).parameters.keys():
        able = [other for other in FORMATS if name in inspect.signature(FORMATS[other]).parameters]
        why = f'--{name} is for {" and ".join(able)}'
        raise errors.ConfigError('--format', flags.format, why=why)
    if flags.int8:
        images = _images_of(flags.folder)
        options['int8'] = images.calibration()
    done = write(small, flags.out, **options, **apply_kwargs)
    leaves = jax.tree.leaves(small.variables)
    print(
        f'{done.path}: {done.format}, {done.bytes:,} bytes for variables of '
        f'{sum(leaf.nbytes for leaf in leaves):,}, at most {done.difference:.0e} of the largest '
        'output from the network itself'
    )
    if flags.fold:
        print(f'{done.variables} arrays of variables, {len(leaves)} before BatchNorms were folded')
    if flags.int8:
        own = functools.partial(jax.jit(network(small, apply_kwargs)), small.variables)
        judged = {'float32': own, 'int8': OPENED[flags.format](done.path)}
        found = (f'{images.accuracy(call):.4f} ({name})' for name, call in judged.items())
        print(f'accuracy on the test part: {", ".join(found)}')


class _Images(NamedTuple):
    """The images that a run was made with.

    Attributes:
      load: a part of them, by name.
      mean, std: float32 [channels], by which the network wants pixels normalized.
    """

    load: Callable[[str], data.Split]
    mean: np.ndarray
    std: np.ndarray

    def calibration(self) -> np.ndarray:
        """Some of the training part, at even distances."""
        part = self.load('train')
        chosen = np.unique(np.linspace(0, part.size - 1, CALIBRATION).astype(int))
        return np.asarray(data.normalize(part.fetch(chosen), self.mean, self.std))

    def accuracy(self, call: Callable[..., Any]) -> float:
        """The share of the test part that a function of images gives the right answers to.

        It returns logits, or has them as the first of its outputs.
        """
        part = self.load('test')
        right = 0
        for start in range(0, part.size, JUDGED):
            chosen = np.arange(start, min(start + JUDGED, part.size))
            found = call(data.normalize(part.fetch(chosen), self.mean, self.std))
            logits = found[0] if isinstance(found, tuple | list) else found  # with features
            right += np.sum(np.argmax(logits, -1) == part.labels[chosen])
        return float(right / part.size)


def _images_of(folder: str) -> _Images:
    """Those of the run in a folder.

    Raises:
      ConfigError: for a folder that holds no run.
    """
    report = records.look_up(pathlib.Path(folder) / 'report.json')
    if not report or 'normalization' not in report:
        why = (
            'int8 is calibrated on the images of a finished run, and there is no report.json of one'
        )
        raise errors.ConfigError('DIR', folder, why=why)
    given = report['config']['data']
    corrupt = data.CorruptImages(given['corrupt_limit'])
    load = data.loader(given, report['seed'], corrupt)
    mean, std = (np.float32(report['normalization'][name]) for name in ('mean', 'std'))
    return _Images(load, mean, std)


if __name__ == '__main__':
    sys.exit(main())
