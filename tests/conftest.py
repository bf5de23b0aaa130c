import json, multiprocessing, os, socket, subprocess, sys, tempfile
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


@pytest.fixture(scope="session")
def kernels(own_runs):
    """The `JUPYTER_PATH` of a kernel `python3` that starts at once: with one thread, and on what the other tests leave idle.
    Only Linux forks what has imported so much without harm."""
    if sys.platform != "linux": yield ""; return
    helper = Path(__file__).with_name("forked_kernels.py")
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/socket"); listener.listen()
        spec = {"argv": [sys.executable, "-IS", str(helper), f"{folder}/socket", "{connection_file}"], "display_name": "python3", "language": "python"}
        kernel = Path(folder)/"kernels"/"python3"/"kernel.json"; kernel.parent.mkdir(parents=True)
        kernel.write_text(json.dumps(spec))
        server = subprocess.Popen(["nice", "-n", "19", sys.executable, helper], stdin=listener, env=os.environ | {"OMP_NUM_THREADS": "1"})
        listener.close() # it alone listens: should it end early, nobody waits for it
        yield folder
        server.kill()


@pytest.fixture(scope="session", autouse=True)
def running(own_runs, request, tmp_path_factory):
    "The notebooks of the chosen tests: path -> the executed copy to come. Two at a time, from the start."
    chosen = [item.callspec.params["path"] for item in request.session.items if item.name.startswith("test_runs_on_smoke")]
    if not chosen: yield {}; return
    folder, more = tmp_path_factory.mktemp("notebooks"), {"04_train": {"seeds": 2}} # side by side, in processes
    pool = ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), initializer=use, initargs=(request.getfixturevalue("kernels"),))
    chosen.sort(key=lambda path: -times().get(path.relative_to(ROOT/"nbs").with_suffix("").as_posix(), 0)) # the longest first
    yield {path: pool.submit(run_notebook, path, folder/path.relative_to(ROOT/"nbs"), preset="smoke", **more.get(path.stem, {})) for path in chosen}
    pool.shutdown(cancel_futures=True)


def use(kernels): os.environ["JUPYTER_PATH"] = kernels
