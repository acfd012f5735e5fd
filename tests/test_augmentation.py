"""Augmentation on the device: by hand, against PIL, and what must hold for any images."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image, ImageEnhance, ImageOps
import pytest

from configs import mbv2
from jaxkd import data, errors, train
from jaxkd import mesh as meshes
from jaxkd import plan as planning
from jaxkd.data import operations
from jaxkd.data.split import in_memory

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(9, 240, (16, 40, 40, 3)).astype(np.uint8)
EVERYTHING = data.Augmentation(0.4, True, 0.5, 0.2, 1.0)


def test_defaults_change_nothing():
    images, share = data.vary(KEY, IMAGES, data.Augmentation())
    assert images is IMAGES and share is None
    for mix in (data.mixup, data.cutmix):
        images, share = mix(KEY, IMAGES, 0.0)
        assert images is IMAGES and (share == 1).all()


def test_everything_at_once_keeps_shape_and_dtype_and_depends_on_the_key_alone():
    vary = jax.jit(functools.partial(data.vary, augmentation=EVERYTHING))
    for dtype, channels in [(np.uint8, 1), (np.float32, 3), (np.float32, 1), (jnp.bfloat16, 3)]:
        images = jax.ShapeDtypeStruct((4, 9, 8, channels), dtype)
        varied, share = jax.eval_shape(vary, KEY, images)
        assert varied.shape == images.shape and varied.dtype == dtype
        assert share.shape == (4,) and share.dtype == np.float32
    varied, share = vary(KEY, IMAGES)
    assert varied.shape == IMAGES.shape and varied.dtype == np.uint8
    assert share.min() >= 0 and share.max() <= 1
    assert (vary(KEY, IMAGES)[0] == varied).all()
    other = vary(jax.random.key(1), IMAGES)[0]
    assert (varied != other).mean((1, 2, 3)).min() > 0.5  # in each image, and most of it


def test_settings_are_checked():
    assert data.make_augmentation({'mixup': 0.2}) == data.Augmentation(mixup=0.2)
    for settings, words in [
        ({'mixup': -1.0}, 'data.augment.mixup is -1.0'),
        ({'erasing': 1.5}, 'data.augment.erasing is 1.5: it must be at most 1'),
        ({'cut_mix': 1.0}, 'data.augment.cut_mix .* cutmix'),
    ]:
        with pytest.raises(errors.ConfigError, match=words):
            data.make_augmentation(settings)
    config = mbv2.get_config()
    config.data.augment.mixup = 0.2
    config.distil.augment.cutmix = 1.0
    # The distillation says what it does otherwise.
    found = planning.distil_augmentation(config)
    assert found == data.Augmentation(mixup=0.2, cutmix=1.0)
    config.distil.augment.erasing = 2.0
    with pytest.raises(errors.ConfigError, match='distil.augment.erasing is 2.0'):
        planning.make_plan(config)
    config.data.augment.cutmix = -1.0
    with pytest.raises(errors.ConfigError, match='data.augment.cutmix is -1.0'):
        planning.make_plan(config)


# Mixtures

mixup = jax.jit(data.mixup, static_argnums=2)


def test_mixup_by_hand():
    """Of images all 100, 200 and 0, each is blended with the one before it."""
    images = np.array([100, 200, 0], np.float32)[:, None, None, None] * np.ones((1, 2, 2, 1))
    mixed, share = mixup(KEY, images.astype(np.float32), 1.0)
    expected = [100 * share[0], 200 * share[1] + 100 * (1 - share[1]), 200 * (1 - share[2])]
    np.testing.assert_allclose(mixed[:, 0, 0, 0], expected, rtol=1e-6)
    assert (mixed == mixed[:, :1, :1]).all()
    rounded, _ = mixup(KEY, images.astype(np.uint8), 1.0)
    np.testing.assert_array_equal(rounded, np.round(mixed))
    normalized, _ = mixup(KEY, images.astype(np.float32) - 150, 1.0)
    np.testing.assert_allclose(normalized, mixed - 150, atol=1e-4)
    assert data.partners(jnp.array([5, 6, 7])).tolist() == [7, 5, 6]
    many = mixup(KEY, np.zeros((4000, 1, 1, 1), np.float32), 0.2)[1]
    np.testing.assert_allclose(many.mean(), 0.5, atol=0.03)
    np.testing.assert_allclose(many.var(), 0.25 / 1.4, atol=0.01)  # of Beta(α, α): 1/4(2α + 1)


def test_cutmix_pastes_one_rectangle_and_counts_its_pixels():
    numbers = np.arange(64, dtype=np.float32)[:, None, None, None] * np.ones((1, 12, 10, 1))
    pasted, share = jax.jit(data.cutmix, static_argnums=2)(KEY, numbers.astype(np.float32), 1.0)
    own = np.asarray(pasted[..., 0] == numbers[..., 0])
    assert (
        np.asarray(pasted[..., 0]) == np.where(own, numbers[..., 0], (numbers[..., 0] - 1) % 64)
    ).all()
    np.testing.assert_allclose(share, own.mean((1, 2)), atol=1e-6)
    for other in ~own:
        rows, columns = other.any(1).sum(), other.any(0).sum()
        assert other.sum() == rows * columns
    assert 0.6 < share.mean() < 0.9 and share.min() < 0.5


class Reads(nn.Module):
    """Its first logit is the image's mean value."""

    @nn.compact
    def __call__(self, x, train=False):
        shift = self.param('shift', nn.initializers.zeros, ())
        return jnp.pad(255 * x.mean((1, 2)), ((0, 0), (0, 9))) + shift


