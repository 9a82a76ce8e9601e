"""What a run depends on: keys that change with an input and only then, and artefacts."""
import functools, importlib.metadata, itertools, json, re, shutil
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_notebook
from rich.console import Console

from mlcourse.course import find_notebooks, read_notebook
from mlcourse.files import UsageError
from mlcourse.record import distributions
from mlcourse.run import inputs, needs, run_course, run_key
from test_run import write

MACHINERY = ("lib/", "tools/")
RAG = {"week1/04_rag", "week1/06_agent"}


VERSION = functools.cache(importlib.metadata.version)   # it takes 2 ms, and is asked 10,000 times


@pytest.fixture
def clone(root, tmp_path, monkeypatch) -> Path:
    "The notebooks and the package, to be edited."
    monkeypatch.setattr(importlib.metadata, "version", VERSION)
    leave_out = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("nbs", "mlcourse"):
        shutil.copytree(root / name, tmp_path / "clone" / name, ignore=leave_out)
    shutil.copy(root / "settings.ini", tmp_path / "clone")
    return tmp_path / "clone"


def books(clone: Path) -> dict[str, dict]:
    "Every notebook, by its name."
    found = find_notebooks(clone)
    names = [p.relative_to(clone / "nbs").with_suffix("").as_posix() for p in found]
    return dict(zip(names, map(read_notebook, found)))


def keys(clone: Path, outputs: Path | None = None) -> dict[str, str]:
    "The key of every notebook, by its name."
    return {name: run_key(nb, {"tier": "tiny"}, "tiny", outputs, clone / "mlcourse")
            for name, nb in books(clone).items()}


def changed(before: dict, after: dict) -> set[str]:
    "Whose key is another one now."
    return {name for name in after if before.get(name) != after[name]}


def lessons_of(names: set[str]) -> set[str]:
    "Without the course's machinery, and without the front page."
    return {n for n in names if "/" in n and not n.startswith(MACHINERY)}


def users(clone: Path, *words: str) -> set[str]:
    "Notebooks that reach a module or a package: found by searching texts, not by a parser."
    def imports(text, name):
        return re.search(rf"(?:from|import) (?:mlcourse)?\.?{name}\b|mlcourse\.{name}\b"
                         rf"|from mlcourse import .*\b{name}\b", text)
    def code(nb): return "\n".join(c.source for c in nb.cells if c.cell_type == "code")
    modules = (clone / "mlcourse").glob("[!_]*.py")   # without comments, which import nothing
    texts = {p.stem: re.sub(r"#.*", "", p.read_text()) for p in modules}
    found, more = set(), set(words)
    while more:
        found |= more
        more = {m for m, text in texts.items() if any(imports(text, f) for f in found)} - found
    return {name for name, nb in books(clone).items() if any(imports(code(nb), f) for f in found)}


def edit(path: Path, old: str, new: str) -> None:
    "Replace the first occurrence in a file."
    text = path.read_text(encoding="utf-8")
    assert old in text, f"{old!r} is not in {path.name}"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_an_edited_export_reruns_its_lesson_and_its_users(clone):
    before = keys(clone)
    for file in ("mlcourse/tinylm.py", "nbs/week2/04_tiny_lm.ipynb"):
        edit(clone / file, "def read_text(", "def read_text (")
    again = lessons_of(changed(before, keys(clone)))
    assert again == {"week2/04_tiny_lm"} | lessons_of(users(clone, "tinylm"))
    before = keys(clone)
    for file in ("mlcourse/rag.py", "nbs/week1/04_rag.ipynb"):
        edit(clone / file, "class Answer", "class  Answer")
    again = lessons_of(changed(before, keys(clone)))
    assert again == {"week1/04_rag"} | lessons_of(users(clone, "rag")) and again >= RAG
    assert not {"week1/02_vram", "week2/04_tiny_lm", "week2/05_ship"} & again


def test_machinery_that_every_lesson_imports_reruns_them_all(clone):
    before = keys(clone)
    edit(clone / "mlcourse/tier.py", "def choose(", "def choose (")
    assert lessons_of(before.keys()) == lessons_of(changed(before, keys(clone)))
    before = keys(clone)
    for name in ("run", "site", "cli"):
        (clone / f"mlcourse/{name}.py").open("a").write("\n# another line\n")
    assert lessons_of(changed(before, keys(clone))) == set(), "no lesson imports one of these"


