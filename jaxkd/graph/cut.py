"""Masking, cutting, and the proof that they agree."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent import futures
import functools
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxkd import errors
from jaxkd.graph import constants, rules, structure
from jaxkd.graph import precise as precision
from jaxkd.graph.trace import Graph, Keep, key_string, outputs_of, path_string, plain

# Largest difference of masked and compact outputs, as a share of the largest masked output, that
# float32 rounding explains: sums of some thousand terms in another order, over a hundred layers.
TOLERANCE = 1e-4

# For programs that run once: a third of the time to compile, at half the speed.
QUICK = {
    'xla_backend_optimization_level': 0,
    'xla_cpu_use_fusion_emitters': False,
    'xla_cpu_parallel_codegen_split_count': 1,
}


def mask(graph: Graph, variables: Any, keep: Keep) -> Any:
    """The variables with every axis of a removed unit at zero: the same shapes.

    Producers (kernel outputs, biases, BatchNorm vectors) and consumers (the next kernels' inputs)
    alike, so that the masked network computes what the compact one does, whatever its activations
    make of a zero. `variables` may be any tree shaped like the variables; see `cut`.
    """

    def zero(leaf, axis_masks):
        number = jnp if isinstance(leaf, jax.core.Tracer) else np
        for axis, alive in axis_masks.items():
            shape = [-1 if i == axis else 1 for i in range(leaf.ndim)]
            leaf = number.where(alive.reshape(shape), leaf, number.zeros((), leaf.dtype))
        return leaf

    return _change(graph, variables, keep, zero)


def cut(graph: Graph, tree: Any, keep: Keep, among: Keep | None = None) -> Any:
    """Slices the removed units away from a tree shaped like the variables.

    Args:
      graph: the traced network.
      tree: its variables, or any tree that holds arrays under the same paths: gradients, EMA, the
        state of an optax optimizer that keeps arrays of the variables' shapes (not
        `optax.adafactor`, which keeps sums over their axes: begin it anew). Leaves may be arrays or
        `jax.ShapeDtypeStruct`s. Leaves under other paths (step counters, keys) stay as they are.
      keep: what to keep.
      among: what is still there in `tree`, if it has been cut before.

    Returns:
      The tree with smaller arrays. Nothing is compiled.

    Raises:
      GraphError: where a leaf stands at a variable's path but is neither a scalar nor of its shape.
    """

    return _change(graph, tree, keep, take, among=among)


def restore(graph: Graph, tree: Any, keep: Keep, into: Any) -> Any:
    """`into`, with the values of a tree that was cut to `keep` where they came from.

    The inverse of `cut`, for numpy arrays: what was cut away is as it is in `into`.

    Raises:
      GraphError: where a leaf of `tree` does not have the shape that `keep` gives it.
    """

    def put(leaf, axis_masks, part):
        places = [axis_masks.get(axis, np.ones(n, bool)) for axis, n in enumerate(leaf.shape)]
        leaf = np.array(leaf)
        leaf[np.ix_(*places)] = np.asarray(part)
        return leaf

    return _change(graph, into, keep, put, tree)


def take(leaf: Any, alive: Mapping[int, np.ndarray]) -> Any:
    """An array or `jax.ShapeDtypeStruct` without what is not alive: bool [axis size] by axis."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        shape = list(leaf.shape)
        for axis, keep in alive.items():
            shape[axis] = int(keep.sum())
        return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)
    array = np.asarray(leaf)  # numpy: jnp.take would compile once for every shape
    for axis, keep in alive.items():
        array = np.compress(keep, array, axis=axis)
    if not isinstance(leaf, jax.Array):
        return array
    # An axis that is cut need not split evenly over devices any more.
    whole = leaf.sharding.is_fully_replicated
    return jax.device_put(array, leaf.sharding if whole else None)


def compact(graph: Graph, variables: Any, keep: Keep) -> structure.CompactModel:
    """`settle.compact` of a graph as it is."""
    module, found = narrowed(graph, keep)
    verify(graph, keep)
    small = cut(graph, plain(variables), keep)
    if not all(alive.any() for alive in graph.complete(keep).values()):
        small = constants.fold(module, small, graph)
    return structure.CompactModel(module, small, found)


