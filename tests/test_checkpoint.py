"""Checkpoints: exact round trips, damage that is always noticed, and kills that lose nothing."""

import hashlib
import inspect
import json
import logging
import os
from pathlib import Path
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import NamedTuple
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd import checkpoint
from jaxkd.errors import CheckpointError


def small_tree():
    rng = np.random.default_rng(0)
    return {
        'params': {
            'Conv_0': {'kernel': rng.normal(size=(3, 3, 2, 8)).astype(np.float32)},
            'Dense_0': {
                'kernel': rng.normal(size=(8, 5)).astype(jnp.bfloat16),
                'bias': np.zeros(5),
            },
        },
        'count': np.int32(3),
        # Large enough for a place of its own, where orbax has no check of its own either.
        'noise': rng.integers(0, 256, 3000, np.uint8),
    }


def same(a, b):
    """Whether two nested dicts are equal to the bit, dtypes, shapes and key order included."""
    if isinstance(a, dict) or isinstance(b, dict):
        if not (isinstance(a, dict) and isinstance(b, dict) and list(a) == list(b)):
            return False
        return all(same(a[key], b[key]) for key in a)
    if a is None or b is None:
        return a is b
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def files_of(path):
    return sorted(p for p in Path(path).rglob('*') if p.is_file())


def test_round_trip_of_dtypes_shapes_and_odd_keys(tmp_path):
    nan = np.array([0x7FC00001, 0xFF800000, 0x80000000], np.uint32).view(np.float32)
    tree = {
        'jax': jnp.arange(6.0).reshape(2, 3),
        'numpy': {str(t): np.arange(4).astype(t) for t in ('int8', 'uint16', 'int64', 'float64')},
        'ml': {
            str(t.dtype): np.asarray(jnp.arange(4).astype(t))
            for t in (jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.int4)
        },
        'more': {'bool': np.array([True, False]), 'complex': np.array([1 + 2j], np.complex64)},
        'bits': nan,  # a NaN with a payload, -inf and -0.0
        'scalars': {'np': np.float32(1.5), 'jax': jnp.int32(7), 'zero': np.zeros(())},
        'no elements': {'a': np.zeros((0, 3), np.float32), 'deep': {'b': np.zeros((2, 0))}},
        'empty': {},
        'none': None,
        'fortran': np.asfortranarray(np.arange(6).reshape(2, 3)),
        'strided': np.arange(10)[::2],
        'key': jax.random.key_data(jax.random.key(3)),
        # Names that would meet in one place if they were joined naively.
        'a.b': np.ones(2),
        'a/b': np.ones(2) * 2,
        'a': {'b': np.ones(2) * 3},
        'a%2Eb': np.ones(2) * 4,
        '': {'': np.ones(2) * 5, '%': np.ones(2) * 6},
        'ü \n"\\': np.ones(2) * 7,
        '0': np.ones(2) * 8,
    }
    metadata = {
        'a': [1, 2.5, None, True],
        'inf': float('inf'),
        'ü': {'nested': 'ü'},
        'f': 0.1 + 0.2,
    }
    checkpoint.write(tmp_path / 'new' / 'state', tree, metadata)
    got, got_metadata = checkpoint.read(tmp_path / 'new' / 'state')
    assert same(got, tree)
    assert got_metadata == metadata
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(got))
    assert [p.name for p in (tmp_path / 'new').iterdir()] == ['state']


@pytest.mark.parametrize('tree', [{}, {'a': {}, 'b': None, 'c': np.zeros((0, 2))}])
def test_tree_without_elements(tmp_path, tree):
    checkpoint.write(tmp_path / 'x', tree, {'m': 1})
    got, metadata = checkpoint.read(tmp_path / 'x')
    assert same(got, tree) and metadata == {'m': 1}


def test_big_endian_comes_back_native(tmp_path):
    checkpoint.write(tmp_path / 'x', {'a': np.arange(3, dtype='>f4')}, {})
    assert same(checkpoint.read(tmp_path / 'x')[0], {'a': np.arange(3, dtype='=f4')})


