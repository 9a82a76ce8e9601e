"""Whatever a boundary of the course meets becomes a sentence: what failed, why, the next step."""
from __future__ import annotations

import errno, json, ssl
from types import SimpleNamespace

import httpx
import httpx2
import huggingface_hub
import jinja2
import nbformat
import openai
import pytest
import requests
import torch
from huggingface_hub import errors
from safetensors import SafetensorError

from mlcourse import assets, configs, course, files, gguf_file, llm, qlora, templates
from mlcourse.chat_data import write_jsonl
from mlcourse.files import CourseError
from mlcourse.instruct import encode_pair
from mlcourse.train import Flags, check_flags
from test_gguf import byte_tokenizer

REPLY = httpx2.Response(418, request=httpx2.Request("GET", "http://127.0.0.1/"))
MODERN = httpx.Response(418, request=httpx.Request("GET", "http://127.0.0.1/"))

NETWORK = [
    httpx.ConnectError("[Errno 111] Connection refused"), httpx.ReadTimeout("timed out"),
    httpx.InvalidURL("Invalid port: ':1'"), httpx.RemoteProtocolError("peer closed connection"),
    httpx.ProxyError("407 Proxy Authentication Required"), httpx.DecodingError("bad gzip"),
    httpx.UnsupportedProtocol("no scheme"), httpx.TooManyRedirects("20 of them"),
    httpx2.ConnectError("[Errno -2] Name or service not known"), httpx2.InvalidURL("Invalid port"),
    httpx2.ReadError("connection reset"), httpx2.ProxyError("503"),
    requests.exceptions.ConnectionError("Max retries exceeded"),
    requests.exceptions.ChunkedEncodingError(),
    requests.exceptions.SSLError("certificate verify failed"),
    requests.exceptions.InvalidProxyURL("x"),
    ssl.SSLCertVerificationError(1, "certificate verify failed"),
    ConnectionResetError(104, "reset"),
    TimeoutError(), ImportError("Using SOCKS proxy, but the 'socksio' package is not installed."),
    ValueError("Unknown scheme for proxy URL URL('nonsense://x')")]
