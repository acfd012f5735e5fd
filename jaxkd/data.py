"""Data sets by name, batches in a fixed order, and augmentation on the device.

A data set that fits into memory is decoded once and indexed from then on; a larger one is decoded
when it is asked for. Either way a `Split` says how many images there are, what they show, and how
to get at them:

    train = load('fashion_mnist', 'train', seed=0, labels=5000)
    mean, std = statistics(train)
    for indices in epoch_order(train.size, 128, seed=0, epoch=0):
        images = augment(key, train.fetch(indices), padding=2, flip=True)
        images = normalize(images, mean, std)

`digits` needs no download. The others are read with tensorflow-datasets, without TensorFlow, from
data that are already prepared as array_record files; nothing here ever downloads.

    python -m jaxkd.data list
    python -m jaxkd.data prepare fashion_mnist --from DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from concurrent import futures
import contextlib
import functools
import gzip
import hashlib
import importlib.util
import io
import math
import numbers
import os
import pathlib
import shutil
import sys
import tempfile
import time
from typing import Any, NamedTuple
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd.errors import ConfigError, JaxkdError


class Info(NamedTuple):
    """What can be known of a data set without reading it.

    Attributes:
      name: the name it is loaded by.
      image_shape: (height, width, channels) of every image that `load` hands out.
      num_classes: how many labels there are; labels are 0 to num_classes - 1.
      class_names: what they mean, in order. ImageNet's are WordNet ids ('n01440764').
      flip: whether an image flipped left to right still has the same label.
    """

    name: str
    image_shape: tuple[int, int, int]
    num_classes: int
    class_names: tuple[str, ...]
    flip: bool


class Split(NamedTuple):
    """A part of a data set.

    Attributes:
      size: number of images.
      labels: int32 [size].
      fetch: indices int [n] -> images uint8 [n, height, width, channels], a new array.
      images: uint8 [size, height, width, channels] where the part is held in memory, else None.
    """

    size: int
    labels: np.ndarray
    fetch: Callable[[np.ndarray], np.ndarray]
    images: np.ndarray | None


PARTS = ('train', 'validation', 'test')

# A split of at most this many bytes as uint8 is held in memory.
MEMORY_LIMIT = 2 * 1024**3

_FASHION_MNIST = 'T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot'
_CIFAR10 = 'airplane,automobile,bird,cat,deer,dog,frog,horse,ship,truck'
_CIFAR100 = (
    'apple,aquarium_fish,baby,bear,beaver,bed,bee,beetle,bicycle,bottle,bowl,boy,bridge,bus,'
    'butterfly,camel,can,castle,caterpillar,cattle,chair,chimpanzee,clock,cloud,cockroach,couch,'
    'crab,crocodile,cup,dinosaur,dolphin,elephant,flatfish,forest,fox,girl,hamster,house,kangaroo,'
    'keyboard,lamp,lawn_mower,leopard,lion,lizard,lobster,man,maple_tree,motorcycle,mountain,'
    'mouse,mushroom,oak_tree,orange,orchid,otter,palm_tree,pear,pickup_truck,pine_tree,plain,'
    'plate,poppy,porcupine,possum,rabbit,raccoon,ray,road,rocket,rose,sea,seal,shark,shrew,skunk,'
    'skyscraper,snail,snake,spider,squirrel,streetcar,sunflower,sweet_pepper,table,tank,telephone,'
    'television,tiger,tractor,train,trout,tulip,turtle,wardrobe,whale,willow_tree,wolf,woman,worm'
)


class _Entry(NamedTuple):
    """A data set's row in the table below."""

    image_shape: tuple[int, int, int]
    class_names: Callable[[], tuple[str, ...]]
    flip: bool
    sizes: tuple[int, int]  # published number of training and of test images
    # tensorflow-datasets' name of the split that is used as the test part.
    test: str = 'test'
    # Images come in all sizes: resize and crop them to image_shape.
    resize: bool = False


def _synsets() -> tuple[str, ...]:
    """The WordNet ids of ImageNet's classes from a file in tensorflow-datasets' own wheel."""
    found = importlib.util.find_spec('tensorflow_datasets')
    if found is not None and found.origin is not None:
        path = pathlib.Path(found.origin).parent / 'datasets' / 'imagenet2012' / 'labels.txt'
        if path.is_file():
            return tuple(path.read_text().split())
    return tuple(str(label) for label in range(1000))


