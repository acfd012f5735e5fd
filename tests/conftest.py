"""How much XLA optimizes in tests; compact networks on disk, for what works with them."""

import functools
import os

import jax
import numpy as np
import pytest

import jaxkd
from jaxkd import models

# Most time goes into compiling programs that then run a few times: less of that, here and in the
# commands that tests start. .ci/run runs the README's main job with all of it.
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
jax.config.update('jax_disable_most_optimizations', True)

# Programs that took less to compile are compiled again, rather than kept.
KEPT_FROM = 0.3

MODULE = """
from flax import linen as nn


class Net(nn.Module):
    padding: str = 'VALID'

    @nn.compact
    def __call__(self, image, frozen):
        x = nn.relu(nn.Conv(64, (3, 3), padding=self.padding, name='first')(image))
        x = nn.relu(nn.Conv(64, (3, 3), name='second')(x))
        return nn.Dense(5, name='head')(x.mean((1, 2)))
"""


@pytest.fixture(scope='session', autouse=True)
def compiled_once(tmp_path_factory):
    """Stages that go on, and networks that are made again, compile the same programs."""
    jax.config.update('jax_compilation_cache_dir', str(tmp_path_factory.mktemp('compiled')))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', KEPT_FROM)


@pytest.fixture
def optimized():
    """For a test of many steps in XLA's own convolutions, some of which become loops."""
    jax.config.update('jax_disable_most_optimizations', False)
    yield
    jax.config.update('jax_disable_most_optimizations', True)


@pytest.fixture(scope='session')
def saved_networks(tmp_path_factory):
    """What jaxkd.save wrote: `own`, of a model that jaxkd doesn't know, and `known`."""
    folder = tmp_path_factory.mktemp('saved')
    (folder / 'own_net.py').write_text(MODULE)
    image = np.zeros((2, 32, 32, 3), np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        import own_net
    for name, model, flags in (
        ('own', own_net.Net('SAME'), {'frozen': True}),
        ('known', models.create('resnet20', num_classes=3), {'train': False}),
    ):
        init = jax.jit(functools.partial(model.init, **flags))
        variables = init(jax.random.key(0), image)
        small = jaxkd.prune(model, variables, image, flops=0.3, criterion='l1', **flags)
        jaxkd.save(folder / name, small)
    return folder, own_net.Net('SAME')


@pytest.fixture
def folder(saved_networks, monkeypatch):
    monkeypatch.chdir(saved_networks[0])
    return saved_networks[0]


@pytest.fixture
def own_model(saved_networks):
    """That of `own`, at full width."""
    return saved_networks[1]
