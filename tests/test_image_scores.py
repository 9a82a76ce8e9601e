"""Scores of generated pictures: parts that share nothing, distances that can be worked out."""
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from mlcourse.files import UsageError
from mlcourse.image_scores import (Judge, class_counts, conditional_accuracy, frechet,
                                   frechet_by_size, parts, read_by, train_judge)


def cloud(n, features=4, seed=0):
    return torch.randn(n, features, generator=torch.Generator().manual_seed(seed))


class Painted(Judge):
    "A judge of one pixel: its brightness is the class."
    def __init__(self, classes):
        super().__init__(1, classes, 2, 2)
        self.features = torch.nn.Flatten()
        self.head = torch.nn.Linear(1, classes)
        self.head.weight.data = torch.arange(classes).float()[:, None]
        self.head.bias.data = -torch.arange(classes).float() ** 2 / 2


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(3, 40), min_size=1, max_size=5), st.integers(0, 5))
def test_parts_share_nothing_and_lose_nothing(sizes, seed):
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(sizes)])
    found = parts(labels, seed=seed)
    assert torch.cat(found).sort().values.tolist() == list(range(sum(sizes)))
    assert all(torch.equal(a, b) for a, b in zip(found, parts(labels, seed=seed)))


def test_each_class_has_its_share_in_each_part():
    labels = torch.arange(400) % 4
    for part, n in zip(parts(labels, (.5, .25)), (50, 25, 25)):
        assert labels[part].bincount().tolist() == [n] * 4


@settings(max_examples=30, deadline=None)
@given(st.floats(-3, 3), st.floats(.2, 4))
def test_a_shifted_and_stretched_cloud(shift, scale):
    "With C_b = s^2 C_a the distance is |shift|^2 + (1 - s)^2 tr C_a."
    a = cloud(60).double()
    a = a - a.mean(0)
    expected = 4 * shift**2 + (1 - scale)**2 * torch.cov(a.T).trace().item()
    assert frechet(a, scale * a + shift) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_distance_is_symmetric_and_not_negative():
    a, b = cloud(50), cloud(70, seed=1) * 2
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-9)
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)


def test_fewer_pictures_than_features():
    assert math.isfinite(frechet(cloud(3, 32), cloud(5, 32, 1)))


def test_features_that_are_not_finite():
    assert math.isnan(frechet(cloud(9), cloud(9) / 0))


def test_too_few_pictures_are_refused():
    with pytest.raises(UsageError, match="two pictures"): frechet(cloud(1), cloud(9))
    with pytest.raises(UsageError, match="There are 9 pictures"):
        frechet_by_size(cloud(20), cloud(9), [5, 10])


def test_the_bias_goes_down_with_the_number_of_pictures():
    a, b = cloud(2000), cloud(2000, seed=1)
    means, rest = frechet_by_size(a, b, [50, 100, 200, 400])
    assert means == sorted(means, reverse=True) and abs(rest) < means[-1] < means[0] / 4


def test_asked_read_and_counted():
    judge = Painted(4)
    pixels = torch.tensor([0., 1, 1, 3]).view(4, 1, 1, 1)
    assert read_by(judge, pixels)[1].tolist() == [0, 1, 1, 3]
    assert conditional_accuracy(judge, pixels, torch.tensor([0, 1, 2, 3])) == .75
    assert class_counts(judge, pixels) == [1, 2, 0, 1]


def test_training_a_judge_leaves_the_generator_of_torch_alone():
    pixels, labels = torch.randn(20, 3, 8, 8), torch.arange(20) % 2
    torch.manual_seed(3)
    judge = train_judge(pixels, labels, steps=2, batch_size=4)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1)) and not judge.training
    again = train_judge(pixels, labels, steps=2, batch_size=4)
    assert torch.equal(judge(pixels), again(pixels))
