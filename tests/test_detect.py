"""The detector's command: what it refuses, a killed run as a process; Ultralytics is quiet."""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pandas as pd
import pytest
import yaml

from mlcourse.assets import ASSETS, verify
from mlcourse.cli import main
from mlcourse.detect import training_lists
from mlcourse.files import UsageError
from mlcourse.standins import standins
from mlcourse.worlds import HARD, NEW_SHAPES, shapes
from mlcourse.yolo import write_yolo

MLCOURSE = [sys.executable, "-c", "from mlcourse.cli import main; raise SystemExit(main())"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    world = replace(HARD, labels=NEW_SHAPES, clutter=(0, 0))
    some = shapes(24, world, seed=3)
    folder = tmp_path_factory.mktemp("我的 data")
    return write_yolo(dict(train=some[:16], val=some[16:]), folder, NEW_SHAPES)


def run(*args):
    command = [*MLCOURSE, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def refused(*args):
    "What it says; it ends with 2, in a sentence."
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = main(["train-detector", *map(str, args)])
    assert code == 2 and "Traceback" not in said.getvalue(), said.getvalue()
    return said.getvalue()


def test_missing_yaml(tmp_path): assert "There is no" in refused(tmp_path / "none.yaml")


def test_no_pictures(tmp_path):
    (tmp_path / "data.yaml").write_text("names: [a]\ntrain: images/train\nval: images/val\n")
    assert "train has 0 pictures" in refused(tmp_path / "data.yaml")


def test_the_data_yaml_is_not_written_over(data, tmp_path):
    before = data.read_bytes()
    said = refused(data, "--output_dir", data.parent)
    assert "would be overwritten" in said and data.read_bytes() == before
    (tmp_path / "notes.md").write_text("mine")
    with pytest.raises(UsageError, match="holds something else"):
        write_yolo({}, tmp_path, NEW_SHAPES)
    assert (tmp_path / "notes.md").read_text() == "mine"


def test_class_beyond_names(data, tmp_path):
    about = yaml.safe_load(data.read_text("utf-8"))
    about |= {"path": str(data.parent), "names": ["heart"]}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(about, allow_unicode=True), "utf-8")
    said = refused(tmp_path / "data.yaml")
    assert "line" in said and "there is no class" in said


def test_pixels_instead_of_shares(data, tmp_path):
    shutil.copytree(data.parent, tmp_path / "copy")
    about = yaml.safe_load(data.read_text("utf-8")) | {"path": str(tmp_path / "copy")}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(about, allow_unicode=True), "utf-8")
    (tmp_path / "copy/labels/train/00002.txt").write_text("0 40 30 20 20\n")
    assert "00002.txt, line 1: this box of heart needs shares" in refused(tmp_path / "data.yaml")
    shutil.rmtree(tmp_path / "copy/labels/train")
    assert "train has 16 pictures, none with" in refused(tmp_path / "data.yaml")


def test_bad_flags(data):
    assert "multiple of 32" in refused(data, "--imgsz", 100)
    assert "at least 1" in refused(data, "--epochs", 0)


def test_paths_of_another_machine(data, tmp_path):
    "As Roboflow writes them, and Windows; the lists name every picture whole."
    about = yaml.safe_load(data.read_text("utf-8"))
    for train in ("../images/train", r"D:\my set\images\train"):
        other = data.with_name("other.yaml")
        other.write_text(yaml.safe_dump(about | dict(train=train), allow_unicode=True), "utf-8")
        whole = training_lists(other, tmp_path / "run")
        assert yaml.safe_load(whole.read_text("utf-8"))["names"] == list(NEW_SHAPES)
        lines = (tmp_path / "run/train.txt").read_text("utf-8").splitlines()
        assert len(lines) == 16 and all(os.path.isfile(p) and os.path.isabs(p) for p in lines)


def test_unknown_standin():
    done = run("standins", "rebuild", "nobody")
    assert done.returncode == 2 and "yolov8n-shapes" in done.stderr


@pytest.mark.parametrize("name", [*standins()])
def test_shipped_files(name): assert verify(name).stat().st_size == ASSETS[name].size


QUIET = """
import socket, sys
def refuse(*args, **kwargs): raise AssertionError(f"the network was asked: {args}")
socket.getaddrinfo = socket.socket.connect = refuse
from mlcourse.worlds import shapes
from mlcourse.yolo import find_objects, open_yolo
print(len(find_objects(open_yolo("yolov8n-shapes"), [p.pixels for p in shapes(2)])))
"""

def test_quiet(tmp_path):
    env = os.environ | dict(HOME=str(tmp_path / "home"), MLCOURSE_CACHE=str(tmp_path / "cache"))
    env = {k: v for k, v in env.items() if not k.startswith(("YOLO", "XDG"))}
    (tmp_path / "home").mkdir()
    done = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True, env=env,
                          cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stdout + done.stderr
    assert not [p for p in (tmp_path / "home").rglob("*") if "ltralytics" in p.name]
    assert (tmp_path / "cache/ultralytics/Ultralytics/settings.json").is_file()


@pytest.mark.slow
def test_killed_and_resumed(data, tmp_path):
    out = tmp_path / "结果 run"
    flags = ["train-detector", data, "--epochs", 6, "--output_dir", out, "--tier", "tiny",
             "--resume"]
    first = subprocess.Popen([*MLCOURSE, *map(str, flags)], start_new_session=True)
    log, deadline = out / "train/results.csv", time.time() + 240
    def lines(): return len(log.read_text().splitlines()) if log.is_file() else 0
    while time.time() < deadline and lines() < 3: time.sleep(.02)
    os.killpg(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    seen = len(pd.read_csv(log))
    assert 2 <= seen < 6
    done = run(*flags)
    assert done.returncode == 0, done.stderr
    epochs = pd.read_csv(log)["epoch"].tolist()
    assert epochs[-1] == 6 and epochs.count(1) == 1 and len(epochs) <= 7   # one may be done again
    assert (out / "detector.safetensors").stat().st_size < 7e6
    again = run(*flags)   # it is done: only read
    assert again.returncode == 0 and pd.read_csv(log)["epoch"].tolist() == epochs
