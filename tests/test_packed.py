"GPTQ and AWQ checkpoints of thin models: written, loaded, and compared with rounding alone."
import json

import pytest
import torch
from mlcourse.hub import thin_model
from mlcourse.llm import LLMError
from mlcourse.packed import PackedLinear, load_packed, round_to_nearest, write_packed
from transformers import AutoModelForCausalLM

NAMES = ("meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen2.5-7B-Instruct",   # biases
         "microsoft/Phi-3-mini-4k-instruct")                               # fused projections


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["gptq", "gptq_v2", "awq"])
def test_the_logits_are_those_of_the_rounded_model(name, method, tmp_path):
    source = thin_model(name)
    expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for n, m in expected.named_modules():
        if not n.endswith("_proj"): continue
        codes, zeros, scales = round_to_nearest(m.weight.data, 32, symmetric=method == "gptq")
        group = torch.arange(m.in_features) // 32
        m.weight.data = (scales.float()[group] * (codes - zeros[group])).T.contiguous()
    packed = load_packed(write_packed(source, tmp_path/method, method, 32), "cpu", torch.float32)
    assert sum(isinstance(m, PackedLinear) for m in packed.modules()) >= 8
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode(): difference = packed(ids).logits - expected(ids).logits
    assert difference.abs().max() < 1e-4


def test_what_is_not_whole_or_not_known_is_a_sentence(tmp_path):
    source = thin_model(NAMES[0])
    with pytest.raises(LLMError, match="is not packed"): load_packed(source)
    folder = write_packed(source, tmp_path/"awq", "awq", 32)
    config = json.loads((folder/"config.json").read_text())
    for change, says in (dict(bits=3), "3 bits"), (dict(version="gemv"), "gemv"):
        packing = config["quantization_config"] | change
        (folder/"config.json").write_text(json.dumps(config | dict(quantization_config=packing)))
        with pytest.raises(LLMError, match=says): load_packed(folder)
    (folder/"config.json").write_text(json.dumps(config))
    (folder/"model.safetensors").unlink()
    with pytest.raises(LLMError, match="download whole"): load_packed(folder)
