"""Saved states and models: directories that orbax writes, checked leaf by leaf when read back.

Two layers. `write` and `read` keep one tree of arrays with its metadata in one directory, which is
either whole or absent. `Stage` keeps the latest few states of one stage of a run, and its result,
so that a run killed at any moment goes on as if it had not been killed. `to_tree` and `from_tree`
turn any pytree (a train state, an optax state) into what these two store, and back.

A directory is a plain orbax checkpoint with two items, `tree` (arrays) and `metadata` (JSON). Why
more than orbax: it restores a flipped byte of an array's payload silently, as garbage. So the JSON
item records the dtype, shape and SHA-256 of every leaf, and a SHA-256 of itself, and everything is
checked before anything is handed out.

In a job of several processes, process 0 writes (what it writes must be whole there: replicated, or
on its own devices) and the others return at once; all of them may read. Whoever reads what another
process writes has to wait for it by other means; `jaxkd.hosts.at_first` reads and writes in process
0 and tells the others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
import concurrent.futures
import hashlib
import json
import logging
import operator
import os
from pathlib import Path
import shutil
import sys
from typing import Any
import warnings

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxkd.errors import CheckpointError

_FORMAT = 'jaxkd-1'


def write(path: str | os.PathLike, tree: Mapping[str, Any], metadata: dict) -> None:
    """Writes a tree of arrays and its metadata into the directory `path`.

    They are written aside and renamed, so `path` is never half-written. A checkpoint that already
    lies there is moved aside, replaced, and removed; anything else that lies there is left alone
    and refused.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> write(f'{folder}/state', {'dense': {'kernel': np.ones((2, 3))}}, {'step': 7})
    >>> tree, metadata = read(f'{folder}/state')
    >>> tree['dense']['kernel'].shape, metadata
    ((2, 3), {'step': 7})

    Args:
      path: the directory to make; its parents are made too.
      tree: nested dict with string keys; its leaves are jax or numpy arrays or scalars, of any
        shape and of any boolean or numeric dtype (bfloat16 included), or None. Typed PRNG keys are
        given as their `jax.random.key_data`; see `to_tree` for other containers.
      metadata: what `json.dumps` takes: tuples come back as lists, and keys as strings.

    Raises:
      CheckpointError: it cannot be written (a full disk, say), or something that is no checkpoint
        lies at `path`. What was at `path` before is then still there.
      TypeError: `tree` or `metadata` holds something that cannot be stored.
    """
    if jax.process_index() == 0:
        _write(path, _host(tree), _json_text(metadata))


def read(path: str | os.PathLike) -> tuple[dict, dict]:
    """Reads what `write` wrote, to the bit, or refuses.

    Args:
      path: the directory.

    Returns:
      `(tree, metadata)`: the nested dict with numpy arrays (on the host, in the dtypes and shapes
      that were written; scalars as arrays of shape `()`) and the metadata.

    Raises:
      CheckpointError: `path` is absent, or part of it is missing or damaged; it says which part.
    """
    path = _absolute(path)
    if not path.is_dir():
        aside = _aside(path, 'old')
        hint = f'; its previous version is in {aside}' if aside.is_dir() else ''
        raise CheckpointError(path, f'there is no such checkpoint{hint}')
    with _checkpointer() as checkpointer:
        manifest = _read_manifest(path, checkpointer)
        leaves = manifest['leaves']
        # Arrays come with a target made of the recorded dtypes and shapes (as views of one zero, so
        # that it takes no memory). Orbax then gives host arrays and never looks for shardings,
        # about which it warns where the devices are not those of the writer.
        target: dict = {}
        for name, entry in leaves.items():
            if _has_payload(entry):
                zero = np.zeros((), np.dtype(entry['dtype']))
                _insert(target, name, np.broadcast_to(zero, entry['shape']))
        stored: dict = {}
        if target:
            try:
                args = ocp.args.Composite(tree=ocp.args.StandardRestore(target))
                stored = checkpointer.restore(path, args)['tree']
            except MemoryError:
                raise
            except Exception as error:
                raise CheckpointError(path, f'its arrays are damaged: {_brief(error)}') from error
    tree: dict = {}
    for name, entry in leaves.items():
        _insert(tree, name, _checked(path, stored, name, entry), decode=True)
    return tree, manifest['metadata']


def read_plain(path: str | os.PathLike, collections: Collection[str]) -> dict:
    """Reads entries of a tree that orbax alone wrote, without anything to check them against.

    Args:
      path: what StandardCheckpointer or PyTreeCheckpointer wrote, or a step of a CheckpointManager.
      collections: names of the entries at the top of the tree; the others are not read.

    Returns:
      Nested dict of the entries that there are, with numpy arrays.

    Raises:
      CheckpointError: there is no such directory, or it cannot be read.
    """
    path = _absolute(path)
    inside = path / 'default'  # where a manager keeps its only item
    path = inside if inside.is_dir() else path
    _quiet()
    options = _this_process()
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    try:
        with ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
            tree = checkpointer.metadata(path).item_metadata.tree
            wanted = {name: tree[name] for name in collections if name in tree}
            if not wanted:  # orbax takes that for a tree of another kind
                return {}
            numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
            args = ocp.args.PyTreeRestore(wanted, restore_args=numpy, partial_restore=True)
            return checkpointer.restore(path, args)
    except MemoryError:
        raise
    except Exception as error:
        raise CheckpointError(path, f'orbax cannot read it: {_brief(error)}') from error


def to_tree(pytree: Any) -> dict[str, np.ndarray]:
    """Flattens any pytree into a flat dict of its leaves, which `write` and `Stage` store.

    >>> to_tree({'a': [np.float32(1), None], 'empty': {}})
    {'a/0': array(1., dtype=float32)}

    Args:
      pytree: its leaves are arrays, scalars, or typed PRNG keys.

    Returns:
      Dict from key path, joined by `'/'`, to numpy array; a typed PRNG key becomes its key data
      (uint32). None and empty containers have no leaves and come back from `from_tree`'s template.
      On CPU the arrays may share memory with jax's; `write` and `Stage.save` copy them.

    Raises:
      ValueError: two leaves have the same joined key path.
    """
    pairs = _named_leaves(pytree)
    # Start all transfers before waiting for the first one.
    values = [jax.random.key_data(leaf) if _is_key(leaf) else leaf for _, leaf in pairs]
    for value in values:
        if isinstance(value, jax.Array):
            value.copy_to_host_async()
    return {name: np.asarray(value) for (name, _), value in zip(pairs, values, strict=True)}


def from_tree(
    template: Any, leaves: Mapping[str, np.ndarray], path: str | os.PathLike = 'checkpoint'
) -> Any:
    """Puts the leaves that `to_tree` named back into the structure of `template`.

    Args:
      template: a pytree like the one given to `to_tree`; `jax.ShapeDtypeStruct`s (from
        `jax.eval_shape`) may stand for its arrays.
      leaves: what `to_tree` returned, or `read` or `Stage.restore` gave back for it.
      path: where it was read, for the error.

    Returns:
      A pytree of the template's structure. Its leaves are numpy arrays (put them on devices with
      `jax.device_put`), typed PRNG keys where the template has these, and Python numbers where the
      template has these or weakly typed scalars (which promote alike).

    Raises:
      CheckpointError: leaves are missing, are left over, or have other shapes or dtypes.
    """
    pairs = _named_leaves(template)
    names = [name for name, _ in pairs]
    problems = [f'{name} is missing' for name in names if name not in leaves]
    expected = set(names)
    problems += [f'{name} is not expected' for name in leaves if name not in expected]
    restored = []
    for name, leaf in pairs:
        if name in leaves:
            value = np.asarray(leaves[name])
            wanted = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
            # Weak types, Python numbers among them, promote differently and compile anew: they stay
            # weak. How wide a Python number is depends on who looks at it (jax or numpy).
            weak = np.ndim(leaf) == 0 and getattr(leaf, 'weak_type', not hasattr(leaf, 'dtype'))
            if not hasattr(wanted, 'dtype'):
                wanted = np.asarray(wanted)
            fits = value.shape == wanted.shape and (
                value.dtype.kind == wanted.dtype.kind if weak else value.dtype == wanted.dtype
            )
            if not fits:
                problems.append(
                    f'{name} is {value.dtype}{list(value.shape)}, expected '
                    f'{wanted.dtype}{list(wanted.shape)}'
                )
            elif _is_key(leaf):
                restored.append(jax.random.wrap_key_data(value, impl=_key_impl(leaf)))
            else:
                restored.append(value.item() if weak else value)
    if problems:
        more = f', and {len(problems) - 5} more' if len(problems) > 5 else ''
        raise CheckpointError(
            path, f'it does not fit what it is read into: {"; ".join(problems[:5])}{more}'
        )
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(template), restored)


def part(leaves: Mapping[str, np.ndarray], key: str) -> dict[str, np.ndarray]:
    """The leaves that `to_tree` named for the entry `key` of a dict, named as for it alone."""
    return {n.removeprefix(f'{key}/'): x for n, x in leaves.items() if n.startswith(f'{key}/')}


def fingerprint(leaves: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of what `to_tree` returned: equal where all names, dtypes, shapes and bits are."""
    return _json_digest({name: _digest(np.asarray(leaf)) for name, leaf in leaves.items()})


