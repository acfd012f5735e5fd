"""What each primitive does to the names: one small rule per primitive, in one table.

A rule is called as `rule(context, eqn, *operands)`, with one tuple of axes per operand, and returns
one tuple of axes per result. A primitive that is not in the table freezes whatever it touches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import math
import os
from typing import Any, NamedTuple

import flax
import jax
import numpy as np

from jaxkd.graph import names
from jaxkd.graph.names import Axis, Frozen, Part

REDUCED = 'one value is made of all its channels'  # the reason where a mean or the like is taken


class Array(tuple[Axis, ...]):
    """The axes of an array.

    Attributes:
      held: which of `Context.stored` it is computed from on the fly.
      step: which of `Context.steps` made it; None for variables and constants.
    """

    held: frozenset[int] = frozenset()
    step: int | None = None

    @classmethod
    def of(cls, axes: Iterable[Axis], held: frozenset[int], step: int | None) -> Array:
        array = cls(axes)
        array.held, array.step = held, step
        return array


class Step(NamedTuple):
    """An array that is made of the arrays that the steps `read` made.

    `sums` says whether it is their sum, or they are side by side in it.
    """

    axes: Sequence[Axis]
    read: tuple[int, ...]
    sums: bool


class Stored(NamedTuple):
    """An array that is written to memory: made in step `born`, last read in step `last`."""

    axes: Sequence[Axis]
    itemsize: int
    born: int
    last: int


class Layer(NamedTuple):
    """A convolution or dot that the network was seen to do, and what it costs.

    Attributes:
      primitive: 'conv_general_dilated' or 'dot_general'.
      scope: the module's name stack, as JAX records it.
      kernel: the axes of the right operand, for finding the parameter that it came from.
      out: the names of each axis of the output that the kernel makes, channels first of all.
      shape: shape of the output, with the batch.
      factors: axes whose sizes' product is the multiply-adds for one example.
      itemsize: bytes of one element of the output.
      outputs: axes whose sizes' product is the output's elements for one example: those of the
        output, then what they are repeated over.
      eqn: the equation.
      contracted: the axes that are summed over: a convolution's are its kernel's input channels.
      rounds: how often a loop does it.
    """

    primitive: str
    scope: str
    kernel: Array
    out: tuple[np.ndarray, ...]
    shape: tuple[int, ...]
    factors: tuple[Axis, ...]
    itemsize: int
    outputs: tuple[Axis, ...]
    eqn: Any
    contracted: tuple[Axis, ...]
    rounds: int = 1


class Context:
    """The state of one walk through a program: ties, layers, arrays stored so far."""

    def __init__(self, allow_inexact: bool = False):
        self.ties = names.Ties(allow_inexact)
        self.layers: list[Layer] = []
        self.stored: list[Stored] = []
        self.steps: list[Step | None] = []  # None: an input
        self.inside: list[Sequence[Axis]] = []  # arrays inside of loops and choices
        self._time = 0
        self._depth = 0  # of loops and choices
        self.unknown: dict[str, str] = {}  # primitives that are not understood, with a note
        # Whether a size may come from elsewhere than an array's shape, so that it need not fit any
        # more when there are fewer channels.
        self.fixes_sizes = False
        self._calls: list[Any] = []  # the equations that are being entered, outermost first

    def walk(self, jaxpr: Any, consts: Sequence[Any], operands: Sequence[Array]) -> list[Array]:
        """Evaluates `jaxpr` on names. `consts` are the values of its constants."""
        environment: dict[Any, Array] = {}
        operands = [x if isinstance(x, Array) else Array(x) for x in operands]

        def read(atom) -> Array:
            if isinstance(atom, jax.extend.core.Literal):
                return constant(atom.val)
            return environment[atom]

        environment.update(zip(jaxpr.constvars, map(constant, consts), strict=True))
        environment.update(zip(jaxpr.invars, operands, strict=True))
        for eqn in live(jaxpr):
            rule = RULES.get(eqn.primitive.name, _unknown)
            inputs = list(map(read, eqn.invars))
            self._calls.append(eqn)
            self._depth += rule in _CHOOSING
            results = rule(self, eqn, *inputs)
            self._depth -= rule in _CHOOSING
            self._calls.pop()
            environment.update(zip(eqn.outvars, self._made(eqn, inputs, results), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def receive(self, axes: Sequence[Axis], itemsize: int) -> Array:
        """An input of the network."""
        self.steps.append(None)
        return Array.of(axes, self._store(axes, itemsize), len(self.steps) - 1)

    def _store(self, axes: Sequence[Axis], itemsize: int) -> frozenset[int]:
        """What an array holds that is written to memory now: itself."""
        self.stored.append(Stored(axes, itemsize, self._time, self._time))
        return frozenset([len(self.stored) - 1])

    def use(self, arrays: Iterable[Array]) -> None:
        """Something reads `arrays` now: what they are computed from was alive until here."""
        self._time += 1
        for i in frozenset[int]().union(*(array.held for array in arrays)):
            self.stored[i] = self.stored[i]._replace(last=self._time)

    def _made(self, eqn: Any, inputs: Sequence[Array], results: Sequence[Array]) -> list[Array]:
        """The results with what they hold in memory and their steps; an inner program's have
        both already."""
        if RULES.get(eqn.primitive.name) is _call:
            return list(results)
        if eqn.primitive.name in _ON_THE_FLY:
            together = frozenset[int]().union(*(array.held for array in inputs))
            held = [together] * len(results)
        else:
            self.use(inputs)
            held = [
                self._store(axes, getattr(var.aval.dtype, 'itemsize', 1))
                for axes, var in zip(results, eqn.outvars, strict=True)
            ]
        if self._depth:
            self.inside += [*inputs, *results]
            return [Array.of(*pair, None) for pair in zip(results, held, strict=True)]
        first = len(self.steps)
        read = tuple(array.step for array in inputs if array.step is not None)
        self.steps += [Step(axes, read, eqn.primitive.name in _SUMS) for axes in results]
        return [Array.of(*of) for of in zip(results, held, range(first, len(self.steps)))]

    def why(self, eqn: Any, reason: str) -> Frozen:
        # What stands inside a jitted function of JAX has no line of the model; its caller has.
        sources = map(source, (eqn, *reversed(self._calls)))
        return Frozen(reason, eqn.primitive.name, next(filter(None, sources), 'unknown line'))

    @property
    def scope(self) -> str:
        scopes = (str(eqn.source_info.name_stack) for eqn in self._calls)
        return '/'.join(scope for scope in scopes if scope)


def live(jaxpr: Any) -> list[Any]:
    """The equations that the outputs of `jaxpr` depend on, in their order."""
    wanted = {id(atom) for atom in jaxpr.outvars}
    result = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(id(var) in wanted for var in eqn.outvars):
            wanted.update(map(id, eqn.invars))
            result.append(eqn)
    return result[::-1]


def constant(value: Any) -> Array:
    """The axes of a value that the network's code fixes."""
    shape = np.shape(value)
    # Empty, or too large to look at: bound is always right.
    if not 0 < math.prod(shape) <= 100_000_000 or not shape:
        return Array(names.bound(n) for n in shape)
    value = np.asarray(value)
    uniform = [bool(np.all(value == value.take([0], axis))) for axis in range(value.ndim)]
    return Array(
        names.free(n) if same else names.bound(n) for n, same in zip(shape, uniform, strict=True)
    )


