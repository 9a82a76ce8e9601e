"""The lessons' 12 GB column on a processor, and the course's functions on every architecture."""
import ast, json, os, subprocess, tomllib
from pathlib import Path

import pytest

import checks
from checks import ROOT
from mlcourse import rehearse
from mlcourse.hub import hub, models, thin_model

TABLES = sorted(p for p in (ROOT / "mlcourse/data/rehearsal").glob("*/*.toml")
                if p.name != "models.toml")
LESSONS = sorted(p for part in ("week*", "clinic") for p in (ROOT / "nbs").glob(f"{part}/*.ipynb"))
NEVER = {"model", "dtype", "precision", "load_in_4bit", "gradient_checkpointing", "optim"}


def settings_of(path: Path) -> dict[str, ast.expr]:
    "The names and values that a notebook gives to `choose`."
    nodes = (n for _, cell in checks.code_cells(checks.read(path))
             for n in ast.walk(ast.Module(checks.parse(cell), [])))
    calls = (n for n in nodes if isinstance(n, ast.Call))
    call = next(n for n in calls if getattr(n.func, "id", "") == "choose")
    return {k.arg: k.value for k in call.keywords}


@pytest.mark.parametrize("table", TABLES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_table_scales_settings_that_its_lesson_has(table):
    lesson = ROOT / "nbs" / table.parent.name / f"{table.stem}.ipynb"
    assert lesson.exists(), f"{lesson} is not there: rename or delete its table"
    small = tomllib.loads(table.read_text(encoding="utf-8"))
    lost = set(small) - set(settings_of(lesson))
    assert not lost, f"not among the lesson's settings: {lost}"
    assert not NEVER & set(small), "only sizes are scaled"


def test_the_stage_shows_nothing_that_is_yours(tmp_path, monkeypatch):
    monkeypatch.setattr(rehearse, "hub", lambda: hub([]))
    for name in rehearse.HIDDEN: monkeypatch.setenv(name, "mine")
    with rehearse.stage(tmp_path):
        assert not [k for k, v in os.environ.items() if v == "mine"]
        assert os.environ["HF_ENDPOINT"].startswith("http://127.0.0.1:")
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
        assert os.environ["HF_HOME"].startswith(str(tmp_path))
        assert "127.0.0.1" in os.environ["NO_PROXY"]
    assert os.environ["HF_TOKEN"] == "mine"


MADE = [   # cells of a lesson
    "tier = 'auto'",
    "from mlcourse.tier import choose\nfrom mlcourse.assets import fetch\n"
    "from mlcourse.record import record",
    "cfg = choose(tier, steps=(1, 1000), sizes=((1,), (2, 3)),\n"
    "             model=('minilm-l6-v2', 'bge-small-en-v1.5'))",
    "assert (fetch(cfg.model)/'model.safetensors').stat().st_size < 2e6",
    "assert cfg.steps == 7 and cfg.sizes == (4, 5)",   # of the table, and of the caller
    "record('right', 0.0, at_least=1)",
    "raise ValueError('no pad token')",
    "never = 1"]

def test_a_lesson_of_our_own(tmp_path, monkeypatch):
    "A missed target is shown and passed; an exception is neither."
    from nbformat.v4 import new_code_cell, new_notebook
    lesson = tmp_path / "week9" / "01_made.ipynb"
    lesson.parent.mkdir()
    tags = [["parameters"], *[[]] * (len(MADE) - 1)]
    cells = [new_code_cell(s, metadata=dict(tags=t)) for s, t in zip(MADE, tags)]
    lesson.write_text(json.dumps(new_notebook(cells=cells)))
    monkeypatch.setattr(rehearse, "scaled", {"week9/01_made": dict(steps=7)}.__getitem__)
    row = rehearse.rehearse([str(lesson)], str(tmp_path / "out"), params=dict(sizes=(4, 5)))[0]
    assert (row["status"], row["missed"], row["not_run"]) == ("failed", ["right"], [7]), row
    assert row["error"]["cell"] == 6 and "no pad token" in row["error"]["message"]
    assert json.loads((tmp_path / "out" / "rehearsal.json").read_text()) == [row]


# `make test` (it runs what is marked slow) rehearses two short lessons always, and those that are
# touched; `make rehearse` runs all of them, as the canary does each week.
ALWAYS = {"week1/01_environment", "week1/04_rag"}
MOST = 4   # touched lessons a run, the first ones, so that it stays a matter of minutes


def name_of(path: Path) -> str: return f"{path.parent.name}/{path.stem}"


def git(*words: str) -> list[str]:
    "The lines that git gives; none where it has no answer, or there is no git."
    try: done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    except OSError: return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def touched() -> list[str]:
    "Lessons changed, or whose tables are, since main, or in the last commit where this is main."
    head = git("rev-parse", "HEAD")
    base = git("merge-base", "HEAD", "origin/main")
    if not base or base == head: base = ["HEAD~1"]
    changed = {Path(line) for line in git("diff", "--name-only", base[0], "--")}
    names = {f"{p.parent.name}/{p.stem}" for p in changed if p.suffix in (".ipynb", ".toml")}
    return [name_of(p) for p in LESSONS if name_of(p) in names]


def rehearsed(names: list[str], leaves: dict[str, set[str]]) -> set[str]:
    "`ALWAYS`, and the first few of `names` with the lessons whose results they take."
    chosen = []
    for name in names:
        more, found = [name], []
        while more:
            found.insert(0, more.pop())
            more += leaves.get(found[0], set()) - set(found)   # one may take its own
        new = [n for n in dict.fromkeys(found) if n not in chosen]
        if len(chosen) + len(new) <= MOST: chosen += new
    return ALWAYS | set(chosen)


def leaves() -> dict[str, set[str]]:
    "Of each lesson, those whose results it takes."
    from mlcourse.run import needs
    return {name_of(p): {lesson for lesson, _ in needs(checks.read(p))} for p in LESSONS}


def test_what_make_test_rehearses():
    takes = {"w/3": {"w/2"}, "w/2": {"w/1"}}
    assert rehearsed([], takes) == ALWAYS <= set(map(name_of, LESSONS))
    assert rehearsed(["w/3"], takes) == ALWAYS | {"w/1", "w/2", "w/3"}
    assert rehearsed(["w/3", "w/4", "w/5"], takes) == ALWAYS | {"w/1", "w/2", "w/3", "w/4"}
    assert rehearsed(["a", "b", "c", "d", "e"], {}) == ALWAYS | {"a", "b", "c", "d"}
    assert rehearsed(["w/1"], {"w/1": {"w/1", "w/2"}, "w/2": {"w/1"}}) >= {"w/1", "w/2"}
    assert leaves()["week2/05_ship"] >= {"week2/02_qlora"}
    assert set(touched()) <= set(map(name_of, LESSONS))


NOW = rehearsed(touched(), leaves())
ROWS = [pytest.param(p, id=name_of(p), marks=[pytest.mark.slow] if name_of(p) in NOW else [])
        for p in LESSONS]


@pytest.mark.rehearsal
@pytest.mark.parametrize("path", ROWS)
def test_the_12gb_column(path, tmp_path_factory):
    "Every code cell runs. In course order: later lessons take what earlier ones leave."
    out = tmp_path_factory.getbasetemp() / "rehearsal"
    row = rehearse.rehearse([str(path)], str(out))[0]
    assert row["status"] == "ok" and not row["not_run"], rehearse.described(row)


# ---------------------------------------------------------------- the architectures

CHAT = [name for name, row in models().items() if "template" in row]
TALK = [dict(role="user", content="What is 7 times 8?"), dict(role="assistant", content="56")]
TASK = dict(role="system", content="Answer with a number.")


def greedy(model, ids, n: int, **options) -> list[int]:
    "The likeliest tokens after a prompt."
    import torch
    told = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n,
                          do_sample=False, repetition_penalty=1.0, **options)
    return told[0, ids.shape[1]:].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "nf4", "int8"])
