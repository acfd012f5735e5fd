"""What is told of a run: how its search followed the schedule."""

import sys

import numpy as np
import pytest

from jaxkd import metrics, report


@pytest.fixture
def workdir(tmp_path):
    """A search of 100 steps under two budgets, the first of which is the one that steers.

    It is 0.2 above its schedule in the first tenth and 0.05 above it after that, the other 0.3
    below its own; at the end the first is 0.1 below.
    """
    with metrics.MetricsLog(tmp_path) as log:
        log.write({'stage': 'teacher', 'step': 1, 'loss': 2.0})
        for step in (5, 10, 50, 100):
            scheduled = 0.5 ** (step / 100)
            away = {5: 0.2, 10: 0.2, 50: 0.05, 100: -0.1}[step]
            row = {
                'share_flops': scheduled + away,
                'scheduled_flops': scheduled,
                'lambda_flops': float(step),
                'share_params[block1/]': scheduled - 0.3,
                'scheduled_params[block1/]': scheduled,
                'lambda_params[block1/]': 0.0,
            }
            log.write({'stage': 'search', 'step': step, **row})
    return tmp_path


def test_how_the_schedule_was_followed(workdir):
    curves = report.search_curves(workdir)
    assert list(curves) == ['flops', 'params[block1/]']
    np.testing.assert_array_equal(curves['flops'].steps, [5, 10, 50, 100])
    np.testing.assert_array_equal(curves['flops'].penalty, [5, 10, 50, 100])
    told = report.tracking(curves)
    assert told['error'] == pytest.approx(0.1)
    assert told['budgets']['flops'] == pytest.approx({'alive': 0.4, 'scheduled': 0.5})
    assert told['budgets']['params[block1/]'] == pytest.approx({'alive': 0.2, 'scheduled': 0.5})


def test_the_picture(workdir):
    report.plot_search(report.search_curves(workdir), workdir / 'search.png')
    assert (workdir / 'search.png').read_bytes().startswith(b'\x89PNG')
    assert not list(workdir.glob('.*'))


def test_without_matplotlib_one_line_says_what_to_install(workdir, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    said = []
    report.plot_search(report.search_curves(workdir), workdir / 'search.png', say=said.append)
    assert len(said) == 1 and 'search.png' in said[0] and "pip install 'jaxkd[plot]'" in said[0]
    assert not (workdir / 'search.png').exists()


def test_a_run_without_a_budget_has_nothing_to_follow(tmp_path):
    assert report.tracking(report.search_curves(tmp_path)) == {'error': None, 'budgets': {}}
    report.plot_search({}, tmp_path / 'search.png')
    assert not (tmp_path / 'search.png').exists()
