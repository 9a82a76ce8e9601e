"""The hub of the rehearsal, met by the real client, and every trouble that a download can have."""
import json, subprocess, sys
from pathlib import Path

import pytest

from conftest import Proxy
from mlcourse.files import digest
from mlcourse.hub import hub, models, thin_model

LLAMA = "meta-llama/Llama-3.1-8B-Instruct"

FETCH = """
import time
from huggingface_hub import constants
time.sleep = lambda seconds: None         # the client waits between its tries,
constants.DOWNLOAD_CHUNK_SIZE = 1_000     # and keeps what it reads by 10 MB: too much for our files
from mlcourse.assets import AssetError, fetch
try: print("path", fetch("llama-3.1-8b-instruct"))
except AssetError as e: print("sentence", e)
"""


@pytest.fixture
def client(environment, cache, tmp_path):
    "Run a program as a client of a hub, with a cache of its own: `client(h, program)`."
    def run(h, program=FETCH, timeout=120, **more):
        away = ("HF_", "MLCOURSE_OFFLINE")
        env = {k: v for k, v in environment.items() if not k.startswith(away)}
        env |= {"HF_HOME": str(tmp_path / "hf"), "MLCOURSE_CACHE": str(cache), **h.env, **more}
        return subprocess.run([sys.executable, "-c", program], env=env, timeout=timeout,
                              capture_output=True, text=True)
    return run


@pytest.fixture(scope="module", autouse=True)
def built():
    "The models that these tests serve are built in the real cache, before a test changes it."
    thin = {name: thin_model(name) for name in models()}
    import mlcourse.hub
    before, mlcourse.hub.thin_model = mlcourse.hub.thin_model, thin.__getitem__
    yield thin
    mlcourse.hub.thin_model = before


def wanted(folder: Path) -> dict[str, str]:
    "The files that `fetch` wants of a folder, with their hashes."
    files = [f for f in folder.rglob("*") if f.suffix in (".safetensors", ".json")]
    return {f.name: digest(f) for f in files if "original" not in f.parts}


def got(out, says: str = "") -> str:
    "What a client printed: the path or the sentence. No traceback, ever."
    assert "Traceback" not in out.stderr, out.stderr[-3000:]
    kind, _, text = out.stdout.strip().partition(" ")
    assert kind == ("sentence" if says else "path"), out.stdout + out.stderr[-2000:]
    assert says in text, text
    return text


# ---------------------------------------------------------------- a hub that works

def test_a_whole_model(client, built):
    with hub([LLAMA]) as h: path = Path(got(client(h)))
    assert wanted(path) == wanted(built[LLAMA])
    assert not (path / "original").exists()
    hosts = {r.host for r in h.log if r.path.startswith("blobs/")}
    assert hosts == {"localhost"} and len(list(path.glob("*.safetensors"))) >= 3


def test_a_second_fetch_loads_nothing(client):
    with hub([LLAMA]) as h:
        got(client(h))
        n = len([r for r in h.log if r.path.startswith("blobs/")])
        got(client(h))
        assert len([r for r in h.log if r.path.startswith("blobs/")]) == n


def test_without_a_line_what_is_there_is_used(client):
    with hub([LLAMA]) as h: first = got(client(h))
    with hub([LLAMA], trouble="dead") as h: assert got(client(h)) == first


def test_the_token_stays_with_the_hub(client):
    with hub([LLAMA]) as h: got(client(h, HF_TOKEN="hf_secret"))
    assert {r.token for r in h.log if r.path.startswith("api/")} == {"Bearer hf_secret"}
    assert {r.token for r in h.log if r.path.startswith("blobs/")} == {None}


RENAMED = """
from huggingface_hub import hf_hub_download, snapshot_download
old = "meta-llama/Meta-Llama-3.1-8B-Instruct"
print("path", snapshot_download(old, allow_patterns=["*.json", "*.safetensors"]))
print(hf_hub_download(old, "config.json"))
"""

def test_a_renamed_repository(client, built):
    with hub([LLAMA]) as h: lines = client(h, RENAMED).stdout.split("\n")
    folder = Path(lines[0].removeprefix("path "))
    assert (folder / "config.json").read_bytes() == (built[LLAMA] / "config.json").read_bytes()
    assert Path(lines[1]).is_file()


FROM_PRETRAINED = """
import sys, torch, transformers
from mlcourse.hub import models
for name, row in models().items():
    if "make" in row: continue    # no class of transformers: its lesson's tests load it
    model = getattr(transformers, row.get("class", "AutoModelForCausalLM")).from_pretrained(name)
    if "tokenizer" in row:
        tok = transformers.AutoTokenizer.from_pretrained(name)
        given = tok("A line of text.", return_tensors="pt")
    else:
        from PIL import Image
        tok = transformers.AutoImageProcessor.from_pretrained(name)
        given = tok(Image.new("RGB", (300, 200), "red"), return_tensors="pt")
    assert bool(model(**given)[0].isfinite().all()), name
    print("path", name, type(tok).__name__, type(model).__name__, model.dtype)
"""

