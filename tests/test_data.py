"""Data sets by name: their parts, their order, augmentation, and preparing Fashion-MNIST."""

import doctest
import functools
import gzip
import io
import os
import pathlib
import pickle
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
import pytest

from jaxkd import data, errors

# The published files: from Debian's package, or from where somebody has put them.
PUBLISHED = pathlib.Path(os.environ.get('JAXKD_FASHION_MNIST', '/usr/share/datasets/fashion-mnist'))


def pack_idx(array):
    """An idx file of bytes, by its description: 0, 0, type, axes, sizes in big endian, data."""
    sizes = b''.join(size.to_bytes(4, 'big') for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def write_idx_files(folder, train=80, test=40):
    """A tiny Fashion-MNIST in mixed spellings; returns (train images, train labels)."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (train + test, 28, 28))
    labels = np.arange(train + test) % 10
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'train-images-idx3-ubyte.gz').write_bytes(gzip.compress(pack_idx(images[:train])))
    (folder / 'train-labels-idx1-ubyte').write_bytes(pack_idx(labels[:train]))
    (folder / 't10k-images.idx3-ubyte').write_bytes(pack_idx(images[train:]))
    (folder / 't10k-labels-ubyte.gz').write_bytes(gzip.compress(pack_idx(labels[train:])))
    return images[:train].astype(np.uint8), labels[:train]


def prepare(source, data_dir, capsys):
    """Runs the command; returns (exit status, what it printed, its errors)."""
    status = data.main(
        ['prepare', 'fashion_mnist', '--from', str(source), f'--data_dir={data_dir}']
    )
    printed = capsys.readouterr()
    return status, printed.out, printed.err


# Errors


def test_errors_are_sentences_and_survive_pickling():
    assert not doctest.testmod(errors).failed
    error = errors.ConfigError('data.name', 'mnist3', allowed=['digits', 'fashion_mnist'])
    assert isinstance(error, errors.JaxkdError) and isinstance(error, ValueError)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    broken = errors.CheckpointError(pathlib.Path('a/b'), 'params/kernel is damaged')
    assert str(pickle.loads(pickle.dumps(broken))) == 'a/b: params/kernel is damaged'


@pytest.mark.parametrize(
    'arguments, words',
    [
        ({'name': 'fashion_mnits'}, 'data.name is .* did you mean fashion_mnist'),
        ({'part': 'val'}, 'data.part .* train, validation, test'),
        ({'seed': -1}, 'data.seed is -1'),
        ({'validation': 0}, 'data.validation is 0'),
        ({'validation': 1.0}, 'data.validation is 1.0'),
        ({'validation': '0.1'}, 'data.validation'),
        ({'validation': 1e-4}, 'leaves a part without images'),
        ({'labels': 9}, '10 classes'),
        ({'labels': 0.5}, 'whole number'),
        ({'labels': 2000}, 'only 1131 training images'),
    ],
)
def test_bad_arguments_are_refused(arguments, words):
    with pytest.raises(errors.ConfigError, match=words):
        data.load(**{'name': 'digits', 'part': 'train', **arguments})


# Parts


def test_every_info_is_complete():
    for name in ('digits', 'fashion_mnist', 'cifar10', 'cifar100', 'imagenet2012'):
        about = data.info(name)
        assert about.num_classes == len(set(about.class_names))
        assert about.flip == (name != 'digits')
    assert data.info('cifar100').num_classes == 100
    assert data.info('imagenet2012')[1:3] == ((224, 224, 3), 1000)


def test_parts_of_digits_are_disjoint_stratified_and_fixed_by_the_seed():
    def load(part, **arguments):
        return data.load('digits', part, **arguments)

    parts = [load(part) for part in data.PARTS]
    assert [part.size for part in parts] == [1131, 126, 540]
    assert all(part.labels.dtype == np.int32 and part.images.dtype == np.uint8 for part in parts)
    assert max(part.images.max() for part in parts) == 255

    # All of scikit-learn's images, none twice. (None of them has a duplicate.)
    distinct = {image.tobytes() for part in parts for image in part.images}
    assert len(distinct) == 1797

    whole = sum(np.bincount(part.labels) for part in parts)
    for part in parts:
        assert np.abs(np.bincount(part.labels) - whole * part.size / 1797).max() <= 1.1

    assert (load('validation').images == parts[1].images).all()
    assert (load('validation', seed=1).images != parts[1].images).any()
    assert (load('test', seed=1, labels=50, validation=0.5).images == parts[2].images).all()
    assert (load('validation', labels=50).images == parts[1].images).all()


def test_labels_keeps_a_balanced_and_nested_subset():
    few, more = (data.load('digits', 'train', labels=n) for n in (50, 203))
    everything = data.load('digits', 'train')
    assert np.bincount(few.labels).tolist() == [5] * 10
    assert more.size == 203 and set(np.bincount(more.labels)) == {20, 21}
    images = [{image.tobytes() for image in part.images} for part in (few, more, everything)]
    assert images[0] < images[1] < images[2]
    # Where the classes have no more to give, the rest comes from those that have.
    assert data.load('digits', 'train', labels=everything.size).size == everything.size


def test_statistics_are_of_the_pixels_in_0_to_1():
    train = data.load('digits', 'train')
    mean, std = data.statistics(train)
    np.testing.assert_allclose(mean, train.images.mean() / 255, rtol=1e-6)
    np.testing.assert_allclose(std, train.images.std() / 255, rtol=1e-6)
    assert mean.shape == std.shape == (1,) and mean.dtype == std.dtype == np.float32
    normal = data.normalize(train.images, mean, std)
    assert normal.dtype == np.float32
    assert abs(normal.mean()) < 1e-4 and abs(normal.std() - 1) < 1e-4
    assert data.statistics(train, limit=100)[0] == pytest.approx(mean, abs=0.02)


# Order


def test_epoch_order_shuffles_anew_each_epoch_and_repeats_exactly():
    order = data.epoch_order(100, 32, seed=3, epoch=5)
    assert order.shape == (3, 32) and order.dtype == np.int32
    assert len(set(order.ravel())) == 96 and order.min() >= 0 and order.max() < 100
    assert (data.epoch_order(100, 32, seed=3, epoch=5) == order).all()
    assert (data.epoch_order(100, 32, seed=3, epoch=6) != order).any()
    assert (data.epoch_order(100, 32, seed=4, epoch=5) != order).any()
    with pytest.raises(errors.ConfigError, match='only 20 images'):
        data.epoch_order(20, 32, seed=0, epoch=0)


def test_eval_batches_cover_everything_once():
    batches = data.eval_batches(10, 4)
    assert [valid.sum() for _, valid in batches] == [4, 4, 2]
    assert all(indices.shape == valid.shape == (4,) for indices, valid in batches)
    assert np.concatenate([i[v] for i, v in batches]).tolist() == list(range(10))
    assert data.eval_batches(0, 4) == []


# Augmentation


@pytest.mark.parametrize('dtype', [np.uint8, np.float32])
def test_augment_does_what_a_loop_over_crops_does(dtype):
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, (256, 6, 5, 3)).astype(dtype)
    augment = jax.jit(functools.partial(data.augment, padding=2, flip=True))
    moved = np.asarray(augment(jax.random.key(0), images))
    assert moved.shape == images.shape and moved.dtype == dtype

    # Each result is one of the 2 x 5 x 5 crops of its own zero-padded image, and all of them occur.
    seen = set()
    for image, result in zip(images, moved):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
        crops = {
            (flip, top, left): padded[top : top + 6, left : left + 5][:, :: -1 if flip else 1]
            for flip in (0, 1)
            for top in range(5)
            for left in range(5)
        }
        which = [name for name, crop in crops.items() if (crop == result).all()]
        assert len(which) == 1
        seen.add(which[0])
    assert len(seen) == 50  # 256 draws miss one of 50 rarely; the key is fixed

    same = augment(jax.random.key(0), images)
    assert (same == moved).all()


def test_augment_does_only_what_is_asked():
    images = np.arange(2 * 4 * 4).reshape(2, 4, 4, 1).astype(np.uint8)
    key = jax.random.key(1)
    assert (data.augment(key, images, padding=0, flip=False) == images).all()
    flipped = np.asarray(
        data.augment(jax.random.key(0), images.repeat(32, 0), padding=0, flip=True)
    )
    plain = (flipped == images.repeat(32, 0)).all((1, 2, 3))
    turned = (flipped == images.repeat(32, 0)[:, :, ::-1]).all((1, 2, 3))
    assert (plain ^ turned).all() and 10 < plain.sum() < 54
    with pytest.raises(errors.ConfigError, match='padding is -1'):
        data.augment(key, images, padding=-1, flip=True)


# Prepared data


@pytest.mark.parametrize('name', ['fashion_mnist', 'cifar10', 'cifar100', 'imagenet2012'])
def test_unprepared_data_say_at_once_how_to_prepare_them(name, tmp_path, monkeypatch):
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
    command = 'jaxkd.data prepare' if name == 'fashion_mnist' else f'tfds build {name}'
    with pytest.raises(errors.ConfigError, match=f'not prepared in {tmp_path}; .*{command}'):
        data.load(name, 'train')


def test_prepare_makes_what_stock_tfds_reads(tmp_path, capsys):
    images, labels = write_idx_files(tmp_path / 'idx')
    there = tmp_path / 'data'
    status, printed, complaints = prepare(tmp_path / 'idx', there, capsys)
    assert status == 0 and '80 training and 40 test images' in printed
    assert str(there / 'fashion_mnist' / '3.0.1') in printed
    assert 'not those of the published Fashion-MNIST' in complaints
    assert [path.name for path in there.iterdir()] == ['fashion_mnist']

    import tensorflow_datasets as tfds

    source = tfds.data_source('fashion_mnist', split='train', data_dir=there, download=False)
    expected = {image.tobytes(): label for image, label in zip(images, labels)}
    assert {e['image'].tobytes(): e['label'] for e in source} == expected
    assert tfds.builder('fashion_mnist', data_dir=there).info.features['label'].names == list(
        data.info('fashion_mnist').class_names
    )

    before = data.load('fashion_mnist', 'train', validation=0.25, data_dir=there)
    assert (
        before.images.shape == (60, 28, 28, 1) and np.bincount(before.labels).tolist() == [6] * 10
    )
    assert all(expected[i.tobytes()] == label for i, label in zip(before.images, before.labels))
    assert (before.fetch(np.array([3, 1])) == before.images[[3, 1]]).all()

    # The second load finds the decoded images; a damaged cache is made again.
    caches = sorted((there / 'fashion_mnist' / '3.0.1').glob('jaxkd-train-*.npy'))
    assert len(caches) == 2
    caches[0].write_bytes(caches[0].read_bytes()[:1000])
    again = data.load('fashion_mnist', 'train', validation=0.25, data_dir=there)
    assert (again.images == before.images).all() and (again.labels == before.labels).all()

    status, printed, _ = prepare(tmp_path / 'nowhere', there, capsys)
    assert status == 0 and 'already prepared' in printed
    assert data.main(['list', f'--data_dir={there}']) == 0
    listed = capsys.readouterr().out
    assert 'folder:PATH' in listed
    assert f'60,000 + 10,000  28x28x1         10  {there / "fashion_mnist" / "3.0.1"}' in listed


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def no_images(path):
    path.with_name('t10k-images.idx3-ubyte').unlink()


def fewer_labels(path):
    path.with_name('train-labels-idx1-ubyte').write_bytes(pack_idx(np.zeros(79)))


def label_ten(path):
    path.with_name('train-labels-idx1-ubyte').write_bytes(pack_idx(np.full(80, 10)))


def labels_as_images(path):
    path.with_name('t10k-images.idx3-ubyte').write_bytes(pack_idx(np.zeros(40)))


def small_images(path):
    path.with_name('t10k-images.idx3-ubyte').write_bytes(pack_idx(np.zeros((40, 8, 8))))


def cut_plain(path):
    cut(path.with_name('t10k-images.idx3-ubyte'))


@pytest.mark.parametrize(
    'damage, words',
    [
        (cut, 'train-images-idx3-ubyte.gz.*cannot be read'),
        (cut_plain, 'holds 31,355 bytes of data where its header promises 31,360'),
        (no_images, 'has no t10k-images-idx3-ubyte, plain or with .gz'),
        (fewer_labels, '80 images but train-labels-idx1-ubyte has 79 labels'),
        (label_ten, 'a label 10'),
        (labels_as_images, 'begins with 0x00000801, an idx file of images with 0x00000803'),
        (small_images, '8x8, 28x28 is expected'),
    ],
)
def test_prepare_refuses_damaged_files_and_leaves_nothing(damage, words, tmp_path, capsys):
    write_idx_files(tmp_path / 'idx')
    damage(tmp_path / 'idx' / 'train-images-idx3-ubyte.gz')
    status, printed, complaints = prepare(tmp_path / 'idx', tmp_path / 'data', capsys)
    assert status == 1 and printed == ''
    assert complaints.startswith('jaxkd: ') and complaints.count('\n') == 1
    with pytest.raises(AssertionError, match=words):  # pytest shows the text when it differs
        raise AssertionError(complaints)
    assert not (tmp_path / 'data').exists()


def test_prepare_says_when_it_cannot_write_and_cleans_up(tmp_path, capsys, monkeypatch):
    write_idx_files(tmp_path / 'idx')
    (tmp_path / 'file').write_text('')
    status, _, complaints = prepare(tmp_path / 'idx', tmp_path / 'file', capsys)
    assert (
        status == 1 and f"--data_dir is '{tmp_path / 'file'}': it cannot be written" in complaints
    )

    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(data.fashion_mnist, '_build_fashion_mnist', full)
    status, _, complaints = prepare(tmp_path / 'idx', tmp_path / 'data', capsys)
    assert status == 1 and 'No space left on device' in complaints
    assert list((tmp_path / 'data').iterdir()) == []


def test_prepare_knows_what_it_cannot_prepare(capsys):
    assert data.main(['prepare', 'digits']) == 0
    assert data.main(['prepare', 'fashion_mnits']) == 1
    assert 'did you mean fashion_mnist' in capsys.readouterr().err
    with pytest.raises(SystemExit, match='2'):
        data.main(['prepare'])


def test_help_runs_as_a_command():
    command = [sys.executable, '-m', 'jaxkd.data', 'prepare', '--help']
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 'train-images-idx3-ubyte' in done.stdout


def write_imagenet(folder, sizes):
    """A prepared imagenet2012 with JPEGs of the given (width, height), grey by index; 3 classes."""
    import tensorflow_datasets as tfds

    class Imagenet(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Stands in for the real one: same name, same features."""

        name = 'imagenet2012'
        VERSION = tfds.core.Version('5.1.0')

        def _info(self):
            features = {
                'image': tfds.features.Image(encoding_format='jpeg'),
                'label': tfds.features.ClassLabel(num_classes=1000),
                'file_name': tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, _):
            return {split: self._generate_examples() for split in ('train', 'validation')}

        def _generate_examples(self):
            for key, size in enumerate(sizes):
                file = io.BytesIO()
                image = Image.new('RGB', size, (8 * key, 0, 255))
                # A red band at the left that a centre crop of a wide image must leave out.
                image.paste((255, 0, 0), (0, 0, size[0] // 16, size[1]))
                image.save(file, 'JPEG', quality=95)
                file.seek(0)
                yield key, {'image': file, 'label': key % 3, 'file_name': f'{key}.JPEG'}

    tfds.display_progress_bar(False)
    builder = Imagenet(data_dir=folder, file_format='array_record')
    builder.download_and_prepare(download_dir=folder / 'downloads')


def test_large_data_are_decoded_when_fetched(tmp_path, monkeypatch):
    write_imagenet(tmp_path, [(500, 300), (300, 500), (1200, 800), (224, 224), (90, 60)] * 4)
    monkeypatch.setattr(data.prepared, 'MEMORY_LIMIT', 1_000_000)
    parts = {
        part: data.load('imagenet2012', part, validation=0.25, data_dir=tmp_path)
        for part in data.PARTS
    }
    assert [parts[part].size for part in data.PARTS] == [15, 5, 20]
    assert all(split.images is None for split in parts.values())
    for split in parts.values():
        images = split.fetch(np.arange(split.size))
        assert images.shape == (split.size, 224, 224, 3) and images.dtype == np.uint8
        key = np.rint(images[:, 112, 112, 0] / 8).astype(int)  # the grey that each was made with
        assert (key % 3 == split.labels).all()
        wide = key % 5 == 0
        assert (images[wide][:, 112, 2, 0] < 200).all()  # 500x300: the band is cropped away
        assert split.fetch(np.array([], int)).shape == (0, 224, 224, 3)
        assert (split.fetch(np.array([4, 1])) == images[[4, 1]]).all()
    steps = data.Steps(15, 5, 0, 1, 3)
    for (_, indices), images in zip(
        steps, data.read_ahead(parts['train'].files, steps, seed=0), strict=True
    ):
        assert images.shape == (5, 224, 224, 3)
        key = np.rint(np.median(images[..., 0], (1, 2)) / 8).astype(int)
        assert (key % 3 == parts['train'].labels[indices]).all()
        assert (images != parts['train'].fetch(indices)).any()  # other crops
    # What fits is the same pixels, held in memory.
    monkeypatch.undo()
    held = data.load('imagenet2012', 'validation', validation=0.25, data_dir=tmp_path)
    assert (held.images == parts['validation'].fetch(np.arange(5))).all()


@pytest.mark.skipif(
    not (PUBLISHED / 'train-images-idx3-ubyte.gz').exists(),
    reason='needs the published files: apt-get install dataset-fashion-mnist',
)
def test_the_published_fashion_mnist(tmp_path, capsys):
    status, printed, complaints = prepare(PUBLISHED, tmp_path, capsys)
    assert status == 0 and '60,000 training and 10,000 test images' in printed
    assert 'published' not in complaints
    # The test split only: decoding the training split as well takes ten seconds more.
    test = data.load('fashion_mnist', 'test', data_dir=tmp_path)
    assert test.size == 10_000 and np.bincount(test.labels).tolist() == [1000] * 10
