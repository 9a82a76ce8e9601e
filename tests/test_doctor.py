"""`mlcourse doctor` as a process: here, with a broken torch, offline, beside made-up drivers."""
import json
import os
import re
import stat
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CLI = [sys.executable, "-m", "mlcourse.cli", "doctor"]
CODE = """import sys
from mlcourse.doctor import main
sys.exit(main(json={json}, timeout={timeout}))"""
SMI = """#!/bin/sh
case "$*" in
  *query-gpu=name*) echo 'NVIDIA GeForce RTX 4070 Ti, 12282, 9000, {driver}';;
  *compute_cap*) echo '8.9';;
  *compute-apps*) echo '/usr/bin/firefox, 2210';;
esac
"""
TORCH = """__version__ = "{version}"
from types import SimpleNamespace as N
class version: cuda = {cuda}
class Tensor:
    def __matmul__(self, other): return self
    def sum(self): return 512.0
def ones(*shape, device=None): return Tensor()
def _init(): {init}
cuda = N(init=_init, is_available=lambda: {available}, get_device_capability=lambda: (8, 9))
"""
NO_DRIVER = "raise RuntimeError('The NVIDIA driver on your system is too old (found 12040).')"
ON_CARD = dict(version="2.15.0+cu132", cuda="'13.2'")
BROKEN = "raise ImportError('broken on purpose')"


def doctor(tmp_path, *, as_json=True, timeout=60, cli=False, **env):
    "The doctor with a clean environment: what it printed, its exit status, how long it took."
    left_out = ("MLCOURSE_TIER", "CUDA_VISIBLE_DEVICES", "HF_ENDPOINT", "HF_HUB_OFFLINE")
    clean = {k: v for k, v in os.environ.items() if k not in left_out}
    clean |= {"HF_HUB_OFFLINE": "1", "MLCOURSE_CACHE": str(tmp_path / "cache"), "COLUMNS": "120"}
    env["PYTHONPATH"] = os.pathsep.join([env.get("PYTHONPATH", ""), str(ROOT)]).strip(os.pathsep)
    command = [sys.executable, "-c", CODE.format(json=as_json, timeout=timeout)]
    if cli: command = CLI + ["--json"] * as_json
    start = time.monotonic()
    run = subprocess.run(command, env=clean | env, cwd=tmp_path, capture_output=True, text=True,
                         timeout=150)
    assert "Traceback" not in run.stdout + run.stderr, run.stderr
    said = json.loads(run.stdout) if as_json else run.stdout
    return said, run.returncode, time.monotonic() - start


def line(said, name):
    "The finding of that name."
    return next(f for f in said["findings"] if f["name"] == name)


def write(folder: Path, name: str, text: str) -> str:
    "Write an executable file; the folder as a string."
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o644 | stat.S_IXUSR)
    return str(folder)


def fake_torch(tmp_path, text):
    "A folder for PYTHONPATH in which `import torch` runs `text`."
    return write(tmp_path / "fake", "torch.py", text)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    "The report on this machine, as it is."
    return doctor(tmp_path_factory.mktemp("here"), timeout=120)


def test_this_machine_can_run_the_course(here):
    said, code, _ = here
    assert code == 0 and said["runs"] is True
    assert said["tier"] in ("tiny", "12gb", "16gb")
    assert line(said, "torch")["status"] == "ok" and line(said, "bitsandbytes")["status"] == "ok"


def test_every_line_has_a_status_and_a_remedy(here):
    said, _, _ = here
    names = [f["name"] for f in said["findings"]]
    assert {"Python", "system", "memory", "disk", "driver", "torch", "bitsandbytes", "attention",
            "model hub"} <= set(names)
    assert len(names) == len(set(names))
    for f in said["findings"]:
        assert f["status"] in ("ok", "warning", "fault") and f["saw"]
        assert f["status"] == "ok" or f["remedy"], f"{f['name']} has no remedy"


def test_offline_is_a_warning_and_asks_nobody(here):
    found = line(here[0], "model hub")
    assert found["status"] == "warning" and "HF_HUB_OFFLINE" in found["saw"]


