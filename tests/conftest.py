"""What all tests share. None may touch the progress or the downloads of whoever runs them."""
import os
from pathlib import Path

# One thread a process: on models as small as most of these two threads wait for each other, and
# `make` runs two processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest

# The same cases each time, so that a red run can be repeated; once a week new ones are drawn.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

ROOT = Path(__file__).resolve().parent.parent
LONGEST = ["test_site", "test_vram", "test_static", "test_rehearse", "test_qlora"]


def pytest_collection_modifyitems(items):
    "The files that take longest come first, so that two processes end at about the same time."
    stems = LONGEST + sorted({i.path.stem for i in items} - {*LONGEST})
    items.sort(key=lambda item: stems.index(item.path.stem))


@pytest.fixture(scope="session")
def root() -> Path:
    "The checkout."
    return ROOT


@pytest.fixture(autouse=True)
def state(tmp_path_factory, monkeypatch) -> Path:
    "A folder of the test's own for the learner's progress."
    path = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("MLCOURSE_STATE", str(path))
    monkeypatch.delenv("MLCOURSE_EXERCISES", raising=False)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    "An empty cache of the test's own, for tests that download; others use the real one."
    monkeypatch.setenv("MLCOURSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLCOURSE_OFFLINE", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def environment(state) -> dict[str, str]:
    "The environment for a process that a test starts."
    return {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb", "NO_COLOR": "1"}
