"""Latency as a resource: fitted to measurements, here mostly those of a clock made by hand."""

import json
import math
import pathlib
import runpy
import warnings

from flax import linen as nn
import jax
import jax.numpy as jnp
from nets import Net, conv, keep_first, variables_of
import numpy as np
import pytest

import jaxkd
from jaxkd import plan as planning
from jaxkd.graph import latency

CONFIG = pathlib.Path(__file__).resolve().parent.parent / 'configs' / 'mbv2.py'
IMAGE = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)


def separable(x):
    """x[3] → stem 3×3 [8] → each 3×3, depthwise → point 1×1 [12] → head [5]."""
    x = nn.relu(conv(8, name='stem')(x))
    x = nn.relu(conv(8, feature_group_count=8, name='each')(x))
    x = nn.relu(conv(12, 1, name='point')(x))
    return nn.Dense(5, name='head')(x.mean((1, 2)))


def law(probe, batch=1):
    """Microseconds: 3 + 2·in + 5·out + 0.25·in·out, and 7 + 4·channels for a depthwise one."""
    lhs, rhs = (operand.shape for operand in probe.operands)
    assert lhs[0] == batch
    inputs, outputs = rhs[-2:]
    if lhs[-1] != inputs:
        assert (lhs[-1], inputs) == (outputs, 1)
        return 7 + 4 * outputs
    return 3 + 2 * inputs + 5 * outputs + 0.25 * inputs * outputs


class Clock:
    """Measures by `law`, without running anything.

    The full network takes `networks[0]` seconds, those of a half and a quarter of it the others.
    """

    def __init__(self, networks=(1e-3, 6e-4, 4e-4), **law_arguments):
        self.networks = list(networks)
        self.law_arguments = law_arguments
        self.probes = []

    def __call__(self, probes):
        self.probes += probes
        return [self.seconds(probe) for probe in probes]

    def seconds(self, probe):
        if probe.name == latency.NETWORK:
            return self.networks.pop(0)
        return 0.0 if probe.name == latency.NOTHING else 1e-6 * law(probe, **self.law_arguments)


def traced(body, image=IMAGE):
    model = Net(body)
    variables = variables_of(model, image)
    return jaxkd.trace(model, variables, image), model, variables


def by_hand(stem, point):
    """Of `separable`, by layer. The widths of the image and of the output never change."""
    return {
        'stem': 3 + 2 * 3 + 5 * stem + 0.25 * 3 * stem,
        'each': 7 + 4 * stem,
        'point': 3 + 2 * stem + 5 * point + 0.25 * stem * point,
        'head': 3 + 2 * point + 5 * 5 + 0.25 * point * 5,
    }


def test_the_law_that_was_measured_is_reproduced(tmp_path):
    networks = [3e-6 * sum(by_hand(*widths).values()) for widths in ((8, 12), (3, 5), (1, 3))]
    graph, *_ = traced(separable)
    measured = jaxkd.with_latency(graph, cache=tmp_path, measure=Clock(networks))
    for keep, widths in ((None, (8, 12)), (keep_first(stem=(3, 8), point=(7, 12)), (3, 7))):
        cost = measured.cost(keep)
        found = {row.layer: row.latency for row in cost.by_layer()}
        for layer, expected in by_hand(*widths).items():
            np.testing.assert_allclose(found[layer], 3e-6 * expected, rtol=1e-6)
        np.testing.assert_allclose(cost.latency, 3e-6 * sum(by_hand(*widths).values()), rtol=1e-6)
        # What is counted stays as it was.
        assert cost._replace(latency=0.0, rows=()) == graph.cost(keep)._replace(rows=())
        assert all(isinstance(n, int) for n in (cost.flops, cost.params, cost.activations))
    price = measured.price(keep, 'latency')
    np.testing.assert_allclose(price['stem'], 3e-6 * (5.75 + 4 + 2 + 0.25 * 7), rtol=1e-6)
    np.testing.assert_allclose(price['point'], 3e-6 * (5 + 0.25 * 3 + 2 + 1.25), rtol=1e-6)
    assert 'ms' in measured.table().splitlines()[0] and 'ms' not in graph.table().splitlines()[0]


def of_many_kinds(x):
    x = conv(4, name='stem')(x)
    for i in range(2):  # two equal layers that read and make the same channels
        x = x + conv(4, 1, name=f'inside{i}')(nn.relu(x))
    grouped = conv(8, 1, feature_group_count=2, name='grouped')(x)
    heads = nn.DenseGeneral((4, 6), name='heads')(grouped.mean((1, 2)))
    return nn.Dense(5, name='head')(nn.DenseGeneral(7, axis=(-2, -1), name='merge')(heads))