_CATALOGUE = {
    'digits': _Entry((8, 8, 1), lambda: tuple('0123456789'), False, (1257, 540)),
    'fashion_mnist': _Entry(
        (28, 28, 1), lambda: tuple(_FASHION_MNIST.split(',')), True, (60_000, 10_000)
    ),
    'cifar10': _Entry((32, 32, 3), lambda: tuple(_CIFAR10.split(',')), True, (50_000, 10_000)),
    'cifar100': _Entry((32, 32, 3), lambda: tuple(_CIFAR100.split(',')), True, (50_000, 10_000)),
    # ImageNet's test split has no labels, so its validation split is the test part, as is usual.
    'imagenet2012': _Entry(
        (224, 224, 3), _synsets, True, (1_281_167, 50_000), test='validation', resize=True
    ),
}


def info(name: str) -> Info:
    """Describes a data set without reading it.

    Raises:
      ConfigError: for a name that is not in the catalogue.
    """
    if name not in _CATALOGUE:
        raise ConfigError('data.name', name, allowed=_CATALOGUE)
    entry = _CATALOGUE[name]
    names = entry.class_names()
    return Info(name, entry.image_shape, len(names), names, entry.flip)


def load(
    name: str,
    part: str,
    *,
    seed: int = 0,
    validation: float = 0.1,
    labels: int | None = None,
    data_dir: str | os.PathLike | None = None,
) -> Split:
    """Loads one part of a data set.

    The train and validation parts are disjoint, class-stratified parts of the data set's training
    split. The test part is its test split (ImageNet: its validation split; digits: 540 images drawn
    once and for all, by class) and depends on no argument.

    The first load of a set that fits into memory decodes it and leaves the arrays beside the
    prepared files, where that folder can be written, so that later loads take milliseconds.
    ImageNet's images are decoded when fetched: shorter side resized to 256, centre 224x224 cropped,
    in training as well, where `augment` adds the random crop. Its first load reads every record
    once for the labels.

    Args:
      name: 'digits', 'fashion_mnist', 'cifar10', 'cifar100' or 'imagenet2012'.
      part: 'train', 'validation' or 'test'.
      seed: draws the validation part and the `labels` kept for training; at least 0.
      validation: fraction of the training split held out for validation, between 0 and 1.
      labels: keep only this many training images, as equal in number by class as can be. With the
        same seed, a smaller number keeps a subset of a larger one's.
      data_dir: where tensorflow-datasets keeps prepared data; by default its own default,
        TFDS_DATA_DIR or ~/tensorflow_datasets.

    Raises:
      ConfigError: for a bad argument, and for data that are not prepared (says how to).
    """
    about = info(name)
    if part not in PARTS:
        raise ConfigError('data.part', part, allowed=PARTS)
    _check_seed('data.seed', seed)
    if not isinstance(validation, numbers.Real) or not 0 < validation < 1:
        raise ConfigError('data.validation', validation, why='it must lie strictly between 0 and 1')
    if labels is not None:
        if isinstance(labels, bool) or not isinstance(labels, (int, np.integer)):
            raise ConfigError('data.labels', labels, why='it must be a whole number or None')
        if labels < about.num_classes:
            raise ConfigError(
                'data.labels',
                labels,
                why=f'{name} has {about.num_classes} classes and each needs at least one image',
            )

    whole = _read(name, 'test' if part == 'test' else 'train', data_dir)
    if part == 'test':
        return whole

    held_out = round(whole.size * validation)
    if not 0 < held_out < whole.size:
        raise ConfigError(
            'data.validation',
            validation,
            why=f'it leaves a part without images: the training split has {whole.size}',
        )
    chosen = _stratified(whole.labels, held_out, np.random.default_rng([seed, 1]))
    if part == 'train':
        chosen = np.setdiff1d(np.arange(whole.size), chosen)
        if labels is not None:
            if labels > len(chosen):
                raise ConfigError(
                    'data.labels',
                    labels,
                    why=f'only {len(chosen)} training images are left beside the validation part',
                )
            kept = _balanced(whole.labels[chosen], labels, np.random.default_rng([seed, 2]))
            chosen = chosen[kept]
    return _subset(whole, chosen)