def test_what_no_notebook_can_see_changes_no_key(clone):
    before = keys(clone)
    (clone / "mlcourse/_modidx.py").open("a").write("\n# another commit\n")
    (clone / "mlcourse/__init__.py").write_text('__version__ = "9.9.9"\n')
    (clone / "mlcourse/of_another_week.py").write_text("x = 1\n")
    (clone / "mlcourse/data/of_another_week.csv").write_text("x,1\n")
    (clone / "mlcourse/__pycache__").mkdir()
    (clone / "README.md").write_text("Other words.\n")
    edit(clone / "settings.ini", "version =", "version = 9")
    for path in find_notebooks(clone):   # as after a run in JupyterLab
        nb = json.loads(path.read_text(encoding="utf-8"))
        for i, c in enumerate(nb["cells"]):
            c["id"] = f"cell-{i}"
            seen = dict(output_type="stream", name="stdout", text=["seen\n"])
            if c["cell_type"] == "code": c.update(execution_count=i, outputs=[seen])
        nb["metadata"]["language_info"] = dict(name="python", version="3.99")
        path.write_text(json.dumps(nb), encoding="utf-8")
    again = changed(before, keys(clone))
    files = {n: inputs(nb, clone / "mlcourse")["files"] for n, nb in books(clone).items()}
    whole = {n for n, fs in files.items() if {"nbs", "mlcourse/of_another_week.py"} & fs.keys()}
    data = {n for n, fs in files.items() if "mlcourse/data" in fs}
    assert again <= whole | data and lessons_of(again) == set(), "only what shows all of it"


def test_data_is_an_input_of_those_who_name_it(clone):
    before = keys(clone)
    (clone / "mlcourse/data/rag/questions.jsonl").open("a").write("{}\n")
    again = lessons_of(changed(before, keys(clone)))
    assert RAG <= again <= RAG | users(clone, "rag")
    before = keys(clone)
    (clone / "mlcourse/data/configs.json").open("a").write("\n")
    again = lessons_of(changed(before, keys(clone)))
    assert again == {"week1/02_vram"} | lessons_of(users(clone, "vram", "configs"))


@pytest.mark.parametrize("source, names", [
    ("import json, mlcourse.vram", {"vram"}),
    ("def f():\n    from mlcourse import evals, trace", {"evals", "trace"}),
    ("try: from mlcourse.rag import Store\nexcept ImportError: pass", {"rag"}),
    ("subprocess.run([sys.executable, '-m', 'mlcourse.qlora'])", {"qlora"}),
    ("code = 'from mlcourse.instruct import prepare'", {"instruct"}),
    ("%time from mlcourse.rag import Store", set()),
    ("importlib.import_module('mlcourse.agent')", {"agent"}),
])
def test_every_way_to_import_counts(source, names):
    files = inputs(new_notebook(cells=[new_code_cell(source)]))["files"]
    assert names <= {Path(f).stem for f in files} and bool(names) == bool(files)


def test_code_that_could_import_anything_depends_on_everything(root):
    whole = {p.stem for p in (root / "mlcourse").glob("*.py")} - {"_modidx", "__init__"}
    for source in ("import_module(f'mlcourse.{name}')", "__import__(name)", "%%bash\necho 'a"):
        files = inputs(new_notebook(cells=[new_code_cell(source)]))["files"]
        assert whole <= {Path(f).stem for f in files}, source


def test_an_upgrade_reruns_those_who_import_it(clone, monkeypatch):
    def upgrade(package):
        def version(name): return "99.0" if name == package else VERSION(name)
        monkeypatch.setattr(importlib.metadata, "version", version)
    before = keys(clone)
    upgrade("faiss-cpu")
    again = lessons_of(changed(before, keys(clone)))
    assert again == lessons_of(users(clone, "faiss")) and again >= RAG
    assert not {n for n in again if n.startswith("week2/")}
    upgrade("a package that nobody imports")
    assert changed(before, keys(clone)) == set()
    upgrade("ipykernel")
    assert changed(before, keys(clone)) == before.keys(), "the kernel runs them all"
    assert "faiss-cpu" in distributions()["faiss"]


def test_a_changed_artefact_reruns_those_who_need_it(clone, tmp_path):
    write(clone / "nbs", "week6/98_taker", "artifact('week6/97_maker', 'weights')")
    outputs, takers = tmp_path / "outputs", {}
    for name, nb in books(clone).items():
        for need in needs(nb): takers.setdefault("/".join(need), set()).add(name)
    for place in takers:
        (outputs / place).mkdir(parents=True)
        (outputs / place / "model.bin").write_bytes(b"1")
    assert takers["week6/97_maker/weights"] == {"week6/98_taker"}
    for place in takers:   # among them the adapter of week 2
        before = keys(clone, outputs)
        (outputs / place / "model.bin").write_bytes(b"2")
        assert changed(before, keys(clone, outputs)) == takers[place]


# ---------------------------------------------------------------- in a run