def narrowed(graph: Graph, keep: Keep) -> tuple[nn.Module, structure.Structure]:
    """The module that runs at the widths that `keep` leaves, not verified; and the record of it."""
    found = structure.record(graph, keep, cut(graph, graph.variables, keep))
    return structure.module(graph.model, found), found


def verify(graph: Graph, keep: Keep, *, seed: int = 0) -> float:
    """Compares the masked and the compact network on random variables and inputs.

    In float32, and in float64 where rounding may be what makes the two differ.

    Returns:
      The largest difference of their outputs, as a share of the largest value of that output.

    Raises:
      GraphError: if that is more than rounding explains, naming the groups at fault; if the
        compact network cannot run; or if the outputs prove nothing (zero or not finite).
        Groups whose removal is known to be inexact (`trace(..., inexact='allow')`) are compared at
        full width; with them removed, the compact network only has to run.
    """
    keep = graph.complete(keep)
    inexact = {g.name: np.ones(g.size, bool) for g in graph.groups if g.inexact}
    if not all(keep[name].all() for name in inexact):
        variables, inputs = random_arguments(graph, seed)
        _run_compact(graph, keep, variables, inputs)
        keep |= inexact
    difference = measure(graph, keep, seed)
    if difference <= TOLERANCE:
        return difference

    def differs(names: Sequence[str]) -> bool:
        return not agrees(graph, {name: keep[name] for name in names}, seed)

    found = at_fault([name for name, alive in keep.items() if not alive.all()], differs)
    raise errors.GraphError(
        f'the compact {type(graph.model).__name__} differs from the masked one by {difference:.1e} '
        f'of its largest output, so it was refused; at fault: {", ".join(found)}. '
        'Freeze these groups, or see whether the model decides by a width (such as '
        'x.shape == y.shape) what it computes, or draws random numbers (trace it with train=False)'
    )


def agrees(graph: Graph, keep: Keep, seed: int = 0) -> bool:
    """Whether the masked and the compact network compute the same, but for rounding."""
    return measure(graph, keep, seed) <= TOLERANCE


def at_fault(names: Sequence[str], differs: Callable[[Sequence[str]], bool]) -> list[str]:
    """Those of `names`, which differ together, that differ by themselves; found by halving."""
    if len(names) == 1:
        return list(names)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    found = [name for half in halves if differs(half) for name in at_fault(half, differs)]
    return found or list(names)


# From the full network's variables, inputs, and whether in float64, to the outputs of another.
Derived = Callable[[Any, Any, bool], list[np.ndarray]]


def measure(graph: Graph, keep: Keep, seed: int, derived: Derived | None = None) -> float:
    """How far a network is from the masked one, as a share of the largest output; inf at its worst.

    The network is the compact one, or that which `derived` runs.
    """
    derived = derived or functools.partial(_run_compact, graph, keep)
    difference = _difference(graph, keep, seed, derived, False)
    if difference <= TOLERANCE:
        return difference
    # Half precision rounds by more, and a deep network may amplify what float32 rounds: once more.
    return _difference(graph, keep, seed, derived, True)


def rehearse(graph: Graph, gone: Collection[str] = (), *, seed: int = 0) -> None:
    """`verify` with about half of every group removed: whether the model can be cut at all.

    And with all of the groups `gone`: whether it can do without these branches.

    Raises:
      GraphError: as `verify` does.
    """
    random = np.random.default_rng(seed)
    keep = graph.keep_all()
    for group in graph.groups:
        if not group.frozen:
            removed = random.permutation(group.size)[: group.size // 2]
            keep[group.name][slice(None) if group.name in gone else removed] = False
    verify(graph, keep, seed=seed)


def random_arguments(graph: Graph, seed: int) -> tuple[Any, Any]:
    """Variables and inputs of the full network; two examples say as much as a large batch.

    Inputs that are not batched throughout, and models that fix the batch, stay as they are.
    """
    random = np.random.default_rng(seed)
    variables = {
        collection: jax.tree.map(functools.partial(random_leaf, random), tree)
        if collection == 'params'
        else jax.tree.map(functools.partial(_random_statistic, random), tree)
        for collection, tree in graph.variables.items()
    }
    inputs = jax.tree.map(functools.partial(_random_input, random), _few(graph))
    return variables, inputs


def _few(graph: Graph) -> Any:
    """The shapes of the inputs, with two examples where the model can do with them."""
    outputs = graph.program.out_avals[: graph.outputs]
    leading = {leaf.shape[:1] for leaf in (*jax.tree.leaves(graph.inputs), *outputs)}
    if len(leading) > 1 or leading <= {(), (0,), (1,), (2,)}:
        return graph.inputs
    few = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape[1:]), leaf.dtype), graph.inputs
    )
    try:
        jax.eval_shape(outputs_of(graph.model, graph.apply_kwargs), graph.variables, few)
    except Exception:  # whatever the model's code may raise
        return graph.inputs
    return few


