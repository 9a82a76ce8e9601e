"""The classifier's parts: what is read, how it is split and fed, and what it refuses."""
import os, subprocess, sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from mlcourse import classify
from mlcourse.classify import (Feed, classifier, drawn, fit, probabilities, read_labelled, shifted,
                               split)
from mlcourse.files import CourseError


def pictures(folder, kinds, count=12, size=20):
    "A folder with one folder a class, each of one grey."
    for n, kind in enumerate(kinds):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = np.full((size, size + 6, 3), 80 * n + i, np.uint8)
            Image.fromarray(pixels).save(folder / kind / f"{i}.png")
    return folder


# ---------------------------------------------------------------- reading

def test_a_folder_a_class_with_any_letters(tmp_path):
    data = read_labelled(pictures(tmp_path, ["猫", "dog with spaces", "ö"]), 16)
    assert data.names == ("dog with spaces", "ö", "猫")
    assert data.pixels.shape == (36, 3, 16, 16) and data.pixels.dtype == torch.uint8
    assert data.labels.bincount().tolist() == [12] * 3 and data.left_out == {}
    means = [data.pixels[data.labels == c].float().mean().item() for c in range(3)]
    assert means[1] > means[2] > means[0] or len(set(map(round, means))) == 3


def test_what_cannot_be_used_is_named(tmp_path):
    pictures(tmp_path, ["a", "b"])
    pictures(tmp_path, ["few"], count=3)
    (tmp_path / "a" / "notes.jpg").write_text("not a picture")
    (tmp_path / "a" / "empty.png").touch()
    whole = (tmp_path / "b" / "0.png").read_bytes()
    (tmp_path / "b" / "cut.png").write_bytes(whole[:60])
    (tmp_path / "loose.png").write_bytes(whole)
    data = read_labelled(tmp_path, 16)
    assert data.names == ("a", "b") and len(data.labels) == 24
    assert set(data.left_out) == {"a/notes.jpg", "a/empty.png", "b/cut.png", "loose.png",
                                  "few/0.png", "few/1.png", "few/2.png"}
    assert data.left_out["loose.png"] == "in no class's folder"
    assert "fewer than ten" in data.left_out["few/0.png"]


def test_a_class_may_have_folders_of_its_own(tmp_path):
    pictures(tmp_path / "a", ["day 1", "day 2"], count=6)
    pictures(tmp_path, ["b"])
    assert read_labelled(tmp_path, 16).names == ("a", "b")


@pytest.mark.parametrize("kinds, says", [([], "0 classes"), (["a"], "1 classes")])
def test_too_few_classes_are_refused(tmp_path, kinds, says):
    with pytest.raises(CourseError, match=says): read_labelled(pictures(tmp_path, kinds), 16)


def test_a_folder_that_is_not_there():
    with pytest.raises(CourseError, match="There is no folder"): read_labelled("nowhere", 16)


def test_digits_and_shapes():
    digits = read_labelled("digits", 16)
    assert digits.names == tuple("0123456789") and len(digits.labels) == 1797
    some = read_labelled("shapes", 32, 200, seed=1)
    assert len(some.names) >= 10 and some.pixels.shape[1:] == (3, 32, 32)
    assert torch.equal(some.pixels, read_labelled("shapes", 32, 200, seed=1).pixels)
    assert {p.objects[0].label for p in drawn(("star", "cross"), 20, 32, 0)} == {"star", "cross"}


# ---------------------------------------------------------------- parts and feed

@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(10, 40), min_size=2, max_size=5), st.integers(0, 99))
def test_a_split_loses_nothing_and_has_every_class(sizes, seed):
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(sizes)])
    parts = split(labels, seed)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(labels)))
    for part in parts: assert set(labels[part].tolist()) == set(range(len(sizes)))
    again = split(labels, seed)
    assert all(torch.equal(a, b) for a, b in zip(parts, again))


@settings(max_examples=30, deadline=None)
@given(st.integers(-5, 5), st.integers(-5, 5))
def test_a_move_is_that_of_numpy(down, right):
    x = torch.arange(1, 65, dtype=torch.uint8).view(1, 8, 8)
    wide = np.pad(x[0].numpy(), 5)
    expected = wide[5 - down:13 - down, 5 - right:13 - right]
    assert np.array_equal(shifted(x, down, right)[0].numpy(), expected)


