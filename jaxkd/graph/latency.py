"""How long a network takes on the present device, as a polynomial of what it keeps.

Each distinct convolution and dot of the network is timed by itself on a grid of widths. The table
is interpolated by a + b·in + c·out + d·in·out with coefficients ≥ 0, where `in` and `out` are the
channels that are read and made (a depthwise convolution has one number of channels: a + c·out). So
latency becomes one more resource of the graph's polynomial: it has prices, budgets and blocks like
the others. Whole networks are timed too, the full one and narrower ones: two factors, for what
changes with widths and for what does not, bring the layers' sums to what these take. So what stands
between the layers (norms, activations, sums) is in it as well.

That layers' times add up is an approximation: a compiler fuses, a cache stays warm. So a result is
to be compared with the measured latency of the compact network, as the report of a run does. For
MobileNetV2, one image at a time on two busy cores, networks that were to take 0.75, 0.5 and 0.35
of the full one's time took 0.81, 0.51 and 0.34 of it on 32×32 images, and on 8×8 images, where a
network takes a millisecond, 0.80, 0.41 and 0.28. Convolutions with few channels are the hardest.
Latency tables for choosing a structure: NetAdapt (Yang et al. 2018, arXiv 1804.03230).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
import statistics
import time
from typing import Any, NamedTuple
import warnings

from flax import linen as nn
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from scipy import optimize

from jaxkd import cpu, device, errors, workdir
from jaxkd.graph import cost as costs
from jaxkd.graph import cut as cutting
from jaxkd.graph import resize, structure
from jaxkd.graph.trace import Graph, trace

# The widths at which layers are measured, and whole networks, as shares of the full width.
GRID = (1.0, 0.6, 0.3)
WHOLE = (1.0, 0.5, 0.25)
# How often each probe runs at most; the median counts.
ROUNDS = 30
# The names of probes that are no layer: a whole network, and a program that is only started.
NETWORK, NOTHING = '(network)', '(nothing)'
# What is left of a probe's time, at least, when the time to start a program is taken off.
LEAST = 0.1


class Probe(NamedTuple):
    """Something to be timed.

    Attributes:
      name: the layer, or `NETWORK` or `NOTHING`.
      key: what it is remembered by: operation, shapes and parameters.
      function: of the operands.
      operands: their shapes and dtypes.
    """

    name: str
    key: str
    function: Callable[..., Any]
    operands: tuple[jax.ShapeDtypeStruct, ...]


Measure = Callable[[Sequence[Probe]], Sequence[float]]


class Side(NamedTuple):
    """The channels that a layer reads, or those that it makes.

    Attributes:
      axis: which of the contracted axes, or of the result's, is made narrower; None where all
        stay as they are.
      sizes: of that axis, the full one first.
      forms: whose product counts the channels.
    """

    axis: int | None
    sizes: tuple[int, ...]
    forms: tuple[int, ...]


def with_latency(
    graph: Graph,
    *,
    batch_size: int = 1,
    cache: str | os.PathLike | None = None,
    seconds: float = 60.0,
    measure: Measure | None = None,
) -> Graph:
    """The graph with `latency` among its resources, measured on JAX's present default device.

    Convolutions are timed in the form that jaxkd runs them in: on a CPU that of `jaxkd.cpu`.

        graph = jaxkd.with_latency(jaxkd.trace(model, variables, images))
        keep = jaxkd.select(graph, scores, latency=0.5)

    Args:
      graph: the traced network.
      batch_size: how many examples are computed at a time.
      cache: folder for what has been measured, one file by device, versions of JAX and batch size;
        by default `$JAXKD_CACHE`, or else `~/.cache/jaxkd`. Layers that are found there are not
        measured again.
      seconds: about how long measuring may take, besides compiling. Everything is measured at
        least once.
      measure: gives the seconds of each probe, where it is not to be done by a clock.

    Returns:
      A graph whose `cost(keep).latency` is the seconds of one batch, and `price(keep, 'latency')`
      their derivative.

    Raises:
      ConfigError: for a batch size that cannot be.
      GraphError: where the model has other channel groups, or cannot be run, at this batch size.
    """
    if not errors.is_whole(batch_size) or batch_size < 1:
        raise errors.ConfigError('batch_size', batch_size, why='it must be an int ≥ 1')
    source = _at_batch_size(graph, batch_size)
    table = Table(_cache_file(cache, batch_size))
    if measure is None:
        share = seconds / (len(source.operations) + 1)
        measure = functools.partial(time_probes, seconds=share)

    keeps = [_narrow(source, share) for share in WHOLE]
    try:
        totals = table.look_up([_network(source, keep) for keep in keeps], measure)
        terms = [
            term
            for operation in source.operations
            for term in _terms(source, operation, table, measure)
        ]
    finally:
        table.write()
    if not terms:
        raise errors.GraphError(
            f'{type(graph.model).__name__} has no convolution and no dot to measure'
        )
    factors = _factors(source, terms, keeps, totals)

    known = {_content(form): i for i, form in enumerate(graph.polynomial.forms)}
    forms = list(graph.polynomial.forms)

    def place(form: costs.Form) -> int:
        """The index of a form of `source` in the polynomial of `graph`."""
        if _content(form) not in known:
            known[_content(form)] = len(forms)
            forms.append(form)
        return known[_content(form)]

    measured = tuple(
        term._replace(
            coefficient=term.coefficient * factors[bool(term.forms)],
            forms=tuple(place(source.polynomial.forms[i]) for i in term.forms),
        )
        for term in terms
    )
    counted = tuple(term for term in graph.polynomial.terms if term.resource != 'latency')
    polynomial = graph.polynomial._replace(forms=tuple(forms), terms=(*counted, *measured))
    return dataclasses.replace(graph, polynomial=polynomial)


def time_probes(probes: Sequence[Probe], seconds: float = 1.0) -> list[float]:
    """The median seconds of each probe; they take turns, so that a busy machine hurts all alike.

    Args:
      probes: what to time; each is compiled by itself, and runs on random operands.
      seconds: after so many, no further round is begun.
    """
    random = np.random.default_rng(0)
    calls = []
    for probe in probes:
        operands = [jnp.asarray(cutting.random_leaf(random, operand)) for operand in probe.operands]
        call = functools.partial(jax.jit(probe.function, keep_unused=True), *operands)
        calls.append(lambda call=call: jax.block_until_ready(call()))
    return [statistics.median(times) for times in take_turns(calls, ROUNDS, seconds)]


def take_turns(
    calls: Sequence[Callable[[], Any]], rounds: int, seconds: float = math.inf
) -> list[list[float]]:
    """The seconds of each call, once a round; each is called before, to compile.

    Args:
      calls: each returns when it is done.
      rounds: how many there are at most, and one at least.
      seconds: after so many, no further round is begun.
    """
    for call in calls:
        call()
    taken: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    for done in range(rounds):
        if done and time.perf_counter() > end:
            break
        for call, times in zip(calls, taken, strict=True):
            call()  # fills the caches with its own, not its predecessor's
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return taken


def network(
    model: nn.Module, variables: Any, inputs: Sequence[Any], apply_kwargs: Mapping[str, Any]
) -> Probe:
    """A whole network, as `time_probes` takes it; arrays serve as their shapes."""
    leaves, tree = jax.tree.flatten((variables, tuple(inputs)))

    def run(*leaves):
        variables, inputs = jax.tree.unflatten(tree, leaves)
        with cpu.fast_layers():
            return resize.apply(model, variables, *inputs, **apply_kwargs)

    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    return Probe(NETWORK, '', run, shapes)


class Table:
    """Seconds by the key of a probe, kept in a file. A file that cannot be read counts as empty."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.seconds = self._read()
        self.new: dict[str, float] = {}

    def look_up(self, probes: Sequence[Probe], measure: Measure) -> list[float]:
        """The seconds of each probe; those that are not known yet are measured together."""
        missing = [probe for probe in probes if probe.key not in self.seconds]
        if missing:
            layers = [probe for probe in missing if probe.name != NETWORK]
            nothing = [
                Probe(NOTHING, '', lambda *operands: jnp.zeros(()), probe.operands)
                for probe in layers[:1]
            ]
            taken = list(measure([*missing, *nothing]))
            start = taken.pop() if nothing else 0.0
            for probe, seconds in zip(missing, taken, strict=True):
                self.new[probe.key] = max(seconds - start, LEAST * seconds)
            self.seconds |= self.new
        return [self.seconds[probe.key] for probe in probes]

    def write(self) -> None:
        """Adds what is new to the file, which others may have written to in the meantime."""
        if not self.new:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with workdir.written_aside(self.path) as aside:
                aside.write_text(json.dumps(self._read(quiet=True) | self.new, indent=1) + '\n')
        except OSError as error:
            warnings.warn(f'{self.path} cannot be written: {error}', stacklevel=3)

    def _read(self, quiet: bool = False) -> dict[str, float]:
        try:
            found = json.loads(self.path.read_text())
            if not all(isinstance(s, float) and 0 < s < math.inf for s in found.values()):
                raise ValueError('not a table of seconds')
            return found
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, AttributeError) as error:
            if not quiet:
                warnings.warn(
                    f'{self.path} is damaged, so all is measured anew: {error}', stacklevel=4
                )
            return {}


