"""The small language model: its benches as processes, and what must hold for every piece."""
import json, subprocess, sys

import pytest, torch
from torch import nn

from mlcourse import tinylm
from mlcourse.decoding import CachedLM, KVCache, LlamaLM, generate_cached, sampler
from mlcourse.tinylm import (ModernLM, TinyLM, TinyLMError, attention_weights, generate, muon,
                             rotate, stdlib_text, train, window_losses)


@pytest.fixture
def bench(tmp_path, environment):
    "Run `mlcourse bench ...` to its end: exit code, standard output, standard error."
    def call(*args, **env):
        command = [sys.executable, "-m", "mlcourse.cli", "bench", *map(str, args)]
        done = subprocess.run(command, cwd=tmp_path, env=environment | env, capture_output=True,
                              text=True, timeout=300)
        return done.returncode, done.stdout, done.stderr
    return call


SMALL = dict(vocab=20, n_layer=2, n_head=2, dim=16, context=64)

def small(LM=ModernLM, **changes):
    "A model in which nothing is zero."
    torch.manual_seed(0)
    lm = LM(**SMALL | changes)
    for p in lm.parameters(): nn.init.normal_(p, std=0.2)
    return lm.eval()


# ---------------------------------------------------------------- the bench as a process

@pytest.mark.slow
def test_bench_prints_json_and_learns(bench, tmp_path):
    data = tmp_path / "text.txt"
    data.write_text(stdlib_text(200_000))
    code, out, err = bench("tinylm", "--data", data, "--steps", 40, "--seeds", 2)
    assert code == 0, err
    result = json.loads(out)
    assert result["steps"] == 40 and [r["seed"] for r in result["runs"]] == [0, 1]
    assert 0.99 <= result["parameters"] / 795_904 <= 1.02   # more letters than Shakespeare
    assert result["seconds"] > 0 and result["tokens_per_s"] > 0
    assert result["products"] == "fp32"   # bf16 when asked for
    assert 2.0 < result["val_loss"] < 3.3   # a fresh model has 4.6, and knows nothing


@pytest.mark.slow
def test_the_same_seed_gives_the_same_loss(bench, tmp_path):
    data = tmp_path / "text.txt"
    data.write_text(stdlib_text(60_000))
    told = [bench("tinylm", "--data", data, "--steps", 5, OMP_NUM_THREADS="1")[1] for _ in range(2)]
    first, second = (json.loads(out)["val_loss"] for out in told)
    assert first == second


@pytest.mark.slow
def test_decode_bench(bench):
    code, out, err = bench("decode", "--new", 24, "--rounds", 1)
    assert code == 0, err
    result = json.loads(out)
    assert result["parameters"] > 10e6
    keys = ("cache s", "transformers s", "no cache s", "over_transformers")
    assert all(result[key] > 0 for key in keys)


@pytest.mark.slow
@pytest.mark.parametrize("content, said", [
    (None, "There is no file"), (b"", "is empty"), (b"  \n", "is empty"),
    (b"\x80\x1f" * 9000, "no UTF-8"), (b"ab\0" * 9000, "null characters"),
    (b"To be, or not to be", "at least 10,000")])
def test_bad_files_are_sentences(bench, tmp_path, content, said):
    if content is not None: (tmp_path / "bad.txt").write_bytes(content)
    code, out, err = bench("tinylm", "--data", tmp_path / "bad.txt")
    assert code == 2 and out == "" and said in err and "Traceback" not in err


@pytest.mark.slow
def test_bad_numbers_and_names(bench):
    assert bench("tinylm", "--steps", "0")[0] == 2
    assert bench("tinylm", "--steps", "many")[0] == 2
    assert bench("nothing")[0] == 2


