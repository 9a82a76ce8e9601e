"""A new lesson brings its own files and one requirement, and is everywhere: on the front page, on
the site, in the help of `mlcourse`, in the table of licences and in the report. No other file is
edited by hand; `make tidy` writes the rest."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import tabulate
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from mlcourse.course import PARTS, lessons
from mlcourse.frontpage import weeks
from mlcourse.site import sidebar

LESSON, ROWS = "nbs/week3/09_dummy.ipynb", "mlcourse/data/assets/week3.toml"
WRITTEN = {"README.md", "LICENCES.md", "mlcourse/_modidx.py", "mlcourse/dummy.py"}   # by make
PROMISE = "Promise that a new lesson is everywhere."

CELLS = [
    new_markdown_cell(f"# A dummy\n\n> {PROMISE}\n\nIt exports `shout`."),
    new_code_cell("#| default_exp dummy"),
    new_code_cell('tier = "auto"  # auto | tiny | 12gb | 16gb', metadata=dict(tags=["parameters"])),
    new_code_cell("#| export\nfrom mlcourse.course import command"),
    new_code_cell("from mlcourse.record import record"),
    new_code_cell("""#| exports
@command("dummy")
def shout(word:str,      # what to shout
          times:int=3,   # how often
         ) -> int:       # exit code
    "Shout like a dummy."
    print(" ".join([word.upper()] * times))
    return 0"""),
    new_code_cell('record("shouts", 3, at_least=3)')]

ROW = """
[dummy-picture]
kind = "url"
role = "picture"
format = "png"
about = "a picture of nobody"
licence = "CC0-1.0"
path = "dummy.png"
url = "https://example.org/dummy.png"
size = 2_000_000
sha256 = "0000000000000000000000000000000000000000000000000000000000000000"
"""


def call(clone, *args, timeout=100):
    "Run a command in the clone, with the clone's library; what it printed."
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    env |= dict(PYTHONPATH=str(clone), NO_COLOR="1", TERM="dumb", COLUMNS="100")
    done = subprocess.run([str(a) for a in args], cwd=clone, env=env, timeout=timeout,
                          capture_output=True, text=True)
    assert done.returncode == 0, f"{args}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def mlcourse(clone, *args): return call(clone, sys.executable, "-m", "mlcourse.cli", *args)


@pytest.fixture(scope="module")
def clone(root, tmp_path_factory):
    "A copy of the course with one lesson more, after `make tidy`."
    clone = tmp_path_factory.mktemp("clone")
    listed = call(root, "git", "ls-files", "-co", "--exclude-standard").splitlines()
    for name in (n for n in listed if (root/n).is_file()):
        (clone/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root/name, clone/name)
    who = ("-c", "user.name=test", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    for step in (["init", "-q"], ["add", "-A"], ["commit", "-q", "--no-verify", "-m", "before"]):
        call(clone, "git", *who, *step)

    kernel = dict(kernelspec=dict(display_name="python3", language="python", name="python3"))
    (clone/LESSON).parent.mkdir(exist_ok=True)
    nbformat.write(new_notebook(cells=CELLS, metadata=kernel), clone/LESSON)
    (clone/ROWS).parent.mkdir(exist_ok=True)
    with open(clone/ROWS, "a", encoding="utf-8") as f: f.write(ROW)
    lines = (clone/"settings.ini").read_text(encoding="utf-8").split("\n")
    assert not any("tabulate" in line.lower() for line in lines), "take another package"
    at = next(i for i, line in enumerate(lines) if line.startswith("week3_requirements"))
    lines.insert(at + 1, "    tabulate>=0.8")
    (clone/"settings.ini").write_text("\n".join(lines), encoding="utf-8")

    call(clone, "make", "-o", "setup", "tidy", f"BIN={Path(sys.executable).parent}", "VENV=.venv")
    return clone


def test_nothing_else_is_edited(clone):
    status = call(clone, "git", "status", "--porcelain", "-uall")
    changed = {line[3:] for line in status.splitlines()}
    assert changed == {LESSON, ROWS, "settings.ini"} | WRITTEN


def test_front_page(clone):
    line = f"- **[A dummy](week3/09_dummy.ipynb)** {PROMISE}"
    assert line in weeks(clone) and PARTS["week3"] not in weeks(clone).partition("Planned: ")[2]
    assert line.replace("](", "](nbs/") in (clone/"README.md").read_text(encoding="utf-8")


def test_sidebar(clone):
    def sections(contents): return {s["section"]: s["contents"] for s in contents if "section" in s}
    pages = sections(sidebar(lessons(clone)))
    assert "week3/09_dummy.ipynb" in pages[PARTS["week3"]]
    assert "reference/dummy.qmd" in sections(pages["Library reference"])["Week 3"]


def test_command_line(clone):
    said = mlcourse(clone, "--help")
    assert "Shout like a dummy." in said and said.index("doctor") < said.index("dummy")
    assert mlcourse(clone, "dummy", "hey", "--times", "2") == "HEY HEY\n"


def test_licences(clone):
    text = (clone/"LICENCES.md").read_text(encoding="utf-8")
    def rows(name): return [row for row in text.split("\n") if name in row.lower()]
    assert len(rows("dummy-picture")) == len(rows("tabulate")) == 1
    for words in ("CC0-1.0", "a picture of nobody"): assert words in rows("dummy-picture")[0]
    show = "from mlcourse.assets import licences; print(licences().loc['dummy-picture'].to_json())"
    row = json.loads(call(clone, sys.executable, "-c", show))
    assert (row["licence"], row["kind"], row["size_mb"]) == ("CC0-1.0", "url", 2.0)


@pytest.fixture(scope="module")
def run(clone, tmp_path_factory):
    "The folder of a run of the new lesson."
    folder = tmp_path_factory.mktemp("run")
    mlcourse(clone, "run", LESSON, "--out", folder)
    return folder


def test_report(run):
    report = json.loads((run/"report.json").read_text(encoding="utf-8"))
    entry, = report["notebooks"]
    assert (entry["path"], entry["status"]) == (LESSON, "ok")
    assert entry["metrics"]["shouts"]["value"] == 3
    versions = {name.lower(): version for name, version in report["versions"].items()}
    assert versions["tabulate"] == tabulate.__version__


@pytest.mark.slow   # imports every module
def test_pages(clone, run, tmp_path_factory):
    site = tmp_path_factory.mktemp("site")
    make = f"from mlcourse.site import stage; stage({str(run)!r}, {str(site)!r})"
    call(clone, sys.executable, "-c", make, timeout=300)
    page = (site/"week3/09_dummy.ipynb").read_text(encoding="utf-8")
    assert PROMISE in page and "Ran on tier tiny" in page and "Shout like a dummy." in page
    assert "what to shout" in (site/"reference/dummy.qmd").read_text(encoding="utf-8")
    assert "dummy-picture" in (site/"licences.qmd").read_text(encoding="utf-8")
    assert "shouts" in (site/"report.qmd").read_text(encoding="utf-8")
    assert "week3/09_dummy.ipynb" in (site/"_quarto.yml").read_text(encoding="utf-8")
