"""What the lesson cannot test: made-up data of every kind, and 50,000 pairs in a process."""
import json, subprocess, sys

import pytest
from hypothesis import given, settings, strategies as st
from mlcourse.instruct import (DataError, Rejected, as_chat, course_data, from_logs, iter_pairs,
                               jaccard, leaks, make_logs, parse_record, prepare, read_pairs, scrub,
                               shingles, write_jsonl)

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), max_leaves=8,
    extend=lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3))
keys = "messages conversations instruction input output source entities system".split()
rows = st.dictionaries(st.sampled_from(keys), values)


@given(rows)
@settings(max_examples=300, deadline=None)
def test_any_row_is_read_or_refused_with_a_reason(row):
    try: found = as_chat(row)
    except DataError as e: assert str(e)
    else:
        assert found["messages"][-1]["role"] == "assistant"
        assert all(m["content"].strip() for m in found["messages"])


@given(st.lists(st.binary(max_size=40), max_size=12))
@settings(max_examples=100, deadline=None)
def test_no_line_is_lost(tmp_path_factory, lines):
    file = tmp_path_factory.mktemp("lines")/"data.jsonl"
    file.write_bytes(b"\n".join(l.replace(b"\n", b"") for l in lines))
    wanted = [n for n, l in enumerate(file.read_bytes().split(b"\n"), 1) if l.strip()]
    assert [r.line for r in iter_pairs(file) if isinstance(r, Rejected)] == wanted


@given(st.text(max_size=200))
@settings(deadline=None)
def test_scrubbing_twice_changes_nothing_more(text):
    once, _ = scrub(text)
    assert scrub(once) == (once, {})


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
    assert len(dev) >= 32 and len(train) >= 200 and not list(leaks(train, dev))
    again = read_pairs(course_data(rehearsals=3)/"train.jsonl")[0]
    def ordinary(pairs):
        return [p["messages"][0]["content"] for p in pairs if p["source"] == "general"]
    assert sorted(ordinary(again)) == sorted(3 * ordinary(train))
    assert len(again) == len(train) + 2 * len(ordinary(train))


def test_the_same_raw_file_gives_the_same_set(tmp_path):
    write_jsonl(tmp_path/"raw.jsonl", from_logs(make_logs(300))[0])
    cards = []
    for name in ("a", "b"):
        prepare(tmp_path/"raw.jsonl", tmp_path/name, 0.3)
        cards.append(json.loads((tmp_path/name/"card.json").read_text())["sha256"])
    assert cards[0] == cards[1]


def test_nothing_usable_is_a_sentence(tmp_path):
    (tmp_path/"raw.jsonl").write_text("{broken\n[1]\n")
    with pytest.raises(DataError, match="Nothing is left to train on"):
        prepare(tmp_path/"raw.jsonl", tmp_path/"out")
    assert len((tmp_path/"out"/"rejected.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_fifty_thousand_pairs_in_less_than_a_gigabyte(tmp_path):
    write_jsonl(tmp_path/"raw.jsonl", from_logs(make_logs(52_000, fleet=60))[0][:50_000])
    code = ("import os, sys\nfrom mlcourse.instruct import prepare\n"
            "from mlcourse.record import high_water\n"
            "r = prepare(*sys.argv[1:])\n"
            "parts = r.rejected + r.exact + r.near + r.torn + r.leaked + r.train + r.dev\n"
            "print(r.read, parts, high_water(os.getpid()) // 2**20)")
    command = [sys.executable, "-c", code, str(tmp_path/"raw.jsonl"), str(tmp_path/"out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    read, accounted, peak_mib = map(int, done.stdout.split())
    assert read == accounted == 50_000 and peak_mib < 1000
