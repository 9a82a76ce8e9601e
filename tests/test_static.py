"""Static checks: no kernel, no network. The second half proves that each check can fail."""
import json, shutil, subprocess, sys
from pathlib import Path

import click, pytest, yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import checks
from checks import ROOT
from mlcourse.licences import write_licences

NOTEBOOKS = checks.notebooks()
NAMES = [p.relative_to(ROOT / "nbs").as_posix() for p in NOTEBOOKS]


# ---------------------------------------------------------------- the repository

def test_there_are_notebooks():
    assert {"lib/01_tier.ipynb", "lib/04_assets.ipynb", "lib/06_exercises.ipynb"} <= set(NAMES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_notebook(path):
    problems = checks.check_notebook(path)
    assert not problems, "\n".join(problems)


def test_papermill_sees_the_tier():
    from papermill import inspect_notebook
    for path in NOTEBOOKS: assert "tier" in inspect_notebook(str(path)), path


def in_prose(find, skip=()):
    "What `find(text, path)` says of every piece of prose, with its place."
    return [f"{path.relative_to(ROOT)} {where}: {found}" for path, where, text in checks.prose()
            if path.name not in skip for found in find(text, path)]


def test_links():
    problems = in_prose(checks.links)
    assert not problems, "\n".join(problems)


def test_pictures_in_markdown_files_have_alt_text():
    problems = [f"{p.relative_to(ROOT)}: {x}" for p in checks.markdown_files()
                for x in checks.pictures(p.read_text(encoding="utf-8"))]
    assert not problems, "\n".join(problems)


def test_names_in_prose_exist():
    modules = checks.module_names()
    def find(text, path): return checks.names_in_prose(text, modules)
    problems = in_prose(find, skip=["CHANGELOG.md"])   # which names what is gone
    assert not problems, "\n".join(problems)


def test_commands_in_prose_exist():
    from typer.main import get_command
    from mlcourse.cli import app
    command, targets = get_command(app), checks.make_targets()
    problems = in_prose(lambda text, path: checks.commands_in_prose(text, command, targets))
    assert not problems, "\n".join(problems)


def test_imports_point_back():
    assert checks.imports_point_back(checks.notebook_code()) == []


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A copy of what nbdev works on, cleaned and exported afresh."
    copy = tmp_path_factory.mktemp("export")
    ignore = shutil.ignore_patterns("__pycache__", ".*")
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    for name in ("nbs", "mlcourse"): shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for command in ("nbdev_clean", "nbdev_export"):
        subprocess.run([_script(command)], cwd=copy, check=True, capture_output=True, timeout=120)
    return copy


def _script(name):
    "A console script of this environment."
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    assert found, f"{name} is not installed: `uv sync --extra dev`"
    return found


def test_exports_are_in_step(exported):
    found = differences(ROOT / "mlcourse", exported / "mlcourse", "*.py")
    assert found == [], "run `nbdev_export` and commit what it writes"


def test_git_hooks_leave_notebooks_alone(exported):
    assert differences(ROOT / "nbs", exported / "nbs", "*.ipynb") == [], "run `make tidy`"


def differences(a, b, pattern):
    "Files below `a` or `b` whose bytes differ, or that only one of them has."
    names = {p.relative_to(base) for base in (a, b) for p in base.rglob(pattern)}
    names = {n for n in names if not any(part.startswith(".") for part in n.parts)}
    def text(p): return p.read_bytes() if p.exists() else None
    return sorted(str(n) for n in names if text(a / n) != text(b / n))


HEAVY = ["torch", "transformers", "huggingface_hub", "pandas", "matplotlib"]

def test_the_machinery_is_light():
    modules = sorted(p.stem for p in (ROOT / "mlcourse").glob("[!_]*.py")
                     if "File to edit: ../nbs/lib/" in p.read_text())
    assert {"files", "course", "tier", "assets", "exercises"} <= set(modules)
    imports = "".join(f"import mlcourse.{m}\n" for m in modules)
    program = f"import sys\n{imports}print([m for m in {HEAVY} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True,
                         check=True, timeout=60)
    assert out.stdout.strip() == "[]"


