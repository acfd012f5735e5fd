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
