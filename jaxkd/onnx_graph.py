"""ONNX graphs: made of a function, tidied, stored in fewer bits, or quantized.

Needs jax2onnx, onnx and onnxruntime, which are imported where they are used.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import inspect
import itertools
import logging
import pathlib
import tempfile
from typing import Any

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

# Layers that make their bias, or zeros, of no channels.
_READERS = (
    nn.Conv,
    nn.ConvTranspose,
    nn.Dense,
    nn.DenseGeneral,
    nn.MultiHeadDotProductAttention,
    nn.MultiHeadAttention,
    nn.SelfAttention,
)
_NORMS = (nn.BatchNorm, nn.GroupNorm, nn.InstanceNorm, nn.LayerNorm, nn.RMSNorm)
# Functions that jax2onnx replaces by what takes less: no free batch size, no axis by position. What
# JAX's own are made of it takes.
_PLAIN = {
    (module, name): getattr(module, name)
    for module, name in ((jax.image, 'resize'), (jnp, 'shape'), (jnp, 'full'), (jnp, 'cumsum'))
}
# Images that calibrate an int8 network, in batches of so many.
CALIBRATION_BATCH = 32
# Of ONNX Runtime's log: fatal errors alone.
QUIET = 4


def converted(call: Callable[..., Any], inputs: Sequence[jax.ShapeDtypeStruct]) -> Any:
    """A function of arrays as an ONNX graph (`onnx.ModelProto`), tidied."""
    import jax2onnx

    linen = [kind for kind in vars(nn).values() if inspect.isclass(kind)]
    own = {kind: kind.__call__ for kind in linen if issubclass(kind, nn.Module)}
    empty = _empty(call, inputs)

    def prepared(*inputs):
        with _plain_pooling(), _restored(_PLAIN), _seen(own), _constant(empty):
            return call(*inputs)

    log = logging.getLogger('onnx_ir')  # it warns of shapes that it leaves out
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        # Not by its own way to write a file, which puts large weights into a second one.
        return tidy(jax2onnx.to_onnx(prepared, inputs, return_mode='proto'))
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def _restored(functions: Mapping[tuple[Any, str], Callable[..., Any]]) -> Iterator[None]:
    """Inside, modules have these functions, whatever has been put in their place."""
    theirs = {(module, name): getattr(module, name) for module, name in functions}
    for (module, name), function in functions.items():
        setattr(module, name, function)
    try:
        yield
    finally:
        for (module, name), function in theirs.items():
            setattr(module, name, function)


@contextlib.contextmanager
def _seen(own: Mapping[type[nn.Module], Callable[..., Any]]) -> Iterator[None]:
    """Inside, what intercepts methods sees the calls of the layers that jax2onnx has replaced.

    It puts functions in the place of `own`, for which Linen does not ask interceptors: a
    convolution or a GroupNorm of a compact network would have the full network's groups.
    """
    theirs = {
        kind: kind.__call__
        for kind in own
        if '__call__' in vars(kind) and kind.__call__ is not own[kind]
    }

    def method(function):
        def __call__(self, *args, **kwargs):
            return function(self, *args, **kwargs)

        # As Linen makes a method of it.
        return type('Layer', (nn.Module,), {'__call__': __call__}).__call__

    for kind, function in theirs.items():
        kind.__call__ = method(function)
    try:
        yield
    finally:
        for kind, function in theirs.items():
            kind.__call__ = function


def _empty(
    call: Callable[..., Any], inputs: Sequence[jax.ShapeDtypeStruct]
) -> dict[tuple[str, ...], list[jax.ShapeDtypeStruct]]:
    """What layers that read or make no channels, as where a branch has gone, make of one example.

    By path, for each call.
    """
    found = collections.defaultdict(list)

    def watch(call, args, kwargs, context):
        made, layer = call(*args, **kwargs), context.module
        known = context.method_name == '__call__' and type(layer) in (*_READERS, *_NORMS)
        if known and not (made.size and _weights(layer).get('kernel', made).size):
            found[layer.path].append(jax.ShapeDtypeStruct(made.shape, made.dtype))
        return made

    one = [jax.ShapeDtypeStruct((1, *x.shape[1:]) if x.shape else (), x.dtype) for x in inputs]
    with nn.intercept_methods(watch):
        jax.eval_shape(call, *one)
    return found


def _weights(layer: nn.Module) -> Mapping[str, Any]:
    """The parameters of a layer, or of the last one in it, as in attention."""
    params = layer.variables.get('params', {})
    return params.get('out', params)


@contextlib.contextmanager
def _constant(empty: Mapping[tuple[str, ...], Sequence[jax.ShapeDtypeStruct]]) -> Iterator[None]:
    """Inside, layers that read nothing are their bias, and what they read is not computed.

    Runtimes refuse some operations on arrays without elements.
    """
    left = {path: itertools.cycle(calls) for path, calls in empty.items()}

    def intercept(call, args, kwargs, context):
        layer = context.module
        if context.method_name != '__call__' or layer.scope is None or layer.path not in left:
            return call(*args, **kwargs)
        made = next(left[layer.path])
        x = args[0] if args else next(iter(kwargs.values()))
        bias = _weights(layer).get('bias') if made.size else None
        bias = jnp.zeros(()) if bias is None else bias
        return jnp.broadcast_to(bias.astype(made.dtype), (x.shape[0], *made.shape[1:]))

    with nn.intercept_methods(intercept):
        yield


@contextlib.contextmanager
def _plain_pooling() -> Iterator[None]:
    """Inside, Flax's pooling is called with keywords and without padding, as jax2onnx wants it.

    What it would have padded is padded before, which computes the same.
    """
    patched = {name: getattr(nn, name) for name in ('max_pool', 'avg_pool')}

    def max_pool(inputs, window_shape, strides=None, padding='VALID'):
        lowest = -jnp.inf if jnp.issubdtype(inputs.dtype, jnp.floating) else None
        return pool('max_pool', inputs, window_shape, strides, padding, lowest)

    def avg_pool(inputs, window_shape, strides=None, padding='VALID', count_include_pad=True):
        found = pool('avg_pool', inputs, window_shape, strides, padding, 0)
        if count_include_pad or padding == 'VALID':
            return found
        ones = jnp.ones_like(inputs)
        return found / pool('avg_pool', ones, window_shape, strides, padding, 0)

    def pool(name, inputs, window_shape, strides, padding, filling):
        window = tuple(window_shape)
        strides = (1,) * len(window) if strides is None else tuple(strides)
        if padding != 'VALID' and filling is not None and inputs.ndim == len(window) + 2:
            if isinstance(padding, str):
                padding = lax.padtype_to_pads(inputs.shape[1:-1], window, strides, padding)
            around = [(0, 0), *((int(low), int(high)) for low, high in padding), (0, 0)]
            inputs, padding = jnp.pad(inputs, around, constant_values=filling), 'VALID'
        return patched[name](inputs, window_shape=window, strides=strides, padding=padding)

    nn.max_pool, nn.avg_pool = max_pool, avg_pool
    try:
        yield
    finally:
        nn.max_pool, nn.avg_pool = patched['max_pool'], patched['avg_pool']


def tidy(model: Any) -> Any:
    """A graph (`onnx.ModelProto`) that computes the same in fewer nodes.

    ONNX Runtime's own basic optimizations, which stay within standard ONNX, fold BatchNorms into
    convolutions and constants into one another, cancel the transpositions around convolutions, and
    leave out what does nothing at inference. A ReLU6 that was written as a maximum and a minimum
    becomes one Clip, which runtimes compute together with the convolution before it.
    """
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = QUIET
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    _drop_empty(model.graph)
    # What a converter infers of shapes is inferred again, with the layouts that there are now.
    del model.graph.value_info[:]
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(pathlib.Path(folder) / 'tidy.onnx')
        onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=['CPUExecutionProvider']
        )
        model = onnx.load(options.optimized_model_filepath)
    _clip(model.graph)
    used = {node.domain for node in model.graph.node}
    imports = [given for given in model.opset_import if given.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(imports)
    return model


def _drop_empty(graph: Any) -> None:
    """Leaves out arrays of no channels, as where a branch has gone, and what they are made of.

    A runtime computes them all the same, and refuses to pool or to reshape arrays without elements.
    A concatenation does not need them; and the batch size, which a layer may read off such an
    array, is read off an input.
    """
    import onnx

    sizes = {
        info.name: [size.dim_param or size.dim_value for size in info.type.tensor_type.shape.dim]
        for info in (*graph.input, *graph.value_info)
    }
    stored = {one.name: one for one in graph.initializer}
    sizes |= {name: list(one.dims) for name, one in stored.items()}
    empty = {name for name, shape in sizes.items() if 0 in shape}
    free = {
        size: (given.name, axis)
        for given in graph.input
        for axis, size in enumerate(sizes[given.name])
        if isinstance(size, str)
    }
    shapes = {node.output[0]: node.input[0] for node in graph.node if node.op_type == 'Shape'}

    def read_off_input(node):
        """Has a free size of an empty array taken from an input; the node that this needs."""
        index = onnx.numpy_helper.to_array(stored[node.input[1]])
        size = sizes[shapes[node.input[0]]][index.item()]
        if size not in free:
            return []
        given, axis = free[size]
        name = f'{node.output[0]}_of_input'
        _add(graph, {f'{name}_axis': np.full_like(index, axis)})
        node.input[:] = [name, f'{name}_axis']
        return [onnx.helper.make_node('Shape', [given], [name])]

    nodes, kept = [], []
    for node in graph.node:
        if node.op_type == 'Concat' and not empty.issuperset(node.input):
            node.input[:] = [name for name in node.input if name not in empty]
        elif node.op_type == 'Gather' and shapes.get(node.input[0]) in empty:
            index = stored.get(node.input[1])
            if index is not None and np.prod(index.dims) == 1:
                nodes += read_off_input(node)
        nodes.append(node)
    reads = collections.Counter(output.name for output in graph.output)
    for node in reversed(nodes):
        if any(reads[name] for name in node.output):
            kept.append(node)
            reads += _reads_of(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    _drop_unread(graph)


def _clip(graph: Any) -> None:
    """Writes Min(Max(x, low), high), of numbers low and high, as Clip(x, low, high)."""
    import onnx

    numbers = {
        stored.name: onnx.numpy_helper.to_array(stored).reshape(())
        for stored in graph.initializer
        if np.prod(stored.dims) == 1
    }
    reads = _reads(graph)
    makers = {name: node for node in graph.node for name in node.output}

    def bounded(node: Any, kind: str) -> tuple[str, str] | None:
        """What a node bounds, and the name of the bound."""
        if node is None or node.op_type != kind or len(node.input) != 2:
            return None
        for x, bound in (node.input, reversed(node.input)):
            if bound in numbers and x not in numbers:
                return x, bound
        return None

    gone = set()
    for node in graph.node:
        above = bounded(node, 'Min')
        below = above and reads[above[0]] == 1 and bounded(makers.get(above[0]), 'Max')
        if not below:
            continue
        name = node.output[0]
        bounds = {f'{name}_low': numbers[below[1]], f'{name}_high': numbers[above[1]]}
        gone.add(above[0])
        node.CopyFrom(onnx.helper.make_node('Clip', [below[0], *bounds], [name]))
        _add(graph, bounds)
    kept = [node for node in graph.node if gone.isdisjoint(node.output)]
    del graph.node[:]
    graph.node.extend(kept)
    _drop_unread(graph)


def stored_in(model: Any, dtype: str) -> Any:
    """The graph with its kernels stored in a smaller type, from which it casts them up again.

    Kernels are float32 constants with two axes or more; a runtime casts them once, when it loads
    the file.
    """
    import onnx

    graph, casts = model.graph, []
    for stored in list(graph.initializer):
        if stored.data_type == onnx.TensorProto.FLOAT and len(stored.dims) > 1:
            small = onnx.numpy_helper.to_array(stored).astype(jnp.dtype(dtype))
            name = f'{stored.name}_{dtype}'
            _add(graph, {name: small})
            casts.append(
                onnx.helper.make_node('Cast', [name], [stored.name], to=onnx.TensorProto.FLOAT)
            )
            graph.initializer.remove(stored)
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def quantized(model: Any, images: np.ndarray) -> Any:
    """The graph in int8, by ONNX Runtime's static quantization in its QDQ form.

    Weights have a scale for each channel, activations one for each array, which is what that array
    holds while the network sees `images`. Inputs and outputs stay float32.

    Weights are whole numbers from -64 to 64, seven of the eight bits. On x86 processors without
    VNNI instructions ONNX Runtime adds two products of an activation and a weight in 16 bits, which
    saturate with larger weights: the file would compute something else there, and say nothing.

    Args:
      model: a tidied graph with one input.
      images: float32 [number, height, width, channels].
    """
    import onnx
    from onnxruntime import quantization

    class Images(quantization.CalibrationDataReader):
        def __init__(self):
            self.batches = _batches(model.graph.input[0].name, images)

        def get_next(self):
            return next(self.batches, None)

    # Else it asks for what `tidy` has done.
    quantization.quant_utils.add_pre_process_metadata(model)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / 'int8.onnx'
        quantization.quantize_static(model, path, Images(), per_channel=True, reduce_range=True)
        return onnx.load(path)


def _batches(name: str, images: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    for start in range(0, len(images), CALIBRATION_BATCH):
        yield {name: images[start : start + CALIBRATION_BATCH]}


def _add(graph: Any, arrays: Mapping[str, np.ndarray]) -> None:
    import onnx

    graph.initializer.extend(onnx.numpy_helper.from_array(x, name) for name, x in arrays.items())


def _reads(graph: Any) -> collections.Counter[str]:
    """How often each array is read: by nodes, those of branches and loops, too, or as an output."""
    reads = collections.Counter(output.name for output in graph.output)
    for node in graph.node:
        reads += _reads_of(node)
    return reads


def _reads_of(node: Any) -> collections.Counter[str]:
    """How often a node reads each array."""
    reads = collections.Counter(node.input)
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):  # empty where it is a number, say
            reads += _reads(inner)
    return reads


def _drop_unread(graph: Any) -> None:
    reads = _reads(graph)
    kept = [stored for stored in graph.initializer if stored.name in reads]
    del graph.initializer[:]
    graph.initializer.extend(kept)
