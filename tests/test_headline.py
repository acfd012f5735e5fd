"""benchmarks/headline.py: what runs share, what is run again, and the arithmetic of its table."""

import argparse
import functools
import importlib.util
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from jaxkd import data

BENCHMARKS = pathlib.Path(__file__).parents[1] / 'benchmarks'


@pytest.fixture(scope='module')
def headline():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location('headline', BENCHMARKS / 'headline.py')
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))


def row(method, seed, accuracy, budget='flops:0.5', **changes):
    return {
        'network': 'mobilenet_v2',
        'data': 'digits',
        'labels': None,
        'method': method,
        'budget': '' if method == 'baseline' else budget,
        'seed': seed,
        'accuracy': accuracy,
        'flops': 100 if method == 'baseline' else 50,
        'params': 10,
        'epochs': 77,
        'seconds': 9,
        'device': 'here',
        **changes,
    }


ROWS = [
    *(row('baseline', seed, accuracy) for seed, accuracy in enumerate((0.90, 0.92, 0.91))),
    *(row('jaxkd', seed, accuracy) for seed, accuracy in enumerate((0.92, 0.93, 0.94))),
    row('l1', 1, 0.91),
]


def test_gains_are_paired_by_seed(headline):
    """Gains 2, 1 and 3 points: mean 2, deviation 1; t(0.975, 2) = 4.3027, over √3: 2.484."""
    base, own, peer = headline.comparison.summarize(ROWS)
    assert (base['gain'], base['interval']) == (0, 0)
    assert own['gain'] == pytest.approx(0.02)
    assert own['interval'] == pytest.approx(0.02484, abs=1e-5)
    assert own['spread'] == pytest.approx(0.01)
    # Of one seed there is a difference to that seed's baseline, and no spread.
    assert peer['gain'] == pytest.approx(-0.01)
    assert peer['spread'] is None and peer['interval'] is None


def test_rows_of_an_earlier_recipe_are_left_out(headline):
    about = argparse.Namespace(network='mobilenet_v2', data='digits', labels=None)
    now = headline.flags_of(
        about, headline.Task('baseline', '', 0), headline.recipe('digits', None)
    )
    rows = [row('baseline', 0, 0.9, flags=flags) for flags in (now, [*now, '--config.x=1'])]
    assert headline.current(rows) == rows[:1]


def test_pages_are_filled_between_the_marks_that_name_what_they_have(headline, tmp_path):
    write = functools.partial(headline.comparison.write_pages, rows=ROWS, results=tmp_path)
    mark = '<!-- {}: made by benchmarks/headline.py -->\nold\n<!-- {}: end -->'.format
    digits = 'headline-mobilenet_v2-digits-all'
    first = {'what': 'as it is', 'seed': 0, 'compact': 0.9, 'epochs': 100, 'changed': []}
    then = first | {
        'what': 'more',
        'compact': 0.91,
        'unseen': 0.905,
        'changed': ['--config.a=1', '--config.b=2'],
    }
    (tmp_path / 'tried.json').write_text(json.dumps({'rows': [first, then]}))
    (tmp_path / 'docs').mkdir()
    readme, page = tmp_path / 'README.md', tmp_path / 'docs/page.md'
    readme.write_text(f'before\n{mark(digits, digits)}\nafter\n')
    page.write_text(f'{mark("tried", "tried")}\nbetween\n{mark(digits, digits)}')
    for _ in range(2):  # what is there is replaced
        write([readme, page])
    text = readme.read_text()
    assert text.startswith('before\n') and text.endswith('\nafter\n') and 'old' not in text
    row = '| flops:0.5 | jaxkd | 93.00 ± 1.00 | +2.00 ± 2.48 | 0.500 | 1.000 | 77 | 3 |'
    assert text.count(row) == 1
    assert f'({digits}.svg)' in text and (tmp_path / f'{digits}.svg').exists()
    tried, own = page.read_text().split('\nbetween\n')
    rows = '| more | `a=1 b=2` | 100 | 91.00 | +1.00 | 90.50 |\n| as it is |  | 100 | 90.00 |  |  |'
    assert rows in tried and row not in tried
    assert row in own and f'(../{digits}.svg)' in own
    readme.write_text('no marks')
    with pytest.raises(SystemExit, match=f'NAME one of {digits}, tried'):
        write([readme])
    readme.write_text(mark('headline-x', 'headline-x'))
    with pytest.raises(SystemExit, match='there is no headline-x, but'):
        write([readme])


