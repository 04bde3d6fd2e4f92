"""Trials of learning rates: the same factors for every activation, and the best of them."""

from dataclasses import replace
from pathlib import Path

import pytest

from ortho_fx.models.compare.activations import Activation
from ortho_fx.models.compare.tuning import SEED_OF_TRIALS, at_the_edge, best, trials_of
from ortho_fx.models.recipe import TrainConfig


def trials(text, count=7):
    activation = Activation.parse(text)
    return trials_of(activation, activation.configure(TrainConfig(basis="none", lr=0.01), 3, Path("out")), count, 50)


def test_the_first_trial_has_the_rates_of_the_run():
    first = trials("hermite:3")[0]
    assert (first.lr, first.expansion_lr, first.steps) == (0.01, None, 50)


def test_every_activation_tries_the_same_factors_on_a_seed_that_is_not_reported():
    for text in ("gelu", "swiglu", "polynorm", "hermite:3", "fourier:frozen"):
        found = trials(text)
        assert [trial.lr for trial in found] == [trial.lr for trial in trials("relu")]
        assert {trial.seed for trial in found} == {3 + SEED_OF_TRIALS}
        assert len(found) == 7
    assert [trial.lr / 0.01 for trial in trials("gelu", 5)] == pytest.approx([1, 0.5, 2, 2**-1.5, 2**0.5])


def test_a_larger_number_tries_more_and_not_others():
    assert trials("hermite:3", 4) == trials("hermite:3", 9)[:4]


def test_coefficients_have_a_rate_of_their_own_within_its_range():
    found = trials("hermite:3", 60)[1:]
    ratios = [trial.expansion_lr / trial.lr for trial in found]
    assert 1 / 8 < min(ratios) < 0.3
    assert 16 < max(ratios) < 32
    assert all(trial.expansion_lr is None for text in ("gelu", "polynorm", "fourier:frozen") for trial in trials(text))


def test_a_rate_that_an_activation_sets_is_kept():
    assert {trial.lr for trial in trials("hermite:3,lr=0.5")} == {0.5}
    assert {trial.expansion_lr for trial in trials("hermite:3,expansion_lr=0.25")} == {0.25}
    assert trials("gelu,lr=0.5") == []


def test_the_best_trial_has_the_lowest_loss():
    found = [replace(trial, loss=loss) for trial, loss in zip(trials("gelu", 3), (2.0, 1.0, None), strict=True)]
    assert best(found) is found[1]
    assert at_the_edge(found) == ["lr"]
    found[0].loss = 0.5
    assert at_the_edge(found) == []
    assert best([replace(trial, loss=None) for trial in found]) is None
