"""The receipt as a process, and the detector's service: what they answer, and what they refuse.

The models are written by hand in ONNX's text form, so nothing is
trained. Slow tests start processes.
"""
from __future__ import annotations

import io, json, os, signal, subprocess, sys, time

import httpx
import numpy as np
import onnx
import pytest
from fastapi.testclient import TestClient
from onnx.parser import parse_model
from PIL import Image

from mlcourse import deploy
from mlcourse.cli import main
from mlcourse.files import UsageError
from mlcourse.receipt import (ReceiptError, difference, open_session, random_inputs, receipt,
                              receipt_rows, speedup)

TWO_BOXES = [[30, 60, 30], [40, 70, 40], [20, 10, 20], [10, 20, 10],   # x, y, width, height
             [.9, 0, .8], [0, .6, 0]]                                  # two classes
NUMBERS = ", ".join(f"{float(v)}" for line in TWO_BOXES for v in line)
DETECTOR = f"""<ir_version: 8, opset_import: ["" : 18]>
net (float[batch, 3, h, w] images) => (float[batch, c, a] output0)
<float[1, 6, 3] boxes = {{{NUMBERS}}}, float[1] zero = {{0}}, int64[3] axes = {{1, 2, 3}},
 int64[1] last = {{3}}> {{
   mean = ReduceMean <keepdims = 1> (images, axes)
   flat = Squeeze(mean, last)
   nothing = Mul(flat, zero)
   output0 = Add(boxes, nothing)
}}"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "A detector that always finds two boxes, and overlaps a third; raw, and with its NMS."
    folder = tmp_path_factory.mktemp("模型 models")
    model = parse_model(DETECTOR)
    names = "{0: 'heart', 1: '箭头'}"
    for key, value in dict(names=names, imgsz="[96, 96]").items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, folder/"raw.onnx")
    deploy.add_nms(folder/"raw.onnx", folder/"detector.onnx")
    return folder


def png(width, height, colour="red", **options):
    Image.new("RGB", (width, height), colour).save(data := io.BytesIO(), "PNG", **options)
    return data.getvalue()


@pytest.fixture(scope="module")
def client(models):
    detector = deploy.Detector(models/"detector.onnx")
    return TestClient(deploy.detector_app(detector, max_mb=1), base_url="http://127.0.0.1")


def test_nms_inside_keeps_one_of_two(models):
    found = deploy.Detector(models/"detector.onnx")(np.zeros((96, 96, 3), np.uint8))
    assert [(f["label"], f["box"]) for f in found] == [("heart", [20, 35, 40, 45]),
                                                       ("箭头", [55, 60, 65, 80])]


def test_any_batch(models):
    session = open_session(models/"detector.onnx")
    for n in (1, 5):
        boxes, scores, which = session.run(None, {"images": np.zeros((n, 3, 96, 96), np.float32)})
        assert len(boxes) == len(scores) == 2 * n and set(which[:, 0]) == set(range(n))


def test_boxes_are_those_of_the_posted_picture(client):
    "Twice as wide as high, and larger than the model's square: boxes come back in its own pixels."
    answer = client.post("/detect", content=png(1920, 960)).json()
    assert (answer["width"], answer["height"]) == (1920, 960)
    assert answer["boxes"][0]["box"] == pytest.approx([400, 220, 800, 420], abs=2)


def test_sizes_are_those_of_the_file(client):
    "A height that does not divide, and a camera on its side: EXIF says a quarter turn."
    turn = Image.Exif()
    turn[274] = 6
    wide, turned = png(3000, 2000), png(3000, 2000, exif=turn)
    for data, width, height in ((wide, 3000, 2000), (turned, 2000, 3000)):
        answer = client.post("/detect", content=data).json()
        assert (answer["width"], answer["height"]) == (width, height)
        for b in answer["boxes"]: assert b["box"][2] <= width and b["box"][3] <= height


@pytest.mark.parametrize("data, status, words", [
    (b"", 422, "empty"), (b"a text\n", 422, "not a picture"),
    ("一段文字".encode(), 422, "not a picture"), (png(300, 300)[:150], 422, "cut short"),
    (b"\x89PNG\r\n\x1a\n" + bytes(40), 422, "cannot be used"),
    (bytes(1_000_001), 413, "at most 1 MB")])
def test_refusals_are_sentences(client, data, status, words):
    answer = client.post("/detect", content=data)
    assert answer.status_code == status and words in answer.json()["error"]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_not_unpacked(client):
    answer = client.post("/detect", content=png(12_000, 12_000, optimize=False))
    assert answer.status_code == 422 and "12000 by 12000 pixels" in answer.json()["error"]


def test_frames_and_strangers(client):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "green", "blue")]
    frames[0].save(data := io.BytesIO(), "GIF", save_all=True, append_images=frames[1:])
    assert "frames" in client.post("/detect", content=data.getvalue()).json()["error"]
    assert client.get("/", headers=dict(host="evil.example")).status_code == 400
    assert client.get("/detect").status_code == 405 and "<canvas" in client.get("/").text


def test_a_graph_without_nms_is_named(models):
    with pytest.raises(deploy.DeployError, match="add_nms"): deploy.Detector(models/"raw.onnx")
    with pytest.raises(deploy.DeployError, match="is no detector"):
        deploy.add_nms(models/"detector.onnx", models/"none.onnx")
    with pytest.raises(deploy.DeployError, match="no YOLOv8"):
        deploy.tail_of(onnx.load(models/"raw.onnx"))
    with pytest.raises(UsageError, match="no file"): deploy.add_nms(models/"no.onnx", "x.onnx")
    (models/"cut.onnx").write_bytes((models/"raw.onnx").read_bytes()[:99])
    with pytest.raises(ReceiptError, match="cut short"): deploy.Detector(models/"cut.onnx")


def test_only_squares(models):
    wide = onnx.load(models/"detector.onnx")
    next(p for p in wide.metadata_props if p.key == "imgsz").value = "[64, 96]"
    onnx.save(wide, models/"wide.onnx")
    with pytest.raises(deploy.DeployError, match="no squares"): deploy.Detector(models/"wide.onnx")


def test_open_dimensions(models):
    session = open_session(models/"raw.onnx")
    with pytest.raises(UsageError, match="Give sizes above 0 to h, w"): random_inputs(session)
    with pytest.raises(UsageError, match="are batch, h, w"):
        random_inputs(session, dict(x=1, h=2, w=2))
    assert random_inputs(session, dict(h=4, w=5), batch=2)["images"].shape == (2, 3, 4, 5)


def test_a_receipt_says_what_ran(models):
    r = receipt(models/"raw.onnx", dims=dict(h=8, w=8), runs=10, threads=1)
    said = dict(receipt_rows(r))
    assert said["ran on"].startswith("CPU 100%") and said["computed in"].startswith("float 100%")
    assert r["difference"]["largest"] == 0 and list(r["batches"]) == [1, 4, 16] and not r["faults"]
    json.dumps(r)   # every value is JSON's


def test_lost_numbers_are_a_fault(tmp_path):
    text = """<ir_version: 9, opset_import: ["" : 18]>
    g (float[2] x) => (float[2] y) { z = Neg(x) y = Log(z) }"""
    onnx.save(parse_model(text), tmp_path/"log.onnx")
    r = receipt(tmp_path/"log.onnx", runs=10, threads=1)
    assert r["faults"] == ["an output holds values that are no numbers"]


def test_differences():
    one = np.ones(3)
    assert difference([one], [one])["relative"] == 0
    assert difference([one * 2], [one * 4]) == dict(largest=2, relative=.5)
    assert difference([one[:2]], [one])["relative"] == float("inf")
    assert difference([one * np.nan], [one])["relative"] == float("inf")
    s = speedup(np.array([2., 2, 8, 2]), np.array([1., 1, 1, 1]))
    assert s["ratio"] == 2 and s["low"] <= 2 <= s["high"]


def command(environment, *args):
    done = subprocess.run([sys.executable, "-m", "mlcourse.cli", *map(str, args)], text=True,
                          capture_output=True, timeout=120, env=environment)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_the_command(models, environment):
    sizes = "--dim", "h=8", "--dim", "w=8"
    code, said, _ = command(environment, "receipt", models/"raw.onnx", *sizes, "--threads", 1)
    assert code == 0 and "computed in" in said and "p99" in said
    left = json.loads((models/"raw.receipt.json").read_text(encoding="utf-8"))
    assert left["fed"] == dict(images=[1, 3, 8, 8]) and not list(models.glob("*.part"))


@pytest.mark.parametrize("args, code, words", [
    (["no.onnx"], 2, "no file"), (["."], 2, "no file"),
    (["{}/text.onnx"], 1, "cannot be read as ONNX"),
    (["{}/raw.onnx"], 2, "--dim NAME=N"), (["{}/raw.onnx", "--dim", "h"], 2, "--dim such as"),
    (["{}/raw.onnx", "--provider", "npu"], 2, "cpu, cuda")])
def test_the_command_refuses(models, capsys, args, code, words):
    (models/"text.onnx").write_text("这不是模型")
    assert main(["receipt", *(a.format(models) for a in args)]) == code
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said, said


@pytest.mark.slow
def test_the_demo(models, environment):
    run = [sys.executable, "-m", "mlcourse.cli", "demo", "detector", str(models/"detector.onnx"),
           "--port", "0"]
    p = subprocess.Popen(run, stdout=subprocess.PIPE, text=True, env=environment,
                         start_new_session=True)
    try:
        url = p.stdout.readline().split(" is at ")[1].split()[0]
        with httpx.Client(trust_env=False, base_url=url) as client:
            for _ in range(50):
                try: answer = client.post("detect", content=png(96, 96)); break
                except httpx.ConnectError: time.sleep(.1)
            assert [b["label"] for b in answer.json()["boxes"]] == ["heart", "箭头"]
    finally:
        os.killpg(p.pid, signal.SIGINT)
        p.wait(20)
    code, _, said = command(environment, "demo", "detector", models/"raw.onnx")
    assert code == 1 and "add_nms" in said