def test_lock_is_in_step():
    settings, lock = (ROOT / "settings.ini").read_text(), (ROOT / "uv.lock").read_text()
    assert checks.lock_in_step(settings, lock) == []


@pytest.mark.parametrize("path", ["mlcourse", "nbs", "tests", "setup.py", "train_qlora.py"])
def test_ruff(path):
    command = [_script("ruff"), "check", "--no-cache", "--output-format", "concise", path]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert out.returncode == 0, out.stdout + out.stderr


def test_everything_public_is_used():
    sources = {p.relative_to(ROOT / "nbs").as_posix(): checks.read(p) for p in NOTEBOOKS}
    named = [(ROOT / name).read_text() for name in ("setup.py", "Makefile", "train_qlora.py")]
    assert checks.unused(sources, "".join(named)) == []


def test_licences_are_in_step(tmp_path):
    for name in ("LICENCES.md", "settings.ini"): shutil.copy(ROOT / name, tmp_path)
    assert not write_licences(tmp_path), "run `make tidy` and commit LICENCES.md"


WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))

@pytest.mark.parametrize("path", WORKFLOWS, ids=[p.name for p in WORKFLOWS])
def test_workflow(path):
    text = path.read_text()
    assert checks.pinned(text) == []
    assert checks.workflow(yaml.safe_load(text)) == []


# ---------------------------------------------------------------- each check can fail

def cell(source, hidden=False, tags=(), **kw):
    "A code cell; ids are numbered by `notebook`."
    meta = {"jupyter": {"source_hidden": True}} if hidden else {}
    if tags: meta["tags"] = list(tags)
    return new_code_cell(source, metadata=meta, **kw)


TIER = 'tier = "auto"  # auto | tiny | 12gb | 16gb'

def notebook(*cells, title="# A title\n\n> What it is about.", tier=True):
    "A notebook that has what every notebook must have."
    first = [new_markdown_cell(title)] + ([cell(TIER, tags=["parameters"])] if tier else [])
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    nb = new_notebook(cells=[*first, *cells], metadata={"kernelspec": kernel})
    for i, c in enumerate(nb.cells): c["id"] = f"cell{i}"
    return json.loads(json.dumps(nb))


def md(text="Some prose."): return new_markdown_cell(text)


def triple(name="f", lesson="week1/01_x", hint="Think of the sum.", check="    test_eq(f(1), 2)",
           hidden=True, stub=None, fold="#| code-fold: true\n"):
    "Stub, check and solution of an exercise."
    mark = f'@exercise({name}, lesson="{lesson}", hint="{hint}")'
    return [cell(stub or f"def {name}(x): ..."), cell(f"{mark}\ndef check_{name}(f):\n{check}"),
            cell(f"{fold}@solution\ndef {name}(x): return x + 1", hidden=hidden)]


def three(**kw): return [c for name in "abc" for c in triple(name, **kw)]


ALT = '#| fig-alt: "A line that rises from 0 to 1."'
PICTURE = [new_output("display_data", {"image/png": "aGk="})]
GOOD = notebook(md(), cell("x = 1\nx"), cell("import os"), cell(f"{ALT}\nplt.plot([0, 1])"))

@pytest.mark.parametrize("check", checks.NOTEBOOK_CHECKS, ids=lambda c: c.__name__)
def test_checks_pass_a_good_notebook(check):
    assert check(GOOD) == []


def changed(nb, **top):
    "A copy of a notebook with other top-level entries."
    return {**json.loads(json.dumps(nb)), **top}


