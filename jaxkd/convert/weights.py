"""Variables from files and directories, and back to PyTorch's names and layouts."""

from __future__ import annotations

import collections
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
from typing import Any, NamedTuple

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from jaxkd import checkpoint
from jaxkd.convert import files, layouts, names
from jaxkd.errors import CheckpointError, ConfigError
from jaxkd.graph import structure

KIND = 'jaxkd variables'
# Under it, what `describe` says stands in the metadata of a .safetensors file.
KEY = 'jaxkd'
OWN_NAMES = "Flax's names with dots, PyTorch's layouts"
# PyTorch's names of parameters and statistics, where they are not Flax's.
_LEAVES = {
    'kernel': 'weight',
    'scale': 'weight',
    'embedding': 'weight',
    'mean': 'running_mean',
    'var': 'running_var',
}
# The layers of an `nn.MultiHeadDotProductAttention`, whose kernels have an axis of heads.
_ATTENTION = ('query', 'key', 'value', 'out')
# What PyTorch has and Flax does not.
_IGNORED = 'num_batches_tracked'
_SHOWN = 3  # names in a message
# Layers whose widths `describe` tells.
_NORMS = (nn.BatchNorm, nn.LayerNorm, nn.GroupNorm)
_LAYERS = (nn.Conv, nn.ConvTranspose, nn.Dense, nn.DenseGeneral)


class Tensor(NamedTuple):
    """Where a variable stands in a file: under which name, and how it lies there."""

    name: str
    order: layouts.Order


class Found(NamedTuple):
    """Variables that were read.

    Attributes:
      variables: nested dicts of numpy arrays.
      source: whose names they had.
      settings: fields that the model needs in order to compute what it did where the weights come
        from, each a possibility of its own, the likeliest first; None where nothing is known.
    """

    variables: dict[str, Any]
    source: str
    settings: tuple[names.Settings, ...] | None


def read(
    path: str | os.PathLike, model: nn.Module, variables: Any, *, fresh: str | None = None
) -> dict[str, Any]:
    """The variables of a model, from whatever holds them.

    Args:
      path: a directory that `python -m jaxkd.convert` wrote, or any that orbax wrote of a tree with
        `params` (and what else `variables` has); or a file of weights: .safetensors with Flax's
        names (`params/stem/conv/kernel`, or with dots) or PyTorch's, or .pt or .pth with PyTorch's.
      model: the module that they are for, at full width.
      variables: its variables, or their shapes and dtypes as `jax.eval_shape` of `model.init` gives
        them. The widths may be those of a compact network.
      fresh: a regular expression; the variables whose paths it is found in are not read, such as
        those of a classifier of other classes.

    Returns:
      A tree like `variables`, without those of `fresh`, of numpy arrays with its shapes and dtypes.

    Raises:
      CheckpointError: what is there is something else, lacks variables, has others or ones of other
        shapes (it names some), needs a model with other settings (it says which), or has numbers
        that are not finite (it says where).
      ConfigError: a package is missing, or `fresh` is found in all paths.
    """
    path = pathlib.Path(path)
    found = find(path, model, variables, fresh)
    if found.settings is not None and fitting(model, found.settings) is None:
        needed = ' or '.join(map(_arguments, found.settings))
        raise CheckpointError(
            path,
            f'its weights ({found.source}) were made for a {type(model).__name__} with {needed}, '
            f'which computes something else than one with {_arguments(settings(model))}: make the '
            'model so',
        )
    return found.variables


def named(variables: Any, pattern: str) -> set[str]:
    """The variables whose path below its collection, 'stem/conv/kernel', a pattern is found in.

    They are named with the collection, as 'params/stem/conv/kernel'.
    """
    return {name for name in _flat(variables) if re.search(pattern, name.partition('/')[2])}


