"""A LoRA of one's own pictures: the folder, captions, what is refused, killed and gone on with."""
import os, shutil, signal, struct, subprocess, sys, time, zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mlcourse import train_lora as module
from mlcourse.cli import main
from mlcourse.files import CourseError
from mlcourse.lora_file import read_lora
from mlcourse.sdlora import LoraSettings, open_pipeline
from mlcourse.train_lora import (check_fit, class_pictures, picture_with, file_name, read_folder,
                                 train_folder, trigger_word, write_captions)


def picture(seed, size=(40, 40), mode="RGB"):
    "A few blots, so that no two look alike."
    small = np.random.RandomState(seed).randint(0, 255, (5, 5, 3)).astype(np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode)


@pytest.fixture
def folder(tmp_path):
    "Six pictures, in a folder with a space and Chinese in its name."
    there = tmp_path / "my 图片"
    there.mkdir()
    for i in range(6): picture(i).save(there / f"图 {i}.png")
    return there


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    "The toy's networks with random weights, as a folder of diffusers."
    from diffusers import StableDiffusionPipeline
    from mlcourse.toy_sd import new_models, scheduler, tokenizer
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("toy")
    StableDiffusionPipeline(
        **new_models().eval(), tokenizer=tokenizer(), scheduler=scheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False).save_pretrained(path)
    return str(path)


LITTLE = dict(lora_r=4, lora_alpha=2, max_steps=3, batch_size=1, learning_rate=1e-2, save_steps=1)
HOW = dict(num_inference_steps=2)


# ---------------------------------------------------------------- the folder

def bomb(path):
    "The header of a picture of 20,000 by 20,000, and a few bytes that unpack to it."
    def chunk(kind, data):
        end = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + end
    head = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
                     + chunk(b"IDAT", zlib.compress(bytes(100_000))) + chunk(b"IEND", b""))


def exif(path):
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(9).save(path, exif=turned)


