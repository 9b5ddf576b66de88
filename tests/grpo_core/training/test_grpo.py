"""The GRPO loop on a toy task: it learns, and counts right however work is split."""

from typing import ClassVar

import numpy as np
import pytest
import torch

from grpo_core.algorithm.losses import LOSS_TYPES
from grpo_core.rewards import RewardOutput
from tests.grpo_core.toy import lines, loss_and_gradient, make_trainer, weights


def test_reward_rises_on_a_toy_task(tmp_path):
    trainer = make_trainer(tmp_path, steps=40, lora=False, prompts_per_step=8, group_size=8)
    trainer.train()
    metrics = lines(tmp_path / "toy" / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, 41))
    assert metrics[0]["reward"] < 0.2
    assert sum(row["reward"] for row in metrics[-5:]) / 5 > 0.6


def test_on_the_first_pass_the_ratio_is_one_and_the_sampler_agrees_with_the_trainer(tmp_path):
    trainer = make_trainer(tmp_path, steps=2, beta=0.1, prompts_per_step=8, group_size=16)
    trainer.train()
    for row in lines(tmp_path / "toy" / "metrics.jsonl"):
        assert row["clip_ratio/region_mean"] == 0
        assert row["sampling/sampling_logp_difference/max"] < 1e-5
        assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-5)
    first, second = lines(tmp_path / "toy" / "metrics.jsonl")
    assert first["kl"] == 0  # the reference is a copy of the policy at the start
    assert second["kl"] > 0


def test_the_reference_stays_the_policy_at_the_start(tmp_path):
    trainer = make_trainer(tmp_path, steps=3, beta=0.1)
    before = weights(trainer).clone()
    trainer.train()
    frozen = torch.cat([trainer.policy._frozen[name].flatten() for name in trainer.parameters])
    assert torch.equal(frozen, before)
    assert not torch.equal(weights(trainer), before)


OPTIONS = [
    *({"loss_type": name} for name in LOSS_TYPES),
    {"scale_rewards": "batch"},
    {"baseline": "leave_one_out"},
    {"unbiased_kl": True},
    {"mask_truncated_completions": True},
    {"sampler_correction": "sequence_mask"},
    {"loss": {"delta": 2.0}},
    {"importance_sampling_level": "sequence", "loss": {"epsilon": 3e-4}},
    {"multi_objective_aggregation": "normalize_then_sum"},
    {"kl_in": "reward", "kl_estimator": "k1"},
    {"kl_estimator": "full"},
    {"entropy_coef": 0.01},
    {"top_entropy_quantile": 0.4},
    {"off_policy_mask_threshold": 0.01},
]


@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items())
)
def test_micro_batches_change_nothing_but_memory(tmp_path, options):
    results = []
    for budget in (1, 80, 10**6):
        trainer = make_trainer(
            tmp_path / str(budget), beta=0.1, max_tokens_per_micro_batch=budget, max_new_tokens=8, **options
        )
        experience = trainer.collect()
        loss, gradient = loss_and_gradient(trainer, experience)
        results.append((len(experience.minibatches[0]), loss, gradient))
    assert [count for count, _, _ in results] == [4, pytest.approx(2, abs=1), 1]
    for _, loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][1], abs=1e-6)
        assert (gradient - results[0][2]).norm() <= 1e-5 * results[0][2].norm()


def test_masking_truncated_completions_takes_their_gradient_away(tmp_path):
    gradients = []
    for masked in (False, True):
        trainer = make_trainer(tmp_path / str(masked), max_new_tokens=1, mask_truncated_completions=masked)
        experience = trainer.collect()
        assert {c.finish_reason for group in experience.groups for c in group.completions} == {"length"}
        experience = experience._replace(advantages=np.tile(np.arange(4.0) - 1.5, (len(experience.groups), 1)))
        gradients.append(loss_and_gradient(trainer, experience)[1].abs().sum().item())
    assert gradients[0] > 0
    assert gradients[1] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": {"delta": 1.1}}, "delta is 1.1"),
        ({"loss": {"delta": 2.0}, "loss_type": "sapo"}, "not an option of loss_type sapo"),
        ({"unbiased_kl": True, "kl_estimator": "k1"}, "kl_estimator to k3"),
        ({"loss": {"epsilon": 1.5}}, "epsilon is 1.5"),
    ],
)
def test_impossible_combinations_are_refused_with_the_key(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options)


def test_a_clip_range_for_tokens_is_warned_of_where_ratios_are_of_sequences(tmp_path):
    with pytest.warns(UserWarning, match="3e-4 and 4e-4"):
        make_trainer(tmp_path, loss_type="gspo", loss={"epsilon": 0.2})


def test_a_reward_weight_that_names_no_reward_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"algorithm.reward_weights.eights: no such reward, this run has sevens"):
        make_trainer(tmp_path, reward_weights={"eights": 1.0})


def test_more_prompts_a_step_than_there_are_is_refused(tmp_path):
    with pytest.raises(ValueError, match="prompts_per_step is 13, but the training set has 12"):
        make_trainer(tmp_path, prompts_per_step=13)


def test_a_reward_that_cannot_judge_moves_nothing(tmp_path):
    trainer = make_trainer(tmp_path, steps=1, max_unjudged_steps=0)
    trainer.rewards[0].__class__ = type(
        "Blind",
        (),
        {
            "name": "sevens",
            "__call__": lambda self, groups: [[float("nan")] * len(group.completions) for group in groups],
        },
    )
    before = weights(trainer).clone()
    trainer.train()
    assert torch.equal(weights(trainer), before)
    (row,) = lines(tmp_path / "toy" / "metrics.jsonl")
    assert row["frac_reward_zero_std"] == 1
    assert row["effective_groups"] == 0
    assert row["reward"] is None


def test_what_a_reward_logs_is_written_with_the_groups_that_are_trained_on(tmp_path):
    """Also where dynamic sampling leaves groups out: a column follows its completion."""

    class Logging:
        name = "sevens"
        steps: ClassVar = []

        def begin_step(self, step, max_steps):
            self.steps.append((step, max_steps))

        def __call__(self, groups):
            sevens = np.array([[c.token_ids.count(7) for c in group.completions] for group in groups])
            first = np.array([[c.token_ids[0] for c in group.completions] for group in groups])
            return RewardOutput(sevens + 0.0, {"sevens/most": [sevens.max(), 0]}, {"first": list(first.ravel())})

    trainer = make_trainer(tmp_path, steps=2, dynamic_sampling=True, reserve_prompts=4)
    trainer.rewards = [Logging()]
    token_ids = []
    learn = trainer.learn
    trainer.learn = lambda experience: (
        token_ids.extend(c.token_ids[0] for group in experience.groups for c in group.completions) or learn(experience)
    )
    trainer.train()
    rows = lines(tmp_path / "toy" / "completions.jsonl")
    assert [row["first"] for row in rows] == token_ids
    assert len(rows) == 2 * 4 * 4
    assert Logging.steps == [(0, 2), (1, 2)]
    for metrics in lines(tmp_path / "toy" / "metrics.jsonl"):
        assert metrics["sevens/most"] in (0, 0.5, 1, 1.5, 2, 2.5, 3)  # the mean of two numbers