@pytest.mark.parametrize("name", CHAT)
def test_every_model_loads_and_answers(name, precision):
    import torch
    from mlcourse.llm import encode, load
    model, tok = load(str(thin_model(name)), precision)
    ids = encode(tok, "What is 7 times 8?")
    begun = ids[0].tolist().count(tok.bos_token_id)   # once, and by the template
    assert begun == ("bos_token" in tok.chat_template)
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    assert tok.eos_token_id is None or tok.eos_token_id in ends
    with torch.inference_mode(): assert bool(model(ids).logits.isfinite().all())
    assert 1 <= len(greedy(model, ids, 4)) <= 4


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "nf4", "int8"])
@pytest.mark.parametrize("name", CHAT)
def test_every_model_runs_with_its_blocks_on_disk(name, precision, tmp_path):
    "Twice: what is brought in for the first pass must be brought in again."
    from mlcourse.llm import encode, load
    folder = str(thin_model(name))
    model, tok = load(folder, "bf16")
    ids = encode(tok, "What is 7 times 8?")
    wanted = greedy(model, ids, 4)
    model, _ = load(folder, precision, max_memory={"cpu": "1KB"}, offload_folder=tmp_path)
    assert "disk" in model.hf_device_map.values()
    for _ in range(2): assert greedy(model, ids, 4) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["nf4", "int8"])
@pytest.mark.parametrize("name", CHAT)
def test_every_model_runs_by_an_explicit_map(name, precision, tmp_path):
    "Packed blocks on the first device, the rest in 16 bits on disk; twice."
    from mlcourse.llm import encode, load, spread_layers
    from transformers import AutoConfig
    folder = str(thin_model(name))
    config = AutoConfig.from_pretrained(folder)
    def split(kb):   # do blocks lie in both places?
        places = spread_layers(config, precision, {"cpu": f"{kb}KB"})
        return {"cpu", "disk"} <= {v for k, v in places.items() if ".layers." in k}
    room = next(kb for kb in range(50, 5000, 10) if split(kb))
    model, tok = load(folder, precision, {"cpu": f"{room}KB"}, tmp_path)
    ids = encode(tok, "What is 7 times 8?")
    first, second = (greedy(model, ids, 4) for _ in range(2))
    assert first == second