class Stage:
    """One stage of a run: its latest few states while it runs, its result once it is done.

    In `directory`, each state is a directory named by its step (an orbax `CheckpointManager` keeps
    them), and the result is the directory `result`. A process may be killed at any moment: what
    can be restored then is always exactly what was given to `save` or `finish`.

        with Stage(workdir / 'search') as stage:
            done = stage.result()
            if done is None:
                start = stage.restore()  # None, or (step, tree, metadata)
                ...
                stage.save(step, tree, metadata)
                ...
                stage.finish(tree, metadata)

    One process at a time may write to a directory. Nothing is created, cleaned up or started in
    the background before the first `save` or `finish`, so looking at a running stage is harmless.

    Args:
      directory: where this stage lives. Made, with its parents, by the first save.
      keep: how many of the latest states stay on disk, at least 1. Two or more leave something to
        go back to when the last one is damaged.
      report: called with one sentence when a damaged state is set aside; by default it warns.
    """

    # A class, because it owns a thread and what runs in it.

    def __init__(
        self,
        directory: str | os.PathLike,
        keep: int = 2,
        report: Callable[[str], None] | None = None,
    ):
        if operator.index(keep) < 1:
            raise ValueError(f'keep is {keep}, but at least one state has to stay')
        self._directory = _absolute(directory)
        self._keep = keep
        self._report = report or (lambda sentence: warnings.warn(sentence, stacklevel=4))
        self._manager: ocp.CheckpointManager | None = None
        self._worker: concurrent.futures.ThreadPoolExecutor | None = None
        self._pending: concurrent.futures.Future | None = None
        self._newest: int | None = None

    def save(
        self, step: int, tree: Mapping[str, Any], metadata: dict, *, wait: bool = False
    ) -> None:
        """Saves a state, in the background.

        The arrays have been copied to the host when this returns, so they may be donated or
        changed afterwards. A save that is still under way is waited for first.

        Args:
          step: its number, larger than all those saved before.
          tree: as in `write`.
          metadata: as in `write`.
          wait: return only when it is on disk.

        Raises:
          CheckpointError: this save (with `wait`) or an earlier one could not be written. The
            states that were saved before are still there.
          TypeError: as in `write`.
          ValueError: `step` is negative, or not after the newest state there is.
        """
        step = operator.index(step)
        if jax.process_index() != 0:
            return
        leaves, text = _host(tree), _json_text(metadata)
        self.wait()
        if self._newest is None:
            self._newest = max(self._steps(), default=-1)
        if step <= self._newest:
            raise ValueError(
                f'step {step} does not come after {self._newest}, the newest in {self._directory}'
            )
        if self._worker is None:
            self._worker = concurrent.futures.ThreadPoolExecutor(1, 'jaxkd-checkpoint')
        self._pending = self._worker.submit(self._save, step, leaves, text)
        self._newest = step
        if wait:
            self.wait()

    def restore(self) -> tuple[int, dict, dict] | None:
        """The newest state that is whole.

        One that is damaged is set aside (`7` is renamed to `7.damaged`) and reported.

        Returns:
          `(step, tree, metadata)` as given to `save`, with numpy arrays, or None where there is no
          state to go on from.

        Raises:
          CheckpointError: a save that was under way could not be written.
        """
        self.wait()
        for step in sorted(self._steps(), reverse=True):
            found = self._read_or_set_aside(str(step))
            if found is not None:
                return step, *found
        return None

    def newest(self) -> int | None:
        """The step of the newest state on disk, whole or not; raises like `wait`."""
        self.wait()
        return max(self._steps(), default=None)

    def forget(self, step: int) -> None:
        """Removes the states of this step and of later ones, the newest first.

        Raises:
          CheckpointError: one cannot be removed, or a save that was under way failed.
        """
        self.wait()
        # The manager must not count states that are no longer there.
        self._close_manager()
        self._newest = None
        if jax.process_index() != 0:
            return
        for known in sorted(self._steps(), reverse=True):
            if known >= step:
                path = self._directory / str(known)
                try:
                    # Renamed first: a kill in between leaves no half of it under its name.
                    _remove(_aside(path, 'old'))
                    os.rename(path, _aside(path, 'old'))
                    _remove(_aside(path, 'old'))
                except OSError as error:
                    raise CheckpointError(path, f'cannot be removed: {_brief(error)}') from error

    def finish(self, tree: Mapping[str, Any], metadata: dict) -> None:
        """Saves the result of the stage, which marks it as finished; returns when it is on disk.

        The mark is the name `result`, which a complete directory gets as the last thing. The
        latest states stay, to go on from should the result be damaged one day.

        Args:
          tree: as in `write`.
          metadata: as in `write`.

        Raises:
          CheckpointError: it, or an earlier save, could not be written.
          TypeError: as in `write`.
        """
        self.wait()
        write(self._directory / 'result', tree, metadata)

    def result(self) -> tuple[dict, dict] | None:
        """`(tree, metadata)` as given to `finish`, with numpy arrays; None if not finished.

        A damaged result is set aside (`result.damaged`) and reported, and counts as none: the stage
        then goes on from its latest state.
        """
        self.wait()
        if not (self._directory / 'result').is_dir():
            return None
        return self._read_or_set_aside('result')

    def wait(self) -> None:
        """Returns when the save under way is on disk; raises CheckpointError if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result()
            except Exception:
                self._newest = None  # look again: this one is not there
                raise

    def close(self) -> None:
        """Waits for the save under way and ends the thread; raises CheckpointError if it failed.

        A process that exits without this may lose the save under way, and nothing else.
        """
        try:
            self.wait()
        finally:
            self._close_manager()
            if self._worker is not None:
                self._worker.shutdown()
                self._worker = None

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _steps(self) -> list[int]:
        if not self._directory.is_dir():
            return []
        return [int(p.name) for p in self._directory.iterdir() if p.name.isdecimal() and p.is_dir()]

    def _read_or_set_aside(self, name: str) -> tuple[dict, dict] | None:
        path = self._directory / name
        try:
            return read(path)
        except CheckpointError as error:
            what = error.what
        aside = path.with_name(f'{name}.damaged')
        for i in range(2, 1000):
            if not aside.exists():
                break
            aside = path.with_name(f'{name}.damaged-{i}')
        # The manager must not count a state that is no longer there.
        self._close_manager()
        self._newest = None
        if jax.process_index() == 0 and path.exists():
            try:
                os.rename(path, aside)
            except OSError as error:
                raise CheckpointError(
                    path, f'{what}; and it cannot be set aside: {_brief(error)}'
                ) from error
        self._report(f'{path}: {what}; it was set aside as {aside.name}')
        return None

    # What follows runs in the thread; `wait` keeps the rest of the class off it meanwhile.

    def _save(self, step: int, leaves: dict[str, Any], text: str) -> None:
        path = self._directory / str(step)
        try:
            if self._manager is None:
                self._manager = self._open_manager()
            self._manager.save(step, args=_composite(leaves, text), force=True)
        except Exception as error:
            self._close_manager()
            # Frees a full disk at once; what a kill leaves behind is removed by the next run.
            self._remove_temporaries()
            raise CheckpointError(path, _unwritten(error)) from error

    def _open_manager(self) -> ocp.CheckpointManager:
        _quiet()
        self._directory.mkdir(parents=True, exist_ok=True)
        self._remove_temporaries()
        # Synchronous, because it runs in a thread of ours, where the hashing is done as well.
        return ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=self._keep,
                create=False,
                enable_async_checkpointing=False,
                multiprocessing_options=_this_process(),
            ),
        )

    def _close_manager(self) -> None:
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def _remove_temporaries(self) -> None:
        # The manager's own option for this runs beside the first save, and leaves failed ones.
        for path in self._directory.glob('*.orbax-checkpoint-tmp'):
            shutil.rmtree(path, ignore_errors=True)


# The directory.


def _write(path: str | os.PathLike, leaves: dict[str, Any], text: str) -> None:
    path = _absolute(path)
    if path.exists() and not _replaceable(path):
        raise CheckpointError(
            path, 'it exists and is not a checkpoint: remove it or choose another'
        )
    new, old = _aside(path, 'new'), _aside(path, 'old')
    # What a killed `write` left behind; the second is what orbax writes before it renames.
    unfinished = (new, new.with_name(f'{new.name}.orbax-checkpoint-tmp'))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in unfinished:
            _remove(leftover)
        with _checkpointer() as checkpointer:
            checkpointer.save(new, _composite(leaves, text))
        if path.exists():
            # The old one stays until the new one has its name: a kill in between loses neither.
            _remove(old)
            os.rename(path, old)
        os.rename(new, path)
    except Exception as error:
        for leftover in unfinished:
            shutil.rmtree(leftover, ignore_errors=True)
        if not path.exists() and old.exists():
            os.rename(old, path)
        raise CheckpointError(path, _unwritten(error)) from error
    shutil.rmtree(old, ignore_errors=True)


def _aside(path: Path, role: str) -> Path:
    # Hidden and named after us, so that it never is something of the user's.
    return path.with_name(f'.{path.name}.jaxkd-{role}')


def _absolute(path: str | os.PathLike) -> Path:
    # Resolved, so that replacing a link replaces what it points at.
    return Path(path).expanduser().resolve()


def _replaceable(path: Path) -> bool:
    if not path.is_dir():
        return False
    names = {p.name for p in path.iterdir()}
    return not names or '_CHECKPOINT_METADATA' in names or {'tree', 'metadata'} <= names


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def _composite(leaves: dict[str, Any], text: str) -> ocp.args.Composite:
    """Orbax's arguments for leaves (from `_host`) and metadata (from `_json_text`)."""
    entries: dict[str, Any] = {}
    stored: dict = {}
    for name, leaf in leaves.items():
        if not isinstance(leaf, np.ndarray):
            entries[name] = leaf
            continue
        entries[name] = {
            'dtype': leaf.dtype.name,
            'shape': list(leaf.shape),
            'sha256': _digest(leaf),
        }
        if _has_payload(entries[name]):
            _insert(stored, name, leaf)
    document = {'format': _FORMAT, 'metadata': json.loads(text), 'leaves': entries}
    items: dict[str, Any] = {
        'metadata': ocp.args.JsonSave({**document, 'sha256': _json_digest(document)})
    }
    if stored:
        items['tree'] = ocp.args.StandardSave(stored)
    return ocp.args.Composite(**items)


