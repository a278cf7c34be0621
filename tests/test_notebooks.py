"""The notebooks run from top to bottom, on tiny budgets, and are committed as a real run left them."""

import importlib.util
import json
import re
import shutil

import pytest

from tests.helpers.programs import ROOT

NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))
# By notebook: what CI puts behind the cell of parameters.
BUDGETS = {
    'quickstart': 'TOTAL_FRAMES = 5_000\nEPISODES = 4',
    'vtrace_ablation': 'LEVELS = (1.0, 4.0)\nSEEDS = (0,)\nTOTAL_FRAMES = 400',
    # Whole games of Pong would need 60,000 frames to end.
    'atari': 'TOTAL_FRAMES = 12_000\nEPISODES = 1\nfrom impala_jax.environments import atari; atari._MAX_FRAMES = 500',
    'your_environment': 'TOTAL_FRAMES = 2_000\nEPISODES = 4',
}
# By notebook: what it needs beside what all need.
MODULES = {'atari': 'ale_py', 'your_environment': 'gymnasium'}


def load(path):
    return json.loads(path.read_text(encoding='utf-8'))


def test_every_notebook_has_a_budget():
    assert {path.stem for path in NOTEBOOKS} == set(BUDGETS)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_with_the_outputs_of_a_real_run(path):
    text = path.read_text(encoding='utf-8')
    assert len(text) < 1 << 20
    cells = [cell for cell in load(path)['cells'] if cell['cell_type'] == 'code']
    counts = [cell['execution_count'] for cell in cells]
    assert counts == list(range(1, len(cells) + 1)), 'not the outputs of one run, from top to bottom'
    outputs = [output for cell in cells for output in cell['outputs']]
    assert any('image/png' in output.get('data', {}) for output in outputs)
    for output in outputs:
        assert output['output_type'] != 'error'
        assert output.get('name') != 'stderr', output
    assert not re.search(r'/(tmp|home|root|Users|work)/', text)


@pytest.mark.notebooks
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_runs(path, tmp_path, monkeypatch):
    import nbclient
    import nbformat

    module = MODULES.get(path.stem)
    if module is not None and importlib.util.find_spec(module) is None:
        pytest.skip(f'{module} not installed')
    # As a reader has it: without the eight devices of the other tests, of which a batch of four is no multiple.
    monkeypatch.delenv('XLA_FLAGS', raising=False)
    # So few updates take less time than XLA's optimisations.
    monkeypatch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
    shutil.copy(path, tmp_path)
    notebook = nbformat.read(tmp_path / path.name, as_version=4)
    (parameters,) = [i for i, cell in enumerate(notebook.cells) if 'parameters' in cell.metadata.get('tags', [])]
    notebook.cells.insert(parameters + 1, nbformat.v4.new_code_cell(BUDGETS[path.stem]))
    client = nbclient.NotebookClient(notebook, timeout=240, resources={'metadata': {'path': str(tmp_path)}})
    client.execute()
    assert list(tmp_path.glob('runs/*'))
