"Every notebook runs from nothing on the smoke preset, from the project's top."
import re
import nbformat, pytest
from spklip.lab.notebooks import notebooks, run_notebook
from conftest import ROOT


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.relative_to(ROOT/"nbs").as_posix())
def test_runs_on_smoke(path, running):
    done = nbformat.read(running[path].result(), 4)
    ran = [c for c in done.cells if c.cell_type == "code" and c.source.strip()]
    assert all(c.execution_count for c in ran)


def test_deviations_quote_the_tables_there_are(tmp_path, running):
    stored = ROOT/"nbs"/"12_deviations.ipynb"
    again = running[stored].result() if stored in running else run_notebook(stored, tmp_path/"again.ipynb")
    quoted = lambda path: [re.sub(r"\de-\d+", "", o.data["text/markdown"]) for c in nbformat.read(path, 4).cells
                           for o in c.get("outputs", []) if "text/markdown" in o.get("data", {})]
    assert quoted(again) == quoted(stored) != [], "run nbs/12_deviations.ipynb again"
