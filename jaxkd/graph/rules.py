"""What each primitive does to the names: one small rule per primitive, in one table.

A rule is called as `rule(context, eqn, *operands)`, with one tuple of axes per operand, and returns
one tuple of axes per result. A primitive that is not in the table freezes whatever it touches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import math
import os
from typing import Any, NamedTuple

import flax
import jax
import numpy as np

from jaxkd.graph import names
from jaxkd.graph.names import Axis, Frozen, Part

Array = tuple[Axis, ...]


class Layer(NamedTuple):
    """A convolution or dot that the network was seen to do, and what it costs.

    Attributes:
      scope: the module's name stack, as JAX records it.
      kernel: the axes of the right operand, for finding the parameter that it came from.
      out: the names of the output's channels, if any.
      shape: shape of the output, with the batch.
      factors: axes whose sizes' product is the multiply-adds for one example.
      itemsize: bytes of one element of the output.
      outputs: axes whose sizes' product is the output's elements for one example.
    """

    scope: str
    kernel: Array
    out: np.ndarray | None
    shape: tuple[int, ...]
    factors: tuple[Axis, ...]
    itemsize: int
    outputs: tuple[Axis, ...]


class Context:
    """The state of one walk through a program: ties so far, layers so far."""

    def __init__(self):
        self.ties = names.Ties()
        self.layers: list[Layer] = []
        self.unknown: dict[str, str] = {}  # primitives without a rule, and where the first stands
        self._calls: list[Any] = []  # the equations that are being entered, outermost first

    def walk(self, jaxpr: Any, consts: Sequence[Any], operands: Sequence[Array]) -> list[Array]:
        """Evaluates `jaxpr` on names. `consts` are the values of its constants."""
        environment: dict[Any, Array] = {}

        def read(atom) -> Array:
            if isinstance(atom, jax.extend.core.Literal):
                return constant(atom.val)
            return environment[atom]

        environment.update(zip(jaxpr.constvars, map(constant, consts), strict=True))
        environment.update(zip(jaxpr.invars, operands, strict=True))
        for eqn in jaxpr.eqns:
            rule = RULES.get(eqn.primitive.name, _unknown)
            self._calls.append(eqn)
            results = rule(self, eqn, *map(read, eqn.invars))
            self._calls.pop()
            environment.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def why(self, eqn: Any, reason: str) -> Frozen:
        # What stands inside a jitted function of JAX has no line of the model; its caller has.
        sources = map(_source, (eqn, *reversed(self._calls)))
        return Frozen(reason, eqn.primitive.name, next(filter(None, sources), 'unknown line'))

    @property
    def scope(self) -> str:
        scopes = (str(eqn.source_info.name_stack) for eqn in self._calls)
        return '/'.join(scope for scope in scopes if scope)


def constant(value: Any) -> Array:
    """The axes of a value that the network's code fixes."""
    shape = np.shape(value)
    # Empty, or too large to look at: bound is always right.
    if not 0 < math.prod(shape) <= 1_000_000 or not shape:
        return tuple(names.bound(n) for n in shape)
    value = np.asarray(value)
    uniform = [bool(np.all(value == value.take([0], axis))) for axis in range(value.ndim)]
    return tuple(
        names.free(n) if same else names.bound(n) for n, same in zip(shape, uniform, strict=True)
    )


# Code that is not the model's.
_LIBRARIES = tuple(
    os.path.dirname(os.path.abspath(file)) + os.sep
    for file in (jax.__file__, flax.__file__, __file__)
)