# Code that is not the model's.
_LIBRARIES = tuple(
    os.path.dirname(os.path.abspath(file)) + os.sep
    for file in (jax.__file__, flax.__file__, __file__)
)


def is_of_the_model(file: str) -> bool:
    """Whether a file of Python code is neither JAX's, nor Flax's, nor part of this package."""
    return not file.startswith(_LIBRARIES)


def source(eqn: Any) -> str | None:
    """The line of the model's code that `eqn` comes from: "file:line (function)"."""
    traceback = eqn.source_info.traceback
    for frame in traceback.frames if traceback else ():
        if is_of_the_model(frame.file_name):
            return f'{frame.file_name}:{frame.line_num} ({frame.function_name})'
    return None


def _unknown(context: Context, eqn: Any, *operands: Array) -> list[Array]:
    name = eqn.primitive.name
    why = context.why(eqn, f'{name} has no rule')
    touched = False
    for operand in operands:
        for axis in operand:
            context.ties.freeze(axis, why)
            touched = touched or bool(names.named(axis))
    note = f'has no rule, first met at {why.source}'
    if _computes(eqn):  # nothing that costs may go by unsaid
        touched = True
        note += '; the convolutions and dots inside are not in the cost'
    if touched:
        context.unknown.setdefault(name, note)
    batch = any(map(_batched, operands))
    results = []
    for var in eqn.outvars:
        axes = [names.bound(n) for n in var.aval.shape]
        if batch and axes:  # by convention the batch leads
            axes[0] = names.bound(var.aval.shape[0], names.BATCH)
        results.append(tuple(axes))
    return results


def _computes(eqn: Any) -> bool:
    """Whether a program that `eqn` calls has convolutions or dots."""
    return any(
        inner.primitive.name in ('conv_general_dilated', 'dot_general') or _computes(inner)
        for jaxpr in jax.extend.core.jaxprs_in_params(eqn.params)
        for inner in jaxpr.eqns
    )


