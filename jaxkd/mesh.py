"""The devices as a mesh, what lies where on it, and each process's part of a batch.

The mesh has one axis, 'data', over all devices of all processes. Batches are split along it. What
is trained is on every device, unless rules say otherwise (`config.sharding`): pairs of a pattern,
a regular expression that is searched in the paths of parameters such as 'block1/expand/conv/kernel'
(the first that matches decides), and a partition, which names for each axis of the parameter the
mesh axis that it is split along, or None:

    (('Dense.*/kernel', (None, 'data')), ('.*', ()))

What belongs to a parameter (its moving average, the optimizer's momentum) lies where it does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import re
from typing import Any

import jax
from jax import sharding
from jax.experimental import multihost_utils
import numpy as np

from jaxkd import errors, hosts

P = sharding.PartitionSpec
AXIS = 'data'
Rules = Sequence[tuple[str, Sequence[str | None]]]


def make_mesh() -> sharding.Mesh:
    """All devices, of all processes, along the axis 'data'."""
    return _along(jax.devices())


def alone() -> sharding.Mesh:
    """One device of this process: for what each process computes by itself."""
    return _along(jax.local_devices()[:1])


def _along(devices: Sequence[jax.Device]) -> sharding.Mesh:
    types = (sharding.AxisType.Auto,)
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=types, devices=devices)


def everywhere(mesh: sharding.Mesh) -> sharding.NamedSharding:
    return sharding.NamedSharding(mesh, P())


def along_batch(mesh: sharding.Mesh, axis: int = 0) -> sharding.NamedSharding:
    """Split along the axis that counts the examples."""
    return sharding.NamedSharding(mesh, P(*[None] * axis, AXIS))


def check(rules: Rules, params: Any, mesh: sharding.Mesh) -> None:
    """Refuses rules that cannot be.

    Args:
      rules: see above.
      params: of the full network; shapes will do.
      mesh: the devices.

    Raises:
      ConfigError: for a rule that matches no parameter which the ones before it have left, and for
        a partition that does not fit a parameter; the parameter is named.
    """
    left = _shapes(params)
    for rule in rules:
        if not (isinstance(rule, tuple | list) and len(rule) == 2 and isinstance(rule[0], str)):
            why = "it must be pairs of a pattern and a partition, such as ('Dense', (None, 'data'))"
            raise errors.ConfigError('sharding', rules, why=why)
        pattern, partition = rule
        field = f'sharding[{pattern!r}]'
        try:
            matching = [name for name in left if re.search(pattern, name)]
        except re.error as error:
            raise errors.ConfigError('sharding', pattern, why=f'no pattern: {error}') from None
        if not matching:
            why = f'it matches no parameter that is left; those are {", ".join(left) or "none"}'
            raise errors.ConfigError('sharding', pattern, why=why)
        if not isinstance(partition, tuple | list):
            why = "it must be a tuple with None or 'data' for each axis"
            raise errors.ConfigError(field, partition, why=why)
        named = [axis for axis in partition if axis is not None]
        for axis in named:
            if axis not in mesh.axis_names:
                raise errors.ConfigError(field, axis, allowed=(*mesh.axis_names, None))
        if len(set(named)) < len(named):
            raise errors.ConfigError(field, partition, why='it names an axis twice')
        for name in matching:
            shape = left.pop(name)
            if not _fits(shape, partition, mesh):
                why = (
                    f'{name} is {list(shape)}, which it does not split evenly over {mesh.size} '
                    'devices; let an earlier rule say otherwise of it'
                )
                raise errors.ConfigError(field, partition, why=why)


def shardings(tree: Any, params: Any, mesh: sharding.Mesh, rules: Rules = ()) -> Any:
    """Where each leaf of a tree lies: a tree of `jax.sharding.NamedSharding`.

    A leaf lies as the parameter does whose path its own ends with, if it has that shape: in the
    state of an optimizer, in averages, in variables. A parameter whose axes its partition does not
    divide is on every device: in a network that was made narrower any of them can come to that.

    Args:
      tree: of arrays.
      params: the network's parameters as they are now.
      mesh: the devices.
      rules: see above.
    """
    known = _shapes(params)

    def of(path: Any, leaf: Any) -> sharding.NamedSharding:
        entries = _name(path).split('/')
        for start in range(len(entries) if rules else 0):
            name = '/'.join(entries[start:])
            if known.get(name) == np.shape(leaf):
                partition = next((p for pattern, p in rules if re.search(pattern, name)), ())
                if _fits(np.shape(leaf), partition, mesh):
                    return sharding.NamedSharding(mesh, P(*partition))
                break
        return everywhere(mesh)

    return jax.tree_util.tree_map_with_path(of, tree)


def place(tree: Any, params: Any, mesh: sharding.Mesh, rules: Rules = ()) -> Any:
    """A tree on the devices, as `shardings` says. Of several processes, the first's counts."""
    if hosts.several():
        tree = hosts.agreed(jax.device_get(tree))
    return jax.tree.map(_put, tree, shardings(tree, params, mesh, rules))


def replicate(tree: Any, mesh: sharding.Mesh) -> Any:
    """A tree on every device. Of several processes, each puts what it has, which must be alike."""
    return jax.tree.map(lambda leaf: _put(leaf, everywhere(mesh)), tree)


def gathered(tree: Any) -> Any:
    """A tree that this process can read: leaves that other processes share become numpy arrays."""

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        if leaf.is_fully_replicated:
            return np.asarray(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(whole, tree)


def own_rows(size: int, mesh: sharding.Mesh) -> np.ndarray:
    """Of a batch of that size, the rows of this process's devices: int [n], ascending."""
    if not hosts.several():
        return np.arange(size)
    places = along_batch(mesh).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[place] for place in places]))


def assembled(own: np.ndarray, size: int, mesh: sharding.Mesh) -> jax.Array:
    """A batch of that size, each device its part, of which each process has its own rows."""
    if not hosts.several():
        return jax.device_put(own, along_batch(mesh))
    return jax.make_array_from_process_local_data(along_batch(mesh), own, (size, *own.shape[1:]))


def _put(leaf: Any, where: sharding.NamedSharding) -> jax.Array:
    if not hosts.several():
        return jax.device_put(leaf, where)
    leaf = np.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, where, lambda place: leaf[place])


def _fits(shape: Sequence[int], partition: Sequence[str | None], mesh: sharding.Mesh) -> bool:
    """Whether each axis that is to be split can be, into equal parts."""
    named = [(size, mesh.shape[axis]) for size, axis in zip(shape, partition) if axis is not None]
    return len(partition) <= len(shape) and all(n and n % parts == 0 for n, parts in named)


def _shapes(params: Any) -> Mapping[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {_name(path): tuple(leaf.shape) for path, leaf in leaves}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator='/')
