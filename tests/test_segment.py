"""The segmenter: scores against references, its folder, and a learner's own masks."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchmetrics.classification import MulticlassJaccardIndex

from mlcourse import segment
from mlcourse.files import CourseError, UsageError
from mlcourse.segment import (IGNORE, UNet, ce_and_dice, confusion, dice_loss,
                              iou, load_segmenter, predict, read_pairs, save_segmenter,
                              tensors, train)
from mlcourse.worlds import HARD, shapes


# ---------------------------------------------------------------- scores

@settings(deadline=None, max_examples=40)
@given(st.integers(2, 6), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31))
def test_iou_is_that_of_torchmetrics(classes, high, wide, seed):
    r = np.random.default_rng(seed)
    truth, answer = (torch.from_numpy(r.integers(0, classes, (2, high, wide))) for _ in range(2))
    truth[torch.from_numpy(r.random(truth.shape) < .2)] = IGNORE
    ours = iou(confusion(truth, answer, classes))
    theirs = MulticlassJaccardIndex(classes, average=None, ignore_index=IGNORE)(answer, truth)
    seen = ~ours.isnan()   # theirs has 0 for a class that nowhere occurs, ours no number
    assert torch.allclose(ours[seen].float(), theirs[seen], atol=1e-6)
    assert not theirs[~seen].any()
    assert confusion(truth, answer, classes).sum() == (truth != IGNORE).sum()


def test_dice_is_between_its_ends():
    truth = torch.randint(0, 4, (2, 8, 8))
    sure = torch.nn.functional.one_hot(truth, 4).permute(0, 3, 1, 2) * 40.
    assert dice_loss(sure, truth) < 1e-3 < .9 < dice_loss(sure.roll(1, 1), truth)
    assert ce_and_dice(sure, truth) < 1e-3


def test_what_is_not_labelled_has_no_gradient():
    logits, truth = torch.randn(2, 3, 6, 6, requires_grad=True), torch.randint(0, 3, (2, 6, 6))
    truth[:, :3] = IGNORE
    ce_and_dice(logits, truth).backward()
    assert not logits.grad[:, :, :3].any() and logits.grad[:, :, 3:].any()


@pytest.mark.parametrize("labelled", [[], [1]])
def test_a_batch_without_a_class_trains_all_the_same(labelled):
    truth = torch.zeros(1, 8, 8, dtype=torch.long)
    for c in labelled: truth[0, :4] = c
    logits = torch.randn(1, 5, 8, 8, requires_grad=True)
    ce_and_dice(logits, truth).backward()
    assert logits.grad.isfinite().all()


# ---------------------------------------------------------------- pictures, model, folder

def test_tensors_are_the_masks_of_the_world():
    pixels, masks = tensors(HARD, 3, HARD.labels, seed=4)
    for picture, p, m in zip(shapes(3, HARD, 4), pixels, masks):
        assert (p.permute(1, 2, 0).numpy() == picture.pixels).all()
        for o in picture.objects: assert (m.numpy()[o.mask] == 1 + HARD.labels.index(o.label)).all()
        assert (m != 0).sum() == sum(o.mask.sum() for o in picture.objects)


@pytest.mark.parametrize("depth,side", [(0, 7), (1, 6), (3, 24), (5, 32)])
def test_a_picture_keeps_its_form(depth, side):
    for skips in (True, False):
        model = UNet(4, 2, depth, skips).eval()
        assert model(torch.randn(2, 3, side, 2 * side)).shape == (2, 4, side, 2 * side)


def test_sides_that_cannot_be_halved_are_refused():
    with pytest.raises(UsageError, match="multiples of 8"): UNet(4)(torch.randn(1, 3, 48, 50))


def test_training_is_the_same_again_and_learns():
    pixels, masks = tensors(HARD, 8, HARD.labels)
    def run():
        torch.manual_seed(0)
        model = UNet(6, 4, 2)
        return model, train(model, pixels, masks, ce_and_dice, 6, 4, 1e-2)
    (a, first), (b, second) = run(), run()
    assert first == second and len(first) == 12 and first[-1] < first[0]
    assert torch.equal(predict(a, pixels), predict(b, pixels))
    assert predict(a, pixels, batch_size=3).equal(predict(a, pixels, batch_size=8))


def test_a_folder_comes_back_whole(tmp_path):
    model = UNet(3, 4, 2, skips=False).eval()
    save_segmenter(model, ["圆", "star"], 64, tmp_path / "模型")
    again, config = load_segmenter(tmp_path / "模型")
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(again(x), model(x)) and not again.training
    assert config["labels"] == ["圆", "star"] and config["size"] == 64


@pytest.mark.parametrize("fault", ["nothing", "no_weights", "half_a_config"])
def test_what_is_no_segmenter_is_said(tmp_path, fault):
    text = dict(nothing="", half_a_config="{", no_weights="{}")[fault]
    if text: (tmp_path / "config.json").write_text(text)
    if fault == "half_a_config": (tmp_path / "model.safetensors").touch()
    with pytest.raises(UsageError, match="holds no segmenter"): load_segmenter(tmp_path)


# ---------------------------------------------------------------- masks of a learner's own

@pytest.fixture
def folder(tmp_path):
    "A folder of pairs, and how to put one there: `put(name, mask)`."
    for part in ("images", "masks"): (tmp_path / part).mkdir()
    def put(name, mask=None, picture=None, **how):
        picture = picture or Image.new("RGB", (40, 24), "red")
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "images" / f"{name}.jpg", **how)
        path = tmp_path / "masks" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(mask, bytes): path.write_bytes(mask)
        elif mask is not None: Image.fromarray(mask).save(path)
    put.folder = tmp_path
    return put


def numbers(high=24, wide=40):
    "Class 1 at the left, 2 at the right, and a corner that is not labelled."
    mask = np.ones((high, wide), np.uint8)
    mask[:, wide // 2:], mask[-high // 4:, :wide // 4] = 2, IGNORE
    return mask


def test_pairs_keep_their_numbers_through_sizes_and_names(folder):
    names = ["第 一 张", "a b", "deeper/更深/x"]
    for name in names: folder(name, numbers())
    big = Image.new("RGB", (400, 240), "blue")
    folder("big", numbers(240, 400), big)
    pixels, masks, left_out = read_pairs(folder.folder, 3, 16)
    assert len(pixels) == 4 and not left_out
    for m in masks: assert m.unique().tolist() == [1, 2, IGNORE] and (m[:, 8:] == 2).all()
    assert pixels.shape == (4, 3, 16, 16) and pixels.dtype == masks.dtype == torch.uint8


def test_a_turned_photograph_has_an_upright_mask(folder):
    turned = Image.Exif()
    turned[0x112] = 6
    folder("turned", numbers(40, 24), exif=turned)
    folder("wrongly", numbers(24, 40), exif=turned)
    pixels, _, left_out = read_pairs(folder.folder, 3, 16)
    assert len(pixels) == 1 and "another size, 40 x 24" in left_out["wrongly.jpg"]


@pytest.mark.parametrize("turn", [2, 3, 4])
def test_half_a_turn_that_no_size_tells_is_left_out(folder, turn):
    (exif := Image.Exif())[0x112] = turn
    folder("good", numbers())
    folder("half", numbers(), exif=exif)
    pixels, _, left_out = read_pairs(folder.folder, 3, 16)
    assert len(pixels) == 1 and "save it upright" in left_out["half.jpg"]


def test_a_square_on_its_side_is_left_out(folder):
    (exif := Image.Exif())[0x112] = 6
    folder("good", numbers())
    folder("square", numbers(32, 32), Image.new("RGB", (32, 32)), exif=exif)
    assert "save it upright" in read_pairs(folder.folder, 3, 16)[2]["square.jpg"]


def test_a_mask_in_capitals(folder):
    folder("X", numbers())
    (folder.folder / "masks" / "X.png").rename(folder.folder / "masks" / "X.PNG")
    assert len(read_pairs(folder.folder, 3, 16)[0]) == 1


@pytest.mark.parametrize("mask,why", [
    (None, "there is no mask"), (numbers(9), "another size"), (numbers() * 2, "has values"),
    (np.stack([numbers()] * 3, 2), "class numbers"), (b"", "no PNG"),
    (b"\x89PNG\r\n\x1a\n", "no PNG"), (numbers().astype(np.uint16), "I;16")])
def test_a_mask_that_cannot_serve_is_named(folder, mask, why):
    folder("good", numbers())
    folder("坏 one", mask)
    _, masks, left_out = read_pairs(folder.folder, 3, 16)
    assert len(masks) == 1 and why in left_out["坏 one.jpg"]


def test_a_mask_that_is_cut_short_is_named(folder):
    folder("good", numbers())
    noise = np.random.default_rng(0).integers(0, 3, (24, 40)).astype(np.uint8)
    folder("cut", noise)
    path = folder.folder / "masks" / "cut.png"
    path.write_bytes(path.read_bytes()[:120])
    assert "damaged" in read_pairs(folder.folder, 3, 16)[2]["cut.jpg"]


def test_a_folder_without_pairs_is_refused(folder):
    with pytest.raises(CourseError, match="no folder"): read_pairs(folder.folder / "none", 3, 16)
    folder("white on black", (numbers() > 1).astype(np.uint8) * 255)
    with pytest.raises(CourseError, match="write 1"): read_pairs(folder.folder, 2, 16)
    (folder.folder / "masks" / "white on black.png").unlink()
    folder("lonely")
    with pytest.raises(CourseError, match="lonely.jpg"): read_pairs(folder.folder, 3, 16)


# ---------------------------------------------------------------- the rehearsal's encoder

def test_the_thin_encoder_is_loaded_as_the_real_one(tmp_path):
    import segmentation_models_pytorch as smp
    from safetensors.torch import load_file
    segment.thin_encoder(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    encoder = smp.Unet("mobilenet_v2", encoder_weights=None).encoder
    encoder.load_state_dict(weights)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, weights[name].to(value.dtype)), name


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_damaged_mask_stops_nothing(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("damaged")
    for part in ("images", "masks"): (root / part).mkdir()
    for name in "ab":
        Image.new("RGB", (40, 24), "red").save(root / "images" / f"{name}.png")
        Image.fromarray(numbers()).save(root / "masks" / f"{name}.png")
    raw = bytearray((root / "masks" / "a.png").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (root / "masks" / "a.png").write_bytes(raw)
    _, masks, left_out = read_pairs(root, 3, 16)
    assert len(masks) + len(left_out) == 2 and {*masks.unique().tolist()} <= {0, 1, 2, IGNORE}