def test_a_feed_shows_every_picture_once_an_epoch():
    _, processor = classifier("tiny-resnet", ("a", "b"), 8)
    labels = torch.arange(21) % 2
    feed = Feed(torch.zeros(21, 3, 8, 8, dtype=torch.uint8), labels, processor, 3, 5, 2, seed=4)
    assert (len(feed), feed.steps) == (60, 12)
    for epoch in feed.order.view(3, 20): assert len(epoch.unique()) == 20
    assert {abs(m) for move in feed.moves for m in move} <= {0, 1, 2}
    small = Feed(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), labels[:3], processor, 2, 32)
    assert small.batch_size == 3 and small.steps == 2


# ---------------------------------------------------------------- models

@pytest.mark.parametrize("name", classify.TINY)
@pytest.mark.parametrize("size", [16, 24, 32])
def test_every_tiny_model_reads_pictures_of_a_size(name, size):
    model, processor = classifier(name, ("猫", "b", "c"), size)
    pixels = torch.randint(0, 256, (5, 3, size, size), dtype=torch.uint8)
    given_ = probabilities(model, pixels, processor)
    assert given_.shape == (5, 3) and torch.allclose(given_.sum(1), torch.ones(5), atol=1e-5)
    assert model.config.id2label == {0: "猫", 1: "b", 2: "c"}
    image = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
    theirs = processor(image, return_tensors="pt").pixel_values
    assert torch.allclose(theirs, classify.to_input(pixels, processor), atol=1e-5)


def test_the_seed_decides_the_weights():
    def weights(seed): return classifier("tiny-vit", ("a", "b"), 16, seed)[0].classifier.weight
    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(CourseError, match="cannot be loaded"):
        classifier(str(tmp_path), ("a", "b"), 16)


def test_the_real_ones_get_a_head_for_your_classes():
    "The thin models have the true heads of 1,000 classes."
    from mlcourse.hub import thin_model
    for name in ("WinKawaks/vit-tiny-patch16-224", "facebook/convnext-tiny-224",
                 "microsoft/resnet-50"):
        model, processor = classifier(str(thin_model(name)), ("a", "b", "c"), 224)
        pixels = torch.zeros(2, 3, 224, 224, dtype=torch.uint8)
        assert probabilities(model, pixels, processor).shape == (2, 3)
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]   # as it was trained, not as a ViT


def test_a_few_steps_learn_and_leave_frozen_weights_alone():
    data = read_labelled(drawn(("star", "circle"), 80, 16, 0), 16)
    model, processor = classifier("tiny-resnet", data.names, 16)
    losses = fit(model.train(), Feed(data.pixels, data.labels, processor, 8, 16), 4e-3)
    assert len(losses) == 40 and np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.eval().requires_grad_(False)
    model.classifier.requires_grad_(True)
    fit(model, Feed(data.pixels, data.labels, processor, 1, 16), 4e-3)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"classifier.1.weight", "classifier.1.bias"}


# ---------------------------------------------------------------- the two tools

LIGHTNING = """
import os, socket
def never(*args, **kwargs): raise SystemExit("it opened a connection")
socket.socket.connect = never
import lightning as L, torch
from lightning.pytorch.demos.boring_classes import BoringModel
with_nothing = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False,
                    enable_model_summary=False, default_root_dir="elsewhere")
L.Trainer(max_steps=2, **with_nothing).fit(BoringModel())
print(L.__version__, sorted(os.listdir(".")))
"""

@pytest.mark.slow
def test_lightning_writes_and_sends_nothing(environment, tmp_path):
    "Its settings are those of the lesson. Two of its versions carried malware."
    out = subprocess.run([sys.executable, "-c", LIGHTNING], cwd=tmp_path, env=environment,
                         capture_output=True, text=True, timeout=120)
    version, _, left = out.stdout.strip().splitlines()[-1].partition(" ")
    assert out.returncode == 0, out.stderr[-2000:]
    assert left == "[]" and os.listdir(tmp_path) == []
    assert version not in ("2.6.2", "2.6.3")
