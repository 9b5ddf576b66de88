"""What each option of the algorithm does to a step, on the toy task."""

import json
import re

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from grpo_core.algorithm.advantages import group_advantages
from grpo_core.config.options import RunConfig, SFTConfig
from grpo_core.distributed import Distributed
from grpo_core.policy import Policy
from grpo_core.training import accumulator, batch, grpo, sanity
from grpo_core.training.batch import OldPass
from grpo_core.training.objective import compute_loss
from grpo_core.training.sanity import FirstStepError, check_features
from grpo_core.training.sft import Example, SFTTrainer
from grpo_core.types import Prompt
from tests.grpo_core.conftest import make_lm
from tests.grpo_core.toy import make_trainer, weights


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def reward_of(function, name="fixed"):
    """A reward that says what a function of the groups gives."""
    reward = type("Fixed", (), {"name": name, "__call__": lambda self, groups: function(groups)})
    return reward()


def moved(trainer):
    """The trainer with a policy away from its reference."""
    with torch.no_grad():
        for parameter in trainer.parameters.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.manual_seed(3)))
    return trainer


def test_every_minibatch_of_a_rollout_is_an_optimiser_step_against_the_policy_that_sampled(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, steps=2, steps_per_generation=2, num_iterations=3, warmup_steps=100)
    steps = []
    step = grpo.optimizer_step
    monkeypatch.setattr(grpo, "optimizer_step", lambda *arguments: steps.append(arguments[-2:]) or step(*arguments))
    trainer.train()
    assert steps == [(made, 12) for made in range(12)]
    for row in lines(tmp_path / "toy" / "metrics.jsonl"):
        assert row["sampling/sampling_logp_difference/max"] < 1e-5  # of the second part too
        assert row["time/old"] > 0


def test_kl_in_the_reward_lowers_a_completions_reward_by_beta_times_its_sum(tmp_path):
    trainer = moved(make_trainer(tmp_path, beta=0.3, kl_in="reward", kl_estimator="k1"))
    experience = trainer.collect()
    ((batch,),) = experience.minibatches
    difference = (experience.old[batch].logprob - experience.reference[batch]).double()
    kl = torch.zeros(16, dtype=torch.float64).index_add(0, batch.layout.completion_index, difference).view(4, 4)
    assert kl.abs().min() > 1e-3
    want = group_advantages(experience.scores.total - 0.3 * kl.numpy())
    np.testing.assert_allclose(experience.advantages, want, rtol=1e-6)


def test_the_full_kl_is_the_sum_over_the_vocabulary(tmp_path):
    trainer = moved(make_trainer(tmp_path, beta=0.3, kl_estimator="full", temperature=0.7))
    experience = trainer.collect()
    ((batch,),) = experience.minibatches
    policy, reference_hidden = trainer.policy, experience.reference[batch]
    head = policy.causal_lm.get_output_embeddings().weight
    own = torch.log_softmax(policy.hidden_states(batch.layout, batch.prompts) @ head.T / 0.7, -1)
    other = torch.log_softmax(reference_hidden @ head.T / 0.7, -1)
    want = (own.exp() * (own - other)).sum(-1)
    assert want.min() > 1e-4
    (update,) = trainer.learn(experience)
    torch.testing.assert_close(update.passes[0].kl, want, rtol=1e-4, atol=1e-6)


def test_the_full_kl_needs_a_head_that_is_not_trained(tmp_path):
    trainer = make_trainer(tmp_path, beta=0.3, kl_estimator="full", lora=False)
    with pytest.raises(ValueError, match="head is trained"):
        trainer.train()


@pytest.mark.parametrize("budget", [60, 10**6])
def test_the_most_uncertain_tokens_of_the_step_are_trained_on(tmp_path, budget):
    trainer = make_trainer(tmp_path, top_entropy_quantile=0.3, max_tokens_per_micro_batch=budget)
    experience = trainer.collect()
    (batches,) = experience.minibatches
    entropy = torch.cat([trainer.policy.logprobs(b.layout, b.prompts, entropy=True).entropy for b in batches])
    kept = torch.cat([experience.old[b].entropy_mask for b in batches])
    assert 0.3 <= kept.double().mean() <= 0.6
    assert entropy[kept].min() >= entropy[~kept].max() - 1e-6


def test_the_entropy_bonus_is_coefficient_times_mean_entropy(tmp_path):
    trainer = make_trainer(tmp_path, entropy_coef=0.25)
    experience = trainer.collect()
    ((batch,),) = experience.minibatches
    result = trainer.policy.logprobs(batch.layout, batch.prompts, entropy=True)
    old, advantages = OldPass(result.logprob.detach()), batch.per_token(experience.advantages)
    plain, paid = (
        compute_loss(trainer.config.algorithm, batch, result, old, advantages, None, beta=0.0, entropy_coef=coef)
        for coef in (0.0, 0.25)
    )
    assert (plain.loss - paid.loss).item() == pytest.approx(0.25 * result.entropy.mean().item(), rel=1e-5)


