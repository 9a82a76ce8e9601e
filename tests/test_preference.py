"""Preference pairs, the DPO loss against TRL's own batches, short trainings of a random Llama."""
from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mlcourse import preference as pref
from test_gguf import byte_tokenizer

FAST = dict(per_device_train_batch_size=4, gradient_accumulation_steps=1, lora_r=4, lora_alpha=8)


@pytest.fixture
def small():
    "A random Llama and a tokenizer of bytes."
    torch.manual_seed(0)
    tok = byte_tokenizer()
    tok.pad_token = tok.eos_token
    shape = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=260,
                        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512)
    return LlamaForCausalLM(shape), tok


@pytest.fixture
def pairs():
    prompts = [[dict(role="user", content=f"{i}?")] for i in range(8)]
    return [pref.make_pair(p, "yes", "nay") for p in prompts]


@pytest.mark.parametrize("role, chosen, rejected, why", [
    (None, "a", "b", "user's message"), ("assistant", "a", "b", "user's message"),
    ("user", " ", "b", "empty"), ("user", "a", "a ", "nothing to prefer")])
def test_pairs_that_are_none(role, chosen, rejected, why):
    prompt = [dict(role=role, content="x")] if role else []
    with pytest.raises(pref.PreferenceError, match=why): pref.make_pair(prompt, chosen, rejected)


def some_pairs():
    "Prompts and answers of several lengths."
    texts = ((1, "yes", "a longer answer"), (9, "a longer answer", "no"), (30, "no", "yes"))
    return [pref.make_pair([dict(role="user", content="a" * n)], *said) for n, *said in texts]


def test_log_probabilities_do_not_depend_on_the_batch(small):
    model, tok = small
    together = pref.pair_logps(model, tok, some_pairs())
    alone = torch.cat([pref.pair_logps(model, tok, [p]) for p in some_pairs()])
    assert torch.allclose(together, alone, atol=1e-4)


def test_a_prompt_that_is_read_once_gives_what_whole_texts_give(small):
    from mlcourse.instruct import encode_pair
    model, tok = small
    found = pref.pair_logps(model, tok, some_pairs())
    for p, both in zip(some_pairs(), found.tolist(), strict=True):
        for side, logp in zip(("chosen", "rejected"), both):
            row = encode_pair(tok, p["prompt"] + p[side])
            with torch.no_grad(): logits = model(torch.tensor([row["input_ids"]])).logits[0]
            logps = logits[:-1].log_softmax(-1)
            whole = sum(logps[t - 1, i] for t, i in enumerate(row["labels"]) if i != -100)
            assert logp == pytest.approx(float(whole), abs=1e-4)


def batch_logps(model, batch):
    "The log-probabilities of a batch of TRL: first all chosen answers, then all rejected."
    ids, answer = batch["input_ids"], batch["completion_mask"][:, 1:]
    logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1]
    logps = logits.float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return torch.stack((logps * answer).sum(1).chunk(2), 1)


@pytest.mark.parametrize("beta", [0.01, 0.1, 3.0])
def test_loss_equals_trls(small, pairs, tmp_path, beta):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    model, tok = small
    args = DPOConfig(str(tmp_path), beta=beta, report_to="none", use_cpu=True, bf16=False,
                     activation_checkpointing=False, per_device_train_batch_size=4)
    trainer = DPOTrainer(model, args=args, train_dataset=Dataset.from_list(pairs),
                         processing_class=tok, peft_config=pref.lora(model, 4, 8))
    for name, p in trainer.model.named_parameters():
        if "lora_B" in name: torch.nn.init.normal_(p.data, std=0.3)
    trainer.model.eval()
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        theirs = trainer.compute_loss(trainer.model, dict(batch))
        policy = batch_logps(trainer.model, batch)
        with trainer.model.disable_adapter():
            reference = batch_logps(trainer.model, batch)
    assert (policy - reference).abs().max() > 0.01          # the adapter does something
    assert abs(float(pref.dpo_loss(policy, reference, beta)[0]) - float(theirs)) < 1e-5


def test_training_refuses_what_it_cannot_do(small, tmp_path):
    with pytest.raises(pref.PreferenceError, match="no pairs"): pref.train_dpo(*small, [], tmp_path)


def test_only_the_upper_layers_are_adapted(small):
    from peft import get_peft_model
    model = get_peft_model(small[0], pref.lora(small[0], 4, 8, top_layers=1))
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names and all(".layers.1." in n for n in names)


@pytest.mark.slow
def test_dpo_learns_and_leaves_an_adapter(small, pairs, tmp_path):
    model, tok = small
    before = pref.pair_logps(model, tok, pairs)
    trainer = pref.train_dpo(model, tok, pairs, tmp_path/"a", beta=0.5, learning_rate=1e-2,
                             num_train_epochs=5, **FAST)
    moved = pref.pair_logps(trainer.model.eval(), tok, pairs) - before
    assert (moved[:, 0] > moved[:, 1]).all()
    assert (tmp_path/"a"/"adapter_model.safetensors").is_file()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)


@pytest.mark.slow
def test_a_loss_that_is_no_number_is_a_sentence(small, pairs, tmp_path):
    model, tok = small
    with torch.no_grad(): model.lm_head.weight[:] = float("nan")
    with pytest.raises(pref.PreferenceError, match="Lower learning_rate"):
        pref.train_dpo(model, tok, pairs, tmp_path/"a", **FAST)
    assert not (tmp_path/"a"/"adapter_model.safetensors").exists()


def test_pairs_that_would_be_cut_are_refused(small, pairs, tmp_path):
    long = pref.make_pair([dict(role="user", content="x" * 300)], "yes", "nay")
    with pytest.raises(pref.PreferenceError, match="1 of 9 pairs are longer than max_length"):
        pref.train_dpo(*small, [*pairs, long], tmp_path/"a", max_length=128, **FAST)
    assert not (tmp_path/"a").exists()


@pytest.mark.slow
def test_a_reference_that_is_given_gives_the_same_training(small, pairs, tmp_path):
    model, tok = small
    reference = pref.pair_logps(model, tok, pairs)
    first = pref.train_dpo(model, tok, pairs, tmp_path/"a", seed=1, **FAST)
    model = first.model.unload()
    second = pref.train_dpo(model, tok, pairs, tmp_path/"b", seed=1, reference=reference, **FAST)
    losses = [[h["loss"] for h in t.state.log_history if "loss" in h] for t in (first, second)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
