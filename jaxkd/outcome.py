"""What came out of a run: accuracies on the test part, costs, files, and the report of all that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import functools
import statistics
from typing import Any

from flax import linen as nn
import jax
import numpy as np

from jaxkd import errors, export, features, hosts, loop, mode, train
from jaxkd import mesh as meshes
from jaxkd import plan as planning
from jaxkd import report as telling
from jaxkd import workdir as records
from jaxkd.graph import latency, structure
from jaxkd.graph import trace as tracing
from jaxkd.graph.structure import CompactModel

# How often inference is timed, the networks taking turns.
TIMINGS = 20


def report(
    setup: loop.Setup,
    plan: planning.Plan,
    teacher: Any,
    small: CompactModel,
    expansions: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Reads the test part, for the first and last time, and writes down what came out.

    The networks compute in float32, as they are handed on, whatever they were trained in.
    """
    config = setup.config
    test = train.put(setup.load('test'), setup.mesh)
    batch_size = config.distil.batch_size
    batch = train.make_batch(test, np.arange(batch_size) % test.split.size, setup.mesh)
    labels = test.split.labels
    networks = {
        'teacher': (plan.model, features.each(teacher)[0], plan.graph.cost()._asdict()),
        'compact': (small.module, small.variables, small.structure.compact),
    }
    rows: dict[str, dict[str, Any]] = {}
    answers: dict[str, np.ndarray] = {}
    inference: dict[str, Callable[[], Any]] = {}
    for name, (module, variables, cost) in networks.items():
        step = train.make_predict_step(module, setup.preprocessing, setup.mesh)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
        variables = meshes.place(variables, variables['params'], setup.mesh)
        inference[name] = functools.partial(step, variables, batch)
        answers[name] = train.predict(step, variables, test, batch_size, setup.mesh)
        plain = jax.jit(functools.partial(module.apply, **mode.arguments(module, train=False)))
        analysis = plain.lower(shapes, plan.graph.inputs[0]).compile().cost_analysis() or {}
        rows[name] = {
            'accuracy': float(np.mean(answers[name] == labels)),
            **{
                resource: cost[resource] for resource in (*plan.graph.resources, 'peak_activations')
            },
            'xla_flops': analysis.get('flops'),
        }
    for name, milliseconds in _time(inference).items():
        rows[name]['milliseconds'] = milliseconds
    if isinstance(teacher, tuple):
        step = train.make_predict_step(plan.model, setup.preprocessing, setup.mesh)
        several = meshes.place(teacher, features.each(teacher)[0]['params'], setup.mesh)
        found = train.predict(step, several, test, batch_size, setup.mesh)
        rows['ensemble'] = {'accuracy': float(np.mean(found == labels))}
    classes = telling.by_class(labels, answers, plan.info.class_names)

    return hosts.first(
        lambda: write_down(setup, plan, networks, rows, classes, small.structure, expansions)
    )


