"""Reading what tensorflow-datasets has prepared as array_record, without TensorFlow."""

from __future__ import annotations

from collections.abc import Callable
from concurrent import futures
import contextlib
import functools
import math
import os
import pathlib
from typing import Any

import numpy as np

from jaxkd import workdir
from jaxkd.data import decoding
from jaxkd.data.catalogue import CATALOGUE
from jaxkd.data.corrupt import CorruptImages
from jaxkd.data.files import Files
from jaxkd.data.progress import Progress
from jaxkd.data.split import Split, from_files, in_memory
from jaxkd.errors import ConfigError, JaxkdError

# A split of at most this many bytes as uint8 is held in memory.
MEMORY_LIMIT = 2 * 1024**3


def read(
    name: str,
    part: str,
    data_dir: str | os.PathLike | None,
    *,
    crop: float,
    workers: int,
    corrupt: CorruptImages,
) -> Split:
    """Reads the whole training or test split of a data set; `part` is 'train' or 'test'.

    One that does not fit into memory is read when it is asked for; `crop`, `workers` and `corrupt`
    say how, see `Files`.
    """
    entry = CATALOGUE[name]
    split = entry.test if part == 'test' else 'train'
    folder = find(name, data_dir)
    if folder is None:
        raise ConfigError(
            'data.name',
            name,
            why=f'it is not prepared in {data_root(data_dir)}; '
            f'{how_to_prepare(name, data_root(data_dir))}',
        )
    size, open_source = open_split(name, folder, split)
    if size * math.prod(entry.image_shape) <= MEMORY_LIMIT:
        arrays = _cached(
            [folder / f'jaxkd-{split}-images.npy', folder / f'jaxkd-{split}-labels.npy'],
            [(size, *entry.image_shape), (size,)],
            lambda: _decode_all(open_source(), size, name, folder, split),
        )
        return in_memory(arrays[0], arrays[1].astype(np.int32))

    (labels,) = _cached(
        [folder / f'jaxkd-{split}-labels.npy'],
        [(size,)],
        lambda: [_read_labels(open_source(), size, name, folder, split)],
    )
    return from_files(
        Files(
            read=functools.partial(_encoded, name, folder, split),
            name=functools.partial(_title, name, split),
            listing=f'{name} {split}',
            places=np.arange(size),
            labels=labels.astype(np.int32),
            shape=entry.image_shape,
            shorter=_shorter(entry.image_shape),
            crop=crop,
            workers=workers,
            corrupt=corrupt,
        )
    )


def _encoded(name: str, folder: pathlib.Path, split: str, place: int) -> bytes:
    (record,) = _records(_source(name, folder, split), np.array([place]), name, folder)
    return record['image']


@functools.cache
def _source(name: str, folder: pathlib.Path, split: str) -> Any:
    return open_split(name, folder, split)[1]()


def _title(name: str, split: str, place: int) -> str:
    return f'image {place} of {name} {split}'


def _shorter(shape: tuple[int, int, int]) -> int:
    """Pixels of the shorter side from which the centre is cropped; 256 of 224, as is usual."""
    return round(max(shape[:2]) * 256 / 224)


def data_root(data_dir: str | os.PathLike | None) -> pathlib.Path:
    """Where tensorflow-datasets keeps prepared data, by its own rule, without importing it."""
    root = data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
    return pathlib.Path(root).expanduser()


def find(name: str, data_dir: str | os.PathLike | None) -> pathlib.Path | None:
    """The folder of the newest prepared version, or None. Never goes to the network."""
    found = []
    for path in (data_root(data_dir) / name).glob('*.*.*/dataset_info.json'):
        version = path.parent.name.split('.')
        # Half-prepared data lie in folders like 3.0.1.incompleteA1B2C3.
        if all(number.isdigit() for number in version) and (path.parent / 'features.json').exists():
            found.append(([int(number) for number in version], path.parent))
    return max(found)[1] if found else None


def how_to_prepare(name: str, root: pathlib.Path) -> str:
    """The advice for somebody whose prepared data should be in `root`."""
    there = '' if root == data_root(None) else f' --data_dir={root}'
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


def import_tfds() -> Any:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise JaxkdError(
            f'tensorflow-datasets cannot be imported ({error}): '
            'pip install tensorflow-datasets array-record importlib-resources, '
            'or use the digits data set'
        ) from error
    return tensorflow_datasets


def open_split(name: str, folder: pathlib.Path, split: str) -> tuple[int, Callable[[], Any]]:
    """Number of examples of a prepared split, and a function that opens it.

    Opened, it is a sequence of {'image': encoded bytes, 'label': int}.
    """
    tfds = import_tfds()
    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # whatever its parsers raise on damaged files
        raise _unreadable(name, folder, error) from error
    if split not in builder.info.splits:
        raise ConfigError(
            'data.name',
            name,
            why=f'{folder} has no {split} split; delete that folder and '
            f'{how_to_prepare(name, folder.parents[1])}',
        )
    formats = sorted(kind.value for kind in builder.info.available_file_formats())
    if 'array_record' not in formats:
        raise ConfigError(
            'data.name',
            name,
            why=f'{folder} is prepared as {", ".join(formats)}, which cannot be read by index; '
            f'delete that folder and {how_to_prepare(name, folder.parents[1])}',
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
        f'{how_to_prepare(name, folder.parents[1])}',
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
    entry = CATALOGUE[name]
    try:
        if entry.resize:
            return decoding.centre(encoded, entry.image_shape, _shorter(entry.image_shape))
        return decoding.decode(encoded, entry.image_shape)
    except Exception as error:
        raise _unreadable(name, folder, error) from error


def _decode_all(
    source: Any, size: int, name: str, folder: pathlib.Path, split: str
) -> list[np.ndarray]:
    """All images uint8 [size, height, width, channels] and labels int32 [size] of a split."""
    images = np.empty((size, *CATALOGUE[name].image_shape), np.uint8)
    labels = np.empty(size, np.int32)
    decode = functools.partial(_decode, name=name, folder=folder)
    progress = Progress(f'decoding {name} {split}', size)
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
    progress = Progress(f'reading the labels of {name} {split}', size)
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
        # A read-only folder, a full disk: nothing but time is lost.
        with (
            contextlib.suppress(OSError),
            workdir.written_aside(path) as aside,
            open(aside, 'wb') as file,
        ):
            np.save(file, array)
    return arrays