def test_layers_of_many_kinds_can_be_made_narrower(tmp_path):
    """Every probe can be run; equal layers are measured once."""
    graph, *_ = traced(of_many_kinds)
    runs = []

    def measure(probes):
        for probe in probes:
            if probe.name not in (latency.NETWORK, latency.NOTHING):
                jax.eval_shape(probe.function, *probe.operands)
                runs.append((probe.name, *(operand.shape for operand in probe.operands)))
        return [float(sum(math.prod(x.shape) for x in probe.operands)) for probe in probes]

    measured = jaxkd.with_latency(graph, cache=tmp_path, measure=measure)
    names = [name for name, *_ in runs]
    assert 'inside1' not in names and names.count('inside0') == 9
    # Two groups, which become narrower: 2, 1 input channels of each, and 8, 6, 2 output channels.
    grouped = [shapes for name, *shapes in runs if name == 'grouped']
    assert {(lhs[-1], *rhs[-2:]) for lhs, rhs in grouped} == {
        (2 * i, i, o) for i in (1, 2) for o in (2, 6, 8)
    }
    rows = {row.layer: row.latency for row in measured.cost().by_layer()}
    assert rows['inside0'] == rows['inside1'] > 0 and set(rows) >= {'grouped', 'heads', 'merge'}
    keep = {g.name: np.arange(g.size) < 1 for g in graph.groups if not g.frozen}
    assert 0 < measured.cost(keep).latency < measured.cost().latency


@pytest.mark.filterwarnings('ignore:54 of the 54')
def test_layers_in_a_loop_count_as_often_as_it_runs(tmp_path):
    def looped(x):
        x = conv(6, 1, name='stem')(x)

        def body(module, carry, _):
            return module(carry), None

        again = nn.scan(body, variable_broadcast='params', split_rngs={'params': False}, length=3)
        return again(conv(6, 1, name='again'), x, None)[0].mean((1, 2))

    graph, *_ = traced(looped)
    measured = jaxkd.with_latency(graph, cache=tmp_path, measure=Clock((1e-3,) * 3))
    rows = {row.layer: row.latency for row in measured.cost().by_layer()}
    once = {'stem': 3 + 2 * 3 + 5 * 6 + 0.25 * 3 * 6, 'again': 3 + 2 * 6 + 5 * 6 + 0.25 * 6 * 6}
    np.testing.assert_allclose(rows['again'] / rows['stem'], 3 * once['again'] / once['stem'])


def wide(x):
    for i in range(4):
        x = nn.relu(conv(64, name=f'conv{i}')(x))
    return nn.Dense(10)(x.mean((1, 2)))


def test_budgets_in_latency_are_met(tmp_path):
    graph, _, _ = traced(wide)
    measured = jaxkd.with_latency(graph, cache=tmp_path, measure=Clock((8e-3, 3e-3, 1.5e-3)))
    full = measured.cost().latency
    np.testing.assert_allclose(full, 8e-3)
    random = np.random.default_rng(0)
    scores = {g.name: random.exponential(size=g.size) for g in graph.groups if not g.frozen}
    for budget, share in ((0.5, 0.5), (0.25, 0.25), (6.0, 0.75)):  # the last in milliseconds
        reached = measured.cost(jaxkd.select(measured, scores, latency=budget)).latency / full
        assert 0.99 * share <= reached <= share
    cost = measured.cost(jaxkd.select(measured, scores, latency=0.6, flops=0.3))
    assert cost.latency <= 0.6 * full and 0.29 < cost.flops / measured.cost().flops <= 0.3
    blocks = [('conv', {'min_keep': 60})]
    with pytest.raises(jaxkd.BudgetError, match=r'latency of 0\.800 ms \(0\.100 of the full'):
        jaxkd.select(measured, scores, latency=0.1, blocks=blocks)


def test_structures_of_measured_graphs_say_so(tmp_path):
    graph, _, variables = traced(separable)
    measured = jaxkd.with_latency(graph, cache=tmp_path, measure=Clock())
    small = jaxkd.compact(measured, variables, keep_first(stem=(4, 8)))
    assert small.structure.compact['latency'] < small.structure.full['latency']
    np.testing.assert_allclose(small.structure.full['latency'], 1e-3)
    assert 'latency' not in jaxkd.compact(graph, variables, keep_first(stem=(4, 8))).structure.full
    jaxkd.save(tmp_path / 'small', small)
    again = jaxkd.load(tmp_path / 'small', model=graph.model)
    assert again.structure == small.structure


