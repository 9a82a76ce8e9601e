"""The store of mlcourse.search around real processes: killed in the middle, two writers at once."""
import os, shutil, signal, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
from mlcourse.files import CourseError, locked
from mlcourse.notes import NotesError, ingest
from mlcourse.search import Store, all_windows

ROOT = Path(__file__).resolve().parent.parent

class Letters:
    "An embedder that needs no model: how often each letter occurs."
    name, key, dim = "letters", "letters", 26
    def encode(self, texts):
        counts = [[t.lower().count(chr(97 + i)) + 1e-3 for i in range(26)] for t in texts]
        v = np.array(counts, np.float32).reshape(-1, 26)
        return v / np.linalg.norm(v, axis=1, keepdims=True)


CHILD = """
import os, shutil, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_search import Letters, Store
notes, folder, point = sys.argv[1:]
def die(*a, **kw): os.kill(os.getpid(), signal.SIGKILL)
def switching(before, after, replace=Path.replace):
    def f(path, target):
        if before and target.name == "current": die()
        replace(path, target)
        if after and target.name == "current": die()
    return f
if point == "embedding": Letters.encode = die
if point == "half of the vectors": os.fsync = die     # they lie beside their place, not yet in it
if point == "before the switch": Path.replace = switching(True, False)
if point == "after the switch": Path.replace = switching(False, True)
if point == "sweeping": shutil.rmtree = lambda p, **kw: os.path.exists(p) and die()
print(Store(folder, Letters()).update(notes).chunks)
""".format(tests=str(ROOT / "tests"))

def child(notes, folder, point="never"):
    return subprocess.Popen([sys.executable, "-c", CHILD, str(notes), str(folder), point],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.fixture
def notes(tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.md").write_text(f"# {name}\n\nThe first words of {name}.\n")
    return folder


def whole(store):
    "The texts of a store, after a check that each window has its own vector."
    chunks, vectors = store.read()
    assert np.allclose(vectors, Letters().encode(all_windows(chunks)), atol=1e-6)
    return sorted(c.text for c in chunks)


@pytest.mark.parametrize("point", ["embedding", "half of the vectors", "before the switch",
                                   "after the switch", "sweeping"])
def test_kill_9_leaves_the_store_whole(tmp_path, notes, point):
    store = Store(tmp_path / "store", Letters())
    store.update(notes)
    (notes / "a.md").write_text("# a\n\nChanged once.\n")
    store.update(notes)
    old = whole(store)
    (notes / "a.md").write_text("# a\n\nOther words.\n")
    (notes / "d.md").write_text("# d\n\nA new one.\n")
    p = child(notes, store.folder, point)
    p.communicate(timeout=120)
    assert p.returncode == -signal.SIGKILL
    new = sorted(c.text for c in ingest(notes))
    assert whole(store) == (new if point in ("after the switch", "sweeping") else old)
    done = store.update(notes)   # the lock died with its holder, and what was left does no harm
    assert whole(store) == new and done.chunks == len(new)
    store.update(notes)
    assert len(list(store.folder.glob("gen-*"))) <= 3


def test_two_processes(tmp_path, notes):
    for i in range(40):
        (notes / f"n{i:02d}.md").write_text(f"# {i}\n\n" + "words and words " * (i + 1))
    writers = [child(notes, tmp_path / "store") for _ in range(2)]
    said = [p.communicate(timeout=120) for p in writers]
    assert [p.returncode for p in writers] == [0, 0], said
    assert whole(Store(tmp_path / "store", Letters())) == sorted(c.text for c in ingest(notes))


def test_readers_see_one_state_or_the_other(tmp_path, notes):
    store, states = Store(tmp_path / "store", Letters()), []
    store.update(notes)
    states.append(whole(store))
    (notes / "a.md").write_text("# a\n\nQuite another text.\n")
    states.append(sorted(c.text for c in ingest(notes)))
    p = child(notes, store.folder)
    while p.poll() is None: assert whole(store) in states
    assert p.returncode == 0 and whole(store) == states[1]


def test_a_writer_that_waits_too_long_says_so(tmp_path, notes):
    store = Store(tmp_path / "store", Letters())
    with locked(store.current), pytest.raises(CourseError, match="Another process"):
        store.update(notes, timeout=0.1)


def test_progress_is_told_of_every_file_and_window(tmp_path, notes):
    seen = []
    Store(tmp_path / "store", Letters()).update(notes, progress=lambda *said: seen.append(said))
    assert seen == [(1, 3, "a.md"), (2, 3, "b.md"), (3, 3, "c.md"), (3, 3, "embedding")]
    ingest(notes, progress=lambda done, total, what="": seen.append(what))
    assert seen[4:] == ["a.md", "b.md", "c.md"]


def test_another_embedder_starts_afresh(tmp_path, notes):
    Store(tmp_path / "store", Letters()).update(notes)
    other = Letters()
    other.key = "other"
    store = Store(tmp_path / "store", other)
    assert store.read()[0] == [] and store.update(notes).embedded == 3


def test_a_folder_that_is_not_there(tmp_path):
    store = Store(tmp_path / "store", Letters())
    with pytest.raises(NotesError, match="There is no folder"): store.update(tmp_path / "nowhere")


def shorten(path): path.write_bytes(path.read_bytes()[:-9])

DAMAGE = {"a cut array": lambda s, gen: shorten(gen / "vectors.npy"),
          "an empty list": lambda s, gen: (gen / "chunks.json").write_text(""),
          "another list": lambda s, gen: (gen / "chunks.json").write_text("{}"),
          "bytes": lambda s, gen: (gen / "chunks.json").write_bytes(b"\xff\x00"),
          "no vectors": lambda s, gen: np.save(gen / "vectors.npy", np.zeros((0, 26), np.float32)),
          "an empty name": lambda s, gen: s.current.write_text(""),
          "a name from elsewhere": lambda s, gen: s.current.write_text("../../tmp"),
          "a name in bytes": lambda s, gen: s.current.write_bytes(b"\xff\xfe"),
          "a lost folder": lambda s, gen: shutil.rmtree(gen)}

@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_store_is_made_anew(what, tmp_path):
    "As a power cut leaves it, or a full disk."
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.md").write_text("# A\n\nHello.")
    store = Store(tmp_path / "store", Letters())
    store.update(tmp_path / "notes")
    DAMAGE[what](store, store.folder / store.current.read_text())
    assert store.read()[0] == []
    store.update(tmp_path / "notes")
    chunks, vectors = store.read()
    assert [c.text for c in chunks] == ["# A\n\nHello."] and vectors.shape == (1, 26)
