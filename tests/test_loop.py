"""Stages of training that are stopped, damaged, or whose loss explodes."""

import resource

from flax import linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from jaxkd import checkpoint, data, errors, loop, metrics, train, watch
from jaxkd import mesh as meshes
from tests import tiny

STAGE = {
    'epochs': 3.0,
    'batch_size': 64,
    'learning_rate': 0.1,
    'warmup_epochs': 1.0,
    'final_fraction': 0.1,
    'momentum': 0.9,
    'weight_decay': 0.0,
    'ema_decay': 0.5,
    'accumulate': 1,
    'choose': 'last',
}
CONFIG = {
    'seed': 0,
    'compute_dtype': 'float32',
    'sharding': (),
    'log_every': 4,
    'checkpoint_seconds': 0.0,
    'checkpoint_keep': 2,
    'on_nan': 'stop',
    'nan_factor': 1e-3,
    'nan_times': 1,
    'teacher': STAGE,
}
# 320 images make 5 steps in each of 3 epochs: rows after the steps 4, 5, 8, 10, 12 and 15.
IMAGES = 320


class Tiny(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(16)(x.reshape(len(x), -1))
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(10)(x)


def spoil(step, how):
    """Spoils the update of one step, unless the learning rate was lowered."""

    def update(updates, count, params=None, **extra):
        fast = optax.tree.norm(updates) > 1e-3
        spoiled = jax.tree.map(lambda u: jnp.where(fast & (count == step - 1), how(u), u), updates)
        return spoiled, count + 1

    return optax.GradientTransformationExtraArgs(lambda params: jnp.zeros([], jnp.int32), update)


# Learns less in each epoch.
WORSE = {'choose': 'best', 'learning_rate': 5.0, 'warmup_epochs': 2.0}
NAN = spoil(8, lambda u: u * jnp.nan)  # which the loss of step 9 shows


def fit(workdir, *after, stop=0, given='this', said=None, teacher=None, **fields):
    """A stage as `pipeline` runs one; its end, and what it says."""
    config = ml_collections.ConfigDict(CONFIG | {'teacher': STAGE | (teacher or {})} | fields)
    mesh = meshes.make_mesh()
    learning = data.load('digits', 'train', labels=IMAGES)
    validation = data.load('digits', 'validation')
    display = watch.Display([('teacher', 15)])
    display.message = (said if said is not None else []).append
    variables = Tiny().init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    with metrics.MetricsLog(workdir, say=display.message) as log:
        setup = loop.Setup(
            config=config,
            workdir=workdir,
            stages=('teacher',),
            mesh=mesh,
            train=train.put(learning, mesh),
            validation=train.put(validation, mesh),
            preprocessing=train.Preprocessing(np.full(1, 0.3), np.full(1, 0.4), 1, False),
            chance=np.log(10),
            log=log,
            display=display,
            load=lambda part: data.load('digits', part),
            stops=tiny.After(stop),
        )
        end = loop.fit(
            setup,
            'teacher',
            lambda _: loop.Network(Tiny(), after),
            variables,
            train.hard_loss(0.0),
            facts=lambda _: {},
            given=given,
        )
        return end, loop.chosen(setup, 'teacher', end)


def rows(workdir):
    return [
        {key: value for key, value in row.items() if key not in watch.PERFORMANCE}
        for row in metrics.read_metrics(workdir)
    ]


def assert_same(a, b):
    """To the bit, but for the time that it took."""
    (x, variables_x), (y, variables_y) = a, b
    for one, other in ((x.state, y.state), (variables_x, variables_y)):
        one, other = checkpoint.to_tree(one), checkpoint.to_tree(other)
        assert checkpoint.fingerprint(one) == checkpoint.fingerprint(other)
    assert x.progress.best.step == y.progress.best.step
    assert x.progress.best.metrics == y.progress.best.metrics
    assert x.progress.rollbacks == y.progress.rollbacks


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('whole')
    return workdir, fit(workdir, teacher=WORSE)


def test_stopped_between_rows_and_damaged(whole, tmp_path):
    """Stops in the middle of what a row is the mean of, at an epoch's end, and at the last step."""
    said = []
    options = {'teacher': WORSE, 'said': said}
    for stop, step in ((7, 7), (3, 10), (3, 13)):
        with pytest.raises(errors.Stopped, match=f'SIGTERM after step {step} of 15 of teacher'):
            fit(tmp_path, stop=stop, **options)
        assert checkpoint.Stage(tmp_path / 'teacher').newest() == step
    # The log is a copy of what the checkpoints say; a damaged state counts as none.
    log = tmp_path / 'metrics.jsonl'
    log.write_bytes(
        log.read_bytes().replace(b'"step": 4', b'"step": 6').replace(b'"step": 8', b'?')
    )
    (tmp_path / 'teacher' / '13' / 'tree' / 'manifest.ocdbt').unlink()
    with pytest.raises(errors.Stopped, match='at the end of a stage'):
        fit(tmp_path, stop=3, **options)  # of steps 13 to 15
    assert any('line 4 is damaged' in sentence for sentence in said)
    assert any('13.damaged' in sentence for sentence in said)
    log.unlink()
    again = fit(tmp_path, **options)  # finished before
    assert_same(again, whole[1])
    assert rows(tmp_path) == rows(whole[0])


def test_the_best_variables_are_those_of_the_best_row(whole):
    workdir, (end, chosen) = whole
    found = [row for row in rows(workdir) if 'validation_accuracy' in row]
    best = max(found, key=lambda row: (row['validation_accuracy'], -row['validation_loss']))
    assert [row['step'] for row in found] == [0, 5, 10, 15]
    assert end.progress.best.step == best['step'] < 15
    part = data.load('digits', 'validation')
    images = data.normalize(part.images, np.full(1, 0.3), np.full(1, 0.4))
    for variables, row in ((chosen, best), (train.averaged(end.state), found[-1])):
        right = np.argmax(Tiny().apply(variables, images), -1) == part.labels
        assert np.mean(right) == pytest.approx(row['validation_accuracy'])


def test_nan_stops_and_names_the_last_good_state(tmp_path):
    words = r"loss was nan at step 9; .*/teacher/5\. Lower .*, now 0.1, or set .*'rollback'"
    with pytest.raises(errors.TrainingError, match=words):
        fit(tmp_path, NAN)
    # The state after step 8 was not finite, though no loss had shown it yet.
    assert checkpoint.Stage(tmp_path / 'teacher').newest() == 5


def test_an_absurd_loss_stops_although_it_is_finite(tmp_path):
    wild = spoil(1, lambda u: 1e5 * u)
    with pytest.raises(
        errors.TrainingError, match='mean loss up to step 4 .* no state was saved yet'
    ):
        fit(tmp_path, wild)


def test_going_back_is_the_same_whenever_it_was_stopped_and_saved(tmp_path):
    """From step 10 to 5, the end of the last epoch, although later states were saved."""
    going_back = {'on_nan': 'rollback', 'said': []}
    once = fit(tmp_path / 'once', NAN, checkpoint_seconds=1e9, **going_back)
    why = 'the loss was nan at step 9'
    assert once[0].progress.rollbacks == ({'from': 10, 'to': 5, 'why': why, 'factor': 1e-3},)
    assert (
        f'teacher: {why}; going on at step 5 with 0.001 of the learning rate' in going_back['said']
    )
    found = rows(tmp_path / 'once')
    assert [(row['step'], row.get('rollbacks')) for row in found] == [
        (0, None), (4, None), (5, None), (8, 1), (10, 1), (12, 1), (15, 1),
    ]  # fmt: skip
    assert found[3]['learning_rate'] < 1e-2 * found[2]['learning_rate']

    often = tmp_path / 'often'
    for stop in (7, 1, 5):  # 1: not finite, so that step 7 is gone on from; 5: twice at step 7
        with pytest.raises(errors.Stopped):
            fit(often, NAN, stop=stop, **going_back)
    assert checkpoint.Stage(often / 'teacher').restore()[2]['rollbacks']
    assert_same(fit(often, NAN, **going_back), once)
    assert rows(often) == found


def test_going_back_to_the_start_and_at_most_so_often(tmp_path):
    early = spoil(2, lambda u: u * jnp.nan)
    end, _ = fit(tmp_path / 'start', early, on_nan='rollback')
    assert [back['to'] for back in end.progress.rollbacks] == [0]
    assert [row['step'] for row in rows(tmp_path / 'start')] == [0, 4, 5, 8, 10, 12, 15]

    with pytest.raises(errors.TrainingError, match='after going back 1 times; .*/teacher/0'):
        fit(tmp_path / 'again', early, on_nan='rollback', nan_factor=0.9)


def test_checkpoints_made_with_something_else_are_refused(whole):
    workdir, _ = whole
    with pytest.raises(errors.CheckpointError, match='teacher/result: .* another config'):
        fit(workdir, given='that')


def test_a_full_disk_leaves_the_last_good_state(whole, tmp_path):
    """A limit on the size of files stands for it."""
    with pytest.raises(errors.Stopped):
        fit(tmp_path, stop=7, teacher=WORSE)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, before[1]))
    try:
        with pytest.raises(errors.CheckpointError, match='could not be written'):
            fit(tmp_path, teacher=WORSE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoint.Stage(tmp_path / 'teacher').newest() == 7
    assert_same(fit(tmp_path, teacher=WORSE), whole[1])
    assert rows(tmp_path) == rows(whole[0])