@pytest.mark.parametrize("name, make, says", [
    ("bomb.png", bomb, "left out, more than 50,000,000 pixels"),
    ("side.jpg", exif, "turned upright"),
    ("clear.png", lambda p: picture(9, mode="RGBA").save(p), "laid on white"),
    ("print.tif", lambda p: picture(9, mode="CMYK").save(p), "CMYK"),
    ("deep.png", lambda p: Image.fromarray(np.ones((40, 40), np.uint16)).save(p),
     "16 bits a channel"),
    ("tiny.png", lambda p: picture(9, (20, 20)).save(p), "20 by 20 pixels: enlarged to 32"),
    ("long.png", lambda p: picture(9, (160, 40)).save(p), "only the middle 25%"),
    ("moves.gif", lambda p: picture(9).save(p, save_all=True, append_images=[picture(8)]),
     "left out, 2 frames"),
    ("cut.png", lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n\0\0"), "left out"),
    ("none.jpg", lambda p: p.write_bytes(b""), "left out, empty"),
    ("again.png", lambda p: picture(0, (60, 60)).save(p), "almost the same"),
    ("notes.md", lambda p: p.write_text("x"), "left out, not a picture")])
def test_what_is_told_of_a_file(folder, name, make, says):
    make(folder / name)
    found = read_folder(folder, "zwx", 32)
    assert any(says in n and (name in n or "again" in name) for n in found.notes), found.notes
    out = "left out" in says
    assert len(found.files) == len(found.pictures) == len(found.captions) == (6 if out else 7)
    assert {(p.size, p.mode) for p in found.pictures} == {((32, 32), "RGB")}


def test_a_good_folder_is_told_nothing_but_its_size(folder):
    assert read_folder(folder, "zwx", 32).notes == ["only 6 pictures may be learned by heart"]
    picture(7).save(folder / "still.gif")
    assert len(read_folder(folder, "zwx", 32).files) == 7


def test_too_few_and_none(folder, tmp_path, capsys):
    for i in range(2): (folder / f"图 {i}.png").unlink()
    with pytest.raises(CourseError, match="4 pictures that can be read, and 5 are the least"):
        read_folder(folder, "zwx", 32)
    assert main(["train-lora", "--images", str(tmp_path / "nowhere"), "--trigger", "zwx"]) == 1
    assert "There is no folder" in capsys.readouterr().err


# ---------------------------------------------------------------- captions

def test_captions_are_read_written_and_never_overwritten(folder):
    (folder / "图 0.txt").write_text("\ufeffa 水墨 tree\n", encoding="utf-8")
    (folder / "图 1.txt").write_text("a tree", encoding="utf-8")
    found = read_folder(folder, "水墨", 32)
    assert found.captions[:3] == ["a 水墨 tree", "水墨 a tree", "水墨 a picture"]
    assert [n for n in found.notes if "图 1.txt: without 水墨" in n]
    assert write_captions(found) == "4 captions written beside the pictures"
    assert (folder / "图 1.txt").read_text("utf-8") == "a tree"
    assert (folder / "图 2.txt").read_text("utf-8") == "水墨 a picture\n"
    (folder / "图 3.txt").write_text("水墨 mine", encoding="utf-8")
    again = read_folder(folder, "水墨", 32)
    assert write_captions(again)[0] == "0" and again.captions[3] == "水墨 mine"


@pytest.mark.parametrize("text, trigger, there", [
    ("a part of it", "art", False), ("Art, a cat", "art", True), ("art", "art", True),
    ("artful", "art", False), ("my_art 2", "art", True), ("été", "t", False),
    ("黑水墨画", "水墨", True), ("水墨zwx画", "zwx", True), ("a (zwx:1.3) b", "(zwx:1.3)", True),
    ("zwx2", "zwx", False), ("a\nzwx", "zwx", True), ("", "zwx", False)])
def test_a_trigger_is_a_word(folder, text, trigger, there):
    (folder / "图 0.txt").write_text(text, encoding="utf-8")
    found = read_folder(folder, trigger, 32)
    assert bool(trigger_word(trigger).search(text)) == there
    assert found.captions[0] == (text if there else f"{trigger} {text}".strip())
    assert any("图 0.txt" in n for n in found.notes) != there


@pytest.mark.parametrize("code", ["gbk", "utf-16", "utf-16-le", "utf-16-be"])
def test_a_caption_that_is_not_utf8_is_named(folder, code):
    (folder / "图 0.txt").write_bytes("水墨画 art".encode(code))
    with pytest.raises(CourseError, match="图 0.txt is not in UTF-8"):
        read_folder(folder, "水墨", 32)


def test_a_folder_that_is_read_only(folder, monkeypatch):
    def denied(path, data): raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(module, "write_atomic", denied)
    found = read_folder(folder, "zwx", 32)
    assert "cannot be written (Permission denied)" in write_captions(found)
    assert found.captions == ["zwx a picture"] * 6


# ---------------------------------------------------------------- the run

@pytest.mark.parametrize("keep", ["none", "output", "prior"])
def test_from_a_folder_to_both_files(folder, toy, tmp_path, keep):
    found, pipe = read_folder(folder, "水墨", 32), open_pipeline(toy)
    files = train_folder(pipe, found, LoraSettings(**LITTLE, keep=keep), tmp_path / "out",
                         class_count=2, **HOW)
    assert [f.name for f in files] == ["水墨.safetensors", "水墨.kohya.safetensors"]
    one, two = map(read_lora, files)
    assert {n.alpha for n in one.layers} == {n.alpha for n in two.layers} == {2}
    assert all(torch.equal(a.up, b.up) and torch.equal(a.down, b.down) and a.up.any()
               for a, b in zip(one.layers, two.layers))
    assert two.metadata["modelspec.trigger_phrase"] == "水墨"


def test_the_same_folder_and_another(folder, toy, tmp_path):
    settings, out = LoraSettings(**LITTLE), tmp_path / "out"
    first = train_folder(open_pipeline(toy), read_folder(folder, "zwx", 32), settings, out)[0]
    state = load_file(first)
    again = train_folder(open_pipeline(toy), read_folder(folder, "zwx", 32), settings, out)[0]
    assert all(torch.equal(state[k], w) for k, w in load_file(again).items())
    picture(77).save(folder / "new.png")
    with pytest.raises(CourseError, match="other inputs .pictures"):
        train_folder(open_pipeline(toy), read_folder(folder, "zwx", 32), settings, out)


def test_another_model_and_files_from_elsewhere_are_refused(folder, toy, tmp_path):
    settings, found = LoraSettings(**LITTLE), read_folder(folder, "zwx", 32)
    out = tmp_path / "out"
    out.mkdir()
    (out / "zwx.safetensors").write_bytes(b"mine")
    with pytest.raises(CourseError, match="a zwx from elsewhere"):
        train_folder(open_pipeline(toy), found, settings, out)
    assert [f.read_bytes() for f in out.iterdir()] == [b"mine"]
    (out / "zwx.safetensors").unlink()
    train_folder(open_pipeline(toy), found, settings, out)
    with pytest.raises(CourseError, match="other inputs .model"):
        train_folder(open_pipeline("toy-sd"), found, settings, out)


def test_class_pictures_are_drawn_once(toy, tmp_path):
    pipe = open_pipeline(toy)
    first = class_pictures(pipe, tmp_path / "class", "a picture", 5, **HOW)
    (tmp_path / "class" / "004.png").unlink()
    times = [(tmp_path / "class" / f"{i:03}.png").stat().st_mtime_ns for i in range(4)]
    second = class_pictures(pipe, tmp_path / "class", "a picture", 5, **HOW)
    assert times == [(tmp_path / "class" / f"{i:03}.png").stat().st_mtime_ns for i in range(4)]
    assert [p.tobytes() for p in first] == [p.tobytes() for p in second]


def test_a_page_draws_and_leaves_the_pipeline_as_it_was(folder, toy, tmp_path):
    pipe = open_pipeline(toy)
    file = train_folder(open_pipeline(toy), read_folder(folder, "zwx", 32),
                        LoraSettings(**LITTLE | dict(learning_rate=.1)), tmp_path / "out")[1]
    plain, strong, again = (picture_with(pipe, "zwx", file, s, **HOW) for s in (0, 3, 0))
    assert plain.size == (32, 32) and plain.tobytes() == again.tobytes() != strong.tobytes()
    with pytest.raises(Exception): picture_with(pipe, "zwx", tmp_path / "none.safetensors", **HOW)
    assert not getattr(pipe.unet, "peft_config", None)


# ---------------------------------------------------------------- the command

def ask(folder, *more):
    return main(["train-lora", "--images", str(folder), *map(str, more)])


@pytest.mark.parametrize("more, says", [
    (["--trigger", " "], "--trigger is a word"), (["--trigger", "zwx", "--lora-r", 0], "lora_r"),
    (["--trigger", "zwx", "--keep", "all"], "keep is one of"), ([], "--trigger"),
    (["--trigger", "x" * 61], "at most 60"), (["--trigger", "a\nb"], "on one line"),
    (["--trigger", "zwx", "--what", "a zwx cat"], "--what holds zwx"),
    (["--trigger", "zwx", "--size", 33], "multiple of 8"), (["--trigger", "zwx", "--lora-alpha",
     "inf"], "lora_alpha"), (["--trigger", "zwx", "--seed", 10**20], "--seed from 0"),
    (["--trigger", "zwx", "--class-count", 0], "--class-count above 0")])
def test_bad_usage(folder, toy, capsys, more, says):
    assert ask(folder, "--model", toy, *more) == 2
    assert says in capsys.readouterr().err and not [*folder.glob("*.txt")]


@pytest.mark.parametrize("change, says", [
    (lambda p: (p / "unet" / "config.json").unlink(), "no folder of a Stable Diffusion"),
    (lambda p: (p / "unet" / "config.json").write_text("[]"), "no folder of a Stable Diffusion"),
    (lambda p: (p / "unet" / "config.json").write_text('{"addition_embed_type": "text_time"}'),
     "it is an SDXL"),
    (lambda p: (p / "model_index.json").unlink(), "cannot be opened as a Stable Diffusion"),
    (lambda p: next(p.glob("unet/*.safetensors")).write_bytes(b"cut"), "cannot be opened")])
def test_what_is_no_stable_diffusion(folder, toy, tmp_path, capsys, change, says):
    change(Path(shutil.copytree(toy, tmp_path / "model")))
    assert ask(folder, "--trigger", "zwx", "--model", tmp_path / "model", "--output-dir",
               tmp_path / "out") == 1
    assert says in capsys.readouterr().err


def test_output_among_the_pictures(folder, toy, capsys):
    assert ask(folder, "--trigger", "zwx", "--model", toy, "--output-dir", folder / "out") == 2
    assert "among the pictures" in capsys.readouterr().err


def test_the_plan_writes_nothing(folder, tmp_path, capsys, monkeypatch):
    fits = SimpleNamespace(verdict="Fits: 1 MiB.")
    monkeypatch.setattr(module, "check_fit", lambda s, vram: fits)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert ask(folder, "--trigger", "zwx", "--plan") == 0
    said = capsys.readouterr().out
    assert "Fits: 1 MiB" in said and "6 pictures at 512 pixels, 800 steps" in said
    assert sorted(tmp_path.rglob("*")) == before
    if not torch.cuda.is_available():
        assert ask(folder, "--trigger", "zwx") == 1 and "no CUDA card" in capsys.readouterr().err


def test_the_command_from_end_to_end(folder, toy, tmp_path, capsys):
    out = tmp_path / "out dir"
    assert ask(folder, "--trigger", "水墨 画", "--model", toy, "--output-dir", out, "--keep",
               "none", "--max-steps", 8, "--save-steps", 4) == 0
    said = capsys.readouterr().out
    assert "6 captions written" in said and "s a step" in said
    assert (out / f"{file_name('水墨 画')}.kohya.safetensors").is_file()


@pytest.mark.slow
def test_what_cannot_fit_is_refused_with_what_helps():
    tight = LoraSettings(8, 16, 10, 1, 1e-4, keep="prior", gradient_checkpointing=False)
    with pytest.raises(CourseError, match="makes it fit: --gradient-checkpointing"):
        check_fit(tight, 4.5)
    with pytest.raises(CourseError, match="makes it fit: --keep none"): check_fit(tight, 4)
    with pytest.raises(CourseError, match="No setting makes it fit"): check_fit(tight, 2)


@pytest.mark.slow
def test_killed_and_gone_on_with_it_ends_at_the_same_weights(folder, toy, tmp_path, environment):
    def start(out):
        return subprocess.Popen(
            [sys.executable, "-m", "mlcourse.cli", "train-lora", "--images", str(folder),
             "--trigger", "水墨", "--model", str(toy), "--output-dir", str(tmp_path / out),
             "--class-count", "2", "--max-steps", "40", "--save-steps", "2"],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            encoding="utf-8")
    cut = start("cut")
    end = time.time() + 300
    while not [*Path(tmp_path / "cut").glob("run/checkpoint-[46]*")] and time.time() < end:
        assert cut.poll() is None, cut.stdout.read()
        time.sleep(.02)
    os.kill(cut.pid, signal.SIGKILL)
    cut.wait()
    assert not (tmp_path / "cut" / "水墨.safetensors").exists()
    for out in ("cut", "whole"):
        run = start(out)
        assert run.wait(600) == 0, run.stdout.read()
    for name in ("水墨.safetensors", "水墨.kohya.safetensors"):
        cut, whole = (load_file(tmp_path / out / name) for out in ("cut", "whole"))
        assert cut.keys() == whole.keys()
        assert [k for k in whole if not torch.equal(cut[k], whole[k])] == []