@pytest.mark.parametrize("text, words", [
    ("raise ImportError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by signal 11"),
    ("import sys; sys.exit(0)", "SystemExit"),
    ("import os; os._exit(0)", "ended with status 0"),
    ("", "has no attribute"),
], ids=["import error", "segmentation fault", "exit", "hard exit", "empty module"])
def test_broken_torch_is_a_finding(tmp_path, text, words):
    said, code, _ = doctor(tmp_path, PYTHONPATH=fake_torch(tmp_path, text))
    found = line(said, "torch")
    assert (found["status"], found["vital"], code, said["runs"]) == ("fault", True, 1, False)
    assert words in found["saw"] and "uv sync" in found["remedy"]
    assert line(said, "bitsandbytes")["status"] == "warning"


def test_hanging_torch_is_a_finding_in_time_and_leaves_no_process(tmp_path):
    pid = tmp_path / "pid"
    text = f"""import subprocess, time
p = subprocess.Popen(['sleep', '300'])
open({str(pid)!r}, 'w').write(str(p.pid))
time.sleep(300)"""
    said, code, seconds = doctor(tmp_path, timeout=5, PYTHONPATH=fake_torch(tmp_path, text))
    assert "no answer within 5 s" in line(said, "torch")["saw"] and code == 1 and seconds < 30
    state = Path(f"/proc/{pid.read_text()}/stat")
    assert not state.exists() or state.read_text().split(") ")[1][0] == "Z"


def test_crash_of_bitsandbytes_leaves_torchs_word(tmp_path):
    torch = TORCH.format(version="2.15.0", cuda="'13.2'", init=NO_DRIVER, available=False)
    path = fake_torch(tmp_path, torch)
    write(tmp_path / "fake", "bitsandbytes.py", "import os; os.abort()")
    said, code, _ = doctor(tmp_path, PYTHONPATH=path)
    assert line(said, "torch")["status"] == "ok" and code == 0
    found = line(said, "bitsandbytes")
    assert found["status"] == "fault" and "signal 6" in found["saw"]


def test_healthy_card(tmp_path):
    path = fake_torch(tmp_path, TORCH.format(**ON_CARD, init="pass", available=True))
    smi = write(tmp_path / "bin", "nvidia-smi", SMI.format(driver="580.95.05"))
    said, code, _ = doctor(tmp_path, PYTHONPATH=path, PATH=smi + os.pathsep + os.environ["PATH"])
    assert (code, said["tier"]) == (0, "12gb")
    names = ("driver", "card", "arithmetic", "torch on the card")
    assert [line(said, n)["status"] for n in names] == ["ok", "warning", "ok", "ok"]
    assert "firefox (2,210)" in line(said, "card")["saw"]
    assert "bf16" in line(said, "arithmetic")["saw"]
    for bits, verdict in ((4.5, "yes"), (16, "no")):
        rows = [r for r in said["fits"] if (r["model"], r["bits"]) == ("Llama-3.1-8B", bits)]
        assert [r["verdict"] for r in rows] == [verdict]


def test_old_driver_names_the_remedy_and_falls_back_to_tiny(tmp_path):
    path = fake_torch(tmp_path, TORCH.format(**ON_CARD, init=NO_DRIVER, available=False))
    smi = write(tmp_path / "bin", "nvidia-smi", SMI.format(driver="552.44"))
    said, code, _ = doctor(tmp_path, PYTHONPATH=path, PATH=smi + os.pathsep + os.environ["PATH"])
    assert (code, said["tier"], said["fits"]) == (0, "tiny", [])
    assert line(said, "driver")["status"] == "fault" and "580" in line(said, "driver")["saw"]
    assert "MLCOURSE_TIER=tiny" in line(said, "torch on the card")["remedy"]


def test_cpu_build_beside_a_card(tmp_path):
    no_cuda = TORCH.format(version="2.13.0+cpu", cuda=None, init="raise AssertionError('no CUDA')",
                           available=False)
    path = fake_torch(tmp_path, no_cuda)
    smi = write(tmp_path / "bin", "nvidia-smi", SMI.format(driver="580.95"))
    said, _, _ = doctor(tmp_path, PYTHONPATH=path, PATH=smi + os.pathsep + os.environ["PATH"])
    assert "processor only" in line(said, "torch on the card")["saw"] and said["tier"] == "tiny"


