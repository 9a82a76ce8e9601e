"""Labelled pictures: round trips, a validator that finds what was broken, Label Studio."""

import io, json, os, shutil, socket, subprocess, time, urllib.error, urllib.request, zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from mlcourse.cli import main
from mlcourse.files import UsageError
from mlcourse.label_checks import LabelWidget, check_labels, split_labels
from mlcourse.label_formats import (
    HOLDS,
    Annotation,
    Labelled,
    LabelSet,
    bounds,
    differences,
    from_pictures,
    read_labels,
    studio_tasks,
    write_labels,
)
from mlcourse.labels import FAULTS, inject, leak, make_set, overlap, recall, suspicious
from mlcourse.worlds import NEW_SHAPES, shapes

NAMES = ["cat", "猫 tom", "it's"]
coordinate = st.floats(0, 90, allow_nan=False)
spans = st.floats(1, 30)
boxes = st.tuples(coordinate, coordinate, spans, spans).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)
polygons = st.lists(st.tuples(coordinate, coordinate), min_size=3, max_size=8).map(tuple)
masks = st.binary(min_size=120, max_size=120).map(
    lambda b: np.frombuffer(b, np.uint8).reshape(10, 12) % 2 == 1
)
MAKE = {
    "box": lambda l: st.builds(Annotation, l, boxes),
    "rotated box": lambda l: st.builds(
        lambda l, b, r: Annotation(l, b, rotation=r), l, boxes, st.floats(1, 359)
    ),
    "polygon": lambda l: st.builds(lambda l, p: Annotation(l, bounds(p), (p,)), l, polygons),
    "several polygons": lambda l: st.builds(
        lambda l, p: Annotation(l, bounds(p[0] + p[1]), tuple(p)),
        l,
        st.lists(polygons, min_size=2, max_size=3),
    ),
    "mask": lambda l: st.builds(lambda l, m: Annotation(l, tight(m), mask=m), l, masks),
}


def tight(mask):
    from mlcourse.worlds import tight_box

    return tuple(map(float, tight_box(mask)))


@pytest.mark.parametrize("format", HOLDS)
def test_what_a_format_holds_comes_back_equal(format, tmp_path_factory):
    kinds = sorted(HOLDS[format])
    one = st.one_of([MAKE[k](st.sampled_from(NAMES)) for k in kinds])

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.lists(st.lists(one, max_size=4), min_size=1, max_size=3),
        st.lists(st.sampled_from(["train", "val"]), min_size=3),
    )
    def check(rows, splits):
        folder = tmp_path_factory.mktemp("set")
        pictures = []
        for k, (some, split) in enumerate(zip(rows, splits)):
            path = folder / "images" / split / f"夏 {k} a.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (12, 10)).save(path)
            pictures.append(Labelled(path.name, 12, 10, tuple(some), split, path))
        data = LabelSet(pictures, NAMES)
        assert write_labels(data, folder, format) == []
        back = read_labels(folder)
        assert not back.problems and differences(back, data, pixels=1e-6) == []

    check()


