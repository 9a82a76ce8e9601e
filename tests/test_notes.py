"""Reading and cutting: links, any bytes, any text."""
from hypothesis import given, settings, strategies as st
from mlcourse.notes import chunk_file, decode, read_folder


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
    text = decode(raw)
    assert text is None or "\r" not in text


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=400), st.sampled_from(["a.md", "a.py", "a.txt", "a.ipynb", "Makefile"]))
def test_any_text_can_be_chunked(text, name):
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    for c in chunk_file(text, name, 50): assert 1 <= c.start <= c.end <= text.count("\n") + 1
