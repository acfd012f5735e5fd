"""A network of one's own in the recipe: by its name, told as it wants, with weights that it has."""

import pathlib

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import jaxkd
from jaxkd import data, metrics, mode, network, pipeline
from jaxkd import plan as planning
from tests import tiny

MODULE = """
from flax import linen as nn
import jax.numpy as jnp


class Net(nn.Module):
    num_classes: int
    width: int = 32

    @nn.compact
    def __call__(self, x, deterministic):
        for features in (16, self.width):
            x = nn.Conv(features, (3, 3), strides=2, use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=deterministic, momentum=0.9)(x)
            x = nn.Dropout(0.1, rng_collection='noise')(nn.relu(x), deterministic)
        return nn.Dense(self.num_classes)(jnp.mean(x, axis=(1, 2)))


class Counting(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.variable('counts', 'calls', lambda: 0)
        return nn.Dense(10)(x.mean((1, 2)))


def seven():
    return Net(7)


def anything(**fields):
    return nn.Dense(**{'features': 4, **fields})


def broken(num_classes):
    return nn.Dense(num_classes, kernel_init=None)


constant = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / 'mine.py').write_text(MODULE)
    (tmp_path / 'ending.py').write_text('raise SystemExit(3)')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__('sys').modules, 'mine', raising=False)
    return tmp_path


def _config(name='mine:Net', **arguments):
    config = tiny.get_config()
    config.model.name = name
    config.model.arguments.update(arguments)
    return config


def test_it_is_learned_from_weights_that_there_are(folder):
    config = _config(width=40)
    model = network.make('mine:Net', {'width': 40}, defaults={'num_classes': 10})
    images, evaluating = jnp.zeros((1, 8, 8, 1)), mode.arguments(model, train=False)
    weights = jax.jit(lambda key: model.init(key, images, **evaluating))(jax.random.key(7))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / 'weights', weights)
    config.teacher.checkpoint = str(folder / 'weights')
    config.data.update(mean=(0.5,), std=(0.25,))
    report = pipeline.run(config, folder / 'run')
    test = data.load('digits', 'test', seed=0, validation=0.1)
    inputs = (test.images / 255 - 0.5) / 0.25
    logits = np.asarray(model.apply(weights, inputs, **evaluating))
    right = np.mean(np.argmax(logits, -1) == test.labels)
    assert report['teacher']['accuracy'] == pytest.approx(right, abs=2 / test.size)
    assert report['seconds'].keys() == {'search', 'distil'}
    assert not (folder / 'run/teacher').exists()
    assert 0.45 < report['reached']['flops'] <= 0.5  # of few channels
    small = jaxkd.load(folder / 'run/compact', model=model)
    assert small.apply(small.variables, inputs[:2], deterministic=True).shape == (2, 10)
    with pytest.raises(jaxkd.CheckpointError, match='was made from mine:Net; hand in'):
        jaxkd.load(folder / 'run/compact')

    config.teacher.tune_epochs = 1.0
    config.teacher.fresh = 'Dense_0/(kernel|bias)'
    fresh = planning.make_plan(config).weights
    assert fresh['params'].keys() == {'BatchNorm_0', 'BatchNorm_1', 'Conv_0', 'Conv_1'}
    config.teacher.fresh = None
    plan = planning.make_plan(config)
    with pipeline.prepared(config, folder / 'tuned', plan) as setup:
        pipeline.learn_teachers(setup, plan)
    rows = [row for row in metrics.read_metrics(folder / 'tuned') if row['stage'] == 'teacher']
    given = [row for row in metrics.read_metrics(folder / 'run') if row['stage'] == 'search']
    assert rows[0]['validation_loss'] == pytest.approx(given[0]['validation_loss'], rel=1e-5)
    assert rows[-1]['epoch'] == 1.0 and rows[-1]['loss'] < rows[0]['validation_loss']

    # What it taught was these weights: others cannot go on with that.
    pathlib.Path(folder / 'run/report.json').unlink()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / 'weights', jax.tree.map(lambda x: x + 1, weights), force=True)
    config.teacher.tune_epochs = None
    with pytest.raises(jaxkd.CheckpointError, match='search'):
        pipeline.run(config, folder / 'run')


def test_what_a_function_does_not_name_it_is_not_given(folder):
    assert network.make('mine:anything', {}, defaults={'num_classes': 10}).features == 4


@pytest.mark.parametrize(
    ('name', 'changes', 'words'),
    [
        ('ending:Net', {}, 'importing ending raises SystemExit: 3'),
        ('mine:seven', {}, r"'mine:seven': its logits are of shape \(1, 7\); digits, with 10"),
        ('mine:nothing', {}, "has no attribute 'nothing'"),
        ('mine:constant', {}, 'neither a function nor a class'),
        ('mine:broken', {}, 'model.arguments .* Dense cannot be called with an image .*8, 8, 1'),
        ('mine:Counting', {}, "has variables in counts; only those in 'params'"),
        ('yours:Net', {}, 'there is no module yours'),
        ('mine', {}, 'your own is named package.module:function'),
        ('mobilenet', {}, r': your own is named \S+; did you mean mobilenet_v\d\?$'),
        ('mine:Net', {'model.arguments.depth': 3}, "unexpected .*'depth'; {} for none"),
        ('mine:Net', {'data.mean': (0.5,)}, 'data.std is needed'),
        ('mine:Net', {'data.mean': (0.5, 0.5), 'data.std': (1.0, 1.0)}, 'have 1 channels'),
        ('mine:Net', {'data.mean': (0.5,), 'data.std': (0.0,)}, 'data.std .* above 0'),
        ('mine:Net', {'teacher.tune_epochs': 1.0}, 'set teacher.epochs'),
        ('mine:Net', {'teacher.checkpoint': 'x', 'teacher.number': 2}, 'set teacher.tune_epochs'),
        ('mine:Net', {'teacher.fresh': 'Dense'}, 'teacher.tune_epochs'),
        (
            'mine:Net',
            {'teacher.checkpoint': 'x', 'teacher.tune_epochs': 1.0, 'teacher.fresh': 'head/'},
            "names no parameter of .*'Dense_0'",
        ),
        (
            'mine:Net',
            {'teacher.checkpoint': 'x', 'teacher.tune_epochs': 1.0, 'teacher.fresh': '^Dense_0/$'},
            "names no parameter of .*'Dense_0'",
        ),
        (
            'mine:Net',
            {'teacher.checkpoint': 'x', 'teacher.tune_epochs': 1.0, 'teacher.fresh': '.'},
            'names every parameter',
        ),
    ],
)
def test_what_cannot_be_is_refused(folder, name, changes, words):
    config = _config(name)
    for field, value in changes.items():
        *parts, last = field.split('.')
        part = config
        for key in parts:
            part = part[key]
        with part.unlocked():
            part[last] = value
    with pytest.raises(jaxkd.ConfigError, match=words):
        planning.make_plan(config)


def test_modes():
    class Both(nn.Module):
        def __call__(self, x, training, use_running_average=None):
            return x

    assert mode.arguments(Both(), train=True) == {'training': True, 'use_running_average': False}
    assert mode.arguments(Both(), train=False) == {'training': False, 'use_running_average': True}
    assert mode.arguments(nn.Dense(1), train=True) == {}
