"""The allocator model and the replay, whatever is thrown at them, and workloads of two layers."""
from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

torch = pytest.importorskip("torch")

from mlcourse.trace import (  # noqa: E402
    MIB, Allocator, Event, OutOfMemory, Trace, fake, replay, trace)
from mlcourse.workload import Workload  # noqa: E402
from mlcourse.workloads import as_config, run  # noqa: E402

TINY = dict(model_type="llama", hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=128, vocab_size=512,
            max_position_embeddings=4096, tie_word_embeddings=False)
SIZES = st.one_of(st.integers(1, 2 * MIB), st.integers(MIB, 64 * MIB))
# allocate, then free the n-th living block if there is one
SCRIPTS = st.lists(st.tuples(SIZES, st.integers(0, 9)), max_size=80)


def events(script) -> list[Event]:
    "A script as events, all storages freed at the end."
    out, live = [], []
    for i, (nbytes, n) in enumerate(script):
        out.append(Event("alloc", i, nbytes, f"op{i}", "m"))
        live.append(out[-1])
        if n < len(live):
            e = live.pop(n)
            out.append(Event("free", e.id, e.nbytes, e.op, "m"))
    return out + [Event("free", e.id, e.nbytes, e.op, "m") for e in live]


@given(SCRIPTS)
@settings(max_examples=60, deadline=None)
def test_allocated_never_exceeds_reserved_and_all_comes_back(script):
    a, live = Allocator(), []
    for nbytes, n in script:
        live.append(a.malloc(nbytes))
        assert live[-1].size >= nbytes and live[-1].size % 512 == 0
        assert a.allocated == sum(b.size for b in live) <= a.reserved
        if n < len(live): a.free(live.pop(n))
    for b in live: a.free(b)
    assert a.allocated == 0
    assert a.empty_cache() == a.peak_reserved or a.reserved == 0
    assert a.reserved == 0


@given(SCRIPTS)
@settings(max_examples=60, deadline=None)
def test_blocks_of_a_segment_never_overlap(script):
    a, live = Allocator(), []
    for nbytes, n in script:
        live.append(a.malloc(nbytes))
        if n < len(live): a.free(live.pop(n))
    spans = sorted((b.seg, b.addr, b.addr + b.size) for b in live)
    assert all(p[0] != q[0] or p[2] <= q[1] for p, q in zip(spans, spans[1:]))


@given(SCRIPTS.filter(len))
@settings(max_examples=60, deadline=None)
def test_replay_agrees_with_the_trace(script):
    t = Trace(events(script))
    r = replay(t)
    assert t.peak <= r.peak_allocated <= r.peak_reserved and r.oom is None and r.timeline[-1] == 0
    assert max(r.timeline) == r.peak_allocated
    assert r.peak_op == t.events[r.timeline.index(r.peak_allocated)].op


@given(SCRIPTS.filter(len))
@settings(max_examples=60, deadline=None)
def test_a_cap_below_the_peak_breaks_at_a_named_op(script):
    t = Trace(events(script))
    r = replay(t)
    assert replay(t, cap=r.peak_reserved).oom is None
    broken = replay(t, cap=r.peak_allocated - 512)
    assert isinstance(broken.oom, OutOfMemory)
    assert broken.oom.op.startswith("op") and broken.oom.module == "m"
    assert broken.oom.op in str(broken.oom)
    assert broken.peak_reserved <= r.peak_allocated - 512


def test_cached_segments_go_back_before_memory_runs_out():
    t = Trace([Event("alloc", 0, 30 * MIB, "a"), Event("free", 0, 30 * MIB, "a"),
               Event("alloc", 1, 40 * MIB, "b")])
    assert replay(t).peak_reserved == 70 * MIB
    assert replay(t, cap=50 * MIB).oom is None


def test_views_are_no_births_and_scratch_is():
    with fake():
        x = torch.empty(64, 64, requires_grad=True)
        t = trace(lambda: x.view(-1)[:10].t())
        s = trace(lambda: torch.softmax(x, -1).sum().backward())
    assert not t.events
    backward = [e for e in s.events if "softmax_backward" in e.op and e.kind == "alloc"]
    assert [e.nbytes for e in backward] == [64 * 64 * 4] * 2


def test_a_cpu_step_is_counted_like_a_fake_one():
    def peak():
        net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        return trace(lambda: net(torch.ones(16, 32)).sum().backward(), modules=net).peak
    with fake(): faked = peak()
    assert faked == peak()


def peak(**kw) -> int: return replay(run(Workload(TINY, **kw))).peak_allocated


@pytest.mark.slow
@pytest.mark.parametrize("task", ["infer", "lora", "qlora", "full"])
@given(st.integers(1, 3), st.integers(17, 200))
@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_peak_is_monotone_in_batch_and_sequence(task, batch, seq):
    here = peak(task=task, batch=batch, seq=seq, recipe="kbit")
    assert peak(task=task, batch=batch + 1, seq=seq, recipe="kbit") >= here
    assert peak(task=task, batch=batch, seq=seq + 64, recipe="kbit") >= here


@pytest.mark.slow
def test_what_should_save_memory_does():
    wide = TINY | dict(vocab_size=65536, num_hidden_layers=4)
    def peak(seq=512, **kw):
        return replay(run(Workload(wide, seq=seq, batch=2, **kw))).peak_allocated
    assert peak(recipe="trl") < peak(recipe="kbit")
    saving, plain = (peak(gradient_checkpointing=on, attn_implementation="eager")
                     for on in (True, False))
    assert saving < plain
    full = {optim: peak(task="full", optim=optim, seq=16)
            for optim in ("adamw_torch", "adamw_8bit", "paged_adamw_8bit")}
    assert full["paged_adamw_8bit"] < full["adamw_8bit"] < full["adamw_torch"]


def test_a_workload_under_a_cap_names_what_breaks():
    t = run(Workload(TINY, seq=256, recipe="kbit"))
    r = replay(t)
    oom = replay(t, cap=r.peak_allocated - MIB).oom
    assert oom is not None and oom.op


def test_a_config_may_be_a_dict_or_a_folder(tmp_path):
    import json
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    assert as_config(tmp_path).hidden_size == as_config(TINY).hidden_size == 64
    with pytest.raises(FileNotFoundError, match="no config.json"): as_config(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="model_type"): as_config({"hidden_size": 64})


@pytest.mark.slow
def test_reading_ahead_and_old_casts_leave_holes():
    wide = TINY | dict(vocab_size=32768, num_hidden_layers=8)
    def reserved(ahead=0, **how):
        w = Workload(wide, seq=64, recipe="kbit", read_ahead=ahead, **how)
        return replay(run(w)).peak_reserved
    assert reserved() <= reserved(1000) <= reserved(1000, auto_clear_cache=False)