BAD = [
    (checks.parameters, notebook(cell(TIER), tier=False), "0 cells are tagged"),
    (checks.parameters, notebook(cell(TIER, tags=["parameters"])), "2 cells are tagged"),
    (checks.parameters, notebook(cell('tier = "12gb"', tags=["parameters"]), tier=False), "must"),
    (checks.parameters, notebook(cell(f"x = 1\n{TIER}", tags=["parameters"]), tier=False), "must"),
    (checks.clean, notebook(cell("1", outputs=[new_output("stream", text="1")])), "has outputs"),
    (checks.clean, notebook(cell("1", execution_count=3)), "execution count"),
    (checks.clean, changed(GOOD, metadata={"widgets": {}}), "metadata widgets"),
    (checks.clean, notebook(new_code_cell("1", metadata={"scrolled": True})), "metadata scrolled"),
    (checks.valid, changed(GOOD, cells=[{"cell_type": "code", "source": "1"}]), "no ids"),
    (checks.valid, changed(GOOD, cells=[dict(cell_type="code", source="", id="a")]), "not a valid"),
    (checks.valid, changed(GOOD, cells=[GOOD["cells"][0]] * 2), "used 2 times"),
    (checks.code_parses, notebook(cell("def f(:")), "does not parse"),
    (checks.imports_alone, notebook(cell("import os\nos.getcwd()")), "mixes imports"),
    (checks.columns, notebook(cell("x = 1\nx = " + "1 + " * 24 + "1")), "line 2, has 101 columns"),
    (checks.imports_in_order, notebook(cell("import torch\nimport os")), "`import torch` comes"),
    (checks.imports_in_order, notebook(cell("import mlcourse.x\nimport torch")), "too early"),
    (checks.budget, notebook(*[c for _ in range(80) for c in (md(), cell("x"))]), "80 code cells"),
    (checks.budget, notebook(cell("x = 1\n" * 7)), "7 lines"),
    (checks.budget, notebook(*[cell("x") for _ in range(5)]), "5th code cell in a row"),
    (checks.portable, notebook(cell('open("/home/ann/data.txt")')), "absolute path"),
    (checks.portable, notebook(md("TODO: explain")), "TODO"),
    (checks.opening, notebook(title="A title"), "# Title"),
    (checks.opening, notebook(title="# A title\n\nNo promise."), "# Title"),
    (checks.figures, notebook(cell("plt.plot([0, 1])")), "draws (plt.plot)"),
    (checks.figures, notebook(cell("fig, ax = plt.subplots()")), "draws (plt.subplots)"),
    (checks.figures, notebook(cell("for i in range(2): df.plot.bar()")), "draws (df.plot.bar)"),
    (checks.figures, notebook(cell("plot_loss(history)")), "draws (plot_loss)"),
    (checks.figures, notebook(cell('#| fig-alt: "figure"\nplt.show()')), "draws (plt.show)"),
    (checks.figures, notebook(md("![](a.png)")), "picture without alt text: a.png"),
    (checks.figures, notebook(md('<img src="a.png" alt="">')), "picture without alt text"),
    (checks.drawn_without_alt, notebook(cell("f()", outputs=PICTURE)), "put out a picture"),
]

def names_of(cases): return [f"{check.__name__}-{i}" for i, (check, _, _) in enumerate(cases)]


@pytest.mark.parametrize("check, nb, says", BAD, ids=names_of(BAD))
def test_check_can_fail(check, nb, says):
    problems = check(nb)
    assert any(says in p for p in problems), problems


def test_drawing_inside_a_function_is_not_a_figure():
    cells = [cell("def show(x):\n    plt.plot(x)"), cell("d = dict(plot=1)\nd['plot']")]
    assert checks.figures(notebook(*cells)) == []
    assert checks.drawn_without_alt(notebook(cell(f"{ALT}\nf()", outputs=PICTURE))) == []


LONG = "word " * 900
LESSON = notebook(md(LONG), *three(), md(), cell('record("x", 1)'))

@pytest.mark.parametrize("check", checks.LESSON_CHECKS, ids=lambda c: c.__name__)
def test_checks_pass_a_good_lesson(check):
    assert check(LESSON, "week1/01_x") == []