def _read_manifest(path: Path, checkpointer: ocp.Checkpointer) -> dict:
    try:
        args = ocp.args.Composite(metadata=ocp.args.JsonRestore())
        manifest = checkpointer.restore(path, args)['metadata']
    except MemoryError:
        raise
    except Exception as error:
        raise CheckpointError(path, f'its metadata cannot be read: {_brief(error)}') from error
    if not isinstance(manifest, dict) or 'sha256' not in manifest:
        raise CheckpointError(path, 'its metadata is damaged, or was not written by jaxkd')
    document = {key: value for key, value in manifest.items() if key != 'sha256'}
    if manifest['sha256'] != _json_digest(document):
        raise CheckpointError(path, 'its metadata is damaged: it does not match its SHA-256')
    if document.get('format') != _FORMAT:
        raise CheckpointError(
            path, f'its format is {document.get("format")!r}, and this version reads {_FORMAT!r}'
        )
    leaves, metadata = document.get('leaves'), document.get('metadata')
    known = isinstance(leaves, dict) and all(map(_describes, leaves.values()))
    if not known or not isinstance(metadata, dict):
        raise CheckpointError(path, 'its metadata is none that jaxkd writes')
    return document


def _describes(entry: Any) -> bool:
    """Whether it is what `_composite` writes about a leaf."""
    if not entry:
        return entry is None or entry == {}
    try:
        dtype = np.dtype(entry['dtype'])
        view = np.broadcast_to(np.zeros((), dtype), entry['shape'])
        written = {'dtype': dtype.name, 'shape': list(view.shape), 'sha256': entry['sha256']}
    except (KeyError, TypeError, ValueError):
        return False
    return _numeric(dtype) and entry == written


