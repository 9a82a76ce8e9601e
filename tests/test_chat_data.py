"""Rows in every dialect: read rightly, or refused with their line and a reason."""
from __future__ import annotations

import codecs, json, math, random

import pytest
from hypothesis import assume, given, settings, strategies as st

from mlcourse.chat_data import (DataError, Rejected, as_chat, check_messages, iter_pairs,
                                read_pairs, write_jsonl)

ASK, REPLY = dict(role="user", content="Sort: b a"), dict(role="assistant", content="a b")
PAIR = [ASK, REPLY]
RULE = dict(role="system", content="Be brief.")


def turns(*said): return [{"from": who, "value": text} for who, text in said]


HUMAN, GPT = ("human", "Sort: b a"), ("gpt", "a b")
READ = {   # a row of each dialect, and its messages
    "openai": (dict(messages=PAIR), PAIR),
    "developer": (dict(messages=[{**RULE, "role": "developer"}, *PAIR]), [RULE, *PAIR]),
    "parts": (dict(messages=[{**ASK, "content": [dict(type="text", text="Sort: "),
                                                 dict(type="text", text="b a")]}, REPLY]), PAIR),
    "names": (dict(messages=[{**ASK, "name": "ana@example.org"}, {**REPLY, "metadata": {"x": 1}}]),
              PAIR),
    "null tools": (dict(messages=[ASK, {**REPLY, "tool_calls": None}], tools=[]), PAIR),
    "weights": (dict(messages=[ASK, {**REPLY, "weight": 0}, ASK, {**REPLY, "weight": 1}]),
                [ASK, {**REPLY, "weight": 0}, ASK, REPLY]),
    "train": (dict(conversations=turns(HUMAN, GPT)[:1] + [{**turns(GPT)[0], "train": False}]
                   + turns(HUMAN, GPT)), [ASK, {**REPLY, "weight": 0}, ASK, REPLY]),
    "training": (dict(messages=[ASK, {**REPLY, "training": False}, ASK, REPLY]),
                 [ASK, {**REPLY, "weight": 0}, ASK, REPLY]),
    "loss": (dict(messages=[ASK, {**REPLY, "loss": False}, ASK, {**REPLY, "loss": True}]),
             [ASK, {**REPLY, "weight": 0}, ASK, REPLY]),
    "empty messages": (dict(messages=[], conversations=turns(HUMAN, GPT)), PAIR),
    "the same twice": (dict(messages=PAIR, prompt="Sort: b a", response="a b"), PAIR),
    "empty system": (dict(messages=[{**RULE, "content": ""}, *PAIR]), PAIR),
    "null system": (dict(messages=[{**RULE, "content": None}, *PAIR]), PAIR),
    "sharegpt": (dict(conversations=turns(HUMAN, GPT)), PAIR),
    "sharegpt system": (dict(conversations=turns(HUMAN, GPT), system="Be brief."), [RULE, *PAIR]),
    "sharegpt roles": (dict(conversations=PAIR), PAIR),
    "sharegpt capitals": (dict(conversations=turns(("User", ASK["content"]),
                                                   ("Assistant", "a b"))), PAIR),
    "alpaca": (dict(instruction="Sort: b a", output="a b"), PAIR),
    "alpaca input": (dict(instruction="Sort:", input="b a", output="a b"),
                     [{**ASK, "content": "Sort:\n\nb a"}, REPLY]),
    "alpaca nan": (dict(instruction="Sort: b a", input=math.nan, output="a b"), PAIR),
    "alpaca zero": (dict(instruction="Even?", input=0, output=False),
                    [{**ASK, "content": "Even?\n\n0"}, {**REPLY, "content": "false"}]),
    "alpaca system": (dict(instruction="Sort: b a", output="a b", system="Be brief."),
                      [RULE, *PAIR]),
    "alpaca history": (dict(instruction="Sort: b a", output="a b", history=[["Hi", "Ho"]]),
                       [dict(role="user", content="Hi"), dict(role="assistant", content="Ho"),
                        *PAIR]),
    "dolly": (dict(instruction="Sort:", context="b a", response="a b", category="x"),
              [{**ASK, "content": "Sort:\n\nb a"}, REPLY]),
    "orca": (dict(system_prompt="Be brief.", question="Sort: b a", response="a b"), [RULE, *PAIR]),
    "trl": (dict(prompt="Sort: b a", completion="a b"), PAIR),
    "trl chat": (dict(prompt=[ASK, REPLY, ASK], completion=[REPLY]),
                 [ASK, {**REPLY, "weight": 0}, ASK, REPLY]),
    "kto good": (dict(prompt="Sort: b a", completion="a b", label=True), PAIR),
    "union": (dict(messages=None, conversations=None, instruction="Sort: b a", input=None,
                   output="a b", source=None, entities=None, system=None), PAIR)}