def _source(eqn: Any) -> str | None:
    """The line of the model's code that `eqn` comes from: "file:line (function)"."""
    traceback = eqn.source_info.traceback
    for frame in traceback.frames if traceback else ():
        if not frame.file_name.startswith(_LIBRARIES):
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
    source = why.source
    if _computes(eqn):  # nothing that costs may go by unsaid
        touched = True
        source += '; the convolutions and dots inside are not in the cost'
    if touched:
        context.unknown.setdefault(name, source)
    batch = any(part.bound == names.BATCH for o in operands for axis in o for part in axis)
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
    if math.prod(shape) in (0, 1):
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
            inner = math.gcd(part.size, missing)
            if part.size % missing:  # the boundary falls inside of both: nothing to hold on to
                inner = 1
            if inner == 1:
                rest = math.prod(p.size for p in parts) * part.size
                for p in (part, *axis, *parts):
                    context.ties.freeze((p,), why)
                parts = [Part(rest // missing, None, names.POSITION)]
                axis.append(Part(missing, None, names.POSITION))
            else:
                context.ties.freeze((part,), why)
                known = part.bound if part.names is None else names.POSITION
                axis.append(Part(missing, None, known))
                parts.insert(0, Part(part.size // missing, None, known))
            missing = 1
        result.append(tuple(axis) if axis else names.free(1))
    return [tuple(result)]


def _reduce(context: Context, eqn: Any, *operands: Array) -> list[Array]:
    axes = eqn.params['axes']
    why = context.why(eqn, 'its channels are reduced to one value')
    for operand in operands:
        for i in axes:
            context.ties.freeze(operand[i], why)
    kept = tuple(axis for i, axis in enumerate(operands[0]) if i not in axes)
    return [kept] * len(eqn.outvars)


def _partly(context: Context, eqn: Any, x: Array, same: Sequence[bool], reason: str) -> list[Array]:
    """Hands on the axes that stay the `same`, and freezes the others."""
    why = context.why(eqn, reason)
    result = []
    for axis, n, unchanged in zip(x, eqn.outvars[0].aval.shape, same, strict=True):
        if unchanged:
            result.append(axis)
        else:
            context.ties.freeze(axis, why)
            known = next((part.bound for part in axis if part.bound), names.POSITION)
            result.append(names.bound(n, known))
    return [tuple(result)]


def _reduce_window(context: Context, eqn: Any, x: Array, *initial: Array) -> list[Array]:
    del initial
    params = eqn.params
    same = [
        (window, stride, *padding) == (1, 1, 0, 0)
        for window, stride, padding in zip(
            params['window_dimensions'], params['window_strides'], params['padding'], strict=True
        )
    ]
    return _partly(context, eqn, x, same, 'a pooling window runs over its channels')


def _concatenate(context: Context, eqn: Any, *operands: Array) -> list[Array]:
    dimension = eqn.params['dimension']
    why = context.why(eqn, 'combined with something that has no channels to remove')
    result = list(operands[0])
    for operand in operands[1:]:
        for i, axis in enumerate(operand):
            if i != dimension:
                result[i] = context.ties.unify(result[i], axis, why)
    joined = [operand[dimension] for operand in operands]
    vectors = [names.flat(axis) for axis in joined]
    if all(vector is not None for vector in vectors):
        vector = np.concatenate(vectors)
        result[dimension] = (Part(len(vector), vector),)
    else:
        why = context.why(eqn, 'concatenated with something that has no channels')
        for axis in joined:
            context.ties.freeze(axis, why)
        bounds = {part.bound for axis in joined for part in axis}
        known = names.BATCH if names.BATCH in bounds else names.POSITION
        result[dimension] = names.bound(sum(map(names.size, joined)), known)
    return [tuple(result)]


def _rev(context: Context, eqn: Any, x: Array) -> list[Array]:
    same = [i not in eqn.params['dimensions'] for i in range(len(x))]
    return _partly(context, eqn, x, same, 'its channels are reversed')


def _slice(context: Context, eqn: Any, x: Array) -> list[Array]:
    sizes = zip(x, eqn.outvars[0].aval.shape, strict=True)
    same = [names.size(axis) == n for axis, n in sizes]
    return _partly(context, eqn, x, same, 'a slice of its channels is taken')


def _pad(context: Context, eqn: Any, x: Array, value: Array) -> list[Array]:
    del value
    same = [tuple(padding) == (0, 0, 0) for padding in eqn.params['padding_config']]
    return _partly(context, eqn, x, same, 'its channels are padded')


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
        [context.ties.unify(lhs[i], rhs[j], why) for i, j in zip(left, right, strict=True)]
        for left, right in ((lhs_contract, rhs_contract), (lhs_batch, rhs_batch))
    )
    lhs_free = [a for i, a in enumerate(lhs) if i not in (*lhs_contract, *lhs_batch)]
    rhs_free = [a for i, a in enumerate(rhs) if i not in (*rhs_contract, *rhs_batch)]
    result = (*batch, *lhs_free, *rhs_free)
    aval = eqn.outvars[0].aval
    context.layers.append(
        Layer(
            context.scope,
            rhs,
            next((names.flat(axis) for axis in rhs_free if names.named(axis)), None),
            aval.shape,
            (*result, *contracted),
            aval.dtype.itemsize,
            result,
        )
    )
    return [result]


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
        ties.unify(lhs_in, rhs_in, why)
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
            context.scope,
            rhs,
            names.flat(out),
            aval.shape,
            (lhs_batch, *positions, *rhs_space, rhs_in, out),
            aval.dtype.itemsize,
            tuple(result),
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
    inputs, outputs = names.flat(lhs), names.flat(rhs_out)
    if names.size(rhs_in) == 1:
        ties.window(rhs_in)
        multiplier = names.size(rhs_out) // groups
        if inputs is not None and outputs is not None:
            ties.tie(np.repeat(inputs, multiplier), outputs)
            return rhs_out
        if inputs is not None and multiplier == 1:  # a constant filter, such as a blur
            return ties.unify(lhs, rhs_out, why)
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
    key = next(k for k in ('jaxpr', 'call_jaxpr', 'fun_jaxpr') if k in eqn.params)
    inner = eqn.params[key]
    if isinstance(inner, jax.extend.core.ClosedJaxpr):
        return context.walk(inner.jaxpr, inner.consts, operands)
    return context.walk(inner, (), operands)


def _scan(context: Context, eqn: Any, *operands: Array) -> list[Array]:
    """Enters a loop's body with one set of names for all its rounds."""
    params = eqn.params
    count, body = params['num_consts'], params['jaxpr']
    consts, carry = operands[:count], list(operands[count : count + params['num_carry']])
    stacked = operands[count + len(carry) :]
    for x in stacked:
        context.ties.freeze(x[0], context.why(eqn, 'a loop runs over it'))
    why = context.why(eqn, 'changes its channels from round to round')
    inputs = [x[1:] for x in stacked]
    mark = len(context.layers)
    # What is handed from round to round may get its names in a late round, in each round one more.
    for _ in range(len(carry) + 1):
        del context.layers[mark:]
        outputs = context.walk(body.jaxpr, body.consts, [*consts, *carry, *inputs])
        carry = [
            tuple(context.ties.unify(a, b, why) for a, b in zip(before, after, strict=True))
            for before, after in zip(carry, outputs, strict=False)
        ]
    rounds = names.bound(params['length'])
    context.layers[mark:] = [
        layer._replace(factors=(*layer.factors, rounds), outputs=(*layer.outputs, rounds))
        for layer in context.layers[mark:]
    ]
    return [*carry, *((rounds, *x) for x in outputs[len(carry) :])]


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
    'abs', 'acos', 'acosh', 'add', 'and', 'asin', 'asinh', 'atan', 'atan2', 'atanh', 'bessel_i0e',
    'bessel_i1e', 'bitcast_convert_type', 'cbrt', 'ceil', 'clamp', 'convert_element_type', 'cos',
    'cosh', 'digamma', 'div', 'eq', 'erf', 'erf_inv', 'erfc', 'exp', 'exp2', 'expm1', 'floor', 'ge',
    'gt', 'integer_pow', 'is_finite', 'le', 'lgamma', 'log', 'log1p', 'logistic', 'lt', 'max',
    'min', 'mul', 'ne', 'neg', 'nextafter', 'not', 'or', 'population_count', 'pow', 'real',
    'reduce_precision', 'rem', 'round', 'rsqrt', 'select_n', 'shift_left', 'shift_right_arithmetic',
    'shift_right_logical', 'sign', 'sin', 'sinh', 'sqrt', 'square', 'sub', 'tan', 'tanh', 'xor',
)
# fmt: on

RULES: dict[str, Callable[..., list[Array]]] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(
        ['copy', 'copy_p', 'optimization_barrier', 'sharding_constraint', 'stop_gradient'], _same
    ),
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
            *('argmax', 'argmin'),
        ],
        _reduce,
    ),
    **dict.fromkeys(
        ['reduce_window_sum', 'reduce_window_max', 'reduce_window_min'], _reduce_window
    ),
    **dict.fromkeys(['random_bits', 'rng_bit_generator', 'rng_uniform'], _random),
    'transpose': _transpose,
    'broadcast_in_dim': _broadcast_in_dim,
    'squeeze': _squeeze,
    'reshape': _reshape,
    'concatenate': _concatenate,
    'rev': _rev,
    'slice': _slice,
    'pad': _pad,
    'iota': _iota,
    'scan': _scan,
    'cond': _cond,
    'dot_general': _dot_general,
    'conv_general_dilated': _convolution,
}
