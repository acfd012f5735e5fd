"""What is told of a run, and of several: numbers, pictures, pages, and the command."""

import json
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from jaxkd import charts, metrics, page, report
from jaxkd import workdir as records

NASTY = '<script>alert("1")</script>&\'"'


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


def test_by_class():
    """Of three classes, the first twice: one right, one taken for the third."""
    labels, answers = np.array([0, 0, 1, 2]), {'compact': np.array([0, 2, 1, 1])}
    told = report.by_class(labels, answers, ['a', 'b', 'c'])
    assert told == {
        'classes': {'names': ['a', 'b', 'c'], 'images': [2, 1, 1], 'compact': [1, 1, 0]},
        'confusion': {'compact': [[1, 0, 1], [0, 1, 0], [0, 1, 0]]},
    }
    assert json.loads(json.dumps(told)) == told
    many = report.by_class(labels, answers, [str(i) for i in range(report.MOST_CONFUSED + 1)])
    assert many.keys() == {'classes'} and many['classes']['compact'][:4] == [1, 1, 0, 0]


def test_pareto():
    """Cost to the right, accuracy upwards: 1, 3 and 4 are the front, 5 is 3 once more.

      .   . 4
      . 3 .
    1 . . 2
    0 . . .
    """
    points = [(1, 0.1), (1, 0.2), (4, 0.2), (2, 0.3), (3, 0.4), (2, 0.3)]
    assert report.pareto(points) == [1, 3, 4]
    assert report.pareto([]) == []