def find(path: pathlib.Path, model: nn.Module, variables: Any, fresh: str | None = None) -> Found:
    """`read`, with whatever settings the model has."""
    shapes = _flat(variables)
    if path.is_dir():
        try:
            tree, known = _directory(path, variables)
        except CheckpointError:
            _refuse_steps(path)
            raise
        stored, candidates = _flat(tree), {'Flax': _flax(shapes, '/')}
    else:
        stored, described = files.load(path)
        candidates = _candidates(model, shapes)
        known = _described(path, described)
    # The first of those that fit equally well: names that a network has itself are no prefix.
    stored, source, tensors = max(
        ((given, *item) for given in _prefixed(stored) for item in candidates.items()),
        key=lambda found: sum(tensor.name in found[0] for tensor in found[2].values()),
    )
    if fresh is not None:
        left_out = named(variables, fresh)
        if len(left_out) == len(tensors):
            raise ConfigError(
                'fresh', fresh, why='it is found in every path: nothing is left to read'
            )
        unread = {tensors[name].name for name in left_out}
        tensors = {name: tensor for name, tensor in tensors.items() if name not in left_out}
        stored = {name: leaf for name, leaf in stored.items() if name not in unread}
    _check(path, model, source, tensors, stored, shapes)
    with np.errstate(over='ignore'):  # which the next lines refuse
        flat = {
            name: layouts.to_ours(stored[tensor.name], tensor.order, shapes[name].shape).astype(
                shapes[name].dtype
            )
            for name, tensor in tensors.items()
        }
    for name, leaf in flat.items():
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not np.isfinite(leaf).all():
            why = f'{tensors[name].name} has values that are no finite numbers in {leaf.dtype}'
            raise CheckpointError(path, why)
    possible = None
    if known is not None:
        possible = (known,)
    elif source in (own := names.SOURCES.get(type(model), {})):
        possible = own[source].settings(model)
    return Found(traverse_util.unflatten_dict(flat, sep='/'), source, possible)


def to_torch(variables: Any, model: nn.Module, library: str | None = None) -> dict[str, np.ndarray]:
    """Variables with the names and in the layouts of PyTorch, as `load_state_dict` takes them.

    Args:
      variables: of the model or of a compact network made of it: arrays, in nested dicts.
      model: the module at full width, which says what layers are called.
      library: whose names, as `jaxkd.convert.names.SOURCES` has them for the model's class; by
        default the first of them. For other classes Flax's names are joined with dots.

    Returns:
      Arrays by name. Convolutions are [out, in, height, width], Dense layers [out, in].

    Raises:
      ConfigError: a library without a table for the model, or two variables of one name.
    """
    leaves = _flat(variables)
    tensors = arranged(leaves, model, _library(model, library))
    return {
        tensor.name: layouts.to_theirs(np.asarray(leaves[name]), tensor.order)
        for name, tensor in tensors.items()
    }


def describe(
    run: Callable[..., Any], variables: Any, inputs: Iterable[Any], model: nn.Module
) -> dict[str, Any]:
    """What goes with the weights of `to_torch` to rebuild the network, as JSON can hold it.

    Args:
      run: the network as a function of its variables and inputs.
      variables: those of `to_torch`.
      inputs: arrays, or their shapes and dtypes.
      model: the module at full width.

    Returns:
      'names' (the library whose names they are), 'model' (class and fields), 'settings' (fields
      that change what is computed), and 'layers': by PyTorch's name of each convolution, Dense and
      norm, its widths under the names of PyTorch's attributes; where `nn.scan` or `nn.vmap` stack
      layers in one tensor, the widths of each, and under 'stacked' how many they are.
    """
    library = _library(model)
    leaves, inputs = _flat(variables), tuple(inputs)
    seen = _own_shapes(run, variables, inputs)
    own = {name: leaf for name, leaf in seen.items() if name in leaves}
    tensors = arranged({**leaves, **own}, model, library)
    layers: dict[str, dict[str, Any]] = {}

    def record(call, args, kwargs, context):
        module = context.module
        path = 'params/' + '/'.join(module.path)
        name = f'{path}/scale' if isinstance(module, _NORMS) else f'{path}/kernel'
        known = name in own and isinstance(module, _NORMS + _LAYERS)
        if context.method_name == '__call__' and known:
            given = next(x for x in (*args, *kwargs.values()) if hasattr(x, 'shape'))
            widths = _widths(module, given.shape[-1], tensors[name].order.shape)
            if widths:
                stacked = _stacked(leaves[name].shape, own[name].shape)
                layers[tensors[name].name.removesuffix('.weight')] = widths | stacked
        return call(*args, **kwargs)

    _trace(run, variables, inputs, record)
    return {
        'names': library or OWN_NAMES,
        'model': structure.describe(model),
        'settings': settings(model),
        'layers': layers,
    }


