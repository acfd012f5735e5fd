"""Images that are decoded when they are asked for: here by threads, or ahead by processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent import futures
import functools
import gc
import multiprocessing
import os
import signal
import threading
from typing import NamedTuple

from absl import flags
import numpy as np

from jaxkd.data import decoding
from jaxkd.data.corrupt import CorruptImages
from jaxkd.data.order import Steps
from jaxkd.errors import ConfigError

AHEAD = 2  # batches that are read ahead, by each process that reads


class Files(NamedTuple):
    """Where the images of a part of a data set are, and how they are seen.

    Attributes:
      read: place -> the bytes of an encoded image. Can be pickled.
      name: place -> what to call it, likewise.
      listing: tells the images among which the places are apart from others.
      places: int [size], of the images of this part.
      labels: int32 [size].
      shape: (height, width, channels) of what is made of them.
      shorter: pixels of the shorter side before the centre is cropped; see `decoding.centre`.
      crop: least share of the area that a training crop shows; see `decoding.random_crop`. 1 shows
        the centre, as in evaluation.
      workers: processes that read the batches of training ahead; 0 for threads of this one.
      corrupt: what cannot be read is remembered here, in this process.
    """

    read: Callable[[int], bytes]
    name: Callable[[int], str]
    listing: str
    places: np.ndarray
    labels: np.ndarray
    shape: tuple[int, int, int]
    shorter: int
    crop: float
    workers: int
    corrupt: CorruptImages | None


def fetch(files: Files, indices: np.ndarray) -> np.ndarray:
    """The images at `indices`, int [n], as evaluation sees them: uint8 [n, *shape]."""
    images, corrupt = _read(files, [(index, None) for index in np.asarray(indices).tolist()])
    files.corrupt.add(corrupt)
    return images


def read_ahead(files: Files, steps: Steps, *, seed: int) -> Iterator[np.ndarray]:
    """The batches of `steps` as training sees them, uint8 [batch, *shape] each, with random crops.

    What is read is a function of the seed and the step, however many processes read and wherever
    they begin. They end with the iterator.
    """
    try:
        yield from _read_ahead(files, steps, seed)
    finally:
        # After their last batch, grain's iterators keep one another and some shared memory.
        gc.collect()


def _read_ahead(files: Files, steps: Steps, seed: int) -> Iterator[np.ndarray]:
    import grain  # takes a second, and data in memory do not need it

    if not flags.FLAGS.is_parsed():  # which grain asks, in a program without absl's flags too
        flags.FLAGS.mark_as_parsed()
    batches = grain.MapDataset.source(steps).map(
        functools.partial(_read_step, files._replace(corrupt=None), seed)
    )
    batches = batches.to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)
    ).mp_prefetch(
        grain.MultiprocessingOptions(num_workers=files.workers), worker_init_fn=_begin_worker
    )
    iterator = iter(batches)
    try:
        for images, corrupt in iterator:
            files.corrupt.add(corrupt)
            # Processes hand images over in shared memory, which is to be free again at once.
            images = np.array(images) if files.workers else images
            yield images
    finally:
        iterator.close()


def _begin_worker(number: int, of: int) -> None:
    """Ties a process to the one that reads from it, which may be killed, or told to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def _read_step(
    files: Files, seed: int, step: tuple[int, np.ndarray]
) -> tuple[np.ndarray, dict[str, str]]:
    number, indices = step
    if files.crop == 1:
        return _read(files, [(index, None) for index in indices.tolist()])
    return _read(files, [(index, (seed, 3, number, index)) for index in indices.tolist()])


def _read(
    files: Files, wanted: list[tuple[int, tuple[int, ...] | None]]
) -> tuple[np.ndarray, dict[str, str]]:
    """Images uint8 [n, *shape], of indices and seeds of crops; and what was corrupt, and why."""
    threads = _threads(max(1, (os.cpu_count() or 1) // max(1, files.workers)))
    results = list(threads.map(lambda one: _read_one(files, *one), wanted))
    corrupt = {name: why for _, failed in results for name, why in failed.items()}
    images = [image for image, _ in results]
    return np.stack(images) if images else np.zeros((0, *files.shape), np.uint8), corrupt


@functools.cache
def _threads(number: int) -> futures.ThreadPoolExecutor:
    return futures.ThreadPoolExecutor(number)


def _read_one(
    files: Files, index: int, seed: tuple[int, ...] | None
) -> tuple[np.ndarray, dict[str, str]]:
    """An image, or in the place of one that cannot be read the next that can, of its class."""
    corrupt: dict[str, str] = {}
    for candidate in _of_its_class(files.labels, index):
        place = int(files.places[candidate])
        try:
            encoded = files.read(place)
            if seed is None:
                image = decoding.centre(encoded, files.shape, files.shorter)
            else:
                rng = np.random.default_rng(seed)
                image = decoding.random_crop(encoded, files.shape, files.crop, rng)
            return image, corrupt
        except Exception as error:  # whatever Pillow raises on damaged files
            corrupt[files.name(place)] = _reason(error)
    name, why = next(iter(corrupt.items()))
    raise ConfigError(
        'data.name',
        name,
        why=f'neither it nor any other image of its class can be read ({why}); repair the class',
    )


def _of_its_class(labels: np.ndarray, index: int) -> Iterator[int]:
    """The index, then the others of its class, from there on and round."""
    yield index
    alike = np.flatnonzero(labels == labels[index])
    start = int(np.searchsorted(alike, index))
    yield from np.roll(alike, -start)[1:].tolist()


def _reason(error: Exception) -> str:
    words = ' '.join(str(error).split()) or type(error).__name__
    # Pillow says which object it was given, which tells nobody anything.
    return 'no image that Pillow knows' if words.startswith('cannot identify image') else words
