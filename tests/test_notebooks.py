"Every notebook runs from nothing on the smoke preset, from the project's top."
import nbformat, pytest
from spklip.lab.notebooks import notebooks, run_notebook
from conftest import ROOT

@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.relative_to(ROOT/"nbs").as_posix())
def test_runs_on_smoke(path, tmp_path):
    more = {"seeds": 2} if path.stem == "04_train" else {} # side by side, in processes
    done = nbformat.read(run_notebook(path, tmp_path/path.name, preset="smoke", **more), 4)
    ran = [c for c in done.cells if c.cell_type == "code" and c.source.strip()]
    assert all(c.execution_count for c in ran)
