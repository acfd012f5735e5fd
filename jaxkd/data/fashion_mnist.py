"""Preparing Fashion-MNIST for tensorflow-datasets from its four idx files."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import gzip
import hashlib
import io
import math
import os
import pathlib
import shutil
import sys
import tempfile
import zlib

import numpy as np

from jaxkd.data import prepared
from jaxkd.data.catalogue import info
from jaxkd.data.progress import Progress
from jaxkd.errors import ConfigError

IDX_FOLDER = '/usr/share/datasets/fashion-mnist'  # where Debian's package puts the files

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
    found = prepared.find('fashion_mnist', data_dir)
    if found is not None:
        for split in ('train', 'test'):
            prepared.open_split(
                'fashion_mnist', found, split
            )  # complains of an unsuitable file format
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

    root = prepared.data_root(data_dir)
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
                if prepared.find('fashion_mnist', data_dir) != final:
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

    tfds = prepared.import_tfds()
    progress = Progress(
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