@pytest.mark.slow
def test_transformers_loads_every_model_by_its_name(client):
    with hub() as h: out = client(h, FROM_PRETRAINED, timeout=300)
    assert out.returncode == 0, out.stderr[-3000:]
    loaded = [name for name, row in models().items() if "make" not in row]
    assert len(out.stdout.strip().split("\n")) == len(loaded)


def test_a_gguf(client):
    program = FETCH.replace("llama-3.1-8b-instruct", "llama-3.1-8b-instruct-gguf")
    repo = "bartowski/Meta-Llama-3.1-8B-Instruct-GGUF"
    with hub([repo]) as h: path = Path(got(client(h, program)))
    assert path.name == "Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf"
    assert path.read_bytes()[:4] == b"GGUF"


# ---------------------------------------------------------------- troubles

@pytest.mark.parametrize("trouble, more, says", [
    ("private", {}, "The hub has no model"),
    ("missing", dict(HF_TOKEN="hf_x"), "The hub has no model"),
    ("gated", {}, "hf auth login"),
    ("gated", dict(HF_TOKEN="hf_x"), "accept its licence"),
    ("busy", {}, "could not be downloaded"),
    ("dead", {}, "Check the connection"),
    ("short", {}, "could not be downloaded"),
    ("token", dict(HF_TOKEN="hf_old"), "does not take your token"),
    ("dropped", {}, "again"),
    ("corrupt", {}, "damaged"),
])
def test_a_trouble_is_a_sentence(trouble, more, says, client):
    with hub([LLAMA], trouble) as h: text = got(client(h, **more), says)
    assert LLAMA in text


def test_a_cut_connection_is_taken_up_where_it_ended(client, built):
    with hub([LLAMA], "cut") as h: path = Path(got(client(h)))
    assert wanted(path) == wanted(built[LLAMA])
    assert any((r.range or "bytes=0-") != "bytes=0-" for r in h.log)


def test_files_that_are_done_are_kept_when_another_breaks(client, built):
    "The next try fetches what is missing and nothing else."
    shards = sorted(f.name for f in built[LLAMA].glob("*.safetensors"))
    with hub([LLAMA], "short", where=shards[-1]) as h: got(client(h), "could not be downloaded")
    with hub([LLAMA]) as h: path = Path(got(client(h)))
    assert wanted(path) == wanted(built[LLAMA])
    fetched = {r.path.removeprefix("blobs/") for r in h.log if r.path.startswith("blobs/")}
    assert digest(built[LLAMA] / shards[-1]) in fetched and len(fetched) < len(shards)


def test_the_part_of_a_file_is_kept_for_the_next_call(client, built, tmp_path):
    "A learner's 16 GB come over an evening: what is there is not fetched again."
    with hub([LLAMA], "dropped") as h: client(h)
    parts = {p.name.split(".")[0]: p.stat().st_size for p in tmp_path.rglob("*.incomplete")}
    assert len(parts) >= 3 and set(parts.values()) == {1000}
    with hub([LLAMA]) as h: path = Path(got(client(h)))
    begun = {r.path.removeprefix("blobs/"): r.range for r in h.log if r.path.startswith("blobs/")}
    assert {begun[name] for name in parts} == {"bytes=1000-"}
    assert wanted(path) == wanted(built[LLAMA]) and not list(tmp_path.rglob("*.incomplete"))


def test_a_part_that_is_too_long_begins_anew(client, built, tmp_path):
    with hub([LLAMA], "dropped") as h: client(h)
    for part in tmp_path.rglob("*.incomplete"): part.write_bytes(bytes(8_000_000))
    with hub([LLAMA]) as h: path = Path(got(client(h)))
    assert wanted(path) == wanted(built[LLAMA])


def test_a_part_with_wrong_bytes_is_found_out(client, built, tmp_path):
    with hub([LLAMA], "dropped") as h: client(h)
    for part in tmp_path.rglob("*.incomplete"): part.write_bytes(bytes(1000))
    with hub([LLAMA]) as h: got(client(h), "It was deleted")
    with hub([LLAMA]) as h: path = Path(got(client(h)))
    assert wanted(path) == wanted(built[LLAMA])


def test_a_damaged_file_is_fetched_again(client, built):
    with hub([LLAMA], "corrupt") as h: got(client(h), "It was deleted")
    with hub([LLAMA]) as h: path = Path(got(client(h)))
    assert wanted(path) == wanted(built[LLAMA])


def test_a_slow_line(client, built):
    with hub([LLAMA], "slow") as h: path = Path(got(client(h)))
    assert wanted(path) == wanted(built[LLAMA])


FULL = """
from pathlib import Path
whole = Path.open
def full(path, mode="r", *args, **kwargs):   # the system's own disk that is always full
    if "incomplete" in path.name and mode == "r+b": path = Path("/dev/full")
    return whole(path, mode, *args, **kwargs)
Path.open = full
""" + FETCH

