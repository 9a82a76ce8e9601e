"""The GGUF exporter: what it refuses, what it writes, that a killed export goes on, and that
llama.cpp agrees with transformers.

Quick tests write a random Llama of a few thousand weights; slow ones start processes.
"""
from __future__ import annotations

import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mlcourse import gguf as ship, gguf_file as export, ollama
from mlcourse.files import UsageError
from mlcourse.hub import models, thin_model

LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=64)
PLAIN = dict(rope_type="default", rope_theta=10000.0)
CHAT = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def byte_tokenizer(add_prefix_space=False):
    "A byte-level BPE without merges: 256 bytes and two special tokens, split as Llama 3 splits."
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab["he"] = 256
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[("h", "e")]))
    split = pre_tokenizers.Split(Regex(export.LLAMA3_SPLIT), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space, use_regex=False)
    tok.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|im_end|>")
    fast.chat_template = CHAT
    return fast


def tiny_llama(folder: Path, tied: bool = False, rope: dict | None = None, width: int = 64,
               layers: int = 2, shard: str = "5GB") -> Path:
    "A random Llama with grouped heads."
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
                         num_attention_heads=4, num_key_value_heads=2, vocab_size=260,
                         tie_word_embeddings=tied, max_position_embeddings=512,
                         rope_parameters=rope or PLAIN, initializer_range=0.2)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=shard)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model")/"llama", rope=LLAMA3, shard="60KB")


def tensors_of(path): return {t.name: t for t in gguf.GGUFReader(path).tensors}


def test_the_file_holds_the_weights(model, tmp_path):
    assert len(list(model.glob("*.safetensors"))) > 1          # several shards
    tensors = tensors_of(export.export_gguf(model, tmp_path/"m.gguf", "f32"))
    source = LlamaForCausalLM.from_pretrained(model).state_dict()
    assert len(tensors) == len(source) + 1
    assert "rope_freqs.weight" in tensors and "output.weight" in tensors
    k, v = (source[f"model.layers.1.self_attn.{name}_proj.weight"].numpy() for name in "kv")
    assert np.array_equal(tensors["blk.1.attn_v.weight"].data, v)
    assert np.array_equal(tensors["blk.1.attn_k.weight"].data, export.interleave(k, 2))
    assert not np.array_equal(tensors["blk.1.attn_k.weight"].data, k)


def test_a_tied_model_has_no_head(tmp_path):
    folder = tiny_llama(tmp_path/"m", tied=True)
    names = tensors_of(export.export_gguf(folder, tmp_path/"m.gguf", "q4_0"))
    assert "output.weight" not in names and "token_embd.weight" in names


@pytest.mark.parametrize("type", export.TYPES)
def test_sizes_are_as_planned(model, tmp_path, type):
    path = export.export_gguf(model, tmp_path/"m.gguf", type)
    for t in tensors_of(path).values():
        wanted = export.TYPES[type][t.name in export.TABLES] if len(t.shape) > 1 else export.Q.F32
        assert t.tensor_type == wanted, t.name
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]     # no part is left


def test_small_pieces_give_the_same_file(model, tmp_path, monkeypatch):
    whole = export.export_gguf(model, tmp_path/"a.gguf", "q8_0").read_bytes()
    monkeypatch.setattr(export, "CHUNK", 64 * 7)
    assert export.export_gguf(model, tmp_path/"b.gguf", "q8_0").read_bytes() == whole


def test_rows_that_are_no_whole_blocks_stay_f16(tmp_path):
    path = export.export_gguf(tiny_llama(tmp_path/"m", width=48), tmp_path/"m.gguf", "q8_0")
    assert tensors_of(path)["blk.0.attn_q.weight"].tensor_type == export.Q.F16


class Killed(BaseException): pass

def test_a_killed_export_goes_on(model, tmp_path):
    whole = export.export_gguf(model, tmp_path/"whole.gguf", "q8_0").read_bytes()
    written = []
    def die(done, total):
        written.append(done)
        if len(written) == 5: raise Killed
    with pytest.raises(Killed): export.export_gguf(model, tmp_path/"m.gguf", "q8_0", die)
    assert not (tmp_path/"m.gguf").exists()
    part, = tmp_path.glob("m.gguf.*.part")
    with part.open("ab") as f: f.write(b"half a tensor")          # what a kill leaves behind
    again = []
    def count(done, total): again.append(done)
    assert export.export_gguf(model, tmp_path/"m.gguf", "q8_0", count).read_bytes() == whole
    assert again[0] > written[-1] and len(again) + 5 == len(tensors_of(tmp_path/"m.gguf"))


