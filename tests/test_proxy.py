"""A server on this machine is never reached through a proxy, which would read it all."""
import socket, subprocess, sys, threading
from pathlib import Path

import pytest

from conftest import PROXIES, Proxy

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def proxy(monkeypatch):
    "A recording proxy that every variable names, in both spellings."
    recorder = Proxy()
    for name, url in recorder.env.items(): monkeypatch.setenv(name, url)
    for name in ("NO_PROXY", "no_proxy"): monkeypatch.delenv(name, raising=False)
    yield recorder
    recorder.server.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "127.1.2.3"])
def test_which_addresses_are_of_this_machine(host):
    from mlcourse.assets import is_loopback
    assert is_loopback(f"http://{host}:8080/v1")


@pytest.mark.parametrize("host", ["example.org", "127.0.0.1.example.org", "localhost.example.org",
                                  "192.168.1.2", "[2001:db8::1]"])
def test_which_addresses_are_not(host):
    from mlcourse.assets import is_loopback
    assert not is_loopback(f"http://{host}:8080/v1")


def test_a_client_for_this_machine_asks_it_directly(proxy):
    from mlcourse.assets import http_client
    with socket.create_server(("127.0.0.1", 0)) as server:
        def answer():
            client, _ = server.accept()
            with client:
                client.recv(4096)
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
        threading.Thread(target=answer, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        with http_client(url) as client: assert client.get(url).text == "hi"
    assert proxy.seen == []


def test_a_client_for_the_web_uses_the_proxy(proxy):
    from mlcourse.assets import http_client
    with http_client("http://example.org/") as client:
        assert client.get("http://example.org/").status_code == 502
    assert proxy.seen == ["GET http://example.org/ HTTP/1.1"]


@pytest.mark.parametrize("name, value", [
    ("ALL_PROXY", "socks5://127.0.0.1:9"), ("HTTPS_PROXY", "nonsense://x"),
    ("HTTPS_PROXY", "http://[::1"), ("NO_PROXY", "::1/128,10.0.0.0/8"),
    ("SSL_CERT_FILE", "/nowhere/certificates.pem")])
def test_a_variable_that_cannot_work_is_named(monkeypatch, name, value):
    from mlcourse.assets import http_client
    from mlcourse.files import CourseError
    for other in (*PROXIES, "SSL_CERT_FILE", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(CourseError, match=name): http_client("https://example.org/").close()
    http_client("http://127.0.0.1:9/").close()   # this machine needs none of it


@pytest.mark.slow
def test_a_chat_with_the_course_s_engine_behind_a_proxy(proxy, environment):
    proxied = {**environment, **proxy.env}
    for gone in ("NO_PROXY", "no_proxy"): proxied.pop(gone, None)
    words = ["chat", "What is the capital of France?", "--tier", "tiny"]
    done = subprocess.run([sys.executable, "-m", "mlcourse.cli", *words], env=proxied,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Paris" in done.stdout, done.stderr
    assert proxy.seen == []


@pytest.mark.slow
@pytest.mark.parametrize("files", ["engines llm doctor assets", "hub"])
def test_the_tests_that_serve_over_http_ask_no_proxy(files):
    "Any other part of the suite is tried by `pytest --proxied`, too."
    command = [sys.executable, "-m", "pytest", "-q", "--proxied", "-m", "not slow", "-x",
               *(f"tests/test_{name}.py" for name in files.split())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:]
