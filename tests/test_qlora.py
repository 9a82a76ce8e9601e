"""train_qlora as a process: the guide's flags, kill and resume, a full disk, two processes."""
import json, os, resource, signal, subprocess, sys
from pathlib import Path

import pytest
from mlcourse.files import UsageError, no_progress
from mlcourse.hub import hub, thin_model
from mlcourse.instruct import DataError, course_data, read_pairs, write_jsonl
from mlcourse.qlora import (answers, encode_file, load_base, main, sees_neighbour, source_of,
                            train)
from mlcourse.train import (FlagError, Flags, TrainError, _wandb_key, check_flags, check_shares,
                            damage, last_checkpoint, launch_command, launch_configs, parse_flags,
                            seal)

ROOT = Path(__file__).resolve().parent.parent
GUIDE = ("--model_name meta-llama/Meta-Llama-3.1-8B-Instruct --dataset your.jsonl --load_in_4bit "
         "--bf16 --gradient_checkpointing --lora_r 16 --lora_alpha 32 --lora_dropout 0.05 "
         "--per_device_train_batch_size 1 --gradient_accumulation_steps 16 --max_seq_length 2048 "
         "--num_train_epochs 2 --output_dir ./lora-llama3.1-8b").split()
MUST = "--model_name m --dataset d --output_dir o".split()
LLAMA = ("meta-llama/Meta-Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct",
         "Llama-3.1-8B-Instruct")


# ---------------------------------------------------------------- flags and checkpoints: no model

def test_flags_of_the_guide():
    f = parse_flags(GUIDE)
    assert f.load_in_4bit and f.bf16 and f.gradient_checkpointing
    assert (f.lora_r, f.lora_alpha, f.lora_dropout) == (16, 32, 0.05)
    assert (f.per_device_train_batch_size, f.gradient_accumulation_steps) == (1, 16)
    assert (f.max_seq_length, f.num_train_epochs) == (2048, 2)
    assert check_flags(f).output_dir == "./lora-llama3.1-8b"


@pytest.mark.parametrize("change", [
    dict(lora_r=0), dict(report_to="paper"), dict(learning_rate=0), dict(lora_dropout=1),
    dict(max_steps=0), dict(optim="sgd"), dict(num_train_epochs=0), dict(push_to_hub="mine")])
def test_flags_that_make_no_sense(change):
    with pytest.raises(FlagError, match=f"--{list(change)[0]}"):
        check_flags(Flags("m", "d.jsonl", "out", **change))


def test_the_model_s_folder_takes_no_adapter(tmp_path):
    (tmp_path/"config.json").write_text("{}")
    with pytest.raises(FlagError, match="holds a model"):
        check_flags(Flags(str(tmp_path), "d.jsonl", str(tmp_path)))


def test_bad_usage_exits_2(capsys):
    with pytest.raises(SystemExit) as e: main(["--model_name", "m"])
    assert e.value.code == 2
    assert main([*MUST, "--lora_r", "0"]) == 2
    assert "--lora_r must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["--lora_rank 8", "--lora_alph 8", "--lora_r many",
                                   "--bf16 perhaps", "stray"])
def test_what_cannot_be_read_is_a_sentence(words, capsys):
    "A misspelt or shortened flag is never another flag."
    with pytest.raises(SystemExit) as e: main([*MUST, *words.split()])
    said = capsys.readouterr().err
    assert e.value.code == 2 and "error: " in said and words.split()[0] in said
    assert "Traceback" not in said


def test_flags_take_values_and_hyphens():
    words = "--model-name m --dataset d --output-dir o --bf16 no --load_in_4bit true --max_steps -1"
    f = parse_flags(words.split())
    assert (f.model_name, f.bf16, f.load_in_4bit, f.max_steps) == ("m", False, True, -1)
    assert not f.resume
    assert issubclass(FlagError, UsageError)


