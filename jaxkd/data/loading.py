"""Loading a part of a data set by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
import numbers
import os
from typing import Any

import numpy as np

from jaxkd.data import digits, folder, prepared
from jaxkd.data.catalogue import info
from jaxkd.data.corrupt import CorruptImages
from jaxkd.data.files import Files
from jaxkd.data.order import check_seed
from jaxkd.data.split import PARTS, Split, balanced, from_files, stratified, subset
from jaxkd.errors import ConfigError


def load(
    name: str,
    part: str,
    *,
    seed: int = 0,
    validation: float = 0.1,
    labels: int | None = None,
    data_dir: str | os.PathLike | None = None,
    image_size: int | None = None,
    crop: float = 0.08,
    workers: int = 0,
    corrupt: CorruptImages | None = None,
) -> Split:
    """Loads one part of a data set.

    The train and validation parts are disjoint, class-stratified parts of the data set's training
    split. The test part is its test split (ImageNet: its validation split; digits: 540 images drawn
    once and for all, by class) and depends on no argument.

    The first load of a set that fits into memory decodes it and leaves the arrays beside the
    prepared files, where that folder can be written, so that later loads take milliseconds.
    ImageNet's images are decoded when fetched: shorter side resized to 256, centre 224x224 cropped.
    Its first load reads every record once for the labels.

    So are those of a folder: shorter side resized to image_size, the centre cropped, in RGB. Its
    folders are train/CLASS/IMAGE and likewise val/ (or validation/) and test/. Where there are both
    of the latter, val/ is the validation part and all of train/ is for training; where there is one
    of them, it is the test part, and the validation part is drawn from train/.

    Of both, `read_ahead` hands out random crops, for training. An image that cannot be read gives
    its place to the next of its class in the same part that can.

    Args:
      name: 'digits', 'fashion_mnist', 'cifar10', 'cifar100', 'imagenet2012', or 'folder:' and a
        path.
      part: 'train', 'validation' or 'test'.
      seed: draws the validation part and the `labels` kept for training; at least 0.
      validation: fraction of the training split held out for validation, between 0 and 1.
      labels: keep only this many training images, as equal in number by class as can be. With the
        same seed, a smaller number keeps a subset of a larger one's.
      data_dir: where tensorflow-datasets keeps prepared data; by default its own default,
        TFDS_DATA_DIR or ~/tensorflow_datasets.
      image_size: pixels of the height and the width of a folder's images.
      crop: least share of an image's area that a random crop shows, in (0, 1]; 1 shows the centre,
        as in evaluation.
      workers: processes in which `read_ahead` reads; 0 for threads of this one.
      corrupt: where images that cannot be read are remembered; by default there may be none.

    Raises:
      ConfigError: for a bad argument, for data that are not prepared (says how to), and for what
        does not belong into a folder of images. From `fetch` and `read_ahead`: for more corrupt
        images than `corrupt` allows.
    """
    about = info(name, image_size)
    if part not in PARTS:
        raise ConfigError('data.part', part, allowed=PARTS)
    check_seed('data.seed', seed)
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

    if not isinstance(crop, numbers.Real) or not 0 < crop <= 1:
        raise ConfigError('data.crop', crop, why='it must be a share of the area in (0, 1]')
    if isinstance(workers, bool) or not isinstance(workers, (int, np.integer)) or workers < 0:
        raise ConfigError('data.workers', workers, why='it must be a whole number of at least 0')

    corrupt = corrupt or CorruptImages()
    streaming = {'crop': crop, 'workers': workers, 'corrupt': corrupt}
    apart = ('train', 'test')  # what the data set itself keeps apart
    if folder.is_folder(name):
        apart = folder.parts(name)
    source = part if part in apart else 'train'
    if name == 'digits':
        whole = digits.read(source)
    elif folder.is_folder(name):
        whole = _read_folder(folder.images(name, source), about.image_shape, **streaming)
    else:
        whole = prepared.read(name, source, data_dir, **streaming)
    if part != 'train' and part in apart:
        return whole
    chosen = np.arange(whole.size)
    if 'validation' not in apart:
        chosen = _drawn(whole, part, validation, seed)
    if part == 'train' and labels is not None:
        if labels > len(chosen):
            raise ConfigError(
                'data.labels',
                labels,
                why=f'only {len(chosen)} training images are left beside the validation part',
            )
        kept = balanced(whole.labels[chosen], labels, np.random.default_rng([seed, 2]))
        chosen = chosen[kept]
    return subset(whole, chosen)


def loader(
    settings: Mapping[str, Any], seed: int, corrupt: CorruptImages | None = None
) -> Callable[[str], Split]:
    """`load` as a function of the part, with the fields of a config's `data`."""
    return functools.partial(
        load,
        settings['name'],
        seed=seed,
        validation=settings['validation'],
        labels=settings['labels'],
        data_dir=settings['dir'],
        image_size=settings['image_size'],
        crop=settings['crop'],
        workers=settings['workers'],
        corrupt=corrupt,
    )


def _drawn(whole: Split, part: str, validation: float, seed: int) -> np.ndarray:
    """The indices of the training or the validation part of a training split, sorted."""
    held_out = round(whole.size * validation)
    if not 0 < held_out < whole.size:
        raise ConfigError(
            'data.validation',
            validation,
            why=f'it leaves a part without images: the training split has {whole.size}',
        )
    chosen = stratified(whole.labels, held_out, np.random.default_rng([seed, 1]))
    return np.setdiff1d(np.arange(whole.size), chosen) if part == 'train' else chosen


def _read_folder(
    images: folder.Images,
    shape: tuple[int, int, int],
    *,
    crop: float,
    workers: int,
    corrupt: CorruptImages,
) -> Split:
    return from_files(
        Files(
            read=functools.partial(folder.read, images),
            name=functools.partial(folder.title, images),
            listing=folder.listing(images),
            places=np.arange(len(images.labels)),
            labels=images.labels,
            shape=shape,
            shorter=shape[0],
            crop=crop,
            workers=workers,
            corrupt=corrupt,
        )
    )
