"""What is left of a branch that has gone: a constant for each channel, folded into one bias.

The last layer of the branch makes zeros of nothing, or its bias. A BatchNorm behind it that goes by
its running statistics makes bias - (mean - zeros) · scale / sqrt(var + ε) of them. In training it
goes by the batch's, which has no variance, and adds its bias alone: the network would begin to be
trained as another one than it was found to be, until the running mean has come to the zeros. So the
bias takes over the whole constant, and the running mean what comes in.
"""

from __future__ import annotations

from typing import Any

from flax import linen as nn
import jax
import numpy as np

from jaxkd.graph import trace


def fold(module: nn.Module, variables: Any, graph: trace.Graph) -> Any:
    """The compact network's variables, with biases that hold the constants of what has gone.

    It computes the same in evaluation, and in training goes on from there.

    Args:
      module: at the compact widths.
      variables: its variables, nested dicts.
      graph: of the full network, for its inputs.
    """
    constants = jax.jit(lambda variables, inputs: _constants(module, variables, inputs, graph))
    found = jax.device_get(constants(variables, jax.tree.map(_zeros, graph.inputs)))

    def visit(path, leaf):
        layer, _, name = trace.path_string(path).partition('/')[2].rpartition('/')
        values = found.get(layer, {})
        if name not in values:
            return leaf
        value = values[name].astype(leaf.dtype)
        return jax.numpy.asarray(value) if isinstance(leaf, jax.Array) else value

    return jax.tree_util.tree_map_with_path(visit, variables) if found else variables


def _zeros(shape: jax.ShapeDtypeStruct) -> np.ndarray:
    return np.zeros(shape.shape, shape.dtype)


def _constants(
    module: nn.Module, variables: Any, inputs: Any, graph: trace.Graph
) -> dict[str, dict[str, jax.Array]]:
    """By the layer of a norm behind nothing: its constant as 'bias', what comes in as 'mean'."""
    found: dict[str, dict[str, jax.Array]] = {}
    constant: list[jax.Array] = []  # what layers without inputs make, the same everywhere

    def watch(call, args, kwargs, context):
        layer = context.module
        result = call(*args, **kwargs)
        if context.method_name != '__call__' or layer.scope is None:
            return result
        own = layer.variables.get('params', {})
        kernel = own.get('kernel')
        if kernel is not None and kernel.size == 0 and getattr(result, 'size', 0):
            constant.append(result)
        known = isinstance(layer, nn.BatchNorm) and layer.axis == -1 and 'bias' in own
        if known and args and any(args[0] is array for array in constant):
            first = (0,) * (result.ndim - 1)
            found['/'.join(layer.path)] = {'bias': result[first], 'mean': args[0][first]}
        return result

    with nn.intercept_methods(watch):
        trace.outputs_of(module, graph.apply_kwargs)(variables, inputs)
    return found
