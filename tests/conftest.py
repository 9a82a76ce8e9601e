"""What all tests share. None may touch the progress or the downloads of whoever runs them."""
import os
import shutil
import socket
import threading
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
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update"]
LONGEST = ["test_site", "test_vram", "test_static", "test_rehearse", "test_qlora"]


PROXIES = [spelt for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
           for spelt in (name, name.lower())]


class Proxy:
    "A proxy that records who asks it, and serves nobody; `env` names it in every variable."

    def __init__(self):
        self.seen, self.server = [], socket.create_server(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{self.server.getsockname()[1]}"
        self.env = dict.fromkeys(PROXIES, url)
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        while True:
            try: client, _ = self.server.accept()
            except OSError: return   # closed
            with client:
                line = client.recv(4096).split(b"\r\n")[0]
                self.seen.append(line.decode(errors="replace"))
                client.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")


def pytest_addoption(parser):
    parser.addoption("--proxied", action="store_true", help="all proxy variables name a recorder: "
                     "a request that reaches it fails the session")


def pytest_configure(config):
    config.recorder = Proxy() if config.getoption("--proxied") else None
    if not config.recorder: return
    os.environ.update(config.recorder.env)
    for name in ("NO_PROXY", "no_proxy"): os.environ.pop(name, None)


def pytest_sessionfinish(session):
    if not (session.config.recorder and session.config.recorder.seen): return
    print("\nThese requests reached the proxy:", *session.config.recorder.seen, sep="\n  ")
    session.exitstatus = 1


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


def _browser(playwright) -> str:
    "The system's Chromium, else Playwright's own; without one the tests fail with what to do."
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next((p for p in map(shutil.which, names) if p), playwright.chromium.executable_path)
    if not Path(path).exists():
        pytest.fail("No Chromium was found. Install one (`apt install chromium`, or `playwright "
                    "install chromium`) and run the tests again.")
    return path


@pytest.fixture(scope="module")
def chromium():
    """The browser, for one file of tests: until Playwright is stopped its event loop counts as
    running in this thread, and whatever wants a loop of its own fails."""
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=_browser(p), args=FLAGS)
        yield browser
        browser.close()