def test_dynamic_sampling_prefers_groups_with_different_rewards_and_keeps_their_number(tmp_path):
    trainer = make_trainer(tmp_path, dynamic_sampling=True, reserve_prompts=8, prompts_per_step=3, max_new_tokens=3)
    groups = trainer.sample(trainer.next_prompts())
    assert len(groups) == 11

    def learn_from(differing):
        """A step in which these groups' rewards differ: ids of the groups trained on, and the step's metrics."""
        table = np.array([np.arange(4.0) if n in differing else np.ones(4) for n in range(11)])
        trainer.rewards = [reward_of(lambda _: table)]
        experience = trainer.collect()
        trainer.open_writer(None)
        values = trainer.report(experience, trainer.learn(experience), 0.0)
        return [group.id for group in experience.groups], values

    ids, values = learn_from((2, 5, 9))
    assert ids == [groups[i].id for i in (2, 5, 9)]
    assert values["effective_groups"] == 3
    assert values["frac_reward_zero_std"] == pytest.approx(8 / 11)
    ids, values = learn_from((2,))
    assert ids == [groups[i].id for i in (0, 1, 2)]
    assert values["effective_groups"] == 1


def test_gdpo_lets_every_reward_count_by_its_weight_whatever_its_spread(tmp_path):
    trainer = make_trainer(tmp_path, multi_objective_aggregation="normalize_then_sum")
    trainer.rewards = [
        reward_of(lambda groups: [[0.0, 0.0, 0.1, 0.1]] * len(groups), "small"),
        reward_of(lambda groups: [[0.0, 1000.0, 0.0, 1000.0]] * len(groups), "wide"),
    ]
    for advantages in trainer.collect().advantages:
        assert advantages[0] == pytest.approx(-advantages[3])
        assert abs(advantages[0]) > 1
        assert advantages[1] == pytest.approx(0, abs=1e-2)  # good by one reward, bad by the other


def test_beta_follows_its_schedule(tmp_path):
    make_trainer(tmp_path, steps=5, beta=0.2, beta_end=0.0).train()
    betas = [row["beta"] for row in lines(tmp_path / "toy" / "metrics.jsonl")]
    np.testing.assert_allclose(betas, [0.2, 0.15, 0.1, 0.05, 0.0], atol=1e-12)


def test_beta_grows_while_the_kl_is_above_its_target(tmp_path):
    make_trainer(
        tmp_path, steps=4, beta=0.01, kl_target=1e-6, kl_horizon=128, prompts_per_step=8, group_size=16
    ).train()
    betas = [row["beta"] for row in lines(tmp_path / "toy" / "metrics.jsonl")]
    np.testing.assert_allclose(betas[:2], [0.01, 0.008])  # the first KL is 0
    np.testing.assert_allclose(betas[2:], [0.008 * 1.2, 0.008 * 1.2**2])


def test_a_synchronised_reference_is_the_policy_again(tmp_path):
    make_trainer(tmp_path, steps=5, beta=0.1, ref_model_sync_steps=2, prompts_per_step=8, group_size=16).train()
    kl = [row["kl"] for row in lines(tmp_path / "toy" / "metrics.jsonl")]
    assert kl[0] == kl[2] == kl[4] == 0
    assert min(kl[1], kl[3]) > 0


def test_a_moving_average_reference_lags_behind(tmp_path):
    trainer = make_trainer(tmp_path, beta=0.1, ref_model_sync_steps=1, ref_model_mixup_alpha=0.25)
    start = weights(trainer).clone()
    moved(trainer).policy.sync_reference(0.25)
    reference = torch.cat([t.flatten() for t in trainer.policy.reference_tensors().values()])
    torch.testing.assert_close(reference, start + 0.25 * (weights(trainer) - start))


@pytest.mark.parametrize("offload", [False, True])
def test_the_reference_pass_leaves_the_policy_where_it_was(tmp_path, offload):
    trainer = moved(make_trainer(tmp_path, beta=0.1, reference_offload=offload))
    before, addresses = weights(trainer).clone(), [p.data_ptr() for p in trainer.parameters.values()]
    experience = trainer.collect()
    ((batch,),) = experience.minibatches
    assert torch.equal(weights(trainer), before)
    assert [p.data_ptr() for p in trainer.parameters.values()] == addresses
    assert (experience.reference[batch] - batch.sampler_logprob).abs().max() > 1e-2


