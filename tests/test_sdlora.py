"""The LoRA of a Stable Diffusion: stopped and resumed, kept and read back, what it refuses."""
import json, os, signal, subprocess, sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from mlcourse import sdlora
from mlcourse.assets import find_asset
from mlcourse.files import CourseError, UsageError
from mlcourse.sdlora import (KEEPS, Encoded, LoraSettings, add_lora, sample, encode, encode_texts,
                             open_pipeline, save_lora, snr_weights, step_loss, train_lora)
from mlcourse.toy_sd import new_models, scheduler, tokenizer

LITTLE = LoraSettings(lora_r=4, lora_alpha=2, max_steps=6, batch_size=1, learning_rate=1e-2,
                      save_steps=2)


def untrained(seed=0):
    "The toy's networks with random weights: enough for what is not about pictures."
    from diffusers import StableDiffusionPipeline
    torch.manual_seed(seed)
    pipe = StableDiffusionPipeline(
        **new_models().eval(), tokenizer=tokenizer(), scheduler=scheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise_pictures(count=3, size=32):
    return [Image.fromarray(np.random.RandomState(i).randint(0, 255, (size, size, 3), np.uint8))
            for i in range(count)]


@pytest.fixture(scope="module")
def pipe():
    return untrained()


@pytest.fixture(scope="module")
def own(pipe):
    return encode(pipe, noise_pictures(), ["zwx a red star", "水墨 a blue circle", "zwx"])


@pytest.fixture(scope="module")
def kept(own, pipe):
    plain = ("a red star", "a blue circle", "")
    return Encoded(own.latents, encode_texts(pipe, plain), plain)


# ---------------------------------------------------------------- pictures and captions, once

def test_encoded_is_what_the_parts_say(pipe, own):
    assert own.latents.shape == (3, 4, 8, 8) and own.texts.shape == (3, 32, 64)
    alone = encode(pipe, noise_pictures()[1:2], ["水墨 a blue circle"])
    assert torch.allclose(alone.latents[0], own.latents[1], atol=1e-5)
    assert torch.allclose(alone.texts[0], own.texts[1], atol=1e-5)
    assert not torch.allclose(own.texts[0], own.texts[1], atol=1e-3)


@pytest.mark.parametrize("captions", [[], ["one"]])
def test_a_caption_for_each_picture(pipe, captions):
    with pytest.raises(UsageError, match="each picture needs one"):
        encode(pipe, noise_pictures(), captions)


def test_a_picture_does_not_depend_on_its_batch(pipe):
    words = ["a red star", "a blue circle", "水墨"]
    one = sample(pipe, words, 3, 2, batch_size=1)
    many = sample(pipe, words, 3, 2, batch_size=50)
    assert one.shape == (3, 3, 32, 32) and torch.allclose(one, many, atol=1e-4)
    assert torch.allclose(sample(pipe, words[1:2], 4, 2)[0], one[1], atol=1e-4)
    assert sample(pipe, words, 3, 2, output_type="latent").shape == (3, 4, 8, 8)


# ---------------------------------------------------------------- what is trained

@pytest.mark.parametrize("wrong", [dict(lora_r=0), dict(keep="all"), dict(optim="sgd"),
                                   dict(learning_rate=float("nan")), dict(max_steps=-1)])
def test_settings_that_cannot_be(wrong):
    with pytest.raises(UsageError, match="cannot be"):
        LoraSettings(**wrong)


def test_the_lora_is_on_every_projection_and_all_else_frozen(pipe):
    trained = add_lora(pipe, LITTLE, "probe")
    names = {n for n, p in pipe.unet.named_parameters() if p.requires_grad}
    assert len(trained) == len(names) and all(".probe." in n for n in names)
    layers = {n.split(".lora_")[0].rsplit(".", 2)[-1] for n in names}
    assert {"to_q", "to_k", "to_v", "0"} <= layers
    assert not any(p.requires_grad for m in (pipe.vae, pipe.text_encoder) for p in m.parameters())
    pipe.delete_adapters("probe")


@pytest.mark.parametrize("kind, at_half", [("epsilon", 1.), ("v_prediction", .5)])
def test_min_snr(kind, at_half):
    from diffusers import DDPMScheduler
    noise = DDPMScheduler(prediction_type=kind)
    even = (noise.alphas_cumprod - .5).abs().argmin()[None]
    assert abs(snr_weights(noise, even, 5.).item() - at_half) < .01
    assert snr_weights(noise, torch.tensor([0]), 5.).item() < .05
    assert snr_weights(noise, torch.tensor([0, 999]), 0).tolist() == [1, 1]


def test_output_preservation_asks_the_model_itself(pipe, own, kept):
    "A fresh LoRA changes nothing, so the second half has no error, whatever its weight."
    from diffusers import DDPMScheduler
    noise = DDPMScheduler.from_config(pipe.scheduler.config)
    add_lora(pipe, LITTLE, "fresh")
    def loss(**change):
        g = torch.Generator().manual_seed(1)
        return step_loss(pipe.unet, noise, own, kept, replace(LITTLE, **change), g).item()
    assert abs(loss(keep="output") - loss(keep="output", keep_weight=9.)) < 1e-6
    assert loss(keep="prior", keep_weight=9.) > loss(keep="prior") + .1
    pipe.delete_adapters("fresh")


# ---------------------------------------------------------------- a run

def file_of(pipe, folder, name="a.safetensors"):
    return load_file(save_lora(pipe, folder / name))


@pytest.mark.parametrize("keep", KEEPS)
def test_a_stopped_run_goes_on_to_the_bit(pipe, own, kept, tmp_path, keep):
    s, other = replace(LITTLE, keep=keep), None if keep == "none" else kept
    def stop(done, total, what=""):
        if done == 5: raise KeyboardInterrupt
    losses = train_lora(pipe, own, tmp_path / "whole", s, other)
    whole = file_of(pipe, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train_lora(pipe, own, tmp_path / "运行", s, other, progress=stop)
    assert sorted(p.name for p in (tmp_path / "运行").glob("checkpoint-*")) == [
        "checkpoint-2", "checkpoint-4"]
    assert train_lora(pipe, own, tmp_path / "运行", s, other) == losses
    again = file_of(pipe, tmp_path)
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)


def test_a_damaged_checkpoint_is_passed_over(pipe, own, tmp_path):
    losses, said = train_lora(pipe, own, tmp_path, LITTLE), []
    (tmp_path / "checkpoint-6" / "state.pt").write_bytes(b"cut")
    assert train_lora(pipe, own, tmp_path, LITTLE,
                      progress=lambda done, total, what="": said.append(what)) == losses
    assert "checkpoint-6 cannot be used" in said[0] and len(said) == 3


@pytest.mark.parametrize("change", [dict(lora_alpha=3), dict(max_steps=7), dict(seed=1)])
def test_another_run_is_not_gone_on_with(pipe, own, tmp_path, change):
    train_lora(pipe, own, tmp_path, replace(LITTLE, max_steps=2))
    with pytest.raises(CourseError, match="other settings"):
        train_lora(pipe, own, tmp_path, replace(LITTLE, **change))


def test_what_is_kept_fits_the_recipe(pipe, own, kept, tmp_path):
    for keep, other in (("none", kept), ("prior", None)):
        with pytest.raises(UsageError, match="does not go with"):
            train_lora(pipe, own, tmp_path, replace(LITTLE, keep=keep), other)


def test_a_loss_that_is_none_stops_the_run(pipe, own, tmp_path):
    broken = replace(own, latents=own.latents * float("nan"))
    with pytest.raises(CourseError, match="Lower learning_rate"):
        train_lora(pipe, broken, tmp_path, LITTLE)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_eight_bits_and_checkpointing_in_bfloat16(own, tmp_path):
    half = untrained().to(torch.bfloat16)
    s = replace(LITTLE, optim="adamw_8bit", gradient_checkpointing=True)
    losses = train_lora(half, own, tmp_path / "a", s)
    assert np.isfinite(losses).all()
    trained = [p for n, p in half.unet.named_parameters() if "lora" in n]
    assert {p.dtype for p in trained} == {torch.float32}
    assert train_lora(half, own, tmp_path / "a", s) == losses   # a finished run is not run again


# ---------------------------------------------------------------- the file

def test_the_file_keeps_alpha_and_opens_in_a_plain_pipeline(pipe, own, tmp_path):
    train_lora(pipe, own, tmp_path / "run", LITTLE)
    path = save_lora(pipe, tmp_path / "风格 one.safetensors")
    with safe_open(path, "pt") as f:
        about = json.loads(f.metadata()["lora_adapter_metadata"])
    assert (about["unet.r"], about["unet.lora_alpha"]) == (4, 2)
    assert [p.name for p in tmp_path.glob("*")] == ["run", path.name] or len(
        list(tmp_path.glob("*"))) == 2
    words = ["zwx a red star", "a blue circle"]
    plain, there = untrained(), sample(pipe, words, 0, 3)
    assert not torch.allclose(sample(plain, words, 0, 3), there, atol=1e-3)
    plain.load_lora_weights(path, adapter_name="style")
    assert plain.unet.peft_config["style"].lora_alpha == 2
    assert torch.equal(sample(plain, words, 0, 3), there)
    plain.set_adapters(["style"], [0.])
    pipe.disable_lora()
    assert torch.allclose(sample(plain, words, 0, 3), sample(pipe, words, 0, 3), atol=1e-6)
    pipe.enable_lora()


def test_the_thin_sd15_opens_without_its_safety_checker(tmp_path):
    sdlora.thin_sd15(tmp_path)
    names = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.safetensors")}
    wanted = find_asset("stable-diffusion-1.5").only
    assert names <= set(wanted) and "model_index.json" in wanted
    thin = open_pipeline(str(tmp_path))
    assert thin.scheduler.config.prediction_type == "epsilon" and thin.safety_checker is None
    assert sample(thin, ["水墨 a red star"], 0, 3).shape == (1, 3, 128, 128)
    losses = train_lora(thin, encode(thin, noise_pictures(2, 128), ["a", "b"]), tmp_path/"run",
                        replace(LITTLE, max_steps=2))
    assert np.isfinite(losses).all()


def test_a_folder_that_is_no_pipeline(tmp_path):
    with pytest.raises(CourseError, match="cannot be opened as a Stable Diffusion"):
        open_pipeline(str(tmp_path))


@pytest.mark.slow
def test_the_recorded_peaks_are_what_the_planner_says():
    from mlcourse.media_workloads import DATA, diffusion_infer, diffusion_train
    said = json.loads((DATA.parent / "sdlora.json").read_text("utf-8"))["peaks"]
    assert abs(diffusion_train(8, 2).peak / 2**30 - said["LoRA, checkpointing"]) < .01
    assert abs(diffusion_infer("1.5", batch=4).peak / 2**30 - said["drawing 4 pictures"]) < .01


KILLED = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_sdlora import LITTLE, encode, noise_pictures, replace, save_lora, train_lora, untrained
pipe = untrained()
own = encode(pipe, noise_pictures(), ["zwx a", "zwx b", "zwx c"])
def tell(done, total, what=""): print(done, flush=True)
train_lora(pipe, own, sys.argv[1], replace(LITTLE, max_steps=40, save_steps=10), progress=tell)
save_lora(pipe, sys.argv[2])
"""


@pytest.mark.slow
def test_kill_9_and_on(tmp_path):
    script = KILLED.format(tests=os.path.dirname(__file__))
    def start(run, file):
        return subprocess.Popen([sys.executable, "-c", script, str(tmp_path / run),
                                 str(tmp_path / file)], stdout=subprocess.PIPE, text=True)
    assert start("whole", "whole.safetensors").wait(300) == 0
    first = start("cut", "cut.safetensors")
    for line in first.stdout:
        if line.strip() == "25": break
    first.send_signal(signal.SIGKILL)
    first.wait(60)
    assert not (tmp_path / "cut.safetensors").exists()
    second = start("cut", "cut.safetensors")
    steps = [int(n) for n in second.communicate(timeout=300)[0].split() if n.isdigit()]
    assert steps[0] == 21
    one, two = (load_file(tmp_path / f"{n}.safetensors") for n in ("whole", "cut"))
    assert all(torch.equal(one[k], two[k]) for k in one)
