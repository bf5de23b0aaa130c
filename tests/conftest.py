import multiprocessing, os, tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from spklip.lab.notebooks import run_notebook, times

ROOT = Path(__file__).resolve().parents[1]

def pytest_collection_modifyitems(items):
    "Notebooks run beside the other tests from the start; who waits for them comes last."
    items.sort(key=lambda item: item.path.name == "test_notebooks.py")


@pytest.fixture(scope="session", autouse=True)
def own_runs():
    "Tests start from the top with no finished runs, and leave none behind."
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SPKLIP_RUNS"] = folder
        yield


@pytest.fixture(scope="session", autouse=True)
def running(own_runs, request, tmp_path_factory):
    "The notebooks of the chosen tests: path -> the executed copy to come. Two at a time with a thread each, from the start, on what the other tests leave idle."
    chosen = [item.callspec.params["path"] for item in request.session.items if item.name.startswith("test_runs_on_smoke")]
    folder, more = tmp_path_factory.mktemp("notebooks"), {"04_train": {"seeds": 2}} # side by side, in processes
    pool = ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), initializer=os.nice, initargs=(19,))
    chosen.sort(key=lambda path: -times().get(path.relative_to(ROOT/"nbs").with_suffix("").as_posix(), 0)) # the longest first
    before, os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS"), "1" # for the processes that now start
    to_come = {path: pool.submit(run_notebook, path, folder/path.relative_to(ROOT/"nbs"), preset="smoke", **more.get(path.stem, {})) for path in chosen}
    del os.environ["OMP_NUM_THREADS"]
    if before: os.environ["OMP_NUM_THREADS"] = before
    yield to_come
    pool.shutdown(cancel_futures=True)