def test_both_names_of_the_model_are_one(monkeypatch):
    "Else the same 16 GB would be downloaded twice."
    import mlcourse.llm
    asked = []
    monkeypatch.setattr(mlcourse.llm, "model_path", lambda name: asked.append(name) or "there")
    assert [source_of(name) for name in LLAMA] == ["there"] * 3
    assert asked == ["llama-3.1-8b-instruct"] * 3
    assert source_of("somebody/something") == "somebody/something" and len(asked) == 3


def test_help_needs_no_torch():
    code = ("import sys\nfrom mlcourse.qlora import main\n"
            "try: main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    out = done.stdout
    assert "frozen weights in NF4" in " ".join(out.split()) and out.rstrip().endswith("False")


@pytest.mark.parametrize("command", [["train_qlora.py"], ["-m", "mlcourse.qlora"]])
def test_both_ways_to_call_it(command):
    done = subprocess.run([sys.executable, *command, "--help"], capture_output=True, text=True,
                          cwd=ROOT)
    assert done.returncode == 0 and "--gradient_accumulation_steps" in done.stdout


def test_a_checkpoint_is_whole_or_passed_over(tmp_path):
    for n in (2, 4, 10):
        (tmp_path/f"checkpoint-{n}").mkdir()
        (tmp_path/f"checkpoint-{n}"/"weights").write_bytes(b"x" * 100)
        if n < 10: seal(tmp_path/f"checkpoint-{n}")
    (tmp_path/"checkpoint-best").mkdir()
    said = []
    def hear(done, total, what=""): said.append(what)
    assert last_checkpoint(tmp_path, hear).name == "checkpoint-4"   # the writer of 10 was killed
    assert len(said) == 1 and "checkpoint-10" in said[0] and "not finished" in said[0]
    (tmp_path/"checkpoint-4"/"weights").write_bytes(b"x" * 50)
    assert "damaged" in damage(tmp_path/"checkpoint-4")
    assert last_checkpoint(tmp_path, hear).name == "checkpoint-2"
    (tmp_path/"checkpoint-2"/"weights").unlink()
    assert "missing" in damage(tmp_path/"checkpoint-2")
    assert last_checkpoint(tmp_path, hear) is None


def test_wandb_finds_its_key(tmp_path, monkeypatch):
    "In WANDB_API_KEY, or in the file where `wandb login` leaves it."
    file = tmp_path/"netrc"
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(file))
    assert not _wandb_key()                                    # no such file
    for words, found in (("nonsense", False),
                         ("machine other.com login me password x", False),
                         ("machine api.wandb.ai login user password x", True)):
        file.write_text(words + "\n", encoding="utf-8")
        file.chmod(0o600)
        assert _wandb_key() == found, words
    monkeypatch.setenv("NETRC", str(tmp_path))                 # a folder
    assert not _wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert _wandb_key()


def test_launch_configurations_are_accelerates(tmp_path):
    from accelerate.commands.config.config_args import load_config_from_file
    read = {name: load_config_from_file(str(path)) for name, path in launch_configs().items()}
    kinds = {name: str(c.distributed_type).rpartition(".")[2] for name, c in read.items()}
    assert kinds == dict(cpu2="MULTI_GPU", ddp="MULTI_GPU", fsdp="FSDP", zero2="DEEPSPEED",
                         zero3="DEEPSPEED")
    assert [read[f"zero{z}"].deepspeed_config["zero_stage"] for z in (2, 3)] == [2, 3]
    with pytest.raises(FlagError, match="zero2"): launch_command("zero9", "mlcourse.qlora")


ZERO3 = dict(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE="3",
             ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE="none",
             ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE="none")

@pytest.mark.parametrize("env, flags, says", [
    ({}, dict(load_in_4bit=True), None),
    (dict(ACCELERATE_USE_FSDP="true"), dict(load_in_4bit=True), "FSDP with --load_in_4bit needs"),
    (dict(ACCELERATE_USE_FSDP="true"), dict(load_in_4bit=True, bf16=True), None),
    (ZERO3, dict(load_in_4bit=True), "ZeRO-3 with --load_in_4bit needs --bf16"),
    (ZERO3, dict(load_in_4bit=True, bf16=True), None),
    (ZERO3 | dict(ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE="cpu"),
     dict(load_in_4bit=True, bf16=True), "set offload_param_device to none"),
    (ZERO3 | dict(ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE="cpu"), dict(bf16=True), None),
    (ZERO3 | dict(ACCELERATE_DEEPSPEED_ZERO_STAGE="2"), dict(load_in_4bit=True), None)])