@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_full_disk(client):
    with hub([LLAMA]) as h: text = got(client(h, FULL), "Make room")
    assert "HF_HOME" in text


SCARCE = """
import shutil
from types import SimpleNamespace
shutil.disk_usage = lambda path: SimpleNamespace(total=10**12, used=10**12 - 10**9, free=10**9)
""" + FETCH

def test_too_little_room_is_told_before_anything_is_loaded(client):
    with hub([LLAMA]) as h: got(client(h, SCARCE), "Make room")
    assert not [r for r in h.log if r.path.startswith("blobs/")]


# ---------------------------------------------------------------- proxies

@pytest.fixture
def proxy():
    recorder = Proxy()
    yield recorder.seen, recorder.env
    recorder.server.close()


def test_nothing_on_this_machine_goes_through_a_proxy(client, proxy, monkeypatch):
    asked, env = proxy
    monkeypatch.setenv("NO_PROXY", "intranet.example")   # what somebody has set is kept
    with hub([LLAMA]) as h:
        assert h.env["NO_PROXY"].startswith("intranet.example,127.0.0.1")
        got(client(h, **env))
    assert asked == []


def test_the_proxy_of_these_tests_does_record(client, proxy):
    asked, env = proxy
    with hub([LLAMA]) as h: client(h, **{**env, "NO_PROXY": "", "no_proxy": ""})
    assert asked


def test_config_files_have_the_hubs_names(built):
    config = json.loads((built[LLAMA] / "config.json").read_text())
    assert config["rope_theta"] == 500000.0 and config["torch_dtype"] == "bfloat16"
    assert "rope_parameters" not in config
    index = json.loads((built[LLAMA] / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f.name for f in built[LLAMA].glob("*.safetensors")}


def test_weights_are_small(built):
    sizes = {name: sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
             for name, folder in built.items()}
    made = {name for name, row in models().items() if "make" in row}
    assert sum(size for name, size in sizes.items() if name not in made) < 12e6
    assert all(sizes[name] < 8e6 for name in made)


def test_a_week_has_models_of_its_own():
    "Its table names models that the first one has not, and its rows inherit nothing of language."
    vit = models()["WinKawaks/vit-tiny-patch16-224"]
    assert "vocab_size" not in vit["config"] and vit["config"]["num_hidden_layers"] == 2
    assert "num_attention_heads" not in models()["microsoft/resnet-50"]["config"]


def _fill(folder: Path): (folder / "yolo.pt").write_bytes(b"weights")


def test_a_row_can_be_made_by_a_function(client, tmp_path, monkeypatch):
    import mlcourse.hub
    monkeypatch.setattr(mlcourse.hub, "models", lambda: {"a/b": dict(make=f"{__name__}:_fill")})
    mlcourse.hub._build("a/b", tmp_path)
    program = "from huggingface_hub import hf_hub_download as g; print('path', g('a/b', 'yolo.pt'))"
    with hub([], more={"a/b": tmp_path}) as h: path = Path(got(client(h, program)))
    assert path.read_bytes() == b"weights"


MULTILINGUAL = """
from mlcourse.assets import fetch
from mlcourse.rerank import CrossEncoderReranker
from mlcourse.search import Embedder
embedder = Embedder("bge-m3")
assert embedder.knows("猫坐在石头上") and embedder.encode(["猫坐在石头上", "a cat"]).shape[0] == 2
assert len(CrossEncoderReranker("bge-reranker-v2-m3").scores("谁修好了灯？", ["伊娃", "Eva"])) == 2
print("path", fetch("bge-m3"))
"""

def test_the_multilingual_choices_by_one_word(client, built, tmp_path):
    "bge-m3 has its weights in a pickle alone: it is fetched, and tensors are read of it."
    import shutil, torch
    from safetensors.torch import load_file
    folder = shutil.copytree(built["BAAI/bge-m3"], tmp_path / "m3")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with hub(["BAAI/bge-reranker-v2-m3"], more={"BAAI/bge-m3": folder}) as h:
        path = Path(got(client(h, MULTILINGUAL)))
    assert (path / "pytorch_model.bin").is_file() and not list(path.glob("*.safetensors"))


def test_a_model_that_the_course_does_not_know(client, built):
    "By its name on the hub; a name that is not there gets a sentence."
    program = FETCH.replace('fetch("llama-3.1-8b-instruct")', 'model_path("{}")').replace(
        "import AssetError, fetch", "import AssetError\nfrom mlcourse.llm import model_path")
    with hub([], more={"somebody/gemma-of-mine": built["google/gemma-2b-it"]}) as h:
        path = Path(got(client(h, program.format("somebody/gemma-of-mine"))))
        got(client(h, program.format("somebody/else")), "The hub has no model somebody/else")
    assert wanted(path) == wanted(built["google/gemma-2b-it"])