@pytest.mark.parametrize("format", HOLDS)
@pytest.mark.parametrize("kind", MAKE)
def test_nothing_is_lost_in_silence(format, kind, tmp_path):
    points = ((1.0, 1.0), (8.0, 1.0), (8.0, 7.0))
    mask = np.zeros((10, 12), bool)
    mask[2:5, 3:9] = True
    a = {
        "box": Annotation("cat", (1.0, 1.0, 5.0, 5.0)),
        "rotated box": Annotation("cat", (5.0, 1.0, 9.0, 5.0), rotation=30.0),
        "polygon": Annotation("cat", bounds(points), (points,)),
        "several polygons": Annotation("cat", bounds(points), (points, points[:2] + ((2.0, 6.0),))),
        "mask": Annotation("cat", tight(mask), mask=mask),
    }[kind]
    Image.new("RGB", (12, 10)).save(tmp_path / "a.png")
    data = LabelSet([Labelled("a.png", 12, 10, (a,), path=tmp_path / "a.png")], ["cat"])
    if kind in HOLDS[format]:
        return
    with pytest.raises(UsageError, match="cannot hold"):
        write_labels(data, tmp_path / "out", format)
    assert not (tmp_path / "out").exists()
    assert len(write_labels(data, tmp_path / "out", format, lossy=True)) == 1
    back = read_labels(tmp_path / "out").pictures[0].annotations
    assert len(back) == 1 and np.allclose(
        bounds([(back[0].box[:2]), back[0].box[2:]]),
        bounds(a.corners()) if a.rotation else a.box,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    "yaml",
    [
        "train: train/images\nval: valid/images",
        "train: ../train/images\nval: ../valid/images",
        "path: /content/drive/set\ntrain: train/images\nval: valid/images",
        "path: .\ntrain: [train/images]\nval: [valid/images]",
        "train: C:\\Users\\me\\set\\train\\images\nval: C:\\Users\\me\\set\\valid\\images",
        "path: ../set\ntrain: ./train/images\nval: valid/images",
        "train: train.txt\nval: valid/images",
        "path: set\ntrain: train/images/\nval: /content/data/set/valid/images",
    ],
)
@pytest.mark.parametrize(
    "names",
    ["names: [a, b]", "names: {0: a, 1: b}", "nc: 2\nnames:\n- a\n- b", "names: {1: b, 0: a}"],
)
def test_data_yaml_of_every_kind(yaml, names, tmp_path):
    root = tmp_path / "set"
    for split in ("train", "valid"):
        (root / split / "images").mkdir(parents=True)
        (root / split / "labels").mkdir()
        Image.new("RGB", (20, 10)).save(root / split / "images" / f"{split} 图.png")
        (root / split / "labels" / f"{split} 图.txt").write_text("1 .5 .5 .5 .5\n")
    (root / "train.txt").write_text("./train/images/train 图.png\n", "utf-8")
    (root / "data.yaml").write_text(f"{yaml}\n{names}\n", "utf-8")
    data = read_labels(root)
    assert not data.problems and data.names == ["a", "b"]
    assert [(p.split, p.annotations[0].label, p.annotations[0].box) for p in data.pictures] == [
        ("train", "b", (5, 2.5, 15, 7.5)),
        ("val", "b", (5, 2.5, 15, 7.5)),
    ]


def test_roboflow_coco(tmp_path):
    (tmp_path / "train").mkdir()
    Image.new("RGB", (20, 10)).save(tmp_path / "train" / "a_jpg.rf.0.jpg")
    (tmp_path / "train" / "_annotations.coco.json").write_text(
        json.dumps(
            dict(
                images=[dict(id=0, file_name="a_jpg.rf.0.jpg", width=20, height=10)],
                categories=[
                    dict(id=0, name="things", supercategory="none"),
                    dict(id=1, name="cat", supercategory="things"),
                ],
                annotations=[
                    dict(
                        id=0,
                        image_id=0,
                        category_id=1,
                        bbox=[1, 2, 3, 4],
                        area=12,
                        segmentation=[],
                        iscrowd=0,
                    )
                ],
            )
        )
    )
    data = read_labels(tmp_path)
    assert (
        not data.problems
        and data.pictures[0].path.is_file()
        and data.pictures[0].annotations[0].box == (1, 2, 4, 6)
    )


def test_uncompressed_run_lengths(tmp_path):
    content = dict(
        images=[dict(id=1, file_name="a.png", width=3, height=2)],
        categories=[dict(id=1, name="cat")],
        annotations=[
            dict(
                id=1,
                image_id=1,
                category_id=1,
                bbox=[1, 0, 1, 2],
                iscrowd=1,
                segmentation=dict(size=[2, 3], counts=[2, 2, 2]),
            )
        ],
    )
    (tmp_path / "a.json").write_text(json.dumps(content))
    mask = read_labels(tmp_path / "a.json").pictures[0].annotations[0].mask
    assert mask.tolist() == [[False, True, False]] * 2


