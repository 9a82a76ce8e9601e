"""train_qlora as a process: the guide's flags, kill and resume, broken checkpoints, a full disk, two processes. The lesson tests the rest."""
import json, os, resource, signal, subprocess, sys
from pathlib import Path

import pytest
from mlcourse import qlora
from mlcourse.instruct import DataError, course_data, read_pairs, write_jsonl
from mlcourse.qlora import FlagError, Flags, TrainError, check_flags, damage, last_checkpoint, launch_command, launch_configs, main, parse_flags, seal, train

ROOT = Path(__file__).resolve().parent.parent
GUIDE = ("--model_name meta-llama/Meta-Llama-3.1-8B-Instruct --dataset your.jsonl --load_in_4bit --bf16 --gradient_checkpointing --lora_r 16 --lora_alpha 32 "
         "--lora_dropout 0.05 --per_device_train_batch_size 1 --gradient_accumulation_steps 16 --max_seq_length 2048 --num_train_epochs 2 --output_dir ./lora-llama3.1-8b").split()


# ---------------------------------------------------------------- flags and checkpoints: no model

def test_flags_of_the_guide():
    f = parse_flags(GUIDE)
    assert (f.load_in_4bit, f.bf16, f.gradient_checkpointing, f.lora_r, f.lora_alpha, f.lora_dropout) == (True, True, True, 16, 32, 0.05)
    assert (f.per_device_train_batch_size, f.gradient_accumulation_steps, f.max_seq_length, f.num_train_epochs) == (1, 16, 2048, 2)
    assert check_flags(f).output_dir == "./lora-llama3.1-8b"


@pytest.mark.parametrize("change, word", [(dict(lora_r=0), "--lora_r"), (dict(report_to="paper"), "--report_to"), (dict(learning_rate=0), "--learning_rate"),
                                          (dict(lora_dropout=1), "--lora_dropout"), (dict(max_steps=0), "--max_steps"), (dict(optim="sgd"), "--optim"),
                                          (dict(num_train_epochs=0), "--num_train_epochs"), (dict(push_to_hub="mine"), "OWNER/NAME")])
def test_flags_that_make_no_sense(change, word):
    with pytest.raises(FlagError, match=word): check_flags(Flags("m", "d.jsonl", "out", **change))


def test_bad_usage_exits_2(capsys):
    with pytest.raises(SystemExit) as e: main(["--model_name", "m"])
    assert e.value.code == 2
    assert main(["--model_name", "m", "--dataset", "d", "--output_dir", "o", "--lora_r", "0"]) == 2
    assert "--lora_r must be at least 1" in capsys.readouterr().err


def test_help_needs_no_torch():
    code = "import sys; from mlcourse.qlora import parse_flags\ntry: parse_flags(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "frozen weights in NF4" in " ".join(out.split()) and out.rstrip().endswith("False")


@pytest.mark.parametrize("command", [["train_qlora.py"], ["-m", "mlcourse.qlora"]])
def test_both_ways_to_call_it(command):
    done = subprocess.run([sys.executable, *command, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "--gradient_accumulation_steps" in done.stdout


def test_a_checkpoint_is_whole_or_passed_over(tmp_path):
    for n in (2, 4, 10):
        (tmp_path/f"checkpoint-{n}").mkdir()
        (tmp_path/f"checkpoint-{n}"/"weights").write_bytes(b"x" * 100)
        if n < 10: seal(tmp_path/f"checkpoint-{n}")
    said = []
    assert last_checkpoint(tmp_path, said.append).name == "checkpoint-4"   # 10 has no manifest: its writer was killed
    assert len(said) == 1 and "checkpoint-10" in said[0] and "not finished" in said[0]
    (tmp_path/"checkpoint-4"/"weights").write_bytes(b"x" * 50)
    assert "damaged" in damage(tmp_path/"checkpoint-4")
    assert last_checkpoint(tmp_path, said.append).name == "checkpoint-2"
    (tmp_path/"checkpoint-2"/"weights").unlink()
    assert "missing" in damage(tmp_path/"checkpoint-2")
    assert last_checkpoint(tmp_path, said.append) is None


def test_launch_configurations_are_accelerates(tmp_path):
    from accelerate.commands.config.config_args import load_config_from_file
    kinds = {name: str(load_config_from_file(str(path)).distributed_type) for name, path in launch_configs().items()}
    assert {k: v.rpartition(".")[2] for k, v in kinds.items()} == dict(cpu2="MULTI_GPU", ddp="MULTI_GPU", fsdp="FSDP", zero2="DEEPSPEED", zero3="DEEPSPEED")
    assert [load_config_from_file(str(launch_configs()[f"zero{z}"])).deepspeed_config["zero_stage"] for z in (2, 3)] == [2, 3]
    with pytest.raises(FlagError, match="zero2"): launch_command("zero9")


# ---------------------------------------------------------------- runs: a small random model, the real trainer

@pytest.fixture(scope="session")
def small(tmp_path_factory):
    "A folder with a Llama of two layers and the course's tokenizer, and one with 40 pairs."
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed
    from mlcourse.llm import model_path
    folder = tmp_path_factory.mktemp("small")
    tok = AutoTokenizer.from_pretrained(model_path("smollm2-135m-instruct"))
    set_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                 tie_word_embeddings=True, pad_token_id=tok.pad_token_id, max_position_embeddings=512)).save_pretrained(folder/"model")
    tok.save_pretrained(folder/"model")
    write_jsonl(folder/"train.jsonl", read_pairs(course_data()/"train.jsonl")[0][:40])
    return folder


