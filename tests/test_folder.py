"""Folders of images: what is in them, how they are decoded, read ahead, and trained on."""

import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
from PIL import Image
import pytest

from jaxkd import data, errors, metrics, train
from jaxkd import mesh as meshes
from jaxkd.data import decoding

ROOT = pathlib.Path(__file__).resolve().parent.parent
CLASSES = ('blue', 'green', 'red')
COLOURS = np.array([(0, 0, 255), (0, 255, 0), (255, 0, 0)], np.uint8)


def write(folder, part, each):
    """Noise, with a number in one channel and the class's colour in the uppermost rows."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (folder / part / name).mkdir(parents=True)
        for number in range(each):
            image = rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)
            image[:4] = COLOURS[label]
            image[15, 15] = number
            Image.fromarray(image).save(folder / part / name / f'{number:02}.png')


@pytest.fixture(scope='module')
def flowers(tmp_path_factory):
    """Three classes; 03.png of red is no image."""
    folder = tmp_path_factory.mktemp('data') / 'flowers'
    write(folder, 'train', 16)
    write(folder, 'val', 4)
    (folder / 'train' / 'red' / '03.png').write_bytes(b'\x89PNG and then nothing')
    (folder / 'train' / 'red' / '.DS_Store').write_bytes(b'')
    return folder


def load(folder, part, **arguments):
    corrupt = data.CorruptImages(arguments.pop('corrupt_limit', 1))
    return data.load(f'folder:{folder}', part, image_size=16, corrupt=corrupt, **arguments)


def numbers(images):
    return images[:, 15, 15, 0].tolist()


# Parts


def test_parts_are_the_folders_or_drawn_from_train(flowers, tmp_path):
    about = data.info(f'folder:{flowers}', 16)
    assert about.class_names == CLASSES and about.image_shape == (16, 16, 3)
    parts = {part: load(flowers, part, validation=0.25) for part in data.PARTS}
    assert {part: np.bincount(split.labels).tolist() for part, split in parts.items()} == {
        'train': [12, 12, 12],
        'validation': [4, 4, 4],
        'test': [4, 4, 4],  # which is val/
    }
    for split in parts.values():
        images = split.fetch(np.arange(split.size))
        assert images.dtype == np.uint8 and images.shape == (split.size, 16, 16, 3)
        assert (images[:, 0, 0] == COLOURS[split.labels]).all()
        assert (split.fetch(np.array([5, 1])) == images[[5, 1]]).all()
    drawn = [{*files.places[files.labels == 1]} for files in (s.files for s in parts.values())]
    assert len(drawn[0] | drawn[1]) == 16  # the two are disjoint
    mean, std = data.statistics(parts['test'])
    images = parts['test'].fetch(np.arange(12)) / 255
    np.testing.assert_allclose(mean, images.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(std, images.std((0, 1, 2)), rtol=1e-5)
    few = load(flowers, 'train', validation=0.25, labels=7)
    assert sorted(np.bincount(few.labels)) == [2, 2, 3]
    assert {*few.files.places} < {*parts['train'].files.places}

    with_test = tmp_path / 'with_test'
    shutil.copytree(flowers, with_test)
    (with_test / 'val').rename(with_test / 'validation')
    shutil.copytree(flowers / 'val' / 'blue', with_test / 'test' / 'blue')
    assert [load(with_test, part).size for part in data.PARTS] == [48, 12, 4]


def no_folder(folder):
    shutil.rmtree(folder)


def no_train(folder):
    (folder / 'train').rename(folder / 'training')


def no_val(folder):
    shutil.rmtree(folder / 'val')


def two_vals(folder):
    (folder / 'validation').mkdir()
    (folder / 'test').mkdir()


def no_classes(folder):
    for name in CLASSES:
        shutil.rmtree(folder / 'train' / name)


def empty_class(folder):
    (folder / 'train' / 'violet').mkdir()


def unknown_class(folder):
    (folder / 'val' / 'violet').mkdir()


def image_beside_classes(folder):
    (folder / 'train' / 'blue' / '00.png').rename(folder / 'train' / '00.png')


def text_among_images(folder):
    (folder / 'train' / 'blue' / 'notes.txt').write_text('')


def folder_in_class(folder):
    (folder / 'train' / 'blue' / 'more').mkdir()


@pytest.mark.parametrize(
    ('damage', 'words'),
    [
        (no_folder, 'there is no such folder; it needs train/CLASS/IMAGE'),
        (no_train, 'it has no train/'),
        (no_val, 'neither test/ nor val/'),
        (two_vals, 'val/ and validation/'),
        (no_classes, 'train holds 0 folders; .* at least two'),
        (empty_class, 'train/violet: it is empty'),
        (unknown_class, 'val/violet: train/ has no such class'),
        (image_beside_classes, 'train/00.png: it lies beside the folders of the classes'),
        (text_among_images, 'blue/notes.txt: images that are read end in .bmp, .*.webp; remove'),
        (folder_in_class, 'blue/more: it is no file'),
    ],
)
def test_what_does_not_belong_is_refused(damage, words, tmp_path):
    write(tmp_path / 'mine', 'train', 2)
    write(tmp_path / 'mine', 'val', 1)
    damage(tmp_path / 'mine')
    with pytest.raises(errors.ConfigError, match=f"^data.name is 'folder:.*: .*{words}"):
        for part in data.PARTS:
            load(tmp_path / 'mine', part, validation=0.5)


def test_other_classes_or_images_are_told_apart(tmp_path):
    write(tmp_path, 'train', 4)
    write(tmp_path, 'val', 2)

    def found():
        return data.fingerprint(load(tmp_path, part, validation=0.25) for part in data.PARTS)

    def rename(old, new):
        for part in ('train', 'val'):
            (tmp_path / part / old).rename(tmp_path / part / new)

    before = found()
    for old, new in (('red', 'amber'), ('red/01.png', 'red/01a.png')):
        rename(old, new)
        assert found() != before
        rename(new, old)
        assert found() == before
    digits = data.load('digits', 'train')
    other = digits._replace(images=255 - digits.images)
    assert data.fingerprint([digits]) != data.fingerprint([other])


def test_settings_are_checked(flowers):
    for arguments, words in [
        ({'crop': 0.0}, 'data.crop'),
        ({'workers': -1}, 'data.workers'),
        ({'corrupt_limit': -1}, 'data.corrupt_limit'),
        ({'labels': 2}, '3 classes'),
    ]:
        with pytest.raises(errors.ConfigError, match=words):
            load(flowers, 'train', **arguments)
    with pytest.raises(errors.ConfigError, match='data.image_size is None: .* such as 224'):
        data.load(f'folder:{flowers}', 'train')
    with pytest.raises(errors.ConfigError, match='data.image_size is 16: digits has a size'):
        data.info('digits', 16)


# Decoding


def encoded(image, kind='PNG', **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_images_of_every_kind_become_rgb():
    """A grey 51, or a pure red, in the ways in which files hold them."""
    grey, red = np.full(3, 51), np.array([255, 0, 0])
    flat = Image.new('L', (20, 10), 51)
    colour = Image.new('RGB', (20, 10), 'red')
    clear = Image.new('RGBA', (20, 10), (255, 0, 0, 0))
    half = Image.new('LA', (20, 10), (0, 204))  # black at 80 % on white
    palette = colour.convert('P')
    for expected, content in [
        (grey, encoded(flat)),
        (grey, encoded(Image.fromarray(np.full((10, 20), 51 * 257, np.uint16)))),
        (grey, encoded(Image.fromarray(np.full((10, 20), 51 * 257, np.uint16)), 'TIFF')),
        (grey, encoded(half)),
        (np.full(3, 255), encoded(Image.new('1', (20, 10), 1))),
        (red, encoded(palette)),
        (red, encoded(palette, 'GIF')),
        (red, encoded(colour, 'WEBP', lossless=True)),
        (np.full(3, 255), encoded(clear)),
        (np.full(3, 255), encoded(palette, 'PNG', transparency=palette.getpixel((0, 0)))),
        (red, encoded(colour.convert('CMYK'), 'JPEG', quality=100)),
    ]:
        for pixels in (
            decoding.centre(content, (4, 4, 3), 4),
            decoding.random_crop(content, (4, 4, 3), 0.5, np.random.default_rng(0)),
        ):
            assert pixels.shape == (4, 4, 3) and pixels.dtype == np.uint8
            assert np.abs(pixels - expected).max() <= 3
    floats = encoded(Image.fromarray(np.ones((4, 4), np.float32)), 'TIFF')
    with pytest.raises(ValueError, match='32-bit numbers'):
        decoding.centre(floats, (4, 4, 3), 4)


def test_photographs_are_turned_upright():
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, :20] = (255, 0, 0)  # at the left, and at the top once turned clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph = encoded(Image.fromarray(image), 'JPEG', exif=exif, quality=95)
    turned = decoding.centre(photograph, (80, 40, 3), 40)
    assert turned[:16].mean((0, 1)).argmax() == 0 and turned[:16, :, 0].min() > 200
    assert turned[24:].max() < 60
    crops = [
        decoding.random_crop(photograph, (16, 16, 3), 0.3, np.random.default_rng(seed))
        for seed in range(20)
    ]
    assert all((crop[:, :, 0].std(1) < 40).all() for crop in crops)  # red lies across, if at all
    assert any(crop[0, 0, 0] > 200 for crop in crops)


def test_random_crops_show_parts_of_the_asked_size_and_shape():
    """Of an image whose channels tell the place of each pixel; a JPEG may be decoded smaller."""
    rows, columns = np.mgrid[:800, :1000]
    image = np.stack([rows * 255 / 799, columns * 255 / 999, rows * 0], -1).astype(np.uint8)
    for content in (
        encoded(Image.fromarray(image)),
        encoded(Image.fromarray(image), 'JPEG', quality=95),
    ):
        areas, ratios = [], []
        for seed in range(60):
            crop = decoding.random_crop(content, (10, 10, 3), 0.25, np.random.default_rng(seed))
            # From the middle of the first pixel to that of the last there are nine tenths.
            height, width = (np.ptp(crop[..., c].astype(float)) / 255 / 0.9 for c in (0, 1))
            areas.append(height * width)
            ratios.append(width * 1000 / (height * 800))
        assert 0.2 < min(areas) < 0.4 and 0.85 < max(areas) < 1.05
        assert 0.7 < min(ratios) < 0.85 and 1.2 < max(ratios) < 1.42
    again = decoding.random_crop(content, (10, 10, 3), 0.25, np.random.default_rng(59))
    assert (again == crop).all()
    long = encoded(Image.fromarray(image[:20]))
    assert decoding.random_crop(long, (4, 4, 3), 1.0, np.random.default_rng(0)).shape == (4, 4, 3)


# Corrupt images


def test_a_corrupt_image_gives_its_place_to_the_next_of_its_class(flowers):
    whole = load(flowers, 'train', validation=0.02)  # of which a single one is held out
    bad = flowers / 'train' / 'red' / '03.png'
    place = [whole.files.name(p) for p in whole.files.places].index(str(bad))
    images = whole.fetch(np.array([place, place + 1, place]))
    assert numbers(images) == [4, 4, 4] and (images[:, 0, 0] == COLOURS[2]).all()
    assert whole.files.corrupt.found == {str(bad): 'no image that Pillow knows'}
    strict = load(flowers, 'train', validation=0.02, corrupt_limit=0)
    assert numbers(strict.fetch(np.arange(3))) == [0, 1, 2]
    with pytest.raises(errors.ConfigError, match=f'data.corrupt_limit is 0: {bad} .no image'):
        strict.fetch(np.array([place]))


def test_a_class_without_a_readable_image_is_refused(tmp_path):
    write(tmp_path, 'train', 4)
    write(tmp_path, 'val', 1)
    for path in (tmp_path / 'train' / 'green').iterdir():
        path.write_bytes(path.read_bytes()[:150])
    split = load(tmp_path, 'train', validation=0.25, corrupt_limit=10)
    green = np.flatnonzero(split.labels == 1)[:1]
    with pytest.raises(errors.ConfigError, match='nor any other image of its class can be read'):
        split.fetch(green)


# Reading ahead


def test_batches_are_the_same_whoever_reads_them_and_wherever_they_begin(flowers):
    here, there = (load(flowers, 'train', workers=workers) for workers in (0, 2))
    size, mesh = here.size, meshes.make_mesh()
    whole = [*data.read_ahead(here.files, data.Steps(size, 16, 5, 0, 5), seed=5)]
    assert len({image.tobytes() for batch in whole for image in batch}) > 70  # crops, all others
    examples = train.put(there, mesh)
    late = [*train.batches(examples, 16, mesh, seed=5, start=2, stop=5, crops=True)]
    assert there.files.corrupt.found == here.files.corrupt.found  # told across processes
    for batch, expected, (_, indices) in zip(
        late, whole[2:], data.Steps(size, 16, 5, 2, 5), strict=True
    ):
        np.testing.assert_array_equal(batch['images'], expected)
        np.testing.assert_array_equal(batch['labels'], here.labels[indices])
    # Without crops, as evaluation sees them.
    (plain,) = train.batches(examples, 16, mesh, seed=5, start=2, stop=3)
    np.testing.assert_array_equal(plain['images'], here.fetch(data.Steps(size, 16, 5, 2, 3)[0][1]))
    centre = load(flowers, 'train', crop=1.0).files
    (same,) = data.read_ahead(centre, data.Steps(size, 16, 5, 2, 3), seed=5)
    np.testing.assert_array_equal(plain['images'], same)


# The command line

CONFIG = """
from configs import mbv2

