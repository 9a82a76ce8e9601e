"""The question set of the RAG lessons."""
from mlcourse.notes import ingest
from mlcourse.rag import course_notes, gold_ids, load_questions


def test_every_gold_quote_is_in_one_chunk():
    questions = load_questions()
    notes = {size: ingest(course_notes(), size) for size in (250, 500, 1000)}
    answered = [q for q in questions if q.gold]
    assert len(answered) >= 80 and len(questions) - len(answered) >= 15
    assert len({q.question for q in questions}) == len(questions)
    assert sum(q.kind == "code" for q in questions) >= 10
    for size, chunks in notes.items():
        for q in answered:
            assert len(gold_ids(q, chunks)) in range(1, len(q.gold) + 1), (size, q.id)
    assert all(q.references for q in answered)
