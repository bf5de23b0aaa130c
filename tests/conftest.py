import os, tempfile
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]

@pytest.fixture(scope="session", autouse=True)
def own_runs():
    "Tests start from the top with no finished runs, and leave none behind."
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SPKLIP_RUNS"] = folder
        yield