def test_bench_help_imports_no_torch(tmp_path, environment):
    code = ("import sys; from mlcourse.cli import main; "
            "code = main(['bench', '--help']); print(code, 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("0 False\n")
    for word in ("vram", "tinylm", "decode"): assert word in done.stdout


# ---------------------------------------------------------------- the cache

@pytest.mark.parametrize("LM", [CachedLM, LlamaLM])
def test_cached_logits_equal_uncached_in_any_cut(LM):
    lm, ids = small(LM), torch.randint(20, (3, 50))
    with torch.no_grad(): whole = lm(ids)
    for cuts in ([50], [1] * 50, [7, 1, 20, 22], [49, 1]):
        cache, parts = KVCache(lm, 3, 50), ids.split(cuts, dim=1)
        with torch.no_grad(): got = torch.cat([lm(p, cache) for p in parts], dim=1)
        assert torch.allclose(got, whole, atol=1e-5), (LM, cuts)


def test_the_weights_of_the_lesson_fit_the_cached_model():
    lm, ids = small(ModernLM), torch.randint(20, (2, 64))
    cached = CachedLM(**SMALL)
    cached.load_state_dict(lm.state_dict())
    with torch.no_grad(): assert torch.allclose(lm(ids), cached(ids), atol=1e-5)
    told = generate_cached(cached, ids[:1, :4], 40)[0]
    assert told.tolist() == generate(lm, ids[0, :4], 40, temperature=0).tolist()


def test_a_full_cache_says_so():
    lm = small(CachedLM)
    ids = torch.zeros(1, 5, dtype=torch.long)
    with pytest.raises(TinyLMError, match="room for 4 tokens, and 5"): lm(ids, KVCache(lm, 1, 4))


def test_the_end_of_a_table_says_so():
    ids = torch.zeros(1, 65, dtype=torch.long)
    with pytest.raises(TinyLMError, match="65 are asked for"): small(TinyLM)(ids)
    assert small(ModernLM)(ids).shape == (1, 65, 20)   # rotary positions have no end


def test_generation_refuses_empty_prompts():
    nothing = torch.zeros(0, dtype=torch.long)
    with pytest.raises(TinyLMError, match="at least one token"): generate(small(), nothing, 3)
    for prompts in (nothing[None], nothing.view(0, 1)):
        with pytest.raises(TinyLMError, match="at least one token"):
            generate_cached(small(CachedLM), prompts, 3)


def test_sampling_is_repeatable_and_seeds_differ():
    lm, start = small(CachedLM), torch.zeros(4, 1, dtype=torch.long)
    a, b, c = (generate_cached(lm, start, 30, sampler(seed=s)).tolist() for s in (1, 1, 2))
    assert a == b != c
    a, b, c = (generate(lm, start[0], 30, seed=s).tolist() for s in (1, 1, 2))
    assert a == b != c


def test_a_prompt_may_be_longer_than_the_context():
    for LM in (TinyLM, ModernLM):
        assert len(generate(small(LM), torch.zeros(100, dtype=torch.long), 3)) == 103


def test_top_k_forbids_the_rest():
    lm, start = small(), torch.zeros(1, dtype=torch.long)
    with torch.no_grad(): best = set(lm(start[None])[0, -1].topk(2).indices.tolist())
    drawn = {int(generate(lm, start, 1, top_k=2, seed=s)[-1]) for s in range(40)}
    assert drawn == best


# ---------------------------------------------------------------- the pieces

def adamw(lm): return [torch.optim.AdamW(lm.parameters(), lr=3e-3)]

@pytest.mark.parametrize("LM, optimizers", [
    (TinyLM, adamw), (ModernLM, adamw), (ModernLM, muon), (CachedLM, muon), (LlamaLM, muon)])
def test_every_model_learns_and_keeps_the_future_hidden(LM, optimizers):
    ids = (torch.arange(3000) % 7) + torch.arange(3000) % 2
    torch.manual_seed(0)
    lm = LM(vocab=9, n_layer=1, n_head=2, dim=16, context=16)
    losses = train(lm, ids, optimizers(lm), 60, 8)
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.5
    x, y = ids[None, :16], ids[None, :16].clone()
    y[0, 10] = (y[0, 10] + 1) % 9
    with torch.no_grad(): assert torch.allclose(lm(x)[:, :10], lm(y)[:, :10], atol=1e-6)


def test_the_plain_weights_are_the_attention_that_the_model_uses():
    lm, ids = small(), torch.randint(20, (1, 12))
    x, a = lm.blocks[0].norm1(lm.start(ids)), lm.blocks[0].attention
    q, k, v = a.heads(x)
    weights = attention_weights(q, k)
    assert torch.allclose(a.proj((weights @ v).transpose(1, 2).flatten(2)), a(x), atol=1e-5)
    assert weights.triu(1).abs().max() == 0


def test_rotation_depends_on_the_distance_alone():
    a, b = torch.randn(2, 16)
    scores = [float(rotate(a[None], i)[0] @ rotate(b[None], i + 5)[0]) for i in (0, 3, 90)]
    assert max(scores) - min(scores) < 1e-4


def test_window_losses_are_those_of_the_windows():
    lm, ids = small(), torch.randint(20, (64 * 3 + 10,))
    got = window_losses(lm, ids, 2)
    for start, loss in zip((0, (len(ids) - 1) // 2), got):
        row = ids[start:start + 65]
        with torch.no_grad(): mine = nn.functional.cross_entropy(lm(row[None, :-1])[0], row[1:])
        assert torch.allclose(mine, loss, atol=1e-5)
    assert len(window_losses(lm, ids)) == 3
    with pytest.raises(TinyLMError, match="not one window"): window_losses(lm, ids[:64])


def test_a_text_in_another_alphabet_goes_all_the_way(tmp_path):
    "Chinese: no letter of a prompt of ours occurs."
    path = tmp_path / "story.txt"
    story = "从前有座山，山里有座庙，庙里有个老和尚，老和尚在讲故事。讲的是什么？\n"
    path.write_text(story * 400, encoding="utf-8")
    text = tinylm.corpus(path)
    tok = tinylm.CharTokenizer(text)
    train_ids, val_ids = tinylm.split(tok.encode(text))
    torch.manual_seed(0)
    lm = ModernLM(vocab=len(tok), n_layer=1, n_head=2, dim=32, context=32)
    train(lm, train_ids, muon(lm), 60, 8)
    assert window_losses(lm, val_ids, 20).mean() < 1   # a fresh one has 3.3
    told = tok.decode(generate(lm, val_ids[:8], 40, temperature=0))
    assert story.strip()[:4] in told
    with pytest.raises(TinyLMError, match="'d' has no number"): tok.encode("def ")


def test_the_library_is_cut_where_a_module_ends():
    for chars in (20_000, 200_000):
        text = stdlib_text(chars)
        held = text[int(0.9 * len(text)):]
        assert 0 < len(text) <= chars and "\0" not in text
        assert held.startswith("\n\n") and not held[2:].startswith(" ")


def test_without_its_mask_a_model_learns_to_peek(monkeypatch):
    text = stdlib_text(60_000)
    tok = tinylm.CharTokenizer(text)
    train_ids, val_ids = tinylm.split(tok.encode(text))
    def loss():
        torch.manual_seed(0)
        lm = ModernLM(vocab=len(tok), n_layer=2, n_head=2, dim=32, context=32)
        train(lm, train_ids, muon(lm), 100, 8)
        return window_losses(lm, val_ids, 100).mean()
    honest, real = loss(), nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention",
                        lambda q, k, v, is_causal: real(q, k, v))
    assert loss() < honest - 0.5


def test_parameters_are_those_of_nanogpt():
    size = sum(p.numel() for p in ModernLM(65, **tinylm.NANOGPT_CPU).parameters())
    assert abs(size / 795_904 - 1) < 0.01


def test_training_in_bf16_follows_training_in_fp32():
    ids = (torch.arange(3000) % 7) + torch.arange(3000) % 2
    losses = {}
    for bf16 in (False, True):
        torch.manual_seed(0)
        lm = ModernLM(vocab=9, n_layer=2, n_head=2, dim=16, context=16)
        losses[bf16] = train(lm, ids, muon(lm), 40, 8, bf16=bf16)
        assert {p.dtype for p in lm.parameters()} == {torch.float32}
    assert losses[True] != losses[False]   # it did round
    assert all(abs(a - b) < 0.02 for a, b in zip(*losses.values())), losses