def test_labels_are_mixed_as_images_are():
    """Images are all of the value of their label, so that a mixture's mean is its label's mean.

    The first term of the loss is then nothing. The other, like accuracy, is the share of class 0,
    which is always the answer.
    """
    labels = np.arange(16, dtype=np.int32) * 13 % 10
    images = (labels[:, None, None, None] * np.ones((1, 8, 8, 1))).astype(np.float32)
    weights = jnp.asarray(RNG.normal(size=16))  # without, errors would cancel in the mean
    mesh = meshes.make_mesh()
    batch = train.make_batch(train.put(in_memory(images, labels), mesh), np.arange(16), mesh)
    tx = optax.sgd(0.1)
    mixing = data.Augmentation(mixup=1.0, cutmix=1.0)
    step = train.make_train_step(
        Reads(),
        tx,
        lambda logits, _, y: 100 * weights * (logits[:, 0] - y) + (y == 0),
        train.Preprocessing(np.zeros(1), np.ones(1), 0, False, mixing),
        mesh,
        seed=3,
        ema_decay=0.9,
    )
    state = train.create_state(Reads().init(KEY, images), tx)
    metrics = step(state, batch, {}, {})[1]
    np.testing.assert_allclose(metrics['loss'], metrics['accuracy'], atol=1e-3)
    assert 0.05 < metrics['accuracy'] < 0.25 and abs(metrics['accuracy'] - 2 / 16) > 1e-3


# Rectangles and colours


def test_erasing_takes_2_to_33_percent_of_the_area():
    images = np.full((400, 20, 30, 1), 1000.0, np.float32)
    erasing = jax.jit(data.random_erasing, static_argnums=2)
    erased = np.asarray(erasing(KEY, images, 0.5))[..., 0]
    gone = erased != 1000
    assert 150 < gone.any((1, 2)).sum() < 250
    colours = [set(e[g]) for e, g in zip(erased, gone) if g.any()]
    assert all(len(colour) == 1 for colour in colours)
    assert set.union(*colours) <= set(range(256)) and len(set.union(*colours)) > 100
    shapes = [(g.any(1).sum(), g.any(0).sum()) for g in gone if g.any()]
    assert [h * w for h, w in shapes] == [g.sum() for g in gone if g.any()]
    areas = np.array([h * w for h, w in shapes]) / 600
    assert 0.01 < areas.min() < 0.05 and 0.28 < areas.max() < 0.36
    ratios = np.array([h / w for h, w in shapes])
    assert ratios.min() < 0.5 and ratios.max() > 2