def _run_compact(
    graph: Graph, keep: Keep, variables: Any, inputs: Any, precise: bool = False
) -> list[np.ndarray]:
    """The outputs of the compact network, given the full network's variables."""
    module, _ = narrowed(graph, keep)
    return run_at(graph, module, cut(graph, variables, keep), inputs, precise)


def run_at(
    graph: Graph, module: nn.Module, variables: Any, inputs: Any, precise: bool
) -> list[np.ndarray]:
    """The outputs of a module that runs the graph's model at other widths, with its own variables.

    Raises:
      GraphError: where the model's code cannot; with the layer and the line.
    """
    try:
        return _run(outputs_of(module, graph.apply_kwargs), variables, inputs, precise)
    except Exception as error:
        layer, line = where(error)
        raise errors.GraphError(
            f'{type(graph.model).__name__} cannot run at the compact widths, because layer {layer} '
            f'fixes a size in its own code, at {line}: {error}. Let it take the size from its '
            "input's shape, or freeze what it is made of"
        ) from error


def where(error: Exception) -> tuple[str, str]:
    """The innermost Linen module and line of its code that an error passed through."""
    layer, line = 'of unknown name', 'an unknown line'
    traceback = error.__traceback__
    while traceback:
        code = traceback.tb_frame.f_code
        module = traceback.tb_frame.f_locals.get('self')
        if isinstance(module, nn.Module) and module.scope is not None:
            layer = '"/' + '/'.join(module.path) + '"'
        if rules.is_of_the_model(code.co_filename):
            line = f'{code.co_filename}:{traceback.tb_lineno} ({code.co_name})'
        traceback = traceback.tb_next
    return layer, line


def _difference(graph: Graph, keep: Keep, seed: int, derived: Derived, precise: bool) -> float:
    variables, inputs = random_arguments(graph, seed)
    with futures.ThreadPoolExecutor(2) as pool:  # XLA compiles the two side by side
        runs = (
            pool.submit(_run, _full(graph, inputs), mask(graph, variables, keep), inputs, precise),
            pool.submit(derived, variables, inputs, precise),
        )
        masked, compacted = (run.result() for run in runs)
    if not precise and not all(np.isfinite(a).all() for a in masked):
        return np.inf  # half precision may overflow
    if not all(np.isfinite(a).all() for a in masked) or not any(a.any() for a in masked):
        raise errors.GraphError(
            f'on random variables and inputs, the outputs of {type(graph.model).__name__} are zero '
            'or not finite, so nothing can be said about its compact network'
        )
    worst = 0.0
    for a, b in zip(masked, compacted, strict=True):
        if a.shape != b.shape or not np.isfinite(b).all():
            return np.inf
        if a.size:  # each output by its own scale: large features must not hide small logits
            worst = max(worst, float(np.max(np.abs(a - b)) / max(np.max(np.abs(a)), 1e-30)))
    return worst


def _full(graph: Graph, inputs: Any) -> Callable[[Any, Any], Any]:
    """The full network as a function of (variables, inputs); as traced, where the batch allows."""
    if jax.tree.map(np.shape, inputs) != jax.tree.map(np.shape, graph.inputs):
        return outputs_of(graph.model, graph.apply_kwargs)
    program = jax.extend.core.jaxpr_as_fun(graph.program)
    return lambda *args: program(*jax.tree.leaves(args))[: graph.outputs]


def _run(
    function: Callable[[Any, Any], Any], variables: Any, inputs: Any, precise: bool = False
) -> list[np.ndarray]:
    """The outputs of a network on the CPU; compiled for a single run, so without polish."""
    cpu = jax.local_devices(backend='cpu')[0]
    with (
        jax.default_device(cpu),
        jax.default_matmul_precision('highest'),
        jax.enable_x64(precise),
    ):
        if precise:
            function = precision.doubled(function)
        lowered = jax.jit(function).lower(variables, inputs)
        try:
            compiled = lowered.compile(compiler_options=QUICK)
        except RuntimeError:  # an XLA that lacks one of the options
            compiled = lowered.compile()
        outputs = compiled(variables, inputs)
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(outputs)]