def _cache_file(folder: str | os.PathLike | None, batch_size: int) -> pathlib.Path:
    """One file for a device, the versions of JAX, and a batch size."""
    used = jax.config.jax_default_device or jax.devices()[0]
    if isinstance(used, str):
        used = jax.devices(used)[0]
    kind = used.device_kind
    if used.platform == 'cpu':  # they are all of the kind 'cpu'
        kind = f'{kind} {device.processor()} {os.cpu_count()} cores'
    words = f'latency {kind} jax {jax.__version__} jaxlib {jaxlib.__version__} batch {batch_size}'
    folder = pathlib.Path(folder or device.cache_folder())
    return folder / (re.sub(r'[^\w.]+', '-', words) + '.json')


def _at_batch_size(graph: Graph, batch_size: int) -> Graph:
    """The graph, traced again if it was traced with another number of examples."""
    inputs = jax.tree.map(
        lambda leaf: (
            jax.ShapeDtypeStruct((batch_size, *leaf.shape[1:]), leaf.dtype) if leaf.shape else leaf
        ),
        graph.inputs,
    )
    if inputs == graph.inputs:
        return graph
    with warnings.catch_warnings(action='ignore'):  # of frozen layers: it was said before
        again = trace(
            graph.model, graph.variables, *inputs, inexact=graph.inexact, **graph.apply_kwargs
        )
    if again.sizes != graph.sizes:
        raise errors.GraphError(
            f'{type(graph.model).__name__} has other channel groups with {batch_size} examples at '
            'a time than with as many as it was traced with; trace it with that batch size'
        )
    return again


