"""The loss's mathematics against formulas written out a second time, in float64, one token after another."""

import math

import pytest
import torch

from grpo_core.algorithm.entropy import entropy_histogram, entropy_threshold
from grpo_core.algorithm.kl import kl_penalty
from grpo_core.algorithm.losses import LOSS_TYPES, importance_ratio, policy_loss, register_loss, token_weights
from grpo_core.algorithm.off_policy import sampler_correction
from tests.grpo_core.algorithm.tokens import INDEX, LENGTHS, random_completions, random_tokens

TOTALS = {"total_completions": len(LENGTHS), "total_tokens": sum(LENGTHS), "max_length": 30}


def surrogate(name, logprob, old, advantages, **options):
    """The token losses of a loss type, of tokens that belong to `LENGTHS` or to one completion."""
    index = INDEX if len(old) == len(INDEX) else torch.zeros(len(old)).long()
    return policy_loss(LOSS_TYPES[name](**options), logprob, old, advantages, index, len(LENGTHS))


@pytest.mark.parametrize("delta", [None, 1.6])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28)])
def test_surrogate_is_the_clipped_minimum(low, high, delta):
    logprob, old, advantages = random_tokens()
    result = surrogate("grpo", logprob, old, advantages, epsilon=low, epsilon_high=high, delta=delta)
    for t in range(len(old)):
        ratio = math.exp(logprob[t].item() - old[t].item())
        advantage = advantages[t].item()
        free = min(ratio, delta) if delta else ratio
        loss = -min(free * advantage, max(min(ratio, 1 + high), 1 - low) * advantage)
        assert result.loss[t].item() == pytest.approx(loss, abs=1e-12)
        assert result.clipped_low[t].item() == (ratio < 1 - low and advantage < 0)
        assert result.clipped_high[t].item() == (ratio > 1 + high and advantage > 0)


def test_delta_above_the_clip_range_is_dual_clip():
    logprob, old, advantages = random_tokens()
    ratio = (logprob - old).exp().detach()
    ordinary = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    dual = torch.where(advantages < 0, torch.maximum(ordinary, 1.6 * advantages), ordinary)
    result = surrogate("dapo", logprob, old, advantages, delta=1.6)
    assert (dual != ordinary).any()
    torch.testing.assert_close(result.loss.detach(), -dual, atol=1e-12, rtol=0)


def test_a_clipped_token_gives_no_gradient_and_a_free_one_gives_ratio_times_advantage():
    logprob, old, advantages = random_tokens()
    result = surrogate("grpo", logprob, old, advantages)
    result.loss.sum().backward()
    clipped = result.clipped_low | result.clipped_high
    assert clipped.any()
    assert (logprob.grad[clipped] == 0).all()
    torch.testing.assert_close(logprob.grad[~clipped], -(result.ratio * advantages)[~clipped])


