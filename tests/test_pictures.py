"""A learner's folder of pictures: each file is read rightly, or named and left out."""
import struct, time, zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mlcourse.pictures import MAX_PIXELS, read_pictures

WIDE, HIGH = 40, 24


def photo() -> Image.Image:
    "Red, its upper left corner blue."
    image = Image.new("RGB", (WIDE, HIGH), "red")
    image.paste("blue", (0, 0, 16, 8))
    return image


def only(folder):
    "The one picture of a folder in which nothing is left out."
    [picture], left_out = read_pictures(folder)
    assert not left_out
    return picture.pixels.astype(int)


def why(folder):
    "Why the one file of a folder was left out."
    pictures, left_out = read_pictures(folder)
    assert not pictures
    [reason] = left_out.values()
    return reason


def png(width, height, *, depth=8, kind=2, rows=b"") -> bytes:
    "A PNG of any size, whatever its pixels say."
    def chunk(name, data):
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# ---------------------------------------------------------------- read rightly

@pytest.mark.parametrize("name", ["a b.png", "第 一 张.png", "图/片/x.png", "-rf.png",
                                  "UPPER.PNG", "no_ending", "wrong_ending.jpg", "über.png",
                                  "😀.png", "100%.png", "a\nb.png", "x" * 200 + ".png"])
def test_any_name(tmp_path, name):
    path = tmp_path / "my pictures" / name
    path.parent.mkdir(parents=True)
    photo().save(path, format="PNG")
    [picture], left_out = read_pictures(tmp_path / "my pictures")
    assert picture.source == name and not left_out
    assert (picture.pixels == np.asarray(photo())).all()


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_the_note_how_it_was_held(tmp_path, turn, ending):
    undo = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270}[turn]
    held, note = photo() if undo is None else photo().transpose(undo), Image.Exif()
    note[0x112] = turn
    held.save(tmp_path / f"a.{ending}", exif=note, **({} if ending == "png" else {"quality": 95}))
    found = only(tmp_path)
    assert found.shape == (HIGH, WIDE, 3)
    assert abs(found[3, 3] - [0, 0, 255]).max() < 60 and abs(found[20, 36] - [255, 0, 0]).max() < 60
    assert abs(found[20, 3] - [255, 0, 0]).max() < 60 and abs(found[3, 36] - [255, 0, 0]).max() < 60


@pytest.mark.parametrize("ending", ["jpg", "tif"])
def test_ink_of_four_colours(tmp_path, ending):
    photo().convert("CMYK").save(tmp_path / f"a.{ending}")
    assert abs(only(tmp_path)[20, 36] - [255, 0, 0]).max() < 6


def test_sixteen_bits_of_grey_and_of_colour(tmp_path):
    grey = np.full((HIGH, WIDE), 128 * 257, np.uint16)
    for ending in ("png", "tif"):
        (tmp_path / ending).mkdir()
        Image.fromarray(grey).save(tmp_path / ending / f"a.{ending}")
        assert (only(tmp_path / ending) == 128).all()
    (tmp_path / "rgb").mkdir()
    pixel = struct.pack(">HHH", 200 * 257, 100 * 257, 50 * 257)
    rows = (b"\0" + pixel * WIDE) * HIGH
    (tmp_path / "rgb" / "a.png").write_bytes(png(WIDE, HIGH, depth=16, rows=rows))
    assert (only(tmp_path / "rgb") == [200, 100, 50]).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_modes_become_rgb(tmp_path, mode):
    image = photo().convert("L").convert("LA") if mode == "LA" else photo().convert(mode)
    image.save(tmp_path / "a.png")
    expected = np.asarray(image.convert("RGB")).astype(int)
    assert abs(only(tmp_path) - expected).max() <= 1


def test_a_gif_of_one_frame_is_a_picture(tmp_path):
    photo().save(tmp_path / "a.gif")
    assert abs(only(tmp_path)[20, 36] - [255, 0, 0]).max() < 6


def test_a_picture_of_one_pixel_and_a_very_long_one(tmp_path):
    Image.new("RGB", (1, 1), "red").save(tmp_path / "one.png")
    Image.new("RGB", (9000, 1), "red").save(tmp_path / "long.png")
    pictures, left_out = read_pictures(tmp_path, longest=100)
    assert not left_out
    assert [p.pixels.shape for p in pictures] == [(1, 100, 3), (1, 1, 3)]


# ---------------------------------------------------------------- named and left out

@pytest.mark.parametrize("ending", ["jpg", "png", "gif", "tif", "txt"])
def test_a_file_without_a_byte(tmp_path, ending):
    (tmp_path / f"a.{ending}").touch()
    assert why(tmp_path) == "empty"


@pytest.mark.parametrize("text", ["no picture", "<html>404 Not Found</html>", "图" * 500, "\0" * 64,
                                  "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"])
def test_what_only_has_a_pictures_name(tmp_path, text):
    (tmp_path / "a.jpg").write_text(text, encoding="utf-8")
    assert "not a picture" in why(tmp_path)


@pytest.mark.parametrize("ending", ["jpg", "png", "gif", "bmp", "tif", "webp"])
@pytest.mark.parametrize("share", [.02, .5, .9])
@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_a_file_that_is_cut_short(tmp_path, ending, share):
    noise = np.random.default_rng(0).integers(0, 255, (HIGH, WIDE, 3)).astype(np.uint8)
    path = tmp_path / f"a.{ending}"
    Image.fromarray(noise).save(path)
    data = path.read_bytes()
    path.write_bytes(data[:max(8, int(share * len(data)))])
    assert why(tmp_path)


@pytest.mark.parametrize("side", [7072, 20_000, 2**31 - 1])
def test_a_bomb_is_not_unpacked(tmp_path, side):
    (tmp_path / "a.png").write_bytes(png(side, side))
    began = time.process_time()
    assert f"more than {MAX_PIXELS:,}" in why(tmp_path)
    assert time.process_time() - began < 1


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tif"])
def test_several_frames(tmp_path, ending):
    photo().save(tmp_path / f"a.{ending}", save_all=True,
                 append_images=[Image.new("RGB", (WIDE, HIGH), "green")])
    assert "2 frames" in why(tmp_path)


def test_grey_whose_range_is_not_known(tmp_path):
    Image.fromarray(np.ones((9, 9), np.int32) * 70_000).save(tmp_path / "a.tif")
    Image.fromarray(np.ones((9, 9), np.float32)).save(tmp_path / "b.tif")
    pictures, left_out = read_pictures(tmp_path)
    assert not pictures and all("range is not known" in reason for reason in left_out.values())


def test_a_program_of_postscript_is_not_run(tmp_path):
    photo().save(tmp_path / "a.eps")
    photo().save(tmp_path / "b.pdf")
    pictures, left_out = read_pictures(tmp_path)
    assert not pictures and set(left_out) == {"a.eps", "b.pdf"}


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"]), st.data())
def test_a_damaged_byte_stops_nothing_and_loses_nothing(tmp_path_factory, kind, data):
    folder = tmp_path_factory.mktemp("damaged")
    photo().save(folder / "b.png")
    photo().save(folder / "a", format=kind)
    raw = bytearray((folder / "a").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (folder / "a").write_bytes(raw)
    pictures, left_out = read_pictures(folder)
    assert {p.source for p in pictures} | set(left_out) == {"a", "b.png"}
    assert len(pictures) + len(left_out) == 2 and all(left_out.values())
    for p in pictures: assert p.pixels.ndim == 3 and p.pixels.dtype == np.uint8
