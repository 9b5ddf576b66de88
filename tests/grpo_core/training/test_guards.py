"""What goes wrong in step after step is counted, said and stopped; a step in which nothing counts moves nothing."""

import itertools
import json
import math
import warnings

import numpy as np
import pytest
import torch

from grpo_core.algorithm.losses import LOSS_TYPES
from grpo_core.config.options import OptimConfig, RunConfig, SFTConfig
from grpo_core.errors import DivergedError, TrainingStopped
from grpo_core.policy import Policy
from grpo_core.reward_adapters import adapt_reward
from grpo_core.training import sanity
from grpo_core.training.guards import Guards
from grpo_core.training.sanity import FirstStepError, check_features
from grpo_core.training.sft import Example, SFTTrainer
from grpo_core.types import Prompt
from tests.grpo_core.toy import PROMPTS, lines, make_trainer, weights

NAN = float("nan")


def rewarded(trainer, function, name="mine"):
    """The trainer with another reward."""
    trainer.rewards = [adapt_reward(function, name)]
    return trainer


def warned(caplog):
    return [record.message for record in caplog.records if record.name == "grpo_core.training.guards"]


# --- a step in which nothing counts ------------------------------------------------------------------------------

NOTHING = {
    "equal": lambda groups: np.ones((len(groups), 4)),
    "equal_up_to_rounding": lambda groups: np.tile([0.6733333333333333, 0.6733333333333332], (len(groups), 2)),
    "unjudged": lambda groups: np.full((len(groups), 4), NAN),
    "masked": lambda groups: np.tile(np.arange(4.0), (len(groups), 1)),  # of completions that were all cut off
}
WITH = [
    {"scale_rewards": "batch"},
    {"scale_rewards": "none", "baseline": "leave_one_out"},
    {"multi_objective_aggregation": "normalize_then_sum"},
    {"sampler_correction": "sequence_mask"},
    {"sampler_correction": "token_truncate"},
    {"top_entropy_quantile": 0.4},
    {"off_policy_mask_threshold": 0.01},
    {"num_iterations": 2, "steps_per_generation": 2},
    {"dynamic_sampling": True, "reserve_prompts": 2},
]
# every loss type and every option, each with another one: they meet in one product of weights
OPTIONS = [
    {"loss": {"delta": 2.0}},
    *({"loss_type": name, **WITH[i % len(WITH)]} for i, name in enumerate(LOSS_TYPES)),
]
assert len(LOSS_TYPES) >= len(WITH)


def cut_off(trainer):
    """Every completion counts as cut off, and is masked."""
    trainer.config.algorithm.mask_truncated_completions = trainer.guards.masks_truncated = True
    sample = trainer.sampler.sample
    trainer.sampler.sample = lambda prompts, rollout, **k: [
        type(g)(g.prompt, [type(c)(c.token_ids, c.logprobs, "length", c.text) for c in g.completions])
        for g in sample(prompts, rollout, **k)
    ]
    return trainer


def ids(options):
    return "-".join(f"{key}={value}" for key, value in options.items())


@pytest.mark.parametrize("options", OPTIONS, ids=ids)
def test_a_step_in_which_nothing_counts_leaves_the_weights_alone_also_after_others(tmp_path, options):
    trainer = make_trainer(tmp_path, steps=9, weight_decay=0.1, max_new_tokens=4, **options)
    trainer.open_writer(None)
    before, different = weights(trainer).clone(), np.random.default_rng(0)
    rewarded(trainer, lambda groups: different.random((len(groups), 4))).step()
    assert not torch.equal(weights(trainer), before)  # so the optimiser has moments to go on with
    before, state = weights(trainer).clone(), str(trainer.optimizer.state_dict()["state"])
    unjudged = {"reward", "reward_std", "rewards/mine/mean", "rewards/mine/std"}
    for name, reward in NOTHING.items():
        rewarded(trainer, reward)
        if name == "masked":
            cut_off(trainer)
        values = trainer.step()
        assert torch.equal(weights(trainer), before)
        assert str(trainer.optimizer.state_dict()["state"]) == state
        assert values["grad_norm"] == 0
        # what is not a number is what there was none of
        without_data = {"completions/mean_terminated_length"} | (unjudged if name == "unjudged" else set())
        assert {key for key, value in values.items() if not math.isfinite(value)} <= without_data