def _content(form: costs.Form) -> tuple[Any, ...]:
    return form.constant, *((group, w.tobytes()) for group, w in form.weights.items())


def _narrow(graph: Graph, share: float) -> dict[str, np.ndarray]:
    """The keep of a share of every group."""
    return {
        group.name: np.arange(group.size) < _odd(group.size, 1.0 if group.frozen else share)
        for group in graph.groups
    }


def _odd(size: int, share: float) -> int:
    """The full size, or an odd number of about a share of it.

    What a selection leaves is as a rule no multiple of a vector's length, and up to a fifth slower
    than the multiples around it. Measured at halves and quarters, every network would look faster
    than it comes out.
    """
    number = math.ceil(size * share)
    return number if share == 1 else max(number - (number + 1) % 2, 1)


def _network(graph: Graph, keep: costs.Keep) -> Probe:
    """The whole network, or the compact one that `keep` makes of it."""
    model, variables = graph.model, graph.variables
    # Addresses of functions differ from process to process.
    program = re.sub(r'0x[0-9a-f]+', '', str(graph.program))
    key = f'{type(model).__name__} {hashlib.sha256(program.encode()).hexdigest()}'
    if not all(alive.all() for alive in keep.values()):
        variables = cutting.cut(graph, variables, keep)
        model = structure.module(model, structure.record(graph, keep, variables))
        kept = repr([np.flatnonzero(alive).tolist() for alive in keep.values()])
        key += f' cut to {hashlib.sha256(kept.encode()).hexdigest()}'
    return network(model, variables, graph.inputs, graph.apply_kwargs)._replace(key=key)