def write_down(
    setup: loop.Setup,
    plan: planning.Plan,
    networks: Mapping[str, tuple[nn.Module, Any, Mapping[str, Any]]],
    rows: Mapping[str, Mapping[str, Any]],
    classes: Mapping[str, Any],
    found: structure.Structure,
    expansions: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Writes the report, with what the workdir tells of the run."""
    config = setup.config
    outcomes = loop.outcomes(setup)
    kept = {name: len(group['kept']) for name, group in found.groups.items()}
    layers = zip(plan.graph.cost().rows, plan.graph.polynomial.cost(found.copies).rows, strict=True)
    result = {
        **rows,
        'budget': {b.resource: config.budget[b.resource] for b in plan.budgets if not b.block},
        'reached': {r: rows['compact'][r] / rows['teacher'][r] for r in plan.graph.resources},
        'blocks': [
            {
                'group': group.name,
                'block': plan.limits[group.name].block,
                'size': group.size,
                'kept': kept[group.name],
            }
            for group in plan.graph.groups
        ],
        'layers': [
            {
                'layer': full.layer,
                **{
                    resource: {
                        'teacher': getattr(full, resource),
                        'compact': getattr(left, resource),
                    }
                    for resource in plan.graph.resources
                },
            }
            for full, left in layers
        ],
        'search': telling.tracking(telling.search_curves(setup.workdir)),
        'removal': telling.removals(setup.workdir),
        'inexact': found.inexact,
        'seconds': {name: outcome['seconds'] for name, outcome in outcomes.items()},
        'best': {
            name: {'step': outcome['best']['step'], **outcome['best']['metrics']}
            for name, outcome in outcomes.items()
            if outcome['best']
        },
        'rollbacks': {
            name: outcome['rollbacks'] for name, outcome in outcomes.items() if outcome['rollbacks']
        },
        'input_shape': list(plan.info.image_shape),
        # What a pixel in [0, 1] becomes before a network, or a file of `export`, is given it.
        'normalization': {
            'mean': setup.preprocessing.mean.tolist(),
            'std': setup.preprocessing.std.tolist(),
        },
        'inference_batch': config.distil.batch_size,
        'config': records.record(config),
        'seed': config.seed,
        'versions': records.versions(),
        'device': f'{jax.device_count()} × {jax.devices()[0].device_kind}',
    }
    if expansions:
        result['expand'] = list(expansions)
    corrupt = records.corrupt_images(setup.workdir, setup.display.message)
    if corrupt:
        result['corrupt_images'] = corrupt
    exported = records.read_json(setup.workdir / 'export.json', setup.display.message)
    if exported:
        result['export'] = exported
    if 'latency' in plan.graph.resources:
        result['latency'] = _latency(plan.graph, networks)
    result |= classes  # last, since they can be long
    records.write_json(setup.workdir / 'report.json', result)
    setup.display.message(f'report: {telling.write_page(setup.workdir, result)}')
    return result


def write_exports(
    setup: loop.Setup, plan: planning.Plan, teacher: Any, small: CompactModel
) -> None:
    """Writes the compact network as files that run without its code, and a record of them.

    A format that fails, however it does, is said and recorded: the network itself is safe by now,
    and its report is still to be written. What a run that was stopped has written is written again.
    """
    folder = setup.workdir / 'export'
    if not setup.config.export:
        return
    # As one process holds them, whatever they were trained on.
    full, compact = (
        CompactModel(module, jax.device_get(variables), small.structure)
        for module, variables in (
            (plan.model, features.each(teacher)[0]),
            (small.module, small.variables),
        )
    )
    rows: dict[str, dict[str, Any]] = {}
    for name in setup.config.export:
        path = folder / f'model.{name}'
        try:
            folder.mkdir(exist_ok=True)
            done = export.FORMATS[name](compact, path)
            whole = export.FORMATS[name](full, None)
        except Exception as error:  # converters and disks fail in ways of their own
            told = isinstance(error, errors.ExportError)
            rows[name] = {'error': error.why if told else errors.words(error)}
            setup.display.message(f'export: {name}: {rows[name]["error"]}')
        else:
            rows[name] = {
                'bytes': done.bytes,
                'full_bytes': whole.bytes,
                'difference': done.difference,
            }
            setup.display.message(f'export: {path}, {done.bytes:,} bytes')
    records.write_json(setup.workdir / 'export.json', rows)


def _latency(
    graph: tracing.Graph, networks: Mapping[str, tuple[nn.Module, Any, Mapping[str, Any]]]
) -> dict[str, dict[str, float]]:
    """Seconds for one image, as the fitted model predicts them and as they are now."""
    probes = [
        latency.network(module, variables, graph.inputs, graph.apply_kwargs)
        for module, variables, _ in networks.values()
    ]
    times = {
        'predicted': {name: cost['latency'] for name, (*_, cost) in networks.items()},
        'measured': dict(zip(networks, latency.time_probes(probes), strict=True)),
    }
    return {
        kind: seconds | {'ratio': seconds['compact'] / seconds['teacher']}
        for kind, seconds in times.items()
    }


def _time(calls: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Median milliseconds of each call."""
    waiting = [lambda call=call: jax.block_until_ready(call()) for call in calls.values()]
    taken = latency.take_turns(waiting, TIMINGS)
    return {name: 1e3 * statistics.median(t) for name, t in zip(calls, taken, strict=True)}