def test_beta_and_the_entropy_bonus_still_count_where_rewards_do_not(tmp_path):
    for options in ({"beta": 0.1}, {"entropy_coef": 0.1}):
        trainer = make_trainer(tmp_path, check_first_step=False, **options)
        with torch.no_grad():  # away from the reference
            for parameter in trainer.parameters.values():
                parameter.add_(0.05)
        before = weights(trainer).clone()
        trainer.open_writer(None)
        rewarded(trainer, NOTHING["equal"]).step()
        assert not torch.equal(weights(trainer), before)
        # and with every completion masked, neither of them does
        before = weights(trainer).clone()
        assert cut_off(trainer).step()["grad_norm"] == 0
        assert torch.equal(weights(trainer), before)


@pytest.mark.parametrize(
    ("reward", "options", "message"),
    [
        (lambda completion: 1.0, {}, "in every group all rewards were equal"),
        (lambda completion: 1.0, {"beta": 0.1}, "in every group all rewards were equal"),
        (None, {}, "every completion was cut off at"),
        (lambda completion: None, {"max_unjudged_steps": 0}, "no reward judged a completion"),
    ],
    ids=["constant", "constant_beta", "masked", "unjudged"],
)
def test_a_run_that_learns_nothing_says_so_after_a_few_steps_and_at_the_end(tmp_path, caplog, reward, options, message):
    trainer = make_trainer(tmp_path, steps=4, warn_after_idle_steps=2, **options)
    if reward:
        rewarded(trainer, reward)
    else:  # rewards differ, only they do not count
        rewarded(cut_off(trainer), NOTHING["masked"])
    trainer.train()
    early, total, end = warned(caplog)
    assert early.startswith(f"the last 2 steps, up to step 2, taught nothing: {message}")
    assert total.startswith(f"4 of 4 steps taught nothing: {message}")
    assert end.startswith("no step taught anything")
    assert trainer.guards.summary()["steps_that_taught_nothing"] == 4


def test_a_healthy_run_has_nothing_to_say(tmp_path, caplog):
    trainer = make_trainer(tmp_path, steps=2, group_size=8)
    trainer.train()
    assert warned(caplog) == []
    assert trainer.guards.summary() == {}


def test_a_collapsed_policy_is_named_as_the_cause():
    guards = Guards(RunConfig(), str)
    values = {"grad_norm": 0.0, "effective_groups": 0.0, "entropy": 0.0, "reward": 0.0}
    for step in range(5):
        guards.check(step + 1, values)
    assert list(guards._idle_reasons) == [guards._why_idle(values)]
    assert "entropy is 0" in guards._why_idle(values)


# --- rewards -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("returned", [None, NAN])
def test_a_reward_that_judges_nothing_stops_the_run_after_a_few_steps(tmp_path, returned):
    trainer = rewarded(make_trainer(tmp_path, steps=20), lambda completion: returned, "forgetful")
    before = weights(trainer).clone()
    with pytest.raises(TrainingStopped, match=r"no completion was judged in 3 steps .*of forgetful was None or NaN"):
        trainer.train()
    assert torch.equal(weights(trainer), before)
    assert len(lines(tmp_path / "toy" / "metrics.jsonl")) == 3
    assert len(lines(tmp_path / "toy" / "completions.jsonl")) == 3 * 16
    assert trainer.completions_file._file == -1  # closed, as a program may go on after a run that stopped