@pytest.mark.parametrize(
    "fault", [f for f in FAULTS if f not in ("missing box", "wrong class", "shifted box")]
)
@pytest.mark.parametrize("rate", [0.05, 0.1, 0.2])
def test_the_validator_finds_injected_faults_and_no_others(fault, rate, tmp_path):
    make_set(tmp_path / "s", 40, 20)
    assert check_labels(read_labels(tmp_path / "s")) == []
    wrong = inject(tmp_path / "s", fault, rate, len(NEW_SHAPES))
    problems = check_labels(read_labels(tmp_path / "s"))
    assert recall(problems, wrong) >= 0.95 and {p.where for p in problems} <= {*wrong}


def test_leaked_pictures_are_copied_with_their_labels_and_named(tmp_path):
    make_set(tmp_path / "s", 40, 20)
    copies = leak(tmp_path / "s", 0.2)
    data = read_labels(tmp_path / "s")
    problems = check_labels(data)
    assert len(copies) == 8 and sum(p.split == "val" for p in data.pictures) == 28
    assert all(p.annotations for p in data.pictures)
    assert recall(problems, copies) == 1 and {p.kind for p in problems} == {"near-duplicate"}


def test_clean_sets_raise_no_alarm_and_leaks_are_found(tmp_path):
    data = make_set(tmp_path / "s", 100, 100)
    assert check_labels(read_labels(tmp_path / "s")) == []
    train, val = ([p for p in data.pictures if p.split == s] for s in ("train", "val"))
    ways = [
        lambda i: i,
        lambda i: i.resize((64, 64)),
        lambda i: i.point(lambda v: min(255, v * 1.15)),
    ]
    for k in range(20):
        with Image.open(train[k].path) as image:
            ways[k % 3](image.convert("RGB")).resize((96, 96)).save(
                val[k].path.with_suffix(".jpg"), quality=75
            )
        val[k].path.unlink()
    problems = [p for p in check_labels(read_labels(tmp_path / "s")) if p.kind == "near-duplicate"]
    found = {Path(p.where).stem for p in problems}
    assert len(found) >= 19 and found <= {f"{k:05d}" for k in range(20)}
    again = split_labels(read_labels(tmp_path / "s"))
    assert not [p for p in check_labels(again) if p.kind == "near-duplicate"]
    assert 0.1 < sum(p.split == "val" for p in again.pictures) / 200 < 0.3


BAD = {  # file, how it is made, the kind that names it
    "empty.png": (lambda f: f.write_bytes(b""), "unreadable"),
    "cut.png": (lambda f: f.write_bytes(_png()[:300]), "unreadable"),
    "words.jpg": (lambda f: f.write_text("I am a text."), "unreadable"),
    "cmyk.jpg": (lambda f: Image.new("CMYK", (32, 32)).save(f), "cmyk"),
    "deep.png": (lambda f: Image.fromarray(np.zeros((32, 32), np.uint16)).save(f), "16-bit"),
    "two words 图.gif": (
        lambda f: Image.new("RGB", (32, 32), "red").save(
            f, save_all=True, append_images=[Image.new("RGB", (32, 32), "blue")]
        ),
        "animated",
    ),
    "bomb.png": (lambda f: Image.new("1", (20_000, 20_000)).save(f, compress_level=1), "too-large"),
    "turned.jpg": (lambda f: _turned(f), "exif-rotated"),
}


def _png():
    data = io.BytesIO()
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (32, 32, 3), np.uint8)).save(
        data, "PNG"
    )
    return data.getvalue()


def _turned(f):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(f, exif=exif)


def test_bad_pictures_are_named_and_the_others_kept(tmp_path):
    make_set(tmp_path / "s", 4, 4)
    images, labels = (tmp_path / "s" / w / "train" for w in ("images", "labels"))
    for name, (make, _) in BAD.items():
        make(images / name)
    (labels / "nobody.txt").write_text("0 .5 .5 .1 .1\n")
    data = read_labels(tmp_path / "s")
    named = {(Path(p.where).name, p.kind) for p in check_labels(data)}
    for name, (_, kind) in BAD.items():
        assert (name, kind) in named, (name, named)
    assert ("nobody.txt", "no-picture") in named
    assert sum(p.file[0] == "0" for p in data.pictures) == 8
    turned = next(p for p in data.pictures if p.file == "turned.jpg")
    assert (turned.width, turned.height) == (20, 40)