def _checked(path: Path, stored: dict, name: str, entry: dict | None) -> Any:
    """The leaf (or None, or an empty dict) that the entry describes, if it is what was written."""
    if not entry:
        return entry if entry is None else {}
    if not _has_payload(entry):
        return np.zeros(entry['shape'], np.dtype(entry['dtype']))
    readable = '/'.join(_decode(key) for key in name.split('/'))
    leaf = stored
    for key in name.split('/'):
        leaf = leaf.get(key) if isinstance(leaf, dict) else None
    if not isinstance(leaf, np.ndarray):
        raise CheckpointError(path, f'{readable} is missing')
    if leaf.dtype.name != entry['dtype'] or list(leaf.shape) != entry['shape']:
        raise CheckpointError(
            path,
            f'{readable} is damaged: it is {leaf.dtype}{list(leaf.shape)}, and was written as '
            f'{entry["dtype"]}{entry["shape"]}',
        )
    if _digest(leaf) != entry['sha256']:
        raise CheckpointError(path, f'{readable} is damaged: it does not match its SHA-256')
    return leaf


def _has_payload(entry: dict | None) -> bool:
    # Orbax refuses arrays without elements, so these live in the metadata alone.
    return bool(entry) and 0 not in entry['shape']


def _digest(array: np.ndarray) -> str:
    # hashlib lets other Python threads run meanwhile.
    digest = hashlib.sha256(f'{array.dtype.name}{list(array.shape)}'.encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _json_digest(document: Any) -> str:
    text = json.dumps(document, sort_keys=True, separators=(',', ':'))
    return hashlib.sha256(text.encode()).hexdigest()


def _json_text(metadata: dict) -> str:
    if not isinstance(metadata, dict):
        raise TypeError(f'the metadata is a {type(metadata).__name__}, expected a dict')
    try:
        return json.dumps(metadata)
    except (TypeError, ValueError) as error:
        raise TypeError(f'the metadata cannot be written as JSON: {error}') from error


# Trees and names.


def _host(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Flattens a nested dict to stored name -> own host copy (or None, or {} for empty dicts)."""
    if not isinstance(tree, Mapping):
        raise TypeError(
            f'the tree is a {type(tree).__name__}, expected a nested dict (see to_tree)'
        )
    flat: dict[str, Any] = {}

    def visit(node: Mapping, prefix: str, readable: str) -> None:
        for key, value in node.items():
            if not isinstance(key, str):
                raise TypeError(f'{readable}{key!r} is not a string key (see to_tree)')
            name, label = prefix + _encode(key), readable + key
            if isinstance(value, Mapping) and value:
                visit(value, f'{name}/', f'{label}/')
            elif isinstance(value, Mapping):
                flat[name] = {}
            elif value is None:
                flat[name] = None
            else:
                flat[name] = value
                if _is_key(value):
                    raise TypeError(f'{label} is a typed PRNG key: give its jax.random.key_data')
                if isinstance(value, jax.Array):
                    value.copy_to_host_async()

    visit(tree, '', '')
    for name, value in flat.items():
        if value is not None and not isinstance(value, Mapping):
            flat[name] = _host_array(value, name)
    return flat


def _host_array(value: Any, name: str) -> np.ndarray:
    label = '/'.join(_decode(key) for key in name.split('/'))
    if not hasattr(value, 'dtype') and not isinstance(value, bool | int | float | complex):
        raise TypeError(f'{label} is a {type(value).__name__}, not an array (see to_tree)')
    # A copy even where jax offers a view: its buffer may be donated before it is written.
    array = np.array(value, copy=True, order='C')
    if not _numeric(array.dtype):
        raise TypeError(f'{label} is a {type(value).__name__} of dtype {array.dtype}, not numbers')
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder('='))
    return array


def _numeric(dtype: np.dtype) -> bool:
    # ml_dtypes' types (bfloat16, float8, int4) are of numpy's kind 'V', but have no fields.
    return dtype.kind in 'biufc' or (dtype.kind == 'V' and not dtype.name.startswith('void'))


def _encode(key: str) -> str:
    # Orbax joins keys with dots (so that 'a.b' and a -> b would be one file), and we join them with
    # slashes: neither may be inside a stored key. A lone '%' stands for the empty key.
    return key.replace('%', '%25').replace('.', '%2E').replace('/', '%2F') or '%'


def _decode(key: str) -> str:
    if key == '%':
        return ''
    return key.replace('%2F', '/').replace('%2E', '.').replace('%25', '%')


def _insert(tree: dict, name: str, value: Any, decode: bool = False) -> None:
    *parents, last = (_decode(key) if decode else key for key in name.split('/'))
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = value


def _named_leaves(pytree: Any) -> list[tuple[str, Any]]:
    pairs = [
        (jax.tree_util.keystr(path, simple=True, separator='/'), leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(pytree)[0]
    ]
    seen = set()
    for name, _ in pairs:
        if name in seen:
            raise ValueError(f'two leaves are named {name!r}: rename one of their containers')
        seen.add(name)
    return pairs


def _is_key(leaf: Any) -> bool:
    dtype = getattr(leaf, 'dtype', None)
    return dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def _key_impl(template: Any) -> Any:
    impl = []
    # Traced, because key_impl takes no ShapeDtypeStruct.
    jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)), template)
    return impl[0]


# Orbax.


def _checkpointer() -> ocp.Checkpointer:
    _quiet()
    options = _this_process()
    handler = ocp.CompositeCheckpointHandler(
        tree=ocp.StandardCheckpointHandler(multiprocessing_options=options),
        metadata=ocp.JsonCheckpointHandler(multiprocessing_options=options),
        composite_options=ocp.CompositeOptions(multiprocessing_options=options),
    )
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def _this_process() -> ocp.options.MultiprocessingOptions:
    # Every process acts alone: no barriers, which in a background thread could deadlock with the
    # collectives of training.
    index = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f'jaxkd-{index}'
    )


def _drop_orbax_noise(record: logging.LogRecord) -> bool:
    if f'{os.sep}orbax{os.sep}' not in record.pathname:
        return True
    twice = record.exc_info is not None and 'raised an exception' in record.getMessage()
    return record.levelno >= logging.WARNING and not twice


def _drop_unread_damage(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    unread = 'exception was never retrieved' in record.getMessage()
    return not (unread and 'tensorstore' in str(error))


def _quiet() -> None:
    # Orbax logs tens of lines a save at level INFO, which absl shows in every program that parses
    # its flags; and when a save fails, each of its threads logs the traceback of the very exception
    # that is then raised. Only these are dropped: other warnings and errors, and everybody else's
    # lines, still show. Adding the same filter twice does nothing.
    logging.getLogger('absl').addFilter(_drop_orbax_noise)
    # When one array of many turns out damaged, orbax raises that and closes its event loop. Those
    # still being read then print pages each: if they fail too, through asyncio's logger; if not,
    # because their loop is gone, through this hook. Nothing is lost with what is dropped here.
    logging.getLogger('asyncio').addFilter(_drop_unread_damage)
    previous = sys.unraisablehook
    if getattr(previous, '__module__', None) == __name__:
        return

    def hook(unraisable: Any) -> None:
        late = unraisable.object is None and isinstance(unraisable.exc_value, RuntimeError)
        if not (late and str(unraisable.exc_value) == 'Event loop is closed'):
            previous(unraisable)

    sys.unraisablehook = hook


def _unwritten(error: BaseException) -> str:
    return f'it could not be written: {_brief(error)}; what was saved before is whole'


def _brief(error: BaseException) -> str:
    """One line of an error: tensorstore's go on for pages."""
    text = ' '.join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f'{text[:300]}...'
