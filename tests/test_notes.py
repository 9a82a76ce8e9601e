"""Reading and cutting: links, any bytes, any text."""
import json
import os
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from mlcourse.notes import chunk_file, decode_named, ingest, length, read_folder
from mlcourse.search import Store
from test_search import Letters


def test_links_do_not_leave_the_folder(tmp_path):
    notes = tmp_path / "notes"
    notes.mkdir()
    for name in "abc": (notes / f"{name}.md").write_text(f"# {name}\n")
    (tmp_path / "secret.md").write_text("secret")
    (notes / "link.md").symlink_to(tmp_path / "secret.md")
    (notes / "loop").symlink_to(notes)
    texts, left_out = read_folder(notes)
    assert sorted(texts) == ["a.md", "b.md", "c.md"]
    assert left_out == {"link.md": "a link", "loop": "a link"}


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_can_be_read(raw):
    text, _ = decode_named(raw)
    assert text is None or "\r" not in text


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=400), st.sampled_from(["a.md", "a.py", "a.txt", "a.ipynb", "Makefile"]))
def test_any_text_can_be_chunked(text, name):
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    for c in chunk_file(text, name, 50): assert 1 <= c.start <= c.end <= text.count("\n") + 1


HALF = json.dumps(dict(cells=[dict(cell_type="markdown", source="Ship it \ud83d tomorrow.")]))
OLD = json.dumps(dict(nbformat=3, worksheets=[dict(cells=[
    dict(cell_type="heading", level=2, source=["The server"]),
    dict(cell_type="code", input="port = 8443", outputs=[dict(png="iVBORw0KGgo" * 90)])])]))
BAD = {"half.ipynb": HALF, "old.ipynb": OLD, "cut.ipynb": OLD[:-40], "no.ipynb": "[1, 2]",
       "deep.ipynb": "[" * 100_000}


