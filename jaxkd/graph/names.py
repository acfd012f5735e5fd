"""Names for the positions of an array's axes, and the ties between them.

Every position of every axis of every variable gets an integer, its name. An array inside the
network is described by one `Axis` per dimension, which says whose positions they are. Rules tie
names that must be kept or removed together; the connected components are what can be removed.
"""

from __future__ import annotations

import functools
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


class Frozen(NamedTuple):
    """Why a name may not be removed."""

    reason: str
    primitive: str
    source: str


class Product(NamedTuple):
    """An axis that is indexed like a table: position (i, j, …) is kept if i is, and j is, and ….

    Attributes:
      names: int64 [n, m, …], of the positions.
      factors: int64 [n], int64 [m], …; None for a dimension whose positions have no names.
      why: what to say where this keeps something from being removed.
    """

    names: np.ndarray
    factors: tuple[np.ndarray | None, ...]
    why: Frozen


class Components(NamedTuple):
    """The connected components of the ties.

    Attributes:
      of: int [names], the component of each name.
      windows: bool [components], whether a component is a mere window.
      stays: bool [components], whether it is kept: frozen, or a window.
      frozen: the first reason to keep it, for each component that has one.
      inexact: for components whose removal changes what the others compute: where that is.
    """

    of: np.ndarray
    windows: np.ndarray
    stays: np.ndarray
    frozen: dict[int, Frozen]
    inexact: dict[int, Frozen]