@pytest.mark.slow
@pytest.mark.parametrize("system", [False, True], ids=["plain", "system"])
@pytest.mark.parametrize("name", CHAT)
def test_every_template_shows_where_the_answer_is(name, system):
    from transformers import AutoTokenizer
    from mlcourse.instruct import encode_pair
    tok = AutoTokenizer.from_pretrained(thin_model(name))
    row = encode_pair(tok, ([TASK] if system else []) + TALK)
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    learned = [i for i, label in pairs if label != -100]
    assert tok.decode(learned, skip_special_tokens=True).strip() == "56"
    assert tok.added_tokens_decoder[learned[-1]].special
    assert tok.decode(row["input_ids"]).count(TASK["content"]) == system


@pytest.mark.parametrize("name", CHAT)
def test_every_template_takes_a_system_message(name):
    from transformers import AutoTokenizer
    from mlcourse.llm import encode
    tok = AutoTokenizer.from_pretrained(thin_model(name))
    text = tok.decode(encode(tok, [TASK, TALK[0]])[0])
    assert text.count(TASK["content"]) == 1 and TALK[0]["content"] in text


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAT)
def test_every_model_trains_two_steps(name, tmp_path):
    from mlcourse.qlora import Flags, train
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join([json.dumps(dict(messages=TALK))] * 6))
    flags = Flags(str(thin_model(name)), str(data), str(tmp_path / "out"), dev=str(data),
                  load_in_4bit=True, bf16=True, gradient_checkpointing=True, lora_r=4,
                  gradient_accumulation_steps=2, max_seq_length=128, max_steps=2)
    result = train(flags)
    assert len(result.losses) == 2 and result.dev_after < result.dev_before
    assert (result.adapter / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAT)
def test_every_model_learns_a_preference(name, tmp_path):
    "Its own end of a turn counts; a system message stays where the template can take it."
    from mlcourse.llm import load
    from mlcourse.preference import make_pair, pair_logps, train_dpo
    model, tok = load(str(thin_model(name)), "nf4")
    pairs = [make_pair([TASK, TALK[0]], "56", "It is 57."), make_pair([TASK, TALK[0]], "56.", "5")]
    before = pair_logps(model, tok, pairs)
    trainer = train_dpo(model, tok, pairs, tmp_path, lora_r=4, max_steps=4, learning_rate=5e-3,
                        gradient_accumulation_steps=1)
    moved = pair_logps(trainer.model.eval(), tok, pairs) - before
    assert moved[:, 0].mean() > moved[:, 1].mean()


ODD = {   # shapes that no block of 32 or 64 divides
    "meta-llama/Llama-3.1-8B-Instruct": dict(
        hidden_size=80, num_attention_heads=10, num_key_value_heads=2, head_dim=8,
        intermediate_size=224, num_hidden_layers=3),
    "google/gemma-7b-it": dict(hidden_size=96, head_dim=40, intermediate_size=72,
                               num_hidden_layers=3)}

@pytest.mark.slow
@pytest.mark.parametrize("name", ODD)
def test_a_look_alike_goes_all_the_way(name, tmp_path):
    "Another shape, in shards, its template beside the configuration: trained, merged, shipped."
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from mlcourse.gguf import merge, next_logprobs, reference_logprobs, tokenize
    from mlcourse.gguf_file import export_gguf
    from mlcourse.llm import encode, llama_cpp, load
    from mlcourse.qlora import Flags, train
    config = AutoConfig.from_pretrained(thin_model(name))
    for key, value in ODD[name].items(): setattr(config, key, value)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base", max_shard_size="100KB")
    tok = AutoTokenizer.from_pretrained(thin_model(name))
    tok.save_pretrained(tmp_path / "base")
    assert (tmp_path / "base" / "chat_template.jinja").is_file()
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    for precision in ("nf4", "int8"):
        packed, _ = load(str(tmp_path / "base"), precision)
        assert len(greedy(packed, encode(tok, TALK[0]["content"]), 3, min_new_tokens=3)) == 3
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join([json.dumps(dict(messages=[TASK, *TALK]))] * 4))
    flags = Flags(str(tmp_path / "base"), str(data), str(tmp_path / "lora"), load_in_4bit=True,
                  bf16=True, lora_r=4, max_seq_length=256, max_steps=2, gradient_checkpointing=True)
    merged = merge(tmp_path / "base", train(flags).adapter, tmp_path / "merged", "fp32")
    exact = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    ids = encode(tok, [TASK, TALK[0]])[0].tolist()
    with llama_cpp(export_gguf(merged, tmp_path / "m.gguf", "f32"), 256, 0) as engine:
        assert tokenize(engine, tok.decode(ids)) == ids
        theirs = next_logprobs(engine, ids, start=len(ids) - 8)
    assert np.abs(np.array(reference_logprobs(exact, ids)[-8:]) - theirs).max() < 0.01