def _factors(
    graph: Graph,
    terms: Sequence[costs.Term],
    keeps: Sequence[costs.Keep],
    totals: Sequence[float],
) -> tuple[float, float]:
    """What turns the layers' sums into the seconds of whole networks, the first one's exactly.

    Returns:
      A factor for what does not change with widths, and one for what does: a layer in a network
      has less to start, and elementwise work comes with it.
    """

    def sums(keep: costs.Keep) -> tuple[float, float]:
        """The terms without and with forms."""
        alive = [form(keep) for form in graph.polynomial.forms]
        constant = sum(term.coefficient for term in terms if not term.forms)
        whole = sum(term.coefficient * math.prod(alive[i] for i in term.forms) for term in terms)
        return constant, whole - constant

    parts = np.array([sums(keep) for keep in keeps])
    scale = parts[0].sum()
    matrix = parts / scale / np.array(totals)[:, None]
    factors, _ = optimize.nnls(matrix, np.ones(len(totals)))
    first = parts[0] @ factors
    if first <= 0:  # only by noise
        return (totals[0] / scale,) * 2
    return tuple(map(float, factors * totals[0] / first))


def _terms(
    graph: Graph, operation: costs.Operation, table: Table, measure: Measure
) -> list[costs.Term]:
    """Seconds of a layer over the number of channels that it reads and makes."""
    inner, outer = _sides(graph, operation)
    grid = list(itertools.product(inner.sizes, outer.sizes))
    seconds = table.look_up([_probe(operation, inner, outer, *point) for point in grid], measure)
    whole = graph.keep_all()
    shares = np.array(grid) / grid[0]
    columns = [((), np.ones(len(grid)))]
    columns += [(side.forms, shares[:, i]) for i, side in enumerate((inner, outer)) if side.forms]
    if inner.forms and outer.forms:
        columns.append(((*inner.forms, *outer.forms), shares.prod(axis=1)))
    # Relative errors: a narrow layer is to be as right as a wide one.
    matrix = np.stack([column for _, column in columns], axis=1) / np.array(seconds)[:, None]
    fitted, _ = optimize.nnls(matrix, np.ones(len(grid)))
    return [
        costs.Term(
            operation.layer,
            'latency',
            operation.rounds
            * float(value)
            / math.prod(graph.polynomial.forms[i](whole) for i in forms),
            forms,
        )
        for (forms, _), value in zip(columns, fitted, strict=True)
        if value
    ]


def _sides(graph: Graph, operation: costs.Operation) -> tuple[Side, Side]:
    """What the layer reads and what it makes, as far as channels can be removed there."""
    moving = {
        i
        for i, form in enumerate(graph.polynomial.forms)
        if any(not graph.by_name[group].frozen for group in form.weights)
    }
    multiple = 1
    if operation.eqn.primitive.name == 'conv_general_dilated':
        groups = operation.eqn.params['feature_group_count']
        _, kernel = operation.eqn.invars
        numbers = operation.eqn.params['dimension_numbers']
        features, inputs = (kernel.aval.shape[i] for i in numbers.rhs_spec[:2])
        # A depthwise convolution loses channels with all of their outputs; the others keep their
        # groups, which become narrower.
        multiple = features // groups if inputs == 1 else groups
    return (
        _side(operation.contracted, moving, 1),
        _side(operation.result, moving, multiple),
    )