def test_jitter_keeps_within_its_strength():
    images = np.full((200, 2, 2, 3), 100, np.float32)  # no contrast, no colour: brightness alone
    jitter = jax.jit(data.color_jitter, static_argnums=2)
    jittered = np.asarray(jitter(KEY, images, 0.2))
    assert 49 <= jittered.min() < 60 and 140 < jittered.max() <= 151
    images = IMAGES.astype(np.float32)
    weak = jitter(KEY, images, 1e-3)
    assert (weak != images).any((1, 2, 3)).all()
    np.testing.assert_allclose(weak, images, atol=1)


# TrivialAugment


def operate(images, name, strength, sign=1.0):
    kinds = np.full(len(images), list(operations.OPERATIONS).index(name))
    signs = np.full(len(images), sign, np.float32)
    return np.asarray(
        _operate(images, kinds, np.broadcast_to(np.float32(strength), len(images)), signs)
    )


_operate = jax.jit(operations.apply)


def with_pil(function):
    return np.stack([np.asarray(function(Image.fromarray(image))) for image in IMAGES])


@pytest.mark.parametrize(
    ('name', 'strength', 'sign', 'expected', 'off'),
    [
        ('brightness', 0.5, 1, lambda i: ImageEnhance.Brightness(i).enhance(1.495), 1),
        ('brightness', 1, -1, lambda i: ImageEnhance.Brightness(i).enhance(0.01), 1),
        ('sharpness', 0.8, 1, lambda i: ImageEnhance.Sharpness(i).enhance(1.792), 1),
        ('sharpness', 0.8, -1, lambda i: ImageEnhance.Sharpness(i).enhance(0.208), 1),
        ('posterize', 1, 1, lambda i: ImageOps.posterize(i, 2), 0),
        ('posterize', 0.5, 1, lambda i: ImageOps.posterize(i, 5), 0),
        ('solarize', 0.5, 1, lambda i: ImageOps.solarize(i, 128), 0),
        ('stretch', 0.5, 1, ImageOps.autocontrast, 1),
        ('equalize', 0.5, 1, ImageOps.equalize, 0),
    ],
)
def test_operations_do_what_pil_does(name, strength, sign, expected, off):
    difference = operate(IMAGES, name, strength, sign).astype(int) - with_pil(expected)
    assert np.abs(difference).max() <= off
    assert (operate(IMAGES, name, strength, sign) != IMAGES).any()


def test_strength_zero_is_identity():
    for name in operations.OPERATIONS:
        if name not in ('stretch', 'equalize'):  # which have no strength
            assert (operate(IMAGES, name, 0.0) == IMAGES).all(), name


def test_movements_by_hand():
    for sign in (1, -1):
        turned = operate(IMAGES, 'rotate', 2 / 3, sign)
        np.testing.assert_array_equal(turned, np.rot90(IMAGES, sign, (1, 2)))
    moved = np.zeros_like(IMAGES)
    moved[:, :, :-8] = IMAGES[:, :, 8:]
    np.testing.assert_array_equal(operate(IMAGES, 'shift_x', 0.25), moved)  # of 32 pixels
    moved = np.zeros_like(IMAGES)
    moved[:, 32:] = IMAGES[:, :8]
    np.testing.assert_array_equal(operate(IMAGES, 'shift_y', 1.0, -1), moved)
    # A row moves by 0.99 · 0.5 pixels for each row between it and the middle, at 19.5.
    sheared = operate(IMAGES, 'shear_x', 0.5)
    columns = np.arange(40)
    for row in (0, 19, 25):
        places = columns + 0.495 * (row - 19.5)
        inside = (places >= 0) & (places <= 39)
        expected = np.interp(places, columns, IMAGES[3, row, :, 1])
        np.testing.assert_allclose(sheared[3, row, inside, 1], expected[inside], atol=0.51)
    other = operate(IMAGES.swapaxes(1, 2), 'shear_y', 0.5)
    np.testing.assert_allclose(other.swapaxes(1, 2), sheared, atol=1)


def test_trivial_augment_does_each_operation_to_some():
    images = np.repeat(IMAGES[:1], 256, 0)
    changed = np.asarray(jax.jit(data.trivial_augment)(KEY, images))
    same = (changed == images).all((1, 2, 3)).mean()
    assert 1 / 28 < same < 1 / 5  # the identity, and very weak ones
    for name in ('stretch', 'equalize'):
        result = operate(images[:16], name, 0)[0]
        assert 5 < (changed == result).all((1, 2, 3)).sum() < 60