class Ties:
    """What has been found out about the names: which belong together, which must stay.

    Args:
      allow_inexact: whether a name may be removed although a mean, a maximum or the like was taken
        over it, so that the other channels change.
    """

    def __init__(self, allow_inexact: bool = False):
        self.count = 0
        self.allow_inexact = allow_inexact
        self._pairs: list[tuple[np.ndarray, np.ndarray]] = []
        self._products: list[Product] = []
        # The names of tables, by their dimensions. The axis is kept, so that ids stay its own.
        self._tables: dict[tuple[tuple[int, int], ...], tuple[Axis, np.ndarray]] = {}
        self._windows: list[np.ndarray] = []
        self._frozen: list[tuple[np.ndarray, Frozen]] = []
        self._reduced: list[tuple[np.ndarray, Frozen]] = []

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

    def reduce(self, axis: Axis, why: Frozen) -> None:
        """One value is made of the positions of `axis`: without some of them it is another one."""
        self._reduced.extend((names, why) for names in named(axis))

    def split(self, names: np.ndarray, sizes: tuple[int, int], why: Frozen) -> tuple[Part, Part]:
        """Looks at an axis as at a table of `sizes`: its rows and its columns get names."""
        rows, columns = (self.fresh(n) for n in sizes)
        self._products.append(Product(names.reshape(sizes), (rows, columns), why))
        parts = Part(sizes[0], rows), Part(sizes[1], columns)
        self._tables[key(parts)] = parts, names
        return parts

    def flat(self, axis: Axis, why: Frozen) -> np.ndarray | None:
        """The name of every position of `axis`: int64 [size], or None where no part has names.

        Positions of the merged axis (height, width, channels) are named by their channel. Where
        several parts have names, positions get names of their own.
        """
        vectors = named(axis)
        if not vectors:
            return None
        if len(vectors) == 1:
            index = next(i for i, part in enumerate(axis) if part.names is not None)
            before, after = size(axis[:index]), size(axis[index + 1 :])
            return np.tile(np.repeat(axis[index].names, after), before)
        if key(axis) not in self._tables:
            table = self.fresh(size(axis))
            shape = [part.size for part in axis]
            self._products.append(
                Product(table.reshape(shape), tuple(part.names for part in axis), why)
            )
            self._tables[key(axis)] = axis, table
        return self._tables[key(axis)][1]

    def components(self) -> Components:
        """The connected components, after every product has been settled.

        A table loses whole rows or whole columns. Where all but one of its dimensions cannot lose
        anything, its positions go with that one. Where several could, the one does of which the
        fewest values are made, and of such the last: code that divides channels fixes the number of
        pieces and computes their size.
        """
        waiting = list(self._products)
        while True:
            found = self._connect()
            if not waiting:
                return found
            left = [product for product in waiting if not self._settle(product, found)]
            if len(left) == len(waiting):
                movable = self._movable(left[0], found)
                changes = functools.partial(self._changes, found, left[0].names.reshape(-1))
                chosen = min(reversed(movable), key=changes)
                self._frozen.extend((f, left[0].why) for f in movable if f is not chosen)
            waiting = left

    def _connect(self) -> Components:
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
        inexact: dict[int, Frozen] = {}
        for names, why in self._frozen:
            for c in np.unique(component[names]):
                frozen.setdefault(int(c), why)
        for names, why in self._reduced:
            for c in np.unique(component[names]):
                if not windows[c]:  # which stay anyway, with nothing to be said
                    (inexact if self.allow_inexact else frozen).setdefault(int(c), why)
        stays = windows.copy()
        stays[list(frozen)] = True
        return Components(component, windows, stays, frozen, inexact)

    def _movable(self, product: Product, found: Components) -> list[np.ndarray]:
        """The dimensions of a table of which some position can be removed."""
        factors = (factor for factor in product.factors if factor is not None)
        return [factor for factor in factors if not found.stays[found.of[factor]].all()]

    def _changes(self, found: Components, table: np.ndarray, factor: np.ndarray) -> int:
        """How often one value is made of what would go with a dimension of a table."""
        gone = found.of[np.concatenate([table, factor])]
        return sum(np.isin(found.of[names], gone).any() for names, _ in self._reduced)

    def _settle(self, product: Product, found: Components) -> bool:
        """Writes a product as ties, if it is clear which; whether it was."""
        movable = self._movable(product, found)
        names = product.names.reshape(-1)
        if movable and found.stays[found.of[names]].all():
            why = found.frozen.get(int(found.of[names[0]]), product.why)
            self._frozen.extend((factor, why) for factor in movable)
        elif not movable:
            last = next(f for f in reversed(product.factors) if f is not None)
            self._frozen.append((names, found.frozen.get(int(found.of[last[0]]), product.why)))
        elif len(movable) == 1:
            i = next(i for i, factor in enumerate(product.factors) if factor is movable[0])
            shape = [-1 if j == i else 1 for j in range(product.names.ndim)]
            self.tie(
                np.broadcast_to(movable[0].reshape(shape), product.names.shape).reshape(-1), names
            )
        else:
            return False
        return True

    def unify(self, a: Axis, b: Axis, why: Frozen, summed: bool = False) -> Axis:
        """Ties two axes of one size that an operation puts side by side; the axis that results.

        What cannot be expressed as ties is frozen, for the reason `why`. If the operation sums over
        the axis, names that meet nothing but a constant are reduced.
        """
        if not size(a):
            return a
        result: list[Part] = []
        left, right = list(a), list(b)
        while left or right:
            chunks = [left.pop(0)], [right.pop(0)]
            while (m := size(tuple(chunks[0]))) != (n := size(tuple(chunks[1]))):
                if m < n:
                    chunks[0].append(left.pop(0))
                else:
                    chunks[1].append(right.pop(0))
            result.extend(self._unify_chunk(tuple(chunks[0]), tuple(chunks[1]), why, summed))
        return tuple(result)

    def _unify_chunk(self, a: Axis, b: Axis, why: Frozen, summed: bool) -> Axis:
        """`unify` for axes that have no common inner boundary."""
        if not named(a):
            a, b = b, a
        if not named(a):  # neither has names: the one that says more wins
            bounds = [part.bound for axis in (a, b) for part in axis if part.bound]
            if len(a) == len(b) == 1:
                known = next((b for b in (BATCH, INPUT) if b in bounds), (bounds or [None])[0])
                return (Part(size(a), None, known),)
            return max(a, b, key=lambda axis: sum(part.bound is not None for part in axis))
        if not named(b):
            bounds = [part.bound for part in b if part.bound]
            if bounds:
                self.freeze(a, why._replace(reason=INPUT) if INPUT in bounds else why)
                if BATCH in bounds:  # which no cost counts
                    return b
            elif summed:
                self.reduce(a, why)
            return a
        self.tie(self.flat(a, why), self.flat(b, why))
        return a if len(a) >= len(b) else b


def key(axis: Axis) -> tuple[tuple[int, int], ...]:
    """What two axes of the same names have in common."""
    return tuple((part.size, id(part.names)) for part in axis if part.size != 1)
