"""Compact models on disk: variables and structure, checked leaf by leaf, and no code."""

from __future__ import annotations

from collections.abc import Callable
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
      CheckpointError: for a path that holds no compact model, a damaged one (naming the leaf), or
        one whose model has to be handed in.
    """
    if os.path.isfile(path):
        return _program(path)
    tree, metadata = checkpoint.read(path)
    if metadata.get('kind') != _KIND:
        raise errors.CheckpointError(path, 'holds no compact model; jaxkd.save writes them')
    try:
        found = Structure.from_json(metadata['structure'])
        if model is None:
            model = _registered(path, found)
        module = structure.module(model, found)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        why = f'its structure is none that jaxkd.save writes ({type(error).__name__}: {error})'
        raise errors.CheckpointError(path, why) from error
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


def _registered(path: str | os.PathLike, found: Structure) -> nn.Module:
    """The full-width model, if its class is one of `jaxkd.models`."""
    name = f'{found.model["module"]}:{found.model["class"]}'
    for network in models.REGISTRY.values():
        known = network.func if isinstance(network, functools.partial) else network
        if name == f'{known.__module__}:{known.__qualname__}':
            if found.model['arguments'] is not None:
                return known(**_tuples(found.model['arguments']))
            break
    raise errors.CheckpointError(
        path, f'was made from {name}; hand in the full-width module, as load(path, model=…)'
    )


def _tuples(value: Any) -> Any:
    """Undoes what JSON does to tuples."""
    if isinstance(value, dict):
        return {key: _tuples(inner) for key, inner in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