def test_4bit_weights_in_shares_are_asked_for_what_they_need(env, flags, says, monkeypatch):
    for name in (*ZERO3, "ACCELERATE_USE_FSDP"): monkeypatch.delenv(name, raising=False)
    for name, value in env.items(): monkeypatch.setenv(name, value)
    flags = Flags("m", "d", "o", **flags)
    if says is None: return check_shares(flags)
    with pytest.raises(FlagError, match=says): check_shares(flags)


def test_zero3_of_the_course_keeps_4bit_weights_on_the_cards():
    "What accelerate hands to the processes passes our own check."
    from accelerate.commands.config.config_args import load_config_from_file
    zero = load_config_from_file(str(launch_configs()["zero3"]))
    assert zero.mixed_precision == "bf16"
    assert {zero.deepspeed_config[f"offload_{what}_device"] for what in ("param", "optimizer")} \
        == {"none"}


# ------------------------------------------------ runs: a small model, the real trainer

@pytest.fixture(scope="session")
def small(tmp_path_factory):
    "A folder with a Llama of two layers and the course's tokenizer, and one with 40 pairs."
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed
    from mlcourse.llm import model_path
    folder = tmp_path_factory.mktemp("small")
    tok = AutoTokenizer.from_pretrained(model_path("smollm2-135m-instruct"))
    set_seed(0)
    shape = LlamaConfig(vocab_size=len(tok), hidden_size=64, intermediate_size=128,
                        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                        tie_word_embeddings=True, pad_token_id=tok.pad_token_id,
                        max_position_embeddings=512)
    LlamaForCausalLM(shape).save_pretrained(folder/"model")
    tok.save_pretrained(folder/"model")
    write_jsonl(folder/"train.jsonl", read_pairs(course_data()/"train.jsonl")[0][:40])
    return folder


def flags_for(small, out, **change) -> Flags:
    known = dict(load_in_4bit=True, lora_dropout=0.1, per_device_train_batch_size=2,
                 gradient_accumulation_steps=2, max_seq_length=128, max_steps=6, save_steps=2,
                 learning_rate=1e-2)
    return Flags(str(small/"model"), str(small/"train.jsonl"), str(out), **(known | change))


def as_words(flags: Flags) -> list[str]:
    "The command line that gives these flags."
    words = []
    for k, v in vars(flags).items():
        if v is True: words.append(f"--{k}")
        elif v is not False and v != "": words += [f"--{k}", str(v)]
    return words


def command(flags): return [sys.executable, "-m", "mlcourse.qlora", *as_words(flags)]


def outcome(folder):
    "What two runs are compared by: every loss, and the bytes of the adapter."
    losses = json.loads((folder/"training.json").read_text())["losses"]
    return losses, (folder/"adapter_model.safetensors").read_bytes()


@pytest.mark.slow
def test_the_12gb_column_has_thousands_of_distinct_pairs():
    "The lesson's settings for the card, and the number that its first table says."
    pairs = read_pairs(course_data(20_000, 0.2, rehearsals=20)/"train.jsonl")[0]
    assert 5_000 <= len({json.dumps(p["messages"]) for p in pairs}) <= 10_000
    lesson = (ROOT/"nbs/week2/02_qlora.ipynb").read_text(encoding="utf-8")
    assert f"| {len(pairs):,} pairs of the same kind |" in lesson
    for setting in ("20_000),", "(0.3,                  0.2)", "(2,                    20)"):
        assert setting in lesson


