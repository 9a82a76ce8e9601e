"""`mlcourse run` as a process: killed and resumed, interrupted, timed out, refused, out of disk."""
import json, os, resource, signal, subprocess, sys, time
from pathlib import Path

import nbformat, psutil, pytest
from filelock import FileLock
from nbformat.v4 import new_code_cell, new_notebook

CLI = [sys.executable, "-m", "mlcourse.cli", "run"]
SLEEP = "import time; time.sleep(600)"
LEFT_CHILD = ("import pathlib, subprocess", "child = subprocess.Popen(['sleep', '600'])",
              "def note(p, name): pathlib.Path(name).write_text(str(p.pid))")
NOTE_PID = "import os, pathlib; pathlib.Path('pid').write_text(str(os.getpid()))"


PARAMS = 'tier = "auto"\nsteps = 3'

def write(folder: Path, name: str, *sources: str, params: str | None = PARAMS) -> Path:
    "A notebook with a parameters cell, if there is to be one, and a code cell for each source."
    cells = [] if params is None else [new_code_cell(params, metadata={"tags": ["parameters"]})]
    file = folder / f"{name}.ipynb"
    file.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells + [new_code_cell(s) for s in sources]), file)
    return file


@pytest.fixture
def start(tmp_path, environment):
    "Start the command in the test's folder; whatever is left of it is ended afterwards."
    started = []

    def start(*args, env=(), **kwargs) -> subprocess.Popen:
        process = subprocess.Popen([*CLI, *map(str, args)], cwd=tmp_path, text=True,
                                   env=environment | dict(env), stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, **kwargs)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None: process.kill()
        process.communicate()


@pytest.fixture
def run(start):
    "Run the command to its end: exit code, standard output, standard error."
    def run(*args, **kwargs) -> tuple[int, str, str]:
        process = start(*args, **kwargs)
        out, err = process.communicate(timeout=120)
        assert "Traceback" not in out + err, err
        return process.returncode, out, err
    return run


def until(true, seconds=60, what="it"):
    "Wait for a condition."
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"{what} did not happen in {seconds} s"
        time.sleep(0.1)


def gone(pid: int) -> bool:
    "Has the process ended?"
    try: return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess: return True


def pid_in(file: Path) -> int:
    "The process id that a notebook wrote."
    until(lambda: file.exists() and file.read_text().strip(), what=f"{file.name} written")
    return int(file.read_text())


def report(out: Path) -> dict: return json.loads((out / "report.json").read_text())


def statuses(out: Path) -> list[str]: return [r["status"] for r in report(out)["notebooks"]]


