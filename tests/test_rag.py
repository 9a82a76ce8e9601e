"""The question set of the RAG lesson."""
import json
from importlib.resources import files

from mlcourse.notes import ingest
from mlcourse.rag import gold_ids, island_notes, load_questions

DATA = files("mlcourse") / "data/rag"


def test_every_gold_quote_is_in_one_chunk():
    questions = load_questions()
    notes = {size: ingest(island_notes(), size) for size in (250, 400, 800)}
    answered = [q for q in questions if q.gold]
    assert len(answered) >= 60 and len(questions) - len(answered) >= 20
    assert len({q.question for q in questions}) == len(questions)
    for kind, least in dict(code=4, table=5, hans=8, hant=8).items():
        assert sum(q.kind == kind for q in questions) >= least
    for size, chunks in notes.items():
        for q in answered: assert len(gold_ids(q, chunks)) == 1, (size, q.id)
    assert all(q.references for q in answered)


def test_a_quote_occurs_once_in_all_notes():
    texts = {p.relative_to(island_notes()).as_posix(): p.read_text(encoding="utf-8")
             for p in island_notes().rglob("*") if p.is_file()}
    for q in load_questions():
        for path, quote in q.gold:
            everywhere = sum(t.count(quote) for t in texts.values())
            assert everywhere == texts[path].count(quote) == 1, q.id


def test_the_drafts_that_were_read_are_those_of_the_english_test_half():
    read = [json.loads(line) for line in (DATA / "read_by_hand.jsonl").open(encoding="utf-8")]
    english = [q for q in load_questions()
               if q.kind in ("prose", "table", "code") and int(q.id[1:]) % 2 == 0]
    assert [r["id"] for r in read] == [q.id for q in english]
    assert {r["refused_by"] for r in read} == {"", "gate", "check"}
    assert all(isinstance(r["right"], bool) and r["draft"] for r in read)
