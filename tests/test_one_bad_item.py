"""One bad item ends nothing: it is named and set aside, and the rest goes on."""
import io, json

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image
from rich.console import Console

from mlcourse import assets, exercises, instruct, run, vram
from mlcourse.chat_data import read_pairs
from mlcourse.files import digest, read_json, write_json
from mlcourse.label_formats import read_labels
from mlcourse.labels import price_list
from mlcourse.train import Flags, resume_from

GOOD = '{"messages":[{"role":"user","content":"q %d"},{"role":"assistant","content":"a %d"}]}'
TURNS = '"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a"}]'
ROWS = ['{"messages":[{"role":"user","content":"\\ud800"},{"role":"assistant","content":"a"}]}',
        '{"messages":' + "[" * 100_000, '{%s,"entities":5}' % TURNS, '{"messages":null}',
        '{%s,"entities":[{"a":1}]}' % TURNS, '{%s,"source":{"a":"\\udfff"}}' % TURNS,
        '{%s,"system":"\\ud800"}' % TURNS, "9" * 5000, "NaN", "null", "\ufeff{}",
        '{"instruction":"a","output":"b","history":[["\\ud800","x"]]}',
        '{"messages":[{"role":["a"],"content":"q"},{"role":"assistant","content":"a"}]}']


@pytest.mark.parametrize("bad", ROWS, ids=range(len(ROWS)))
def test_a_row(bad, tmp_path):
    path = tmp_path/"raw.jsonl"
    lines = [GOOD % (i, i) for i in range(20)] + [bad]
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    good, rejected = read_pairs(path)
    assert (len(good), [r.line for r in rejected]) == (20, [21]) and rejected[0].why
    report = instruct.prepare(path, tmp_path/"out")
    assert (report.read, report.rejected, report.train + report.dev) == (21, 1, 20)


def test_a_folder_of_labels(tmp_path):
    "Broken files and entries beside good ones of the same kind."
    def save(name, text): (tmp_path/name).write_text(text)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path/"a.png")
    picture, box = dict(id=1, file_name="a.png", width=8, height=8), dict(bbox=[1, 1, 2, 2])
    right = dict(box, id=1, image_id=1, category_id=1)
    odd = [5, None, dict(right, image_id=[1]), dict(right, category_id={}), dict(right, bbox="x"),
           dict(right, segmentation=7), dict(right, segmentation=dict(counts=3))]
    pictures = [picture, 7, {}, dict(id=2, file_name=None, width="wide", height=8)]
    save("good.json", json.dumps(dict(images=pictures, annotations=[right, *odd],
                                      categories=[dict(id=1, name="cat")])))
    save("cut.json", '{"images": [')
    save("deep.json", "[" * 100_000)
    save("odd.json", '{"images": 5}')
    (tmp_path/"latin.json").write_bytes(b'{"images": "\xff"}')
    tasks = [dict(data=dict(image="a.png", width=8, height=8), annotations=[]), 5, dict(data=[])]
    save("studio.json", json.dumps(tasks))
    data = read_labels(tmp_path)
    assert {p.file for p in data.pictures} == {"a.png"} and len(data.pictures) == 2
    assert {a.label for p in data.pictures for a in p.annotations} == {"cat"}
    told = " ".join(p.where for p in data.problems)
    assert all(f"{name}.json" in told for name in ("good", "cut", "deep", "odd", "latin", "studio"))


def test_an_xml_file_of_labels(tmp_path):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path/"a.png")
    whole = ("<annotation><filename>a.png</filename><object><name>cat</name><bndbox><xmin>1</xmin>"
             "<ymin>1</ymin><xmax>4</xmax><ymax>4</ymax></bndbox></object></annotation>")
    for name, text in (("a", whole), ("cut", whole[:40]), ("not", "\x00")):
        (tmp_path/f"{name}.xml").write_text(text)
    data = read_labels(tmp_path)
    assert len(data.pictures) == 1 and len(data.problems) == 2


def test_a_notebook_in_update(tmp_path):
    course, work = tmp_path/"course", tmp_path/"work"
    week = course/"nbs/week1"
    week.mkdir(parents=True)
    (course/"settings.ini").write_text("")
    for name in ("01_a", "02_b", "03_c"):
        nbformat.write(new_notebook(cells=[new_code_cell("1")]), week/f"{name}.ipynb")
    exercises.start(1, work, course)
    for name in ("01_a", "03_c"):
        nbformat.write(new_notebook(cells=[new_code_cell("2")]), week/f"{name}.ipynb")
    (week/"02_b.ipynb").write_text("{ cut")
    changes = exercises.update(work, course)
    assert [c.action for c in changes] == ["refreshed", "failed", "refreshed"]
    assert "not a notebook" in str(changes[1])
    nbformat.write(new_notebook(cells=[new_code_cell("3")]), week/"02_b.ipynb")
    (work/exercises.HIDDEN/"week1/02_b.ipynb").write_text("")   # a power cut
    assert [c.action for c in exercises.update(work, course)][1] in ("yours", "refreshed", "failed")


