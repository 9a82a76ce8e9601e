"""SDXL's memory: the arithmetic of flags, the published series, the flags on a small pipeline."""
from dataclasses import replace

import pytest
import torch
from torch import nn

from mlcourse import sdxl_memory as sm
from mlcourse.sdxl_memory import GIB, Flags, apply, moved, needed, peak, peaks, weights
from mlcourse.toy_sd import new_models, scheduler, tokenizer

FOUR = Flags(batch=4)


@pytest.fixture
def small(monkeypatch):
    "Parts of one GiB and of two, in 16 bits, and phases that need what their names say."
    count = {name: dict(all=n * GIB // 2, largest=GIB // 8, linear=n * GIB // 4, conv=n * GIB // 4)
             for name, n in dict(text=1, text_2=1, unet=4, vae=1, tiny=0).items()}
    monkeypatch.setattr(sm, "_counts", lambda: count)
    monkeypatch.setattr(sm, "needed", lambda phase, *args, **kw:
                        dict(text=1, denoise=2, decode=9)[phase] * GIB)


@pytest.mark.parametrize("flags, text, denoise, decode", [
    (Flags(vae="fp16"), 8, 9, 16), (Flags(vae="tiny"), 7, 8, 15),
    (Flags(), 8, 9, 7 + 1 + 9 * sm.CUDNN),                       # the autoencoder in 32 bits
    (Flags(vae="fp16", offload="model"), 2, 6, 10),
    (Flags(vae="fp16", offload="sequential"), 1.25, 2.25, 9.25),  # the largest layer
    (Flags(vae="fp16", unet="fp8"), 6, 7.25, 14),                # and one layer unpacked
    (Flags(precision="fp32", vae="fp16"), 15, 16, 14 + 9 * sm.CUDNN)])
def test_peaks_are_weights_and_what_a_phase_needs(small, flags, text, denoise, decode):
    assert peaks(flags) == pytest.approx(dict(text=text, denoise=denoise, decode=decode))
    assert peak(flags) == max(peaks(flags).items(), key=lambda p: p[1])


def test_what_moves(small):
    gb = GIB / 1e9
    assert moved(Flags()) == 0
    assert moved(Flags(offload="model")) == pytest.approx(2 * 7 * gb)
    assert moved(Flags(offload="sequential"), steps=10) == pytest.approx((3 + 10 * 4) * gb)


@pytest.mark.slow
def test_weights_have_the_published_counts():
    assert weights(Flags(precision="fp32"))["unet"] == 4 * 2_567_463_684
    assert weights(Flags())["text_2"] == 2 * 694_659_840
    half, eight, four = (weights(Flags(unet=unet))["unet"] for unet in ("", "fp8", "nf4"))
    assert 0.5 < eight / half < 0.51 and 0.36 < four / half < 0.39   # convolutions stay as they are


@pytest.mark.slow
@pytest.mark.parametrize("gib, flags", [
    (28.09, replace(FOUR, precision="fp32", attention="plain")),
    (21.72, replace(FOUR, attention="plain")), (21.72, FOUR)])
def test_the_published_series_without_offload(gib, flags):
    assert peak(flags)[0] == "decode"
    assert peak(flags)[1] == pytest.approx(gib, rel=.02)


@pytest.mark.slow
def test_slicing_and_tiles_divide_and_the_default_tile_does_nothing():
    one, four = needed("decode"), needed("decode", 4)
    assert four == pytest.approx(4 * one, rel=.02)
    assert needed("decode", 4, slicing=True) == pytest.approx(one, rel=.02)
    assert needed("decode", tile=1024) == one
    assert needed("decode", tile=512) < .3 * one
    assert needed("decode") == one, "a flag of an earlier call stayed"


def small_pipeline():
    from diffusers import StableDiffusionPipeline
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline(
        **new_models().eval(), tokenizer=tokenizer(), scheduler=scheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe):
    return pipe(["a red star", "一 blue 圆"], num_inference_steps=2, output_type="pt",
                generator=torch.Generator().manual_seed(0)).images


@pytest.mark.parametrize("flags", [
    Flags(slicing=True), Flags(attention="plain"), Flags(offload="model"),
    Flags(offload="sequential"), Flags(slicing=True, attention="plain", offload="sequential")])
def test_flags_that_keep_the_picture(flags):
    plain = picture(apply(small_pipeline(), Flags(), "cpu"))
    assert (picture(apply(small_pipeline(), flags, "cpu")) - plain).abs().max() < 1e-4


def test_sequential_offload_leaves_no_weight_at_rest():
    pipe = apply(small_pipeline(), Flags(offload="sequential"), "cpu")
    picture(pipe)
    rest = {p.device.type for m in pipe.components.values() if isinstance(m, nn.Module)
            for p in m.parameters()}
    assert rest == {"meta"}


@pytest.mark.parametrize("unet, at_least, below", [("fp8", .25, .3), ("nf4", .3, .75)])
def test_a_packed_unet_is_smaller_and_draws_nearly_the_same(unet, at_least, below):
    def size(model): return sum(p.nbytes for p in model.parameters())
    whole, pipe = small_pipeline(), apply(small_pipeline(), Flags(unet=unet), "cpu")
    assert at_least <= size(pipe.unet) / size(whole.unet) < below
    off = (picture(pipe) - picture(whole)).abs().mean()
    assert 0 < off < .1


def test_packed_layers_take_the_bits_of_the_plan():
    unet = apply(small_pipeline(), Flags(unet="nf4"), "cpu").unet
    packed = [p for p in unet.parameters() if getattr(p, "quant_state", None)]
    taken = sum(p.nbytes + p.quant_state.absmax.nbytes for p in packed)
    assert packed and not any(p.quant_state.nested for p in packed)
    assert 8 * taken / sum(p.quant_state.shape.numel() for p in packed) == pytest.approx(
        sm.BITS["nf4"], rel=.05)


def test_tiles_are_set_in_pixels_and_in_latents():
    vae = apply(small_pipeline(), Flags(tile=16), "cpu").vae
    assert (vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size) == (True, 16, 4)


def test_thin_models_are_read_as_the_real_ones(tmp_path):
    from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionXLPipeline
    for make in (sm.thin_sdxl, sm.thin_vae, sm.thin_tiny_vae): make(tmp_path/make.__name__)
    vae = AutoencoderKL.from_pretrained(tmp_path/"thin_vae", dtype=torch.float16)
    tiny = AutoencoderTiny.from_pretrained(tmp_path/"thin_tiny_vae", dtype=torch.float16)
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path/"thin_sdxl", variant="fp16",
                                                     dtype=torch.float16)
    assert pipe.vae.config.force_upcast and not vae.config.force_upcast
    assert pipe.vae_scale_factor == 8 and tiny.config.latent_channels == 4
