"""The `mlcourse` command as a process: exit codes, sentences instead of tracebacks, and what it does not import."""
import os, re, subprocess, sys

import nbformat, pytest

CLI = [sys.executable, "-m", "mlcourse.cli"]


@pytest.fixture
def mlcourse(tmp_path, environment):
    "Run the command to its end: exit code, standard output, standard error."
    def call(*args, code=None, **env) -> tuple[int, str, str]:
        command = [sys.executable, "-c", code, *args] if code else [*CLI, *args]
        done = subprocess.run(command, cwd=env.pop("cwd", tmp_path), env=environment | env, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout, done.stderr
    return call


def cpu_seconds(code: str) -> float:
    "The least processor time that a fresh Python needs for `code`, of five, without its own start."
    probe = f"import time; start = time.process_time()\n{code}\nprint(time.process_time() - start)"
    return min(float(subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout.split()[-1]) for _ in range(5))


def test_imports_are_light(mlcourse):
    assert cpu_seconds("import mlcourse") < 0.3
    code, out, err = mlcourse("--help", code="""
import sys
from mlcourse.cli import main
code = main(sys.argv[1:])
print(sorted({'torch', 'transformers', 'papermill', 'numpy', 'pandas', 'httpx', 'mlcourse.doctor'} & set(sys.modules)), code)""")
    assert out.endswith("[] 0\n") and err == "", out + err


def test_help_and_version(mlcourse, root):
    import mlcourse as package
    assert mlcourse("--version") == (0, f"mlcourse {package.__version__}\n", "")
    code, out, err = mlcourse()
    assert code == 0 and all(name in out for name in ("doctor", "run", "start", "update", "progress", "docs"))
    code, out, err = mlcourse("doctor", "--help")
    assert code == 0 and "--json" in out and "print the report as JSON" in out


@pytest.mark.parametrize("args, code, says", [
    (["rnu"], 2, "No such command 'rnu'. Did you mean 'run'? See `mlcourse --help`."),
    (["run", "--jbos", "2"], 2, "--jbos"),
    (["run", "--jobs", "two"], 2, "Invalid value for '--jobs'"),
    (["run", "-p", "steps"], 2, "given as -p name=value"),
    (["start"], 2, "See `mlcourse start --help`."),
    (["start", "99"], 1, "There is no week '99'"),
    (["update", "--work", "nothing"], 1, "mlcourse start 1"),
    (["docs", "--run-dir", "nothing"], 1, "nothing"),
])
def test_errors_are_sentences(mlcourse, root, tmp_path, args, code, says):
    got, out, err = mlcourse(*args, cwd=root if args[0] != "docs" else tmp_path)
    assert got == code and says in err and "Traceback" not in err and err.count("\n") == 1, err


def test_start_update_progress(mlcourse, root, tmp_path):
    work = str(tmp_path / "work")
    code, out, err = mlcourse("start", "1", "--work", work, cwd=root)
    assert (code, err) == (0, "") and "copied" in out and (tmp_path / "work/week1/03_hello_llm.ipynb").exists()
    code, out, err = mlcourse("update", "--work", work, cwd=root)
    assert code == 0 and "Everything is up to date." in out
    code, out, err = mlcourse("progress", "--work", work, cwd=root)
    assert code == 0 and re.search(r"0 of \d+ exercises passed", out) and "week1/03_hello_llm" in out


def test_a_lesson_adds_a_command_with_one_line(mlcourse, tmp_path):
    (tmp_path / "lesson.py").write_text('''
print("imported")
def plan(model:str,      # which model
         vram:int=12,    # memory of the card, GB
        ) -> int:
    "Predict the peak."
    print(f"{model} on {vram} GB")
    return 1 if vram < 12 else 0
''')
    code = "import sys; sys.path.insert(0, '.'); from mlcourse import cli; cli.LAZY['plan'] = ('lesson:plan', 'Does it fit?'); sys.exit(cli.main())"
    got, out, err = mlcourse("--help", code=code)
    assert got == 0 and "Does it fit?" in out and "imported" not in out
    assert mlcourse("plan", "llama", "--vram", "8", code=code) == (1, "imported\nllama on 8 GB\n", "")
    got, out, err = mlcourse("plan", "--help", code=code)
    assert "memory of the card, GB" in out and "which model" in out
    (tmp_path / "lesson.py").write_text("import package_that_is_not_here")
    got, out, err = mlcourse("plan", "llama", code=code)
    assert got == 1 and "needs the package package_that_is_not_here" in err and "Traceback" not in err


def test_our_own_mistakes(mlcourse, tmp_path):
    code = "import sys; from mlcourse import cli; cli.LAZY['boom'] = ('json:nothing', 'Breaks.'); sys.exit(cli.main())"
    got, out, err = mlcourse("boom", code=code, XDG_STATE_HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path))
    assert got == 1 and err.count("\n") == 1 and "should not have" in err and "Traceback" not in err
    saved = re.search(r"details are in (\S+);", err)[1]
    assert saved.startswith(str(tmp_path)) and "AttributeError" in open(saved).read()
    got, out, err = mlcourse("boom", code=code, MLCOURSE_DEBUG="1", XDG_STATE_HOME=str(tmp_path))
    assert got == 1 and "Traceback" in err


def test_reader_that_goes_away(tmp_path, environment):
    code = "for n in range(10000): print('a long line of text')"
    script = f"import sys; from mlcourse import cli; import mlcourse.site as s; s.build = lambda *a: exec({code!r}); sys.exit(cli.main(['docs']))"
    pipe = subprocess.run(["bash", "-c", f'"{sys.executable}" -c "$SCRIPT" | head -1'], env=environment | {"SCRIPT": script}, cwd=tmp_path,
                          capture_output=True, text=True, timeout=60)
    assert pipe.stdout == "a long line of text\n" and pipe.stderr == ""


def test_run_prints_the_card(mlcourse, tmp_path):
    from nbformat.v4 import new_code_cell, new_notebook
    cells = [new_code_cell('tier = "auto"', metadata={"tags": ["parameters"]}), new_code_cell("from mlcourse.record import record"),
             new_code_cell("record('answer', 42, at_least=40)")]
    nbformat.write(new_notebook(cells=cells), tmp_path / "a.ipynb")
    code, out, err = mlcourse("run", "a.ipynb", "--out", "out")
    assert (code, err) == (0, ""), out + err
    assert re.search(r"a\.ipynb +│ answer +│ +42 │ at least 40 │ ok", out) and "Tier tiny: 1 of 1 notebooks ok" in out
    assert f"The report is {tmp_path / 'out/report.md'}." in out and "\x1b" not in out
