"""Diffusion: schedules, forms, steps and sampling, on networks that answer by formula."""
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from mlcourse import ddpm
from mlcourse.ddpm import (Schedule, UNet, batch_of, clean, sample, step_back, target, to_x0, train,
                           waves)
from mlcourse.files import UsageError

FORMS = ("epsilon", "sample", "v_prediction")


class Oracle:
    "Knows the one picture that there is, and says v for it."
    channels, classes = 1, 3
    def __init__(self, picture, schedule): self.picture, self.schedule = picture, schedule

    def __call__(self, x, level, klass):
        a, s = self.schedule.at((level * len(self.schedule)).round().long())
        noise = (x - a * self.picture) / s
        return target("v_prediction", self.picture, noise, a, s)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("levels", [10, 100, 1000])
def test_a_schedule_falls_from_one_towards_zero(kind, levels):
    kept = Schedule(kind, levels).alpha_bar
    assert len(kept) == levels + 1 and len(Schedule(kind, levels)) == levels
    assert kept[-1] == 1 and (kept[1:-1] < kept[:-2]).all()
    assert kept[0] > .8 and 0 <= kept[-2] < .01


def test_weights_square_to_one_and_the_level_before_the_first_has_no_noise():
    schedule = Schedule("cosine", 20)
    a, s = schedule.at(torch.arange(-1, 20))
    assert a.shape == (21, 1, 1, 1) and torch.allclose(a**2 + s**2, torch.ones_like(a))
    assert (a[0], s[0]) == (1, 0)


def test_an_unknown_schedule_or_form_is_refused():
    with pytest.raises(UsageError, match="linear or cosine"): Schedule("sigmoid")
    with pytest.raises(KeyError): target("x0", *torch.zeros(4, 1))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(FORMS), st.floats(-1, 1), st.floats(-3, 3), st.floats(.05, .99))
def test_the_picture_follows_from_each_form(form, picture, noise, a):
    x0, e, a = (torch.tensor(v, dtype=torch.float64) for v in (picture, noise, a))
    s = (1 - a**2).sqrt()
    again = to_x0(form, target(form, x0, e, a, s), a * x0 + s * e, a, s)
    assert again.item() == pytest.approx(picture, abs=1e-9)


@pytest.mark.parametrize("steps", [1, 3, 7, 20])
@pytest.mark.parametrize("eta", [0., 1.])
def test_who_knows_the_picture_draws_it(steps, eta):
    schedule = Schedule("cosine", 20)
    picture = torch.rand(1, 1, 8, 8) * 1.8 - .9
    trail = []
    drawn = sample(Oracle(picture, schedule), schedule, torch.tensor([0, 2]), 8, steps, eta=eta,
                   guidance=2., trail=trail)
    assert torch.allclose(drawn, picture.expand(2, -1, -1, -1), atol=1e-3)
    assert len(trail) == steps + 1 and trail[-1] is drawn


def test_steps_beyond_the_levels_are_refused():
    schedule = Schedule("cosine", 20)
    for steps in (0, 21):
        with pytest.raises(UsageError, match="1 to 20"):
            sample(Oracle(torch.zeros(1, 1, 4, 4), schedule), schedule, torch.tensor([0]), 4, steps)