def _elementwise(context: Context, eqn: Any, *operands: Array) -> list[Array]:
    shape = eqn.outvars[0].aval.shape
    if any(operand and len(operand) != len(shape) for operand in operands):  # a widening bitcast
        return _unknown(context, eqn, *operands)
    why = context.why(eqn, 'combined with something that has no channels to remove')
    result = []
    for dimension, n in enumerate(shape):
        axis = names.free(n)
        for operand in operands:
            if operand and names.size(operand[dimension]) == n:
                axis = context.ties.unify(axis, operand[dimension], why)
        result.append(axis)
    return [tuple(result)] * len(eqn.outvars)


def _same(context: Context, eqn: Any, *operands: Array) -> list[Array]:
    del context
    return list(operands[: len(eqn.outvars)])


def _transpose(context: Context, eqn: Any, x: Array) -> list[Array]:
    del context
    return [tuple(x[i] for i in eqn.params['permutation'])]


def _broadcast_in_dim(context: Context, eqn: Any, x: Array, *dynamic: Array) -> list[Array]:
    del context, dynamic
    shape = eqn.params['shape']
    result = [names.free(n) for n in shape]
    for axis, dimension in zip(x, eqn.params['broadcast_dimensions'], strict=True):
        if names.size(axis) == shape[dimension]:
            result[dimension] = axis
    return [tuple(result)]


def _squeeze(context: Context, eqn: Any, x: Array) -> list[Array]:
    del context
    return [tuple(axis for i, axis in enumerate(x) if i not in eqn.params['dimensions'])]