def test_commands(tmp_path, capsys):
    make_set(tmp_path / "a b", 4, 4)
    assert main(["labels", "check", str(tmp_path / "a b")]) == 0
    for to in ("coco", "voc", "label-studio", "yolo"):
        assert (
            main(["labels", "convert", str(tmp_path / "a b"), str(tmp_path / to), "--to", to]) == 0
        )
        assert differences(read_labels(tmp_path / to), read_labels(tmp_path / "a b")) == []
    assert main(["labels", "convert", str(tmp_path / "a b"), str(tmp_path / "coco")]) == 2
    assert (
        main(["labels", "convert", str(tmp_path / "a b"), str(tmp_path / "x"), "--to", "png"]) == 2
    )
    assert main(["labels", "check", str(tmp_path / "nothing")]) == 2
    inject(tmp_path / "a b", "decimal comma", 0.5, 3)
    capsys.readouterr()
    assert main(["labels", "check", str(tmp_path / "a b")]) == 1
    assert "decimal comma" in capsys.readouterr().out
    assert (
        main(["labels", "convert", str(tmp_path / "a b"), str(tmp_path / "y"), "--to", "coco"]) == 1
    )


def test_the_widget_writes_what_is_drawn_and_keeps_masks(tmp_path):
    pictures = shapes(2, seed=1)
    labelled = from_pictures(pictures, ["star", "circle"], folder=tmp_path)
    data = LabelSet(labelled, ["star", "circle"])
    widget = LabelWidget(data, tmp_path)
    widget.boxes = [[1, 2.0, 3.0, 20.0, 30.0]]
    assert read_labels(tmp_path).pictures[0].annotations[0].label == "circle"
    widget.number = 1
    assert len(widget.boxes) == len(labelled[1].annotations) and widget.picture.startswith(
        "data:image/png"
    )
    widget.number = 0
    assert widget.boxes == [[1, 2.0, 3.0, 20.0, 30.0]]


def test_a_detector_names_labels_that_it_doubts():
    a = Annotation("cat", (0.0, 0.0, 10.0, 10.0), where="a.txt, line 1")
    p = Labelled("a.png", 50, 50, (a,), where="a.txt")
    kinds = [
        [d.kind for d in suspicious(LabelSet([p], ["cat", "dog"]), [[d]])]
        for d in (
            ("cat", 0.9, (0, 0, 10, 10)),
            ("dog", 0.9, (0, 0, 10, 10)),
            ("cat", 0.9, (4, 0, 14, 10)),
            ("cat", 0.9, (30, 30, 40, 40)),
        )
    ]
    assert (
        kinds == [[], ["wrong-class"], ["shifted"], ["missing"]]
        and overlap((0, 0, 2, 2), (1, 0, 3, 2)) == 1 / 3
    )


# ---- a real Label Studio ----

TOKEN, USER = "0123456789abcdef0123456789abcdef01234567", "labels@example.org"
CONFIG = """<View><Image name="image" value="$image"/>
<RectangleLabels name="rectanglelabels" toName="image">{0}</RectangleLabels>
<PolygonLabels name="polygonlabels" toName="image">{0}</PolygonLabels>
<BrushLabels name="brushlabels" toName="image">{0}</BrushLabels></View>"""


def _uv():
    "uv from PATH, or the checkout's own, which `make setup` brings."
    own = Path(__file__).parent.parent / ".uv" / "bin" / "uv"
    return shutil.which("uv") or (own if own.exists() else None)