BAD_LESSONS = [
    (checks.exercises, notebook(*three()[:6]), "2 exercises"),
    (checks.exercises, notebook(*three(), *[c for n in "def" for c in triple(n)]), "6 exercises"),
    (checks.exercises, notebook(*three(lesson="week1/02_y")), "says lesson='week1/02_y'"),
    (checks.exercises, notebook(*three(hint="")), "has no hint"),
    (checks.exercises, notebook(*three(stub="y = 1")), "has no stub"),
    (checks.exercises, notebook(*three(check="    f(1)")), "asserts nothing"),
    (checks.exercises, notebook(*three()[:8]), "has no solution"),
    (checks.exercises, notebook(*three(hidden=False)), "is not folded"),
    (checks.exercises, notebook(*three(fold="")), "is not folded"),
    (checks.exercises, notebook(*three(), *triple("a")), "is there 2 times"),
    (checks.records, notebook(cell("def f(): record('x', 1)")), "nothing is recorded"),
    (checks.words, notebook(md("```\n" + LONG + "\n```")), "words of prose"),
    (checks.length, notebook(md(LONG), md(LONG), md("## How we know"), md(LONG)), "1,8"),
    (checks.length, notebook(*[cell("x = 1\n" * 20) for _ in range(16)]), "321 visible lines"),
    (checks.length, notebook(*[cell("x = 1") for _ in range(33)]), "34 visible code cells"),
    (checks.length, notebook(cell("x = 1\n" * 26)), "cell 2 shows 26 lines"),
    (checks.length, notebook(cell("x = 1\n" * 300, hidden=True)), "301 visible lines"),
    (checks.length, notebook(md("## How we know"), cell("#| export\n" + "x\n" * 251)), "251 exp"),
    (checks.first_trained_answer, notebook(*[cell("x = 1") for _ in range(4)],
     cell("x", tags=["first-trained-answer"])), "visible cell 6"),
]

@pytest.mark.parametrize("check, nb, says", BAD_LESSONS, ids=names_of(BAD_LESSONS))
def test_lesson_check_can_fail(check, nb, says):
    problems = check(nb, "week1/01_x")
    assert any(says in p for p in problems), problems


def test_exercise_with_a_value_in_the_cell_of_its_check():
    mark = '@exercise(n, name="n", lesson="week1/01_x", hint="Count the heads.")'
    value = [cell(f"n = None\n{mark}\ndef check(n): test_eq(n, 3)"),
             cell('#| code-fold: true\nsolution(3, name="n")', hidden=True)]
    assert checks.exercises(notebook(*three()[:6], *value), "week1/01_x") == []


@pytest.fixture
def small_repo(tmp_path):
    "A repository with two files to link to."
    (tmp_path / "nbs/week1").mkdir(parents=True)
    headings = "## The memory of `KV` caches (1)\n\n### Été à Paris {#paris}"
    nb = notebook(md(headings), cell("#| exports\ndef fetch(): ..."))
    (tmp_path / "nbs/week1/01_x.ipynb").write_text(json.dumps(nb))
    (tmp_path / "README.md").write_text("# Read me\n\n```\n# not a heading\n```\n")
    return tmp_path


@pytest.mark.parametrize("target", [
    "01_x.ipynb", "../../README.md", "../../README.md#read-me", "01_x.ipynb#paris", "#a-title",
    "01_x.ipynb#fetch", "01_x.ipynb#the-memory-of-kv-caches-1", "https://example.org/nothing",
    "mailto:a@example.org"])
def test_good_links(small_repo, target):
    path = small_repo / "nbs/week1/01_x.ipynb"
    assert checks.links(f"See [it]({target}).", path, small_repo) == []


@pytest.mark.parametrize("target", ["02_y.ipynb", "../README.md", "../../README.md#not-a-heading",
                                    "01_x.ipynb#rome", "#rome"])
@pytest.mark.parametrize("form", ["See [it]({}).", "See [it][1].\n\n[1]: {}", "![a picture]({})",
                                  '<a href="{}">it</a>'])
def test_bad_links(small_repo, target, form):
    path = small_repo / "nbs/week1/01_x.ipynb"
    assert len(checks.links(form.format(target), path, small_repo)) == 1


def test_links_in_code_do_not_count(small_repo):
    text = "`[a](b)`\n\n```\n[a](b.md)\n```\n"
    assert checks.links(text, small_repo / "README.md", small_repo) == []


MODULES = {"assets": {"fetch", "ASSETS"}}