@pytest.mark.slow
def test_gradients_pass_after_an_evaluation(small):
    "On a processor that multiplies in bfloat16, a layer repacked by an evaluation has none."
    import torch
    model, _ = load_base(str(small/"model"))
    layer = model.model.layers[0].mlp.up_proj.eval()
    with torch.no_grad():
        weight = layer(torch.eye(layer.in_features, dtype=torch.bfloat16)).T.float()
    x = torch.randn(4, layer.in_features).bfloat16().requires_grad_()
    layer.train()(x).sum().backward()
    expected = weight.sum(0)
    assert (x.grad.float() - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.slow
def test_a_processor_scores_labelled_positions_alone(small, tmp_path, monkeypatch):
    "As TRL does on a card: in an epoch, as many as there are labels in the data."
    import torch
    from trl.trainer import utils
    if torch.cuda.is_available(): pytest.skip("TRL's own way")
    real, seen = utils._ChunkedLogProbFunction.apply, []
    class Counted:
        @staticmethod
        def apply(hidden, weight, bias, targets, *more):
            seen.append(len(targets))
            return real(hidden, weight, bias, targets, *more)
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Counted)
    result = train(flags_for(small, tmp_path, max_steps=-1))
    rows = encode_file(str(small/"train.jsonl"), result.tok, flags_for(small, tmp_path))
    assert sum(seen) == sum(label != -100 for r in rows for label in r["labels"])


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_example_does_not_see_its_neighbour(attention, small):
    "Its scores behind another are those that it has alone; with plain positions they differ."
    import torch
    model, tok = load_base(str(small/"model"), load_in_4bit=False, bf16=False)
    model.set_attn_implementation(attention)
    said = "The first one.", "The second, longer."
    a, b = (tok(t, return_tensors="pt").input_ids for t in said)
    packed, n = torch.cat([a, b], 1), a.shape[1]
    positions = torch.cat([torch.arange(n), torch.arange(b.shape[1])])[None]
    with torch.inference_mode():
        alone, leaking = model(b).logits, model(packed).logits[:, n:]
        behind = model(packed, position_ids=positions, use_cache=False).logits[:, n:]   # as trained
    assert (alone - behind).abs().max() < 1e-4 and (alone - leaking).abs().max() > 1e-2
    assert not sees_neighbour(model)
    real = model.forward
    model.forward = lambda ids, position_ids=None, **kw: real(ids, **kw)   # one that ignores them
    assert sees_neighbour(model)


