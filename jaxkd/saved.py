"""Compact models on disk: variables and structure, checked leaf by leaf, and no code."""

from __future__ import annotations

import functools
import os
from typing import Any

from flax import linen as nn
import numpy as np

from jaxkd import checkpoint, errors, models
from jaxkd.graph import structure
from jaxkd.graph.structure import CompactModel, Structure

_KIND = 'jaxkd compact model'


def save(path: str | os.PathLike, small: CompactModel) -> None:
    """Writes a compact model into the directory `path`, whole or not at all.

    The directory is an orbax checkpoint of the variables, with the structure and a SHA-256 per
    leaf in its JSON item.
    """
    tree = checkpoint.to_tree(small.variables)
    checkpoint.write(path, tree, {'kind': _KIND, 'structure': small.structure.to_json()})


def load(path: str | os.PathLike, model: nn.Module | None = None) -> CompactModel:
    """Reads a compact model that `save` wrote.

    Args:
      path: the directory.
      model: the full-width module. Needed for models outside of `jaxkd.models`: a file never
        causes an import.

    Returns:
      The compact model; its variables are numpy arrays.

    Raises:
      CheckpointError: for a path that holds no compact model, a damaged one (naming the leaf), or
        one whose model has to be handed in.
    """
    tree, metadata = checkpoint.read(path)
    if metadata.get('kind') != _KIND:
        raise errors.CheckpointError(path, 'holds no compact model; jaxkd.save writes them')
    found = Structure.from_json(metadata['structure'])
    if model is None:
        model = _registered(path, found)
    variables: dict[str, Any] = {}
    for name, leaf in tree.items():
        *parents, last = name.split('/')
        node = variables
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = np.asarray(leaf)
    return CompactModel(structure.module(model, found), variables, found)


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
