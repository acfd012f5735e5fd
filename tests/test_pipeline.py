"""The stages of a run, where one hands on to the next."""

import types

from flax import linen as nn
import jax
import numpy as np
import pytest

import jaxkd
from jaxkd import errors, models, pipeline
from jaxkd import plan as planning
from tests import tiny


def test_a_network_above_its_budget_goes_no_further():
    plan = planning.make_plan(tiny.get_config())

    def found(kept):
        cost = plan.graph.cost({'Conv_0': np.arange(16) < kept})._asdict()
        return types.SimpleNamespace(structure=types.SimpleNamespace(compact=cost))

    pipeline.check_budgets(plan, found(4))
    with pytest.raises(errors.BudgetError, match='1.000 of the flops .* its budget of 0.500'):
        pipeline.check_budgets(plan, found(16))


def test_a_criterion_looks_at_fewer_images_where_there_are_fewer(tmp_path):
    config = tiny.get_config()
    config.data.labels = 10
    for stage in planning.WEIGHTS:
        config[stage].batch_size = 5
    plan = planning.make_plan(config)
    with pipeline.prepared(config, tmp_path / 'work', plan) as setup:
        found = pipeline.evidence(setup, plan.model, 'fisher')
    assert {batch['labels'].size for batch in found.batches} == {10}


@pytest.mark.parametrize(
    ('field', 'value', 'why'),
    [
        ('seed', 2**63, 'in [0, 2⁶³)'),
        ('log_every', 0, '≥ 1'),
        ('checkpoint_seconds', -1.0, '≥ 0'),
        ('nan_factor', 1.0, '(0, 1)'),
        ('data.padding', -1, '≥ 0'),
        ('data.mean', (float('nan'),), 'a finite number'),
        ('teacher.epochs', float('inf'), '> 0'),
        ('teacher.label_smoothing', 2.0, '[0, 1]'),
        ('teacher.number', 0, '≥ 1'),
        ('search.epochs', 0.0, '> 0'),
        ('search.rounds', 0, '≥ 1'),
        ('search.ramp', float('nan'), '(0, 1]'),
        ('search.min_keep', -1.0, '[0, 1]'),
        ('search.round_to', 0, '≥ 1'),
        ('search.temperature', 0.0, '> 0'),
        ('distil.batch_size', 0, '≥ 1'),
        ('distil.ema_decay', 1.0, '[0, 1)'),
        ('distil.learning_rate', float('nan'), '> 0'),
        ('distil.recalibrate', -1, '≥ 0'),
    ],
)
def test_numbers_that_cannot_be(field, value, why):
    config = tiny.get_config()
    config.data.update(mean=(0.5,), std=(0.25,))
    config.update_from_flattened_dict({field: value})
    with pytest.raises(errors.ConfigError) as refused:
        planning.make_plan(config)
    assert str(refused.value).startswith(f'{field} is {value!r}: ')
    assert why in refused.value.why


def test_budgets_that_limit_nothing_are_refused():
    config = tiny.get_config()
    config.budget.update(flops=1.0, params=1e9)
    params = f'{planning.make_plan(tiny.get_config()).graph.cost().params:,}'
    with pytest.raises(errors.ConfigError, match=f'budget.params is .* has {params}, so'):
        planning.make_plan(config)
    config.budget.params = 1.0
    assert not planning.make_plan(config).budgets


def test_blocks_are_read_as_everywhere_where_searches_alternate():
    config = tiny.get_config()
    config.search.update(expand=True, alternations=2)
    config.blocks = ('auto',)
    assert planning.make_plan(config).limits['Conv_0'].block
    for blocks, words in (
        ((1, 2), 'blocks is .* tuple of pairs'),
        ((('Conv_0', (('min_keep', 0.5),)),), r"blocks\['Conv_0'\].min_keep is 0.5: .* as an int"),
    ):
        config.blocks = blocks
        with pytest.raises(errors.ConfigError, match=words):
            planning.make_plan(config)


class Branch(nn.Module):
    """A stem and a residual branch, which is nearly all of it."""

    num_classes: int

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (3, 3), strides=2, name='stem')(x)
        x += nn.Conv(6, (3, 3), name='branch_out')(nn.relu(nn.Conv(8, (3, 3), name='branch_in')(x)))
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


def test_a_network_that_has_lost_a_branch_is_searched_again(tmp_path, monkeypatch):
    """Blocks that nothing, or nothing that could go, is left of; and a budget of what has gone."""
    monkeypatch.setitem(models.REGISTRY, 'branch', Branch)
    config = tiny.get_config()
    config.model.name = 'branch'
    config.search.update(expand=True, alternations=2, method='l1')
    config.budget.flops = 0.3
    config.blocks = (
        ('branch_in', {'removable': True, 'min_keep': 8}),
        ('branch_out', {'budget': {'flops': 0.9}, 'min_keep': 3}),
    )

    def search(setup, plan, aim, start, teacher):
        scores = {name: np.ones(size) for name, size in aim.graph.sizes.items() if size > 1}
        return start, jaxkd.select(aim.graph, scores, blocks=aim.blocks, **aim.budget)

    monkeypatch.setattr(pipeline, 'prune_in_rounds', search)
    plan = planning.make_plan(config)
    start = planning.init(plan.model, plan.graph.inputs[0])(jax.random.key(0))
    with pipeline.prepared(config, tmp_path / 'work', plan) as setup:
        found, expansions = pipeline.find_structure(setup, plan, start)
    kept = {name: group['kept'] for name, group in found.structure.groups.items()}
    assert not kept['branch_in'] and kept.keys() == plan.graph.sizes.keys()
    assert len(expansions) == 2 and len(kept['stem']) > len(set(kept['stem']))
    again = jaxkd.trace(found.module, found.variables, *plan.graph.inputs)
    assert again.cost().flops == found.structure.compact['flops']
    assert again.cost().flops == plan.graph.polynomial.cost(found.structure.copies).flops
    assert 0.9 * 0.3 <= again.cost().flops / plan.graph.cost().flops <= 0.3
