"""The same loss and gradient as TRL's trainer and as Liger's fused head, where those packages are installed."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from grpo_kernels import linear_grpo_loss

B, L, H, V = 4, 6, 16, 50
LOSS_TYPES = ("grpo", "dapo", "bnpo", "dr_grpo", "cispo", "vespo")
EPSILON = {"clip_low": 0.1, "clip_high": 0.3}
CAP = 1.3
OPTIONS = {"cispo": {"cispo_cap": CAP}, "vespo": {}}  # of loss types other than clip


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(B, L, H, generator=g), torch.randn(V, H, generator=g) / H**0.5
    ids = torch.randint(V, (B, L), generator=g)
    logprob = torch.log_softmax(hidden @ weight.T, -1).gather(2, ids[..., None])[..., 0]
    return SimpleNamespace(
        hidden=hidden,
        weight=weight,
        ids=ids,
        mask=(torch.arange(L) < torch.tensor([6, 3, 1, 5])[:, None]).long(),
        advantages=torch.randn(B, generator=g),
        old=logprob + 0.4 * torch.randn(B, L, generator=g),
        reference=logprob + 0.3 * torch.randn(B, L, generator=g),
    )


def token_weights(mask, loss_type):
    """What a loss type is, as weights of tokens."""
    if loss_type == "grpo":
        return mask / (mask.sum(1, keepdim=True) * B)
    if loss_type == "dr_grpo":
        return mask / (B * L)
    return mask / mask.sum()  # dapo, bnpo, cispo and vespo, all tokens of the step in one batch


def ours(data, loss_type, beta, times_ratio, dual_clip, sequence):
    leaves = [x.clone().requires_grad_() for x in (data.hidden, data.weight)]
    options = OPTIONS.get(loss_type, EPSILON)
    if sequence or loss_type == "vespo":
        options = options | {"completion_index": torch.arange(B).repeat_interleave(L), "num_completions": B}
    result = linear_grpo_loss(
        leaves[0].view(-1, H),
        leaves[1],
        data.ids.view(-1),
        data.advantages.repeat_interleave(L),
        loss_weight=token_weights(data.mask, loss_type).view(-1),
        old_logprob=data.old.view(-1),
        reference_logprob=data.reference.view(-1) if beta else None,
        loss_type=loss_type if loss_type in OPTIONS else "clip",
        beta=beta,
        dual_clip=dual_clip,
        kl_times_ratio=times_ratio,
        **options,
    )
    result.loss.backward()
    return result, [leaf.grad for leaf in leaves]


def assert_same(loss, gradients, peer_loss, peer_leaves):
    peer_loss.backward()
    torch.testing.assert_close(loss.detach(), peer_loss.detach(), rtol=1e-5, atol=1e-6)
    for gradient, leaf in zip(gradients, peer_leaves, strict=True):
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-4, atol=1e-7)


KLS = ((0.0, False), (0.1, False), (0.1, True))
CASES = [
    (name, *kl, dual, False)
    for name in LOSS_TYPES
    for kl in KLS
    for dual in (None, 1.6)
    if not (name in OPTIONS and dual)  # TRL ignores delta where the loss does not clip
]
CASES += [("grpo", 0.1, False, None, True), ("dr_grpo", 0.0, False, None, True)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_is_trls(case):
    trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    loss_type, beta, times_ratio, dual_clip, sequence = case
    data = batch()
    result, gradients = ours(data, *case)
    leaves = [x.clone().requires_grad_() for x in (data.hidden, data.weight)]

    def scores(*_, **__):
        logp = torch.log_softmax(leaves[0] @ leaves[1].T, -1)
        return logp.gather(2, data.ids[..., None])[..., 0], -(logp.exp() * logp).sum(-1), None

    metrics = {"train": defaultdict(list)}
    same = lambda x, **_: x  # noqa: E731
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=scores,
        _metrics=metrics,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(gather=same, reduce=same, num_processes=1),
        args=SimpleNamespace(
            delta=dual_clip,
            use_bias_correction_kl=times_ratio,
            steps_per_generation=1,
            vespo_k_pos=2.0,
            vespo_lambda_pos=3.0,
            vespo_k_neg=3.0,
            vespo_lambda_neg=2.0,
        ),
        get_gamma_weights=trainer.GRPOTrainer.get_gamma_weights,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="sequence" if sequence else "token",
        beta=beta,
        loss_type=loss_type,
        epsilon_low=EPSILON["clip_low"],
        epsilon_high=CAP if loss_type == "cispo" else EPSILON["clip_high"],
        max_completion_length=L,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
    )
    inputs = {
        "prompt_ids": torch.zeros(B, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(B, 1, dtype=torch.int64),
        "completion_ids": data.ids,
        "completion_mask": data.mask,
        "advantages": data.advantages,
        "old_per_token_logps": data.old,
        "ref_per_token_logps": data.reference,
        "num_items_in_batch": data.mask.sum(),
    }
    loss = trainer.GRPOTrainer._compute_loss(stub, None, inputs)
    assert_same(result.loss, gradients, loss, leaves)
    mask = data.mask.view(-1).bool()
    if beta and not times_ratio:
        assert metrics["train"]["kl"][0] == pytest.approx(float(result.kl[mask].mean()), rel=1e-5)
    if loss_type not in OPTIONS and not sequence:
        assert metrics["train"]["clip_ratio/low_mean"][0] == pytest.approx(
            float(result.clipped_low[mask].float().mean())
        )


@pytest.mark.parametrize("case", [case for case in CASES if not case[4]], ids=str)
def test_loss_is_ligers(case):
    chunked = pytest.importorskip("liger_kernel.chunked_loss")
    loss_type, beta, times_ratio, dual_clip, _ = case
    data = batch()
    result, gradients = ours(data, *case)
    leaves = [x.clone().requires_grad_() for x in (data.hidden, data.weight)]
    head = chunked.LigerFusedLinearGRPOLoss(
        beta=beta,
        compiled=False,
        use_ref_model=beta != 0,
        epsilon_low=EPSILON["clip_low"],
        epsilon_high=CAP if loss_type == "cispo" else EPSILON["clip_high"],
        loss_type=loss_type,
        max_completion_length=L,
        delta=dual_clip,
        use_bias_correction_kl=times_ratio,
    )
    loss, _ = head(
        leaves[0],
        leaves[1],
        data.ids,
        data.mask,
        data.advantages,
        ref_per_token_logps=data.reference if beta else None,
        old_per_token_logps=data.old,
    )
    assert_same(result.loss, gradients, loss, leaves)