@pytest.mark.parametrize('name', ['digits', 'cifar10', 'imagenet'])
def test_rows_are_made_once_and_what_they_share_comes_first(headline, tmp_path, name):
    arguments = argparse.Namespace(
        network='mobilenet_v2',
        data=name,
        labels=None,
        methods=list(headline.METHODS),
        budgets=['flops:0.5'],
        seeds=2,
        torch_python='python',
    )
    tasks = headline.tasks(arguments)
    assert {task.method for task in tasks} == set(headline.METHODS)
    how = headline.recipe(name, None)
    for number, task in enumerate(tasks):
        needed = headline.needs(task, tasks[:number])
        assert (headline.Task('baseline', '', task.seed) in needed) == (task.method != 'baseline')
        if task.method in ('scratch', 'uniform_kd'):
            assert task._replace(method='jaxkd') in needed
        flags = headline.flags_of(arguments, task, how)
        known = row(*task[::2], 0.9, task.budget, flags=flags, data=name)
        assert headline._same(known, arguments, task)
        assert not headline._same(known | {'flags': flags[1:]}, arguments, task)
    # All of a seed begin with the baseline's teacher, and with the others that there are.
    task = headline.Task('scratch', 'flops:0.5', 0)
    folders = [f'jaxkd-flops_0_5-0/{stage}' for stage in ('search', 'teacher2', 'teacher3')]
    for folder in ('baseline-0/teacher', 'jaxkd-flops_0_5-1/teacher4', *folders):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / 'jaxkd-flops_0_5-0/teacher2/result').mkdir()
    (tmp_path / 'jaxkd-flops_0_5-1/teacher4/result').mkdir()  # of another seed
    headline.share(tmp_path, task)
    shared = {path.name for path in (tmp_path / task.name()).iterdir()}
    assert shared == {'teacher', 'teacher2', 'search'}


@pytest.mark.parametrize(('data', 'labels'), [('digits', None), ('fashion_mnist', 5000)])
def test_all_methods_train_as_long(headline, data, labels):
    arguments = argparse.Namespace(network='mobilenet_v2', data=data, labels=labels)
    how = headline.recipe(data, labels)
    for method in headline.METHODS:
        if method == 'baseline':
            continue
        flags = headline.flags_of(arguments, headline.Task(method, 'flops:0.5', 0), how)
        fields = dict(flag.removeprefix('--config.').split('=', 1) for flag in flags)
        teacher, search, distil = (
            float(fields.get(f'{stage}.epochs', 0)) for stage in ('teacher', 'search', 'distil')
        )
        spent = int(fields.get('teacher.number', 1)) * teacher + search + distil
        if fields.get('distil.init') == 'scratch' and method != 'uniform_kd':
            spent = distil  # the others have made the structure, or nothing
        assert spent == pytest.approx(how.total, abs=2 * headline.NONE), method


def test_others_are_shown_what_a_run_sees(tmp_path):
    """Without shifts and flips: the images themselves, each with its label, in batches."""
    flags = [
        '--config=configs/mbv2.py:digits',
        '--config.data.padding=0',
        '--config.data.labels=90',
    ]
    flags += [f'--config.{stage}.batch_size=32' for stage in ('teacher', 'search', 'distil')]
    flags += ['--config.data.validation=0.1', '--config.distil.augment.erasing=1.0']
    flags += ['--config.teacher.epochs=2', '--config.search.epochs=1', '--config.distil.epochs=1']
    command = [sys.executable, str(BENCHMARKS / 'headline.py'), f'--views={tmp_path}/views', *flags]
    subprocess.run(command, check=True, cwd=BENCHMARKS.parent)
    known = data.load('digits', 'train', seed=0, labels=90, validation=0.1)
    label = {image.tobytes(): label for image, label in zip(known.images, known.labels)}
    images, labels = (np.load(tmp_path / f'views/teacher-{of}.npy') for of in ('images', 'labels'))
    assert labels.shape == (2 * (81 // 32), 32)
    assert [label[image.tobytes()] for image in images.reshape(-1, 8, 8, 1)] == [*labels.flat]
    assert len({image.tobytes() for image in images[:2].reshape(-1, 8, 8, 1)}) == 64
    erased = np.load(tmp_path / 'views/distil-images.npy')
    np.testing.assert_array_equal(labels[:2], np.load(tmp_path / 'views/distil-labels.npy'))
    assert (erased != images[:2]).any((2, 3, 4)).mean() > 0.9
    settings = json.loads((tmp_path / 'views/config.json').read_text())['teacher']
    assert (settings['steps'], settings['steps_per_epoch']) == (4, 2)
