"""The GAN's parts: networks of any size, losses against PyTorch's, the penalty, and the game."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from mlcourse import gan
from mlcourse.files import UsageError
from mlcourse.gan import (Critic, Generator, critic_loss, generate, generator_loss, noise_of,
                          one_round, r1_penalty, train_gan)


def players(classes=3, channels=1, size=8, width=4, latent=5):
    torch.manual_seed(0)
    return (Generator(classes, channels, size, width, latent),
            Critic(classes, channels, size, width))


def world(count=60, classes=3):
    "Pictures of one grey a class, with some noise."
    g = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % classes
    greys = torch.linspace(-.8, .8, classes)[labels].view(-1, 1, 1, 1)
    return (greys + .1 * torch.randn(count, 1, 8, 8, generator=g)).clamp(-1, 1), labels


# ---------------------------------------------------------------- networks

@pytest.mark.parametrize("size", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_every_size(size, channels):
    generator, critic = players(4, channels, size, 2)
    labels = torch.tensor([0, 3, 1])
    drawn = generate(generator, labels)
    assert drawn.shape == (3, channels, size, size) and drawn.abs().max() <= 1
    assert critic(drawn, labels).shape == (3,)


@pytest.mark.parametrize("size", [0, 1, 2, 4, 6, 24, 33])
def test_other_sizes_are_refused(size):
    for network in (Generator, Critic):
        with pytest.raises((UsageError, ValueError)): network(size=size)


def test_the_seed_decides_what_is_drawn_and_the_mode_stays():
    generator, _ = players()
    labels = torch.tensor([0, 1, 2, 0])
    before = {k: v.clone() for k, v in generator.state_dict().items()}
    one, again, other = (generate(generator, labels, seed) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert generator.training and not one.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in generator.state_dict().items())
    generate(generator.eval(), labels)
    assert not generator.training
    assert generate(generator, labels[:0]).shape == (0, 1, 8, 8)


def test_class_and_noise_both_matter():
    generator, critic = players()
    nn.init.normal_(critic.label.weight)
    z = torch.randn(1, 5).repeat(2, 1)
    a, b = generator.eval()(z, torch.tensor([0, 1]))
    assert (a - b).abs().max() > 1e-4
    scores = critic(a[None].repeat(3, 1, 1, 1), torch.arange(3))
    assert len(set(scores.tolist())) == 3


# ---------------------------------------------------------------- losses

scores_of = st.lists(st.floats(-20, 20), min_size=2, max_size=8)

@settings(max_examples=50, deadline=None)
@given(scores_of, scores_of)
def test_losses_are_cross_entropies(real, drawn):
    real, drawn = torch.tensor(real, dtype=torch.double), torch.tensor(drawn, dtype=torch.double)
    bce = F.binary_cross_entropy_with_logits
    told = bce(real, torch.ones_like(real)) + bce(drawn, torch.zeros_like(drawn))
    assert torch.allclose(critic_loss(real, drawn), told)
    assert torch.allclose(critic_loss(real, drawn, "saturating"), told)
    assert torch.allclose(generator_loss(drawn), bce(drawn, torch.ones_like(drawn)))
    assert torch.allclose(generator_loss(drawn, "saturating"), -bce(drawn, torch.zeros_like(drawn)))
    assert generator_loss(drawn, "hinge") == -drawn.mean()
    margin = (1 - real).clamp(min=0).mean() + (1 + drawn).clamp(min=0).mean()
    assert torch.allclose(critic_loss(real, drawn, "hinge"), margin)


def test_far_scores_give_finite_losses():
    far = torch.tensor([-1e4, 1e4])
    for kind in ("saturating", "non-saturating", "hinge"):
        assert critic_loss(far, far, kind).isfinite() and generator_loss(far, kind).isfinite()


def test_the_gradients_that_the_lesson_speaks_of():
    for score in (-8., -1., 0., 3.):
        p = 1 / (1 + math.exp(-score))
        for kind, size in (("saturating", p), ("non-saturating", 1 - p), ("hinge", 1)):
            s = torch.tensor([score], requires_grad=True)
            generator_loss(s, kind).backward()
            assert s.grad.item() == pytest.approx(-size, rel=1e-4)   # always: higher is better


def test_the_penalty_of_a_linear_and_of_a_square_score():
    g = torch.Generator().manual_seed(0)
    w, pixels = torch.randn(1, 4, 4, generator=g), torch.randn(6, 1, 4, 4, generator=g)
    linear = r1_penalty(lambda x, c: (x * w).sum((1, 2, 3)), pixels, None)
    assert linear.item() == pytest.approx(w.square().sum().item(), rel=1e-5)
    square = r1_penalty(lambda x, c: x.square().sum((1, 2, 3)), pixels, None).item()
    assert square == pytest.approx(4 * pixels.square().sum((1, 2, 3)).mean().item(), rel=1e-5)


def test_the_penalty_trains_the_critic_and_leaves_pixels_alone():
    _, critic = players()
    pixels, labels = world(6)
    r1_penalty(critic, pixels, labels).backward()
    assert not pixels.requires_grad and pixels.grad is None
    assert critic.body[0].weight.grad.abs().sum() > 0


# ---------------------------------------------------------------- the game

def test_a_round_moves_both_and_each_by_its_own_optimizer():
    generator, critic = players()
    pixels, labels = world(16)
    for still in (0, 1):   # an optimizer that cannot move
        optimizers = [torch.optim.SGD(m.parameters(), 0. if n == still else .1)
                      for n, m in enumerate((critic, generator))]
        before = [m.body[0].weight.clone() for m in (critic, generator)]
        pair = one_round(generator, critic, optimizers, pixels, labels, r1=1.)
        assert all(map(math.isfinite, pair)) and len(pair) == 2
        moved = [not torch.equal(m.body[0].weight, w) for m, w in
                 zip((critic, generator), before)]
        assert moved == [still != 0, still != 1]


def test_training_repeats_and_its_seed_counts():
    pixels, labels = world()
    def run(seed):
        best, losses = train_gan(*players(), pixels, labels, 5, batch_size=8, seed=seed)
        return generate(best, labels[:3]), losses
    (a, la), (b, lb), (_, lc) = run(0), run(0), run(1)
    assert torch.equal(a, b) and la == lb and la != lc and len(la) == 5


def test_the_average_follows_and_the_look_comes_every_round():
    pixels, labels = world()
    generator, critic = players()
    rounds = []
    best, _ = train_gan(generator, critic, pixels, labels, 6, batch_size=8, average=0.,
                        look=lambda n, now: rounds.append((n, now.training)))
    assert [n for n, _ in rounds] == [1, 2, 3, 4, 5, 6]
    assert best is not generator and not best.training
    for p, q in zip(best.state_dict().values(), generator.state_dict().values()):
        assert torch.allclose(p.float(), q.float(), atol=1e-6)   # average 0: the last weights


@pytest.mark.parametrize("kind", ["non-saturating", "hinge"])
def test_it_learns_greys(kind):
    pixels, labels = world(120)
    best, losses = train_gan(*players(width=8), pixels, labels, 250, 2e-3, 24, kind=kind)
    drawn = generate(best, torch.arange(3).repeat(20)).mean((1, 2, 3)).view(20, 3)
    assert (drawn.mean(0) - torch.tensor([-.8, 0., .8])).abs().max() < .25
    assert all(math.isfinite(a) and math.isfinite(b) for a, b in losses)


def test_what_is_exported_is_said():
    for name in gan.__all__: assert getattr(gan, name).__doc__, name
    generator, _ = players()
    assert noise_of(generator, torch.zeros(7, dtype=torch.long)).shape == (7, 5)
