"""The stages of a run, where one hands on to the next."""

import types

import numpy as np
import pytest

from jaxkd import errors, pipeline
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
