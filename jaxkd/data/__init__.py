"""Data sets by name, batches in a fixed order, and augmentation on the device.

A data set that fits into memory is decoded once and indexed from then on; a larger one is decoded
when it is asked for. Either way a `Split` says how many images there are, what they show, and how
to get at them:

    train = load('fashion_mnist', 'train', seed=0, labels=5000)
    mean, std = statistics(train)
    for indices in epoch_order(train.size, 128, seed=0, epoch=0):
        images = augment(key, train.fetch(indices), padding=2, flip=True)
        images = normalize(images, mean, std)

`digits` needs no download. `folder:PATH` is a folder of images, with a folder for each class. The
others are read with tensorflow-datasets, without TensorFlow, from data that are already prepared as
array_record files; nothing here ever downloads.

    python -m jaxkd.data list
    python -m jaxkd.data prepare fashion_mnist --from DIR
"""

from jaxkd.data.augmentation import (
    Augmentation,
    augment,
    color_jitter,
    cutmix,
    make_augmentation,
    mixup,
    partners,
    random_erasing,
    trivial_augment,
    vary,
)
from jaxkd.data.catalogue import Info, info
from jaxkd.data.command import main
from jaxkd.data.corrupt import CorruptImages
from jaxkd.data.fashion_mnist import prepare_fashion_mnist
from jaxkd.data.files import Files, read_ahead
from jaxkd.data.loading import load, loader
from jaxkd.data.order import Steps, epoch_order, eval_batches
from jaxkd.data.scaling import normalize, statistics
from jaxkd.data.split import PARTS, Split, fingerprint

__all__ = [
    'PARTS',
    'Augmentation',
    'CorruptImages',
    'Files',
    'Info',
    'Split',
    'Steps',
    'augment',
    'color_jitter',
    'cutmix',
    'epoch_order',
    'eval_batches',
    'fingerprint',
    'info',
    'load',
    'loader',
    'main',
    'make_augmentation',
    'mixup',
    'normalize',
    'partners',
    'prepare_fashion_mnist',
    'random_erasing',
    'read_ahead',
    'statistics',
    'trivial_augment',
    'vary',
]
