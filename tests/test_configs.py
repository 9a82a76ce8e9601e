"""Configurations as they lie on the hub: planned rightly, or refused; never guessed."""
import json

import pytest

from mlcourse.configs import find_config, longest
from mlcourse.vram import Plan, PlanError, check

PLAIN = dict(model_type="llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, vocab_size=512,
             max_position_embeddings=512)
YARN = dict(factor=4.0, original_max_position_embeddings=512)
REFUSED = [   # what differs from a plain Llama, and what is said of it
    (dict(model_type="mixtral", num_local_experts=8), "mixture of 8 experts"),
    (dict(model_type="qwen3_moe", num_experts=16, head_dim=16), "mixture of 16 experts"),
    (dict(model_type="deepseek_v2", n_routed_experts=64), "mixture of 64 experts"),
    (dict(model_type="gemma3", text_config=PLAIN, vision_config={}), "more than text"),
    (dict(model_type="mllama", text_config=PLAIN), "text_config"),
    (dict(quantization_config=dict(quant_method="awq", bits=4)), "packed already .awq, 4 bits"),
    (dict(quantization_config=dict(quant_method="gptq", bits=8)), "gptq, 8 bits"),
    (dict(quantization_config=dict(quant_method="fp8")), "packed already .fp8"),
    (dict(quantization_config=dict(quant_method="bitsandbytes", load_in_8bit=True)), "packed"),
    (dict(rope_scaling=[1]), "rope_scaling must"), (dict(rope_scaling="yarn"), "rope_scaling must"),
    (dict(quantization_config="awq"), "quantization_config must"),
    (dict(compression_config=dict(quant_method="compressed-tensors")), "compressed-tensors"),
    (dict(rope_theta=float("inf")), "rope_theta must"),
    (dict(intermediate_size=0), "intermediate_size"), (dict(num_key_value_heads=3), "cannot share"),
    (dict(hidden_size=True), "hidden_size"), (dict(hidden_size="64"), "hidden_size"),
    (dict(max_position_embeddings="512"), "max_position_embeddings"),
    (dict(num_attention_heads=3), "not a multiple|divide"), (dict(model_type="llama9"), "llama9"),
    (dict(model_type=["llama"]), "model_type"), (dict(hidden_size=10**12), "hidden_size")]


def written(tmp_path, **change) -> str:
    (tmp_path/"config.json").write_text(json.dumps(PLAIN | change))
    return str(tmp_path)


@pytest.mark.parametrize("change, says", REFUSED, ids=[says for _, says in REFUSED])
def test_what_the_rules_do_not_know_is_refused(tmp_path, change, says):
    with pytest.raises(PlanError, match=says): check(Plan(written(tmp_path, **change), seq=64))


@pytest.mark.parametrize("name, length", [
    (dict(rope_scaling=YARN | dict(type="yarn")), 2048),
    (dict(rope_scaling=YARN | dict(rope_type="yarn")), 2048), ({}, 512),
    (dict(rope_parameters=YARN | dict(rope_type="yarn", rope_theta=1e4)), 2048),
    (dict(rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0,
                            high_freq_factor=4.0, original_max_position_embeddings=128)), 512)])
def test_a_stretched_context_counts(tmp_path, name, length):
    config = find_config(written(tmp_path, **name))[1]
    assert longest(config) == length
    check(Plan(str(tmp_path), seq=length))
    with pytest.raises(PlanError, match=f"{length:,}"): check(Plan(str(tmp_path), seq=length + 1))


OTHER_NAMES = [
    dict(model_type="gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=512, vocab_size=512),
    dict(model_type="falcon", hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
         vocab_size=512),
    dict(model_type="gpt_neox", hidden_size=64, intermediate_size=128, num_hidden_layers=2,
         num_attention_heads=4, vocab_size=512, max_position_embeddings=512)]


@pytest.mark.parametrize("config", OTHER_NAMES, ids=[c["model_type"] for c in OTHER_NAMES])
def test_numbers_under_other_names_are_read(tmp_path, config):
    (tmp_path/"config.json").write_text(json.dumps(config))
    found = check(Plan(str(tmp_path), task="infer", seq=64))[1]
    wanted = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    assert [found[name] for name in wanted] == [64, 2, 4, 512]
