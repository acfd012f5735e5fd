"""What a network costs, as a polynomial of what it keeps.

Every convolution and dot, and every parameter, contributes a product: a constant times the number
of positions that are alive on some axes. The number alive on an axis is a linear form of the keeps.
Totals, shares of layers, and prices all come from these products. What is counted has integers for
constants; latency is measured (see `jaxkd.graph.latency`), and its constants are seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
import math
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

from jaxkd import errors

Keep = Mapping[str, np.ndarray]
COUNTED = ('flops', 'params', 'activations')
RESOURCES = (*COUNTED, 'latency')
UNMEASURED = (
    'nothing has been measured for this graph; call graph = jaxkd.with_latency(graph) first'
)
# The unit of an absolute budget, where it is not the unit of the cost.
UNITS = {'latency': (1e-3, 'ms')}


class Form(NamedTuple):
    """Alive positions of an axis: `constant + Σ weights[group] · keep[group]`.

    A weight is int [units of the group]: how many positions of the axis go with each unit.
    """

    constant: int
    weights: Mapping[str, np.ndarray]

    def __call__(self, keep: Keep) -> int:
        return self.constant + sum(int(w @ keep[group]) for group, w in self.weights.items())


class Term(NamedTuple):
    """`coefficient · Π forms[i]`, which the layer `layer` pays of `resource`."""

    layer: str
    resource: str
    coefficient: int | float
    forms: tuple[int, ...]


class Width(NamedTuple):
    """A factor of an axis: `size` positions, counted by form `form`, or by none if they stay."""

    size: int
    form: int | None


class Operation(NamedTuple):
    """A convolution or dot that the network does, so that it can be done again at other widths.

    Attributes:
      layer: as in `Term`.
      eqn: the equation of the jaxpr, with parameters and the operands' shapes.
      rounds: how often it is done: more than once in a loop.
      contracted: of each axis that is summed over (a convolution's: its kernel's input channels),
        the factors.
      result: of each axis of the output, the factors.
    """

    layer: str
    eqn: Any
    rounds: int
    contracted: tuple[tuple[Width, ...], ...]
    result: tuple[tuple[Width, ...], ...]


class Live(NamedTuple):
    """An array of `coefficient · Π forms[i]` bytes, alive from step `born` to step `last`."""

    coefficient: int
    forms: tuple[int, ...]
    born: int
    last: int


class Row(NamedTuple):
    """What one layer costs for one example: multiply-adds, parameters, bytes of its outputs.

    And, where it has been measured, its part of the latency of one batch, in seconds.
    """

    layer: str
    flops: int
    params: int
    activations: int
    latency: float = 0.0


class Cost(NamedTuple):
    """What a network costs for one example.

    Attributes:
      flops: multiply-adds (one counts 1) of all convolutions and dots; padding counts as input.
      params: elements of the collection `params`.
      activations: bytes of the outputs of all convolutions and dots.
      latency: seconds for one batch by the model that `jaxkd.with_latency` has fitted to the
        present device; 0.0 where that has not been called.
      peak_activations: most bytes of inputs and intermediate arrays that are needed at one time,
        where elementwise and rearranging operations are computed on the fly and store nothing.
      rows: the same by layer, in the order of the computation.
    """

    flops: int
    params: int
    activations: int
    latency: float
    peak_activations: int
    rows: tuple[Row, ...]

    def by_layer(self) -> tuple[Row, ...]:
        return self.rows


class Polynomial(NamedTuple):
    """The cost of a network as a function of what is kept."""

    forms: tuple[Form, ...]
    terms: tuple[Term, ...]
    lives: tuple[Live, ...]

    def cost(self, keep: Keep) -> Cost:
        alive = [form(keep) for form in self.forms]
        rows: dict[str, dict[str, int | float]] = {}
        for term in self.terms:
            row = rows.setdefault(term.layer, dict.fromkeys(COUNTED, 0) | {'latency': 0.0})
            product = term.coefficient
            for i in term.forms:
                product *= alive[i]
            row[term.resource] += product
        for row in rows.values():
            if not row['flops']:  # nothing to do, and no time to start it, once its branch has gone
                row['latency'] = 0.0
        listed = tuple(Row(layer, **row) for layer, row in rows.items())
        totals = (sum(getattr(row, r) for row in listed) for r in RESOURCES)
        return Cost(*totals, self._peak(alive), listed)

    def meter(
        self,
        resource: str,
        sizes: Mapping[str, int],
        layers: Collection[str] | None = None,
    ) -> Callable[[np.ndarray], float]:
        """What `cost` says of one resource, of what `layers` pay or all layers, where it is asked
        often: as a function of the units that are kept, bool [all units of `sizes`, in order].
        """
        paying = {resource, 'flops'} if resource == 'latency' else {resource}
        terms = [
            term
            for term in self.terms
            if term.resource in paying and (layers is None or term.layer in layers)
        ]
        forms = sorted({i for term in terms for i in term.forms})
        place = {form: row for row, form in enumerate(forms)}
        first = dict(zip(sizes, np.cumsum([0, *sizes.values()]), strict=False))
        entries = [
            (row, first[group] + np.arange(len(weights)), weights)
            for form, row in place.items()
            for group, weights in self.forms[form].weights.items()
        ]
        rows = np.concatenate([[], *(np.full(len(units), row) for row, units, _ in entries)])
        units = np.concatenate([[], *(units for _, units, _ in entries)])
        values = np.concatenate([[], *(weights for *_, weights in entries)])
        # The last form is the factor of terms that have fewer than others.
        weights = sparse.csr_array(
            (values, (rows, units)), shape=(len(forms) + 1, sum(sizes.values())), dtype=float
        )
        constant = np.array([*(float(self.forms[form].constant) for form in forms), 1.0])
        factors = np.full((len(terms), max((len(t.forms) for t in terms), default=0)), len(forms))
        for row, term in enumerate(terms):
            factors[row, : len(term.forms)] = [place[form] for form in term.forms]
        coefficients = np.array([float(term.coefficient) for term in terms])
        own = np.array([term.resource == resource for term in terms], bool)
        layer = np.unique([term.layer for term in terms], return_inverse=True)[1]

        def amount(keep: np.ndarray) -> float:
            paid = coefficients * (constant + weights @ keep)[factors].prod(1)
            if resource == 'latency':  # see `cost`
                paid *= np.bincount(layer, paid * ~own)[layer] > 0
            return float(paid[own].sum())

        return amount

    def _peak(self, alive: Sequence[int]) -> int:
        """The most bytes that are alive at one time, given the positions alive in each form."""
        change = np.zeros(max((live.last for live in self.lives), default=0) + 2, np.int64)
        for live in self.lives:
            size = live.coefficient * math.prod(alive[i] for i in live.forms)
            change[live.born] += size
            change[live.last + 1] -= size
        return int(np.cumsum(change).max())

    def price(
        self,
        keep: Keep,
        resource: str,
        sizes: Mapping[str, int],
        layers: Collection[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """The derivative of a resource in every keep, at `keep`: float64 [units] by group.

        Of what `layers` pay, or all layers.
        """
        alive = [form(keep) for form in self.forms]
        slope = np.zeros(len(self.forms))
        for term in self.terms:
            if term.resource != resource or not (layers is None or term.layer in layers):
                continue
            for place, i in enumerate(term.forms):
                others = [alive[j] for other, j in enumerate(term.forms) if other != place]
                slope[i] += term.coefficient * float(math.prod(others))
        result = {group: np.zeros(size) for group, size in sizes.items()}
        for form, d in zip(self.forms, slope, strict=True):
            for group, weights in form.weights.items():
                result[group] += d * weights
        return result


def check_resource(resource: str, allowed: Sequence[str] = RESOURCES) -> str:
    if resource not in allowed:
        raise errors.ConfigError('resource', resource, allowed=allowed)
    return resource