@pytest.mark.parametrize("text, says", [
    ("`mlcourse.assets.fetch`, and `mlcourse/assets.py`", None),
    ("```python\nfrom mlcourse.assets import fetch, ASSETS as A\n```", None),
    ("mlcourse.nowhere is no code, and this an address: `https://mlcourse.github.io/x`", None),
    ("`mlcourse.assets.grab`", "mlcourse.assets has no grab"),
    ("`mlcourse.rags`", "there is no module mlcourse.rags"),
    ("```py\nfrom mlcourse.assets import (fetch,\n    grab)\n```", "mlcourse.assets has no grab"),
    ("~~~\nimport mlcourse.rags\n~~~", "there is no module mlcourse.rags"),
])
def test_names_in_prose(text, says):
    assert checks.names_in_prose(text, MODULES) == ([says] if says else [])


COMMAND = click.Group("mlcourse", commands=[
    click.Command("run", params=[click.Option(["--tier"])]),
    click.Group("standins", commands=[click.Command("rebuild")])])

@pytest.mark.parametrize("text, says", [
    ("`mlcourse run --tier tiny nbs/week1` and `mlcourse --help`, `make course TIER=12gb`", None),
    ("`pip install mlcourse[week1]`\n\n```\nuv run mlcourse run\n```", None),
    ("```sh\n$ mlcourse standins rebuild x  # a comment\nTIER=tiny make course\n```", None),
    ("mlcourse is a course, and you make up your mind", None),
    ("`mlcourse walk`", "`mlcourse walk`: there is no such command"),
    ("`mlcourse run --jbos 2`", "`mlcourse run --jbos 2`: run has no option --jbos"),
    ("```\nuv run mlcourse standins burn\n```", "`mlcourse burn`: there is no such command"),
    ("```bash\nmake coffee\n```", "`make coffee`: the Makefile has no such target"),
])
def test_commands_in_prose(text, says):
    assert checks.commands_in_prose(text, COMMAND, {"course", "test"}) == ([says] if says else [])


TIERS, A, B = "#| default_exp tier", "#| default_exp a", "#| default_exp b"

@pytest.mark.parametrize("sources, bad", [
    ({"lib/01_tier.ipynb": TIERS, "week1/01_a.ipynb": f"{A}\nfrom mlcourse.tier import *",
      "week2/01_b.ipynb": f"{B}\nimport mlcourse.a", "clinic/c.ipynb": "from mlcourse.b import x"},
     None),
    ({"lib/01_tier.ipynb": f"{TIERS}\nfrom mlcourse.a import x", "week1/01_a.ipynb": A},
     "lib/01_tier.ipynb imports week1/01_a.ipynb"),
    ({"tools/01_b.ipynb": f"{B}\nfrom mlcourse.a import x", "week1/01_a.ipynb": A},
     "tools/01_b.ipynb imports week1/01_a.ipynb"),
    ({"week1/01_a.ipynb": "def f():\n    from mlcourse.b import x", "week1/02_b.ipynb": B},
     "week1/01_a.ipynb imports week1/02_b.ipynb"),
    ({"week1/01_a.ipynb": "from mlcourse import b", "week2/01_b.ipynb": B},
     "week1/01_a.ipynb imports week2/01_b.ipynb")])
def test_import_order(sources, bad):
    problems = checks.imports_point_back(sources)
    assert (not problems) if bad is None else problems[0].startswith(bad)


@pytest.mark.parametrize("cells, where, used", [
    ([cell("#| export\ndef f(): ...")], "week1/01_x.ipynb", False),
    ([cell("#| export\ndef f(): return f")], "week1/01_x.ipynb", False),
    ([cell("#| export\ndef f(): ..."), cell("f()")], "week1/01_x.ipynb", True),
    ([cell("#| export\ndef f(): ..."), cell("f()")], "lib/01_x.ipynb", False),
    ([cell("#| export\ndef f(): ..."), cell("#| export\ndef g(): f()")], "lib/01_x.ipynb", True),
    ([cell("#| export\ndef f(): ..."), md("See `f(x)`.")], "lib/01_x.ipynb", True),
    ([cell("#| export\n@command('f')\ndef f(): ...")], "lib/01_x.ipynb", True),
    ([cell("#| export\n@cache\ndef f(): ...")], "lib/01_x.ipynb", False),
    ([cell("#| export\ndef _f(): ...")], "lib/01_x.ipynb", True)])
