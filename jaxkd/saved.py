"""Compact models on disk: variables and structure, checked leaf by leaf, and no code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
import os
import pathlib
from typing import Any

from flax import linen as nn
import jax
from jax import export
import numpy as np

from jaxkd import checkpoint, errors, models
from jaxkd.graph import structure
from jaxkd.graph.structure import CompactModel, Structure
from jaxkd.graph.trace import plain

_KIND = 'jaxkd compact model'


def save(path: str | os.PathLike, small: CompactModel) -> None:
    """Writes a compact model into the directory `path`, whole or not at all.

    The directory is an orbax checkpoint of the variables, with the structure and a SHA-256 per
    leaf in its JSON item.
    """
    metadata = {'kind': _KIND, 'structure': small.structure.to_json()}
    checkpoint.write(path, plain(small.variables), metadata)


def load(
    path: str | os.PathLike, model: nn.Module | None = None
) -> CompactModel | Callable[..., Any]:
    """Reads a compact model that `save` wrote, or the StableHLO that `jaxkd.export` wrote.

    Args:
      path: the directory, or the file.
      model: the full-width module. Needed for models outside of `jaxkd.models`: a file never
        causes an import.

    Returns:
      The compact model; its variables are numpy arrays. Of StableHLO, which has no structure, a
      function of the network's inputs, with any batch size.

    Raises:
      CheckpointError: for a path that holds no compact model, a damaged one (naming the leaf), one
        whose model has to be handed in, or is of another class or made with other arguments than
        the one given.
      ConfigError: for a model that is no module.
    """
    if os.path.isfile(path):
        return _program(path)
    if model is not None and not isinstance(model, nn.Module):
        why = 'it must be the full-width module itself, such as Net(), and not its class'
        raise errors.ConfigError('model', model, why=why)
    if (inside := within(os.fspath(path))) != os.fspath(path):
        raise errors.CheckpointError(path, f'holds a run; its compact model is in {inside}')

    def full(recorded: Mapping[str, Any]) -> nn.Module:
        known = registered(recorded) if model is None else model
        if known is None:
            why = f'{made_from(recorded)}; hand in the full-width module, as load(path, model=…)'
            raise errors.CheckpointError(path, why)
        return known

    return read(path, full)


def read(path: str | os.PathLike, full: Callable[[Mapping[str, Any]], nn.Module]) -> CompactModel:
    """`load` of a directory, with the full-width module that is made of what is recorded of it."""
    tree, metadata = checkpoint.read(path)
    if metadata.get('kind') != _KIND:
        raise errors.CheckpointError(path, 'holds no compact model; jaxkd.save writes them')
    try:
        found = Structure.from_json(metadata['structure'])
        model = full(found.model)
        whole = structure.full_module(model)
        own, there = type(whole).__name__, found.model['class'].rpartition('.')[2]
        differing = structure.differing(whole, found.model)
        fits = structure.widths(tree) == found.widths
        module = structure.module(model, found)
    except errors.JaxkdError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        why = f'its structure is none that jaxkd.save writes ({type(error).__name__}: {error})'
        raise errors.CheckpointError(path, why) from error
    if own != there:  # the module it is in may have another name by now
        why = f'{made_from(found.model)}, and the model that was given is of the class {own}'
        raise errors.CheckpointError(path, why)
    if not fits:
        raise errors.CheckpointError(path, 'its arrays are not of the widths that it records')
    if differing:
        told = ', '.join(f'{name} ({a!r} there, {b!r} now)' for name, (a, b) in differing.items())
        given = {name: _tuples(value) for name, (value, _) in differing.items()}
        why = (
            f'{made_from(found.model)} with other arguments: {told}; make the model with those, '
            f'in a command by --arguments="{given}"'
        )
        raise errors.CheckpointError(path, why)
    return CompactModel(module, jax.tree.map(np.asarray, tree), found)


def _program(path: str | os.PathLike) -> Callable[..., Any]:
    try:
        return export.deserialize(bytearray(pathlib.Path(path).read_bytes())).call
    except Exception as error:  # a parser of bytes may raise anything over other bytes
        why = f'holds no StableHLO that jaxkd.export wrote ({type(error).__name__})'
        raise errors.CheckpointError(path, why) from error


def within(folder: str) -> str:
    """Where in a folder the compact model lies: that of a finished run has it in `compact`."""
    inside = os.path.join(folder, 'compact')
    return inside if os.path.isdir(inside) else folder


def made_from(recorded: Mapping[str, Any]) -> str:
    """What model a compact one is of, in words."""
    return f'was made from {recorded["module"]}:{recorded["class"]}'


def registered(recorded: Mapping[str, Any]) -> nn.Module | None:
    """The full-width model, if its class is one of `jaxkd.models` and its arguments are known."""
    for network in models.REGISTRY.values():
        known = network.func if isinstance(network, functools.partial) else network
        if (known.__module__, known.__qualname__) == (recorded['module'], recorded['class']):
            return None if recorded['arguments'] is None else known(**arguments(recorded))
    return None


def arguments(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Those that the full-width model was made with; none where they could not be recorded."""
    return _tuples(recorded['arguments'] or {})


def _tuples(value: Any) -> Any:
    """Undoes what JSON does to tuples."""
    if isinstance(value, dict):
        return {key: _tuples(inner) for key, inner in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