def written_out(name: str, logprob: list[float], old: list[float], advantages: list[float], options: dict):
    """(loss, gradient) of `Σ weight · loss` over `LENGTHS`, in Python floats: each derivative by the chain rule."""
    total, gradient = 0.0, [0.0] * len(logprob)
    sequences = {"gspo", "luspo"}
    whole = {*sequences, "gspo_token", "vespo"}
    start = 0
    for length in LENGTHS:
        tokens = range(start, start + length)
        start += length
        mean = sum(logprob[t] - old[t] for t in tokens) / length if length else 0.0
        for t in tokens:
            a = advantages[t]
            r = math.exp(mean if name in whole else logprob[t] - old[t])
            if name == "vespo":
                w, sign = r**length, "neg" if a < 0 else "pos"
                weight = w ** options[f"k_{sign}"] * math.exp(options[f"lambda_{sign}"] * (1 - w))
                loss, by_logprob = -weight * a * logprob[t], -weight * a
            elif name == "cispo":
                weight = min(max(r, 1 - options["epsilon_low"]), options["cispo_cap"])
                loss, by_logprob = -weight * a * logprob[t], -weight * a
            elif name == "sapo":
                tau = options["temperature_pos" if a > 0 else "temperature_neg"]
                gate = 1 / (1 + math.exp(-tau * (r - 1)))
                loss, by_logprob = -4 / tau * gate * a, -4 * gate * (1 - gate) * a * r
            else:
                low, high = 1 - options["epsilon"], 1 + options["epsilon_high"]
                loss = -min(r * a, max(low, min(r, high)) * a)
                by_logprob = 0.0 if (a > 0 and r > high) or (a < 0 and r < low) else -r * a
            w = {
                "grpo": 1 / (len(LENGTHS) * length),
                "dr_grpo": 1 / (len(LENGTHS) * 30),
                "luspo": 1 / len(LENGTHS),
                **dict.fromkeys(("bnpo", "dapo", "cispo", "vespo"), 1 / sum(LENGTHS)),
                **dict.fromkeys(("gspo", "gspo_token", "sapo"), 1 / (len(LENGTHS) * length)),
            }[name]
            total += w * loss
            for s in tokens if name in sequences else (t,):  # a sequence's ratio moves with each of its tokens
                gradient[s] += w * by_logprob / (length if name in sequences else 1)
    return total, gradient


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_loss_and_gradient_are_the_written_out_ones(name):
    logprob, old, advantages = random_completions()
    options = {"epsilon": 0.1, "epsilon_high": 0.15}
    options = {
        "cispo": {"cispo_cap": 1.3, "epsilon_low": 0.2},
        "sapo": {"temperature_pos": 1.0, "temperature_neg": 1.4},
        "vespo": {"k_pos": 1.5, "lambda_pos": 2.5, "k_neg": 2.0, "lambda_neg": 3.0},
    }.get(name, options)
    result = surrogate(name, logprob, old, advantages, **options)
    weights = token_weights(torch.tensor(LENGTHS), INDEX, LOSS_TYPES[name].average, **TOTALS).double()
    loss = (weights * result.loss).sum()
    loss.backward()
    expected, gradient = written_out(name, logprob.tolist(), old.tolist(), advantages.tolist(), options)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(logprob.grad, torch.tensor(gradient, dtype=torch.float64), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_on_policy_every_ratio_is_one_and_nothing_is_clipped(name):
    logprob, _, advantages = random_completions()
    result = surrogate(name, logprob, logprob.detach(), advantages)
    assert (result.ratio == 1).all()
    assert not result.clipped_low.any()
    assert not result.clipped_high.any()
    result.loss.sum().backward()  # and the first step is the plain policy gradient, whatever the loss type
    torch.testing.assert_close(logprob.grad, -advantages)


def test_cispo_caps_the_weight_at_the_cap_itself_and_keeps_the_gradient():
    logprob, old, advantages = random_completions()
    result = surrogate("cispo", logprob, old, advantages, cispo_cap=1.5)
    result.loss.sum().backward()
    capped = result.ratio > 1.5
    assert capped.any()
    torch.testing.assert_close(logprob.grad[capped], -1.5 * advantages[capped])


def test_cispo_raises_small_weights_to_its_lower_clamp_and_has_none_by_default():
    logprob, old, advantages = random_completions()
    free, clamped = (surrogate("cispo", logprob, old, advantages, epsilon_low=low) for low in (None, 0.2))
    low = free.ratio < 0.8
    assert (low & (advantages < 0)).any()
    assert not free.clipped_low.any()
    assert torch.equal(clamped.clipped_low, low & (advantages < 0))
    assert torch.equal(clamped.loss[~low], free.loss[~low])
    torch.testing.assert_close(clamped.loss[low], (-0.8 * advantages * logprob)[low])
    torch.testing.assert_close(free.loss[low], (-free.ratio * advantages * logprob)[low])


def test_vespo_weighs_a_completion_by_the_product_of_its_ratios():
    """φ is largest at w = k / λ; two tokens' ratios of 1.5 make w = 2.25, whatever the length is divided by."""
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.8], dtype=torch.float64)
    index = torch.tensor([0, 0, 1, 1])
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    logprob = torch.full((4,), -1.0, dtype=torch.float64)
    result = policy_loss(LOSS_TYPES["vespo"](), logprob, logprob - ratios.log(), advantages, index, 2)
    torch.testing.assert_close(result.ratio, torch.tensor([2.25, 2.25, 0.4, 0.4], dtype=torch.float64))
    up, down = 2.25**2 * math.exp(3 * (1 - 2.25)), 0.4**3 * math.exp(2 * (1 - 0.4))
    torch.testing.assert_close(result.loss, torch.tensor([up, up, -down, -down], dtype=torch.float64))