@pytest.mark.parametrize(
    'tree, metadata, words',
    [
        ([np.ones(2)], {}, 'list'),
        ({'a': {3: np.ones(2)}}, {}, 'a/3'),
        ({'a': {'b.c': 'text'}}, {}, 'a/b.c'),
        ({'a': np.array([object()])}, {}, 'a is'),
        ({'a': [np.ones(2), np.ones(3)]}, {}, 'a is'),
        ({'a': np.zeros(2, [('x', 'f4')])}, {}, 'a is'),
        ({'a': np.zeros(2, 'M8[s]')}, {}, 'a is'),
        ({'a': np.zeros(2, 'V3')}, {}, 'a is'),
        ({'k': jax.random.key(0)}, {}, 'key_data'),
        ({}, {'x': np.float32(1)}, 'JSON'),
        ({}, [], 'list'),
    ],
)
def test_what_cannot_be_stored_is_refused(tmp_path, tree, metadata, words):
    with pytest.raises(TypeError, match=words):
        checkpoint.write(tmp_path / 'x', tree, metadata)
    assert not any(tmp_path.iterdir())


def test_replacing(tmp_path):
    path = tmp_path / 'x'
    for i in range(3):
        checkpoint.write(path, {'a': np.full(3, i)}, {'i': i})
        tree, metadata = checkpoint.read(path)
        assert metadata == {'i': i} and tree['a'][0] == i
    assert [p.name for p in tmp_path.iterdir()] == ['x']


def test_a_link_is_replaced_behind_the_link(tmp_path):
    checkpoint.write(tmp_path / 'x', {'a': np.zeros(2)}, {})
    (tmp_path / 'link').symlink_to(tmp_path / 'x')
    checkpoint.write(tmp_path / 'link', {'a': np.ones(2)}, {})
    assert checkpoint.read(tmp_path / 'x')[0]['a'][0] == 1
    assert (tmp_path / 'link').is_symlink()


def test_what_is_no_checkpoint_is_never_replaced(tmp_path):
    (tmp_path / 'home').mkdir()
    (tmp_path / 'home' / 'thesis.tex').write_text('years of work')
    (tmp_path / 'file').write_text('text')
    (tmp_path / 'empty').mkdir()
    for name in ('home', 'file'):
        with pytest.raises(CheckpointError, match='not a checkpoint'):
            checkpoint.write(tmp_path / name, {'a': np.ones(2)}, {})
    with pytest.raises(CheckpointError, match='file'):  # its parent is no directory
        checkpoint.write(tmp_path / 'file' / 'x', {'a': np.ones(2)}, {})
    checkpoint.write(tmp_path / 'empty', {'a': np.ones(2)}, {})
    assert (tmp_path / 'home' / 'thesis.tex').read_text() == 'years of work'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['empty', 'file', 'home']


def test_leftovers_of_a_killed_write(tmp_path):
    path = tmp_path / 'x'
    for name in ('.x.jaxkd-new', '.x.jaxkd-new.orbax-checkpoint-tmp'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'half').write_text('')
    # Killed between the two renames: the old one is aside, and is named.
    checkpoint.write(tmp_path / '.x.jaxkd-old', {'a': np.ones(2)}, {})
    with pytest.raises(CheckpointError, match='previous version.*x.jaxkd-old'):
        checkpoint.read(path)
    checkpoint.write(path, {'a': np.ones(2)}, {})
    assert [p.name for p in tmp_path.iterdir()] == ['x']