def test_masks_and_bonuses_are_reported_and_a_whole_run_with_them_learns(tmp_path):
    options = {
        "steps_per_generation": 2,
        "top_entropy_quantile": 0.8,
        "off_policy_mask_threshold": 0.5,
        "entropy_coef": 1e-4,
        "dynamic_sampling": True,
        "reserve_prompts": 4,
        "beta": 1e-3,
        "kl_estimator": "k3",
        "sampler_correction": "token_truncate",
    }
    make_trainer(tmp_path, steps=25, lora=False, prompts_per_step=8, group_size=8, **options).train()
    rows = lines(tmp_path / "toy" / "metrics.jsonl")
    assert sum(row["reward"] for row in rows[-5:]) / 5 > 0.6
    assert all(row["off_policy_masked"] is not None and row["entropy_coef"] == 1e-4 for row in rows)


REFUSED = [
    ({"kl_in": "reward"}, "algorithm.kl_in is set, but beta is 0"),
    ({"kl_target": 0.1}, "algorithm.kl_target is set, but beta is 0"),
    ({"beta": 0.1, "kl_target": 0.1, "beta_end": 0.0}, "both steer beta"),
    ({"dynamic_sampling": True}, "needs a reserve above 0"),
    ({"reserve_prompts": 4}, "a reserve has no other use"),
    ({"steps_per_generation": 5}, "steps_per_generation is 5, but a step has 4 prompts"),
    ({"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "none"}, "leave scale_rewards at group"),
    ({"beta": 0.1, "kl_in": "reward", "kl_estimator": "full"}, "not full, but k1"),
    ({"beta": 0.1, "kl_in": "reward", "unbiased_kl": True}, "unbiased_kl"),
    ({"top_entropy_quantile": 0.0}, "top_entropy_quantile is 0.0"),
    ({"entropy_target": 1.0, "entropy_coef": 2.0}, "entropy_coef ≤ entropy_coef_max"),
    ({"beta": 0.1, "reference": "adapter_off", "ref_model_sync_steps": 3}, "the base model itself"),
    *(
        ({key: value}, "draw from another distribution")
        for key, value in {"top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1}.items()
    ),
    ({"ref_model_mixup_alpha": 0.0}, "ref_model_mixup_alpha is 0.0"),
]


@pytest.mark.parametrize(
    ("options", "message"), REFUSED, ids=[next(reversed(options)) + "-" + message for options, message in REFUSED]
)
def test_impossible_options_are_refused_at_the_start(tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_trainer(tmp_path, **options)


def test_an_adapter_on_the_head_is_refused():
    model = get_peft_model(make_lm("qwen2", lora=False), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="adapter on its LM head"):
        Policy(model)


def test_a_sampler_of_another_policy_stops_the_run_in_its_first_step(tmp_path):
    trainer = make_trainer(tmp_path)
    sample = trainer.sampler.sample
    trainer.sampler.sample = lambda prompts, rollout, **k: [
        type(g)(g.prompt, [type(c)(c.token_ids, c.logprobs - 0.1, c.finish_reason, c.text) for c in g.completions])
        for g in sample(prompts, rollout, **k)
    ]
    with pytest.raises(FirstStepError, match=r"differ from the trainer's by 0.1 nats"):
        trainer.train()


def test_a_gradient_that_is_not_finite_stops_the_run_in_its_first_step(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.advantages = lambda *_: np.full((4, 4), np.inf)
    with pytest.raises(FirstStepError, match="first gradient is not finite"):
        trainer.train()


def test_passes_that_differ_over_the_same_tokens_stop_the_run_in_its_first_step(tmp_path):
    trainer = make_trainer(
        tmp_path, top_entropy_quantile=0.9, loss={"epsilon": 0.01}, prompts_per_step=8, group_size=16
    )
    logprobs = trainer.policy.logprobs

    def noisy(*arguments, **options):
        result = logprobs(*arguments, **options)
        noise = torch.linspace(-0.1, 0.1, len(result.logprob)) * trainer.policy.module.training
        return result._replace(logprob=result.logprob + noise)

    trainer.policy.logprobs = noisy
    with pytest.raises(FirstStepError, match="a token's ratio was clipped"):
        trainer.train()


@pytest.mark.parametrize("used", [True, False])
def test_a_feature_without_effect_stops_the_run(tmp_path, used):
    trainer = make_trainer(tmp_path)
    policy = trainer.policy
    plain = Policy(policy.model).embed
    policy._embed = lambda prompts: [
        e + used * p.features["audio"] for e, p in zip(plain(prompts), prompts, strict=True)
    ]
    (group,) = trainer.sample([Prompt("clip", (3, 4), {"audio": torch.full((2, 32), 0.5)})])
    if used:
        check_features(policy, group, 1.0)
    else:
        with pytest.raises(FirstStepError, match="do not depend on its 'audio' features"):
            check_features(policy, group, 1.0)


@pytest.mark.parametrize("used", [True, False])
def test_supervised_training_stops_where_a_feature_has_no_effect(tmp_path, used):
    policy = Policy(make_lm(lora=True))
    plain = Policy(policy.model).embed
    policy._embed = lambda prompts: [
        e + used * p.features["audio"] for e, p in zip(plain(prompts), prompts, strict=True)
    ]
    examples = [Example(Prompt(f"p{i}", (3, 4), {"audio": torch.full((2, 32), 0.5)}), (7, 1)) for i in range(2)]
    before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters().items()}
    for check in (True, False):
        run = RunConfig(output_dir=tmp_path, name=str(check), max_steps=1, prompts_per_step=2, check_first_step=check)
        trainer = SFTTrainer(policy, examples, SFTConfig(run=run))
        if used or not check:
            trainer.train()
            continue
        with pytest.raises(FirstStepError, match="do not depend on its 'audio' features"):
            trainer.train()
        for name, parameter in policy.named_parameters().items():
            assert torch.equal(parameter, before[name])  # found before the first update


def test_ids_of_another_models_tokenizer_are_named_before_the_first_step(tmp_path):
    trainer = make_trainer(tmp_path)
    arguments = (trainer.policy, trainer.sampler, [Prompt("odd", (3, 97))] * 12, trainer.rewards, trainer.config)
    with pytest.raises(ValueError, match="prompt 'odd' has token id 97, but the model has 97 embeddings"):
        grpo.GRPOTrainer(*arguments)
    config = SFTConfig(run=RunConfig(output_dir=tmp_path, prompts_per_step=1))
    for example, words in (
        (Example(Prompt("odd", (3, 200)), (4,)), "prompt 'odd' has token id 200"),
        (Example(Prompt("p", (3,)), (4, 98)), "a target has token id 98"),
    ):
        with pytest.raises(ValueError, match=words):
            SFTTrainer(trainer.policy, [example], config)
    elsewhere = Policy(trainer.policy.model, embed=trainer.policy.embed)  # an embed of its own knows its placeholders
    elsewhere.check_token_ids([Prompt("odd", (3, 97))])


def test_what_one_rank_finds_all_ranks_raise(monkeypatch):
    monkeypatch.setattr(sanity, "gather_objects", lambda found, dist: [found, "of the other rank"])
    with pytest.raises(FirstStepError, match="of the other rank"):
        sanity.check_features_on_all_ranks(Policy(make_lm()), None, 1.0, Distributed(0, 2))


def test_a_first_step_without_an_end_says_why(tmp_path, caplog):
    for name, ends, told in (("none", None, 1), ("some", 1, 0)):
        trainer = make_trainer(tmp_path / name, steps=1)
        model = trainer.sampler.model
        model.generation_config.eos_token_id = trainer.sampler.tokenizer.eos_token = None
        if ends is not None:
            trainer.sampler.end_tokens = range(97)
        caplog.clear()
        trainer.train()
        assert [r.getMessage().partition(": ")[2][:28] for r in caplog.records if "cut off" in r.getMessage()] == [
            "no token that can be drawn e"
        ] * told


def test_logging_costs_one_collective_and_one_copy_to_the_host(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, steps=1, beta=0.1)
    calls = []
    gather = accumulator.gather_rows
    monkeypatch.setattr(accumulator, "gather_rows", lambda *a: calls.append("gather") or gather(*a))
    reduce = batch.all_reduce_sum
    monkeypatch.setattr(batch, "all_reduce_sum", lambda *a: calls.append("counts") or reduce(*a))
    report, read = trainer.report, []

    def counted(*arguments):
        with monkeypatch.context() as patch:
            for name in ("cpu", "item", "tolist", "__bool__", "__float__"):
                method = getattr(torch.Tensor, name)
                patch.setattr(torch.Tensor, name, lambda *a, m=method, n=name: read.append(n) or m(*a))
            return report(*arguments)

    trainer.report = counted
    trainer.train()
    assert calls == ["counts", "gather"]  # the first one is the loss's own: how many tokens there are
    assert read == ["cpu"]


def test_tokens_per_second_are_tokens_over_seconds(tmp_path):
    make_trainer(tmp_path, steps=1).train()
    (row,) = lines(tmp_path / "toy" / "metrics.jsonl")
    tokens = row["sampling/completion_tokens"]
    assert tokens == sum(line["length"] for line in lines(tmp_path / "toy" / "completions.jsonl"))
    assert row["num_tokens"] == tokens + row["sampling/prompt_tokens"]
    assert row["tokens_per_second/decode"] == pytest.approx(tokens / row["sampling/seconds/decode"])
    assert row["num_trained_tokens"] == row["num_tokens"]
    assert row["tokens_per_second/step"] == pytest.approx(row["num_tokens"] / row["step_time"])