def _own_shapes(
    run: Callable[..., Any], variables: Any, inputs: Sequence[Any]
) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters of each layer that is called, by path, as that layer sees them.

    Of those that `nn.scan` and `nn.vmap` stack, each sees its own.
    """
    found: dict[str, jax.ShapeDtypeStruct] = {}

    def watch(call, args, kwargs, context):
        module = context.module
        if context.method_name == '__call__' and isinstance(module, _NORMS + _LAYERS):
            path = '/'.join(('params', *module.path))
            for name, leaf in module.variables.get('params', {}).items():
                found[f'{path}/{name}'] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        return call(*args, **kwargs)

    _trace(run, variables, inputs, watch)
    return found


def _trace(
    run: Callable[..., Any], variables: Any, inputs: Sequence[Any], watch: Callable[..., Any]
) -> None:
    """Has every method that a network calls intercepted, without computing anything."""
    with nn.intercept_methods(watch):
        # As a new function: one that JAX has traced before is not called again.
        jax.eval_shape(lambda *given: run(*given), variables, *inputs)


def _stacked(stored: layouts.Shape, own: layouts.Shape) -> dict[str, int]:
    """How many layers share a tensor; {} where each has its own."""
    if len(stored) == len(own):
        return {}
    more = collections.Counter(stored) - collections.Counter(own)
    return {'stacked': math.prod(more.elements())}


def _widths(module: nn.Module, inputs: int, shape: layouts.Shape) -> dict[str, Any] | None:
    """Of a layer that reads so many channels, from the shape of its weight in PyTorch."""
    if isinstance(module, nn.BatchNorm):
        return {'num_features': shape[0], 'eps': module.epsilon}
    if isinstance(module, nn.GroupNorm):
        return {'num_channels': shape[0], 'num_groups': module.num_groups, 'eps': module.epsilon}
    if isinstance(module, nn.LayerNorm):
        return {'normalized_shape': list(shape), 'eps': module.epsilon}
    if isinstance(module, nn.DenseGeneral) and len(shape) != 2:
        return None  # PyTorch has no such layer
    out, read, *window = shape
    if isinstance(module, nn.ConvTranspose) and module.transpose_kernel:
        out, read = read, out
    if not window:
        return {'in_features': read, 'out_features': out}
    groups = max(1, inputs // max(1, read))  # nothing is read where a branch has gone
    return {
        'in_channels': groups * read,
        'out_channels': out,
        'groups': groups,
        'kernel_size': window,
    }


def settings(model: nn.Module) -> dict[str, Any]:
    """The fields of a model of ours that change what it computes, and no variable's shape."""
    if type(model) not in names.SOURCES:
        return {}
    return {field: getattr(model, field) for field in names.FIELDS if hasattr(model, field)}


def fitting(model: nn.Module, possible: Collection[names.Settings]) -> names.Settings | None:
    """The first of the possible settings that are the model's."""
    defaults = {field.name: field.default for field in dataclasses.fields(model)}
    for one in possible:
        if all(
            value == one.get(field, defaults[field]) for field, value in settings(model).items()
        ):
            return one
    return None


def _library(model: nn.Module, library: str | None = None) -> str | None:
    known = names.SOURCES.get(type(model), {})
    if library is not None and library not in known:
        listed = ', '.join(known) or 'none'
        why = f'its names are known for {listed}, not for {library}'
        raise ConfigError('model', type(model).__name__, why=why)
    return library or next(iter(known), None)