def test_a_part_of_other_weights_is_not_continued(tmp_path):
    folder = tiny_llama(tmp_path/"m")
    def die(done, total): raise Killed
    with pytest.raises(Killed): export.export_gguf(folder, tmp_path/"m.gguf", "f16", die)
    torch.manual_seed(1)
    LlamaForCausalLM(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    os.utime(folder/"model.safetensors", ns=(1, 1))
    after, anew = (export.export_gguf(folder, tmp_path/f"{n}.gguf", "f16") for n in "mn")
    assert after.read_bytes() == anew.read_bytes()
    assert not list(tmp_path.glob("*.part"))


def said(match): return pytest.raises(export.GGUFError, match=match)

def test_what_is_refused(model, tmp_path, monkeypatch):
    with said("no folder"): export.export_gguf(tmp_path/"nowhere", tmp_path/"x.gguf")
    (tmp_path/"empty").mkdir()
    with said("no config.json"): export.export_gguf(tmp_path/"empty", tmp_path/"x.gguf")
    shutil.copy(model/"config.json", tmp_path/"empty")
    with said("no .safetensors"): export.export_gguf(tmp_path/"empty", tmp_path/"x.gguf")
    with said("no type 'q4_k'"): export.export_gguf(model, tmp_path/"x.gguf", "q4_k")
    copy = shutil.copytree(model, tmp_path/"copy")
    next(copy.glob("model-00002*")).unlink()
    with said("incomplete"): export.export_gguf(copy, tmp_path/"x.gguf")
    config = json.loads((model/"config.json").read_text())
    config["quantization_config"] = dict(quant_method="bitsandbytes")
    (copy/"config.json").write_text(json.dumps(config))
    with said("quantized already"): export.export_gguf(copy, tmp_path/"x.gguf")
    monkeypatch.setattr(export.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with said("Make room"): export.export_gguf(model, tmp_path/"x.gguf")
    assert not (tmp_path/"x.gguf").exists()


def test_architectures_and_scalings_that_are_not_known():
    gpt2 = SimpleNamespace(architectures=["GPT2LMHeadModel"])
    with said("GPT2LMHeadModel"): export.plan_tensors(gpt2, {})
    with said("yarn"): export.rope_divisors(SimpleNamespace(rope_parameters=dict(rope_type="yarn")))
    config, odd = LlamaConfig(num_hidden_layers=1, architectures=["LlamaForCausalLM"]), (32, 32)
    with said("no name"): export.plan_tensors(config, {"model.layers.0.mlp.experts.weight": odd})


def test_a_full_disk_keeps_what_is_written(model, tmp_path, monkeypatch):
    calls = []
    def full(t, weights, config):
        calls.append(t)
        if len(calls) == 3: raise OSError(28, "No space left on device")
        return real(t, weights, config)
    real = export._pieces
    monkeypatch.setattr(export, "_pieces", full)
    with said("run the same again"): export.export_gguf(model, tmp_path/"m.gguf")
    monkeypatch.setattr(export, "_pieces", real)
    again = []
    def count(done, total): again.append(done)
    export.export_gguf(model, tmp_path/"m.gguf", progress=count)
    assert len(again) == len(tensors_of(tmp_path/"m.gguf")) - 2


def test_merge_and_its_refusals(model, tmp_path, monkeypatch):
    from peft import LoraConfig, PeftModel, get_peft_model
    def base(): return LlamaForCausalLM.from_pretrained(model)
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(base(), lora).save_pretrained(tmp_path/"adapter")
    adapted = PeftModel.from_pretrained(base(), tmp_path/"adapter").eval()
    ids = torch.arange(20)[None]
    merged = ship.merge(model, tmp_path/"adapter", tmp_path/"merged", "fp32")
    with torch.no_grad():
        difference = LlamaForCausalLM.from_pretrained(merged)(ids).logits - adapted(ids).logits
    assert difference.abs().max() < 1e-3
    with said("no dtype"): ship.merge(model, tmp_path/"adapter", tmp_path/"x", "int8")
    with said("no adapter"): ship.merge(model, model, tmp_path/"x")
    with said("Merge it first"): export.export_gguf(tmp_path/"adapter", tmp_path/"x.gguf")
    other = tiny_llama(tmp_path/"other", width=32)
    with said("cannot be merged"): ship.merge(other, tmp_path/"adapter", tmp_path/"x")
    little = SimpleNamespace(available=1000, free=500)
    monkeypatch.setattr("psutil.virtual_memory", lambda: little)
    monkeypatch.setattr("psutil.swap_memory", lambda: little)
    with said("0.0 GB are free, swap included"):
        ship.merge(model, tmp_path/"adapter", tmp_path/"x")
    assert not (tmp_path/"x").exists()


def test_no_input_is_written_over(tmp_path):
    folder = tiny_llama(tmp_path/"m")
    shutil.copytree(folder, tmp_path/"a/adapter")
    (tmp_path/"a/adapter/adapter_config.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    for out in (folder/"model.safetensors", folder, tmp_path):
        with pytest.raises(UsageError, match="overwritten"): export.export_gguf(folder, out)
    for out in (folder, tmp_path, tmp_path/"a", tmp_path/"a/adapter"):
        with pytest.raises(UsageError, match="overwritten"):
            ship.merge(folder, tmp_path/"a/adapter", out)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_modelfile_has_these_lines(tmp_path):
    with said("no file"): ollama.modelfile(tmp_path/"m.gguf", byte_tokenizer())
    (tmp_path/"m.gguf").write_bytes(b"")
    text = ollama.modelfile(tmp_path/"m.gguf", byte_tokenizer(), 512).read_text()
    assert text.startswith('FROM ./m.gguf\nTEMPLATE """')
    assert text.endswith('"""\nPARAMETER stop "<|im_end|>"\nPARAMETER num_ctx 512\n'
                         'PARAMETER temperature 0\n')


def test_a_template_with_a_default_system_message_and_llama3s_form():
    tok = byte_tokenizer()
    tok.chat_template = ("{% if messages[0]['role'] != 'system' %}"
                         "<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHAT)
    template, default = ollama.go_template(tok)
    assert default == "Be kind."
    turns = [dict(role=r, content=c) for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    wanted = tok.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert ollama.render_go(template, [dict(role="system", content=default), *turns]) == wanted
    tok.chat_template = "{% for m in messages %}[{{ loop.index }}]{{ m['content'] }}{% endfor %}"
    with said("by hand"): ollama.go_template(tok)


def test_a_template_without_a_system_turn_joins_it_to_the_first_question():
    from transformers import AutoTokenizer
    from mlcourse.templates import fold_system
    tok = AutoTokenizer.from_pretrained(thin_model("google/gemma-7b-it"))
    turns = [dict(role=r, content=r[0]) for r in ("system", "user", "assistant", "user")]
    template, _ = ollama.go_template(tok)
    wanted = tok.apply_chat_template(fold_system(tok, turns), tokenize=False,
                                     add_generation_prompt=True)
    assert ollama.render_go(template, turns) == wanted.removeprefix("<bos>")
    plain = tok.apply_chat_template(turns[1:], tokenize=False, add_generation_prompt=True)
    assert ollama.render_go(template, turns[1:]) == plain.removeprefix("<bos>")


def test_an_answer_ends_with_its_turn_in_ollama_too(tmp_path):
    "No escapes: Ollama reads what stands between the quotes."
    from transformers import AutoTokenizer
    (tmp_path/"m.gguf").write_bytes(b"")
    gemma = AutoTokenizer.from_pretrained(thin_model("google/gemma-7b-it"))
    written = ollama.modelfile(tmp_path/"m.gguf", gemma).read_text()
    assert 'PARAMETER stop "<eos>"\nPARAMETER stop "<end_of_turn>"\n' in written
    tok = byte_tokenizer()
    tok.add_special_tokens(dict(eos_token="<|ü\\n|>"))
    tok.chat_template = CHAT.replace("<|im_end|>", "<|ü\\\\n|>")
    assert 'PARAMETER stop "<|ü\\n|>"\n' in ollama.modelfile(tmp_path/"m.gguf", tok).read_text()
    tok.add_special_tokens(dict(eos_token='<|"|>'))
    tok.chat_template = CHAT.replace("<|im_end|>", '<|"|>')
    with said("cannot be written"): ollama.modelfile(tmp_path/"m.gguf", tok)


# ---------------------------------------------------------------- a file that is not the model

def changed(folder: Path, name: str, change) -> Path:
    "The model with one tensor changed."
    from safetensors.torch import load_file, save_file
    weights = load_file(folder/"model.safetensors")
    weights[name] = change(weights.get(name, weights["model.embed_tokens.weight"]))
    save_file(weights, folder/"model.safetensors", metadata=dict(format="pt"))
    return folder


@pytest.mark.parametrize("type", export.TYPES)
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight",
                                  "model.embed_tokens.weight"])
def test_values_that_are_no_numbers_are_refused(tmp_path, type, name):
    bad = float("nan") if type.startswith("q") else float("inf")
    def spoil(w): return w.flatten().index_fill(0, torch.tensor([5]), bad).view(w.shape)
    folder = changed(tiny_llama(tmp_path/"m"), name, spoil)
    with said("no numbers"): export.export_gguf(folder, tmp_path/"x.gguf", type)
    assert not (tmp_path/"x.gguf").exists()


def test_a_head_of_its_own_beside_the_flag_of_a_tied_one(tmp_path):
    "transformers does not tie two matrices that differ; nor does the file."
    folder = changed(tiny_llama(tmp_path/"m", tied=True), "lm_head.weight", lambda w: w.flip(0))
    held = tensors_of(export.export_gguf(folder, tmp_path/"m.gguf", "f32"))
    used = LlamaForCausalLM.from_pretrained(folder).lm_head.weight.detach().numpy()
    assert np.array_equal(held["output.weight"].data, used)
    changed(folder, "lm_head.weight", lambda w: w.flip(0))   # as the embedding again
    assert "output.weight" not in tensors_of(export.export_gguf(folder, tmp_path/"n.gguf", "f32"))


def test_a_gemma_with_a_head_of_its_own_is_refused(tmp_path):
    folder = shutil.copytree(thin_model("google/gemma-2b-it"), tmp_path/"m")
    whole = export._open(folder)
    from safetensors.torch import save_file
    weights = {name: f.get_tensor(name) for name, f in whole.items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0)
    for f in folder.glob("model*"): f.unlink()
    save_file(weights, folder/"model.safetensors", metadata=dict(format="pt"))
    with said("head of its own"): export.export_gguf(folder, tmp_path/"x.gguf")


def test_adapters_on_a_tied_head_are_refused(tmp_path):
    from peft import LoraConfig, get_peft_model
    folder = tiny_llama(tmp_path/"m", tied=True)
    for i, target in enumerate((["q_proj", "lm_head"], ["embed_tokens"])):
        lora = LoraConfig(r=2, target_modules=target, init_lora_weights=False)
        base = LlamaForCausalLM.from_pretrained(folder)
        get_peft_model(base, lora).save_pretrained(tmp_path/f"a{i}")
        with said("one matrix for both"): ship.merge(folder, tmp_path/f"a{i}", tmp_path/"x")


def test_an_adapter_brings_its_own_template_and_no_tokens_without_rows(tmp_path):
    from peft import LoraConfig, get_peft_model
    folder = tiny_llama(tmp_path/"m")
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(folder), lora)
    model.save_pretrained(tmp_path/"a")
    tok = byte_tokenizer()
    tok.chat_template = CHAT.replace("user", "human")
    tok.save_pretrained(tmp_path/"a")
    merged = ship.merge(folder, tmp_path/"a", tmp_path/"merged")
    path = export.export_gguf(merged, tmp_path/"m.gguf")
    written = gguf.GGUFReader(path).fields["tokenizer.chat_template"].contents()
    assert written == tok.chat_template
    tok.add_tokens([f"<new-{i}>" for i in range(4)])   # 259 tokens were there, and 260 rows
    tok.save_pretrained(tmp_path/"a")
    with said("tokens beyond the model's 260"): ship.merge(folder, tmp_path/"a", tmp_path/"x")


def test_other_safetensors_in_the_folder_are_not_read(tmp_path):
    from safetensors.torch import save_file
    folder = tiny_llama(tmp_path/"m")
    plain = export.export_gguf(folder, tmp_path/"a.gguf").read_bytes()
    save_file({"model.norm.weight": torch.zeros(64)}, folder/"consolidated.safetensors")
    save_file({"model.extra": torch.zeros(4)}, folder/"adapter_model.safetensors")
    assert export.export_gguf(folder, tmp_path/"b.gguf").read_bytes() == plain


def test_weights_and_a_config_of_two_models(tmp_path):
    folder = tiny_llama(tmp_path/"m")
    config = json.loads((folder/"config.json").read_text())
    (folder/"config.json").write_text(json.dumps(config | dict(hidden_size=128)))
    with said("not of one model"): export.export_gguf(folder, tmp_path/"x.gguf")


def without(name): return lambda w: w.pop(name)
def transposed(name): return lambda w: w.update({name: w[name].T.contiguous()})
def stored_as(name, dtype): return lambda w: w.update({name: w[name].to(dtype)})


UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"


BIAS = UP.replace("weight", "bias")


@pytest.mark.parametrize("change, says", [
    (without(UP), "not whole: 1 tensors.*up_proj"), (without(NORM), "model.norm.weight has"),
    (without("lm_head.weight"), "lm_head"), (without("model.embed_tokens.weight"), "embed_tokens"),
    (lambda w: w.update({BIAS: w[NORM].clone()}), "should have none"),
    (transposed(UP), "should have"), (stored_as(UP, torch.int8), "stored as I8"),
    (stored_as(UP, torch.float8_e4m3fn), "packed")])
def test_every_tensor_of_the_model_is_there_and_no_other(tmp_path, change, says):
    from safetensors.torch import load_file, save_file
    folder = tiny_llama(tmp_path/"m")
    weights = load_file(folder/"model.safetensors")
    change(weights)
    save_file(weights, folder/"model.safetensors", metadata=dict(format="pt"))
    with said(says): export.export_gguf(folder, tmp_path/"x.gguf")


@pytest.mark.parametrize("change", [dict(num_hidden_layers=3), dict(num_hidden_layers=1),
                                    dict(num_key_value_heads=4), dict(intermediate_size=64),
                                    dict(attention_bias=True), dict(vocab_size=300),
                                    dict(rope_parameters=PLAIN | dict(partial_rotary_factor=0.5))])
def test_a_config_of_another_model(tmp_path, change):
    folder = tiny_llama(tmp_path/"m")
    config = json.loads((folder/"config.json").read_text())
    (folder/"config.json").write_text(json.dumps(config | change))
    with said("not of one model|a part of each head"):
        export.export_gguf(folder, tmp_path/"x.gguf")


@pytest.mark.parametrize("name", [
    lambda name: name.replace(".model.model.", ".model.language_model."),   # another prefix
    lambda name: name.replace("layers.1", "layers.7"),                      # a deeper model's
    lambda name: None if "layers.1" in name else name])                     # half is lost
def test_an_adapter_of_another_model_is_not_merged_in_part(tmp_path, name):
    "peft leaves out what has no layer, with a warning or without."
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file
    folder = tiny_llama(tmp_path/"m")
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(LlamaForCausalLM.from_pretrained(folder), lora).save_pretrained(tmp_path/"a")
    file = tmp_path/"a"/"adapter_model.safetensors"
    kept = {name(n): w for n, w in load_file(file).items() if name(n)}
    save_file(kept, file, metadata=dict(format="pt"))
    with said("does not fit this model"): ship.merge(folder, tmp_path/"a", tmp_path/"x")
    assert not (tmp_path/"x").exists()


@pytest.mark.parametrize("type", [name for name in export.TYPES if name not in ("f32", "bf16")])
def test_scales_beyond_their_range_are_refused(tmp_path, type):
    folder = changed(tiny_llama(tmp_path/"m"), UP, lambda w: w * 1e9)
    with said("Use bf16"): export.export_gguf(folder, tmp_path/"x.gguf", type)
    export.export_gguf(folder, tmp_path/"x.gguf", "bf16")


def test_a_tokenizer_that_ends_nothing(tmp_path):
    (tmp_path/"m.gguf").write_bytes(b"")
    tok = byte_tokenizer()
    tok.eos_token = None
    with said("eos_token"): ollama.modelfile(tmp_path/"m.gguf", tok)


@pytest.mark.parametrize("what", ["cut", "pointer"])
def test_weights_that_are_no_weights_get_a_sentence(tmp_path, what):
    folder = tiny_llama(tmp_path/"m")
    file = folder/"model.safetensors"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    file.write_bytes(pointer if what == "pointer" else file.read_bytes()[:-100])
    with said("no whole safetensors"): export.export_gguf(folder, tmp_path/"x.gguf")


def test_tokenizers_that_llama_cpp_cannot_have(tmp_path):
    folder = tiny_llama(tmp_path/"m")
    byte_tokenizer(add_prefix_space=True).save_pretrained(folder)
    with said("space before every text"): export.export_gguf(folder, tmp_path/"x.gguf")
    with pytest.warns(UserWarning, match="cut some texts otherwise"):
        export.export_gguf(folder, tmp_path/"x.gguf", exact=False)


# ---------------------------------------------------------------- llama.cpp and processes

@pytest.mark.slow
@pytest.mark.parametrize("rope", [None, LLAMA3], ids=["default", "llama3"])
def test_llama_cpp_agrees_at_every_position(tmp_path, rope):
    "An untied Llama with grouped heads, also with Llama 3's scaling and far beyond its context."
    from mlcourse.llm import llama_cpp
    folder = tiny_llama(tmp_path/"m", rope=rope)
    path = export.export_gguf(folder, tmp_path/"m.gguf", "f32")
    ids = np.random.default_rng(0).integers(0, 256, 150).tolist()
    ours = ship.reference_logprobs(LlamaForCausalLM.from_pretrained(folder), ids)
    with llama_cpp(path, 256, 0) as engine: theirs = ship.next_logprobs(engine, ids)
    assert np.abs(np.array(ours) - np.array(theirs)).max() < 0.05


@pytest.mark.slow
def test_the_tokenizer_travels(model, tmp_path):
    from mlcourse.llm import llama_cpp
    tok = byte_tokenizer()
    texts = ["the hen, 12345 times", "  he\n\n\the ", "Grüße, 東京 🙂",
             "<|im_start|>user\nhe<|im_end|>", ""]
    with llama_cpp(export.export_gguf(model, tmp_path/"m.gguf", "f16"), 256, 0) as engine:
        for text in texts:
            assert ship.tokenize(engine, text) == tok(text, add_special_tokens=False).input_ids


@pytest.mark.slow
def test_kill_and_again_from_the_command_line(tmp_path):
    folder = tiny_llama(tmp_path/"m", width=1024, layers=6)
    command = [sys.executable, "-m", "mlcourse.cli", "gguf", str(folder), str(tmp_path/"m.gguf"),
               "--type", "q5_1"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while time.monotonic() < end and running.poll() is None:
        if any(p.stat().st_size > 2_000_000 for p in tmp_path.glob("*.part")): break
        time.sleep(0.02)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Wrote" in done.stdout, done.stderr
    assert (tmp_path/"Modelfile").is_file()
    anew = export.export_gguf(folder, tmp_path/"n.gguf", "q5_1")
    assert (tmp_path/"m.gguf").read_bytes() == anew.read_bytes()


@pytest.mark.slow
def test_errors_of_the_command_are_sentences(tmp_path):
    for args, code, word in (([str(tmp_path), "x.gguf"], 1, "config.json"),
                             (["llama-99b", "x.gguf"], 1, "no model"), ([str(tmp_path)], 2, "out")):
        done = subprocess.run([sys.executable, "-m", "mlcourse.cli", "gguf", *args], cwd=tmp_path,
                              capture_output=True, text=True, timeout=120)
        assert done.returncode == code and word in done.stderr.lower(), done.stderr
        assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- every architecture

CHAT_MODELS = [name for name, row in models().items() if "template" in row]
READ_BY_TRANSFORMERS = [n for n in CHAT_MODELS if "gemma" not in n]   # its reader has no Gemma 1


def asked(tok, text):
    return tok.apply_chat_template([dict(role="user", content=text)], tokenize=False,
                                   add_generation_prompt=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAT_MODELS)
def test_llama_cpp_reads_every_model_as_transformers_does(tmp_path, name):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from mlcourse.llm import llama_cpp
    folder = thin_model(name)
    tok = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = ["It's 12345 o'clock, isn't it?", "  two  spaces\n\n\ttabs\r\n", "f(x):\n    x**2",
             "Grüße, 東京, Привет, 🙂", "host=tardis sshd: <table> \n\n\n x", " "]
    with llama_cpp(export.export_gguf(folder, tmp_path/"m.gguf", "f32"), 256, 0) as engine:
        for text in map(lambda t: asked(tok, t), texts):
            assert ship.tokenize(engine, text) == tok(text, add_special_tokens=False).input_ids
        ids = tok(asked(tok, "Grüße at 12:30"), add_special_tokens=False).input_ids[:48]
        ours, theirs = (np.array(f(m, ids)) for f, m in
                        ((ship.reference_logprobs, model), (ship.next_logprobs, engine)))
    assert np.abs(ours - theirs).max() < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
def test_transformers_own_reader_finds_the_same_model(tmp_path, name):
    from transformers import AutoModelForCausalLM, GgufConfig
    folder, ids = thin_model(name), torch.arange(40, 70)[None]
    export.export_gguf(folder, tmp_path/"m.gguf", "f32")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32,
                                                quantization_config=GgufConfig(dequantize=True))
    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad(): difference = read(ids).logits - wanted(ids).logits
    assert difference.abs().max() < 1e-3