@pytest.mark.slow
@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_packed_pairs_are_learned_as_alone(load_in_4bit, small, tmp_path):
    "All pairs in one step: the same loss with and without padding, and the plan knows the rows."
    same = dict(lora_dropout=0.0, gradient_accumulation_steps=1, load_in_4bit=load_in_4bit,
                max_steps=2, max_seq_length=256)
    alone = train(flags_for(small, tmp_path/"alone", per_device_train_batch_size=40, **same))
    packed = train(flags_for(small, tmp_path/"packed", per_device_train_batch_size=40,
                             packing=True, **same))
    assert packed.plan.pairs == alone.plan.pairs == 40 and alone.plan.packed == 0
    assert packed.plan.packed < 20 and f"in {packed.plan.packed} sequences" in str(packed.plan)
    far = 2e-2 if load_in_4bit else 1e-3    # adapters in bfloat16 there
    assert max(abs(a - b) for a, b in zip(alone.losses, packed.losses)) < far
    epoch = flags_for(small, tmp_path/"epoch", packing=True, dry_run=True, **(same | dict(
        max_steps=-1)))
    assert train(epoch).plan.steps == -(-packed.plan.packed // 2)


@pytest.mark.slow
def test_a_model_that_would_see_its_neighbour_is_not_packed(small, tmp_path, monkeypatch):
    monkeypatch.setattr("mlcourse.qlora.sees_neighbour", lambda model: True)
    with pytest.raises(TrainError, match="Leave out --packing"):
        train(flags_for(small, tmp_path, packing=True))


@pytest.mark.slow
def test_answers_in_a_batch_are_those_of_one_alone(small):
    "What all conversations begin with is read once; shorter ones have a gap behind it."
    model, tok = load_base(str(small/"model"), load_in_4bit=False, bf16=False)
    system, side = dict(role="system", content="Write the record of this line."), tok.padding_side
    asked = [[system, dict(role="user", content=text)] for text in ("a", "b c d e", "f " * 20)]
    asked.append([dict(role="user", content="Something else")])
    alone = [answers(model, tok, [conversation], 12)[0] for conversation in asked]
    assert answers(model, tok, asked, 12) == alone
    assert answers(model, tok, asked[:3], 12, batch_size=2) == alone[:3]
    assert answers(model, tok, [], 12) == [] and tok.padding_side == side


@pytest.mark.slow
@pytest.mark.parametrize("trouble, says", [
    ("gated", "somebody/other is gated: accept its licence"),
    ("missing", "The hub has no model somebody/other")])
def test_a_model_that_the_hub_does_not_give_is_a_sentence(trouble, says, small, tmp_path):
    out = ["--dataset", str(small/"train.jsonl"), "--output_dir", str(tmp_path/"out")]
    away = ("HF_", "HUGGING_FACE")
    with hub([], trouble, more={"somebody/other": thin_model(LLAMA[1])}) as h:
        env = {k: v for k, v in os.environ.items() if not k.startswith(away)}
        done = subprocess.run(
            [sys.executable, "-m", "mlcourse.qlora", "--model_name", "somebody/other", *out],
            env=env | h.env | {"HF_HOME": str(tmp_path/"hf")}, capture_output=True, text=True)
    assert done.returncode == 1 and says in done.stderr, done.stderr
    assert "hf auth login" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path/"out").exists()


