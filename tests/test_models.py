"""Every network of the registry: its published size, and that it can be cut."""

import functools

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
from nets import xla_multiply_adds
import numpy as np
import optax
import pytest

import jaxkd
from jaxkd import models
from jaxkd.graph import cut as cutting
from jaxkd.graph import structure

# Side of the images, classes, parameters.
# GhostNet is counted from the layers of the authors' released weights. U-Net by hand, for 3
# channels and 2 classes: 9·(766·64² + 3·64) of the 3×3 convolutions, 2·2·2944 of their BatchNorms,
# 4·170·64² + 960 of the transposed convolutions, 2·64 + 2 at the end.
PUBLISHED = {
    'convnext_tiny': (224, 1000, 28_589_128),
    'densenet121': (224, 1000, 7_978_856),
    'densenet_bc_100_12': (32, 10, 769_162),
    'efficientnet_b0': (224, 1000, 5_288_548),
    'efficientnet_b1': (240, 1000, 7_794_184),
    'efficientnet_b2': (260, 1000, 9_109_994),
    'efficientnet_b3': (300, 1000, 12_233_232),
    'efficientnet_b4': (380, 1000, 19_341_616),
    'efficientnet_b5': (456, 1000, 30_389_784),
    'efficientnet_b6': (528, 1000, 43_040_704),
    'efficientnet_b7': (600, 1000, 66_347_960),
    'ghostnet': (224, 1000, 5_182_508),
    'googlenet': (224, 1000, 6_624_904),
    'inception_v3': (299, 1000, 23_834_568),
    'mobilenet_v1': (224, 1000, 4_231_976),
    'mobilenet_v2': (224, 1000, 3_504_872),
    'mobilenet_v3_large': (224, 1000, 5_483_032),
    'mobilenet_v3_small': (224, 1000, 2_542_856),
    'mobilevit_s': (256, 1000, 5_578_632),
    'mobilevit_xs': (256, 1000, 2_317_848),
    'mobilevit_xxs': (256, 1000, 1_272_024),
    'regnet_y_400mf': (224, 1000, 4_344_144),
    'regnet_y_800mf': (224, 1000, 6_432_512),
    'resnet18': (224, 1000, 11_689_512),
    'resnet20': (32, 10, 269_722),
    'resnet34': (224, 1000, 21_797_672),
    'resnet50': (224, 1000, 25_557_032),
    'resnet56': (32, 10, 853_018),
    'resnet101': (224, 1000, 44_549_160),
    'resnet110': (32, 10, 1_727_962),
    'resnet152': (224, 1000, 60_192_808),
    'resnext50_32x4d': (224, 1000, 25_028_904),
    'shufflenet_v1': (224, 1000, 1_865_728),
    'shufflenet_v2_x0_5': (224, 1000, 1_366_792),
    'shufflenet_v2_x1_0': (224, 1000, 2_278_604),
    'squeezenet1_0': (224, 1000, 1_248_424),
    'squeezenet1_1': (224, 1000, 1_235_496),
    'unet': (256, 2, 31_037_698),
    'vgg11_bn': (224, 1000, 132_868_840),
    'vgg16_bn': (224, 1000, 138_365_992),
    'vgg19_bn': (224, 1000, 143_678_248),
    'wide_resnet16_4': (32, 10, 2_748_890),
    'wide_resnet28_10': (32, 10, 36_479_194),
    'wide_resnet50_2': (224, 1000, 68_883_240),
}

# One of each kind, in a form for small images, and the share of its parameters that is left when
# about half of every group is kept.
MOBILE = {'stem_stride': 1, 'strides': (1, 2, 2, 2, 1, 2, 1)}
SMALL = {
    'convnext_tiny': ({'stem_stride': 2}, 0.6),  # LayerNorm freezes what runs along the stages
    'densenet_bc_100_12': ({}, 0.45),
    'efficientnet_b0': (MOBILE, 0.45),
    'ghostnet': ({'stem_stride': 1}, 0.45),
    'googlenet': ({'small_images': True}, 0.45),
    'inception_v3': ({'small_images': True}, 0.45),
    'mobilenet_v1': ({'stem_stride': 1}, 0.45),
    'mobilenet_v2': (MOBILE, 0.45),
    'mobilenet_v3_large': ({'stem_stride': 1}, 0.45),
    'mobilenet_v3_small': ({'stem_stride': 1}, 0.45),
    'mobilevit_xxs': ({'stem_stride': 1}, 0.45),
    'regnet_y_400mf': ({'small_images': True}, 0.45),
    'resnet20': ({}, 0.45),
    'resnet18': ({'small_images': True}, 0.45),
    'resnet50': ({'small_images': True}, 0.45),
    'resnext50_32x4d': ({'small_images': True}, 0.45),
    # Shuffled in threes, then convolved in three groups of 20, 40 or 80 channels, which three does
    # not divide: nothing between the two can be removed without changing what is shuffled where.
    'shufflenet_v1': ({'stem_stride': 1, 'pool_stride': 1}, 0.6),
    'shufflenet_v2_x0_5': ({'stem_stride': 1, 'pool_stride': 1}, 0.5),  # half of it is the head
    'squeezenet1_1': ({'small_images': True}, 0.45),
    'unet': ({'base_width': 16}, 0.45),
    'vgg16_bn': ({'small_images': True}, 0.45),
    'wide_resnet16_4': ({}, 0.45),
}