def test_a_run_shorter_than_the_limit_is_stopped_too_where_nothing_was_judged(tmp_path):
    trainer = rewarded(make_trainer(tmp_path, steps=2), lambda completion: None, "forgetful")
    with pytest.raises(TrainingStopped, match="no completion was judged in 2 steps"):
        trainer.train()


def test_steps_in_between_that_are_judged_start_the_count_again(tmp_path):
    calls = itertools.count()
    reward = lambda groups: np.full((len(groups), 4), NAN) if next(calls) % 3 else np.ones((len(groups), 4))  # noqa: E731
    trainer = rewarded(make_trainer(tmp_path, steps=7, warn_after_idle_steps=0), reward)
    trainer.train()
    assert trainer.guards.summary()["steps_without_a_judgement"] == 4


def test_a_reward_that_is_silent_beside_others_is_named(tmp_path, caplog):
    trainer = make_trainer(tmp_path, steps=3, warn_after_idle_steps=2)
    trainer.rewards = [*trainer.rewards, adapt_reward(lambda completion: None, "blind")]
    trainer.train()
    assert [text for text in warned(caplog) if "'blind' has judged no completion in 2 steps" in text]


def test_a_reward_with_a_bug_stops_the_run_naming_reward_line_and_sample(tmp_path):
    def broken(completion):
        return int("x")

    trainer = rewarded(make_trainer(tmp_path), broken, "broken")
    before = weights(trainer).clone()
    with pytest.raises(TrainingStopped) as error:
        trainer.train()
    text = str(error.value)
    assert text.startswith("reward 'broken' failed on 100 % of the completions of step 1, such as prompt 'p")
    assert "completion 0: ValueError: invalid literal for int() with base 10: 'x' (" in text
    assert "test_guards.py:" in text
    assert '`return int("x")`' in text
    assert "run.max_reward_failures" in text
    assert torch.equal(weights(trainer), before)


def test_a_rare_failure_costs_its_completion_and_is_counted(tmp_path, caplog):
    calls = itertools.count()

    def flaky(completion):
        if next(calls) == 5:
            raise OSError("no answer from the server")
        return float(len(completion))

    trainer = rewarded(make_trainer(tmp_path, steps=2), flaky, "flaky")
    trainer.train()
    rows = lines(tmp_path / "toy" / "completions.jsonl")
    assert [i for i, row in enumerate(rows) if row["reward"] is None] == [5]
    assert rows[5]["advantage"] == 0
    first, second = lines(tmp_path / "toy" / "metrics.jsonl")
    assert first["rewards/flaky/failed"] == 1 / 16
    assert second["rewards/flaky/failed"] == 0
    (said, *_) = warned(caplog)
    assert "failed on 6.25 % of the completions of step 1" in said
    assert "OSError: no answer from the server" in said
    assert trainer.guards.summary()["steps_with_failed_rewards"] == 1