@pytest.mark.parametrize("text", ["", "{", "[]", "\0" * 9, "[" * 99_999, '{"a/b": null, "c": 5}'])
def test_a_file_of_progress(text, state):
    (state/"progress.json").write_text(text)
    exercises._store("a/b", "name")
    assert list(exercises.passed()) == ["a/b"]


@pytest.mark.parametrize("text", [
    "", "{", "[]", "\0" * 9, '{"notebooks": null}', '{"notebooks": [], "previous": [5]}',
    '{"notebooks": [{"path": ["x"], "status": "ok"}]}', '{"notebooks": [], "machine": null}',
    '{"notebooks": [], "machine": {"score": 5}}', '{"notebooks": [], "previous": null}'])
def test_a_report_of_an_earlier_run(text, tmp_path):
    (tmp_path/"report.json").write_text(text)
    for _ in range(2):   # and the next --resume, too
        console = Console(file=io.StringIO())
        run.CourseRun([], tmp_path, True, console, tier="tiny", jobs=1, parameters={}).go(1)
    assert json.loads((tmp_path/"report.json").read_text())["complete"]


def test_half_a_character_in_a_report(tmp_path):
    write_json(tmp_path/"a.json", dict(name="\udcc4.ipynb"))
    assert read_json(tmp_path/"a.json") == (dict(name="\udcc4.ipynb"), None)
    assert run.clean("no file \ud800").encode()


@pytest.mark.parametrize("text", ["", "{", "5", "[]"])
def test_the_note_of_a_training(text, tmp_path):
    (tmp_path/"data.jsonl").write_text(GOOD % (1, 1))
    (tmp_path/"run.json").write_text(text)
    (tmp_path/"checkpoint-2").mkdir()
    (tmp_path/"checkpoint-2/manifest.json").write_text(text)
    flags = Flags("m", str(tmp_path/"data.jsonl"), str(tmp_path), resume=True)
    assert resume_from(flags) is None and resume_from(flags) is None


def test_a_note_in_the_cache(cache):
    import hashlib
    asset = assets.Asset("x", "url", "none", "a test", "x.txt", url="http://127.0.0.1:9/x", size=3,
                         sha256=hashlib.sha256(b"abc").hexdigest())
    cache.mkdir()
    (cache/"x.txt").write_text("abc")
    (cache/"x.txt.ok").write_bytes(b"\xff\xfe")
    assert digest(assets.fetch(asset)) == asset.sha256


def test_a_trace_in_the_cache(tmp_path, cache):
    shape = dict(model_type="llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                 num_attention_heads=2, num_key_value_heads=1, vocab_size=512)
    write_json(tmp_path/"config.json", shape)
    plan = vram.Plan(str(tmp_path), seq=32)
    first = len(vram.traced(plan).events)
    for data in (b"", b"PK\x03\x04 cut"):
        for file in (cache/"vram").glob("*.npz"): file.write_bytes(data)
        vram._trace_of.cache_clear()
        assert len(vram.traced(plan).events) == first


def test_a_table_of_prices(tmp_path, monkeypatch):
    from mlcourse import labels
    row = dict(fault="none", rate=0.0, seed=0, broken=0, map50=.5, map50_95=.3, recall=.9)
    monkeypatch.setattr(labels, "price", lambda fault, rate, seed, folder: row | dict(seed=seed))
    (tmp_path/"t.csv").write_bytes(b"fault,rate,seed,broken,map50,map50_95,recall\n"
                                   b"none,0.0,0,0,0.5,0.3,0.9\nnone,0.0,1,0,0.\xff")
    assert len(price_list(tmp_path/"t.csv", [("", 0.0, 0), ("", 0.0, 1)])) == 2


@pytest.mark.slow
def test_a_checkpoint_of_a_detector(tmp_path):
    from mlcourse.worlds import HARD, NEW_SHAPES, shapes
    from mlcourse.yolo import make_yolo, train_yolo, write_yolo
    some = shapes(4, HARD, seed=0)
    data = write_yolo(dict(train=some, val=some), tmp_path/"set", NEW_SHAPES)
    weights = tmp_path/"run/weights"
    weights.mkdir(parents=True)
    (weights/"resume.pt").write_bytes(b"")
    train_yolo(make_yolo(NEW_SHAPES), data, tmp_path/"run", 1, resume=True, imgsz=32, batch=4)
    assert (weights/"resume.pt").stat().st_size > 10**5 and (weights/"resume.bad.pt").exists()