def flags_for(small, out, **change) -> Flags:
    known = dict(load_in_4bit=True, lora_dropout=0.1, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_seq_length=128, max_steps=6, save_steps=2, learning_rate=1e-2)
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
    return json.loads((folder/"training.json").read_text())["losses"], (folder/"adapter_model.safetensors").read_bytes()


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
    (losses, adapter), (their_losses, their_adapter) = outcome(tmp_path/"whole"), outcome(tmp_path/"broken")
    assert len(losses) == 60 and losses == their_losses and adapter == their_adapter


@pytest.mark.slow
def test_truncated_checkpoint_falls_back(small, tmp_path):
    train(flags_for(small, tmp_path), print)
    before = outcome(tmp_path)
    with open(tmp_path/"checkpoint-6"/"optimizer.pt", "r+b") as f: f.truncate(1000)
    said = []
    train(flags_for(small, tmp_path, resume=True), said.append)
    assert any("checkpoint-6 cannot be used: optimizer.pt is damaged" in s for s in said) and "Going on from checkpoint-4." in said
    assert outcome(tmp_path) == before


@pytest.mark.slow
def test_nan_stops_and_keeps_checkpoints(small, tmp_path):
    with pytest.raises(TrainError, match="Lower --learning_rate"): train(flags_for(small, tmp_path, learning_rate=1e30, save_steps=1), print)
    assert last_checkpoint(tmp_path, print) is not None


@pytest.mark.slow
def test_full_disk_is_a_sentence_and_keeps_checkpoints(small, tmp_path):
    flags = flags_for(small, tmp_path, max_steps=400)
    process = subprocess.Popen(command(flags), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 5 "): process.kill(); break
    process.wait()
    process.stdout.close()
    before = last_checkpoint(tmp_path, print)
    done = subprocess.run([*command(flags), "--resume"], capture_output=True, text=True,   # no file may grow beyond 64 kB, as if the disk were full
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)))
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
    train(flags, said.append)
    assert any("line 41 cannot be used" in s for s in said) and (tmp_path/"data.rejected.jsonl").is_file()
    data.write_text("{broken\n", encoding="utf-8")
    with pytest.raises(DataError, match="No line"): train(flags, said.append)


@pytest.mark.slow
def test_what_cannot_fit_is_refused_with_advice(small, tmp_path):
    with pytest.raises(TrainError, match="--per_device_train_batch_size"):
        train(flags_for(small, tmp_path/"out", vram=0.75, per_device_train_batch_size=256), print)
    assert not (tmp_path/"out").exists()


@pytest.mark.slow
def test_two_runs_are_not_mixed(small, tmp_path):
    train(flags_for(small, tmp_path, max_steps=2), print)
    with pytest.raises(FlagError, match="--resume"): train(flags_for(small, tmp_path, max_steps=2), print)
    with pytest.raises(FlagError, match="learning_rate"): train(flags_for(small, tmp_path, max_steps=2, learning_rate=1e-3, resume=True), print)


@pytest.mark.slow
def test_wandb_offline(small, tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"): monkeypatch.delenv(name, raising=False)
    done = subprocess.run(command(flags_for(small, tmp_path, report_to="wandb", max_steps=2)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs = list((tmp_path/"wandb").glob("offline-run-*"))
    assert len(runs) == 1 and any(f.suffix == ".wandb" for f in runs[0].iterdir())


@pytest.mark.slow
def test_tensorboard_and_trackio_write_below_the_output(small, tmp_path):
    for name in ("tensorboard", "trackio"):
        done = subprocess.run(command(flags_for(small, tmp_path/name, report_to=name, max_steps=2)), capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        assert done.returncode == 0, done.stderr
    assert list((tmp_path/"tensorboard"/"runs").rglob("events.*"))
    assert any((tmp_path/"trackio"/"trackio").rglob("*.db"))


@pytest.mark.slow
def test_two_processes_give_what_one_gives(small, tmp_path):
    one = flags_for(small, tmp_path/"one", lora_dropout=0.0, per_device_train_batch_size=4, gradient_accumulation_steps=1, load_in_4bit=False, learning_rate=3e-4)
    two = flags_for(small, tmp_path/"two", lora_dropout=0.0, per_device_train_batch_size=2, gradient_accumulation_steps=1, load_in_4bit=False, learning_rate=3e-4)
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for run in (command(one), launch_command("cpu2", *as_words(two))):
        done = subprocess.run(run, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        assert "6 steps of 4 sequences" in done.stdout
    a, b = (outcome(tmp_path/n)[0] for n in ("one", "two"))
    assert len(a) == len(b) == 6 and max(abs(x - y) for x, y in zip(a, b)) < 1e-3