@pytest.fixture
def go(tmp_path, monkeypatch):
    "Run notebooks of `nb/` in this process; the status of each, `kept` when of an earlier run."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlcourse.run.score", itertools.count(1).__next__)   # takes 0.8 s
    def go(*names, **options):
        paths = [f"nb/{n}.ipynb" for n in names] or ["nb"]
        options = {"resume": True, **options}
        go.report = run_course(paths, out="out", console=Console(quiet=True), **options)
        rows = {Path(r["path"]).stem: r for r in go.report["notebooks"]}
        go.errors = {name: (r["error"] or {}).get("message") for name, r in rows.items()}
        return {name: "kept" if r.get("resumed") else r["status"] for name, r in rows.items()}
    return go


def leave(text: str) -> str:
    "Source of a notebook that leaves a file."
    place = "(out_dir('nb/03_maker') / 'x.txt')"
    return f"open('log', 'a').write('maker ')\n{place}.write_text({text!r})"

IMPORT = "from mlcourse.record import artifact, out_dir"
TAKE = "open('log', 'a').write('taker ' + artifact('nb/03_maker', 'x.txt').read_text() + ' ')"


@pytest.mark.slow
def test_makers_run_first_and_takers_run_again_when_they_must(tmp_path, go):
    write(tmp_path, "nb/01_taker", IMPORT, TAKE)
    write(tmp_path, "nb/02_other", "open('log', 'a').write('other ')")
    write(tmp_path, "nb/03_maker", IMPORT, leave("one"))
    log, everyone = tmp_path / "nb/log", {"03_maker", "01_taker", "02_other"}
    assert go() == dict.fromkeys(everyone, "ok") and log.read_text() == "maker taker one other "
    assert [r["path"][5:7] for r in go.report["notebooks"]] == ["_m", "_t", "_o"]
    assert go() == dict.fromkeys(everyone, "kept") and log.read_text().count("maker") == 1
    first = dict(before=1, after=2)
    assert go.report["machine"]["score"] == first, "of the first run, as the seconds are"
    kept = {"02_other": "kept"}

    write(tmp_path, "nb/03_maker", IMPORT, "# another word", leave("one"))
    same = "the same bytes make nobody run again"
    assert go(jobs=2) == kept | {"03_maker": "ok", "01_taker": "kept"}, same
    write(tmp_path, "nb/03_maker", IMPORT, leave("two"))
    assert go(jobs=2) == kept | {"03_maker": "ok", "01_taker": "ok"}
    left = tmp_path / "out/outputs/nb/03_maker/x.txt"
    left.write_text("three")
    assert go() == kept | {"03_maker": "kept", "01_taker": "ok"}, "somebody changed it"
    left.unlink()
    assert go() == kept | {"03_maker": "ok", "01_taker": "ok"}, "a maker is kept with what it left"
    assert go("01_taker", resume=False) == {"01_taker": "ok"}, "it is there already"

    write(tmp_path, "nb/03_maker", IMPORT, "1 / 0")
    before = log.read_text()
    assert go() == kept | {"03_maker": "failed", "01_taker": "failed"}
    assert log.read_text() == before
    why = "It needs x.txt of nb/03_maker.ipynb, which failed in this run."
    assert go.errors["01_taker"] == why
    write(tmp_path, "nb/03_maker", IMPORT, "artifact('nb/03_maker', 'x.txt').unlink()")
    assert go() == kept | {"03_maker": "ok", "01_taker": "failed"}
    assert "has not left there" in go.errors["01_taker"]


def test_a_need_that_nobody_fills_is_refused(tmp_path, go):
    write(tmp_path, "nb/01_taker", TAKE)
    write(tmp_path, "nb/03_maker", "1")
    both = "`mlcourse run nb/03_maker.ipynb nb/01_taker.ipynb`"
    with pytest.raises(UsageError, match=f"01_taker.ipynb needs x.txt of nb/03_maker, .* {both}"):
        go("01_taker")
    write(tmp_path, "nb/03_maker", "artifact('nb/01_taker', 'y.txt')")
    circle = "nb/0._.*, which needs nb/0._.*, which needs nb/0"
    with pytest.raises(UsageError, match=f"None of these can run first: {circle}"): go()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lesson, needed", [("week2/05_ship", "week2/02_qlora")])
def test_alone_on_a_fresh_clone_it_says_what_to_run(root, tmp_path, monkeypatch, lesson, needed):
    assert needed in dict(needs(read_notebook(root / f"nbs/{lesson}.ipynb")))
    monkeypatch.chdir(root)
    with pytest.raises(UsageError, match=f"`mlcourse run nbs/{needed}.ipynb nbs/{lesson}.ipynb`"):
        run_course([f"nbs/{lesson}.ipynb"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