@pytest.mark.parametrize("distance", [100.0, 1e4, torch.inf])
@pytest.mark.parametrize("name", LOSS_TYPES)
def test_a_ratio_that_float32_cannot_hold_gives_no_nan(name, distance):
    """exp overflows at 88.7; a clipped token's slope is 0, and 0 times an infinite derivative would be NaN."""
    logprob = torch.full((6,), -1.0, requires_grad=True)
    old = torch.full((6,), -1.0 - distance)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0, 0.0])
    options = {"delta": 2.0, "epsilon": 0.1} if hasattr(LOSS_TYPES[name], "clip_range") else {}
    result = policy_loss(LOSS_TYPES[name](**options), logprob, old, advantages, torch.tensor([0, 0, 1, 1, 2, 2]), 3)
    result.loss.sum().backward()
    assert result.loss.isfinite().all()
    assert result.ratio.isfinite().all()
    if name == "cispo":  # a capped weight, not a clipped token
        assert logprob.grad.tolist() == [-5.0, -5.0, 5.0, 5.0, 0.0, 0.0]
    else:
        assert logprob.grad.tolist() == [0.0] * 6


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("cispo", {"epsilon_low": 1.5}, "algorithm.loss.epsilon_low is 1.5: set it between 0 and 1"),
        ("cispo", {"cispo_cap": 0.9}, "algorithm.loss.cispo_cap is 0.9: set it above 1"),
        ("vespo", {"k_neg": -1.0}, "algorithm.loss.k_neg is -1.0: set it to 0 or more"),
        ("vespo", {"lambda_pos": 0.0}, "algorithm.loss.lambda_pos is 0.0: set it above 0"),
    ],
)
def test_options_without_a_meaning_are_refused(name, options, says):
    with pytest.raises(ValueError, match=says):
        LOSS_TYPES[name](**options)


def test_gspo_clips_whole_completions_and_gspo_token_agrees_in_value():
    logprob, old, advantages = random_completions()
    sequence = surrogate("gspo", logprob, old, advantages)
    token = surrogate("gspo_token", logprob, old, advantages)
    torch.testing.assert_close(sequence.loss, token.loss)
    clipped = sequence.clipped_low | sequence.clipped_high
    for i in INDEX.unique():
        assert clipped[INDEX.eq(i)].float().mean() in (0, 1)


def test_a_micro_batch_at_a_time_the_losses_add_up_to_the_whole():
    logprob, old, advantages = random_completions()
    lengths = torch.tensor(LENGTHS)
    for name in LOSS_TYPES:

        def loss(keep, name=name):
            tokens = torch.isin(INDEX, keep)
            index = torch.searchsorted(keep, INDEX[tokens])
            parts = (x[tokens] for x in (logprob, old, advantages))
            weights = token_weights(lengths[keep], index, LOSS_TYPES[name].average, **TOTALS)
            return (weights * policy_loss(LOSS_TYPES[name](), *parts, index, len(keep)).loss).sum()

        whole = loss(torch.arange(6))
        torch.testing.assert_close(loss(torch.tensor([0, 1, 2])) + loss(torch.tensor([3, 4, 5])), whole)


# --- weights -----------------------------------------------------------------------------------------------------


def test_weights_average_by_sequence_by_token_or_by_constant_length():
    lengths = torch.tensor([2, 0, 3])
    index = torch.tensor([0, 0, 2, 2, 2])
    totals = {"total_completions": 6, "total_tokens": 20, "max_length": 8}
    grpo = token_weights(lengths, index, LOSS_TYPES["grpo"].average, **totals)
    torch.testing.assert_close(grpo, torch.tensor([1 / 12, 1 / 12, 1 / 18, 1 / 18, 1 / 18]))
    assert (token_weights(lengths, index, LOSS_TYPES["dapo"].average, **totals) == torch.tensor(1 / 20)).all()
    assert (token_weights(lengths, index, LOSS_TYPES["dr_grpo"].average, **totals) == torch.tensor(1 / 48)).all()
    assert (token_weights(lengths, index, LOSS_TYPES["luspo"].average, **totals) == torch.tensor(1 / 6)).all()


def test_a_masked_completion_weighs_nothing():
    lengths, index = torch.tensor([2, 3]), torch.tensor([0, 0, 1, 1, 1])
    for name in LOSS_TYPES:
        whole = token_weights(lengths, index, LOSS_TYPES[name].average, **TOTALS)
        masked = token_weights(
            lengths, index, LOSS_TYPES[name].average, **TOTALS, completion_weights=torch.tensor([True, False])
        )
        assert (masked[2:] == 0).all()
        assert (masked[:2] == whole[:2]).all()


