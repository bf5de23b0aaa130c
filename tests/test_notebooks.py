"Every notebook runs from nothing on the smoke preset, from the project's top; two at a time, with a thread each."
import multiprocessing, os
from concurrent.futures import ProcessPoolExecutor

import nbformat, pytest
from spklip.lab.notebooks import notebooks, run_notebook
from conftest import ROOT


@pytest.fixture(scope="module")
def running(tmp_path_factory, request):
    "The notebooks of the chosen tests, each with the executed copy to come."
    folder, more = tmp_path_factory.mktemp("notebooks"), {"04_train": {"seeds": 2}} # side by side, in processes
    chosen = [item.callspec.params["path"] for item in request.session.items if item.fspath == request.node.fspath]
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        yield {path: pool.submit(run_notebook, path, folder/path.relative_to(ROOT/"nbs"), preset="smoke", **more.get(path.stem, {})) for path in chosen}
    del os.environ["OMP_NUM_THREADS"]


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.relative_to(ROOT/"nbs").as_posix())
def test_runs_on_smoke(path, running):
    done = nbformat.read(running[path].result(), 4)
    ran = [c for c in done.cells if c.cell_type == "code" and c.source.strip()]
    assert all(c.execution_count for c in ran)
