"""The folder of a run: whose it is, and its records, each written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
import importlib.metadata
import json
import os
import pathlib
import platform
from typing import Any

import ml_collections

from jaxkd import errors

# Names the images that could not be read; there is none where all could.
CORRUPT_IMAGES = 'corrupt_images.json'
PACKAGES = ('jaxkd', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def claim(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Makes the workdir this config's.

    Raises:
      ConfigError: if it cannot be written, or belongs to a run with another config; the fields
        that differ are named.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not os.access(workdir, os.W_OK):
            raise PermissionError(f'no permission to write in {workdir}')
    except OSError as error:
        raise errors.ConfigError(
            '--workdir', str(workdir), why=f'it cannot be written: {error.strerror or error}'
        ) from None
    if (workdir / 'config.json').exists():
        _check_same(workdir, config)
    else:
        write_json(workdir / 'config.json', {'config': record(config), 'versions': versions()})


def finished(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> dict[str, Any] | None:
    """The report of a run that came to its end, or None. Raises like `claim`."""
    if not (workdir / 'report.json').exists():
        return None
    _check_same(workdir, config)
    return json.loads((workdir / 'report.json').read_text())


def corrupt_images(workdir: pathlib.Path) -> dict[str, str]:
    """The images that this run could not read, by name why not."""
    path = workdir / CORRUPT_IMAGES
    return json.loads(path.read_text()) if path.exists() else {}


def write_json(path: pathlib.Path, content: Any) -> None:
    aside = path.with_suffix('.tmp')
    aside.write_text(json.dumps(content, indent=2) + '\n')
    aside.replace(path)


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


def _check_same(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    path = workdir / 'config.json'
    try:
        known = _flat(json.loads(path.read_text())['config'])
    except (OSError, ValueError, KeyError) as error:
        raise errors.CheckpointError(path, f'is no config of a run ({error})') from None
    now = _flat(record(config))
    differing = [
        f'{key} ({known.get(key)!r} there, {now.get(key)!r} now)'
        for key in sorted(known.keys() | now.keys())
        if known.get(key) != now.get(key)
    ]
    if differing:
        raise errors.ConfigError(
            '--workdir',
            str(workdir),
            why='it belongs to a run with another config; take another workdir, or set back '
            + ', '.join(differing),
        )


def _flat(tree: Any, prefix: str = '') -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {
        path: leaf
        for key, value in tree.items()
        for path, leaf in _flat(value, f'{prefix}.{key}' if prefix else key).items()
    }