def test_a_step_without_tokens_has_finite_weights():
    for name in LOSS_TYPES:
        totals = {"total_completions": 2, "total_tokens": 0, "max_length": 4}
        assert token_weights(
            torch.zeros(2).long(), torch.zeros(0).long(), LOSS_TYPES[name].average, **totals
        ).shape == (0,)


# --- registration ------------------------------------------------------------------------------------------------


@pytest.fixture
def registry(monkeypatch):
    """Losses registered by a test are gone after it."""
    monkeypatch.setattr(LOSS_TYPES, "_entries", dict(LOSS_TYPES._entries))


def test_a_registered_function_or_class_computes_the_policy_loss(registry):
    @register_loss("reinforce", average="token")
    def reinforce(logprob, ratio, advantages):
        """Plain policy gradient."""
        return -advantages * logprob

    @register_loss("power", ratio="sequence", average="sum", source="here")
    class Power:
        """A power of the ratio."""

        exponent: float = 2.0

        def __call__(self, logprob, ratio, advantages):
            return -advantages * ratio**self.exponent, ratio < 0.9, ratio > 1.1

    logprob, old, advantages = random_completions()
    plain = surrogate("reinforce", logprob, old, advantages)
    assert torch.equal(plain.loss, -advantages * logprob)
    assert not (plain.clipped_low | plain.clipped_high).any()
    result = surrogate("power", logprob, old, advantages, exponent=3.0)
    ratio = importance_ratio(logprob, old, INDEX, len(LENGTHS), "sequence")
    assert torch.equal(result.loss, -advantages * ratio**3.0)
    assert torch.equal(result.clipped_high, ratio > 1.1)
    assert (LOSS_TYPES["power"].average, LOSS_TYPES["power"].source) == ("sum", "here")
    assert LOSS_TYPES.doc("reinforce") == "Plain policy gradient."
    weights = token_weights(torch.tensor(LENGTHS), INDEX, LOSS_TYPES["reinforce"].average, **TOTALS)
    assert torch.equal(weights, token_weights(torch.tensor(LENGTHS), INDEX, LOSS_TYPES["dapo"].average, **TOTALS))


def test_a_loss_that_cannot_be_computed_is_not_registered(registry):
    class Options:
        exponent: float = 2.0

    with pytest.raises(ValueError, match=r"'reinforce' has no surrogate: define __call__\(self, logprob, ratio, adv"):
        register_loss("reinforce", average="token")(Options)
    with pytest.raises(ValueError, match="'reinforce' has no surrogate: define its three arguments logprob, ratio"):
        register_loss("reinforce", average="token")(lambda logprob: logprob)
    with pytest.raises(ValueError, match="average is 'mean', choose one of sequence, token, constant, sum"):
        register_loss("reinforce", average="mean")
    with pytest.raises(ValueError, match="ratio is 'word', choose one of token"):
        register_loss("reinforce", ratio="word", average="token")
    with pytest.raises(ValueError, match="loss type 'grpo' is registered already"):
        register_loss("grpo", average="token")(lambda logprob, ratio, advantages: logprob)
    with pytest.raises(ValueError, match="SAPO is registered already, register a subclass of it"):
        register_loss("reinforce", average="token")(LOSS_TYPES["sapo"])
    assert "reinforce" not in LOSS_TYPES


def test_unknown_names_list_the_valid_ones():
    logprob, old, _ = random_tokens(3)
    index = torch.zeros(3).long()
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        kl_penalty(logprob, old, "k4")
    with pytest.raises(ValueError, match="unknown average of token losses 'mean': choose one of sequence, token"):
        token_weights(torch.tensor([1]), torch.tensor([0]), "mean", total_completions=1, total_tokens=1, max_length=1)
    with pytest.raises(
        ValueError,
        match="'ppo': choose one of grpo, bnpo, dapo, dr_grpo, gspo, gspo_token, cispo, sapo",
    ):
        LOSS_TYPES["ppo"]
    with pytest.raises(ValueError, match="token, sequence, sequence_token"):
        importance_ratio(logprob, old, index, 1, "word")
    with pytest.raises(ValueError, match="token_truncate, token_mask"):
        sampler_correction(logprob, old, index, 1, "tis")
    with pytest.raises(ValueError, match="0 ≤ low < high"):
        sampler_correction(logprob, old, index, 1, low=4.0)
    with pytest.raises(ValueError, match="at most 1"):
        entropy_threshold(entropy_histogram(old), 1.5)
