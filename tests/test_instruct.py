"""What the lesson cannot test: made-up data of every kind, and 50,000 pairs in a process."""
import json, random, subprocess, sys, time

import pytest
from hypothesis import given, settings, strategies as st
from mlcourse.chat_data import DataError, read_pairs, write_jsonl
from mlcourse.instruct import (course_data, encode_pair, from_logs, make_logs, pair, parse_record,
                               prepare)
from mlcourse.training_set import Seen, jaccard, leaks, shingles

@given(st.text(max_size=80), st.text(max_size=80))
@settings(deadline=None)
def test_similarity_is_a_similarity(a, b):
    x, y = shingles(a), shingles(b)
    assert jaccard(x, x) == 1 and jaccard(x, y) == jaccard(y, x) and 0 <= jaccard(x, y) <= 1


def test_every_known_line_is_read_and_every_label_is_a_record():
    pairs, strays = from_logs(make_logs(3000, seed=7, fleet=5))
    assert len(pairs) + len(strays) == 3000 and 0 < len(strays) < 300
    assert all(parse_record(p["messages"][-1]["content"]) for p in pairs)


def test_the_course_data_has_an_honest_dev_set():
    train, dev = (read_pairs(course_data()/f"{n}.jsonl")[0] for n in ("train", "dev"))
    assert len(dev) >= 32 and len(train) >= 200 and not list(leaks(train, dev, numbers=False))
    again = read_pairs(course_data(rehearsals=3)/"train.jsonl")[0]
    def ordinary(pairs):
        return [p["messages"][0]["content"] for p in pairs if p["source"] == "general"]
    assert sorted(ordinary(again)) == sorted(3 * ordinary(train))
    assert len(again) == len(train) + 2 * len(ordinary(train))


def test_the_same_raw_file_gives_the_same_set(tmp_path):
    write_jsonl(tmp_path/"raw.jsonl", from_logs(make_logs(300))[0])
    cards = []
    for name in ("a", "b"):
        prepare(tmp_path/"raw.jsonl", tmp_path/name, 0.3, numbers=False)
        cards.append(json.loads((tmp_path/name/"card.json").read_text())["sha256"])
    assert cards[0] == cards[1]


def test_nothing_usable_is_a_sentence(tmp_path):
    (tmp_path/"raw.jsonl").write_text("{broken\n[1]\n")
    with pytest.raises(DataError, match="Nothing is left to train on"):
        prepare(tmp_path/"raw.jsonl", tmp_path/"out")
    assert len((tmp_path/"out"/"rejected.jsonl").read_text().splitlines()) == 2


WORDS = "amber basil cedar delta ember fjord grove harbor ivory jasper kelp linen maple".split()


def prepared(tmp_path, rows, **options):
    "The report, and the rows of train and dev."
    write_jsonl(tmp_path/"raw.jsonl", rows)
    report = prepare(tmp_path/"raw.jsonl", tmp_path/"out", **options)
    names = ("train", "dev", "torn", "near", "exact", "leaked", "rejected")
    assert report.read == len(rows) == sum(getattr(report, name) for name in names)
    files = (tmp_path/"out"/f"{name}.jsonl" for name in ("train", "dev"))
    return report, [json.loads(line) for f in files for line in f.read_text().splitlines()]


@pytest.mark.parametrize("templates", [1, 2, 5])
@pytest.mark.parametrize("where", ["before", "behind"])
def test_what_many_rows_share_does_not_count(tmp_path, templates, where):
    rng = random.Random(templates)
    rules = [" ".join(rng.choices(WORDS, k=80)) for _ in range(templates)]
    rows = []
    for i in range(100):
        parts = [rules[i % templates], " ".join(rng.choices(WORDS, k=8))]
        label = rng.choice(["billing", "shipping", "returns"])
        rows.append(pair("\n".join(parts if where == "before" else parts[::-1]), label, "x"))
    report, _ = prepared(tmp_path, rows)
    assert report.train + report.dev >= 98


@pytest.mark.parametrize("asked", [
    "What is {a} times {b}?", "{a} * {b} = ?", "{a}乘以{b}等于多少？",
    "Ana has {a} baskets with {b} apples in each of them. How many apples are there in all?"])
def test_arithmetic_keeps_every_line(tmp_path, asked):
    rows = [pair(asked.format(a=a, b=b), str(a * b), "x") for a in range(1, 13)
            for b in range(1, 13)]
    report, kept = prepared(tmp_path, rows)
    assert len(kept) == 144 and report.near == report.leaked == 0


def test_signs_and_answers_tell_rows_apart(tmp_path):
    rows = [pair(f"Compute 2 {sign} 2, and say nothing else but the result", answer, "x")
            for sign, answer in (("+", "4"), ("-", "0"), ("*", "4"), ("/", "1"))]
    assert prepared(tmp_path, rows)[0].near == 0


@pytest.mark.parametrize("text, more", [
    ("Why does the backup of otter fail every night since the last update of the kernel", "?"),
    ("为什么自从上次更新内核以后水獭的备份每天晚上都会失败而其他机器没有问题", "呢"),
    ("Почему резервная копия не удаётся каждую ночь после последнего обновления ядра", " снова")])