def test_a_run_that_a_reward_stopped_goes_on_from_there_once_it_is_mended(tmp_path):
    def reward(completion):
        if not mended and trainer.step_index == 3:
            raise OSError("no answer from the server")
        return float(len(completion))

    mended = False
    trainer = rewarded(make_trainer(tmp_path, steps=6), reward)
    with pytest.raises(TrainingStopped, match="of step 4, such as"):
        trainer.train()
    stopped, mended = weights(trainer).clone(), True
    trainer = rewarded(make_trainer(tmp_path, steps=6), reward)
    trainer.resume()
    assert torch.equal(weights(trainer), stopped)
    trainer.train()
    assert [row["step"] for row in lines(tmp_path / "toy" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_the_share_of_failures_that_is_allowed_is_an_option(tmp_path):
    calls = itertools.count()
    trainer = rewarded(make_trainer(tmp_path, max_reward_failures=0.0), lambda completion: 1 / (next(calls) - 3))
    with pytest.raises(TrainingStopped, match=r"failed on 6.25 %.*ZeroDivisionError.*may have 0 %"):
        trainer.train()


def test_an_infinite_reward_stops_the_run_and_names_the_prompt(tmp_path):
    trainer = rewarded(make_trainer(tmp_path), lambda groups: np.full((len(groups), 4), np.inf))
    with pytest.raises(TrainingStopped, match=r"such as prompt 'p\d+', completion 0: it returned inf: return a finite"):
        trainer.train()


def test_sys_exit_in_a_reward_is_an_error(tmp_path):
    def leaves(completion):
        raise SystemExit(0)

    with pytest.raises(TrainingStopped, match=r"it called sys.exit\(0\)"):
        rewarded(make_trainer(tmp_path), leaves).train()


def test_a_reward_that_hangs_ends_the_run_in_the_time_that_the_option_allows(tmp_path):
    def hangs(completion):
        while True:
            pass

    trainer = rewarded(make_trainer(tmp_path, reward_timeout=0.05), hangs)
    with pytest.raises(TrainingStopped, match=r"no answer within 0.05 seconds \(run.reward_timeout\)"):
        trainer.train()


# --- gradients ---------------------------------------------------------------------------------------------------


def broken_from(trainer, step):
    """Advantages that make the gradient NaN from this step on."""
    advantages = trainer.advantages
    trainer.advantages = lambda *a: advantages(*a) * (NAN if trainer.step_index >= step else 1)
    return trainer


def test_gradients_that_are_not_finite_are_counted_dumped_once_and_stop_the_run(tmp_path, caplog):
    trainer = broken_from(make_trainer(tmp_path, steps=20, max_nonfinite_steps=3, save_steps=1, group_size=8), 2)
    kept = []
    save = trainer.save
    trainer.save = lambda *a: kept.append(weights(trainer).clone()) or save(*a)
    with pytest.raises(DivergedError, match=r"in 3 steps in a row \(run.max_nonfinite_steps\), up to step 5"):
        trainer.train()
    assert [row["grad_norm"] is None for row in lines(tmp_path / "toy" / "metrics.jsonl")] == [
        False,
        False,
        *[True] * 3,
    ]
    assert torch.equal(weights(trainer), kept[1])  # a step that is not finite changes nothing
    (said, *more) = warned(caplog)
    assert "step 3: the gradient is not finite, so the step changed nothing" in said
    assert not more
    (path,) = (tmp_path / "toy").glob("nonfinite-*")
    dumped = json.loads(path.read_text())
    assert path.name == "nonfinite-step-000003-rank0.json"
    rows = [row for row in lines(tmp_path / "toy" / "completions.jsonl") if row["step"] == 3]
    members = [member for group in dumped["groups"] for member in group["completions"]]
    assert [member["text"] for member in members] == [row["text"] for row in rows]
    assert math.isnan(dumped["optimizer_steps"][0]["micro_batches"][0]["loss"])


def test_counts_go_on_in_a_resumed_run(tmp_path):
    blind = lambda completion: None  # noqa: E731
    rewarded(make_trainer(tmp_path, steps=2, save_steps=1, max_unjudged_steps=0), blind).train()
    with pytest.raises(TrainingStopped, match="no completion was judged in 3 steps in a row, up to step 3"):
        rewarded(make_trainer(tmp_path, steps=9, save_steps=1), blind).train()


def test_an_absurd_beta_is_warned_of_then_stops_the_run(tmp_path, caplog):
    trainer = make_trainer(tmp_path, steps=20, beta=1e30)
    with pytest.raises(TrainingStopped, match="no gradient was finite in 5 steps in a row"):
        trainer.train()
    assert torch.isfinite(weights(trainer)).all()
    assert "is not finite, so the step changed nothing" in warned(caplog)[0]


def test_supervised_training_is_watched_too(tmp_path):
    from tests.grpo_core.conftest import make_lm

    run = RunConfig(name="sft", output_dir=tmp_path, max_steps=20, prompts_per_step=4, max_nonfinite_steps=2)
    policy = Policy(make_lm("qwen2", lora=True, hidden_size=32))
    trainer = SFTTrainer(policy, [Example(prompt, (7, 1)) for prompt in PROMPTS], SFTConfig(OptimConfig(), run))
    logprobs = policy.logprobs
    policy.logprobs = lambda *a, **k: (made := logprobs(*a, **k))._replace(logprob=made.logprob * NAN)
    with pytest.raises(TrainingStopped, match="no gradient was finite in 2 steps in a row"):
        trainer.train()
    (path,) = (tmp_path / "sft").glob("nonfinite-*")
    assert [example["target_ids"] for example in json.loads(path.read_text())["examples"]] == [[7, 1]] * 4


# --- the first step ----------------------------------------------------------------------------------------------


@pytest.fixture
def seeing(tmp_path):
    """A trainer whose policy adds a feature to its embeddings, and a group of a prompt with that feature."""
    trainer = make_trainer(tmp_path)
    plain = Policy(trainer.policy.model).embed
    trainer.policy._embed = lambda prompts: [
        e + p.features["audio"] for e, p in zip(plain(prompts), prompts, strict=True)
    ]
    (group,) = trainer.sample([Prompt("clip", (3, 4), {"audio": torch.full((2, 32), 0.5)})])
    return trainer, group


def test_a_policy_that_has_diverged_is_not_mistaken_for_one_that_does_not_hear(seeing):
    trainer, group = seeing
    check_features(trainer.policy, group, 1.0)
    logprobs = trainer.policy.logprobs

    def certain(*arguments, **options):
        made = logprobs(*arguments, **options)
        return made._replace(logprob=torch.zeros_like(made.logprob))

    trainer.policy.logprobs = certain
    with pytest.raises(FirstStepError, match="probability 1, whatever it is given: it has diverged or collapsed"):
        check_features(trainer.policy, group, 1.0)
    trainer.policy.logprobs = lambda *a, **k: (made := logprobs(*a, **k))._replace(logprob=made.logprob * NAN)
    with pytest.raises(FirstStepError, match="are not finite: the policy has diverged"):
        check_features(trainer.policy, group, 1.0)


@pytest.mark.parametrize("temperature", [1e30, 1e-30])
def test_an_absurd_temperature_is_named_and_refused_at_the_start(seeing, tmp_path, temperature):
    trainer, group = seeing
    with pytest.raises(FirstStepError, match=r"rollout.temperature 1e\+30 leaves no difference between logits"):
        check_features(trainer.policy, group, 1e30)
    with pytest.raises(ValueError, match=r"rollout.temperature is 1e[+-]30: set it near 1"):
        make_trainer(tmp_path, temperature=temperature)


def test_log_probs_that_are_not_finite_are_not_read_as_agreement():
    values = {"grad_norm": 1.0, "sampling/sampling_logp_difference/mean": NAN, "clip_ratio/region_mean": 0.0}
    with pytest.raises(FirstStepError, match="log-probs are not finite in the first step"):
        sanity.check_first_step(values, None, type("P", (), {"dtype": torch.float32}), [], 1.0, None, None)


# --- options -----------------------------------------------------------------------------------------------------


def test_two_members_scaled_by_their_own_spread_are_warned_of_once(tmp_path):
    with pytest.warns(
        UserWarning, match=r"0.001 of reward weighs like 1.0. Set scale_rewards to batch or none"
    ) as seen:
        make_trainer(tmp_path, group_size=2)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_trainer(tmp_path, group_size=2, scale_rewards="batch")
        make_trainer(tmp_path, group_size=4)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("reward_timeout", -1.0),
        ("reward_timeout", math.inf),
        ("max_reward_failures", 1.5),
        ("max_unjudged_steps", -1),
        ("max_nonfinite_steps", -1),
        ("warn_after_idle_steps", -3),
    ],
)
def test_limits_that_are_none_are_refused(key, value):
    with pytest.raises(ValueError, match=f"run.{key} is {value}"):
        RunConfig(**{key: value})
