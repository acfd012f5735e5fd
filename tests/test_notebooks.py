"""The notebooks: each runs from top to bottom, and is committed with what came out.

    python -m tests.test_notebooks [NAME …]

runs them and writes what came out on this machine into them.
"""

import os
import pathlib
import re
import sys
import tempfile

import pytest

nbclient = pytest.importorskip('nbclient', reason="pip install 'jaxkd[notebooks]'")
nbformat = pytest.importorskip('nbformat', reason="pip install 'jaxkd[notebooks]'")

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))
SECONDS = 300  # for a cell


def read(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook, [cell for cell in notebook.cells if cell.cell_type == 'code']


def executed(path, folder):
    """The notebook with what comes out, run in `folder`. Raises where a cell does."""
    notebook, _ = read(path)
    client = nbclient.NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name='python3',
        record_timing=False,
        coalesce_streams=True,
        resources={'metadata': {'path': folder}},
    )
    found = filter(None, (str(ROOT), os.environ.get('PYTHONPATH')))
    named = {'PYTHONPATH': os.pathsep.join(found), 'IPYKERNEL_CELL_NAME': '<cell>'}
    return client.execute(env=os.environ | named)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path):
    executed(path, tmp_path)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_was_run(path):
    notebook, code = read(path)
    assert f'/jaxkd/jaxkd/blob/main/notebooks/{path.name}' in notebook.cells[0].source
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {
        'stream',
        'display_data',
        'execute_result',
    }
    shown = [output.data for output in outputs if 'data' in output]
    assert shown and all('image/png' in data for data in shown)
    said = '\n'.join(output.text for output in outputs if 'text' in output)
    assert not re.search(r'/(root|home|tmp|work|Users)/|[Ww]arning', said), said


def main(names):
    for path in NOTEBOOKS:
        if not names or path.stem in names:
            with tempfile.TemporaryDirectory() as folder:
                notebook = executed(path, folder)
            notebook.metadata.language_info = {'name': 'python'}  # no version of this machine's
            nbformat.write(notebook, path)


if __name__ == '__main__':
    main(sys.argv[1:])