class Studio:
    "A server of Label Studio in an environment of its own, on loopback."

    def __init__(self, folder, documents):
        uv = _uv()
        if not uv:
            pytest.fail("There is no uv. Run `make setup`, which brings one.")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", folder / "log.txt"
        off = ("COLLECT_ANALYTICS", "LATEST_VERSION_CHECK", "SENTRY_DSN", "FRONTEND_SENTRY_DSN")
        values = dict(
            zip(off, ("false", "false", "", "")),
            LOCAL_FILES_SERVING_ENABLED="true",
            LOCAL_FILES_DOCUMENT_ROOT=str(documents),
        )
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        env |= (
            values
            | {f"LABEL_STUDIO_{k}": v for k, v in values.items()}
            | {"PYTHONWARNINGS": "ignore"}
        )
        command = [
            str(uv),
            "tool",
            "run",
            "--from",
            "label-studio==1.23.2",
            "label-studio",
            "start",
            "--no-browser",
            "--data-dir",
            str(folder),
            "--host",
            self.url,
            "--internal-host",
            "127.0.0.1",
            "--port",
            str(port),
            "--username",
            USER,
            "--password",
            "only for a test",
            "--user-token",
            TOKEN,
            "--enable-legacy-api-token",
        ]
        self.process = subprocess.Popen(
            command,
            env=env,
            stdout=open(self.log, "wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        for _ in range(600):
            if self.process.poll() is not None:
                pytest.fail(f"Label Studio did not start: {self.log.read_text()[-500:]}")
            try:
                self.open(f"{self.url}/health", timeout=5).read()
                break
            except OSError:
                time.sleep(1)
        else:
            pytest.fail("Label Studio did not answer within 10 minutes")

    def ask(self, path, data=None):
        request = urllib.request.Request(
            self.url + path,
            None if data is None else json.dumps(data).encode(),
            {"Authorization": f"Token {TOKEN}", "Content-Type": "application/json"},
        )
        try:
            with self.open(request, timeout=120) as reply:
                return reply.read()
        except urllib.error.HTTPError as e:
            raise AssertionError(f"{path}: {e.code} {e.read()[:500]}") from e

    def push(self, data):
        "Make a project, import pictures, send the annotations one by one; its number."
        labels = "".join(f'<Label value="{n}"/>' for n in data.names)
        project = json.loads(
            self.ask("/api/projects", dict(title="shapes", label_config=CONFIG.format(labels)))
        )["id"]
        tasks = studio_tasks(data)
        self.ask(f"/api/projects/{project}/import", [dict(data=t["data"]) for t in tasks])
        made = json.loads(self.ask(f"/api/tasks?project={project}&page_size=100"))["tasks"]
        assert len(made) == len(tasks)
        wanted = {t["data"]["image"]: t["annotations"][0] for t in tasks}
        for task in made:
            self.ask(f"/api/tasks/{task['id']}/annotations/", wanted[task["data"]["image"]])
        return project

    def export(self, project, kind, folder):
        content = self.ask(f"/api/projects/{project}/export?exportType={kind}")
        folder.mkdir()
        if content[:2] == b"PK":
            zipfile.ZipFile(io.BytesIO(content)).extractall(folder)
        else:
            (folder / "export.json").write_bytes(content)
        return folder

    def close(self):
        import signal

        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(30)


@pytest.mark.slow
def test_label_studio_gives_back_what_it_was_given(tmp_path):
    pictures = shapes(6, seed=5)
    names = ["star", "circle", "square", "triangle", "cross"]
    boxes = LabelSet(from_pictures(pictures, names, folder=tmp_path), names)
    rich = []
    for k, p in enumerate(from_pictures(pictures, names, masks=True)):
        some = [a if k % 2 else Annotation(a.label, a.box, rotation=33.0) for a in p.annotations]
        x0, y0, x1, y1 = some[0].box
        points = ((x0, y0), (x1, y0), (x1, y1))
        some.append(Annotation("star", bounds(points), (points,)))
        rich.append(replace(p, annotations=tuple(some), path=boxes.pictures[k].path))
    rich = LabelSet(rich, names)
    (tmp_path / "server").mkdir()
    studio = Studio(tmp_path / "server", tmp_path)
    try:
        for data, kinds in ((boxes, ("JSON", "COCO", "VOC")), (rich, ("JSON",))):
            project = studio.push(data)
            for kind in kinds:
                folder = studio.export(project, kind, tmp_path / f"{kind}-{project}")
                shutil.copytree(tmp_path / "images", folder / "images", dirs_exist_ok=True)
                back = read_labels(folder)
                back.names.sort(key=names.index)
                if kind == "VOC":  # the server writes 8 letters before each name
                    back.pictures = [replace(p, file=p.file[10:]) for p in back.pictures]
                assert differences(back, data, pixels=1 if kind == "VOC" else 1e-3) == [], kind
    finally:
        studio.close()
