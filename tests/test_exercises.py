"""What `nbs/lib/06_exercises.ipynb` cannot test: real kernels, and processes at the same moment."""
import subprocess, sys
from contextlib import nullcontext

import nbformat, pytest
from nbformat.v4 import new_code_cell, new_notebook

from mlcourse.exercises import (ExerciseError, LessonProgress, find_exercises, notebook_diff,
                                passed, progress, start, update)
from mlcourse.course import read_cells

STUB = "def double(x): ...  # your code"
CHECK = '''@exercise(double, lesson="week1/01_toy", hint="Add it to itself.")
def check(double): assert double(3) == 6, "double(3) is not 6"'''
SOLUTION = "#| code-fold: true\n@solution\ndef double(x): return x + x"
IMPORT = "from mlcourse.exercises import exercise, solution"


def run(tmp_path, *cells, mode=""):
    "Execute cells in a kernel, as a headless run does; the executed notebook and the error."
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    mode = f"import os; os.environ['MLCOURSE_EXERCISES'] = {mode!r}"
    nb = new_notebook(cells=[new_code_cell(c) for c in (mode, IMPORT, *cells)])
    where = {"metadata": {"path": str(tmp_path)}}
    try: NotebookClient(nb, timeout=60, kernel_name="python3", resources=where).execute()
    except CellExecutionError as e: return nb, str(e)
    return nb, ""


def text(nb):
    "All that the outputs say."
    return "\n".join(o.get("data", {}).get("text/plain", "") for c in nb.cells for o in c.outputs)


def test_learner_runs_all_and_comes_back(tmp_path):
    nb, error = run(tmp_path, STUB, CHECK, SOLUTION, "double(3)")
    assert error == "" and "✗ double: not solved yet." in text(nb)
    assert "Add it to itself." in text(nb) and "6" not in text(nb).splitlines()[-1]
    assert passed() == {}
    nb, error = run(tmp_path, "def double(x): return 2 * x", CHECK, SOLUTION, "double(3)")
    assert error == "" and "✓ double: solved." in text(nb)
    assert "Add it" not in text(nb) and text(nb).endswith("6")
    assert list(passed()["week1/01_toy"]) == ["double"]
    nb, error = run(tmp_path, STUB, CHECK)
    assert "double" in passed()["week1/01_toy"], "a stub that is run again takes nothing away"


def test_solution_does_not_replace_an_answer_changed_after_its_check(tmp_path):
    nb, error = run(tmp_path, STUB, CHECK, "def double(x): return 'mine'", SOLUTION, "double(3)")
    assert error == "" and text(nb).endswith("'mine'")


@pytest.mark.parametrize("cells, says", [
    ((STUB, CHECK, SOLUTION), ""),
    (("def double(x): return None", CHECK, SOLUTION), ""),
    (("def double(x): raise NotImplementedError", CHECK, SOLUTION), ""),
    (("def double(x): return x + x", CHECK, SOLUTION), "passes on its stub"),
    ((STUB, CHECK.replace("assert double(3) == 6", "assert True"), SOLUTION), "passes on its stub"),
    ((STUB, CHECK.replace("double(3) == 6", "duble(3) == 6"), SOLUTION), "a reason of its own"),
    ((STUB, CHECK, SOLUTION.replace("x + x", "x")), "fails on its solution"),
    ((STUB, CHECK, SOLUTION.replace("double", "triple")), "no exercise of that name"),
])
def test_verdicts_of_a_verifying_run(cells, says, monkeypatch, capsys):
    monkeypatch.setenv("MLCOURSE_EXERCISES", "verify")
    monkeypatch.setattr("mlcourse.exercises._met", {})
    with pytest.raises(ExerciseError, match=says) if says else nullcontext():
        exec("\n\n".join((IMPORT, *cells)), {})
    assert ("exercises_verified = 1" in capsys.readouterr().out) == (not says)
    assert passed() == {}, "a verifying run marks nothing as passed"


@pytest.mark.parametrize("stub, error_type", [
    (STUB, ""), ("def double(x): return x + x", "ExerciseError")])
def test_verifying_run_in_a_kernel(tmp_path, stub, error_type):
    nb, error = run(tmp_path, stub, CHECK, SOLUTION, "double(3)", mode="verify")
    assert error_type in error and bool(error) == bool(error_type)
    assert error or ("exercises_verified = 1" in text(nb) and text(nb).endswith("6"))