def statistics(split: Split, limit: int = 10_000) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each colour channel, of pixels scaled to [0, 1].

    Args:
      split: the training part; measuring any other would let its images into the training.
      limit: measure at most this many images, taken at even distances.

    Returns:
      (mean, std), each float32 [channels]. A channel that never changes has std 1, so that
      `normalize` makes it zero.
    """
    if limit < 1 or split.size < 1:
        raise ConfigError('limit', min(limit, split.size), why='at least one image is needed')
    chosen = np.unique(np.linspace(0, split.size - 1, min(limit, split.size)).astype(np.int64))
    count = 0
    total = squares = 0.0
    for start in range(0, len(chosen), 256):
        images = split.fetch(chosen[start : start + 256]).astype(np.float64) / 255
        count += images[..., 0].size
        total = total + images.sum((0, 1, 2))
        squares = squares + (images**2).sum((0, 1, 2))
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return mean.astype(np.float32), np.where(std < 1e-6, 1, std).astype(np.float32)


def normalize(images: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """Scales uint8 images [..., channels] to float32 of about zero mean and unit deviation.

    Args:
      images: values 0 to 255.
      mean: float32 [channels], as `statistics` returns it.
      std: float32 [channels], likewise.
    """
    return (images.astype(jnp.float32) / 255 - mean) / std


def augment(key: jax.Array, images: jax.Array, *, padding: int, flip: bool) -> jax.Array:
    """Shifts each image at random, and flips each left to right with probability one half.

    A shift of up to `padding` pixels each way is the usual random crop of an image padded by that
    many. What moves in from outside is 0 in the images' own values, so before `normalize` it is
    black.

    Args:
      key: a JAX random key.
      images: [n, height, width, channels], of any dtype.
      padding: largest shift in pixels; 0 shifts nothing. Static under `jax.jit`.
      flip: whether to flip; see `Info.flip`. Static under `jax.jit`.

    Returns:
      An array like `images`.

    Raises:
      ConfigError: for a negative padding.
    """
    if padding < 0:
        raise ConfigError('padding', padding, why='it must be 0 or more pixels')
    if not padding and not flip:
        return images
    number, height, width, channels = images.shape
    key_shift, key_flip = jax.random.split(key)
    shift = jax.random.randint(key_shift, (2, number, 1), -padding, padding + 1)
    row = jnp.arange(height) + shift[0]
    column = jnp.broadcast_to(jnp.arange(width), (number, width))
    if flip:
        flipped = jax.random.bernoulli(key_flip, 0.5, (number, 1))
        column = jnp.where(flipped, width - 1 - column, column)
    column = column + shift[1]

    # One gather by index arrays, black put in afterwards. On two CPU cores a batch of
    # 128x32x32x3 uint8 takes 0.24 ms; padding and vmapped dynamic_slice 0.55 ms, one-hot
    # matrix products 1.6 ms, choosing among shifted copies 13 ms.
    inside = ((row >= 0) & (row < height))[:, :, None] & ((column >= 0) & (column < width))[
        :, None, :
    ]
    row = jnp.clip(row, 0, height - 1)[:, :, None]
    column = jnp.clip(column, 0, width - 1)[:, None, :]
    pixel = (jnp.arange(number)[:, None, None] * height + row) * width + column
    moved = jnp.asarray(images).reshape(-1, channels).at[pixel].get(mode='promise_in_bounds')
    return jnp.where(inside[..., None], moved, jnp.zeros((), images.dtype))


def epoch_order(size: int, batch_size: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch, int32 [size // batch_size, batch_size]: a row of indices a step.

    A pure function of its arguments, so a resumed run needs to remember only the step. The
    remainder, other images in each epoch, is left out.

    Raises:
      ConfigError: when there are fewer images than one batch holds.
    """
    _check_batch_size(batch_size)
    _check_seed('seed', seed)
    if size < batch_size:
        raise ConfigError(
            'batch_size',
            batch_size,
            why=f'the training part has only {size} images; use a batch_size of at most {size}, '
            'or keep more labels',
        )
    order = np.random.default_rng([seed, epoch]).permutation(size).astype(np.int32)
    steps = size // batch_size
    return order[: steps * batch_size].reshape(steps, batch_size)