def random_leaf(random: np.random.Generator, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    """Kernels that keep the scale of what runs through; vectors clear of zero, so that a removed
    channel's bias or statistics would show."""
    vector = math.prod(leaf.shape) == max(leaf.shape, default=1)  # [1, 1, 1, channels] is one, too
    if vector or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return _random_statistic(random, leaf)
    inputs = max(math.prod(leaf.shape[:-1]), 1)  # there are none where a branch has gone
    return (random.standard_normal(leaf.shape) * np.sqrt(2 / inputs)).astype(leaf.dtype)


def _random_statistic(random: np.random.Generator, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    """Positive, as a variance is."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return np.zeros(leaf.shape, leaf.dtype)
    return random.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)


def _random_input(random: np.random.Generator, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    shape = leaf.shape
    if jnp.issubdtype(leaf.dtype, jnp.integer):  # pixels; indices of what has two rows at least
        pixels = leaf.dtype == np.uint8
        return random.integers(256 if pixels else 2, size=shape).astype(leaf.dtype)
    if leaf.dtype == np.bool_:  # a mask that hides all would leave nothing to compare
        return np.ones(shape, leaf.dtype)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return np.zeros(shape, leaf.dtype)
    return random.standard_normal(shape).astype(leaf.dtype)


def alive(graph: Graph, keep: Keep) -> dict[str, dict[int, np.ndarray]]:
    """The masks of every axis that loses positions: bool [axis size] by variable path and axis."""
    keep = graph.complete(keep)
    result: dict[str, dict[int, np.ndarray]] = {path: {} for path in graph.shapes}
    for group in graph.groups:
        removed = ~keep[group.name]
        if removed.any():
            for member, positions in zip(group.members, group.positions, strict=True):
                n = graph.shapes[member.path][member.axis]
                mask = result[member.path].setdefault(member.axis, np.ones(n, bool))
                mask[positions[removed].reshape(-1)] = False
    return result


def _change(
    graph: Graph, tree: Any, keep: Keep, change: Any, *others: Any, among: Keep | None = None
) -> Any:
    """Applies `change(leaf, {axis: alive}, *leaves of others)` to what stands at a variable's path.

    Where the tree has been cut before, to `among`, its masks are for what is left.
    """
    masks, shapes = alive(graph, keep), dict(graph.shapes)
    if among is not None:
        gone = [n for n, units in graph.complete(keep).items() if (units > among[n]).any()]
        if gone:
            raise errors.GraphError(f'already cut away: units of {", ".join(gone)}')
        before = alive(graph, among)
        for path, axes in before.items():
            shape = list(shapes[path])
            for axis, there in axes.items():
                shape[axis] = int(there.sum())
                masks[path][axis] = masks[path][axis][there]
            shapes[path] = tuple(shape)
    # Trees of parameters alone lack the collection's name. Parameters come first where both match.
    short: dict[str, str] = {}
    for path in sorted(shapes, key=lambda path: not path.startswith('params/')):
        short.setdefault(path.split('/', 1)[-1], path)

    def find(entries: Sequence[str]) -> str | None:
        for i in range(len(entries)):
            tail = '/'.join(entries[i:])
            if tail in shapes:
                return tail
            if tail in short:
                return short[tail]
        return None

    def visit(path, leaf, *parts):
        if path and path[-1] == jax.tree_util.GetAttrKey('value'):
            path = path[:-1]  # the box of nn.with_partitioning
        found = find([key_string(entry) for entry in path])
        if found is None or not masks[found] or np.ndim(leaf) == 0:
            return (leaf, *parts)[-1]
        if tuple(leaf.shape) != tuple(shapes[found]):
            raise errors.GraphError(
                f'the leaf at {path_string(path)} has shape {list(leaf.shape)}, but the '
                f'variable {found} has {list(shapes[found])}: cut needs trees of the same shapes'
            )
        return change(leaf, masks[found], *parts)

    return jax.tree_util.tree_map_with_path(visit, tree, *others)