def test_ddim_without_dice_keeps_the_same_noise():
    schedule, x0, e = Schedule("linear", 50), torch.zeros(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    (a, s), (a1, s1) = (schedule.at(torch.tensor([t])) for t in (40, 10))
    assert torch.allclose(step_back(schedule, a * x0 + s * e, x0, 40, 10), a1 * x0 + s1 * e,
                          atol=1e-6)


def test_ddpm_keeps_the_spread_of_the_level():
    "From x_t of the forward process and its true picture, x_t' has the deviation of its level."
    schedule, g = Schedule("cosine", 50), torch.Generator().manual_seed(0)
    x0 = torch.zeros(1, 1, 200, 200)
    noise, dice = (torch.randn(x0.shape, generator=g) for _ in range(2))
    _, s = schedule.at(torch.tensor([30]))
    _, s1 = schedule.at(torch.tensor([20]))
    back = step_back(schedule, s * noise, x0, 30, 20, 1., dice)
    assert back.std().item() == pytest.approx(s1.item(), rel=.02)


@pytest.mark.parametrize("channels, size, widths", [(1, 8, (8,)), (1, 16, (8, 16)),
                                                    (3, 32, (8, 16, 24))])
def test_a_fresh_network_keeps_the_shape_and_says_nothing(channels, size, widths):
    net = UNet(channels, 4, widths)
    said = net(torch.randn(2, channels, size, size), torch.rand(2), torch.tensor([0, 4]))
    assert said.shape == (2, channels, size, size)
    assert said.abs().max() <= net.head[2].bias.abs().max()


def test_level_and_class_change_what_is_said():
    torch.manual_seed(0)
    net = UNet(1, 4, (8, 16))
    for p in net.parameters(): torch.nn.init.normal_(p, std=.2)
    x = torch.randn(1, 1, 8, 8)
    def said(t, c): return net(x, torch.tensor([t]), torch.tensor([c]))
    assert not torch.allclose(said(.1, 0), said(.9, 0))
    assert not torch.allclose(said(.1, 0), said(.1, 4))
    net.told.timed = False
    assert torch.equal(said(.1, 0), said(.9, 0))


def test_waves_tell_neighbouring_levels_apart():
    rows = waves(torch.arange(1000) / 1000, 32)
    apart = torch.cdist(rows, rows) + 10 * torch.eye(1000)
    assert rows.shape == (1000, 32) and apart.min() > .1 and rows.abs().max() <= 1


def test_a_batch_mixes_hides_and_asks():
    pixels, labels = torch.ones(5, 1, 4, 4), torch.arange(5) % 3
    schedule, g = Schedule("cosine", 10), torch.Generator().manual_seed(0)
    x, t, klass, wanted = batch_of(pixels, labels, schedule, 400, "sample", .25, 3, g)
    assert torch.equal(wanted, torch.ones(400, 1, 4, 4)) and x.shape == wanted.shape
    assert .15 < (klass == 3).float().mean() < .35
    assert t.min() == 0 and t.max() == pytest.approx(.9)
    assert (x[t == 0] - 1).abs().mean() < .5 < (x[t == t.max()] - 1).abs().mean()


def test_training_repeats_and_learns_one_picture():
    schedule, told = Schedule("cosine", 10), []
    pixels, labels = torch.full((8, 1, 8, 8), .5), torch.zeros(8, dtype=torch.long)
    def once():
        torch.manual_seed(0)
        return train(UNet(1, 1, (16,)), pixels, labels, schedule, 120, 1e-2, 16,
                     progress=lambda done, total, what: told.append((done, total)))
    (net, losses), (_, again) = once(), once()
    assert losses == again and told[119] == (120, 120) and not net.training
    assert sum(losses[-5:]) < sum(losses[:5]) / 2 and all(map(math.isfinite, losses))
    x = sample(net, schedule, torch.zeros(2, dtype=torch.long), 8, 5)
    assert (x - .5).abs().mean() < .2


def test_guidance_of_one_is_none_and_of_zero_forgets_the_class():
    torch.manual_seed(1)
    net = UNet(1, 3, (8,))
    for p in net.parameters(): torch.nn.init.normal_(p, std=.2)
    schedule, x = Schedule("cosine", 10), torch.randn(2, 1, 8, 8)
    def guess(asked, g): return clean(net, schedule, x, 5, torch.tensor(asked), g)
    assert torch.allclose(guess([0, 1], 0.), guess([2, 2], 0.), atol=1e-5)
    assert not torch.allclose(guess([0, 1], 1.), guess([2, 2], 1.))


def test_everything_exported_is_listed():
    assert {"Schedule", "UNet", "train", "sample", "step_back"} <= set(ddpm.__all__)