def test_broken_driver_says_what_nvidia_smi_said(tmp_path):
    path = fake_torch(tmp_path, "raise ImportError('not now')")
    text = "#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'\nexit 18\n"
    smi = write(tmp_path / "bin", "nvidia-smi", text)
    said, _, _ = doctor(tmp_path, PYTHONPATH=path, PATH=smi + os.pathsep + os.environ["PATH"])
    found = line(said, "driver")
    assert "version mismatch" in found["saw"] and "restart" in found["remedy"]


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://nowhere.invalid", "not a url"])
def test_unreachable_hub_is_a_warning_in_time(tmp_path, endpoint):
    said, _, seconds = doctor(tmp_path, PYTHONPATH=fake_torch(tmp_path, BROKEN),
                              HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="",
                              NO_PROXY="nowhere.invalid")
    found = line(said, "model hub")
    assert found["status"] == "warning" and "out of reach" in found["saw"]
    assert seconds < 20


def test_table_for_people(tmp_path):
    text, code, _ = doctor(tmp_path, as_json=False, PYTHONPATH=fake_torch(tmp_path, BROKEN))
    assert code == 1 and "✗ fault" in text and "broken on purpose" in text
    assert "cannot run here yet. First mend: torch." in re.sub(r"\s+", " ", text)
    assert "\x1b" not in text   # no colour codes in a pipe


def test_import_is_light():
    heavy = {"torch", "transformers", "httpx", "rich"}
    code = f"import sys, mlcourse.doctor; print(sorted({heavy} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_command(tmp_path):
    said, code, _ = doctor(tmp_path, cli=True, PYTHONPATH=fake_torch(tmp_path, BROKEN))
    assert code == 1 and line(said, "torch")["status"] == "fault"


def test_make_gpu_takes_the_locked_version_from_the_authors_index():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = text.split("\ngpu: setup")[1].split("\n\n")[0]
    assert "--no-deps --reinstall --index-url $(XLLAMACPP_CUDA)" in recipe
    assert '"xllamacpp==$$version"' in recipe
    assert "sync --locked --inexact" in text   # or the next setup would undo it


def test_llama_cpp_says_what_it_calculates_on(here):
    found = line(here[0], "llama.cpp")
    assert "xllamacpp 20" in found["saw"] and found["status"] in ("ok", "warning")


def test_the_front_page_and_the_doctor_agree_on_the_disk():
    from mlcourse.assets import disk_needed
    from mlcourse.doctor import WRITTEN_GB
    said = int(re.search(r"some (\d+) GB more", (ROOT / "README.md").read_text("utf-8"))[1])
    assert abs(said - disk_needed() / 1e9 - WRITTEN_GB) < 5


# ---------------------------------------------------------------- the build with CUDA

@pytest.fixture
def make_gpu(tmp_path):
    "`make gpu` in a folder that is set up, with a uv that writes down what it is told."
    def run(code):
        (tmp_path/"Makefile").write_text((ROOT/"Makefile").read_text(encoding="utf-8"))
        for name in ("uv.lock", "pyproject.toml", "settings.ini", "setup.py"):
            (tmp_path/name).touch()
        uv = f'[ "$1" = --version ] && echo "uv 99.0.0" && exit; echo "$@" >> told; exit {code}'
        python = f'PYTHONPATH="{ROOT}" exec "{sys.executable}" "$@"'
        for path, line in {"bin/uv": uv, ".venv/bin/python": python}.items():
            (tmp_path/path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path/path).write_text(f"#!/bin/sh\n{line}\n")
            (tmp_path/path).chmod(0o755)
        (tmp_path/".venv/.mlcourse-synced").write_text(f"{tmp_path.resolve()}\n")
        env = {"PATH": f"{tmp_path/'bin'}:{os.environ['PATH']}", "CI": "1", "HOME": str(tmp_path)}
        done = subprocess.run(["make", "gpu"], cwd=tmp_path, env=env, capture_output=True,
                              text=True)
        return done, (tmp_path/"told").read_text().splitlines()
    return run


def test_make_gpu_asks_for_the_same_version_built_for_cuda(make_gpu):
    "And says which devices llama.cpp sees with it."
    done, told = make_gpu(0)
    assert done.returncode == 0, done.stdout + done.stderr
    installed = version("xllamacpp").split("+")[0]
    assert told == ["pip install --python .venv/bin/python --no-deps --reinstall --index-url "
                    f"https://xorbitsai.github.io/xllamacpp/whl/cu132 xllamacpp=={installed}"]
    assert done.stdout.splitlines()[-1].startswith("llama.cpp: ")


def test_make_gpu_fails_where_the_index_gives_nothing(make_gpu):
    "Then nothing is said of devices: the build for processors is still there."
    done, told = make_gpu(1)
    assert done.returncode != 0 and len(told) == 1 and "llama.cpp" not in done.stdout