def _report(**changes):
    costs = {'flops': 1000, 'params': 500, 'activations': 80}
    half = {key: value // 2 for key, value in costs.items()}
    config = {'model': {'name': 'net'}, 'data': {'name': 'digits'}, 'seed': 0}
    return {
        'teacher': {'accuracy': 0.9, **costs},
        'compact': {'accuracy': 0.95, **half},
        'budget': {'flops': 0.5},
        'blocks': [{'group': 'conv', 'block': '', 'size': 8, 'kept': 3}],
        'config': config,
        **changes,
    }


def _write(folder, **changes):
    folder.mkdir(exist_ok=True)
    records.write_json(folder / 'report.json', _report(**changes))
    return str(folder)


def test_a_report_of_the_first_versions_is_a_page(tmp_path, capsys):
    folder = tmp_path / 'run'
    _write(folder)
    assert report.main([str(folder)]) == 0
    assert '+5.00 points' in capsys.readouterr().out
    text = (folder / 'report.html').read_text()
    assert '95.00%' in text and '2.00× smaller' in text and 'Channels kept' in text
    for section in ('Cost by block', 'The search', 'Training', 'Classes', 'Speed'):
        assert section not in text


def test_an_accuracy_of_nothing_is_one():
    row = {'stage': 'teacher', 'step': 1, 'loss': 1.0, 'accuracy': 0.5}
    rows = [row | {'validation_accuracy': share} for share in (0.25, 0.0)]
    assert '>0.00%<' in page._training(rows, {})


def test_everything_from_outside_is_escaped(workdir):
    with metrics.MetricsLog(workdir) as log:
        log.write({'stage': NASTY, 'step': 3, 'loss': 1.0, 'validation_accuracy': 0.5})
        row = {f'{key}_{NASTY}': 0.5 for key in ('share', 'scheduled', 'lambda')}
        log.write({'stage': f'search{NASTY}', 'step': 3, **row})
    cost = {'teacher': 4, 'compact': 2}
    config = {'model': {'name': NASTY}, 'data': {'name': NASTY}, NASTY: NASTY}
    _write(
        workdir,
        config=config,
        budget={NASTY: 0.5},
        reached={NASTY: 0.5},
        blocks=[{'group': NASTY, 'block': block, 'size': 8, 'kept': 3} for block in (NASTY, '')],
        layers=[{'layer': NASTY, 'flops': cost, 'params': cost}],
        classes={'names': [NASTY, 'b'], 'images': [2, 1], 'teacher': [1, 1], 'compact': [2, 0]},
        confusion={'compact': [[2, 0], [1, 0]]},
        export={NASTY: {'bytes': 10, 'full_bytes': 20, 'difference': 1e-7}, 'a': {'error': NASTY}},
        inexact={NASTY: NASTY},
        rollbacks={NASTY: [NASTY]},
        versions={NASTY: NASTY, 'jaxkd': NASTY},
        device=NASTY,
        seed=NASTY,
    )
    records.write_json(workdir / 'config.json', {'command': NASTY})
    assert report.main([str(workdir)]) == 0
    text = (workdir / 'report.html').read_text()
    assert '<script' not in text and text.count('&lt;script&gt;') > 20
    # Well-formed, so that nothing has closed what it did not open.
    body = text[text.index('<body>') : text.index('</html>')]
    ElementTree.fromstring(body)


def test_lines_are_where_their_numbers_are():
    """From the lower left to the upper right corner; broken where there is no number."""
    drawn = [charts.Line('a', [0, 5, 10, 15, 20], [0.0, None, 1.0, 2.0, 4.0], 'c0')]
    svg = ElementTree.fromstring(charts.lines(drawn, title='t', about=''))
    (path,) = [element for element in svg if element.get('class') == 'line c0']
    left, right, low, high = 52, 506, 204, 12
    width, height = right - left, low - high
    points = [(0.0, 0.0), (0.5, 0.25), (0.75, 0.5), (1.0, 1.0)]
    places = [f'{left + x * width:.1f},{low - y * height:.1f}' for x, y in points]
    assert path.get('d') == f'M{places[0]} M{places[1]} L{places[2]} L{places[3]}'


def test_long_lines_are_thinned_to_their_ends():
    drawn = [charts.Line('a', range(100_000), [1.0] * 100_000, 'c0')]
    svg = charts.lines(drawn, title='t', about='')
    assert len(svg) < 20_000 and 'L506.0,12.0"' in svg


def test_several_runs(tmp_path, capsys):
    runs = [
        _write(tmp_path / 'a'),
        _write(
            tmp_path / '<b>',
            compact={'accuracy': 0.85, 'flops': 250, 'params': 100},
            budget={'params': 0.2},
            config={'model': {'name': 'net'}, 'data': {'name': 'digits'}, 'seed': 1},
        ),
    ]
    out = tmp_path / 'page.html'
    assert report.main([*runs, f'--out={out}']) == 0
    head, first, second, _, settings, seed, last = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ['run', 'accuracy', 'points']
    for line, told in (
        (first, '95.00% +5.00 90.00% 500 50.0% 250 50.0% flops 0.5'),
        (second, '85.00% -5.00 90.00% 250 25.0% 100 20.0% params 0.2'),
    ):
        assert ' '.join(line.split()[2:]) == told
    assert settings.split() == ['setting', '1', '2'] and seed.split() == ['seed', '0', '1']
    assert last == f'wrote {out}'
    text = out.read_text()
    assert '&lt;b&gt;' in text and '<b>' not in text
    # Both have the same teacher, which is one ring.
    assert text.count('class="teacher"') == 2 and text.count('class="compact"') == 4


@pytest.mark.parametrize(
    ('flags', 'status', 'words'),
    [
        ([], 2, ['DIR']),
        (['nowhere'], 1, ['nowhere: holds no report.json']),
        (['whole', 'nowhere'], 1, ['nowhere: holds no report.json']),
        (['damaged'], 1, ['damaged/report.json: is damaged']),
        (['other'], 1, ['other/report.json: is no report of a run']),
        (['half'], 1, ['half/metrics.jsonl: line 1 is damaged']),
        (['whole', '--out=no/a.html'], 2, ['--out', 'No such file']),
        (['whole', '--out=whole'], 2, ['--out', 'Is a directory']),
        (['whole', '--out=.'], 2, ['--out', 'name a file']),
    ],
)
def test_wrong_input_is_one_sentence(tmp_path, monkeypatch, capsys, flags, status, words):
    monkeypatch.chdir(tmp_path)
    for name in ('whole', 'half', 'damaged'):
        _write(tmp_path / name)
    (tmp_path / 'half' / 'metrics.jsonl').write_text('{}\n{"stage": "search", "step": 1}\n')
    with open(tmp_path / 'damaged' / 'report.json', 'r+') as file:
        file.truncate(100)
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'report.json').write_text('{"loss": 1.0}')
    before = sorted(tmp_path.rglob('*'))
    try:
        returned = report.main(flags)
    except SystemExit as stop:  # argparse
        returned = stop.code
    err = capsys.readouterr().err
    assert (returned, err.count('\n')) == (status, 1), err
    assert err.startswith('jaxkd: ') and all(word in err for word in words), err
    assert sorted(tmp_path.rglob('*')) == before
