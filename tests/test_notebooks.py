"Every notebook runs from nothing on the smoke preset, from the project's top."
import nbformat, pytest
from spklip.lab.notebooks import notebooks
from conftest import ROOT


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.relative_to(ROOT/"nbs").as_posix())
def test_runs_on_smoke(path, running):
    done = nbformat.read(running[path].result(), 4)
    ran = [c for c in done.cells if c.cell_type == "code" and c.source.strip()]
    assert all(c.execution_count for c in ran)
