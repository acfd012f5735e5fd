"""The command line, as a user meets it: whole runs, killed runs, wrong input."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import ml_collections
import numpy as np
import pytest

import jaxkd
from jaxkd import checkpoint, data, metrics, models, pipeline, watch
from jaxkd.models import layers

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHORT = [
    '--config=configs/mbv2.py',
    # Compiled in a fraction of the time.
    '--config.model.name=resnet20',
    "--config.model.arguments={'depth': 8}",
    '--config.teacher.epochs=2',
    '--config.search.epochs=2',
    '--config.search.shrink=0.7',
    '--config.distil.epochs=1',
    '--config.log_every=4',
    '--config.checkpoint_seconds=0.0',
]


@pytest.fixture(scope='session')
def environment(tmp_path_factory):
    """A cache for all processes that test: killed and resumed runs compile the same programs."""
    folder = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        folder = folder.parent
    return os.environ | {'PYTHONPATH': str(ROOT), 'JAXKD_CACHE': str(folder / 'cache')}


def _command(workdir, *flags):
    return [sys.executable, '-m', 'jaxkd.main', *SHORT, f'--workdir={workdir}', *flags]


def _run(environment, workdir, *flags):
    return subprocess.run(
        _command(workdir, *flags), env=environment, cwd=ROOT, capture_output=True, text=True
    )


@pytest.fixture(scope='session')
def finished(environment, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('run') / 'work'
    done = _run(environment, workdir, '--profile')
    assert done.returncode == 0, done.stderr
    return workdir, done


def _report(workdir):
    report = json.loads((workdir / 'report.json').read_text())
    return {key: value for key, value in report.items() if key not in ('seconds', 'sha256')} | {
        name: {k: v for k, v in report[name].items() if k != 'milliseconds'}
        for name in ('teacher', 'compact')
    }


def test_run_meets_the_budget_and_tells(finished):
    workdir, done = finished
    report = json.loads((workdir / 'report.json').read_text())
    teacher, compact = report['teacher'], report['compact']
    assert 0.495 <= compact['flops'] / teacher['flops'] <= 0.5
    assert compact['xla_flops'] < 0.6 * teacher['xla_flops']
    assert 0 <= compact['accuracy'] <= 1
    assert {'teacher', 'search', 'distil'} <= report['seconds'].keys()
    assert report['budget'] == {'flops': 0.5}
    losses = [report['removal'][end]['validation_loss'] for end in ('before', 'after')]
    np.testing.assert_allclose(*losses, rtol=1e-2)
    assert report['removal']['cuts'] >= 1
    assert report['input_shape'] == [8, 8, 1]
    assert all(1 <= row['kept'] <= row['size'] for row in report['blocks'])
    assert any(row['kept'] < row['size'] for row in report['blocks'])
    assert '[search' in done.stderr and 'eta' in done.stderr
    assert 'accuracy' in done.stdout and 'compact' in done.stdout

    rows = metrics.read_metrics(workdir)
    stages = [row['stage'] for row in rows]
    assert sorted(set(stages), key=stages.index) == ['teacher', 'search', 'distil']
    alive = [row['alive_flops'] for row in rows if row['stage'] == 'search']
    assert alive == sorted(alive, reverse=True) and alive[-1] < alive[0]
    searched = [row for row in rows if row['stage'] == 'search']
    for row in searched:
        assert row['share_flops'] == row['alive_flops'] / teacher['flops']
    scheduled = [row['scheduled_flops'] for row in searched]
    assert scheduled == sorted(scheduled, reverse=True)
    assert scheduled[-1] == pytest.approx(0.495)
    search = report['search']
    assert search['budgets'] == {
        'flops': {'alive': searched[-1]['share_flops'], 'scheduled': scheduled[-1]}
    }
    gaps = [abs(r['share_flops'] - r['scheduled_flops']) for r in searched]
    last = searched[-1]['step']
    assert search['error'] == max(g for g, r in zip(gaps, searched) if r['step'] > last / 10)
    for resource in ('flops', 'params'):
        for name in ('teacher', 'compact'):
            total = sum(row[resource][name] for row in report['layers'])
            assert total == report[name][resource]
    for name, confusion in report['confusion'].items():
        confusion, classes = np.array(confusion), report['classes']
        np.testing.assert_array_equal(confusion.sum(1), classes['images'])
        np.testing.assert_array_equal(np.diag(confusion), classes[name])
        assert np.trace(confusion) / confusion.sum() == report[name]['accuracy']
    page = (workdir / 'report.html').read_text()
    assert f'{compact["accuracy"]:.2%}' in page
    assert 'python -m jaxkd.main --config=configs/mbv2.py' in page
    assert (workdir / 'search.png').read_bytes().startswith(b'\x89PNG')
    assert list(workdir.glob('events*'))


def test_run_tells_what_takes_time(finished, environment):
    workdir, done = finished
    found = re.findall(r'(\w+): first step after (\S+) s, (\S+) s of it compiling', done.stderr)
    assert [stage for stage, *_ in found] == ['teacher', 'search', 'distil']
    assert all(0 < float(compiling) < float(seconds) for _, seconds, compiling in found)
    for row in metrics.read_metrics(workdir):
        if row['step'] == 0:
            continue
        assert {'step_seconds', 'data_seconds', 'compile_seconds'} <= row.keys()
        assert 0 <= row['data_seconds'] < row['step_seconds'] < 60
        assert 1e7 < row['memory_bytes'] < 1e11
    for stage in ('teacher', 'search', 'distil'):
        assert list((workdir / 'profile' / stage).rglob('*.xplane.pb'))
    report = json.loads((workdir / 'report.json').read_text())
    for network, listed in (('teacher', 'teacher.txt'), ('compact', 'student.txt')):
        assert f'Total: {report[network]["params"]:,}' in (workdir / listed).read_text()
    assert list(pathlib.Path(environment['JAXKD_CACHE']).glob('compiled-*/jit_step-*'))


def test_compact_model_is_what_was_reported(finished):
    workdir, _ = finished
    report = json.loads((workdir / 'report.json').read_text())
    small = jaxkd.load(workdir / 'compact')
    count = sum(leaf.size for leaf in jax.tree.leaves(small.variables['params']))
    assert count == report['compact']['params']
    test = data.load('digits', 'test')
    mean, std = data.statistics(data.load('digits', 'train', seed=0))
    apply = jax.jit(lambda images: small.apply(small.variables, images))
    logits = apply(data.normalize(test.images, mean, std))
    accuracy = np.mean(np.argmax(logits, -1) == test.labels)
    np.testing.assert_allclose(accuracy, report['compact']['accuracy'], atol=1 / test.size)
    graph = jaxkd.trace(small.module, small.variables, np.zeros((1, 8, 8, 1), np.float32))
    assert graph.cost().flops == report['compact']['flops']


def test_finished_run_prints_its_summary(finished, environment):
    workdir, done = finished
    start = time.monotonic()
    again = _run(environment | {'HOME': str(workdir.parent)}, f'~/{workdir.name}')
    assert again.returncode == 0 and 'finished run' in again.stdout
    assert done.stdout.splitlines()[-1] == again.stdout.splitlines()[-1]
    assert time.monotonic() - start < 60


def test_stopped_and_damaged_runs_end_in_the_same_report(finished, environment, tmp_path):
    """Once in each stage, at a moment when it has saved something; then something is damaged."""
    workdir, stderr = tmp_path / 'work', tmp_path / 'stderr'
    manifest = os.path.join('tree', 'manifest.ocdbt')
    for stage, number in (
        ('teacher', signal.SIGKILL),
        ('search', signal.SIGTERM),
        ('distil', signal.SIGKILL),
    ):
        with open(stderr, 'w') as file:
            process = subprocess.Popen(_command(workdir), env=environment, cwd=ROOT, stderr=file)
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            if any(entry.name.isdigit() for entry in (workdir / stage).glob('*')):
                break
            time.sleep(0.02)
        assert process.poll() is None, f'the run ended before {stage} saved a state'
        process.send_signal(number)
        process.wait()
        if stage == 'teacher':
            (workdir / 'config.json').write_text('{"config": {"seed": 1}}')
        elif stage == 'search':
            assert process.returncode == 143
            last = stderr.read_text().splitlines()[-1]
            assert 'SIGTERM after step' in last and 'the same command goes on' in last
            newest = max(int(p.name) for p in (workdir / stage).glob('*') if p.name.isdigit())
            (workdir / stage / str(newest) / manifest).unlink()
            (workdir / 'metrics.jsonl').write_text('{"stage": "teacher", "step": 4}\n{}\n')
        else:
            # The teacher's last steps are taken again, and what came after it stays.
            (workdir / 'teacher' / 'result' / manifest).unlink()
    done = _run(environment, workdir)
    assert done.returncode == 0, done.stderr
    assert 'result.damaged' in done.stderr and 'distil: going on at step' in done.stderr
    assert _report(workdir) == _report(finished[0])

    def rows(directory):
        return [
            {k: v for k, v in row.items() if k not in watch.PERFORMANCE}
            for row in metrics.read_metrics(directory)
        ]

    assert rows(workdir) == rows(finished[0])


def test_a_damaged_result_is_no_finished_run(finished, tmp_path, monkeypatch):
    workdir, said = tmp_path / 'work', []
    shutil.copytree(finished[0], workdir, ignore=shutil.ignore_patterns('teacher', 'search'))
    config = ml_collections.ConfigDict(json.loads((workdir / 'report.json').read_text())['config'])
    monkeypatch.setenv('HOME', str(tmp_path))
    found = pipeline.finished(config, '~/work', said.append)
    assert found['compact'] == json.loads((workdir / 'report.json').read_text())['compact']
    assert not said
    (workdir / 'compact' / 'metadata' / 'metadata').write_text('{')
    assert pipeline.finished(config, workdir, said.append) is None
    (workdir / 'report.json').write_text('{')
    assert pipeline.finished(config, workdir, said.append) is None
    assert len(said) == 2 and 'work/compact: ' in said[0] and 'report.json.damaged' in said[1]


def _refused(environment, workdir, *flags, status=2):
    done = _run(environment, workdir, *flags)
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
    assert 'Traceback' not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.mark.parametrize(
    ('flags', 'words'),
    [
        (['--config.budget.flops=0.0001'], ['flops', 'cannot be reached', 'in the way']),
        (['--config.budget.flops=-1.0'], ['budget.flops', '-1.0']),
        (['--config.data.name=mnist'], ['data.name', 'mnist', 'fashion_mnist']),
        (['--config.model.name=mobilenet_v9'], ['model.name', 'mobilenet_v2']),
        (["--config.blocks=(('nothing', {'strength': 2.0}),)"], ['nothing', 'stage1_block0/conv1']),
        (["--config.blocks=(('block1/', {'speed': 2.0}),)"], ['speed', 'strength']),
        (['--config.blocks=automatic'], ["'auto'", 'tuple of pairs']),
        (['--config.search.batch_size=100000'], ['search.batch_size', '100000']),
        (['--config.on_nan=retry'], ['on_nan', 'rollback']),
        (['--config.distil.choose=first'], ['distil.choose', 'best']),
        (["--config.distil.losses=(('dkt', {'beta': 2.0}),)"], ['distil.losses', 'mean dkd']),
        (['--config.distil.losses=dkd'], ['distil.losses', 'tuple of pairs']),
        (['--config.search.alternations=2'], ['search.alternations', 'search.expand=True']),
        (['--config.search.expand_from=1.5'], ['search.expand_from', '(0, 1)']),
        (
            [
                '--config.search.expand=True',
                '--config.search.alternations=2',
                "--config.blocks=(('stage3_', {'min_keep': 0.5}),)",
            ],
            ['min_keep', 'alternation', 'int'],
        ),
        (['--config.search.epoch=3'], ['search.epoch', 'epochs']),
        (['--config=configs/mbv2.py:mnist'], ['mnist', 'fashion_mnist']),
        (['--config=configs/nothing.py'], ['configs/nothing.py']),
        (['--workdirs=x'], ['workdirs']),
        (['--workdir'], ['Missing value', '--workdir']),
        (['--config.seed=abc'], ['jaxkd: --config.seed=abc: a whole number']),
        (['--config.search.epochs=1/2'], ['jaxkd: --config.search.epochs=1/2: a number']),
        (['--config.data.flip=maybe'], ['jaxkd: --config.data.flip=maybe: True or False']),
        (['--config.model.arguments=foo'], ['jaxkd: --config.model.arguments=foo: a dict']),
        (['--config.data.mean=(0.1,'], ['jaxkd: --config.data.mean=(0.1,: a tuple']),
        (['--processes=2'], ['--processes', '--distributed']),
    ],
)
def test_wrong_input_is_one_sentence(environment, tmp_path, flags, words):
    sentence = _refused(environment, tmp_path / 'work', *flags)
    assert all(word in sentence for word in words), sentence
    assert not (tmp_path / 'work').exists()


def test_help_is_no_failure(environment, tmp_path):
    done = _run(environment, tmp_path / 'work', '--help')
    assert done.returncode == 0 and '--workdir' in done.stdout and not done.stderr


def test_a_platform_without_a_device_is_named(finished, environment, tmp_path):
    benchmark = [sys.executable, '-m', 'jaxkd.benchmark', str(finished[0])]
    for command in (_command(tmp_path), benchmark):
        done = subprocess.run(
            command,
            env=environment | {'JAX_PLATFORMS': 'abacus'},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert re.search(r"^jaxkd: JAX has no device .*='abacus'.*; unset it", done.stderr, re.M)


def test_workdir_of_another_config(finished, environment):
    before = (finished[0] / 'report.json').read_bytes()
    sentence = _refused(environment, finished[0], '--config.seed=5', '--config.budget.flops=0.25')
    assert 'seed (0 there, 5 now)' in sentence and 'budget.flops' in sentence
    assert (finished[0] / 'report.json').read_bytes() == before


def test_workdir_that_cannot_be_written(environment, tmp_path):
    (tmp_path / 'file').write_text('')
    assert 'cannot be written' in _refused(environment, tmp_path / 'file' / 'work')


def test_nan_loss_stops_with_the_step(environment, tmp_path):
    flags = '--config.teacher.learning_rate=1e30'
    done = _run(environment, tmp_path / 'work', flags)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    sentence = done.stderr.splitlines()[-1]
    assert 'teacher' in sentence and 'step' in sentence and 'learning_rate' in sentence


def test_blocks_and_several_budgets_from_the_command_line(environment, tmp_path):
    done = _run(
        environment,
        tmp_path / 'work',
        '--config.teacher.epochs=1',
        '--config.search.epochs=1',
        '--config.budget.flops=0.7',
        '--config.budget.params=0.4',
        "--config.blocks=(('stage1_block0', {'freeze': True}), "
        "('stage2_block0', {'min_keep': 0.5}), ('stage3_', {'start': 0.2, 'end': 0.9, "
        "'resource': 'params', 'budget': {'flops': 0.5}}))",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / 'work' / 'report.json').read_text())
    reached = report['reached']
    assert reached['flops'] <= 0.7 and reached['params'] <= 0.4
    assert reached['flops'] >= 0.99 * 0.7 or reached['params'] >= 0.99 * 0.4
    kept = {row['group']: row for row in report['blocks']}
    assert kept['stage1_block0/conv1/conv']['kept'] == 16
    assert kept['stage2_block0/conv1/conv']['kept'] >= 16
    assert list(report['search']['budgets']) == ['flops[stage3_]', 'flops', 'params']


def test_a_criterion_in_rounds_and_new_weights_from_the_command_line(environment, tmp_path):
    """In blocks that are found; the report says which of them each group falls in."""
    done = _run(
        environment,
        tmp_path / 'work',
        "--config.model.arguments={'depth': 14}",  # two blocks in a stage
        '--config.teacher.epochs=1',
        '--config.search.epochs=1',
        '--config.search.method=taylor',
        '--config.search.rounds=2',
        '--config.distil.init=scratch',
        '--config.distil.recalibrate=3',
        '--config.blocks=auto',
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / 'work' / 'report.json').read_text())
    assert 0.99 * 0.5 <= report['reached']['flops'] <= 0.5
    rows = [row for row in metrics.read_metrics(tmp_path / 'work') if row['stage'] == 'search']
    shares = [row['alive_flops'] / report['teacher']['flops'] for row in rows]
    assert shares[0] == 1 and 0.5**0.5 - 0.01 < shares[1] <= 0.5**0.5 and shares[-1] <= 0.5
    block = {row['group']: row['block'] for row in report['blocks']}
    assert block['stage2_block1/conv1/conv'] == '^stage2_block1(/|$)'
    assert block['classifier'] == ''
    # New weights, which have learned nothing in an epoch.
    assert report['removal']['after'] != report['removal']['before']


def test_searches_alternate_with_expansions(environment, tmp_path):
    """Killed in the second search; what is widened twice ends at the budget, wider in places."""
    flags = (
        '--config.teacher.epochs=1',
        '--config.search.epochs=4',
        '--config.search.expand=True',
        '--config.search.alternations=2',
    )
    workdir = tmp_path / 'work'
    process = subprocess.Popen(
        _command(workdir, *flags),
        env=environment,
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        if any(entry.name.isdigit() for entry in (workdir / 'search2').glob('*')):
            break
        time.sleep(0.02)
    assert process.poll() is None, 'the run ended before search2 saved a state'
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = _run(environment, workdir, *flags)
    assert done.returncode == 0, done.stderr
    assert 'search2: going on at step' in done.stderr and 'search2: widened by' in done.stderr

    report = json.loads((workdir / 'report.json').read_text())
    assert 0.99 * 0.5 <= report['reached']['flops'] <= 0.5
    assert any(row['kept'] > row['size'] for row in report['blocks'])
    assert list(report['seconds']) == ['teacher', 'search', 'search2', 'distil']
    for row, stage in zip(report['expand'], ('search', 'search2'), strict=True):
        assert row['stage'] == stage and row['factor'] > 1 and row['held'] == {}
        assert (workdir / f'{stage}.png').exists()
    lowered = [row['search']['budgets']['flops']['scheduled'] for row in report['expand']]
    np.testing.assert_allclose(lowered, [0.3465, 0.693], atol=0.02)  # of what each began with
    small = jaxkd.load(workdir / 'compact')
    graph = jaxkd.trace(small.module, small.variables, np.zeros((1, 8, 8, 1), np.float32))
    assert graph.cost().flops == report['compact']['flops']


def test_saved_models_are_checked(tmp_path):
    model = models.create('resnet20', num_classes=3, depth=8)
    image = np.ones((1, 32, 32, 3), np.float32)
    variables = model.init(jax.random.key(0), image)
    small = jaxkd.prune(model, variables, image, params=0.5)
    jaxkd.save(tmp_path / 'small', small)
    again = jaxkd.load(tmp_path / 'small')
    np.testing.assert_array_equal(
        again.apply(again.variables, image), small.apply(small.variables, image)
    )
    assert again.structure == small.structure

    largest = max((tmp_path / 'small').rglob('*'), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(jaxkd.CheckpointError):
        jaxkd.load(tmp_path / 'small')


def test_models_from_outside_are_handed_in(tmp_path):
    class Mine(layers.ConvBN):
        """A class that the registry does not know."""

    class Other(layers.ConvBN):
        """With variables of the same names and shapes."""

    model = Mine(8, 3)
    image = np.ones((1, 8, 8, 3), np.float32)
    variables = {'params': {}, **model.init(jax.random.key(0), image)}
    graph = jaxkd.trace(model, variables, image)
    small = jaxkd.compact(graph, variables, graph.keep_all())
    jaxkd.save(tmp_path / 'small', small)
    with pytest.raises(jaxkd.CheckpointError, match='model='):
        jaxkd.load(tmp_path / 'small')
    again = jaxkd.load(tmp_path / 'small', model=model)
    np.testing.assert_array_equal(
        again.apply(again.variables, image), small.apply(small.variables, image)
    )
    # The shapes of its variables would fit; functions cannot be compared.
    with pytest.raises(jaxkd.CheckpointError, match=r'stride \(1 there, 2 now\); make the model'):
        jaxkd.load(tmp_path / 'small', model=Mine(8, 3, stride=2))
    jaxkd.load(tmp_path / 'small', model=Mine(8, 3, activation=jax.nn.gelu))
    with pytest.raises(jaxkd.CheckpointError, match='Mine, and the model .* of the class Other'):
        jaxkd.load(tmp_path / 'small', model=Other(8, 3))
    for wrong in (Mine, 3):
        with pytest.raises(jaxkd.ConfigError, match='model is .* not its class'):
            jaxkd.load(tmp_path / 'small', model=wrong)


def test_a_file_runs_nothing_and_writes_nowhere(tmp_path):
    model = models.create('vgg11_bn', num_classes=3, depths=(1, 0, 0, 0, 0), small_images=True)
    image = np.ones((1, 32, 32, 3), np.float32)
    variables = model.init(jax.random.key(0), image)
    small = jaxkd.prune(model, variables, image, params=0.5)
    jaxkd.save(tmp_path / 'in' / 'small', small)
    tree, metadata = checkpoint.read(tmp_path / 'in' / 'small')
    tree['params']['../../../escaped'] = {'/tmp/../..': np.ones(2)}
    forged = tmp_path / 'in' / 'forged'
    for change, words in (
        ({'model': {'module': 'this', 'class': 's', 'arguments': {}}}, 'made from this:s; hand in'),
        ({'model': {'module': 'jaxkd.models.mobilenet'}}, "KeyError: 'class'"),
        ({'model': 'os:system'}, 'TypeError'),
        ({'widths': ['conv']}, 'AttributeError'),
        ({'groups': None, 'code': 'print()'}, 'TypeError'),
        ({'widths': {'conv': {'kernel': 'abc'}}}, 'not of the widths'),
        ({'fields': {'conv': {'features': 'os'}}}, 'ValueError'),
    ):
        checkpoint.write(forged, tree, metadata | {'structure': metadata['structure'] | change})
        with pytest.raises(jaxkd.CheckpointError) as refused:
            jaxkd.load(forged)
        assert words in str(refused.value)
    assert 'this' not in sys.modules
    assert checkpoint.read(forged)[0]['params'].keys() == tree['params'].keys()
    assert [path.name for path in tmp_path.iterdir()] == ['in']
    assert {path.name for path in (tmp_path / 'in').iterdir()} == {'small', 'forged'}
