"""The folder of a run: whose it is, and its records, each written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import socket
import sys
from typing import Any

import ml_collections

from jaxkd import errors

# Names the images that could not be read; there is none where all could.
CORRUPT_IMAGES = 'corrupt_images.json'
# Fields that a run which goes on may have changed, and what stands for them in what it depends on.
FREE = {'data.corrupt_limit': 10}
PACKAGES = ('jaxkd', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


@contextlib.contextmanager
def claimed(
    workdir: pathlib.Path,
    config: ml_collections.ConfigDict,
    images: str,
    say: Callable[[str], None],
) -> Iterator[None]:
    """Makes the workdir this config's, and this process's as long as the context lasts.

    The lock is the operating system's and ends with the process, however that ends. A config.json
    that is damaged or missing is written anew: checkpoints know themselves what they depend on.

    Args:
      workdir: made if it is missing.
      config: the run's.
      images: tells those that it learns from apart from others.
      say: is told what was damaged.

    Raises:
      ConfigError: if the workdir cannot be written, if a process is at work there, or if it belongs
        to a run with another config, whose fields that differ are named, or with other images.
    """
    if os.path.isfile(workdir):
        why = 'a file has that name; take another'
        raise errors.ConfigError('--workdir', str(workdir), why=why)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not os.access(workdir, os.W_OK):
            raise PermissionError(f'no permission to write in {workdir}')
        lock = open(workdir / '.lock', 'a+')  # noqa: SIM115 (closed below)
    except OSError as error:
        raise errors.ConfigError(
            '--workdir', str(workdir), why=f'it cannot be written: {error.strerror or error}'
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or 'another process'
            why = f'{holder} is at work there; wait for it, or take another workdir'
            raise errors.ConfigError('--workdir', str(workdir), why=why) from None
        except OSError as error:
            say(f'{workdir}: cannot be locked ({error.strerror}); let no other run write there')
        lock.truncate(0)
        lock.write(f'process {os.getpid()} on {socket.gethostname()}\n')
        lock.flush()
        known = read_json(workdir / 'config.json', say)
        if known:
            _check_same(workdir, known['config'], config)
            if known.get('images', images) != images:
                why = (
                    f'its images or their classes are others than when the run in {workdir} began; '
                    'set them back, or take another workdir'
                )
                raise errors.ConfigError('data.name', config.data.name, why=why)
        now = {'config': record(config), 'images': images}
        if not known or now != {key: known.get(key) for key in now}:
            begun = known or {'versions': versions()}
            write_json(workdir / 'config.json', {**begun, **now, 'command': command()})
        yield


def finished(
    workdir: pathlib.Path, config: ml_collections.ConfigDict, say: Callable[[str], None]
) -> dict[str, Any] | None:
    """The report of a run that came to its end, or None.

    Raises:
      ConfigError: if it is that of a run with another config; the fields that differ are named.
    """
    report = read_json(workdir / 'report.json', say)
    if report:
        _check_same(workdir, report['config'], config)
    return report


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object, whole or not at all, with a SHA-256 of its own."""
    write_text(path, json.dumps({**content, 'sha256': _digest(content)}, indent=2) + '\n')


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text, whole or not at all."""
    with written_aside(path) as aside, open(aside, 'w', encoding='utf-8') as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def written_aside(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Where to write a file that is to be there whole or not at all; it is named at the end."""
    aside = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def read_json(path: pathlib.Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    """What `write_json` wrote; None if there is none, or it is damaged and was set aside.

    Raises:
      CheckpointError: if it cannot be read, for lack of permission, say.
    """
    content, whole = _content(path)
    if whole:
        return content
    aside = path.with_name(f'{path.name}.damaged')
    path.replace(aside)
    say(f'{path}: is damaged; it was set aside as {aside.name} and is made again')
    return None


def look_up(path: pathlib.Path) -> dict[str, Any] | None:
    """`read_json` for somebody who only looks: a damaged file stays where it is.

    One without a SHA-256 will do, as earlier versions wrote them.

    Raises:
      CheckpointError: if it is damaged or cannot be read.
    """
    content, whole = _content(path, unsigned=True)
    if not whole:
        raise errors.CheckpointError(path, 'is damaged; the command of its run makes it again')
    return content


def _content(path: pathlib.Path, unsigned: bool = False) -> tuple[dict[str, Any] | None, bool]:
    """What is in a file, None if there is none, and whether that is what was written."""
    try:
        content = json.loads(path.read_bytes())
        known = content.pop('sha256', None)
        return content, known == _digest(content) or (unsigned and known is None)
    except (FileNotFoundError, NotADirectoryError):
        return None, True
    except OSError as error:
        raise errors.CheckpointError(path, f'cannot be read: {error.strerror}') from None
    except (ValueError, TypeError, AttributeError):  # no JSON, or no object
        return None, False


def corrupt_images(workdir: pathlib.Path, say: Callable[[str], None]) -> dict[str, str]:
    """The images that this run could not read, by name why not."""
    return read_json(workdir / CORRUPT_IMAGES, say) or {}


def record(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The config as JSON holds it."""
    return json.loads(config.to_json_best_effort())


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {'python': platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = 'not installed'
    return found


def command() -> str:
    """The command that this process was started with."""
    return shlex.join(['python', *sys.orig_argv[1:]])


def _digest(content: Mapping[str, Any]) -> str:
    # Of what comes back from JSON, where tuples are lists and keys are texts.
    text = json.dumps(json.loads(json.dumps(content)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_same(
    workdir: pathlib.Path, there: Mapping[str, Any], config: ml_collections.ConfigDict
) -> None:
    known, now = flat(there), flat(record(config))
    differing = [
        f'{key} ({known.get(key)!r} there, {now.get(key)!r} now)'
        for key in sorted((known.keys() | now.keys()) - FREE.keys())
        if known.get(key) != now.get(key)
    ]
    if differing:
        raise errors.ConfigError(
            '--workdir',
            str(workdir),
            why='it belongs to a run with another config; take another workdir, or set back '
            + ', '.join(differing),
        )


def flat(tree: Any, prefix: str = '') -> dict[str, Any]:
    """A config's values by their names, such as 'teacher.epochs'."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {
        path: leaf
        for key, value in tree.items()
        for path, leaf in flat(value, f'{prefix}.{key}' if prefix else key).items()
    }