def test_near_copies_are_found_in_any_script(tmp_path, text, more):
    rng = random.Random(0)
    other = [pair(" ".join(rng.choices(WORDS, k=9)), str(i), "x") for i in range(20)]
    report, _ = prepared(tmp_path, [pair(text, "Because.", "x"), pair(text + more, "Because.", "x"),
                                    pair(text + more, "No idea.", "x"), *other])
    assert report.near == 1


def test_a_great_loss_is_told_before_anything_is_written(tmp_path):
    rows = [pair(f"the same words over and over again, as often as one likes{'!' * i}", "Yes.", "x")
            for i in range(40)]
    rows += [pair(" ".join(WORDS[i:i + 9]), str(i), "x") for i in range(4)]
    with pytest.raises(DataError, match="nothing was written") as e: prepared(tmp_path, rows)
    told = [int(w) for w in str(e.value).split(". ")[0].replace(",", "").split() if w.isdigit()]
    assert told[0] == 44 == sum(told[1:]) and not (tmp_path/"out").exists()
    assert prepared(tmp_path, rows, max_loss=1.0)[0].near == 39


def test_just_below_the_threshold_is_not_quadratic():
    rng, seen, start = random.Random(0), Seen(), time.process_time()
    shared = " ".join(rng.choices(WORDS, k=60))
    for i in range(4000): seen.add(f"{shared} {' '.join(f'w{i}x{j}' for j in range(9))}", "Yes.")
    assert len(seen.sets) == 4000 and time.process_time() - start < 20


def test_nothing_personal_is_written(tmp_path):
    said = [dict(role="user", name="ana@corp.example", content="Where is my parcel?"),
            dict(role="assistant", content="On its way.", metadata=dict(ip="203.0.113.9"))]
    rows = [dict(messages=said, source="ticket of ana@corp.example", entities=["ana@corp.example"],
                 owner="ana@corp.example"),
            dict(messages=said[:1], text="ana@corp.example"), {"ana@corp.example": 1}]
    rows += [pair(" ".join(WORDS[i:i + 9]), f"Call +49 30 123456{i}.", "x") for i in range(4)]
    report, kept = prepared(tmp_path, rows)
    for file in (tmp_path/"out").iterdir():
        assert not any(bad in file.read_text() for bad in ("ana@", "corp", "203.0", "+49")), file
    entities = [row["entities"] for row in kept if row["source"].startswith("ticket")]
    assert entities == [["<EMAIL> 1"]] and report.scrubbed["PHONE"] == 4


@pytest.mark.parametrize("name", ["train.jsonl", "dev.jsonl", "rejected.jsonl", "linked.jsonl"])
def test_a_source_is_never_overwritten(tmp_path, name):
    write_jsonl(tmp_path/name, [pair(" ".join(WORDS[i:i + 9]), str(i), "x") for i in range(4)])
    if name == "linked.jsonl": (tmp_path/"train.jsonl").symlink_to(tmp_path/name)
    before = (tmp_path/name).read_bytes()
    with pytest.raises(DataError, match="Choose another folder"): prepare(tmp_path/name, tmp_path)
    assert (tmp_path/name).read_bytes() == before


def test_files_of_others_are_never_overwritten(tmp_path):
    (tmp_path/"README.md").write_text("mine")
    rows = [pair(" ".join(WORDS[i:i + 9]), str(i), "x") for i in range(4)]
    write_jsonl(tmp_path/"raw.jsonl", rows)
    with pytest.raises(DataError, match="README.md"): prepare(tmp_path/"raw.jsonl", tmp_path)
    for _ in range(2): prepare(tmp_path/"raw.jsonl", tmp_path/"out")   # its own may be renewed


REFUSES = ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
           "{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}"
           "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}")


def test_an_answer_of_weight_0_is_read_and_not_learned():
    from test_gguf import byte_tokenizer
    tok = byte_tokenizer()
    tok.chat_template = REFUSES
    said = [("system", "Sort."), ("user", "b a"), ("assistant", "b a"), ("user", "No."),
            ("assistant", "a b")]
    messages = [dict(role=role, content=content) for role, content in said]
    messages[2]["weight"] = 0
    found = encode_pair(tok, messages)
    learned = tok.decode([t for t in found["labels"] if t != -100])
    assert learned == "a b" + tok.eos_token
    assert "Sort." in tok.decode(found["input_ids"])   # the system text joined the first question


@pytest.mark.slow
def test_fifty_thousand_pairs_in_less_than_a_gigabyte(tmp_path):
    write_jsonl(tmp_path/"raw.jsonl", from_logs(make_logs(52_000, fleet=60))[0][:50_000])
    code = ("import os, sys\nfrom mlcourse.instruct import prepare\n"
            "from mlcourse.record import high_water\n"
            "r = prepare(*sys.argv[1:], numbers=False)\n"
            "parts = r.rejected + r.exact + r.near + r.torn + r.leaked + r.train + r.dev\n"
            "print(r.read, parts, high_water(os.getpid()) // 2**20)")
    command = [sys.executable, "-c", code, str(tmp_path/"raw.jsonl"), str(tmp_path/"out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    read, accounted, peak_mib = map(int, done.stdout.split())
    assert read == accounted == 50_000 and peak_mib < 1000
