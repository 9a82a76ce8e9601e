"""LoRA files: diffusers and PEFT read what was converted; what is none gets a sentence."""
import json, os, re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from mlcourse import lora_file as module
from mlcourse.files import CourseError, UsageError
from mlcourse.lora_file import (MODELS, convert_lora, fits, header_lines, model_layers, passport,
                                read_lora, spell, taken_alphas, update_norms, warnings_of,
                                write_lora)

UNET = ["attn1.to_q", "attn2.to_k", "attn1.to_out.0", "ff.net.0.proj", "resnets.0.conv1", "proj_in"]
TEXT = ["q_proj", "out_proj", "fc1"]


def parts():
    "A small UNet and text encoder with the names of Stable Diffusion, the same every time."
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
        norm_num_groups=8, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    text = CLIPTextModel(CLIPTextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=100, max_position_embeddings=16, bos_token_id=0, eos_token_id=1))
    return unet.eval(), text.eval()


def pipeline():
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    unet, text = parts()
    return StableDiffusionPipeline(
        vae=None, text_encoder=text, tokenizer=None, unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def outputs(unet, text):
    with torch.no_grad():
        said = text(torch.arange(10)[None]).last_hidden_state
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
        return unet(noise, 7, said).sample


def train(folder, **patterns):
    "PEFT's own folder of two adapters, and what PEFT makes of them: output and merged weights."
    from peft import LoraConfig, get_peft_model
    models = []
    for name, model, targets in zip(("unet", "text_encoder"), parts(), (UNET, TEXT)):
        config = LoraConfig(r=4, lora_alpha=2, target_modules=targets, init_lora_weights=False,
                            rank_pattern={"to_k": 3}, **patterns)
        torch.manual_seed(3)
        model = get_peft_model(model, config)
        for p in (p for n, p in model.named_parameters() if "lora_" in n):
            torch.nn.init.normal_(p, std=.2)
        model.save_pretrained(folder / name)
        models.append(model.eval())
    after = outputs(*models)
    return folder, after, [m.merge_and_unload().state_dict() for m in models]


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    "Alpha is 2 everywhere, and the rank 4 or 3."
    return train(tmp_path_factory.mktemp("一个 LoRA"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "Several alphas."
    patterns = {"to_q": 0.75, "conv1": 1, "fc1": 7}
    return train(tmp_path_factory.mktemp("几个 LoRA"), alpha_pattern=patterns)


def test_of_several_alphas_diffusers_takes_what_the_passport_says(trained, tmp_path):
    lora = read_lora(write_lora(read_lora(trained[0]), "kohya", tmp_path / "k.safetensors"))
    taken = dict(zip([n.name for n in lora.layers], taken_alphas(lora, "diffusers")))
    wrong = sum(taken[n.name] != n.alpha for n in lora.layers)     # so it is not what was trained
    assert wrong and f"diffusers takes another alpha than the file says for {wrong}" in " ".join(
        warnings_of(lora))
    pipe = pipeline()
    pipe.load_lora_weights(tmp_path, weight_name="k.safetensors")
    got = {f"{part}.{name}".replace("text_encoder.enc", "text_encoder.text_model.enc"):
           m.scaling["default_0"] * m.r["default_0"]
           for part in ("unet", "text_encoder") for name, m in getattr(pipe, part).named_modules()
           if getattr(m, "scaling", None)}
    assert got == pytest.approx(taken)


def bits(path):
    return {n.name: (n.alpha, n.down.numpy().tobytes(), n.up.numpy().tobytes())
            for n in read_lora(path).layers}


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_diffusers_reads_what_was_converted_from_peft(trained, even, tmp_path, form):
    folder, after, merged = even if form == "kohya" else trained
    file = write_lora(read_lora(folder), form, tmp_path / "中文 名字.safetensors")
    pipe = pipeline()
    before = outputs(pipe.unet, pipe.text_encoder)
    pipe.load_lora_weights(tmp_path, weight_name=file.name)
    got = outputs(pipe.unet, pipe.text_encoder)
    assert (got - before).abs().max() > .01
    torch.testing.assert_close(got, after, rtol=0, atol=1e-6)
    pipe.fuse_lora(components=["unet", "text_encoder"])
    pipe.unload_lora_weights()
    for model, want in zip((pipe.unet, pipe.text_encoder), merged):
        state = model.state_dict()
        assert [k for k in want if not torch.equal(state[k], want[k])] == []


def test_every_round_gives_the_same_bits_and_alphas(trained, tmp_path):
    folder, start = trained[0], bits(trained[0])
    assert len({alpha for alpha, *_ in start.values()}) == 4
    for number, form in enumerate(["kohya", "diffusers", "peft", "diffusers", "kohya", "peft"]):
        folder = write_lora(read_lora(folder), form, tmp_path / f"{number}.x")
        assert bits(folder) == start


def test_peft_reads_what_was_converted_from_kohya(trained, tmp_path):
    from peft import PeftModel
    kohya = write_lora(read_lora(trained[0]), "kohya", tmp_path / "k.safetensors")
    out = write_lora(read_lora(kohya), "peft", tmp_path / "p")
    models = [PeftModel.from_pretrained(model, str(out / name)).eval()
              for name, model in zip(("unet", "text_encoder"), parts())]
    torch.testing.assert_close(outputs(*models), trained[1], rtol=0, atol=0)


@pytest.mark.parametrize("model, xl", [("SD 1.5", False), ("SDXL", True)])
def test_diffusers_own_converter_agrees_about_every_name(model, xl):
    from diffusers.loaders import lora_conversion_utils as theirs
    from diffusers.utils import state_dict_utils as names
    want = {n: float(k) for k, n in enumerate(model_layers(model))}
    file = {f"{spell(n, 'kohya', xl)}.lora_{end}.weight": torch.tensor([[k]])
            for n, k in want.items() for end in ("down", "up")}
    if xl:
        file = theirs._maybe_map_sgm_blocks_to_diffusers(file, SimpleNamespace(layers_per_block=2))
    read = theirs._convert_non_diffusers_lora_to_diffusers(file)[0]
    unet = {k: v for k, v in read.items() if k.startswith("unet.")}
    got = names.convert_unet_state_dict_to_peft(unet)
    text = {k: v for k, v in read.items() if k not in unet}
    got |= names.convert_state_dict_to_peft(names.convert_state_dict_to_diffusers(text))
    assert {k.rpartition(".lora_")[0]: v.item() for k, v in got.items()} == want
    assert len(got) == 2 * len(want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_kohya_file_of_sdxl_comes_back_as_it_was(tmp_path, dtype):
    names = [n for n in model_layers("SDXL") if ".attn2.to_v" in n or "text_encoder_2" in n][:40]
    file = {}
    names += ["unet.up_blocks.1.upsamplers.0.conv", "unet.down_blocks.1.resnets.0.conv_shortcut"]
    for n in names:
        out, inside, *kernel = model_layers("SDXL")[n]
        key = spell(n, "kohya", True)
        file |= {f"{key}.lora_down.weight": torch.randn(2, inside, *kernel).to(dtype),
                 f"{key}.lora_up.weight": torch.randn(out, 2, *[1] * len(kernel)).to(dtype),
                 f"{key}.alpha": torch.tensor(.3).to(dtype)}
    about = {"ss_tag_frequency": json.dumps({"10_x": {"水墨": 3}}), "ss_network_alpha": "0.3"}
    save_file(file, tmp_path / "a.safetensors", about)
    middle = write_lora(read_lora(tmp_path / "a.safetensors"), "diffusers")
    back = write_lora(read_lora(middle), "kohya", tmp_path / "b.safetensors")
    got = load_file(back)
    assert {k: (v.dtype, v.shape) for k, v in got.items()} == {
        k: (v.dtype, v.shape) for k, v in file.items()}
    assert all(torch.equal(got[k], file[k]) for k in file)
    lora = read_lora(back)
    assert "fits: SDXL" in passport(lora) and lora.metadata.items() >= about.items()


def test_alpha_that_diffusers_loses_is_named_and_asked_for(trained, tmp_path):
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
    lora = read_lora(trained[0])
    plain, *_ = convert_lora(lora, "diffusers")
    save_file(plain, tmp_path / "plain.safetensors")                  # as before 2025
    save_file(convert_state_dict_to_kohya(plain), tmp_path / "theirs.safetensors")
    lost = read_lora(tmp_path / "plain.safetensors")
    ranks = [n.rank for n in lost.layers]
    assert {n.alpha for n in lost.layers} == {None}
    assert taken_alphas(lost, "diffusers") == ranks
    pipe = pipeline()
    pipe.load_lora_weights(tmp_path / "plain.safetensors")            # and so diffusers does
    scales = {m.scaling["default_0"] for m in pipe.unet.modules() if hasattr(m, "scaling")}
    assert scales == {1.0}
    assert "no alpha" in " ".join(warnings_of(lost))
    with pytest.raises(UsageError, match="--alpha"): write_lora(lost, "kohya")
    assert not (tmp_path / "plain.kohya.safetensors").exists()
    theirs = read_lora(tmp_path / "theirs.safetensors")               # alpha = rank is written
    assert [n.alpha for n in theirs.layers] == [n.rank for n in theirs.layers]
    given = read_lora(write_lora(lost, "kohya", tmp_path / "given.safetensors", alpha=2))
    assert {n.alpha for n in given.layers} == {2}
    with pytest.raises(UsageError, match="Leave --alpha out"): convert_lora(given, "peft", 2)


def test_what_each_program_reads(even, tmp_path):
    lora = read_lora(even[0])
    for form in ("kohya", "diffusers"): write_lora(lora, form, tmp_path / f"{form}.safetensors")
    kohya, diffusers = (read_lora(tmp_path / f"{f}.safetensors") for f in ("kohya", "diffusers"))
    said = [n.alpha for n in kohya.layers]
    assert [taken_alphas(kohya, p) == said for p in ("Kohya", "ComfyUI", "diffusers")] == [True] * 3
    assert taken_alphas(diffusers, "diffusers") == [n.alpha for n in diffusers.layers]
    assert set(taken_alphas(diffusers, "Kohya")) == {None}
    comfy = dict(zip([n.name for n in diffusers.layers], taken_alphas(diffusers, "ComfyUI")))
    assert {v is None for k, v in comfy.items() if ".attn" in k} == {True}
    assert {v for k, v in comfy.items() if ".ff." in k or "text" in k} == {4}   # the rank, not 2
    assert taken_alphas(lora, "PEFT") == [n.alpha for n in lora.layers]


def test_diffusers_loses_half_of_a_text_encoder_without_out_proj(tmp_path, trained, capfd):
    tensors = convert_lora(read_lora(trained[0] / "text_encoder"), "kohya")[0]
    save_file({k: v for k, v in tensors.items() if "out_proj" not in k}, tmp_path / "k.safetensors")
    lora = read_lora(tmp_path / "k.safetensors")
    taken = dict(zip([n.name for n in lora.layers], taken_alphas(lora, "diffusers")))
    assert {k[-6:]: v for k, v in taken.items()} == {"q_proj": None, "lp.fc1": 7}
    pipe = pipeline()
    pipe.load_lora_weights(tmp_path / "k.safetensors")
    got = {n.split(".lora_B")[0][-6:] for n, p in pipe.text_encoder.named_parameters()
           if "lora_B" in n and p.any()}
    assert got == {"lp.fc1"}


@pytest.mark.parametrize("old", [
    "unet.{block}.attn1.processor.to_q_lora.{half}.weight", "{block}.attn1.to_q.lora.{half}.weight",
    "{block}.attn1.processor.to_q_lora.{half}.weight", "unet.{block}.attn1.to_q.lora_{AB}.weight",
    "base_model.model.{block}.attn1.to_q.lora_{AB}.default.weight",
    "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_{half}.weight",
    "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_{half}.weight"])
def test_older_spellings_are_one_layer(tmp_path, old):
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    file = {old.format(block=block, half=h, AB=ab): torch.ones(*shape)
            for h, ab, shape in (("down", "A", (2, 320)), ("up", "B", (320, 2)))}
    save_file(file, tmp_path / "o.safetensors")
    assert [n.name for n in read_lora(tmp_path / "o.safetensors").layers] == [
        f"unet.{block}.attn1.to_q"]


def test_the_root_of_the_rank(tmp_path, trained):
    config = trained[0] / "text_encoder" / "adapter_config.json"
    for f in config.parent.iterdir(): (tmp_path / f.name).write_bytes(f.read_bytes())
    settings = json.loads(config.read_text()) | {"use_rslora": True}
    (tmp_path / config.name).write_text(json.dumps(settings))
    plain, root = read_lora(config.parent), read_lora(tmp_path)
    assert update_norms(root) == pytest.approx([2 * x for x in update_norms(plain)])   # rank 4


def test_an_adapter_of_a_language_model_is_read_and_not_converted(tmp_path):
    file = {f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight": torch.ones(s)
            for x, s in (("A", (2, 8)), ("B", (8, 2)))}
    save_file(file, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 1}')
    lora = read_lora(tmp_path)
    assert "fits: neither" in passport(lora)[1] and update_norms(lora) == pytest.approx([8.0])
    with pytest.raises(CourseError, match="no layer of SD 1.5"): convert_lora(lora, "kohya")


KEY = "lora_unet_down_blocks_0_attentions_0_proj_in"
GOOD = {f"{KEY}.lora_down.weight": torch.ones(2, 320, 1, 1),
        f"{KEY}.lora_up.weight": torch.ones(320, 2, 1, 1), f"{KEY}.alpha": torch.tensor(1.)}


def damaged(name):
    if name == "nan": return {**GOOD, f"{KEY}.lora_up.weight": torch.ones(320, 2, 1, 1) * torch.nan}
    if name == "ranks": return {**GOOD, f"{KEY}.lora_up.weight": torch.ones(320, 3, 1, 1)}
    if name == "half": return {k: v for k, v in GOOD.items() if "up" not in k}
    if name == "alpha": return {**GOOD, f"{KEY}.alpha": torch.tensor(float("nan"))}
    if name == "alphas": return {**GOOD, f"{KEY}.alpha": torch.ones(2)}
    if name == "zero": return {**GOOD, f"{KEY}.lora_up.weight": torch.zeros(320, 2, 1, 1)}
    if name == "whole": return {k: v.to(torch.int8) for k, v in GOOD.items()}
    if name == "other": return {"a.weight": torch.ones(1)}


@pytest.mark.parametrize("data, says, code", [
    (b"", "is empty", 1), (save(GOOD)[:-9], "cut short", 1), (save(GOOD)[:30], "cut short", 1),
    (b"\x80\x04\x95abc", "a pickle", 1), (b"PK\x03\x04" + bytes(90), "a pickle", 1),
    (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS", 1), (b"<html>", "a web page", 1),
    (b"\xff" * 64, "no safetensors file", 1), (save(damaged("nan")), "numbers that are none", 1),
    (save(damaged("ranks")), "do not fit", 1), (save(damaged("half")), "lacks one matrix", 1),
    (save(damaged("other")), "holds no LoRA", 1), (save(damaged("zero")), "never trained", 1),
    (save(GOOD, {"lora_adapter_metadata": "[1]"}), "no JSON object", 1),
    (save(damaged("whole")), "no real numbers", 1), (save(GOOD)+ b"more", "damaged", 1),
    (save({"a\x1b[2J.alpha": torch.ones(1)}), "damaged", 1),
    (save(damaged("alpha")), "numbers that are none", 1), (save(damaged("alphas")), "2 numbers", 1),
    (save(GOOD), "SD 1.5", 0),
    (None, "There is no LoRA file", 1)])
def test_the_sentence_for_every_file(tmp_path, capsys, data, says, code):
    from mlcourse.cli import main
    file = tmp_path / "我的 风格.safetensors"
    if data is not None: file.write_bytes(data)
    assert main(["lora-passport", str(file)]) == code
    out, err = capsys.readouterr()
    assert says in out + err and "Traceback" not in err and "went wrong" not in err
    assert data is None or file.read_bytes() == data


def test_the_command_converts_and_overwrites_nothing(tmp_path, capsys):
    from mlcourse.cli import main
    file = tmp_path / "a b.safetensors"
    save_file(GOOD, file)
    assert main(["lora-passport", str(file), "--to", "diffusers"]) == 0
    assert (tmp_path / "a b.diffusers.safetensors").is_file()
    assert main(["lora-passport", str(file), "--to", "kohya", "--output", str(file)]) == 2
    assert "is there already" in capsys.readouterr().err
    tmp_path.chmod(0o555)
    if not os.access(tmp_path, os.W_OK):   # root may write anywhere
        assert main(["lora-passport", str(file), "--to", "peft"]) == 1
        assert "ermission denied" in capsys.readouterr().err
    tmp_path.chmod(0o755)


@pytest.mark.parametrize("config", [
    {"lora_alpha": "much"}, {"alpha_pattern": [1]}, {"lora_alpha": 1, "rank_pattern": {"(": 1}},
    {"r": 3, "lora_alpha": 1}, {"lora_alpha": [1]}])
def test_a_configuration_that_makes_no_sense(tmp_path, config):
    file = {f"base_model.model.a.lora_{x}.weight": torch.ones(s) for x, s in
            (("A", (2, 8)), ("B", (8, 2)))}
    save_file(file, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CourseError, match="configuration"): read_lora(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"unet.lora_alpha": 1e999}', "5", "",
    '{"unet.lora_alpha": NaN}', '{"unet.lora_alpha": 1%s}' % ("0" * 400)])
def test_a_header_that_makes_no_sense(tmp_path, text):
    file = {f"unet.conv_in.lora_{x}.weight": torch.ones(s) for x, s in
            (("A", (2, 4, 3, 3)), ("B", (320, 2, 1, 1)))}
    save_file(file, tmp_path / "a.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(CourseError, match="configuration"): read_lora(tmp_path / "a.safetensors")
    for tags in (text, '{"a": [1]}', '{"a": {"b": "c"}}'):
        assert not any("b (" in line for line in header_lines({"ss_tag_frequency": tags}))


ATTN = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize("key, shape, name", [
    ("diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q", (320, 320),
     f"unet.{ATTN}"),
    (f"lycoris_{ATTN}".replace(".", "_"), (320, 320), f"unet.{ATTN}"),
    ("text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1", (3072, 768),
     "text_encoder.text_model.encoder.layers.0.mlp.fc1"),
    ("text_encoders.clip_g.transformer.text_projection", (1280, 1280),
     "text_encoder_2.text_projection")])
def test_what_comfyui_and_lycoris_write(tmp_path, key, shape, name):
    file = {f"{key}.lora_down.weight": torch.ones(2, shape[1]), f"{key}.alpha": torch.tensor([1.]),
            f"{key}.lora_up.weight": torch.ones(shape[0], 2)}
    save_file(file, tmp_path / "a.safetensors")
    lora = read_lora(tmp_path / "a.safetensors")
    assert [n.name for n in lora.layers] == [name] and fits(lora)
    assert taken_alphas(lora, "ComfyUI") == [1]


def test_both_text_encoders_of_sdxl_come_back_from_peft(tmp_path):
    file = {}
    for n in [n for n in model_layers("SDXL") if re.search(r"encoder.*(\.(3|31)\..*fc1|ction)", n)]:
        out, inside = model_layers("SDXL")[n]
        key = spell(n, "kohya", True)
        file |= {f"{key}.lora_down.weight": torch.randn(3, inside),
                 f"{key}.lora_up.weight": torch.randn(out, 3), f"{key}.alpha": torch.tensor(1.)}
    assert len(file) == 12
    save_file(file, tmp_path / "a.safetensors")
    middle = write_lora(read_lora(tmp_path / "a.safetensors"), "peft")
    back = load_file(write_lora(read_lora(middle), "kohya", tmp_path / "b.safetensors"))
    assert back.keys() == file.keys() and all(torch.equal(back[k], v) for k, v in file.items())
    config = middle / "text_encoder_2" / "adapter_config.json"      # alpha needs 64 bits now
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_rslora": True}), "utf-8")
    root = read_lora(middle)
    again = read_lora(write_lora(root, "kohya", tmp_path / "c.safetensors"))
    assert [n.alpha for n in again.layers] == [n.alpha for n in root.layers]
    assert 3 ** .5 in [n.alpha for n in root.layers]


def test_a_folder_of_several_files(tmp_path, capsys):
    from mlcourse.cli import main
    run = tmp_path / "run 1.5"
    for place in (run, run / "checkpoint-1", run / "checkpoint-2"):
        place.mkdir()
        save_file({f"base_model.model.{ATTN}.lora_{x}.weight": torch.ones(s) for x, s in
                   (("A", (2, 320)), ("B", (320, 2)))}, place / "adapter_model.safetensors")
        (place / "adapter_config.json").write_text('\ufeff{"r": 2, "lora_alpha": 1}', "utf-8")
    assert len(read_lora(run).layers) == 1                      # and none of the checkpoints
    assert main(["lora-passport", str(run), "--to", "kohya"]) == 0
    assert (tmp_path / "run 1.5.kohya.safetensors").is_file()
    (run / "adapter_model.safetensors").unlink()
    with pytest.raises(CourseError, match="several LoRAs: give one, such as .*checkpoint-1"):
        read_lora(run)
    save_file(GOOD, run / "pytorch_lora_weights.safetensors")   # as diffusers saves
    assert len(read_lora(run).layers) == 1
    old = tmp_path / "old"
    old.mkdir()
    with pytest.raises(CourseError, match="no LoRA file in the folder"): read_lora(old)
    (old / "adapter_model.bin").write_bytes(b"PK\3\4" + bytes(90))
    with pytest.raises(CourseError, match="a pickle"): read_lora(old)


def test_a_folder_for_peft_is_whole_or_not_there(tmp_path, monkeypatch):
    save_file(GOOD, tmp_path / "a.safetensors")
    def full(path, value): raise OSError(28, "No space left on device")
    monkeypatch.setattr(module, "write_json", full)
    with pytest.raises(OSError): write_lora(read_lora(tmp_path / "a.safetensors"), "peft")
    assert [f.name for f in tmp_path.iterdir()] == ["a.safetensors"]


def test_adalora_and_unknown_names(tmp_path):
    key = "base_model.model.model.layers.0.q_proj"
    save_file({f"{key}.lora_A": torch.ones(2, 8), f"{key}.lora_B": torch.ones(8, 2),
               f"{key}.lora_E": torch.ones(2, 1)}, tmp_path / "a.safetensors")
    assert [n.kind for n in read_lora(tmp_path / "a.safetensors").layers] == ["AdaLoRA"]
    flux = {f"lora_unet_double_blocks_{i}_img_attn_qkv.lora_{x}.weight": torch.ones(s)
            for i in range(3) for x, s in (("down", (2, 8)), ("up", (8, 2)))}
    save_file(flux, tmp_path / "b.safetensors")
    assert passport(read_lora(tmp_path / "b.safetensors"))[2:4] == [
        "layers: lora_unet 3", "modules: img_attn_qkv 3"]


def test_one_layer_in_two_spellings_is_not_converted(tmp_path):
    other = {f"unet.down_blocks.0.attentions.0.proj_in.lora_{x}.weight": torch.ones(s) for x, s in
             (("A", (2, 320, 1, 1)), ("B", (320, 2, 1, 1)))}
    save_file({**GOOD, **other}, tmp_path / "a.safetensors")
    lora = read_lora(tmp_path / "a.safetensors")
    assert lora.convention == "mixed"
    with pytest.raises(CourseError, match="one layer twice"): convert_lora(lora, "kohya", 1)


@pytest.mark.parametrize("args, says", [(["--to", "webui"], "There is no form"),
                                        (["--alpha", "2"], "need --to"),
                                        (["--to", "peft", "--alpha", "2"], "Leave --alpha out")])
def test_bad_usage(tmp_path, capsys, args, says):
    from mlcourse.cli import main
    save_file(GOOD, tmp_path / "a.safetensors")
    assert main(["lora-passport", str(tmp_path / "a.safetensors"), *args]) == 2
    assert says in capsys.readouterr().err


def test_the_planners_configurations_are_the_models():
    assert {m: len(model_layers(m)) for m in MODELS} == {"SD 1.5": 354, "SDXL": 1059}
