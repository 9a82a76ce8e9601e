"""Numbers that the lessons' prose states and code can compute: downloads, sizes, counts."""
import ast, re
from dataclasses import replace

import pytest

import checks
from checks import ROOT
from mlcourse.assets import ASSETS, STANDINS, find_asset
from mlcourse.configs import find_config
from mlcourse.instruct import course_data, read_pairs
from mlcourse.vram import Plan, adapter_parameters, kv_bytes, parameters, predict, weight_bytes

LESSONS = sorted(p for part in ("week*", "clinic") for p in (ROOT/"nbs").glob(f"{part}/*.ipynb"))
GIB, CARD = 2**30, 12282 / 1024
LLAMA, LLAMA2_13B = (find_config(n)[1] for n in ("llama-3.1-8b-instruct", "llama-2-13b-chat"))
SMOL = find_config("smollm2-135m-instruct")[1]


PLANNED = ("week1/02_vram",)   # its model is a shape, and never fetched


def name_of(path): return f"{path.parent.name}/{path.stem}"


def prose(lesson: str) -> str:
    "All markdown of a lesson, each run of white space as one blank."
    cells = checks.read(ROOT/"nbs"/f"{lesson}.ipynb")["cells"]
    return " ".join(" ".join(c["source"] for c in cells if c["cell_type"] == "markdown").split())


def settings(path, column: int) -> dict:
    "The values of a column of the lesson's `choose`: 0 is tiny, 1 is 12gb."
    nodes = (n for _, cell in checks.code_cells(checks.read(path))
             for n in ast.walk(ast.Module(checks.parse(cell), [])))
    call = next((n for n in nodes if isinstance(n, ast.Call)
                 and getattr(n.func, "id", "") == "choose"), None)
    if not call: return {}   # the same on all tiers
    def value(node):
        code = ast.Expression(ast.fix_missing_locations(node))
        found = eval(compile(code, str(path), "eval"), dict(STANDINS=STANDINS))
        return found[min(column, len(found) - 1)] if isinstance(found, tuple) else found
    return {k.arg: value(k.value) for k in call.keywords}


def downloads(path) -> list:
    "The assets that a lesson's 12gb column names and that are fetched from outside."
    found = (find_asset(v) for v in settings(path, 1).values() if isinstance(v, str))
    return list({a.name: a for a in found if a and a.kind in ("hub", "url")}.values())


def stated(lesson: str) -> str:
    "The cell of the first table that says what the 12 GB tier downloads; empty if none does."
    for line in prose_lines(lesson):
        cells = [c.strip() for c in line.strip("| ").split("|")]
        if "download" in cells[0].lower() and len(cells) > 2: return cells[2]
        if cells[0] == "data" and "to download" in line: return cells[2]
    return ""


def prose_lines(lesson: str):
    first = checks.read(ROOT/"nbs"/f"{lesson}.ipynb")["cells"][0]["source"]
    return [line for line in first.split("\n") if line.startswith("|")]


@pytest.mark.parametrize("path", LESSONS, ids=name_of)
def test_what_the_first_table_says_of_downloads(path):
    "The sum of the rows of the 12gb column, to half of the last digit; or that of its large parts."
    said = stated(name_of(path))
    assets = [] if name_of(path) in PLANNED else downloads(path)
    numbers = re.findall(r"([\d.]+) ([GM]B)", said)
    if not said or re.match(r"none|nothing", said):
        new = [a.name for a in assets if a.week == path.parent.name]
        allowed = not said or "beyond" in said or not new
        assert allowed, f"it says {said!r}, and fetches {new}"
        return
    total = sum(a.size for a in assets)
    sum_said = sum(float(n) * (1e9 if unit == "GB" else 1e6) for n, unit in numbers)
    digits = max(len(n.partition(".")[2]) for n, _ in numbers)
    unit = 1e9 if numbers[0][1] == "GB" else 1e6
    if len(numbers) > 1 or "for" in said or "model" in said:   # parts are named one by one
        sizes = {f"{a.size / unit:.{digits}f}" for a in assets}
        assert {n for n, _ in numbers} <= sizes, (said, sizes)
    else: assert abs(total - sum_said) <= unit * 10**-digits / 2, (said, total / unit)


def test_the_settings_of_both_tiers_name_assets_that_exist():
    for path in LESSONS:
        for column in (0, 1):
            model = settings(path, column).get("model")
            if isinstance(model, str): assert find_asset(model), (path.name, model)