@pytest.mark.slow
def test_kill_9_half_way_then_resume(tmp_path, start, run):
    log = "open('log', 'a').write('{} ')"
    write(tmp_path, "nb/01_a", log.format("a"))
    write(tmp_path, "nb/02_b", log.format("b"), NOTE_PID, f"if not os.path.exists('go'): {SLEEP}")
    write(tmp_path, "nb/03_c", log.format("c"))
    runner, out = start("nb", "--out", "out"), tmp_path / "out"
    kernel = pid_in(tmp_path / "nb/pid")
    runner.kill()
    runner.wait(timeout=10)
    assert statuses(out) == ["ok", "skipped", "skipped"] and not report(out)["complete"]
    assert "1 of 3 notebooks ok, 2 did not run" in (out / "report.md").read_text()
    assert (out / "nb/01_a.ipynb").exists() and not (out / "nb/02_b.ipynb").exists()
    until(lambda: gone(kernel), 15, "the end of the orphaned kernel")

    (tmp_path / "nb/go").touch()
    before = (out / "nb/01_a.ipynb").stat().st_mtime_ns
    code, said, err = run("nb", "--out", "out", "--resume")
    assert (code, err, statuses(out)) == (0, "", ["ok", "ok", "ok"]), said
    assert (tmp_path / "nb/log").read_text() == "a b b c "
    assert [r.get("resumed", False) for r in report(out)["notebooks"]] == [True, False, False]
    assert (out / "nb/01_a.ipynb").stat().st_mtime_ns == before and "kept: 1 of 3" in said
    assert not list(out.rglob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(tmp_path, start, number):
    write(tmp_path, "01_a", NOTE_PID, *LEFT_CHILD, "note(child, 'child')", SLEEP)
    write(tmp_path, "02_b", "open('never', 'w')")
    # A shell's background jobs ignore Ctrl-C, and their children inherit that.
    def heard(): signal.signal(signal.SIGINT, signal.SIG_DFL)
    runner = start("01_a.ipynb", "02_b.ipynb", "--out", "out", preexec_fn=heard)
    kernel, child = pid_in(tmp_path / "pid"), pid_in(tmp_path / "child")
    runner.send_signal(number)
    out, err = runner.communicate(timeout=30)
    assert runner.returncode == 128 + number and "--resume" in err and "Traceback" not in out + err
    assert statuses(tmp_path / "out") == ["skipped", "skipped"]
    assert not (tmp_path / "never").exists()
    assert gone(kernel) and gone(child)


@pytest.mark.slow
def test_timeout_kills_the_group_while_another_goes_on(tmp_path, run):
    write(tmp_path, "nb/01_hangs", *LEFT_CHILD,
          "far = subprocess.Popen(['sleep', '600'], start_new_session=True)",
          "note(child, 'child'), note(far, 'far')", SLEEP)
    write(tmp_path, "nb/02_quick", "from mlcourse.record import record",
          "record('steps_seen', steps, at_least=7)")
    write(tmp_path, "nb/03_leaves", "import sys", "sys.exit()", "1 / 0")
    code, out, err = run("nb", "--out", "out", "--jobs", 2, "--timeout", 12, "-p", "steps=7")
    rows = report(tmp_path / "out")["notebooks"]
    assert (code, [r["status"] for r in rows]) == (1, ["timeout", "ok", "failed"]), out + err
    in_order = ["nb/01_hangs.ipynb", "nb/02_quick.ipynb", "nb/03_leaves.ipynb"]
    assert [r["path"] for r in rows] == in_order, "course order, not the order of ending"
    assert gone(pid_in(tmp_path / "nb/child")) and gone(pid_in(tmp_path / "nb/far"))
    assert rows[0]["error"]["cell"] == 6 and rows[0]["error"]["type"] == "Timeout"
    assert 12 <= rows[0]["seconds"] < 25
    seen = {"value": 7.0, "at_least": 7, "at_most": None, "ok": True}
    assert rows[1]["metrics"] == {"steps_seen": seen}
    assert rows[1]["peak_rss_mb"] > 10 and rows[1]["peak_vram_mb"] is None
    assert rows[2]["error"]["type"] == "SystemExit" and rows[2]["error"]["cell"] == 2
    assert "1 of 3 notebooks ok, 1 failed, 1 timed out" in out
    assert out.index("[1/3] nb/01_hangs.ipynb …") < out.index("ok  nb/02_quick.ipynb")
    killed = nbformat.read(tmp_path / "out/nb/01_hangs.ipynb", as_version=4)
    assert "ran past its limit" in killed.cells[-1].outputs[-1].text


@pytest.mark.slow
def test_one_notebook_that_cannot_be_read_does_not_stop_the_others(tmp_path, run):
    "As programs and power cuts leave them: completed where that can be done, else named."
    write(tmp_path, "nb/01_good", "1 + 1")
    odd = json.loads((tmp_path / "nb/01_good.ipynb").read_text())
    params, code = odd["cells"]
    makes = dict(no_metadata=[params, dict(cell_type="markdown", source="x"), code],
                 null_tags=[params, {**code, "metadata": dict(tags=None)}],
                 null_metadata=[params, {**code, "metadata": None}],
                 no_source=[params, dict(cell_type="code", metadata={})],
                 no_type=[params, dict(source="1", metadata={})])
    for name, cells in makes.items():
        (tmp_path / f"nb/02_{name}.ipynb").write_text(json.dumps({**odd, "cells": cells}))
    (tmp_path / "nb/03_cut.ipynb").write_text('{"cells": [')
    (tmp_path / "nb/04_empty.ipynb").write_text("")
    code, out, err = run("nb", "--out", "out")
    rows = {Path(r["path"]).stem: r for r in report(tmp_path / "out")["notebooks"]}
    bad = {name for name, r in rows.items() if r["status"] != "ok"}
    assert (code, bad) == (1, {"02_no_type", "03_cut", "04_empty"}), out + err
    assert all("not a notebook that can be read" in rows[n]["error"]["message"] for n in bad)
    assert run("nb/03_cut.ipynb", "--out", "out")[0] == 2


@pytest.mark.slow
def test_a_flood_of_output_loses_no_metric(tmp_path, run):
    "Messages of a kernel that prints fast are dropped; what was recorded is not."
    write(tmp_path, "nb/01_flood", "import sys\nfrom mlcourse.record import record",
          "for i in range(200_000):\n    print(f'{i} ' * 20)\n"
          "    if i % 10 == 0: sys.stdout.flush()\n"
          "    if i % 20_000 == 0: record(f'at_{i}', i, at_least=0)\nimport time; time.sleep(2)",
          "record('last', 1)")
    code, out, err = run("nb", "--out", "out")
    row = report(tmp_path / "out")["notebooks"][0]
    assert (code, row["status"], len(row["metrics"])) == (0, "ok", 11), out + err
    assert row["metrics"]["at_180000"]["ok"]
    assert (tmp_path / "out/nb/01_flood.ipynb").stat().st_size < 2e6


@pytest.mark.slow
def test_a_flood_of_pictures_loses_none(tmp_path, run):
    "More messages than a line holds make the kernel wait; the cell's end is never among the lost."
    write(tmp_path, "nb/01_shows", "from IPython.display import HTML, display\n"
          "from mlcourse.record import record\n"
          "for i in range(4_000): display(HTML(f'<b>{i}</b>'))\nrecord('middle', 1)",
          "record('last', 1)")
    code, out, err = run("nb", "--out", "out")
    row = report(tmp_path / "out")["notebooks"][0]
    assert (code, row["status"], [*row["metrics"]]) == (0, "ok", ["middle", "last"]), out + err
    cells = nbformat.read(tmp_path / "out/nb/01_shows.ipynb", as_version=4).cells
    shown = [o.get("data", {}) for c in cells if c.cell_type == "code" for o in c.outputs]
    assert sum("<b>" in data.get("text/html", "") for data in shown) == 4_000
    assert row["seconds"] < 50   # 60 is how long the runner waits for a message that is lost


@pytest.mark.slow
def test_kernel_is_ours_and_clean(tmp_path, run):
    "The running Python whatever kernels there are, its own environment, and nothing left behind."
    spec = tmp_path / "share/kernels/python3/kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps(dict(argv=["/bin/false"], display_name="wrong", language="python")))
    smi = tmp_path / "bin/nvidia-smi"   # a card, so that torch is asked for its memory
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho 'NVIDIA GeForce RTX 4070 Ti, 12282, 11034, 580.95'\n")
    smi.chmod(0o755)
    # This torch answers what a real one would.
    torch = """from types import SimpleNamespace as N
cuda = N(is_initialized=lambda: True, device_count=lambda: 2, max_memory_reserved=lambda n: peak)
peak, sys.modules['torch'] = 3 * 2**20, N(cuda=cuda)"""
    (tmp_path / "settings.ini").touch()
    mine = f"""import os, sys, subprocess, pathlib
assert sys.executable == {sys.executable!r}
assert 'MLCOURSE_TIER' not in os.environ and tier == 'tiny' and os.environ['HF_HUB_OFFLINE'] == '1'
assert os.environ['MLCOURSE_OUT'] == {str(tmp_path / '_run/tiny/outputs')!r}
assert os.getcwd() == str(pathlib.Path({str(tmp_path)!r}) / FOLDER)
"""
    verify = "assert os.environ.get('MLCOURSE_EXERCISES') == EXPECTED"
    server = """p = subprocess.Popen(['sleep', '600'], start_new_session=True)
pathlib.Path('server').write_text(str(p.pid))"""
    ours = "FOLDER, EXPECTED = 'nbs/week1', 'verify'"
    write(tmp_path, "nbs/week1/01_a", ours, mine, verify, server, torch, "peak = 0")
    write(tmp_path, "work/week1/01_a", "FOLDER, EXPECTED = 'work/week1', None", mine, verify)
    env = dict(JUPYTER_PATH=str(tmp_path / "share"), MLCOURSE_TIER="12gb",
               MLCOURSE_EXERCISES="verify", PATH=f"{smi.parent}:{os.environ['PATH']}")
    code, out, err = run("nbs", "work", "-j2", env=env)
    rows = report(tmp_path / "_run/tiny")["notebooks"]
    assert (code, err) == (0, ""), out + err + json.dumps(rows, indent=1)
    assert [r["path"] for r in rows] == ["nbs/week1/01_a.ipynb", "work/week1/01_a.ipynb"]
    assert [r["peak_vram_mb"] for r in rows] == [6.0, None]
    assert gone(pid_in(tmp_path / "nbs/week1/server")), "a forgotten server ends with its notebook"


@pytest.mark.parametrize("args, says", [
    (["bare.ipynb"], "bare.ipynb has no cell tagged `parameters`"),
    (["good.ipynb", "bare.ipynb"], "bare.ipynb has no cell tagged `parameters`"),
    (["good.ipynb", "-p", "setps=3"],
     "No notebook here has a parameter or setting setps. Known: steps."),
    (["good.ipynb", "nowhere"], "There is nothing at nowhere."),
    (["good.ipynb", "--tier", "8gb"], "There is no tier '8gb'."),
    (["good.ipynb", "--out", "text.txt/out"], "text.txt/out cannot be written"),
    (["text.txt"], "text.txt is not a notebook"),
    ([], "There is no course in this folder."),
])
def test_refused_before_anything_runs(tmp_path, monkeypatch, args, says):
    from mlcourse.files import UsageError
    from mlcourse.run import parse_params, run_course
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "good", "open('ran', 'w')")
    write(tmp_path, "bare", "tier = 'auto'", params=None)
    (tmp_path / "text.txt").touch()
    paths = [a for a in args if a in ("bare.ipynb", "good.ipynb", "text.txt", "nowhere")]
    options = dict(zip(args, args[1:]))
    params = parse_params([options["-p"]] if "-p" in options else [])
    with pytest.raises(UsageError, match=says.replace(".", r"\.")):
        run_course(paths, options.get("--tier", "tiny"), options.get("--out", "out"), params=params)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_exit_code_2_and_one_sentence(tmp_path, run):
    write(tmp_path, "bare", "tier = 'auto'", params=None)
    write(tmp_path, "good", "open('ran', 'w')")
    code, out, err = run("good.ipynb", "bare.ipynb", "-p", "setps=3")
    assert (code, out, err.count("\n")) == (2, "", 1), (out, err)
    assert err.startswith("bare.ipynb has no cell tagged")
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_disk_full_and_two_at_once(tmp_path, run):
    write(tmp_path, "good", "1 + 1")
    def full(): resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
    code, out, err = run("good.ipynb", "--out", "out", preexec_fn=full)
    assert code == 1 and "could not be written: File too large" in err and err.count("\n") == 1
    assert not (tmp_path / "out/report.json").exists(), "half a report is none"
    with FileLock(tmp_path / "out/.run.lock"):
        code, out, err = run("good.ipynb", "--out", "out")
        assert code == 1 and "Another run is writing to" in err


@pytest.mark.slow
def test_widgets_lose_no_reply(tmp_path):
    "Every cell ends while a widget answers the kernel; a runner that waits to be told hangs."
    from mlcourse.run import run_course
    cell = "out = ipywidgets.Output()\nwith out:\n    out.clear_output(wait=True)\nout"
    file = write(tmp_path, "widgets", "import ipywidgets", *[cell] * 300)
    report = run_course([file], out=tmp_path / "out", timeout=200)
    assert report["notebooks"][0]["status"] == "ok"