def test_what_is_cached_is_not_measured_again(tmp_path, monkeypatch):
    monkeypatch.setenv('JAXKD_CACHE', str(tmp_path))
    graph, *_ = traced(separable)
    clock = Clock()
    first = jaxkd.with_latency(graph, measure=clock)
    (file,) = tmp_path.iterdir()
    assert file.suffix == '.json' and jax.__version__ in file.name and 'batch-1' in file.name
    again = Clock()
    assert jaxkd.with_latency(graph, measure=again).cost() == first.cost()
    assert clock.probes and not again.probes

    # Other numbers of examples are measured by themselves, whatever the graph was traced with.
    eight = Clock(batch=8)
    jaxkd.with_latency(graph, batch_size=8, measure=eight)
    assert eight.probes and len(list(tmp_path.iterdir())) == 2
    traced_with_eight, *_ = traced(separable, jax.ShapeDtypeStruct((8, 8, 8, 3), jnp.float32))
    assert jaxkd.with_latency(traced_with_eight, measure=again).cost() == first.cost()
    assert not again.probes


@pytest.mark.parametrize('content', ['{"stem', '[1.0]', '{"stem": "fast"}', '{"stem": -1.0}'])
def test_damaged_caches_are_written_anew(tmp_path, content):
    graph, *_ = traced(separable)
    jaxkd.with_latency(graph, cache=tmp_path, measure=Clock())
    (file,) = tmp_path.iterdir()
    whole = file.read_text()
    file.write_text(content)
    clock = Clock()
    with pytest.warns(UserWarning, match='is damaged, so all is measured anew'):
        jaxkd.with_latency(graph, cache=tmp_path, measure=clock)
    assert clock.probes and json.loads(file.read_text()) == json.loads(whole)


def test_caches_that_cannot_be_written_are_done_without(tmp_path):
    graph, *_ = traced(separable)
    (tmp_path / 'file').touch()
    with pytest.warns(UserWarning, match='cannot be written'):
        measured = jaxkd.with_latency(graph, cache=tmp_path / 'file' / 'in', measure=Clock())
    assert measured.cost().latency > 0


def test_without_measurements_latency_is_refused():
    graph, *_ = traced(separable)
    assert graph.cost().latency == 0.0
    scores = {g.name: np.ones(g.size) for g in graph.groups if not g.frozen}
    for budget in (0.5, 20.0):
        with pytest.raises(jaxkd.ConfigError, match=r'budget.latency.*call.*jaxkd.with_latency'):
            jaxkd.select(graph, scores, latency=budget)
    with pytest.raises(jaxkd.ConfigError, match=r'call.*jaxkd.with_latency'):
        graph.price(None, 'latency')
    for batch_size in (0, -1):
        with pytest.raises(jaxkd.ConfigError, match='batch_size is'):
            jaxkd.with_latency(graph, batch_size=batch_size)
    keep = jaxkd.select(graph, scores, flops=0.5, latency=1.0)  # 1 sets no limit
    assert graph.cost(keep).flops <= 0.5 * graph.cost().flops


def test_pipelines_measure_where_a_budget_asks_for_it(tmp_path, monkeypatch):
    monkeypatch.setenv('JAXKD_CACHE', str(tmp_path))
    clock = Clock()
    monkeypatch.setattr(latency, 'time_probes', lambda probes, seconds: clock(probes))
    config = runpy.run_path(str(CONFIG))['get_config']()
    config.model.arguments.update(width=0.1)
    assert len(planning.make_plan(config).budgets) == 1 and not clock.probes
    config.budget.update(latency=0.5)
    plan = planning.make_plan(config)
    assert clock.probes and {b.resource for b in plan.budgets} == {'flops', 'latency'}
    np.testing.assert_allclose(plan.budgets[-1].most, 5e-4)
    clock.probes.clear()
    config.budget.update(latency=-1.0)
    with pytest.raises(jaxkd.ConfigError, match='budget.latency'):
        planning.make_plan(config)
    assert not clock.probes


def test_real_measurements(tmp_path, monkeypatch):
    """`prune` measures by itself; what comes out is a network, and all numbers are times."""
    monkeypatch.setenv('JAXKD_CACHE', str(tmp_path))
    monkeypatch.setattr(latency, 'ROUNDS', 3)
    _, model, variables = traced(wide)
    with warnings.catch_warnings(action='error'):
        small = jaxkd.prune(model, variables, IMAGE, latency=0.8)
    full, compact = small.structure.full['latency'], small.structure.compact['latency']
    assert 0 < compact <= 0.8 * full < 8
    assert small.apply(small.variables, jnp.ones(IMAGE.shape)).shape == (1, 10)
    (file,) = tmp_path.iterdir()
    assert all(seconds > 0 for seconds in json.loads(file.read_text()).values())