def test_unused(cells, where, used):
    found = [p for p in checks.unused({where: notebook(*cells)}) if p.endswith(" f")]
    assert found == ([] if used else [f"{where}: nothing uses f"])


def test_long_alternative_texts_are_fine():
    assert checks.columns(notebook(cell("#| fig-alt: \"" + "word " * 40 + "\"\nplt.plot()"))) == []


HASH = "0123456789abcdef0123456789abcdef01234567"

@pytest.mark.parametrize("line, good", [
    (f"- uses: actions/checkout@{HASH} # v6.0.2", True), (f"uses: a/b/c@{HASH} # v2", True),
    ("- uses: actions/checkout@v6", False), (f"- uses: actions/checkout@{HASH}", False),
    (f"- uses: actions/checkout@{HASH[:39]} # v6", False)])
def test_pinned(line, good):
    assert (checks.pinned(f"steps:\n  {line}\n") == []) == good


JOB = {"runs-on": "ubuntu-latest", "timeout-minutes": 5, "steps": [{"run": "true"}]}

@pytest.mark.parametrize("jobs, says", [
    ({"a": JOB, "b": {**JOB, "needs": "a"}}, None),
    ({"a": {**JOB, "needs": ["b"]}}, "needs b, which is no job"),
    ({"a": {k: v for k, v in JOB.items() if k != "timeout-minutes"}}, "no timeout"),
    ({"a": {**JOB, "steps": [{"name": "nothing"}]}}, "one of `run` and `uses`"),
    ({"a": {**JOB, "steps": [{"run": "if true; then"}]}}, "is not bash"),
    ({"a": {**JOB, "steps": [{"run": "echo ${{ needs.c.outputs.x }}"}]}}, "names the job c"),
    ({"a": {**JOB, "steps": [{"run": "echo ${{ steps.s.outputs.x }}"}]}}, "names the step s"),
    ({"a": {**JOB, "steps": [{"run": "echo ${{ github.event.issue.title }}"}]}}, "environment")])
def test_workflow_that_is_wrong(jobs, says):
    problems = checks.workflow({"permissions": {"contents": "read"}, "jobs": jobs})
    assert (not problems) if says is None else any(says in p for p in problems), problems


def test_lock_out_of_step():
    settings = (ROOT / "settings.ini").read_text()
    lock = (ROOT / "uv.lock").read_text()
    newer = settings.replace("peft>=0.18", "peft>=0.19\n    einops>=0.8")
    problems = checks.lock_in_step(newer, lock)
    assert problems[0].startswith("settings.ini asks for einops>=0.8 [all]")


def test_exports_out_of_step(tmp_path):
    for side, text in (("a", "x = 1"), ("b", "x = 2")):
        (tmp_path / side).mkdir()
        (tmp_path / side / "m.py").write_text(text)
    (tmp_path / "b" / "new.py").write_text("")
    assert differences(tmp_path / "a", tmp_path / "b", "*.py") == ["m.py", "new.py"]


# ---------------------------------------------------------------- the repair

def test_tidy(tmp_path):
    nb = notebook(cell("1", outputs=[new_output("stream", text="1")], execution_count=1),
                  new_code_cell("2", metadata={"scrolled": True, "tags": ["keep"]}))
    nb["metadata"]["widgets"] = {"state": {}}
    nb["cells"][2]["id"] = "my-own-id"
    path = tmp_path / "01_x.ipynb"
    path.write_text(json.dumps(nb))
    assert checks.clean(checks.read(path)) and checks.tidy(path)
    again = checks.read(path)
    assert checks.clean(again) == [] and checks.parameters(again) == []
    assert again["cells"][2]["id"] == "my-own-id"
    assert again["cells"][3]["metadata"] == {"tags": ["keep"]}
    assert not checks.tidy(path)


def test_fix_from_the_command_line(tmp_path, capsys):
    path = tmp_path / "01_x.ipynb"
    path.write_text(json.dumps(notebook(cell("1", execution_count=1))))
    assert checks.main(["--fix", str(path)]) == 0 and "tidied" in capsys.readouterr().out
    assert checks.clean(checks.read(path)) == []