REFUSED = {
    "neither": dict(text="hello"), "no messages": dict(messages=[]),
    "not a list": dict(conversations="hi"), "empty": dict(instruction="Sort", output=""),
    "of kind list": dict(instruction="Sort", input=["b"], output="b"),
    "tools": dict(conversations=turns(HUMAN, GPT), tools="[{}]"),
    "tool_calls": dict(messages=[ASK, {**REPLY, "tool_calls": [{"id": 1}]}]),
    "function_call": dict(messages=[ASK, {**REPLY, "function_call": {"name": "f"}}]),
    "images": dict(messages=PAIR, images=["a.png"]),
    "chosen": dict(prompt="Sort", chosen="a", rejected="b"),
    "bad answer": dict(prompt="Sort", completion="b", label=False),
    "bad answer, as a number": dict(prompt="Sort", completion="b", label=0),
    "bad answer, as text": dict(prompt="Sort", completion="b", label="False"),
    "rejected_response": dict(query="Sort", response="a", rejected_response="b"),
    "train_detail": dict(messages=[ASK, {**REPLY, "train_detail": [dict(train=False)]}]),
    "reasoning": dict(messages=[ASK, {**REPLY, "reasoning": "a before b"}]),
    "choices": dict(question="Which?", choices=["a", "b"], answer=1),
    "both messages and conversations": dict(messages=PAIR, conversations=turns(HUMAN, GPT)),
    "different answers": dict(messages=PAIR, instruction="Sort", output="b"),
    "message 1 is empty": dict(messages=[{**ASK, "content": "\u00a0\u200b"}, REPLY]),
    "weight 0": dict(messages=[ASK, {**REPLY, "weight": 0}]),
    "neither 0 nor 1": dict(messages=[ASK, {**REPLY, "weight": 0.5}]),
    "two system": dict(messages=[RULE, *PAIR], system="Be long."),
    "history": dict(instruction="Sort", output="b", history=["Hi"]),
    "list of names": dict(messages=PAIR, entities=[dict(start=1, end=2)]),
    "half a character": dict(messages=[{**ASK, "content": "\ud800"}, REPLY]),
    "should be of role user": dict(messages=[REPLY]), "nothing to learn": dict(messages=[ASK]),
    "has no text": dict(messages=[ASK, {**REPLY, "content": None}])}


@pytest.mark.parametrize("row, messages", READ.values(), ids=READ)
def test_read(row, messages): assert as_chat(row)["messages"] == messages


@pytest.mark.parametrize("why, row", REFUSED.items(), ids=REFUSED)
def test_refused(why, row):
    with pytest.raises(DataError, match=why.partition(", as")[0]): as_chat(row)


@pytest.mark.parametrize("entities", [5, [0], "otter", [dict(start=1)], [None]])
def test_entities_of_another_kind(entities):
    row = dict(messages=PAIR, entities=entities)
    with pytest.raises(DataError, match="list of names"): as_chat(row)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), max_leaves=8,
    extend=lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3))
keys = ("messages conversations instruction input output source entities system history prompt "
        "completion tools label weight").split()


@given(st.dictionaries(st.sampled_from(keys), values))
@settings(max_examples=300, deadline=None)
def test_any_row_is_read_or_refused_with_a_reason(row):
    try: found = as_chat(row)
    except DataError as e: assert str(e)
    else:
        assert check_messages(found["messages"]) == found["messages"]
        json.dumps(found, ensure_ascii=False).encode()


@given(st.lists(st.dictionaries(st.sampled_from("role content from value weight name".split()),
                                values | st.sampled_from(["user", "assistant", "system", "gpt"])),
                max_size=5))
@settings(max_examples=300, deadline=None)
def test_any_turns_are_read_or_refused_with_a_reason(messages):
    try: found = check_messages(messages)
    except DataError as e: assert str(e)
    else: assert found[-1]["role"] == "assistant"