def test_one_bad_note_ends_nothing(tmp_path):
    for name, text in {**BAD, "good.md": "# Good\n\nFine."}.items():
        (tmp_path / name).write_text(text)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + "笔记.md".encode("gbk"))).write_text("lost?")
    texts, left_out = read_folder(tmp_path)
    assert set(texts) == {"half.ipynb", "old.ipynb", "good.md"}
    assert len(left_out) == 4 and "rename it" in left_out["\ufffdʼ\ufffd.md"]
    chunks = ingest(tmp_path)
    for c in chunks: (c.id + c.indexed).encode()
    said = "\n".join(c.text for c in chunks)
    assert "port = 8443" in said and "## The server" in said and "iVBOR" not in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_is_closed_is_listed(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    assert "closed" in read_folder(tmp_path)[1]


@pytest.mark.parametrize("name, line", [("t.txt", "So it went on, word by word. " * 9_000),
                                        ("日记.txt", "今天下雨，我们没有出门。" * 2_000),
                                        ("map.py", "x=" + "[1,2,3]+" * 20_000 + "[]"),
                                        ("b.md", "```\n" + "A" * 90_000 + "\n```")])
def test_no_passage_is_without_a_bound(name, line):
    chunks = chunk_file(line + "\n\nThe end.", name, 800)
    assert max(length(c.text) for c in chunks) <= 4 * 800
    kept = "".join("".join(c.text for c in chunks).split())
    assert kept == "".join((line + "The end.").split())


def test_a_picture_within_a_text_is_not_indexed(tmp_path):
    "And the page behind a citation has the same lines."
    from mlcourse.notes_page import source_page
    picture = f"![a mill](data:image/png;base64,{'iVBORw0KGgo' * 900}) beside it"
    (tmp_path / "a.md").write_text(f"# Mill\n\n{picture}\n\nIt has five sails.")
    cells = [dict(cell_type="markdown", source=f"# Mill\n\n{picture}"),
             dict(cell_type="code", source="sails = 5")]
    (tmp_path / "b.ipynb").write_text(json.dumps(dict(cells=cells), indent=1))
    chunks = ingest(tmp_path)
    assert len(chunks) == 2 and not any("iVBOR" in c.text for c in chunks)
    for c, fact in zip(chunks, ("five sails", "sails = 5")):
        assert fact in c.text and "iVBOR" not in source_page(tmp_path, c.path)
        lines = source_page(tmp_path, c.path, c.start, c.end).split("<mark>")[1:]
        assert any(fact in line for line in lines)


def test_many_lines_of_output_are_no_delay():
    code = [f"x{i} = {i}\n" for i in range(2_000)]
    cells = [dict(cell_type="code", source=code, outputs=[dict(text=["\n", "0\n"] * 30_000)])]
    chunks = chunk_file(json.dumps(dict(cells=cells), indent=1), "a.ipynb", 800)
    spans = [(c.start, c.end) for c in chunks]
    assert spans == sorted(spans) and spans[0][0] < 10 and spans[-1][1] < 2_020


def make_pdf(path, pages):
    from reportlab.pdfbase import pdfmetrics
    from reportlab.pdfbase.cidfonts import UnicodeCIDFont
    from reportlab.pdfgen.canvas import Canvas
    pdfmetrics.registerFont(UnicodeCIDFont("STSong-Light"))
    pdf = Canvas(str(path))
    for page in pages:
        pdf.setFont("STSong-Light", 12)
        for i, line in enumerate(page.split("\n")): pdf.drawString(72, 760 - 16 * i, line)
        pdf.showPage()
    pdf.save()


def test_documents_are_notes(tmp_path):
    from docx import Document
    make_pdf(tmp_path / "report.pdf", ["The mill.\n# of sails: five.", "灯塔高三十一米。"])
    make_pdf(tmp_path / "scan.pdf", [""])
    (tmp_path / "cut.pdf").write_bytes((tmp_path / "report.pdf").read_bytes()[:200])
    (tmp_path / "page.html").write_text(
        "<html><style>p {}</style><h1>Boats</h1><p>The ferry is <b>blue</b>.</p>"
        "<img src='data:image/png;base64,iVBORw0KGgo'><script>alert(1)</script></html>")
    word = Document()
    word.add_heading("Bread", 1)
    word.add_paragraph("The oven is at 240 degrees.")
    word.save(tmp_path / "recipe.docx")
    (tmp_path / "cut.docx").write_bytes((tmp_path / "recipe.docx").read_bytes()[:9_000])
    texts, left_out = read_folder(tmp_path)
    assert set(texts) == {"report.pdf", "page.html", "recipe.docx"}, left_out
    assert left_out.keys() == {"scan.pdf", "cut.pdf", "cut.docx"} and "scan" in left_out["scan.pdf"]
    chunks = ingest(tmp_path)
    found = {c.path: c for c in chunks}
    cited = [(c.where, "灯塔高三十一米" in c.text) for c in chunks if c.path == "report.pdf"]
    assert cited == [("page 1", False), ("page 2", True)]
    assert found["page.html"].heading == "Boats" and "ferry is **blue**" in found["page.html"].text
    assert found["recipe.docx"].heading == "Bread" and "240" in found["recipe.docx"].text
    said = "".join(texts.values())
    assert "iVBOR" not in said and "alert" not in said


@pytest.mark.parametrize("name", ["a.pdf", "a.docx"])
def test_without_the_libraries_the_command_is_named(name, tmp_path, monkeypatch):
    for module in ("pypdf", "markitdown"): monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_text("something")
    assert "mlcourse[documents]" in read_folder(tmp_path)[1][name]


SEEDS = {"a.md": "# A\n\nText, 文字, текст.\n\n| a |\n|---|\n\n```py\nx = 1\n```\n".encode(),
         "b.py": b'import os\n\nclass A:\n    "Says."\n    def f(self): return {1: [2]}\n',
         "c.txt": "Übung macht den Meister.\r\nZeile.\f\u2028".encode("utf-16"),
         "d.ipynb": json.dumps(dict(nbformat=4, cells=[
             dict(cell_type="markdown", source=["# B\n", "Prose \U0001f600."], metadata={}),
             dict(cell_type="code", source="1 + 1", outputs=[])])).encode(),
         "e.toml": b'[a]\nb = "c"\n', "日记.md": "今天下雨。".encode("gb18030"),
         "old.ipynb": OLD.encode()}


def mutated(r, raw: bytes) -> bytes:
    "Bytes changed, cut, doubled, or others put among them."
    raw = bytearray(raw)
    for _ in range(r.randrange(1, 6)):
        at = r.randrange(len(raw) + 1)
        match r.randrange(5):
            case 0: raw[at:at + 1] = bytes([r.randrange(256)])
            case 1: del raw[at:at + r.randrange(30)]
            case 2: raw[at:at] = raw[:at][-40:] * r.randrange(4)
            case 3: raw[at:at] = r.choice([b"\xff", b"\\ud83d", b"null", b"```", b"\r", b"---\n",
                                           b"# ", b"[[", b"\x00", b'"""', "，".encode(), b"<|x|>"])
            case 4: raw[at:] = b""
    return bytes(raw)


@pytest.mark.slow
def test_five_hundred_damaged_folders_lose_no_good_note(tmp_path):
    r, retained = random.Random(1), 0
    for case in range(500):
        notes = tmp_path / str(case)
        notes.mkdir()
        for name in r.sample(list(SEEDS), 4): (notes / name).write_bytes(mutated(r, SEEDS[name]))
        (notes / "good.md").write_text(f"# Good\n\nNumber {case} is fine.")
        texts, left_out = read_folder(notes)
        assert len(texts) + len([n for n in left_out if n not in texts]) == 5
        store = Store(tmp_path / "store", Letters(), 60)
        store.update(notes)
        chunks, vectors = store.read()
        assert f"# Good\n\nNumber {case} is fine." in [c.text for c in chunks]
        for c in chunks:
            lines = texts[c.path].count("\n") + 1
            assert 1 <= c.start <= c.end <= lines and c.indexed.encode()
        retained += len({c.path for c in chunks})
    assert retained > 1500   # most damaged notes are read all the same
