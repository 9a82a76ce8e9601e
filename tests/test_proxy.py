"""A server on this machine is never reached through a proxy, which would read it all."""
import os, socket, subprocess, sys, threading

import pytest

VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
SPELT = (*VARIABLES, *map(str.lower, VARIABLES))


class Proxy:
    "A proxy that records who asks it, and serves nobody."

    def __init__(self):
        self.seen, self.server = [], socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.server.getsockname()[1]}"
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        while True:
            try: client, _ = self.server.accept()
            except OSError: return   # closed
            with client:
                line = client.recv(4096).split(b"\r\n")[0]
                self.seen.append(line.decode(errors="replace"))
                client.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")


@pytest.fixture
def proxy(monkeypatch):
    "A recording proxy that every variable names, in both spellings."
    recorder = Proxy()
    for name in SPELT: monkeypatch.setenv(name, recorder.url)
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
    for other in (*SPELT, "SSL_CERT_FILE", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(CourseError, match=name): http_client("https://example.org/").close()
    http_client("http://127.0.0.1:9/").close()   # this machine needs none of it


@pytest.mark.slow
def test_a_chat_with_the_course_s_engine_behind_a_proxy(proxy, environment):
    proxied = {**environment, **{k: os.environ[k] for k in SPELT}}
    for gone in ("NO_PROXY", "no_proxy"): proxied.pop(gone, None)
    words = ["chat", "What is the capital of France?", "--tier", "tiny"]
    done = subprocess.run([sys.executable, "-m", "mlcourse.cli", *words], env=proxied,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Paris" in done.stdout, done.stderr
    assert proxy.seen == []
