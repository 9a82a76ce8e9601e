from types import SimpleNamespace

import pytest

from mlcourse import llm
from mlcourse.assets import STANDINS


def test_served_copy_differs_in_its_type_alone():
    from gguf import GGUFReader, dequantize
    four = GGUFReader(llm.fetch(STANDINS["chat"]))
    eight = GGUFReader(llm.served_gguf(STANDINS["chat"]))
    def fields(r):
        return {k: f.contents() for k, f in r.fields.items()
                if not k.startswith("GGUF.") and k != "general.file_type"}
    assert fields(four) == fields(eight)
    for a, b in zip(four.tensors, eight.tensors, strict=True):
        assert a.name == b.name and (b.tensor_type.name == "Q8_0") == (len(b.shape) == 2)
        if a.name == "blk.3.ffn_down.weight":
            x, y = (dequantize(t.data, t.tensor_type) for t in (a, b))
            assert 0 < abs(x - y).max() < 0.01 * abs(x).max()


@pytest.mark.parametrize("name", ["llama-99b", STANDINS["embedder"], "bge-reranker-base",
                                  "llama-3.1-8b-instruct-gguf", "tinyshakespeare"])
def test_only_a_chat_model_is_loaded(name):
    says = "There is no model .* Use one of .*smollm2-135m-instruct"
    with pytest.raises(llm.LLMError, match=says): llm.model_path(name)


@pytest.mark.parametrize("size, writes_on", [(10**8, 1), (5 * 10**9, 4)])
def test_small_models_write_on_one_thread(size, writes_on, tmp_path, monkeypatch):
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 4)
    with (tmp_path / "m.gguf").open("wb") as f: f.truncate(size)
    params = SimpleNamespace(cpuparams=SimpleNamespace(), cpuparams_batch=SimpleNamespace())
    llm._set_threads(params, tmp_path / "m.gguf")
    assert vars(params.cpuparams) == dict(n_threads=writes_on, poll=0)
    assert vars(params.cpuparams_batch) == dict(n_threads=4, poll=0)


def test_a_question_that_is_too_long_is_refused_without_weights():
    from transformers import AutoTokenizer
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=64), device="cpu")
    tok = AutoTokenizer.from_pretrained(llm.model_path(STANDINS["chat"]))
    with pytest.raises(llm.LLMError, match="context is 64"):
        llm.TransformersEngine(model, tok).chat("word " * 64)