@given(st.lists(st.binary(max_size=40), max_size=12))
@settings(max_examples=100, deadline=None)
def test_no_line_is_lost(tmp_path_factory, lines):
    raw = b"\n".join(l.replace(b"\n", b"") for l in lines)
    marks = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
    assume(not raw.startswith(marks) and not raw.lstrip().startswith(b"["))   # other lines, then
    file = tmp_path_factory.mktemp("lines")/"data.jsonl"
    file.write_bytes(raw)
    wanted = [n for n, l in enumerate(file.read_bytes().split(b"\n"), 1) if l.strip()]
    assert [r.line for r in iter_pairs(file) if isinstance(r, Rejected)] == wanted


def mutate(rng, line):
    "A line as an editor, a cut connection or a foreign program leaves it."
    i = rng.randrange(len(line))
    return rng.choice([
        line[:i], line[:i] + bytes([rng.randrange(256)]) + line[i + 1:], line[:i] + line[i + 1:],
        b"[" * rng.choice([1, 100_000]) + line, line.replace(b'"user"', b'"\\ud800"'),
        line.replace(b'"content"', b'"text"'), line.replace(b"otter", b"\xff\xfe"),
        line.replace(b'"otter"', b"[" * 5000 + b"]" * 5000), b"9" * 5000, b"NaN", b"{}", b"null",
        line.replace(b"07:15", b"\\u0000"), line.decode().encode("utf-16"), line + line])


def test_two_thousand_damaged_lines_cost_no_good_one(tmp_path):
    rng, good, lines = random.Random(0), [], []
    for i in range(2000):
        row = dict(messages=[{**ASK, "content": f"{i} 07:15 otter"}, REPLY], entities=["otter"])
        line = json.dumps(row).encode()
        if i % 2: good.append(row["messages"][0]["content"])
        lines.append(line if i % 2 else mutate(rng, line).replace(b"\n", b""))
    (tmp_path/"fuzz.jsonl").write_bytes(b"\n".join(lines))
    read, bad = read_pairs(tmp_path/"fuzz.jsonl")
    asked = [row["messages"][0]["content"] for row in read]
    assert set(good) <= set(asked) and len(read) + len(bad) <= 2000
    assert len((tmp_path/"fuzz.rejected.jsonl").read_text().splitlines()) == len(bad)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_encodings(tmp_path, encoding, end):
    text = end.join(json.dumps(dict(messages=PAIR, source="Tür 门"), ensure_ascii=False)
                    for _ in range(3))
    if encoding == "utf-16-le": text = "\ufeff" + text
    (tmp_path/"a.jsonl").write_bytes(text.encode(encoding))
    rows, bad = read_pairs(tmp_path/"a.jsonl")
    assert [r["source"] for r in rows] == ["Tür 门"] * 3 and not bad


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_read_and_its_bad_items_named(tmp_path, indent):
    rows = [dict(messages=PAIR), dict(text="?"), dict(messages=PAIR)]
    (tmp_path/"a.json").write_text("\ufeff" + json.dumps(rows, indent=indent))
    read, bad = read_pairs(tmp_path/"a.json")
    line = 1 + json.dumps(rows, indent=indent).split('"text"')[0].count("\n")
    assert len(read) == 2 and [b.line for b in bad] == [line - (1 if indent else 0)]


def test_a_folder_that_takes_no_files_stops_nothing(tmp_path, monkeypatch):
    def full(*_): raise OSError(30, "read-only")
    write_jsonl(tmp_path/"a.jsonl", [dict(messages=PAIR), dict(text="?")])
    monkeypatch.setattr("mlcourse.chat_data.write_atomic", full)
    assert [len(x) for x in read_pairs(tmp_path/"a.jsonl")] == [1, 1]


def test_the_file_itself_is_never_overwritten(tmp_path):
    write_jsonl(tmp_path/"a.jsonl", [dict(messages=PAIR), dict(text="?")])
    before = (tmp_path/"a.jsonl").read_bytes()
    with pytest.raises(DataError, match="overwritten"):
        read_pairs(tmp_path/"a.jsonl", tmp_path/"a.jsonl")
    assert (tmp_path/"a.jsonl").read_bytes() == before
