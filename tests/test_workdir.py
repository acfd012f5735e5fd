"""The folder of a run: one process at a time, and records that are whole or made again."""

import json
import os
import shutil

import ml_collections
import pytest

from jaxkd import errors, workdir

CONFIG = ml_collections.ConfigDict(
    {
        'seed': 0,
        'blocks': (('a', {'strength': 2.0}),),
        'data': {'name': 'digits', 'corrupt_limit': 1},
    }
)


def test_one_process_at_a_time(tmp_path):
    said = []
    with workdir.claimed(tmp_path / 'new', CONFIG, 'images', said.append):
        words = f'process {os.getpid()} on .* is at work there'
        with (
            pytest.raises(errors.ConfigError, match=words),
            workdir.claimed(tmp_path / 'new', CONFIG, 'images', said.append),
        ):
            pass
    with workdir.claimed(tmp_path / 'new', CONFIG, 'images', said.append):
        pass
    other = ml_collections.ConfigDict({**CONFIG, 'seed': 1})
    with (
        pytest.raises(errors.ConfigError, match=r'seed \(0 there, 1 now\)'),
        workdir.claimed(tmp_path / 'new', other, 'images', said.append),
    ):
        pass
    more = ml_collections.ConfigDict({**CONFIG, 'data': {**CONFIG.data, 'corrupt_limit': 9}})
    with workdir.claimed(tmp_path / 'new', more, 'images', said.append):
        found = workdir.read_json(tmp_path / 'new' / 'config.json', said.append)
        assert found['config']['data']['corrupt_limit'] == 9
    with (
        pytest.raises(errors.ConfigError, match="data.name is 'digits': its images .* are others"),
        workdir.claimed(tmp_path / 'new', CONFIG, 'others', said.append),
    ):
        pass
    assert said == []
    (tmp_path / 'file').touch()
    with (
        pytest.raises(errors.ConfigError, match='a file has that name'),
        workdir.claimed(tmp_path / 'file', CONFIG, 'images', said.append),
    ):
        pass


@pytest.mark.parametrize('place', ['"seed": 0', '"jax"', '"sha256"', '{', None])
def test_a_damaged_record_is_set_aside_and_made_again(tmp_path, place):
    said, path = [], tmp_path / 'config.json'
    with workdir.claimed(tmp_path, CONFIG, 'images', said.append):
        before = path.read_text()
    assert workdir.read_json(path, said.append) == {
        'config': workdir.record(CONFIG),
        'images': 'images',
        'versions': workdir.versions(),
        'command': workdir.command(),
    }
    damaged = before.replace(place, place.replace(place[-2:], '9')) if place else ''
    path.write_text(damaged)
    with workdir.claimed(tmp_path, CONFIG, 'images', said.append):
        assert path.read_text() == before
    assert len(said) == 1 and 'config.json.damaged' in said[0]
    assert (tmp_path / 'config.json.damaged').read_text() == damaged != before


def test_a_text_replaces_nothing_else(tmp_path):
    (tmp_path / 'page.tmp').write_text('mine')
    for name in ('page.html', 'other.tmp'):
        workdir.write_text(tmp_path / name, 'a page')
    found = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert found == {'page.tmp': 'mine', 'page.html': 'a page', 'other.tmp': 'a page'}


def test_who_only_looks_moves_nothing(tmp_path):
    path = tmp_path / 'report.json'
    assert workdir.look_up(path) is None
    workdir.write_json(path, {'accuracy': 0.5})
    assert workdir.look_up(path) == {'accuracy': 0.5}
    path.write_text(path.read_text().replace('0.5', '0.6'))
    with pytest.raises(errors.CheckpointError, match='report.json: is damaged'):
        workdir.look_up(path)
    assert [file.name for file in tmp_path.iterdir()] == ['report.json']
    path.write_text('{"accuracy": 0.5}')  # as the first versions wrote it
    assert workdir.look_up(path) == {'accuracy': 0.5}


def test_a_finished_run_is_known_by_its_report(tmp_path):
    assert workdir.finished(tmp_path, CONFIG, print) is None
    report = {'config': workdir.record(CONFIG), 'accuracy': 0.1 + 0.2, 'shares': (1, 2)}
    workdir.write_json(tmp_path / 'report.json', report)
    assert workdir.finished(tmp_path, CONFIG, print) == json.loads(json.dumps(report))
    with pytest.raises(errors.ConfigError, match='seed'):
        workdir.finished(tmp_path, ml_collections.ConfigDict({'seed': 3}), print)
    said = []
    (tmp_path / 'report.json').write_bytes(b'\xff\x00')
    assert workdir.finished(tmp_path, CONFIG, said.append) is None
    assert 'report.json.damaged' in said[0]
    shutil.rmtree(tmp_path)
    (tmp_path).write_text('a file')
    assert workdir.finished(tmp_path, CONFIG, print) is None