def _side(axes: Sequence[Sequence[costs.Width]], moving: set[int], multiple: int) -> Side:
    widths = [(width, i) for i, axis in enumerate(axes) for width in axis if width.form in moving]
    if not widths:
        return Side(None, (1,), ())
    width, axis = max(widths, key=lambda pair: pair[0].size)
    full = math.prod(width.size for width in axes[axis])
    step = math.lcm(full // width.size, multiple)
    sizes = {step * _odd(full // step, share) for share in GRID}
    forms = tuple(width.form for width, _ in widths)
    return Side(axis, tuple(sorted(sizes, reverse=True)), forms)


def _probe(
    operation: costs.Operation, inner: Side, outer: Side, inputs: int, outputs: int
) -> Probe:
    """The layer with so many positions on the axes that can be made narrower."""
    eqn = operation.eqn
    shapes = [list(var.aval.shape) for var in eqn.invars]
    params = dict(eqn.params)
    resize = _resize_convolution if 'window_strides' in params else _resize_dot
    # The result first: once it has one input channel a group, any convolution looks depthwise.
    if outer.axis is not None:
        resize(shapes, params, None, outer.axis, outputs)
    if inner.axis is not None:
        resize(shapes, params, inner.axis, None, inputs)
    operands = tuple(
        jax.ShapeDtypeStruct(shape, var.aval.dtype)
        for shape, var in zip(shapes, eqn.invars, strict=True)
    )
    words = ', '.join(f'{key}={value}' for key, value in sorted(params.items()))
    inside = ' '.join(f'{operand.dtype}{list(operand.shape)}' for operand in operands)
    key = f'{eqn.primitive.name} {inside} {words}'
    if resize is _resize_dot:
        return Probe(
            operation.layer, key, functools.partial(eqn.primitive.bind, **params), operands
        )
    params.pop('out_sharding', None)
    strides, padding = params.pop('window_strides'), params.pop('padding')

    def run(lhs, rhs):
        return cpu.conv_general_dilated(lhs, rhs, strides, padding, **params)

    return Probe(operation.layer, key, run, operands)


def _resize_convolution(
    shapes: list[list[int]],
    params: dict[str, Any],
    contracted: int | None,
    result: int | None,
    size: int,
) -> None:
    """Gives the kernel's input channels, or an axis of the result, another size."""
    numbers, groups = params['dimension_numbers'], params['feature_group_count']
    lhs, rhs = shapes
    features, inputs = numbers.rhs_spec[:2]
    if contracted is not None:
        rhs[inputs] = size
        lhs[numbers.lhs_spec[1]] = groups * size
    elif result == numbers.out_spec[1]:
        if rhs[inputs] == 1 < groups:  # depthwise
            params['feature_group_count'] = groups * size // rhs[features]
            lhs[numbers.lhs_spec[1]] = params['feature_group_count']
        rhs[features] = size
    else:
        lhs[numbers.lhs_spec[numbers.out_spec.index(result)]] = size


def _resize_dot(
    shapes: list[list[int]],
    params: dict[str, Any],
    contracted: int | None,
    result: int | None,
    size: int,
) -> None:
    """Gives a contracted axis, or one of the result's, another size."""
    contracting, batch = params['dimension_numbers']
    if contracted is not None:
        places = [(operand, axes[contracted]) for operand, axes in enumerate(contracting)]
    elif result < len(batch[0]):
        places = [(operand, axes[result]) for operand, axes in enumerate(batch)]
    else:
        free = [
            (operand, i)
            for operand, shape in enumerate(shapes)
            for i in range(len(shape))
            if i not in (*contracting[operand], *batch[operand])
        ]
        places = [free[result - len(batch[0])]]
    for operand, i in places:
        shapes[operand][i] = size