def eval_batches(size: int, batch_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """All indices in order, in batches of one shape, so that evaluation compiles once.

    Returns:
      A list of (indices int32 [batch_size], valid bool [batch_size]). The last batch is filled up
      with index 0, marked as not valid.
    """
    _check_batch_size(batch_size)
    position = np.arange(math.ceil(size / batch_size) * batch_size, dtype=np.int32)
    valid = (position < size).reshape(-1, batch_size)
    indices = np.where(position < size, position, 0).astype(np.int32).reshape(-1, batch_size)
    return list(zip(indices, valid))


def _check_seed(field: str, seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ConfigError(field, seed, why='it must be a whole number of at least 0')


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ConfigError('batch_size', batch_size, why='it must be at least 1')


# Parts of a split


def _subset(whole: Split, chosen: np.ndarray) -> Split:
    """The images of `whole` at the indices `chosen`, int [n]."""
    if whole.images is not None:
        return _in_memory(whole.images[chosen], whole.labels[chosen])
    return Split(
        len(chosen),
        whole.labels[chosen],
        lambda indices: whole.fetch(chosen[np.asarray(indices)]),
        None,
    )


def _in_memory(images: np.ndarray, labels: np.ndarray) -> Split:
    return Split(len(images), labels, lambda indices: images[np.asarray(indices)], images)


def _stratified(labels: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    """Draws `number` indices so that each class has its share of them; sorted."""
    classes, counts = np.unique(labels, return_counts=True)
    share = counts * number / len(labels)
    quota = np.floor(share).astype(int)
    # What rounding down left over goes to the classes that lost most by it.
    quota[np.argsort(quota - share, kind='stable')[: number - quota.sum()]] += 1
    return _draw(labels, classes, quota, rng)


def _balanced(labels: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    """Draws `number` indices, as equal in number by class as the classes' sizes allow; sorted."""
    classes, counts = np.unique(labels, return_counts=True)
    # Fill all classes to one level; a small class is full earlier and the others take its rest.
    level = 0
    while np.minimum(counts, level + 1).sum() <= number:
        level += 1
        if level >= counts.max():
            break
    quota = np.minimum(counts, level)
    open_classes = np.flatnonzero(counts > level)
    quota[rng.permutation(open_classes)[: number - quota.sum()]] += 1
    return _draw(labels, classes, quota, rng)


def _draw(
    labels: np.ndarray, classes: np.ndarray, quota: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    drawn = [
        rng.permutation(np.flatnonzero(labels == label))[:number]
        for label, number in zip(classes, quota)
    ]
    return np.sort(np.concatenate(drawn))


# Reading whole splits


def _read(name: str, part: str, data_dir: str | os.PathLike | None) -> Split:
    """Reads the whole training or test split of a data set; `part` is 'train' or 'test'."""
    if name == 'digits':
        return _read_digits(part)
    entry = _CATALOGUE[name]
    split = entry.test if part == 'test' else 'train'
    folder = _find_prepared(name, data_dir)
    if folder is None:
        raise ConfigError(
            'data.name',
            name,
            why=f'it is not prepared in {_data_root(data_dir)}; '
            f'{_how_to_prepare(name, _data_root(data_dir))}',
        )
    size, open_source = _open(name, folder, split)
    if size * math.prod(entry.image_shape) <= MEMORY_LIMIT:
        arrays = _cached(
            [folder / f'jaxkd-{split}-images.npy', folder / f'jaxkd-{split}-labels.npy'],
            [(size, *entry.image_shape), (size,)],
            lambda: _decode_all(open_source(), size, name, folder, split),
        )
        return _in_memory(arrays[0], arrays[1].astype(np.int32))

    source = open_source()
    (labels,) = _cached(
        [folder / f'jaxkd-{split}-labels.npy'],
        [(size,)],
        lambda: [_read_labels(source, size, name, folder, split)],
    )
    pool = futures.ThreadPoolExecutor(os.cpu_count())

    def fetch(indices: np.ndarray) -> np.ndarray:
        records = _records(source, np.asarray(indices), name, folder)
        decode = functools.partial(_decode, name=name, folder=folder)
        images = list(pool.map(decode, [record['image'] for record in records]))
        return np.stack(images) if images else np.zeros((0, *entry.image_shape), np.uint8)

    return Split(size, labels.astype(np.int32), fetch, None)


def _read_digits(part: str) -> Split:
    """scikit-learn's digits, with the same 540 of them as test split always."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ConfigError(
            'data.name', 'digits', why='it needs scikit-learn: pip install scikit-learn'
        ) from error
    bunch = datasets.load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]  # from 0..16
    labels = bunch.target.astype(np.int32)
    test = _stratified(labels, 540, np.random.default_rng(20200523))
    chosen = test if part == 'test' else np.setdiff1d(np.arange(len(labels)), test)
    return _in_memory(images[chosen], labels[chosen])


def _data_root(data_dir: str | os.PathLike | None) -> pathlib.Path:
    """Where tensorflow-datasets keeps prepared data, by its own rule, without importing it."""
    root = data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
    return pathlib.Path(root).expanduser()


def _find_prepared(name: str, data_dir: str | os.PathLike | None) -> pathlib.Path | None:
    """The folder of the newest prepared version, or None. Never goes to the network."""
    found = []
    for path in (_data_root(data_dir) / name).glob('*.*.*/dataset_info.json'):
        version = path.parent.name.split('.')
        # Half-prepared data lie in folders like 3.0.1.incompleteA1B2C3.
        if all(number.isdigit() for number in version) and (path.parent / 'features.json').exists():
            found.append(([int(number) for number in version], path.parent))
    return max(found)[1] if found else None


def _how_to_prepare(name: str, root: pathlib.Path) -> str:
    """The advice for somebody whose prepared data should be in `root`."""
    there = '' if root == _data_root(None) else f' --data_dir={root}'
    if name == 'fashion_mnist':
        return (
            'get its four idx files (apt-get install dataset-fashion-mnist, or '
            'https://github.com/zalandoresearch/fashion-mnist) and run: '
            f'python -m jaxkd.data prepare fashion_mnist --from=DIR{there}'
        )
    by_hand = f', with the archives from image-net.org in {root / "downloads" / "manual"}'
    return (
        'on a machine with a network and `pip install tensorflow tensorflow-datasets`'
        f'{by_hand if name == "imagenet2012" else ""}, run: '
        f'tfds build {name} --file_format=array_record{there}'
    )


def _tfds() -> Any:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise JaxkdError(
            f'tensorflow-datasets cannot be imported ({error}): '
            'pip install tensorflow-datasets array-record importlib-resources, '
            'or use the digits data set'
        ) from error
    return tensorflow_datasets


def _open(name: str, folder: pathlib.Path, split: str) -> tuple[int, Callable[[], Any]]:
    """Number of examples of a prepared split, and a function that opens it.

    Opened, it is a sequence of {'image': encoded bytes, 'label': int}.
    """
    tfds = _tfds()
    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # whatever its parsers raise on damaged files
        raise _unreadable(name, folder, error) from error
    if split not in builder.info.splits:
        raise ConfigError(
            'data.name',
            name,
            why=f'{folder} has no {split} split; delete that folder and '
            f'{_how_to_prepare(name, folder.parents[1])}',
        )
    formats = sorted(kind.value for kind in builder.info.available_file_formats())
    if 'array_record' not in formats:
        raise ConfigError(
            'data.name',
            name,
            why=f'{folder} is prepared as {", ".join(formats)}, which cannot be read by index; '
            f'delete that folder and {_how_to_prepare(name, folder.parents[1])}',
        )

    def open_source() -> Any:
        try:
            return builder.as_data_source(
                split, decoders={'image': tfds.decode.SkipDecoding()}, file_format='array_record'
            )
        except Exception as error:
            raise _unreadable(name, folder, error) from error

    return builder.info.splits[split].num_examples, open_source


def _unreadable(name: str, folder: pathlib.Path, error: Exception) -> ConfigError:
    cause = str(error).strip().split('\n')[0] or type(error).__name__
    return ConfigError(
        'data.name',
        name,
        why=f'the data in {folder} cannot be read ({cause}); delete that folder and '
        f'{_how_to_prepare(name, folder.parents[1])}',
    )


def _records(source: Any, indices: np.ndarray, name: str, folder: pathlib.Path) -> list[dict]:
    try:
        return source.__getitems__(indices.tolist()) if len(indices) else []
    except IndexError:
        raise
    except Exception as error:
        raise _unreadable(name, folder, error) from error


def _decode(encoded: bytes, *, name: str, folder: pathlib.Path) -> np.ndarray:
    """Decodes an image to uint8 `image_shape`."""
    from PIL import Image

    entry = _CATALOGUE[name]
    height, width, channels = entry.image_shape
    try:
        image = Image.open(io.BytesIO(encoded))
        if entry.resize:
            shorter = round(max(height, width) * 256 / 224)
            # Lets a JPEG decode at 1/2, 1/4 or 1/8 scale where that is still large enough.
            image.draft('RGB', (shorter, shorter))
        image = image.convert('L' if channels == 1 else 'RGB')
        if entry.resize:
            scale = shorter / min(image.size)
            size = [max(shorter, round(side * scale)) for side in image.size]
            image = image.resize(size, Image.Resampling.BILINEAR)
            left, top = (size[0] - width) // 2, (size[1] - height) // 2
            image = image.crop((left, top, left + width, top + height))
        array = np.asarray(image, np.uint8).reshape(image.height, image.width, channels)
    except Exception as error:
        raise _unreadable(name, folder, error) from error
    if array.shape != entry.image_shape:
        shape = ValueError(f'an image of shape {array.shape}, {entry.image_shape} expected')
        raise _unreadable(name, folder, shape)
    return array


def _decode_all(
    source: Any, size: int, name: str, folder: pathlib.Path, split: str
) -> list[np.ndarray]:
    """All images uint8 [size, height, width, channels] and labels int32 [size] of a split."""
    images = np.empty((size, *_CATALOGUE[name].image_shape), np.uint8)
    labels = np.empty(size, np.int32)
    decode = functools.partial(_decode, name=name, folder=folder)
    progress = _Progress(f'decoding {name} {split}', size)
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, size, 1024):
            chosen = np.arange(start, min(start + 1024, size))
            records = _records(source, chosen, name, folder)
            labels[chosen] = [record['label'] for record in records]
            encoded = [record['image'] for record in records]
            for index, image in zip(chosen, pool.map(decode, encoded)):
                images[index] = image
            progress.update(int(chosen[-1]) + 1)
    progress.close()
    return [images, labels]


def _read_labels(source: Any, size: int, name: str, folder: pathlib.Path, split: str) -> np.ndarray:
    labels = np.empty(size, np.int32)
    progress = _Progress(f'reading the labels of {name} {split}', size)
    for start in range(0, size, 1024):
        chosen = np.arange(start, min(start + 1024, size))
        labels[chosen] = [record['label'] for record in _records(source, chosen, name, folder)]
        progress.update(int(chosen[-1]) + 1)
    progress.close()
    return labels


def _cached(
    paths: list[pathlib.Path],
    shapes: list[tuple[int, ...]],
    compute: Callable[[], list[np.ndarray]],
) -> list[np.ndarray]:
    """Arrays from .npy files, or computed, and then saved where that is possible.

    The files lie in the folder of the prepared data, so that they go when it is deleted. One that
    cannot be read, or has another shape, is made again.
    """
    with contextlib.suppress(OSError, ValueError, EOFError):
        arrays = [np.load(path) for path in paths]
        if [array.shape for array in arrays] == shapes:
            return arrays
    arrays = compute()
    for path, array in zip(paths, arrays):
        aside = path.with_name(f'.{path.name}.{os.getpid()}')
        try:
            with open(aside, 'wb') as file:
                np.save(file, array)
            os.replace(aside, path)
        except OSError:  # a read-only folder, a full disk: nothing but time is lost
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
    return arrays


class _Progress:
    """A line on stderr about work of more than a few seconds; a silent one is never shown."""

    def __init__(self, what: str, total: int, after: float = 2.0):
        self.what, self.total = what, total
        self.live = sys.stderr.isatty()
        self.start = time.monotonic()
        self.next = self.start + after
        self.shown = False

    def update(self, done: int) -> None:
        now = time.monotonic()
        if now < self.next:
            return
        self.shown = True
        self.next = now + (0.2 if self.live else 10.0)
        line = f'{self.what}: {done:,}/{self.total:,}'
        if now - self.start > 1:  # before, it would be a guess
            line += f', {(now - self.start) * (self.total - done) / done:.0f} s left'
        print(
            f'\r{line:<79}' if self.live else line, end='' if self.live else '\n', file=sys.stderr
        )
        sys.stderr.flush()

    def close(self) -> None:
        if self.shown and self.live:
            print(f'\r{"":<79}\r', end='', file=sys.stderr)


# Preparing Fashion-MNIST

_IDX_FOLDER = '/usr/share/datasets/fashion-mnist'  # where Debian's package puts the files

# Of the pixels and labels of the published files, train before test. MNIST's own files have the
# same names and shapes, so nothing but the content can tell them apart.
_FASHION_MNIST_SHA256 = 'ca3ab2a37f845e1b8ae23cab1b51749a3011ba3bf1d9016176d75cbaabac376f'


def prepare_fashion_mnist(
    source: str | os.PathLike, data_dir: str | os.PathLike | None = None
) -> pathlib.Path:
    """Makes the `fashion_mnist` data set of tensorflow-datasets from its four idx files.

    The result is what the stock `tfds.builder('fashion_mnist')` and `tfds.data_source` read, in the
    same order, as array_record. Needs no TensorFlow and no network. The data appear under their
    final name only when they are complete.

    Args:
      source: folder with train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte
        and t10k-labels-idx1-ubyte, each plain or with .gz.
      data_dir: as in `load`.

    Returns:
      The folder of the prepared data. If there was one already, that one, unchanged.

    Raises:
      ConfigError: for files that are missing, damaged or do not belong together, and for a data_dir
        that cannot be written.
    """
    found = _find_prepared('fashion_mnist', data_dir)
    if found is not None:
        for split in ('train', 'test'):
            _open('fashion_mnist', found, split)  # complains of an unsuitable file format
        return found
    content = {
        'train': _read_idx_pair(pathlib.Path(source), 'train'),
        'test': _read_idx_pair(pathlib.Path(source), 't10k'),
    }
    digest = hashlib.sha256()
    for images, labels in content.values():
        digest.update(images.tobytes())
        digest.update(labels.tobytes())
    if digest.hexdigest() != _FASHION_MNIST_SHA256:
        print(
            f'note: the images in {source} are not those of the published Fashion-MNIST',
            file=sys.stderr,
        )

    root = _data_root(data_dir)
    try:
        root.mkdir(parents=True, exist_ok=True)
        aside = pathlib.Path(tempfile.mkdtemp(prefix='.fashion_mnist-', dir=root))
        try:
            made = _build_fashion_mnist(content, aside)
            final = root / 'fashion_mnist' / made.name
            final.parent.mkdir(exist_ok=True)
            try:
                made.rename(final)
            except OSError:
                # Somebody else prepared it meanwhile.
                if _find_prepared('fashion_mnist', data_dir) != final:
                    raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise ConfigError(
            '--data_dir',
            str(root),
            why=f'it cannot be written ({error.strerror or error}); free space there or name '
            'another folder',
        ) from error
    return final


def _build_fashion_mnist(
    content: dict[str, tuple[np.ndarray, np.ndarray]], folder: pathlib.Path
) -> pathlib.Path:
    """Writes a tensorflow-datasets data set below `folder` and returns the folder it is in."""
    from PIL import Image

    tfds = _tfds()
    progress = _Progress(
        'preparing fashion_mnist', sum(len(labels) for _, labels in content.values()), after=0
    )
    done = 0

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """The stock builder's data set, from arrays."""

        name = 'fashion_mnist'
        VERSION = tfds.core.Version('3.0.1')

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                description='Images of clothes, 28x28 in grey: 60,000 to train and 10,000 to test.',
                features=tfds.features.FeaturesDict(
                    {
                        'image': tfds.features.Image(shape=(28, 28, 1)),
                        'label': tfds.features.ClassLabel(names=info('fashion_mnist').class_names),
                    }
                ),
                supervised_keys=('image', 'label'),
                homepage='https://github.com/zalandoresearch/fashion-mnist',
            )

        def _split_generators(self, download_manager):
            return {split: self._generate_examples(*arrays) for split, arrays in content.items()}

        def _generate_examples(self, images, labels) -> Iterator[tuple[int, dict]]:
            nonlocal done
            # The stock builder's keys, whose hashes decide the order.
            for key, (image, label) in enumerate(zip(images, labels)):
                # A PIL image is encoded without TensorFlow, an array is not.
                yield key, {'image': Image.fromarray(image), 'label': int(label)}
                done += 1
                progress.update(done)

    builder = Builder(data_dir=folder, file_format='array_record')
    tfds.display_progress_bar(False)  # one line of progress is enough
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_dir=folder / 'downloads')
    finally:
        tfds.display_progress_bar(True)
        progress.close()
    return pathlib.Path(builder.data_path)


def _read_idx_pair(folder: pathlib.Path, stem: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, 28, 28] and labels uint8 [n] of the 'train' or 't10k' files."""
    images_path = _find_idx(folder, f'{stem}-images', 3)
    labels_path = _find_idx(folder, f'{stem}-labels', 1)
    images, labels = _read_idx(images_path, 3), _read_idx(labels_path, 1)
    if images.shape[1:] != (28, 28):
        height, width = images.shape[1:]
        raise ConfigError(
            '--from', str(images_path), why=f'its images are {height}x{width}, 28x28 is expected'
        )
    if len(images) != len(labels):
        raise ConfigError(
            '--from',
            str(folder),
            why=f'{images_path.name} has {len(images)} images but {labels_path.name} has '
            f'{len(labels)} labels; get both from the same place',
        )
    if not len(images):
        raise ConfigError('--from', str(images_path), why='it holds no images')
    if labels.max() > 9:
        raise ConfigError(
            '--from', str(labels_path), why=f'it has a label {labels.max()}, 0 to 9 are expected'
        )
    return images, labels


def _find_idx(folder: pathlib.Path, stem: str, rank: int) -> pathlib.Path:
    spellings = [f'{stem}-idx{rank}-ubyte', f'{stem}.idx{rank}-ubyte', f'{stem}-ubyte']
    for name in spellings:
        for path in (folder / name, folder / f'{name}.gz'):
            if path.is_file():
                return path
    raise ConfigError(
        '--from',
        str(folder),
        why=f'it has no {spellings[0]}, plain or with .gz; '
        + ('name' if folder.is_dir() else 'there is no such folder: name')
        + ' the folder with the four idx files of Fashion-MNIST',
    )


def _read_idx(path: pathlib.Path, rank: int) -> np.ndarray:
    """Reads an idx file of bytes, packed by gzip or not, as uint8 of `rank` axes."""
    try:
        content = path.read_bytes()
        if content[:2] == b'\x1f\x8b':
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(
            '--from', str(path), why=f'it cannot be read ({error}); get it again'
        ) from error
    # The magic number: two zeros, 8 for unsigned bytes, the number of axes. Then the axes' sizes.
    start = 4 + 4 * rank
    if content[:4] != bytes([0, 0, 8, rank]) or len(content) < start:
        raise ConfigError(
            '--from',
            str(path),
            why=f'it begins with 0x{content[:4].hex()}, an idx file of '
            f'{"images" if rank == 3 else "labels"} with 0x{bytes([0, 0, 8, rank]).hex()}; '
            'get it again',
        )
    shape = [int(size) for size in np.frombuffer(content, '>u4', rank, offset=4)]
    if len(content) - start != math.prod(shape):
        raise ConfigError(
            '--from',
            str(path),
            why=f'it holds {len(content) - start:,} bytes of data where its header promises '
            f'{math.prod(shape):,}; get it again',
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


# The command


def _list(data_dir: str | None) -> None:
    """Prints the catalogue, and where each data set is."""
    print(f'{"name":<14}{"train + test images":>22}  {"shape":<11}{"classes":>7}  prepared in')
    for name, entry in _CATALOGUE.items():
        folder = None if name == 'digits' else _find_prepared(name, data_dir)
        where = 'nothing to prepare: comes with scikit-learn' if name == 'digits' else folder or '-'
        train, test = entry.sizes
        shape = 'x'.join(str(size) for size in entry.image_shape)
        classes = len(entry.class_names())
        print(f'{name:<14}{f"{train:,} + {test:,}":>22}  {shape:<11}{classes:>7}  {where}')
    print(f'\nPrepared data are looked for in {_data_root(data_dir)}.')


def _prepare(name: str, source: str, data_dir: str | None) -> None:
    about = info(name)
    if about.name == 'digits':
        print('digits: nothing to prepare, it comes with scikit-learn')
        return
    found = _find_prepared(name, data_dir)
    if name != 'fashion_mnist' and found is None:
        raise ConfigError(
            'NAME',
            name,
            why=f'it cannot be prepared from here; {_how_to_prepare(name, _data_root(data_dir))}',
        )
    folder = prepare_fashion_mnist(source, data_dir) if name == 'fashion_mnist' else found
    counts = [_open(name, folder, split)[0] for split in ('train', _CATALOGUE[name].test)]
    print(
        f'{name}: {"already " if found else ""}prepared in {folder}: '
        f'{counts[0]:,} training and {counts[1]:,} test images'
    )


def main(arguments: list[str] | None = None) -> int:
    """The command `python -m jaxkd.data`; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog='python -m jaxkd.data',
        description='Lists the data sets that jaxkd can load, and prepares Fashion-MNIST.',
        epilog='exit status: 0 done, 1 the data cannot be used, 2 a wrong command line',
    )
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    listing = commands.add_parser(
        'list', help='names, sizes, and whether and where each is prepared'
    )
    preparing = commands.add_parser(
        'prepare',
        help='make a data set ready to load, without TensorFlow and without a network',
        description='Makes Fashion-MNIST ready to load from its four idx files, plain or with .gz: '
        'train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and '
        't10k-labels-idx1-ubyte. Stock tensorflow-datasets reads the result too. '
        'For other data sets it says which command prepares them.',
    )
    preparing.add_argument('name', metavar='NAME', help='fashion_mnist')
    preparing.add_argument(
        '--from',
        dest='source',
        metavar='DIR',
        default=_IDX_FOLDER,
        help='folder with the files (default: %(default)s, where Debian and Ubuntu put them: '
        'apt-get install dataset-fashion-mnist)',
    )
    for command in (listing, preparing):
        command.add_argument(
            '--data_dir',
            metavar='DIR',
            help='where prepared data live (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)',
        )
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == 'list':
            _list(chosen.data_dir)
        else:
            _prepare(chosen.name, chosen.source, chosen.data_dir)
    except JaxkdError as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('stopped; nothing was prepared', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