def get_config():
    config = mbv2.get_config()
    config.model = {'name': 'resnet20', 'arguments': {'depth': 8}}
    for stage in ('teacher', 'search', 'distil'):
        config[stage].update(batch_size=16, epochs=2.0)
    config.teacher.epochs = 5.0
    config.update(log_every=1, checkpoint_seconds=0.0)
    return config
"""


def test_a_run_on_a_folder_killed_and_resumed(flowers, tmp_path):
    """With all augmentation, and a process that reads ahead."""
    (tmp_path / 'small.py').write_text(CONFIG)
    command = [
        *(sys.executable, '-m', 'jaxkd.main', f'--config={tmp_path / "small.py"}'),
        *(f'--config.data.name=folder:{flowers}', '--config.data.image_size=16'),
        *('--config.data.workers=1', '--config.data.corrupt_limit=1'),
        *('--config.data.augment.mixup=0.2', '--config.data.augment.cutmix=1.0'),
        *('--config.data.augment.erasing=0.25', '--config.data.augment.color_jitter=0.4'),
        *('--config.data.augment.trivial_augment=True', f'--workdir={tmp_path / "work"}'),
    ]
    environment = os.environ | {
        'PYTHONPATH': str(ROOT),
        'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'cache'),
    }
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if any(entry.name.isdigit() for entry in (tmp_path / 'work' / 'teacher').glob('*')):
            break
        time.sleep(0.02)
    assert process.poll() is None, 'the run ended before it saved a state'
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'teacher: going on at step' in done.stderr and 'Traceback' not in done.stderr
    bad = str(flowers / 'train' / 'red' / '03.png')
    assert f'{bad} cannot be read (no image that Pillow knows)' in done.stderr
    report = json.loads((tmp_path / 'work' / 'report.json').read_text())
    assert report['corrupt_images'] == {bad: 'no image that Pillow knows'}
    assert report['input_shape'] == [16, 16, 3] and 0.99 * 0.5 <= report['reached']['flops'] <= 0.5
    rows = [row for row in metrics.read_metrics(tmp_path / 'work') if row['stage'] == 'teacher']
    assert [row['step'] for row in rows] == list(range(rows[-1]['step'] + 1))