@pytest.mark.parametrize('name', models.REGISTRY)
def test_published_size_and_a_record_that_makes_it_again(name):
    side, classes, parameters = PUBLISHED[name]
    model = models.create(name)
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables['params'])) == parameters
    assert logits.shape == ((1, side, side, 2) if name == 'unet' else (1, classes))
    assert structure.describe(model)['arguments'] is not None


@functools.cache
def traced(name):
    model = models.create(name, num_classes=10, **SMALL[name][0])
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return jaxkd.trace(model, variables, images, train=False)


def half(graph, seed):
    random = np.random.default_rng(seed)
    keep = graph.keep_all()
    for group in graph.groups:
        if not group.frozen:
            keep[group.name][random.permutation(group.size)[: group.size // 2]] = False
    return keep


@pytest.mark.filterwarnings('ignore:.*no channel can be removed')
@pytest.mark.parametrize('name', SMALL)
def test_every_layer_costs_what_xla_says(name):
    rows = [row.flops for row in traced(name).cost().by_layer() if row.flops]
    np.testing.assert_allclose(sorted(rows), sorted(xla_multiply_adds(traced(name))), rtol=0.02)


@pytest.mark.filterwarnings('ignore:.*no channel can be removed')
@pytest.mark.parametrize('name', SMALL)
@hypothesis.settings(
    max_examples=2,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[hypothesis.Phase.generate],  # a smaller seed is no simpler one
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(st.integers(0, 1000))
def test_halved_at_random(name, seed):
    graph = traced(name)
    assert not graph.unknown
    keep = half(graph, seed)
    assert jaxkd.verify(graph, keep) <= cutting.TOLERANCE
    assert graph.cost(keep).params <= SMALL[name][1] * graph.cost().params
    shapes = jaxkd.cut(graph, graph.variables, keep)
    small = structure.module(graph.model, structure.record(graph, keep, shapes))
    again = jaxkd.trace(small, shapes, *graph.inputs, train=False)
    assert again.cost() == graph.cost(keep)


# Those of which a training step is not only traced but compiled and run, which takes long.
TRAINED = ('mobilenet_v3_small', 'resnet20', 'squeezenet1_1', 'unet')


@pytest.mark.filterwarnings('ignore:.*no channel can be removed')
@pytest.mark.parametrize('name', SMALL)
def test_a_compact_network_learns(name):
    """One step downhill, in training mode, from the compact network's own initial variables."""
    graph = traced(name)
    keep = half(graph, 0)
    shapes = jaxkd.cut(graph, graph.variables, keep)
    small = structure.module(graph.model, structure.record(graph, keep, shapes))
    keys = {'params': jax.random.key(0), 'dropout': jax.random.key(1)}
    images = jax.random.normal(jax.random.key(2), (4, 32, 32, 3))

    def step(images):
        variables = small.init(keys, images, train=False)
        params = variables.pop('params')

        def loss(params):
            logits, _ = small.apply(
                {'params': params, **variables},
                images,
                train=True,
                mutable=['batch_stats'],
                rngs={'dropout': keys['dropout']},
            )
            labels = jnp.zeros(logits.shape[:-1], int)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, grads = jax.value_and_grad(loss)(params)
        params = jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads)
        return value, loss(params), optax.global_norm(grads)

    if name not in TRAINED:
        assert all(found.shape == () for found in jax.eval_shape(step, images))
        return
    compiled = jax.jit(step).lower(images).compile(compiler_options=cutting.QUICK)
    before, after, norm = compiled(images)
    assert after < before and np.isfinite(norm)
