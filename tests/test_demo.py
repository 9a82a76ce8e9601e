"""`mlcourse demo` as a process: its page in a browser, a question, a citation that opens, and
errors that are sentences."""
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest
import uvicorn
from mlcourse.assets import http_client
from mlcourse.notes import ingest
from mlcourse.notes_page import chat_app
from mlcourse.serve import listening

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
CLI = [sys.executable, "-m", "mlcourse.cli", "demo"]
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "NO_COLOR": "1"}
GARDEN = """# The garden

The fence was built in spring 2021.

## Watering

The roses need 12 litres of water every morning.
"""
SETUP = """# The server

The server listens on port 8443. Anna looks after its backups.
"""
TRAP = """# Pictures

The picture of the harbour is ![here](http://outside.example/x.png) <script>alert(1)</script>.
"""
NOTES = {"garden.md": GARDEN, "server/setup.md": SETUP, "trap.md": TRAP}


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notes")
    for name, text in NOTES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@contextmanager
def running(notes, cache):
    "The demo as a process of its own, ended by Ctrl-C's signal; gives its address."
    env = {**ENV, "TERM": "dumb", "MLCOURSE_CACHE": str(cache)}
    command = [*CLI, "rag", str(notes), "--port", "0", "--tier", "tiny"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, env=env, start_new_session=True)
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if "http://" in line: break
        else: pytest.fail("the demo ended: " + "".join(said))
        yield line.split(" is at ")[1].split()[0]
    finally:
        process.send_signal(signal.SIGINT)
        try: process.wait(30)
        except subprocess.TimeoutExpired: os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()


@pytest.fixture(scope="module")
def address(notes, tmp_path_factory):
    with running(notes, tmp_path_factory.mktemp("cache")) as url: yield url


def test_only_the_folder_is_served(address):
    with http_client(address) as client:
        page = client.get(f"{address}source/server/setup.md?first=3&last=3").text
        assert page.count("<mark>") == 1
        for path in ("..%2f..%2fetc%2fpasswd", "%2fetc%2fpasswd", "nothing.md", "server"):
            assert client.get(f"{address}source/{path}").status_code == 404
        assert client.get(address, headers={"host": "outside.example"}).status_code == 400
    assert urlsplit(address).hostname == "127.0.0.1"


@contextmanager
def tab(chromium, address):
    "A tab that may talk to the demo alone."
    context, outside = chromium.new_context(), []
    context.set_default_timeout(60_000)

    def gate(route):
        if route.request.url.startswith((address, "data:", "blob:")): return route.continue_()
        outside.append(route.request.url)
        route.abort()

    context.route("**/*", gate)
    page = context.new_page()
    page.outside = outside
    page.goto(address)
    try: yield page
    finally: context.close()


def ask(page, question):
    box = page.get_by_role("textbox").first
    box.fill(question)
    box.press("Enter")


def test_a_question_is_answered_and_its_citation_opens_the_source(chromium, address):
    with tab(chromium, address) as page: _ask_and_open(page, address)


def _ask_and_open(page, address):
    ask(page, "Which port does the server listen on?")
    link = page.get_by_role("link", name="setup.md").first
    link.wait_for()
    with page.context.expect_page() as opened: link.click()
    source = opened.value
    source.wait_for_load_state()
    assert source.url.startswith(address + "source/server/setup.md")
    assert "8443" in " ".join(source.locator("mark").all_inner_texts())
    source.close()


@contextmanager
def answering(notes, text, citations):
    "The chat's page in a thread of this process, with one answer to everything; gives its address."
    app = chat_app(notes, lambda question: (text, citations))
    with listening(0) as s:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs=dict(sockets=[s]), daemon=True)
        thread.start()
        try: yield "http://{}:{}/".format(*s.getsockname())
        finally:
            server.should_exit = True
            thread.join(30)


def test_an_answer_that_repeats_a_trap_asks_nothing_of_another_server(chromium, notes):
    chunk = next(c for c in ingest(notes) if c.path == "trap.md")
    said = f"{chunk.text} [1]."
    with answering(notes, said, [(1, chunk)]) as url, tab(chromium, url) as page:
        ask(page, "Where is the picture of the harbour?")
        page.get_by_role("link", name="trap.md").first.wait_for()
        assert page.outside == [] and page.locator("[data-testid=bot] img").count() == 0


def sentence(*args):
    done = subprocess.run([*CLI, *args], capture_output=True, text=True, timeout=300, env=ENV)
    return done.returncode, done.stderr.strip().splitlines()


def test_errors_are_sentences(tmp_path, notes):
    code, err = sentence("rag", str(tmp_path / "nowhere"), "--port", "0")
    assert code == 1 and len(err) == 1 and err[0].startswith("There is no folder")
    code, err = sentence("rag", str(tmp_path), "--port", "0")
    assert code == 1 and len(err) == 1 and "nothing that can be read" in err[0]
    code, err = sentence("rag", str(notes), "--tier", "huge", "--port", "0")
    assert code == 2 and len(err) == 1 and "There is no tier 'huge'" in err[0]
    assert sentence("nothing")[0] == 2 and sentence("rag")[0] == 2
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        code, err = sentence("rag", str(notes), "--port", str(s.getsockname()[1]))
    assert code == 1 and len(err) == 1 and "--port" in err[0]