def arranged(shapes: Mapping[str, Any], model: nn.Module, library: str | None) -> dict[str, Tensor]:
    """PyTorch's name and layout of each variable."""
    rows = {}
    if library is not None:
        rows = {row.ours: row for row in names.SOURCES[type(model)][library].table(model)}
    sizes = {name: tuple(leaf.shape) for name, leaf in shapes.items()}
    tensors = {}
    for name, shape in sizes.items():
        _, _, path = name.partition('/')
        layer, _, leaf = path.rpartition('/')
        if path in rows:
            theirs, layout = rows[path].theirs, rows[path].layout or layouts.same
        else:
            row = rows.get(layer, names.Row(layer, layer.replace('/', '.')))
            theirs = f'{row.theirs}.{_LEAVES.get(leaf, leaf)}'.lstrip('.')
            layout = layouts.same
            if leaf in ('kernel', 'bias'):
                layout = _layout(name, sizes, row.layout)
        tensors[name] = Tensor(theirs, layout(shape, sizes))
    if len({tensor.name for tensor in tensors.values()}) < len(tensors):
        why = 'two of its variables have one name in PyTorch'
        raise ConfigError('model', type(model).__name__, why=why)
    return tensors


def _layout(
    name: str, sizes: Mapping[str, layouts.Shape], known: layouts.Layout | None
) -> layouts.Layout:
    """Of the kernel or the bias of a layer, whose kernel's layout may be known."""
    layer, _, leaf = name.rpartition('/')
    above, _, part = layer.rpartition('/')
    if part in _ATTENTION and all(
        len(sizes.get(f'{above}/{other}/kernel', ())) == 3 for other in _ATTENTION
    ):
        known = known or (layouts.out_of_heads if part == 'out' else layouts.into_heads)
    elif known is None and len(sizes.get(f'{layer}/bias', ())) > 1:
        return layouts.same  # a layer that makes several axes, as none of PyTorch's does
    if leaf == 'bias':
        return layouts.vector
    return known or (layouts.kernel if len(sizes[name]) > 1 else layouts.same)


def _flax(shapes: Mapping[str, Any], separator: str) -> dict[str, Tensor]:
    return {
        name: Tensor(name.replace('/', separator), layouts.same(tuple(leaf.shape), {}))
        for name, leaf in shapes.items()
    }


