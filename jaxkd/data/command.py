"""The command `python -m jaxkd.data`."""

from __future__ import annotations

import argparse
import sys

from jaxkd.data import fashion_mnist, folder, prepared
from jaxkd.data.catalogue import CATALOGUE, info
from jaxkd.errors import ConfigError, JaxkdError


def _list(data_dir: str | None) -> None:
    """Prints the catalogue, and where each data set is."""
    print(f'{"name":<14}{"train + test images":>22}  {"shape":<11}{"classes":>7}  prepared in')
    for name, entry in CATALOGUE.items():
        found = None if name == 'digits' else prepared.find(name, data_dir)
        where = 'nothing to prepare: comes with scikit-learn' if name == 'digits' else found or '-'
        train, test = entry.sizes
        shape = 'x'.join(str(size) for size in entry.image_shape)
        classes = len(entry.class_names())
        print(f'{name:<14}{f"{train:,} + {test:,}":>22}  {shape:<11}{classes:>7}  {where}')
    print(f'\nPrepared data are looked for in {prepared.data_root(data_dir)}.')
    print(
        'Images of your own: folder:PATH, with PATH/train/CLASS/IMAGE, and PATH/val or PATH/test '
        'likewise.'
    )


def _prepare(name: str, source: str, data_dir: str | None) -> None:
    if folder.is_folder(name):
        print(f'{name}: nothing to prepare, images of folders are read as they are')
        return
    if info(name).name == 'digits':
        print('digits: nothing to prepare, it comes with scikit-learn')
        return
    found = prepared.find(name, data_dir)
    if name != 'fashion_mnist' and found is None:
        raise ConfigError(
            'NAME',
            name,
            why='it cannot be prepared from here; '
            + prepared.how_to_prepare(name, prepared.data_root(data_dir)),
        )
    where = (
        fashion_mnist.prepare_fashion_mnist(source, data_dir) if name == 'fashion_mnist' else found
    )
    counts = [
        prepared.open_split(name, where, split)[0] for split in ('train', CATALOGUE[name].test)
    ]
    print(
        f'{name}: {"already " if found else ""}prepared in {where}: '
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
        default=fashion_mnist.IDX_FOLDER,
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
        print(f'jaxkd: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('jaxkd: stopped; nothing was prepared', file=sys.stderr)
        return 130
    return 0