@pytest.mark.slow
def test_killed_and_resumed_is_bit_equal(small, tmp_path):
    whole = flags_for(small, tmp_path/"whole", max_steps=60, save_steps=4)
    done = subprocess.run(command(whole), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    broken = flags_for(small, tmp_path/"broken", max_steps=60, save_steps=4)
    process = subprocess.Popen(command(broken), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 21 "): process.send_signal(signal.SIGKILL); break
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert not (tmp_path/"broken"/"training.json").exists()
    again = subprocess.run([*command(broken), "--resume"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "Going on from checkpoint-" in again.stdout
    losses, adapter = outcome(tmp_path/"whole")
    assert len(losses) == 60 and outcome(tmp_path/"broken") == (losses, adapter)


@pytest.mark.slow
def test_truncated_checkpoint_falls_back(small, tmp_path):
    train(flags_for(small, tmp_path))
    before = outcome(tmp_path)
    with open(tmp_path/"checkpoint-6"/"optimizer.pt", "r+b") as f: f.truncate(1000)
    said = []
    train(flags_for(small, tmp_path, resume=True), lambda done, total, what="": said.append(what))
    assert any("checkpoint-6 cannot be used: optimizer.pt is damaged" in s for s in said)
    assert "Going on from checkpoint-4." in said
    assert outcome(tmp_path) == before


@pytest.mark.slow
def test_nan_stops_and_keeps_checkpoints(small, tmp_path):
    with pytest.raises(TrainError, match="Lower --learning_rate"):
        train(flags_for(small, tmp_path, learning_rate=1e30, save_steps=1))
    assert last_checkpoint(tmp_path) is not None


@pytest.mark.slow
def test_full_disk_is_a_sentence_and_keeps_checkpoints(small, tmp_path):
    flags = flags_for(small, tmp_path, max_steps=400)
    process = subprocess.Popen(command(flags), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 5 "): process.kill(); break
    process.wait()
    process.stdout.close()
    before = last_checkpoint(tmp_path)
    def small_files(): resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))   # a full disk
    done = subprocess.run([*command(flags), "--resume"], capture_output=True, text=True,
                          preexec_fn=small_files)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "could not be written" in done.stderr and "--resume" in done.stderr
    assert before is not None and damage(before) == ""


@pytest.mark.slow
def test_bad_lines_are_told_and_kept(small, tmp_path):
    data = tmp_path/"data.jsonl"
    data.write_text((small/"train.jsonl").read_text() + "{broken\n", encoding="utf-8")
    said = []
    flags = flags_for(small, tmp_path/"out", dry_run=True)
    flags.dataset = str(data)
    train(flags, lambda done, total, what="": said.append(what))
    assert any("line 41 cannot be used" in s for s in said)
    assert (tmp_path/"data.rejected.jsonl").is_file()
    data.write_text("{broken\n", encoding="utf-8")
    with pytest.raises(DataError, match="No line"): train(flags, no_progress)


@pytest.mark.slow
def test_what_cannot_fit_is_refused_with_advice(small, tmp_path):
    with pytest.raises(TrainError, match="--per_device_train_batch_size"):
        train(flags_for(small, tmp_path/"out", vram=0.75, per_device_train_batch_size=256))
    assert not (tmp_path/"out").exists()


@pytest.mark.slow
def test_two_runs_are_not_mixed(small, tmp_path):
    train(flags_for(small, tmp_path, max_steps=2))
    with pytest.raises(FlagError, match="--resume"): train(flags_for(small, tmp_path, max_steps=2))
    with pytest.raises(FlagError, match="learning_rate"):
        train(flags_for(small, tmp_path, max_steps=2, learning_rate=1e-3, resume=True))


@pytest.mark.slow
def test_wandb_offline(small, tmp_path, monkeypatch):
    for name in ("API_KEY", "MODE", "DIR"): monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path/"none"))
    flags = flags_for(small, tmp_path, report_to="wandb", max_steps=2)
    done = subprocess.run(command(flags), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs = list((tmp_path/"wandb").glob("offline-run-*"))
    assert len(runs) == 1 and any(f.suffix == ".wandb" for f in runs[0].iterdir())


@pytest.mark.slow
def test_tensorboard_and_trackio_write_below_the_output(small, tmp_path):
    for name in ("tensorboard", "trackio"):
        flags = flags_for(small, tmp_path/name, report_to=name, max_steps=2)
        done = subprocess.run(command(flags), capture_output=True, text=True,
                              env={**os.environ, "HF_HUB_OFFLINE": "1"})
        assert done.returncode == 0, done.stderr
    assert list((tmp_path/"tensorboard"/"runs").rglob("events.*"))
    assert any((tmp_path/"trackio"/"trackio").rglob("*.db"))


@pytest.mark.slow
def test_two_processes_give_what_one_gives(small, tmp_path):
    same = dict(lora_dropout=0.0, gradient_accumulation_steps=1, load_in_4bit=False,
                learning_rate=3e-4)
    one = flags_for(small, tmp_path/"one", per_device_train_batch_size=4, **same)
    two = flags_for(small, tmp_path/"two", per_device_train_batch_size=2, **same)
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for run in (command(one), launch_command("cpu2", "mlcourse.qlora", *as_words(two))):
        done = subprocess.run(run, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        assert "6 steps of 4 sequences" in done.stdout
    a, b = (outcome(tmp_path/n)[0] for n in ("one", "two"))
    assert len(a) == len(b) == 6 and max(abs(x - y) for x, y in zip(a, b)) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("how", ["zero2", "zero3"])
@pytest.mark.parametrize("packed", [[], ["--load_in_4bit"]], ids=["bf16", "4bit"])
def test_two_processes_under_deepspeed(how, packed, small, tmp_path):
    "With the extra `zero`, on processors over gloo: training goes on, and the adapter is whole."
    pytest.importorskip("deepspeed", reason="pip install 'mlcourse[zero]'")
    flags = flags_for(small, tmp_path/"out", load_in_4bit=False, bf16=True, max_steps=4)
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    run = [*launch_command(how, "mlcourse.qlora", *as_words(flags)), *packed]
    done = subprocess.run(run, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    losses, _ = outcome(tmp_path/"out")
    assert len(losses) == 4 and losses[-1] < losses[0]
