"""Loading a part of a data set by name."""

from __future__ import annotations

import numbers
import os

import numpy as np

from jaxkd.data import digits, prepared
from jaxkd.data.catalogue import info
from jaxkd.data.order import check_seed
from jaxkd.data.split import PARTS, Split, balanced, stratified, subset
from jaxkd.errors import ConfigError


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

    source = 'test' if part == 'test' else 'train'
    whole = digits.read(source) if name == 'digits' else prepared.read(name, source, data_dir)
    if part == 'test':
        return whole

    held_out = round(whole.size * validation)
    if not 0 < held_out < whole.size:
        raise ConfigError(
            'data.validation',
            validation,
            why=f'it leaves a part without images: the training split has {whole.size}',
        )
    chosen = stratified(whole.labels, held_out, np.random.default_rng([seed, 1]))
    if part == 'train':
        chosen = np.setdiff1d(np.arange(whole.size), chosen)
        if labels is not None:
            if labels > len(chosen):
                raise ConfigError(
                    'data.labels',
                    labels,
                    why=f'only {len(chosen)} training images are left beside the validation part',
                )
            kept = balanced(whole.labels[chosen], labels, np.random.default_rng([seed, 2]))
            chosen = chosen[kept]
    return subset(whole, chosen)
