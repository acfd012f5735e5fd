"""A config of a run of seconds: a tiny network on a few digits, an epoch for each stage."""

import signal

from flax import linen as nn
import jax.numpy as jnp
import ml_collections

from configs import mbv2
from jaxkd import models, stopping


class Tiny(nn.Module):
    """Two convolutions with BatchNorm, and a classifier."""

    num_classes: int

    @nn.compact
    def __call__(self, x, train=False):
        for features in (16, 32):
            x = nn.Conv(features, (3, 3), strides=2, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(self.num_classes)(jnp.mean(x, axis=(1, 2)))


def get_config() -> ml_collections.ConfigDict:
    models.REGISTRY['tiny'] = Tiny
    config = mbv2.get_config()
    config.model = ml_collections.ConfigDict({'name': 'tiny', 'arguments': {}})
    config.data.labels = 640
    config.export = ()  # seconds that most tests are not about
    for stage in ('teacher', 'search', 'distil'):
        config[stage].epochs = 1.0
    config.update(log_every=2, checkpoint_seconds=0.0)
    return config


class After(stopping.Requests):
    """A signal after so many steps; 0 for none."""

    def __init__(self, steps):
        super().__init__()
        self.left = steps

    def hold(self):
        super().hold()
        self.left -= 1
        if not self.left:
            self.asked = signal.SIGTERM
