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
