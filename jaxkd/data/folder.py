"""Folders of images, a folder for each class: data of your own."""

from __future__ import annotations

import hashlib
import os
import pathlib
from typing import NamedTuple

import numpy as np

from jaxkd.errors import ConfigError

PREFIX = 'folder:'
# Extensions of the files that are read.
EXTENSIONS = ('.bmp', '.gif', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')
# What systems leave in folders, beside files whose name begins with a dot.
_LITTER = ('Thumbs.db', 'desktop.ini')


class Images(NamedTuple):
    """The images of one part.

    Attributes:
      folder: where they are.
      paths: of each image in that folder, in order.
      labels: int32 [size].
    """

    folder: pathlib.Path
    paths: tuple[str, ...]
    labels: np.ndarray


def is_folder(name: str) -> bool:
    """Whether a data set's name is that of a folder, such as 'folder:/data/flowers'."""
    return name.startswith(PREFIX)


def class_names(name: str) -> tuple[str, ...]:
    """The names of the folders in train/, in order.

    Raises:
      ConfigError: if there is no such folder, or fewer than two classes in it.
    """
    folder = _root(name) / 'train'
    if not folder.is_dir():
        there = 'it has no train/' if _root(name).is_dir() else 'there is no such folder'
        why = f'{there}; it needs train/CLASS/IMAGE, and val/ or test/ likewise'
        raise ConfigError('data.name', name, why=why)
    names = tuple(entry.name for entry in _entries(folder) if entry.is_dir())
    if len(names) < 2:
        why = f'{folder} holds {len(names)} folders; it needs one for each class, at least two'
        raise ConfigError('data.name', name, why=why)
    return names


def parts(name: str) -> dict[str, str]:
    """The folder of each part: of 'train', of 'test', and of 'validation' if that has its own.

    val/ is the validation part where there is a test/, and else the test part.

    Raises:
      ConfigError: if there is neither, or val/ twice.
    """
    root = _root(name)
    beside = [other for other in ('val', 'validation') if (root / other).is_dir()]
    if len(beside) == 2:
        raise ConfigError('data.name', name, why='it has val/ and validation/; keep one of them')
    if (root / 'test').is_dir():
        return {'train': 'train', 'test': 'test'} | ({'validation': beside[0]} if beside else {})
    if not beside:
        why = 'it has neither test/ nor val/; put aside some images of each class to test with'
        raise ConfigError('data.name', name, why=why)
    return {'train': 'train', 'test': beside[0]}


def images(name: str, part: str) -> Images:
    """Lists the images of a part that has its own folder; see `parts`.

    Raises:
      ConfigError: for a class without images, a class that train/ has not, and anything that is no
        image by its extension.
    """
    folder = _root(name) / parts(name)[part]
    names = class_names(name)
    paths: list[str] = []
    labels: list[int] = []
    for entry in _entries(folder):
        if not entry.is_dir():
            raise _refused(name, entry, f'it lies beside the folders of the classes; {_REMOVE}')
        if entry.name not in names:
            raise _refused(name, entry, 'train/ has no such class; remove it, or add it there')
        found = [_checked(name, image).name for image in _entries(entry.path)]
        if not found:
            raise _refused(name, entry, 'it is empty; put images there, or remove the class')
        paths += [f'{entry.name}/{image}' for image in found]
        labels += [names.index(entry.name)] * len(found)
    if not paths:
        raise ConfigError('data.name', name, why=f'{folder} is empty; put images there')
    return Images(folder, tuple(paths), np.array(labels, np.int32))


def read(images: Images, place: int) -> bytes:
    """The bytes of an image."""
    return (images.folder / images.paths[place]).read_bytes()


def title(images: Images, place: int) -> str:
    """What to call an image."""
    return str(images.folder / images.paths[place])


def listing(images: Images) -> str:
    """SHA-256 of the paths in the folder."""
    return hashlib.sha256(os.fsencode('\0'.join(images.paths))).hexdigest()


_REMOVE = 'remove it from there'


def _root(name: str) -> pathlib.Path:
    return pathlib.Path(name.removeprefix(PREFIX)).expanduser()


def _entries(folder: str | os.PathLike) -> list[os.DirEntry]:
    """What is in a folder, in order, without what is hidden."""
    with os.scandir(folder) as found:
        entries = [e for e in found if not e.name.startswith('.') and e.name not in _LITTER]
    return sorted(entries, key=lambda entry: entry.name)


def _checked(name: str, image: os.DirEntry) -> os.DirEntry:
    if not image.is_file():
        raise _refused(name, image, 'it is no file; images lie in the folder of their class')
    if os.path.splitext(image.name)[1].lower() not in EXTENSIONS:
        known = ', '.join(EXTENSIONS)
        raise _refused(
            name, image, f'images that are read end in {known}; {_REMOVE}, or convert it'
        )
    return image


def _refused(name: str, entry: os.DirEntry, why: str) -> ConfigError:
    return ConfigError('data.name', name, why=f'{entry.path}: {why}')
