"""Coefficients that follow a schedule or a target."""

import json

import pytest

from grpo_core.algorithm.controllers import AdaptiveEntropy, AdaptiveKL, beta_schedule


def test_the_schedule_runs_from_start_to_end():
    for shape in ("linear", "cosine"):
        values = [beta_schedule(s, 11, 0.1, 0.0, shape) for s in range(11)]
        assert values[0] == 0.1
        assert values[-1] == pytest.approx(0.0, abs=1e-15)
        assert values[5] == pytest.approx(0.05)
        assert values == sorted(values, reverse=True)
    assert beta_schedule(0, 1, 0.1, 0.0) == 0.1
    with pytest.raises(ValueError, match="linear or cosine"):
        beta_schedule(0, 1, 0.1, 0.0, "step")


def test_beta_follows_zieglers_rule():
    controller = AdaptiveKL(beta=0.1, target=2.0, horizon=1000)
    assert controller.update(2.2, 100) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert controller.update(50.0, 100) == pytest.approx(0.1 * 1.01 * (1 + 0.2 * 0.1))  # clipped
    before = controller.beta
    assert controller.update(float("nan"), 100) == before
    assert controller.update(0.0, 100) == pytest.approx(before * (1 - 0.2 * 0.1))


def test_beta_settles_where_the_kl_is_on_target():
    controller = AdaptiveKL(beta=1.0, target=0.5, horizon=50)
    for _ in range(200):
        controller.update(0.02 / controller.beta, 10)  # a policy that goes the further, the smaller the penalty
    assert 0.02 / controller.beta == pytest.approx(0.5, rel=0.01)


def test_the_bonus_is_paid_only_while_entropy_is_low():
    controller = AdaptiveEntropy(coefficient=0.01, target=0.2, maximum=0.02)
    assert controller.applied == 0.0
    assert controller.update(0.1) == pytest.approx(0.015)
    assert controller.update(0.2) == pytest.approx(0.02)
    assert controller.update(0.1) == pytest.approx(0.02)  # at the maximum
    assert controller.update(0.3) == 0.0
    assert controller.coefficient == pytest.approx(0.015)
    for _ in range(10):
        controller.update(1.0)
    assert controller.coefficient == 0.0
    assert controller.update(0.1) == pytest.approx(0.005)  # it comes back


@pytest.mark.parametrize("make", [lambda: AdaptiveKL(0.1, 1.0, 100), lambda: AdaptiveEntropy(0.01, 0.2)])
def test_a_controller_goes_on_from_its_json_state(make):
    uninterrupted, first, second = make(), make(), make()
    extra = () if isinstance(first, AdaptiveEntropy) else (10,)
    values = [0.1, 0.7, 0.15, 3.0]
    expected = [uninterrupted.update(value, *extra) for value in values]
    before = [first.update(value, *extra) for value in values[:2]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + [second.update(value, *extra) for value in values[2:]] == expected


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="must be above 0"):
        AdaptiveKL(0.0, 1.0, 100)
    with pytest.raises(ValueError, match="minimum ≤ coefficient ≤ maximum"):
        AdaptiveEntropy(2.0, 0.2)
