"""BatchNorm folded into the layers before it, for inference.

A BatchNorm that goes by its running statistics multiplies each channel by a number and adds
another. Where it reads what a convolution or a Dense makes, and nothing else reads that, the
layer's kernel and bias can do so themselves.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping
import contextlib
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax import ad_checkpoint
import numpy as np

from jaxkd.graph import resize
from jaxkd.graph.trace import plain

# Layers whose kernels and biases have their outputs on the last axis. Of these classes alone: one
# that was derived from them may do something else with its kernel.
LAYERS = (nn.Conv, nn.ConvTranspose, nn.Dense)
_MARK = 'jaxkd.fold:'

Path = tuple[str, ...]


class Norm(NamedTuple):
    """A BatchNorm that a layer can stand in for.

    Attributes:
      layer: the path of that layer.
      epsilon: what it adds to variances.
    """

    layer: Path
    epsilon: float


class Folded(NamedTuple):
    """A network without the BatchNorms that could be folded.

    Attributes:
      variables: of the network, without theirs.
      norms: by path.
      left: how many other BatchNorms there are.
    """

    variables: Any
    norms: Mapping[Path, Norm]
    left: int

    @contextlib.contextmanager
    def within(self) -> Iterator[None]:
        """Where the module has to be applied to them."""
        layers = {norm.layer for norm in self.norms.values()}

        def intercept(call, args, kwargs, context):
            module = context.module
            if context.method_name == '__call__' and module.scope is not None:
                if module.path in self.norms:
                    return args[0]
                if module.path in layers:
                    with resize.with_fields(module, {'use_bias': True}):
                        return call(*args, **kwargs)
            return call(*args, **kwargs)

        with nn.intercept_methods(intercept):
            yield


def fold(run: Callable[..., Any], variables: Any, *inputs: Any) -> Folded:
    """Folds every BatchNorm that can be.

    Which can is read off the traced network, so that this needs to know nothing of the model.

    Args:
      run: the network as a function of its variables and inputs; it applies a Linen module whose
        BatchNorms use their running statistics.
      variables: nested dicts of arrays.
      *inputs: arrays or `jax.ShapeDtypeStruct`s.
    """
    norms, left = _find(run, variables, inputs)
    found = plain(jax.device_get(variables))
    for path, norm in norms.items():
        params = _take(found['params'], path)
        statistics = _take(found['batch_stats'], path)
        factor = params.get('scale', 1.0) / np.sqrt(statistics['var'] + norm.epsilon)
        layer = found['params']
        for name in norm.layer:
            layer = layer[name]
        kernel = layer['kernel']
        bias = (layer.get('bias', 0.0) - statistics['mean']) * factor + params.get('bias', 0.0)
        layer['kernel'] = (kernel * factor).astype(kernel.dtype)
        layer['bias'] = bias.astype(kernel.dtype)
    return Folded(found, norms, left)


def _take(tree: dict[str, Any], path: Path) -> dict[str, Any]:
    """Takes a layer out of a tree, and what is left empty with it; {} if it has no entry."""
    name, *rest = path
    if name not in tree:
        return {}
    if not rest:
        return tree.pop(name)
    taken = _take(tree[name], tuple(rest))
    if not tree[name]:
        del tree[name]
    return taken


def _find(run: Callable[..., Any], variables: Any, inputs: Any) -> tuple[dict[Path, Norm], int]:
    """The BatchNorms that can be folded, by path, and how many cannot."""
    calls: collections.Counter[Path] = collections.Counter()
    made: list[tuple[jax.Array, Path]] = []  # what layers make
    found: dict[Path, Norm] = {}
    norms: set[Path] = set()

    def watch(call, args, kwargs, context):
        module = context.module
        result = call(*args, **kwargs)
        if context.method_name != '__call__' or module.scope is None:
            return result
        calls[module.path] += 1
        if type(module) in LAYERS and not getattr(module, 'transpose_kernel', False):
            result = ad_checkpoint.checkpoint_name(result, _MARK + '/'.join(module.path))
            made.append((result, module.path))
        elif isinstance(module, nn.BatchNorm):
            norms.add(module.path)
            layer = next((path for array, path in made if args and array is args[0]), None)
            if layer and module.axis in (-1, result.ndim - 1) and result.dtype == args[0].dtype:
                found[module.path] = Norm(layer, module.epsilon)
        return result

    with nn.intercept_methods(watch):
        program = jax.make_jaxpr(run)(variables, *inputs)
    readers = collections.Counter(_readers(program.jaxpr))
    folded = {
        path: norm
        for path, norm in found.items()
        if calls[path] == calls[norm.layer] == readers['/'.join(norm.layer)] == 1
        and _is_single(variables, path)
    }
    return folded, len(norms) - len(folded)


def _is_single(variables: Any, path: Path) -> bool:
    """Whether a BatchNorm is one layer's: `nn.scan` and `nn.vmap` stack those of several."""
    stored = (_take(plain(variables).get(name, {}), path) for name in ('params', 'batch_stats'))
    return all(leaf.ndim == 1 for leaf in jax.tree.leaves(list(stored)))


def _readers(jaxpr: Any) -> Iterator[str]:
    """The name of each marked array, once for every use of it."""
    marked = {
        eqn.outvars[0]: eqn.params['name'].removeprefix(_MARK)
        for eqn in jaxpr.eqns
        if eqn.primitive.name == 'name' and eqn.params['name'].startswith(_MARK)
    }
    for eqn in jaxpr.eqns:
        yield from (
            marked[x] for x in eqn.invars if isinstance(x, jax.extend.core.Var) and x in marked
        )
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from _readers(inner)
    yield from (
        marked[x] for x in jaxpr.outvars if isinstance(x, jax.extend.core.Var) and x in marked
    )