MATRICES, REST = parameters(LLAMA)
FULL, LORA = MATRICES + REST, adapter_parameters(LLAMA, 16)
HIDDEN, WORDS = LLAMA["hidden_size"], LLAMA["vocab_size"]
KV, MIDDLE = HIDDEN // 4, LLAMA["intermediate_size"]
CHAT = {a.name for a in ASSETS.values() if a.role == "chat"}
SPELT = "no one two three four five six seven eight nine ten eleven twelve".split()
COMPUTED = [   # lesson, and the words that stand in it, with what code computes
    ("week1/01_environment", f"vocabulary of {WORDS:,} tokens"),
    ("week1/01_environment", f"or {2 * 2 * WORDS * HIDDEN / 1e9:.1f} GB"),
    ("week1/01_environment", f"4,096 tokens cost it {kv_bytes(LLAMA2_13B, 4096) / GIB:.1f} GiB"),
    ("week1/01_environment", f"where Llama-3.1-8B pays {kv_bytes(LLAMA, 4096) / GIB:.1f}."),
    ("week1/02_vram", f"together {(2 * HIDDEN**2 + 2 * HIDDEN * KV) / 1e6:.1f} million"),
    ("week1/02_vram", f"4,096 × 14,336 each, {3 * HIDDEN * MIDDLE / 1e6:.1f} million"),
    ("week1/02_vram", f"make a table of {2048 * WORDS / 1e6:.0f} million numbers"),
    ("week1/02_vram", f"numbers: {2048 * WORDS * 2 / GIB:.1f} GiB in 16 bits"),
    ("week1/02_vram", f"Training all of an 8B model would need {16 * FULL / GIB:.0f} GiB"),
    ("week1/03_hello_llm_more", f"0.8 of 12,282 MiB are {0.8 * CARD:.1f} GiB"),
    ("week1/03_hello_llm", f"another of {SPELT[len(CHAT) - 1]} by changing one word"),
    ("week1/05_rag_better_more", f"30,000 × 384 × 4 bytes are {30_000 * 384 * 4 / 2**20:.0f} MiB"),
    ("week2/01_instruction_data", f"costs {2048 * WORDS * 2 / GIB:.1f} GiB at 2,048 tokens"),
    ("week2/02_qlora", f"Frozen weights of {weight_bytes(LLAMA, True) / GIB:.1f} GiB"),
    ("week2/02_qlora", f"{2 * 2 * WORDS * HIDDEN / GIB:.0f} GiB more for embedding and head"),
    ("week2/02_qlora", f"times 14 bytes are {2048 * WORDS * 14 / GIB:.1f} GiB"),
    ("week2/02_qlora", f"{adapter_parameters(SMOL, 16) / 1e6:.1f} million numbers"),
    ("week2/02_qlora", f"{LORA / 1e6:.1f} million, one for every {FULL / LORA:.0f}"),
    ("clinic/01_scale_out", f"{16 * 7.5e9 / 1e9:.0f} GB for 7.5 billion parameters"),
]

@pytest.mark.parametrize("lesson, words", COMPUTED, ids=lambda v: v[:50])
def test_prose_says_what_is_computed(lesson, words): assert words in prose(lesson)


def test_the_models_that_one_word_chooses():
    "The list that the lesson prints."
    text = prose("week1/03_hello_llm")
    listed = text.partition("takes any of these words: ")[2].partition(". Another model of")[0]
    assert set(re.findall(r"`([\w.-]+)`", listed)) == CHAT


def test_adapters_fit_their_limit_by_a_tenth():
    "The file of an adapter is two bytes a trained number; the lesson's limit leaves little room."
    for column, config in ((0, SMOL), (1, LLAMA)):
        cfg = settings(ROOT/"nbs/week2/02_qlora.ipynb", column)
        mb = 2 * adapter_parameters(config, cfg["lora_r"]) / 1e6
        assert mb < cfg["adapter_mb"] < 1.25 * mb


def test_the_pairs_of_the_small_tier():
    cfg = settings(ROOT/"nbs/week2/02_qlora.ipynb", 0)
    pairs = read_pairs(course_data(cfg["lines"], cfg["dev_share"],
                                   rehearsals=cfg["rehearsals"])/"train.jsonl")[0]
    ordinary = sum(p["source"] != "log" for p in pairs)
    read = cfg["max_steps"] * cfg["per_device_train_batch_size"]
    text = prose("week2/02_qlora")
    assert f"{len(pairs)} pairs of the" in text
    of = SPELT[cfg["per_device_train_batch_size"]]
    assert f"{cfg['max_steps']} steps of {of} read {read}" in text
    assert (f"{ordinary} of the {len(pairs)} pairs are ordinary questions: about "
            f"{read * ordinary / len(pairs):.0f} of the {read}") in text


@pytest.mark.slow
def test_qlora_in_the_table_of_the_first_lesson():
    guide = Plan("llama-3.1-8b-instruct", task="qlora", seq=2048, batch=1, vram=12, lora_r=16,
                 gradient_checkpointing=True, lora_dropout=0.05)
    new = predict(replace(guide, recipe="trl", optim="paged_adamw_8bit"))
    old = predict(replace(guide, recipe="kbit", optim="adamw_torch"))
    said = [f"{p.peak_allocated_mib / 1024:.1f}" for p in (new, old)]
    assert f"{said[0]} GiB on TRL's path; {said[1]} by the old recipe" in prose(
        "week1/01_environment")