def _reshape(context: Context, eqn: Any, x: Array, *dynamic: Array) -> list[Array]:
    del dynamic
    shape = eqn.params['new_sizes']
    if eqn.params['dimensions'] is not None:  # transposed first, as `nn.vmap` has it
        x = tuple(x[i] for i in eqn.params['dimensions'])
    if math.prod(shape) == 0:
        return [_reshape_nothing(x, shape)]
    if math.prod(shape) == 1:
        old = [axis for axis in x if names.named(axis)]
        return (
            [(*(names.free(n) for n in shape[:-1]), old[0])]
            if old and shape
            else [tuple(names.free(n) for n in shape)]
        )
    why = context.why(eqn, 'a reshape splits its channels')
    parts = [part for axis in x for part in axis if part.size != 1]
    result = []
    for n in shape:
        axis: list[Part] = []
        missing = n
        while missing > 1:
            part = parts.pop(0)
            if missing % part.size == 0:
                axis.append(part)
                missing //= part.size
                continue
            if part.size % missing:  # the boundary falls inside of both: nothing to hold on to
                rest = math.prod(p.size for p in parts) * part.size
                for p in (part, *axis, *parts):
                    context.ties.freeze((p,), why)
                parts = [names.Part(rest // missing, None, names.POSITION)]
                axis.append(names.Part(missing, None, names.POSITION))
            elif part.names is None:
                axis.append(part._replace(size=missing))
                parts.insert(0, part._replace(size=part.size // missing))
            else:
                sizes = missing, part.size // missing
                outer, inner = context.ties.split(part.names, sizes, why)
                axis.append(outer)
                parts.insert(0, inner)
            missing = 1
        result.append(tuple(axis) if axis else names.free(1))
    before, after = (
        [names.key(axis) for axis in axes if names.named(axis)] for axes in (x, result)
    )
    context.fixes_sizes |= before != after
    return [tuple(result)]


def _reshape_nothing(x: Array, shape: Sequence[int]) -> Array:
    """Of an array without elements: axes go on where those before or behind them do, too."""
    result = [names.bound(n) for n in shape]
    places = range(len(shape))
    for axes, order in ((x, places), (x[::-1], places[::-1])):
        for i, axis in zip(order, axes, strict=False):
            if names.size(axis) != shape[i]:
                break
            result[i] = axis
    return Array(result)


def _reduce(context: Context, eqn: Any, *operands: Array) -> list[Array]:
    axes = eqn.params['axes'] if 'axes' in eqn.params else eqn.params['dimensions']
    operands = operands[: len(eqn.outvars)]  # a general reduction has initial values besides
    why = context.why(eqn, REDUCED)
    for operand in operands:
        for i in axes:
            context.ties.reduce(operand[i], why)
    kept = tuple(axis for i, axis in enumerate(operands[0]) if i not in axes)
    return [kept] * len(eqn.outvars)


def _argmax(context: Context, eqn: Any, x: Array) -> list[Array]:
    axes = eqn.params['axes']
    why = context.why(eqn, 'its channels are counted')
    for i in axes:
        context.ties.freeze(x[i], why)
    return [tuple(axis for i, axis in enumerate(x) if i not in axes)]


def _stop(context: Context, axis: Axis, n: int, why: Frozen) -> Axis:
    """An axis of `n` positions made of `axis` in a way that keeps none of its names."""
    context.ties.freeze(axis, why)
    return names.bound(n, next((part.bound for part in axis if part.bound), names.POSITION))


def _partly(context: Context, eqn: Any, same: Sequence[bool], reason: str, x: Array) -> list[Array]:
    """Hands on the axes that stay the `same`, and freezes the others."""
    why = context.why(eqn, reason)
    shape = eqn.outvars[0].aval.shape
    result = tuple(
        axis if unchanged else _stop(context, axis, n, why)
        for axis, n, unchanged in zip(x, shape, same, strict=True)
    )
    return [result] * len(eqn.outvars)


def _along(context: Context, eqn: Any, *operands: Array) -> list[Array]:
    """What runs along one axis: cumulative sums and the like, sorting."""
    axis = next(eqn.params[k] for k in ('axis', 'dimension') if k in eqn.params)
    same = [i != axis for i in range(len(operands[0]))]
    reason = 'what becomes of a channel depends on the channels beside it'
    return [_partly(context, eqn, same, reason, operand)[0] for operand in operands]


def _top_k(context: Context, eqn: Any, x: Array) -> list[Array]:
    axis = eqn.params.get('axis', len(x) - 1) % len(x)
    same = [i != axis for i in range(len(x))]
    return _partly(context, eqn, same, 'the largest of its channels are taken', x)


def _reduce_window(context: Context, eqn: Any, x: Array, *initial: Array) -> list[Array]:
    del initial
    params = eqn.params
    same = [
        (window, stride, *padding) == (1, 1, 0, 0)
        for window, stride, padding in zip(
            params['window_dimensions'], params['window_strides'], params['padding'], strict=True
        )
    ]
    return _partly(context, eqn, same, 'a pooling window runs over its channels', x)


def _concatenate(context: Context, eqn: Any, *operands: Array) -> list[Array]:
    dimension = eqn.params['dimension']
    why = context.why(eqn, 'combined with something that has no channels to remove')
    result = list(operands[0])
    for operand in operands[1:]:
        for i, axis in enumerate(operand):
            if i != dimension:
                result[i] = context.ties.unify(result[i], axis, why)
    joined = [operand[dimension] for operand in operands]
    if not any(map(names.named, joined)):
        bounds = {part.bound for axis in joined for part in axis}
        known = names.BATCH if names.BATCH in bounds else names.POSITION
        result[dimension] = names.bound(sum(map(names.size, joined)), known)
        return [tuple(result)]
    vectors = []
    for axis in joined:
        vector = context.ties.flat(axis, why)
        if vector is None:  # positions that stay, beside channels that need not
            vector = context.ties.fresh(names.size(axis))
            context.ties.freeze((Part(len(vector), vector),), why)
        vectors.append(vector)
    vector = np.concatenate(vectors)
    result[dimension] = (Part(len(vector), vector),)
    return [tuple(result)]


def _stack(context: Context, eqn: Any, *operands: Array) -> list[Array]:
    why = context.why(eqn, 'combined with something that has no channels to remove')
    result = list(operands[0])
    for operand in operands[1:]:
        result = [context.ties.unify(a, b, why) for a, b in zip(result, operand, strict=True)]
    result.insert(eqn.params['axis'], names.bound(len(operands)))
    return [tuple(result)]


def _unstack(context: Context, eqn: Any, x: Array) -> list[Array]:
    dimension = eqn.params['axis']
    context.ties.freeze(x[dimension], context.why(eqn, 'its channels are taken apart'))
    return [(*x[:dimension], *x[dimension + 1 :])] * len(eqn.outvars)


def _tile(context: Context, eqn: Any, x: Array) -> list[Array]:
    """Copies of an axis side by side: all copies of a channel go with it."""
    del context
    result = []
    for axis, copies in zip(x, eqn.params['reps'], strict=True):
        if copies == 1:
            result.append(axis)
        else:  # an axis of one position is broadcast
            result.append((Part(copies), *(axis if names.size(axis) > 1 else ())))
    return [tuple(result)]


def _rev(context: Context, eqn: Any, x: Array) -> list[Array]:
    same = [i not in eqn.params['dimensions'] for i in range(len(x))]
    return _partly(context, eqn, same, 'its channels are reversed', x)


def _piece(context: Context, axis: Axis, where: slice, why: Frozen) -> Axis:
    """Positions `where` of `axis`.

    Code that takes one of several equal pieces computes their size from the shape: position p of
    every piece is one unit, so that the pieces stay equal. Other pieces are taken at fixed places.
    """
    n = names.size(axis)
    taken = len(range(n)[where])
    if taken == n:
        return axis
    if not names.named(axis):
        return names.bound(taken, next((p.bound for p in axis if p.bound), names.POSITION))
    context.fixes_sizes = True
    vector = context.ties.flat(axis, why)
    if where.step == 1 and taken > 1 and n % taken == 0 and where.start % taken == 0:
        pieces = vector.reshape(-1, taken)
        context.ties.tie(np.tile(pieces[0], len(pieces)), vector)
    elif where.step > 1 and n == taken * where.step:
        context.ties.tie(np.repeat(vector[:: where.step], where.step), vector)
    else:
        return _stop(context, axis, taken, why)
    return (Part(taken, vector[where]),)


def _slice(context: Context, eqn: Any, x: Array) -> list[Array]:
    params = eqn.params
    strides = params['strides'] or (1,) * len(x)
    why = context.why(eqn, 'a slice of its channels is taken at a fixed place')
    pieces = map(slice, params['start_indices'], params['limit_indices'], strides)
    return [tuple(_piece(context, *pair, why) for pair in zip(x, pieces, strict=True))]


def _split(context: Context, eqn: Any, x: Array) -> list[Array]:
    dimension, ends = eqn.params['axis'], np.cumsum(eqn.params['sizes'])
    why = context.why(eqn, 'its channels are split at fixed places')
    result = []
    for start, end in zip((0, *ends), ends, strict=False):
        piece = _piece(context, x[dimension], slice(int(start), int(end), 1), why)
        result.append((*x[:dimension], piece, *x[dimension + 1 :]))
    return result


def _pad(context: Context, eqn: Any, x: Array, value: Array) -> list[Array]:
    """Channels that are padded get company that has no parameters of its own.

    Code that pads both sides alike computes the amount from two shapes: it stays the same on both.
    """
    del value
    why = context.why(eqn, 'its channels are padded')
    result = []
    for axis, padding, n in zip(
        x, eqn.params['padding_config'], eqn.outvars[0].aval.shape, strict=True
    ):
        low, high, interior = padding
        vector = context.ties.flat(axis, why)
        if not (low or high or interior):
            result.append(axis)
        elif vector is None or interior or min(low, high) < 0 or (low != high and low and high):
            result.append(_stop(context, axis, n, why))
        else:
            context.fixes_sizes = True
            company = context.ties.fresh(max(low, high))
            around = company if low else company[:0], company if high else company[:0]
            result.append((Part(n, np.concatenate([around[0], vector, around[1]])),))
    return [tuple(result)]


def _dynamic_slice(context: Context, eqn: Any, x: Array, *starts: Array) -> list[Array]:
    del starts
    same = [names.size(axis) == n for axis, n in zip(x, eqn.params['slice_sizes'], strict=True)]
    return _partly(context, eqn, same, 'a slice of its channels is taken', x)


def _dynamic_update_slice(
    context: Context, eqn: Any, x: Array, update: Array, *starts: Array
) -> list[Array]:
    del starts
    why = context.why(eqn, 'some of its channels are replaced')
    result = []
    for axis, other in zip(x, update, strict=True):
        if names.size(axis) == names.size(other):
            result.append(context.ties.unify(axis, other, why))
        else:
            context.ties.freeze(other, why)
            result.append(_stop(context, axis, names.size(axis), why))
    return [tuple(result)]


def _gather(context: Context, eqn: Any, x: Array, indices: Array) -> list[Array]:
    """Axes that are taken whole go on; what is picked by an index stays whole."""
    numbers, taken = eqn.params['dimension_numbers'], eqn.params['slice_sizes']
    why = context.why(eqn, 'its channels are picked by an index')
    dropped = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    whole = [
        axis if names.size(axis) == n else _stop(context, axis, n, why)
        for i, (axis, n) in enumerate(zip(x, taken, strict=True))
        if i not in dropped
    ]
    picks = list(indices[:-1])
    for i, j in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims):
        picks[j] = context.ties.unify(x[i], picks[j], why)
    for i in numbers.collapsed_slice_dims:
        context.ties.freeze(x[i], why)
    context.ties.freeze(indices[-1], why)
    rank = len(eqn.outvars[0].aval.shape)
    return [tuple(whole.pop(0) if i in numbers.offset_dims else picks.pop(0) for i in range(rank))]


def _scatter(context: Context, eqn: Any, x: Array, indices: Array, updates: Array) -> list[Array]:
    """Axes that are written whole go with the updates'; what an index points into stays whole."""
    numbers = eqn.params['dimension_numbers']
    why = context.why(eqn, 'its channels are written to by an index')
    windows = [updates[i] for i in numbers.update_window_dims]
    for axis in (*indices, *(axis for axis in updates if axis not in windows)):
        context.ties.freeze(axis, why)
    result = []
    for i, axis in enumerate(x):
        dropped = i in (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
        update = None if dropped else windows.pop(0)
        if update is not None and names.size(update) == names.size(axis):
            result.append(context.ties.unify(axis, update, why))
        else:
            context.ties.freeze(update or (), why)
            result.append(_stop(context, axis, names.size(axis), why))
    return [tuple(result)]


def _iota(context: Context, eqn: Any, *dynamic: Array) -> list[Array]:
    del context, dynamic
    shape, dimension = eqn.params['shape'], eqn.params['dimension']
    return [tuple(names.bound(n) if i == dimension else names.free(n) for i, n in enumerate(shape))]


def _random(context: Context, eqn: Any, *operands: Array) -> list[Array]:
    """Independent noise is the same in distribution whichever positions are left."""
    del context, operands
    return [tuple(names.free(n) for n in var.aval.shape) for var in eqn.outvars]


def _dot_general(context: Context, eqn: Any, lhs: Array, rhs: Array) -> list[Array]:
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = eqn.params['dimension_numbers']
    why = context.why(eqn, 'contracted with something that has no channels to remove')
    contracted, batch = (
        [context.ties.unify(lhs[i], rhs[j], why, summed) for i, j in zip(left, right, strict=True)]
        for left, right, summed in (
            (lhs_contract, rhs_contract, True),
            (lhs_batch, rhs_batch, False),
        )
    )
    lhs_free = [a for i, a in enumerate(lhs) if i not in (*lhs_contract, *lhs_batch)]
    rhs_free = [a for i, a in enumerate(rhs) if i not in (*rhs_contract, *rhs_batch)]
    result = (*batch, *lhs_free, *rhs_free)
    aval = eqn.outvars[0].aval
    # The operand without the batch is the kernel; a product of two activations has none, and is
    # often divided by the root of a width.
    context.fixes_sizes |= _batched(lhs) and _batched(rhs)
    sides = [(rhs, rhs_free), (lhs, lhs_free)]
    kernel, kernel_free = next((side for side in sides if not _batched(side[0])), ((), ()))
    context.layers.append(
        Layer(
            eqn.primitive.name,
            context.scope,
            kernel,
            tuple(context.ties.flat(axis, why) for axis in kernel_free if names.named(axis)),
            aval.shape,
            (*result, *contracted),
            aval.dtype.itemsize,
            result,
            eqn,
            tuple(contracted),
        )
    )
    return [result]


def _batched(x: Array) -> bool:
    return any(part.bound == names.BATCH for axis in x for part in axis)


def _convolution(context: Context, eqn: Any, lhs: Array, rhs: Array) -> list[Array]:
    params = eqn.params
    if params['batch_group_count'] != 1:
        return _unknown(context, eqn, lhs, rhs)
    ties = context.ties
    numbers = params['dimension_numbers']
    lhs_batch, lhs_in, *lhs_space = (lhs[i] for i in numbers.lhs_spec)
    rhs_out, rhs_in, *rhs_space = (rhs[i] for i in numbers.rhs_spec)
    aval = eqn.outvars[0].aval
    for axis in lhs_space:
        ties.freeze(axis, context.why(eqn, 'a convolution window runs over its channels'))
    for axis in rhs_space:
        ties.window(axis)

    groups = params['feature_group_count']
    why = context.why(eqn, 'convolved with something that has no channels to remove')
    if groups == 1:
        ties.unify(lhs_in, rhs_in, why, summed=True)
        out = rhs_out
    else:
        out = _tie_groups(context, groups, lhs_in, rhs_in, rhs_out, why)

    space = [names.bound(aval.shape[i]) for i in numbers.out_spec[2:]]
    # A transposed convolution sends each input position through the whole window, and the zeros
    # between the positions cost nothing.
    positions = [
        names.bound(names.size(before)) if dilation > 1 else after
        for before, after, dilation in zip(lhs_space, space, params['lhs_dilation'], strict=True)
    ]
    result: list[Any] = [None] * len(aval.shape)
    for i, axis in zip(numbers.out_spec, (lhs_batch, out, *space), strict=True):
        result[i] = axis
    context.layers.append(
        Layer(
            eqn.primitive.name,
            context.scope,
            rhs,
            (ties.flat(out, why),) if names.named(out) else (),
            aval.shape,
            (lhs_batch, *positions, *rhs_space, rhs_in, out),
            aval.dtype.itemsize,
            tuple(result),
            eqn,
            (rhs_in,),
        )
    )
    return [tuple(result)]


def _tie_groups(
    context: Context, groups: int, lhs: Axis, rhs_in: Axis, rhs_out: Axis, why: Frozen
) -> Axis:
    """Ties a grouped convolution's channels; the output's channels.

    Depthwise (one input channel per group): a channel goes with all of its outputs. Otherwise
    position p of every group is one unit, so that whatever is kept, the groups stay equal.
    """
    ties = context.ties
    inputs, outputs = ties.flat(lhs, why), ties.flat(rhs_out, why)
    if names.size(rhs_in) == 1:
        ties.window(rhs_in)
        multiplier = names.size(rhs_out) // groups
        if inputs is not None and outputs is not None:
            ties.tie(np.repeat(inputs, multiplier), outputs)
            return rhs_out
        if inputs is not None:  # constant filters, such as a blur, or all pixels of a window
            extra = names.free(multiplier) if multiplier > 1 else ()
            return ties.unify((*lhs, *extra), rhs_out, why)
        ties.freeze(lhs, why)
        ties.freeze(rhs_out, why)
        return rhs_out if names.named(rhs_out) else names.bound(names.size(rhs_out))
    if outputs is None:  # the groups' outputs differ, even where a constant kernel does not
        for axis in (lhs, rhs_in, rhs_out):
            ties.freeze(axis, why)
        return names.bound(names.size(rhs_out))
    for vector in (inputs, outputs):
        if vector is not None:
            rows = vector.reshape(groups, -1)
            ties.tie(np.tile(rows[0], groups), vector)
    if inputs is None:
        ties.freeze(lhs, why)
        ties.freeze(rhs_in, why)
    else:
        first = inputs.reshape(groups, -1)[0]
        ties.unify((Part(len(first), first),), rhs_in, why)
    return rhs_out


def _call(context: Context, eqn: Any, *operands: Array) -> list[Array]:
    """Enters the program that a primitive calls once."""
    return context.walk(*called(eqn), operands)


def called(eqn: Any) -> tuple[Any, Sequence[Any]] | None:
    """The program that `eqn` does nothing but call, once, and its constants; None for others."""
    if RULES.get(eqn.primitive.name) is not _call:
        return None
    key = next(k for k in ('jaxpr', 'call_jaxpr', 'fun_jaxpr') if k in eqn.params)
    inner = eqn.params[key]
    if isinstance(inner, jax.extend.core.ClosedJaxpr):
        return inner.jaxpr, inner.consts
    return inner, ()


def _loop(
    context: Context, eqn: Any, body: Any, consts: Sequence[Array], carry: list, inputs: Sequence
) -> tuple[list, list[Array], int]:
    """Enters a loop's body with one set of names for all its rounds.

    Returns:
      What is handed from round to round, the body's outputs, and the number of layers before.
    """
    why = context.why(eqn, 'changes its channels from round to round')
    layers, stored = len(context.layers), len(context.stored)
    # What is handed from round to round may get its names in a late round, in each round one more.
    for _ in range(len(carry) + 1):
        del context.layers[layers:], context.stored[stored:]
        outputs = context.walk(body.jaxpr, body.consts, [*consts, *carry, *inputs])
        carry = [
            tuple(context.ties.unify(a, b, why) for a, b in zip(before, after, strict=True))
            for before, after in zip(carry, outputs, strict=False)
        ]
    return carry, outputs, layers


def _scan(context: Context, eqn: Any, *operands: Array) -> list[Array]:
    params = eqn.params
    first, second = _scan_parts(params, len(operands))
    stacked = operands[second:]
    for x in stacked:
        context.ties.freeze(x[0], context.why(eqn, 'a loop runs over it'))
    inputs = [x[1:] for x in stacked]
    consts, carry = operands[:first], list(operands[first:second])
    carry, outputs, mark = _loop(context, eqn, params['jaxpr'], consts, carry, inputs)
    rounds = names.bound(params['length'])
    context.layers[mark:] = [
        layer._replace(
            factors=(*layer.factors, rounds),
            outputs=(*layer.outputs, rounds),
            rounds=layer.rounds * params['length'],
        )
        for layer in context.layers[mark:]
    ]
    return [*carry, *((rounds, *x) for x in outputs[len(carry) :])]


def _scan_parts(params: Mapping[str, Any], number: int) -> tuple[int, int]:
    """Where, among so many operands of a scan, its carry begins and what it runs over does."""
    if 'ft_in' in params:  # from JAX 0.11 on
        consts, carry, _ = params['ft_in'].update(range(number)).unpack()
        consts, carry = len(list(consts)), len(list(carry))
    else:
        consts, carry = params['num_consts'], params['num_carry']
    return consts, consts + carry


def _while(context: Context, eqn: Any, *operands: Array) -> list[Array]:
    """A loop of unknown length; what it computes is counted once."""
    params = eqn.params
    first = params['cond_nconsts']
    second = first + params['body_nconsts']
    context.walk(
        params['cond_jaxpr'].jaxpr,
        params['cond_jaxpr'].consts,
        [*operands[:first], *operands[second:]],
    )
    carry, _, mark = _loop(
        context, eqn, params['body_jaxpr'], operands[first:second], list(operands[second:]), ()
    )
    if len(context.layers) > mark:
        source = context.why(eqn, '').source
        note = f'runs as long as it runs; one round is in the cost, at {source}'
        context.unknown.setdefault('while', note)
    return carry


def _cond(context: Context, eqn: Any, index: Array, *operands: Array) -> list[Array]:
    """Enters all branches; the most expensive one is what it costs."""
    del index
    why = context.why(eqn, 'has no channels to remove in one of the branches')
    mark = len(context.layers)
    costs, outputs = [], []
    for branch in eqn.params['branches']:
        outputs.append(context.walk(branch.jaxpr, branch.consts, operands))
        costs.append(context.layers[mark:])
        del context.layers[mark:]
    context.layers += max(costs, key=lambda layers: sum(_multiply_adds(l) for l in layers))
    result = outputs[0]
    for other in outputs[1:]:
        result = [
            tuple(context.ties.unify(a, b, why) for a, b in zip(x, y, strict=True))
            for x, y in zip(result, other, strict=True)
        ]
    return result


def _multiply_adds(layer: Layer) -> int:
    return math.prod(map(names.size, layer.factors))


# fmt: off
_ELEMENTWISE = (
    'abs', 'acos', 'acosh', 'add', 'add_any', 'and', 'asin', 'asinh', 'atan', 'atan2', 'atanh',
    'bessel_i0e', 'bessel_i1e', 'bitcast_convert_type', 'cbrt', 'ceil', 'clamp', 'clz',
    'complex', 'conj', 'convert_element_type', 'cos', 'cosh', 'digamma', 'div', 'eq', 'erf',
    'erf_inv', 'erfc', 'exp', 'exp2', 'expm1', 'floor', 'ge', 'gt', 'igamma', 'igammac', 'imag',
    'integer_pow', 'is_finite', 'le', 'lgamma', 'log', 'log1p', 'logistic', 'lt', 'max', 'min',
    'mul', 'mulhi', 'ne', 'neg', 'nextafter', 'not', 'or', 'polygamma', 'population_count',
    'pow', 'real', 'reduce_precision', 'regularized_incomplete_beta', 'rem', 'round', 'rsqrt',
    'select_n', 'shift_left', 'shift_right_arithmetic', 'shift_right_logical', 'sign', 'sin',
    'sinh', 'sqrt', 'square', 'sub', 'tan', 'tanh', 'xor', 'zeta',
)
# fmt: on

# What is computed where it is read, and stored nowhere.
_REARRANGED = {
    **dict.fromkeys(
        [
            *('copy', 'copy_p', 'device_put', 'layout_constraint', 'name', 'optimization_barrier'),
            *('pvary', 'reshard', 'sharding_constraint', 'stop_gradient'),
        ],
        _same,
    ),
    **dict.fromkeys(
        [
            *('random_bits', 'rng_bit_generator', 'rng_uniform', 'threefry2x32', 'random_seed'),
            *('random_wrap', 'random_unwrap', 'random_split', 'random_fold_in', 'random_clone'),
            *('random_gamma', 'philox2x32', 'philox4x32'),
        ],
        _random,
    ),
    'transpose': _transpose,
    'broadcast_in_dim': _broadcast_in_dim,
    'squeeze': _squeeze,
    'reshape': _reshape,
    'rev': _rev,
    'slice': _slice,
    'split': _split,
    'unstack': _unstack,
    'tile': _tile,
    'pad': _pad,
    'iota': _iota,
}
_ON_THE_FLY = {*_ELEMENTWISE, *_REARRANGED}

# What goes on where one of the things that it is made of has become constant.
_SUMS = {'add', 'add_any', 'sub', 'concatenate'}

# They run a program never, or more than once.
_CHOOSING = (_scan, _while, _cond)

RULES: dict[str, Callable[..., list[Array]]] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **_REARRANGED,
    **dict.fromkeys(
        [
            *('jit', 'pjit', 'closed_call', 'core_call', 'remat', 'remat2', 'checkpoint'),
            *('custom_jvp_call', 'custom_vjp_call', 'custom_vjp_call_jaxpr'),
        ],
        _call,
    ),
    **dict.fromkeys(
        [
            *('reduce_sum', 'reduce_max', 'reduce_min', 'reduce_prod', 'reduce_and', 'reduce_or'),
            *('reduce_xor', 'reduce'),
        ],
        _reduce,
    ),
    **dict.fromkeys(['argmax', 'argmin'], _argmax),
    **dict.fromkeys(
        ['reduce_window_sum', 'reduce_window_max', 'reduce_window_min', 'reduce_window'],
        _reduce_window,
    ),
    **dict.fromkeys(
        ['cumsum', 'cumprod', 'cummax', 'cummin', 'cumlogsumexp', 'sort'],
        _along,
    ),
    **dict.fromkeys(
        ['scatter', 'scatter-add', 'scatter-sub', 'scatter-mul', 'scatter-min', 'scatter-max'],
        _scatter,
    ),
    'top_k': _top_k,
    'gather': _gather,
    'dynamic_slice': _dynamic_slice,
    'dynamic_update_slice': _dynamic_update_slice,
    'concatenate': _concatenate,
    'stack': _stack,
    'scan': _scan,
    'while': _while,
    'cond': _cond,
    'dot_general': _dot_general,
    'conv_general_dilated': _convolution,
}