def _candidates(model: nn.Module, shapes: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Whatever a file may call the variables."""
    found = {}
    for library in (*names.SOURCES.get(type(model), {}), None):
        # Of a layer with a kernel and a scale, there is no file with PyTorch's names.
        with contextlib.suppress(ConfigError):
            found[library or OWN_NAMES] = arranged(shapes, model, library)
    return {**found, 'Flax': _flax(shapes, '/'), "Flax's names with dots": _flax(shapes, '.')}


def _flat(tree: Any) -> dict[str, Any]:
    """Leaves by path, such as 'params/stem/conv/kernel'."""
    return traverse_util.flatten_dict(tree, sep='/')


def _prefixed(stored: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """As stored, and without what data-parallel and compiled modules put before all names; both
    without what Flax lacks."""
    stored = {name: leaf for name, leaf in stored.items() if not name.endswith(_IGNORED)}
    yield stored
    # In any order, as often as a module was wrapped.
    while stored and (prefix := _prefix(stored)):
        stored = {name.removeprefix(prefix): leaf for name, leaf in stored.items()}
        yield stored


def _prefix(stored: Collection[str]) -> str:
    """Which of the prefixes all names have; '' for none."""
    prefixes = ('module.', '_orig_mod.')
    return next((one for one in prefixes if all(name.startswith(one) for name in stored)), '')


def _directory(path: pathlib.Path, variables: Any) -> tuple[dict, names.Settings | None]:
    """Variables in a directory that jaxkd or orbax wrote, and the settings they are for."""
    if not (path / 'metadata').is_dir():
        return checkpoint.read_plain(path, variables), None
    tree, metadata = checkpoint.read(path)
    if metadata.get('kind') != KIND:
        why = 'it holds no variables; `python -m jaxkd.convert` and orbax write them'
        if 'structure' in metadata:
            why = 'it holds a compact network, which jaxkd.load reads; a full one is needed here'
        raise CheckpointError(path, why)
    return {name: tree[name] for name in variables if name in tree}, metadata['settings']


def _refuse_steps(path: pathlib.Path) -> None:
    """Tells of a directory that holds checkpoints, by their numbers, to name one of these."""
    steps = [inside for inside in path.iterdir() if inside.name.isdecimal()]
    if steps:
        last = max(steps, key=lambda inside: int(inside.name))
        why = f'it holds steps of a CheckpointManager; name one of them, such as {last}'
        raise CheckpointError(path, why)


def _described(path: pathlib.Path, metadata: Mapping[str, str]) -> names.Settings | None:
    """The settings that `describe` has put into a file."""
    if KEY not in metadata:
        return None
    try:
        return dict(json.loads(metadata[KEY])['settings'])
    except (KeyError, TypeError, ValueError) as error:
        why = f'its metadata under {KEY!r} are none that jaxkd.export writes'
        raise CheckpointError(path, why) from error


def _check(
    path: pathlib.Path,
    model: nn.Module,
    source: str,
    tensors: Mapping[str, Tensor],
    stored: Mapping[str, np.ndarray],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
) -> None:
    """Refuses what does not fill each variable once, with nothing left over."""
    network = type(model).__name__
    missing = [tensor.name for tensor in tensors.values() if tensor.name not in stored]
    if len(missing) == len(tensors):
        raise CheckpointError(
            path,
            f'it has none of the variables of {network} under any name known; it has '
            f'{_some(list(stored)) or "none at all"}',
        )
    used = {tensor.name for tensor in tensors.values()}
    left = [f'{name} {list(leaf.shape)}' for name, leaf in stored.items() if name not in used]
    if missing or left:
        counted = [
            f'{len(found)} {what} ({_some(found)})'
            for found, what in ((missing, 'are missing'), (left, 'are left over'))
            if found
        ]
        raise CheckpointError(
            path,
            f'its variables are not those of this {network} ({source}): of {len(tensors)} '
            f'{" and ".join(counted)}; it is of another network, or one with other arguments',
        )
    wrong = {
        name: f'{tensor.name} is {list(stored[tensor.name].shape)} and has to be '
        f'{list(tensor.order.shape)}'
        for name, tensor in tensors.items()
        if tuple(stored[tensor.name].shape) != tensor.order.shape
    }
    bias = 'params/classifier/bias'
    if bias in wrong and all(name.startswith('params/classifier/') for name in wrong):
        theirs, ours = stored[tensors[bias].name].size, shapes[bias].shape[0]
        raise CheckpointError(
            path,
            f'it has {theirs} classes, and the {network} {ours}: make it with num_classes='
            f'{theirs} (--arguments="{{\'num_classes\': {theirs}}}"), or leave these weights out '
            "and train on (config.teacher.fresh='classifier/', config.teacher.tune_epochs)",
        )
    if wrong:
        raise CheckpointError(
            path,
            f'{len(wrong)} of its {len(tensors)} variables have other shapes than those of this '
            f'{network} ({source}): {_some(list(wrong.values()))}; it needs other arguments',
        )
    for name, tensor in tensors.items():
        found, needed = stored[tensor.name].dtype, shapes[name].dtype
        if jnp.issubdtype(needed, jnp.floating) and not jnp.issubdtype(found, jnp.floating):
            raise CheckpointError(path, f'{tensor.name} is {found}, and {needed} is needed')


def _some(found: list[str]) -> str:
    return ', '.join([*found[:_SHOWN], *(['…'] if len(found) > _SHOWN else [])])


def _arguments(given: Mapping[str, Any]) -> str:
    return ', '.join(f'{field}={value!r}' for field, value in given.items()) or 'its defaults'
