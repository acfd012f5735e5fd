"""A part of a data set, and drawing parts by class."""

from __future__ import annotations

from collections.abc import Callable, Iterable
import functools
import hashlib
from typing import NamedTuple

import numpy as np

from jaxkd.data import files as reading

PARTS = ('train', 'validation', 'test')


class Split(NamedTuple):
    """A part of a data set.

    Attributes:
      size: number of images.
      labels: int32 [size].
      fetch: indices int [n] -> images uint8 [n, height, width, channels], a new array.
      images: uint8 [size, height, width, channels] where the part is held in memory, else None.
      files: where images that are decoded when they are asked for come from, else None. `fetch`
        hands them out as evaluation sees them; training may see other crops, see `read_ahead`.
    """

    size: int
    labels: np.ndarray
    fetch: Callable[[np.ndarray], np.ndarray]
    images: np.ndarray | None
    files: reading.Files | None = None


def subset(whole: Split, chosen: np.ndarray) -> Split:
    """The images of `whole` at the indices `chosen`, int [n]."""
    if whole.images is not None:
        return in_memory(whole.images[chosen], whole.labels[chosen])
    files = whole.files
    return from_files(
        files._replace(places=files.places[chosen], labels=files.labels[chosen]),
    )


def in_memory(images: np.ndarray, labels: np.ndarray) -> Split:
    return Split(len(images), labels, lambda indices: images[np.asarray(indices)], images)


def from_files(files: reading.Files) -> Split:
    fetch = functools.partial(reading.fetch, files)
    return Split(len(files.labels), files.labels, fetch, None, files)


def fingerprint(parts: Iterable[Split]) -> str:
    """SHA-256 of the labels and the images of parts; of images in files, of their paths."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.labels.astype('<i4').tobytes())
        if part.images is not None:
            digest.update(np.ascontiguousarray(part.images))
        else:
            digest.update(part.files.listing.encode())
            digest.update(part.files.places.astype('<i8').tobytes())
    return digest.hexdigest()


def stratified(labels: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    """Draws `number` indices so that each class has its share of them; sorted."""
    classes, counts = np.unique(labels, return_counts=True)
    share = counts * number / len(labels)
    quota = np.floor(share).astype(int)
    # What rounding down left over goes to the classes that lost most by it.
    quota[np.argsort(quota - share, kind='stable')[: number - quota.sum()]] += 1
    return _draw(labels, classes, quota, rng)


def balanced(labels: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
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