def test_full_disk(tmp_path, caplog):
    # A limit on the size of files stands for the full disk: writing fails half way in both.
    path = tmp_path / 'x'
    checkpoint.write(path, {'a': np.ones(2)}, {'good': True})
    stage = checkpoint.Stage(tmp_path / 'stage')
    stage.save(1, {'a': np.ones(2)}, {'good': True}, wait=True)
    big = {'big': {'a': np.random.default_rng(0).normal(size=(500, 500))}, 'b': np.ones(2)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match='could not be written') as info:
            checkpoint.write(path, big, {})
        assert '\n' not in str(info.value) and str(path) in str(info.value)
        with pytest.raises(CheckpointError, match='could not be written'):
            checkpoint.write(tmp_path / 'y', big, {})
        stage.save(2, big, {})  # fails behind our back, which the next call tells
        with pytest.raises(CheckpointError, match='stage/2.*could not be written'):
            stage.save(3, big, {})
        with pytest.raises(CheckpointError, match='stage/2.*could not be written'):
            stage.save(2, big, {}, wait=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert caplog.records == []  # one sentence, not pages
    assert checkpoint.read(path)[1] == {'good': True}
    assert sorted(p.name for p in tmp_path.iterdir()) == ['stage', 'x']
    assert stage.restore()[0] == 1
    assert [p.name for p in (tmp_path / 'stage').iterdir()] == ['1']
    stage.save(2, big, {})
    assert stage.restore()[0] == 2
    stage.close()


# Damage.


def test_missing(tmp_path):
    with pytest.raises(CheckpointError, match='nowhere: there is no such checkpoint'):
        checkpoint.read(tmp_path / 'nowhere')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(CheckpointError, match='empty: its metadata'):
        checkpoint.read(tmp_path / 'empty')


def test_flipped_bytes_are_harmless_or_refused(tmp_path, capfd, caplog):
    path = tmp_path / 'x'
    tree, metadata = small_tree(), {'step': 3, 'loss': 0.25, 'name': 'search'}
    checkpoint.write(path, tree, metadata)
    rng = random.Random(0)
    refused, unnoticed_by_orbax = 0, 0
    for file in files_of(path):
        content = file.read_bytes()
        # All of a short file's ends and some of its middle; three kinds of damage in turn.
        places = set(rng.sample(range(len(content)), min(30, len(content)))) | {0, len(content) - 1}
        for i, place in enumerate(sorted(places)):
            damaged = bytearray(content)
            damaged[place] ^= (1, 0x10, 0xFF)[i % 3]
            file.write_bytes(damaged)
            try:
                got, got_metadata = checkpoint.read(path)
            except CheckpointError as error:
                assert error.path == path and str(path) in str(error)
                assert '\n' not in str(error)
                refused += 1
                unnoticed_by_orbax += 'noise is damaged: it does not match' in str(error)
            else:
                assert same(got, tree) and got_metadata == metadata, (file, place)
        file.write_bytes(content)
    assert refused > 100 and unnoticed_by_orbax > 10
    assert same(checkpoint.read(path)[0], tree)
    # Refusals are exceptions, not pages of log.
    assert capfd.readouterr().err == '' and caplog.records == []


def test_a_flipped_byte_in_a_payload_names_its_leaf(tmp_path):
    # Noise does not compress, so its bytes lie in some file as they are.
    path = tmp_path / 'x'
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    checkpoint.write(path, {'params': {'Conv_0': {'kernel': noise}, 'b': np.ones(3)}}, {})
    needle = noise.tobytes()[1000:1100]
    for file in files_of(path):
        content = bytearray(file.read_bytes())
        at = content.find(needle)
        if at >= 0:
            content[at + 50] ^= 4
            file.write_bytes(content)
            break
    else:
        raise AssertionError('the payload is in no file')
    with pytest.raises(CheckpointError, match='params/Conv_0/kernel is damaged'):
        checkpoint.read(path)


def test_truncated_and_missing_files(tmp_path):
    path, spare = tmp_path / 'x', tmp_path / 'spare'
    tree, metadata = small_tree(), {'step': 3}
    checkpoint.write(spare, tree, metadata)
    refused = 0
    for name in [p.relative_to(spare) for p in files_of(spare)]:
        for size in (None, 0, 0.5, 0.95):
            shutil.copytree(spare, path)
            if size is None:
                (path / name).unlink()
            else:
                os.truncate(path / name, int((path / name).stat().st_size * size))
            try:
                got, got_metadata = checkpoint.read(path)
            except CheckpointError:
                refused += 1
            else:
                assert same(got, tree) and got_metadata == metadata, name
            shutil.rmtree(path)
    assert refused > 10
    for name in ('tree', 'metadata'):
        shutil.copytree(spare, path)
        shutil.rmtree(path / name)
        with pytest.raises(CheckpointError):
            checkpoint.read(path)
        shutil.rmtree(path)


def test_swapped_leaves_and_foreign_metadata_are_refused(tmp_path):
    a, b = tmp_path / 'a', tmp_path / 'b'
    checkpoint.write(a, {'w': np.arange(4.0)}, {})
    checkpoint.write(b, {'w': np.arange(4.0) + 1}, {})
    shutil.rmtree(a / 'tree')
    shutil.copytree(b / 'tree', a / 'tree')
    with pytest.raises(CheckpointError, match='w is damaged'):
        checkpoint.read(a)
    file = b / 'metadata' / 'metadata'
    document = json.loads(file.read_text())
    for change in ({'metadata': {'lr': 1}}, {'leaves': {}}, {'format': 'jaxkd-9'}):
        file.write_text(json.dumps({**document, **change}))
        with pytest.raises(CheckpointError, match='SHA-256'):
            checkpoint.read(b)
    leaf = document['leaves']['w']
    for change in (  # by somebody who can compute a hash
        {'leaves': []},
        {'leaves': {'w': leaf | {'dtype': 'bogus'}}},
        {'leaves': {'w': leaf | {'dtype': 'object'}}},
        {'leaves': {'w': leaf | {'shape': [-1, 3]}}},
        {'leaves': {'w': leaf | {'shape': 'abc'}}},
        {'leaves': {'w': {'shape': [4]}}},
        {'metadata': [1]},
        {'metadata': None},
    ):
        forged = {name: part for name, part in document.items() if name != 'sha256'} | change
        text = json.dumps(forged, sort_keys=True, separators=(',', ':'))
        digest = hashlib.sha256(text.encode()).hexdigest()
        file.write_text(json.dumps(forged | {'sha256': digest}))
        with pytest.raises(CheckpointError, match='none that jaxkd writes'):
            checkpoint.read(b)
    file.write_text('[1, 2]')
    with pytest.raises(CheckpointError, match='not written by jaxkd'):
        checkpoint.read(b)


# Any pytree.


class Moments(NamedTuple):
    mu: dict
    extra: object


def make_state():
    params = {'conv': {'kernel': jnp.ones((3, 4))}, 'empty': {}}
    tx = optax.chain(optax.clip(1.0), optax.adam(optax.constant_schedule(0.1)), optax.ema(0.9))
    return {
        'params': params,
        'opt': tx.init(params),
        'moments': Moments({'x': jnp.zeros(2)}, None),
        'key': jax.random.key(7),
        'keys': jax.random.split(jax.random.key(1, impl='rbg'), 3),
        'raw': jax.random.PRNGKey(0),
        'list': [1, 2.5, True, (np.float16(3),)],
    }


def test_any_pytree_round_trip(tmp_path):
    state = make_state()
    leaves = checkpoint.to_tree(state)
    assert leaves['params/conv/kernel'].shape == (3, 4)
    assert leaves['key'].dtype == np.uint32
    checkpoint.write(tmp_path / 'x', leaves, {})
    read, _ = checkpoint.read(tmp_path / 'x')
    for template in (make_state(), jax.eval_shape(make_state)):
        got = checkpoint.from_tree(template, read)
        assert jax.tree.structure(got) == jax.tree.structure(state)
        assert jax.random.key_impl(got['keys']) == 'rbg'
        assert same(checkpoint.to_tree(got)['keys'], leaves['keys'])
        assert jnp.all(jax.random.bits(got['key']) == jax.random.bits(state['key']))
        for a, b in zip(jax.tree.leaves(got['opt']), jax.tree.leaves(state['opt']), strict=True):
            assert same(a, b)
    got = checkpoint.from_tree(make_state(), read)
    assert [type(x) for x in got['list'][:3]] == [int, float, bool]


def test_weak_types_stay_weak():
    state = {'step': 0, 'scale': jnp.asarray(2.0), 'strong': jnp.float32(1)}
    traces = []

    @jax.jit
    def update(state):
        traces.append(state)
        return jax.tree.map(lambda x: x + 1, state)

    state = update(state)
    got = checkpoint.from_tree(jax.eval_shape(lambda: state), checkpoint.to_tree(state))
    assert got['step'] == 1 and same(update(got)['scale'], jnp.asarray(4.0))
    assert len(traces) == 1


def test_state_that_does_not_fit(tmp_path):
    leaves = checkpoint.to_tree({'a': np.ones((2, 3), np.float32), 'b': [np.ones(2)], 'k': 1})
    template = {'a': np.ones((2, 4), np.float32), 'c': np.ones(2), 'k': 1}
    with pytest.raises(CheckpointError) as info:
        checkpoint.from_tree(template, leaves, tmp_path / 'here')
    text = str(info.value)
    for words in (
        'here',
        'a is float32[2, 3], expected float32[2, 4]',
        'c is missing',
        'b/0 is not',
    ):
        assert words in text
    with pytest.raises(CheckpointError, match='float32.*bfloat16'):
        checkpoint.from_tree({'a': jnp.ones(2, jnp.bfloat16)}, {'a': np.ones(2, np.float32)})
    with pytest.raises(CheckpointError, match='and 15 more'):
        checkpoint.from_tree({str(i): 1 for i in range(20)}, {})
    with pytest.raises(CheckpointError, match=r'uint32\[2\], expected uint32\[4\]'):
        checkpoint.from_tree(jax.random.key(0, impl='rbg'), {'': np.zeros(2, np.uint32)})
    with pytest.raises(ValueError, match="'a/b'"):
        checkpoint.to_tree({'a/b': 1, 'a': {'b': 2}})


# Stages.


def state_of(step):
    """What a stage under test saves at a step: everything follows from the step."""
    rng = np.random.default_rng(step)
    tree = {'w': {str(i): rng.normal(size=(100, 30)) for i in range(4)}, 'step': np.int64(step)}
    return tree, {'step': step, 'sum': float(sum(w.sum() for w in tree['w'].values()))}


def assert_is_state(found, step=None):
    assert found is not None
    assert step is None or found[0] == step
    tree, metadata = state_of(found[0])
    assert same(found[1], {'w': dict(sorted(tree['w'].items())), 'step': tree['step']})
    assert found[2] == metadata


def test_stage_life(tmp_path):
    directory = tmp_path / 'run' / 'search'
    with checkpoint.Stage(directory) as stage:
        assert stage.restore() is None and stage.result() is None
        assert not directory.exists()  # looking leaves no traces
        for step in (1, 3, 10):
            stage.save(step, *state_of(step))
        assert_is_state(stage.restore(), 10)
        assert sorted(p.name for p in directory.iterdir()) == ['10', '3']
        for step in (10, 2):
            with pytest.raises(ValueError, match='does not come after 10'):
                stage.save(step, *state_of(step))
    with checkpoint.Stage(directory) as stage:
        assert_is_state(stage.restore(), 10)
        with pytest.raises(ValueError, match='does not come after 10'):
            stage.save(9, *state_of(9))
        stage.save(11, *state_of(11), wait=True)
        assert (directory / '11').is_dir() and not (directory / '3').exists()
        stage.save(12, *state_of(12))
        stage.finish({'best': np.ones(3)}, {'accuracy': 0.5})
        assert same(stage.result()[0], {'best': np.ones(3)})
    with checkpoint.Stage(directory) as stage:
        assert stage.result()[1] == {'accuracy': 0.5}
        stage.finish({'best': np.ones(3)}, {'accuracy': 0.75})
        assert stage.result()[1] == {'accuracy': 0.75}
        assert_is_state(stage.restore(), 12)
    with pytest.raises(ValueError, match='keep is 0'):
        checkpoint.Stage(directory, keep=0)


def test_stage_copies_before_it_returns(tmp_path):
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x, mine, notes = jnp.zeros((512, 512)), np.zeros(1000), {'a': [0]}
    with checkpoint.Stage(tmp_path) as stage:
        stage.save(0, {'x': x, 'mine': mine}, notes)
        x = step(x)
        x.block_until_ready()
        mine += 1
        notes['a'].append(1)
        _, tree, metadata = stage.restore()
    assert not tree['x'].any() and not tree['mine'].any() and metadata == {'a': [0]}


def damage(path):
    """Flips one byte in the middle of the largest file."""
    file = max(files_of(path), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


def test_damaged_states_are_set_aside(tmp_path):
    said = []
    with checkpoint.Stage(tmp_path, keep=3, report=said.append) as stage:
        for step in (1, 2, 3):
            stage.save(step, *state_of(step), wait=True)
        damage(tmp_path / '3')
        shutil.rmtree(tmp_path / '2' / 'metadata')
        assert_is_state(stage.restore(), 1)
        assert len(said) == 2 and f'{tmp_path}/3: ' in said[0] and '3.damaged' in said[0]
        assert 'w/' in said[0] and f'{tmp_path}/2: its metadata' in said[1]
        assert sorted(p.name for p in tmp_path.iterdir()) == ['1', '2.damaged', '3.damaged']
        stage.save(2, *state_of(2))
        stage.save(3, *state_of(3), wait=True)
        damage(tmp_path / '3')
        assert_is_state(stage.restore(), 2)
        assert (tmp_path / '3.damaged-2').is_dir()
        stage.finish({'a': np.arange(1000.0)}, {})
        damage(tmp_path / 'result' / 'tree')
        assert stage.result() is None
        assert (tmp_path / 'result.damaged').is_dir() and len(said) == 4
        assert_is_state(stage.restore(), 2)
        damage(tmp_path / '1')
        damage(tmp_path / '2')
        assert stage.restore() is None
    with checkpoint.Stage(tmp_path) as stage:
        assert stage.restore() is None
        stage.save(0, *state_of(0), wait=True)
        damage(tmp_path / '0')
        with pytest.warns(UserWarning, match='/0: .* set aside as 0.damaged'):
            assert stage.restore() is None


def test_quiet_and_no_threads_left(tmp_path, capfd):
    absl = logging.getLogger('absl')
    level, before = absl.level, set(threading.enumerate())
    absl.setLevel(logging.DEBUG)  # as `absl.app.run` does
    handler = logging.StreamHandler(sys.stderr)
    absl.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            with checkpoint.Stage(tmp_path) as stage:
                for step in range(4):
                    stage.save(step, *state_of(step))
                stage.finish(*state_of(9))
                assert_is_state(stage.restore(), 3)
                assert stage.result() is not None
        absl.info('this line is not from orbax')
    finally:
        absl.removeHandler(handler)
        absl.setLevel(level)
    out, err = capfd.readouterr()
    lines = [line for line in (out + err).splitlines() if 'not from orbax' not in line]
    assert lines == [] and 'not from orbax' in out + err
    assert set(threading.enumerate()) == before


NURSERY = """
# Forks a process for every line of its input: they start at once, having imported everything.
import os, sys, time
import numpy as np
from jaxkd import checkpoint

{state_of}

def say(*words):
    # In one go: nothing is said by halves.
    os.write(1, (' '.join(map(str, words)) + '\\n').encode())

def run():
    stage = checkpoint.Stage(sys.argv[1])
    found = stage.restore()
    step = -1 if found is None else found[0]
    say('start', os.getpid(), step)
    deadline = time.monotonic() + 60  # in case nobody kills it
    while time.monotonic() < deadline:
        step += 1
        stage.save(step, *state_of(step))
        if step % 3 == 2:
            stage.wait()
            say('saved', step)
        if step % 7 == 6:
            stage.finish(*state_of(step))
            say('finished', step)

for _ in sys.stdin:
    if os.fork() == 0:
        try:
            run()
        finally:
            os._exit(1)
    say('end', os.WIFSIGNALED(os.wait()[1]))
"""


def test_killed_at_any_moment(tmp_path):
    directory, rng = tmp_path / 'stage', random.Random(1)
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
    environment['PYTHONPATH'] = str(Path(checkpoint.__file__).parents[1])
    script = NURSERY.format(state_of=inspect.getsource(state_of))
    command = [sys.executable, '-W', 'error::UserWarning', '-W', 'ignore::RuntimeWarning', '-c']
    saved, finished = -1, -1
    with (
        open(tmp_path / 'errors', 'w') as errors,
        subprocess.Popen(
            [*command, script, str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        ) as nursery,
    ):
        for _ in range(12):
            nursery.stdin.write('go\n')
            nursery.stdin.flush()
            start = nursery.stdout.readline().split()
            assert start and start[0] == 'start', (tmp_path / 'errors').read_text()
            # What was said to be on disk is never lost.
            assert int(start[2]) >= saved
            time.sleep(rng.uniform(0.0, 0.8))
            os.kill(int(start[1]), signal.SIGKILL)
            for line in iter(nursery.stdout.readline, ''):
                word, value = line.split()
                if word == 'saved':
                    saved = int(value)
                elif word == 'finished':
                    finished = int(value)
                else:
                    assert line == 'end True\n', (tmp_path / 'errors').read_text()
                    break
            # Nothing was damaged, so nothing is set aside, and all is what was given to save.
            with warnings.catch_warnings():
                warnings.simplefilter('error')
                stage = checkpoint.Stage(directory)
                found, result = stage.restore(), stage.result()
            assert (-1 if found is None else found[0]) >= saved
            if found is not None:
                assert_is_state(found)
            if result is not None:
                assert_is_state((result[1]['step'], *result))
                assert result[1]['step'] >= finished
        nursery.stdin.close()
    assert saved > 5 and finished > 0
    with checkpoint.Stage(directory) as stage:
        step = stage.restore()[0] + 1
        stage.save(step, *state_of(step))
        stage.finish(*state_of(step))
    names = {p.name for p in directory.iterdir()}
    assert names == {'result', str(step), str(step - 1)}, names
