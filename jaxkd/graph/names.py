"""Names for the positions of an array's axes, and the ties between them.

Every position of every axis of every variable gets an integer, its name. An array inside the
network is described by one `Axis` per dimension, which says whose positions they are. Rules tie
names that must be kept or removed together; the connected components are what can be removed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy import sparse

BATCH = 'batch'
INPUT = 'network input'
POSITION = 'positions of an image or of a window'


class Part(NamedTuple):
    """A factor of an axis.

    Attributes:
      size: number of positions.
      names: int64 [size], the names of its positions, or None where they have none.
      bound: why positions without names cannot be removed; None where the array is the same at
        every position, so that any number of them will do (a broadcast).
    """

    size: int
    names: np.ndarray | None = None
    bound: str | None = None


# Row-major product of its parts: (height, width, channels) merged by a reshape has three. An axis
# of several parts has none of size 1.
Axis = tuple[Part, ...]


def free(size: int) -> Axis:
    """An axis along which the array does not change."""
    return (Part(size),)


def bound(size: int, why: str = POSITION) -> Axis:
    """An axis whose positions mean something, but are no channels."""
    return (Part(size, None, why),)


def size(axis: Axis) -> int:
    return math.prod(part.size for part in axis)


def named(axis: Axis) -> list[np.ndarray]:
    """The name vectors in `axis`."""
    return [part.names for part in axis if part.names is not None]


def flat(axis: Axis) -> np.ndarray | None:
    """The name of every position of `axis`: int64 [size], or None unless just one part has names.

    Positions of the merged axis (height, width, channels) are named by their channel.
    """
    if len(named(axis)) != 1:
        return None
    index = next(i for i, part in enumerate(axis) if part.names is not None)
    before, after = size(axis[:index]), size(axis[index + 1 :])
    return np.tile(np.repeat(axis[index].names, after), before)


class Frozen(NamedTuple):
    """Why a name may not be removed."""

    reason: str
    primitive: str
    source: str


class Ties:
    """What has been found out about the names: which belong together, which must stay."""

    def __init__(self):
        self.count = 0
        self._pairs: list[tuple[np.ndarray, np.ndarray]] = []
        self._windows: list[np.ndarray] = []
        self._frozen: list[tuple[np.ndarray, Frozen]] = []

    def fresh(self, number: int) -> np.ndarray:
        """`number` new names."""
        self.count += number
        return np.arange(self.count - number, self.count)

    def tie(self, a: np.ndarray, b: np.ndarray) -> None:
        """Positions `a[i]` and `b[i]` are kept or removed together."""
        if a is not b:
            self._pairs.append((a, b))

    def window(self, axis: Axis) -> None:
        """`axis` is a convolution's window, or the like: no channels, and nobody thinks so."""
        self._windows.extend(named(axis))

    def freeze(self, axis: Axis, why: Frozen) -> None:
        """No position of `axis` may be removed."""
        self._frozen.extend((names, why) for names in named(axis))

    def components(self) -> tuple[np.ndarray, np.ndarray, dict[int, Frozen]]:
        """The connected components of the ties.

        Returns:
          component of each name, int [names]; whether a component is a mere window,
          bool [components]; the first reason to keep it, for each component that has one.
        """
        rows = np.concatenate([np.empty(0, int), *(a for a, _ in self._pairs)])
        columns = np.concatenate([np.empty(0, int), *(b for _, b in self._pairs)])
        graph = sparse.coo_array(
            (np.ones(len(rows), bool), (rows, columns)), shape=(self.count, self.count)
        )
        number, component = sparse.csgraph.connected_components(graph, directed=False)
        windows = np.zeros(number, bool)
        for names in self._windows:
            windows[component[names]] = True
        frozen: dict[int, Frozen] = {}
        for names, why in self._frozen:
            for c in np.unique(component[names]):
                frozen.setdefault(int(c), why)
        return component, windows, frozen

    def unify(self, a: Axis, b: Axis, why: Frozen) -> Axis:
        """Ties two axes of one size that an operation puts side by side; the axis that results.

        What cannot be expressed as ties is frozen, for the reason `why`.
        """
        result: list[Part] = []
        left, right = list(a), list(b)
        while left or right:
            chunks = [left.pop(0)], [right.pop(0)]
            while (m := size(tuple(chunks[0]))) != (n := size(tuple(chunks[1]))):
                if m < n:
                    chunks[0].append(left.pop(0))
                else:
                    chunks[1].append(right.pop(0))
            result.extend(self._unify_chunk(tuple(chunks[0]), tuple(chunks[1]), why))
        return tuple(result)

    def _unify_chunk(self, a: Axis, b: Axis, why: Frozen) -> Axis:
        """`unify` for axes that have no common inner boundary."""
        if not named(a):
            a, b = b, a
        if not named(a):  # neither has names: the one that says more wins
            bounds = [part.bound for axis in (a, b) for part in axis if part.bound]
            if len(a) == len(b) == 1:
                return (Part(size(a), None, BATCH if BATCH in bounds else (bounds or [None])[0]),)
            return max(a, b, key=lambda axis: sum(part.bound is not None for part in axis))
        if not named(b):
            bounds = [part.bound for part in b if part.bound]
            if bounds:
                self.freeze(a, why._replace(reason=INPUT) if INPUT in bounds else why)
            return a
        flat_a, flat_b = flat(a), flat(b)
        if flat_a is None or flat_b is None:
            self.freeze(a, why)
            self.freeze(b, why)
        else:
            self.tie(flat_a, flat_b)
        return a if len(a) >= len(b) else b