DISK = [OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EROFS, "Read-only file system"),
        PermissionError(errno.EACCES, "Permission denied", "/x"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        IsADirectoryError(errno.EISDIR, "Is a directory"),
        OSError(errno.ENAMETOOLONG, "File name too long"),
        UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed")]
HUB = [
    errors.GatedRepoError("Access to model is restricted", response=REPLY),
    errors.RepositoryNotFoundError("404 Client Error", response=REPLY),
    errors.RevisionNotFoundError("404", response=REPLY),
    errors.RemoteEntryNotFoundError("404", response=REPLY),
    errors.LocalEntryNotFoundError("not in the cache"),
    errors.HfHubHTTPError("429 Too Many Requests", response=REPLY),
    errors.HFValidationError("Repo id"),
    errors.DisabledRepoError("403 Forbidden", response=REPLY),
    errors.OfflineModeIsEnabled("offline"),
    errors.FileMetadataError("no etag"), errors.LocalTokenNotFoundError("Token is required"),
    errors.XetDownloadError("xet"), errors.CorruptedCacheException("refs"),
    RuntimeError("Data error: File reconstruction error: No space left on device (os error 28)"),
    OSError("Consistency check failed: file should be of size 10 but has size 3")]
FILES = [
    json.JSONDecodeError("Expecting value", "{", 1),
    RecursionError("maximum recursion depth exceeded"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), KeyError("hidden_size"),
    TypeError("'NoneType' object is not iterable"), IndexError("list index out of range"),
    AttributeError("'str' object has no attribute 'get'"), EOFError(), MemoryError()]
def panic() -> BaseException:
    "As libraries in Rust raise it: no `Exception`."
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    spec = json.loads(Tokenizer(BPE()).to_str())
    spec["normalizer"] = dict(type="Precompiled", precompiled_charsmap="AAAA")
    try: Tokenizer.from_str(json.dumps(spec))
    except BaseException as e: return e


MODEL = [
    panic(),
    errors.StrictDataclassFieldValidationError("num_hidden_layers",
                                               TypeError("expected int, got 'two'")),
    errors.StrictDataclassClassValidationError("heads", ValueError("does not divide")),
    SafetensorError("Error while deserializing header: invalid header"), KeyError("brandnew"),
    RuntimeError("Error(s) in loading state_dict for Llama:\n\tsize mismatch for embed_tokens"),
    RuntimeError("PytorchStreamReader failed reading zip archive: no central directory"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    ValueError("The checkpoint you are trying to load has model type `brandnew`"),
    ImportError("needs `accelerate`", name="accelerate"), AssertionError(),
    ZeroDivisionError("division by zero"),
    NotImplementedError("Cannot copy out of meta tensor; no data!")]
TEMPLATE = [
    jinja2.TemplateError("System role not supported"),
    jinja2.TemplateSyntaxError("unexpected end", 3),
    jinja2.UndefinedError("'dict object' has no attribute 'content'"),
    ValueError("chat_template is not set"),
    jinja2.exceptions.SecurityError("access to attribute is unsafe"),
    TypeError("can only concatenate str"),
    ZeroDivisionError("division by zero"), KeyError("role"), RecursionError("too deep")]
NOTEBOOK = [nbformat.ValidationError("'cells' is a required property"),
            nbformat.reader.NotJSONError("Notebook does not appear to be JSON"),
            FileNotFoundError(2, "No such file")]


def of_openai(status: int, body):
    "A refusal as the client raises it."
    reply = httpx.Response(status, json=body, request=httpx.Request("POST", "http://127.0.0.1/v1"))
    return openai.APIStatusError("refused", response=reply, body=body)


SERVER = [
    openai.APITimeoutError(httpx.Request("POST", "http://127.0.0.1")),
    of_openai(404, dict(message="no model")),
    openai.APIConnectionError(request=httpx.Request("POST", "http://127.0.0.1")),
    of_openai(500, ["odd"]),
    of_openai(400, dict(message="this exceeds the context")), openai.OpenAIError("no key"),
    openai.APIResponseValidationError(response=MODERN, body=None), *NETWORK, *FILES]


def boundaries(tmp_path, monkeypatch) -> dict:
    "By name: a call of the course, where the library behind it breaks, and what it can raise."
    def broken(owner, name):
        def let_it_break(error):
            def fails(*args, **options): raise error
            monkeypatch.setattr(owner, name, fails)
        return let_it_break
    tok, kind = byte_tokenizer(), SimpleNamespace(from_pretrained=None)
    book, weights = tmp_path/"a.ipynb", tmp_path/"model.safetensors"
    book.write_text("{}")
    weights.write_bytes(b"x")
    engine = llm.OpenAIEngine("http://127.0.0.1:9/v1", "m")
    at_server = broken(engine.client.chat.completions, "create")
    monkeypatch.setattr(engine, "models", lambda: [])
    monkeypatch.setenv("MLCOURSE_CACHE", str(tmp_path/"cache"))
    def weights_of():
        with assets.reading_weights(weights): gguf_file.json.loads("{}")
    return {
        "hub": (lambda: assets.fetch("bge-small-en-v1.5"),
                broken(huggingface_hub, "snapshot_download"), NETWORK + DISK + HUB + FILES),
        "plan": (lambda: configs.from_hub("somebody/model"),
                 broken(huggingface_hub, "hf_hub_download"), NETWORK + DISK + HUB + FILES),
        "model by name": (lambda: assets.load_pretrained(kind, "somebody/model"),
                          broken(kind, "from_pretrained"), NETWORK + DISK + HUB + FILES + MODEL),
        "model": (lambda: assets.load_pretrained(kind, tmp_path),
                  broken(kind, "from_pretrained"), DISK + FILES + MODEL),
        "template": (lambda: templates.chat_ids(tok, [dict(role="user", content="x")]),
                     broken(tok, "apply_chat_template"), TEMPLATE),
        "server": (lambda: engine.chat("x"), at_server, SERVER),
        "server, streaming": (lambda: list(engine.stream("x")), at_server, SERVER),
        "client": (lambda: assets.http_client("https://example.org"), broken(httpx, "Client"),
                   NETWORK),
        "disk": (lambda: files.write_atomic(tmp_path/"x", "1"), broken(files.os, "fsync"), DISK),
        "lock": (lambda: files.locked(tmp_path/"y").__enter__(),
                 broken(__import__("filelock").FileLock, "acquire"), DISK[:5]),
        "notebook": (lambda: course.read_notebook(book), broken(nbformat, "reads"),
                     NOTEBOOK + FILES + DISK),
        "cells": (lambda: course.read_cells(book), broken(course.json, "loads"),
                  NOTEBOOK + FILES + DISK),
        "weights": (weights_of, broken(gguf_file.json, "loads"), MODEL + FILES + DISK),
        "llama.cpp": (lambda: llm.llama_cpp(weights).__enter__(),
                      broken(__import__("xllamacpp"), "Server"), MODEL),
    }


NAMES = ["hub", "plan", "model by name", "model", "template", "server", "server, streaming",
         "client", "disk", "lock", "notebook", "cells", "weights", "llama.cpp"]
STEPS = ("again", "heck", "orrect", "ake room", "hoose", "Install", "hf auth login", "Start it",
         "Does ", "Shorten", "Leave out", "Is it", "Is the", "pip install", "config.json", "Set ")
VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")


@pytest.fixture
def open_network(monkeypatch):
    "An environment that names no proxy and no certificates."
    for name in VARIABLES:
        for spelt in (name, name.lower()): monkeypatch.delenv(spelt, raising=False)


@pytest.mark.parametrize("name", NAMES)
def test_a_boundary_says_what_and_why_and_the_next_step(name, tmp_path, monkeypatch, open_network):
    for error in boundaries(tmp_path, monkeypatch)[name][2]:
        with monkeypatch.context() as m:
            call, let_it_break, _ = boundaries(tmp_path, m)[name]
            let_it_break(error)
            with pytest.raises(CourseError) as e: call()
        said = str(e.value)
        assert "\n" not in said and 20 < len(said) < 1500, said
        assert any(step in said for step in STEPS), said
        assert e.value.__cause__ is error, (name, error)


def test_a_wish_to_stop_is_no_fault():
    for stop in (KeyboardInterrupt, SystemExit, GeneratorExit):
        with pytest.raises(stop), files.boundary("x cannot be loaded", "Try again."): raise stop
    assert not isinstance(panic(), Exception) and files.is_fault(panic())


def test_all_boundaries_are_tried(tmp_path, monkeypatch):
    assert list(boundaries(tmp_path, monkeypatch)) == NAMES


@pytest.mark.parametrize("name, value, error", [
    ("ALL_PROXY", "socks5://127.0.0.1:9", ImportError("Using SOCKS proxy, but no 'socksio'")),
    ("HTTPS_PROXY", "http://[::1", httpx2.InvalidURL("Invalid port: ':1'")),
    ("SSL_CERT_FILE", "/nowhere.pem", FileNotFoundError(2, "No such file or directory"))])
def test_an_environment_that_lets_nobody_through_is_named(name, value, error, cache, monkeypatch,
                                                          open_network):
    "And is not taken for a disk that is full, or a hub that is silent."
    def fails(*args, **options): raise error
    monkeypatch.setenv(name, value)
    for call in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, call, fails)
    kind = SimpleNamespace(from_pretrained=fails)
    for ask in (lambda: assets.fetch("bge-small-en-v1.5"), lambda: configs.from_hub("some/model"),
                lambda: assets.load_pretrained(kind, "some/model")):
        with pytest.raises(CourseError, match=f"as {name} in the environment say"): ask()


def test_a_missing_template_and_a_wrong_layer():
    tok = byte_tokenizer()
    tok.chat_template = None
    for use in (lambda: templates.chat_ids(tok, [dict(role="user", content="x")]),
                lambda: llm.encode(tok, "x"),
                lambda: encode_pair(tok, [dict(role="user", content="x"),
                                          dict(role="assistant", content="y")])):
        with pytest.raises(CourseError, match="no chat template.*tuned to chat"): use()
    with pytest.raises(CourseError, match="target_modules"):
        check_flags(Flags("m", "d", "o", target_modules=" , "))


SHAPE = dict(vocab_size=260, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
             max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=2)
KINDS = dict(gemma2=dict(intermediate_size=64, head_dim=16, num_key_value_heads=2),
             falcon={}, llama=dict(intermediate_size=64),
             qwen2_moe=dict(intermediate_size=64, num_experts=4, moe_intermediate_size=32,
                            shared_expert_intermediate_size=32))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_models_of_other_kinds_are_trained_or_refused_in_a_sentence(kind, tmp_path):
    import transformers
    config = transformers.AutoConfig.for_model(kind, **SHAPE, **KINDS[kind])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    row = dict(messages=[dict(role=r, content=f"{r} says") for r in ("system", "user",
                                                                     "assistant")])
    write_jsonl(tmp_path/"data.jsonl", [row] * 4)
    def fit(n=0, **change):
        flags = Flags(str(tmp_path), str(tmp_path/"data.jsonl"), str(tmp_path/f"out{n}"),
                      max_steps=1, gradient_accumulation_steps=1, **change)
        return qlora.train(flags, files.no_progress)
    if kind == "qwen2_moe":
        with pytest.raises(CourseError, match="mixture of 4 experts"): fit()
    else: assert fit().losses
    for n, wrong in enumerate(("no_such", "norm", "q_proj,nope"), 1):
        with pytest.raises(CourseError, match="target_modules|experts"):
            fit(n, target_modules=wrong)
    llm.load(str(tmp_path), "bf16", max_memory={"cpu": "1GiB"})
    (tmp_path/"model.safetensors").write_bytes((tmp_path/"model.safetensors").read_bytes()[:99])
    with pytest.raises(CourseError, match="cannot be loaded"): llm.load(str(tmp_path), "bf16")