def test_an_unwritable_state_does_not_stop_a_learner(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLCOURSE_STATE", str(tmp_path / "file" / "state"))
    nb, error = run(tmp_path, "def double(x): return 2 * x", CHECK)
    assert error == "" and "could not be saved" in text(nb)


STORE = """
import sys
from mlcourse.exercises import exercise
for i in range(20):
    exercise(i, name=f"{sys.argv[1]}{i}", lesson="week1/01_toy", hint="none")(lambda x: None)
"""

def test_four_processes_pass_at_once(environment):
    processes = [subprocess.Popen([sys.executable, "-c", STORE, name], env=environment,
                                  stdout=subprocess.DEVNULL) for name in "abcd"]
    assert [p.wait(timeout=60) for p in processes] == [0] * 4
    assert len(passed()["week1/01_toy"]) == 80


@pytest.fixture
def course(tmp_path):
    "A course of one week."
    week = tmp_path / "course" / "nbs" / "week1"
    (tmp_path / "course" / "nbs" / "lib").mkdir(parents=True)
    (tmp_path / "course" / "settings.ini").write_text("")
    week.mkdir()
    cells = [new_code_cell(s) for s in (STUB, CHECK, SOLUTION)]
    nbformat.write(new_notebook(cells=cells), week / "01_toy.ipynb")
    (week / "photo.txt").write_text("a file that the lesson reads")
    (week / ".ipynb_checkpoints").mkdir()
    (week / ".ipynb_checkpoints" / "01_toy-checkpoint.ipynb").write_text("{}")
    return tmp_path / "course"


def test_start_progress_update(course, tmp_path):
    work = tmp_path / "work"
    started = [(c.action, c.path.name) for c in start("1", work, course)]
    assert started == [("copied", "01_toy.ipynb"), ("copied", "photo.txt")]
    assert progress(work, course) == [LessonProgress("week1/01_toy", [], ["double"])]
    mine = work / "week1" / "01_toy.ipynb"
    mine.write_text(mine.read_text().replace("...  # your code", "return x + x"))
    before = mine.read_bytes()
    theirs = course / "nbs" / "week1" / "01_toy.ipynb"
    theirs.write_text(theirs.read_text().replace("x + x", "2 * x"))
    (course / "nbs" / "week1" / "photo.txt").write_text("a better file")
    yours, refreshed = update(work, course)
    assert (yours.action, refreshed.action) == ("yours", "refreshed")
    assert "-def double(x): return x + x" in yours.diff
    assert "+def double(x): return 2 * x" in yours.diff
    assert mine.read_bytes() == before and (mine.parent / "01_toy.new.ipynb").exists()
    assert (mine.parent / "photo.txt").read_text() == "a better file"
    assert [c.action for c in start(1, work, course)] == ["kept", "kept"]


def test_an_offered_version_is_never_written_over(course, tmp_path):
    work, source = tmp_path / "work", course / "nbs" / "week1" / "01_toy.ipynb"
    start(1, work, course)
    mine = work / "week1" / "01_toy.ipynb"
    mine.write_text(mine.read_text().replace("...  # your code", "return x + x"))
    for hint in ("One.", "Two."):
        text = source.read_text().replace("Add it to itself.", hint).replace("One.", hint)
        source.write_text(text)
        update(work, course)
    offered = sorted(p.name for p in mine.parent.glob("*.new*"))
    assert offered == ["01_toy.new.ipynb", "01_toy.new2.ipynb"]


def test_the_course_itself_can_be_started(root, tmp_path):
    changes = start(1, tmp_path / "work", root)
    assert any(c.path.name == "03_hello_llm.ipynb" and c.action == "copied" for c in changes)
    assert {c.action for c in update(tmp_path / "work", root)} == {"current"}


def test_diff_of_equal_and_of_broken_notebooks(course, tmp_path):
    path = course / "nbs" / "week1" / "01_toy.ipynb"
    assert notebook_diff(path, path) == ""
    (tmp_path / "broken.ipynb").write_text("[]")
    with pytest.raises(ValueError, match="is not a notebook"): read_cells(tmp_path / "broken.ipynb")
    assert find_exercises(read_cells(path))[0].solution == 2
