"""The small language model: its benches as processes, and what must hold for every piece."""
import json, subprocess, sys
from dataclasses import replace

import pytest, torch

from mlcourse import tinylm
from mlcourse.tinylm import (ALiBi, KVCache, Learned, MODERN, NoPositions, Rotary, Sinusoidal,
                             TinyLMError, attention_maps, build, count_parameters, generate,
                             gpt2_init, sampler, stdlib_text, story, train)


@pytest.fixture
def bench(tmp_path, environment):
    "Run `mlcourse bench ...` to its end: exit code, standard output, standard error."
    def call(*args, **env):
        command = [sys.executable, "-m", "mlcourse.cli", "bench", *map(str, args)]
        done = subprocess.run(command, cwd=tmp_path, env=environment | env, capture_output=True,
                              text=True, timeout=300)
        return done.returncode, done.stdout, done.stderr
    return call


def small(positions=Rotary, **kwargs):
    recipe = replace(MODERN, positions=positions, init=gpt2_init, **kwargs)
    return build(recipe, vocab=20, n_layer=2, n_head=2, dim=16, max_tokens=64).eval()


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
    assert result["products"] in ("bf16", "fp32")
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

@pytest.mark.parametrize("scheme", [NoPositions, Learned, Sinusoidal, Rotary, ALiBi])
def test_cached_logits_equal_uncached_in_any_cut(scheme):
    lm, ids = small(scheme), torch.randint(20, (3, 50))
    whole = lm(ids)
    for cuts in ([50], [1] * 50, [7, 1, 20, 22], [49, 1]):
        cache, parts = KVCache(lm, 3, 50), ids.split(cuts, dim=1)
        with torch.no_grad(): got = torch.cat([lm(p, cache) for p in parts], dim=1)
        assert torch.allclose(got, whole, atol=1e-5), (scheme, cuts)


def test_a_full_cache_says_so():
    lm = small()
    ids = torch.zeros(1, 5, dtype=torch.long)
    with pytest.raises(TinyLMError, match="room for 4 tokens, and 5"): lm(ids, KVCache(lm, 1, 4))


@pytest.mark.parametrize("scheme", [Learned, Rotary])
def test_the_end_of_a_table_says_so(scheme):
    ids = torch.zeros(1, 65, dtype=torch.long)
    with pytest.raises(TinyLMError, match="65 are asked for"): small(scheme)(ids)


def test_generation_refuses_empty_prompts():
    for prompts in ([], torch.zeros(1, 0, dtype=torch.long)):
        with pytest.raises(TinyLMError, match="at least one token"): generate(small(), prompts, 3)


def test_sampling_is_repeatable_and_seeds_differ():
    lm, start = small(), torch.zeros(4, 1, dtype=torch.long)
    a, b, c = (generate(lm, start, 30, sampler(seed=s)).tolist() for s in (1, 1, 2))
    assert a == b != c


# ---------------------------------------------------------------- the pieces

@pytest.mark.parametrize("name, recipe", story(), ids=[n for n, _ in story()])
def test_every_recipe_learns_and_keeps_the_future_hidden(name, recipe):
    ids = (torch.arange(3000) % 7) + torch.arange(3000) % 2
    lm = build(recipe, vocab=9, n_layer=1, n_head=2, dim=16, max_tokens=16)
    losses, _ = train(lm, ids, recipe, 60, 16, 8)
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.5, name
    x, y = ids[None, :16], ids[None, :16].clone()
    y[0, 10] = (y[0, 10] + 1) % 9
    with torch.no_grad(): assert torch.allclose(lm(x)[:, :10], lm(y)[:, :10], atol=1e-6)


def test_maps_are_the_attention_that_the_model_uses():
    lm, ids = small(ALiBi), torch.randint(20, (1, 12))
    maps = attention_maps(lm, ids)
    x = lm.blocks[0].norm1(lm.embed_norm(lm.embed(ids)))
    a = lm.blocks[0].attention
    mine = a.proj((maps[0] @ a.project(x)[2][0]).transpose(0, 1).flatten(1))
    assert torch.allclose(mine, a(x)[0], atol=1e-5) and maps.triu(1).abs().max() == 0


def test_parameters_are_those_of_nanogpt():
    shape = {k: v for k, v in tinylm.NANOGPT_CPU.items() if k not in ("context", "batch")}
    assert abs(count_parameters(build(MODERN, 65, **shape, max_tokens=64)) / 795_904 - 1) < 0.01


def test_training_in_bf16_follows_training_in_fp32():
    ids = (torch.arange(3000) % 7) + torch.arange(3000) % 2
    losses = {}
    for bf16 in (False, True):
        lm = build(MODERN, vocab=9, n_layer=2, n_head=2, dim=16, max_tokens=16)
        losses[bf16], _ = train(lm, ids, MODERN, 40, 16, 8, bf16=bf16)
        assert {p.dtype for p in lm.parameters()} == {torch.float32}
    assert losses[True] != losses[False]   # it did round
    assert all(abs(a - b) < 0.02 for a, b in zip(*losses.values())), losses
