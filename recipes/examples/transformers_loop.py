"""GRPO in a bare transformers loop: `grpo_kernels.lm_head.grpo_loss` in the place of the LM head and the loss.

The policy is any causal LM of transformers; nothing else of this project is used. By default a tiny random Qwen2 learns
to say one token, which takes seconds on a CPU: `python recipes/examples/transformers_loop.py`.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from grpo_kernels import GRPOLoss, linear_grpo_loss


def completion_loss(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_mask: Tensor,
    advantages: Tensor,
    old_logprob: Tensor | None = None,
    **options,
) -> GRPOLoss:
    """DAPO's token-mean GRPO loss of a padded batch of prompts and completions; no logits, no padding in the head.

    Args:
        input_ids, attention_mask: `[B, L]` prompts, completions and padding.
        completion_mask: bool `[B, L - 1]`; entry t is whether token t + 1 is a completion token.
        advantages: `[B]`.
        old_logprob: `[R]` of the R completion tokens, from an earlier call's `logprob`; None on-policy.
        options: of `linear_grpo_loss`.
    """
    # the backbone without its head; under PEFT: model.get_base_model().base_model
    hidden = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    member, _ = completion_mask.nonzero(as_tuple=True)
    tokens = len(member)
    return linear_grpo_loss(
        hidden[:, :-1][completion_mask],  # row t predicts token t + 1
        head.weight,
        input_ids[:, 1:][completion_mask],
        advantages[member],
        loss_weight=torch.full((tokens,), 1.0 / tokens, device=hidden.device),
        old_logprob=old_logprob,
        bias=head.bias,
        **options,
    )


def train(steps: int = 20, epochs: int = 2, group_size: int = 8, length: int = 8, seed: int = 0) -> list[float]:
    """Train a tiny policy to say token 7; returns each step's mean reward (the share of 7s)."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    prompt = torch.tensor([[1, 2, 3]]).repeat(group_size, 1)
    rewards_by_step = []
    for _ in range(steps):
        ids = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=True, max_new_tokens=length, pad_token_id=0
        )
        rewards = (ids[:, prompt.shape[1] :] == 7).float().mean(1)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        completion_mask = torch.zeros(ids.shape[0], ids.shape[1] - 1, dtype=torch.bool)
        completion_mask[:, prompt.shape[1] - 1 :] = True
        old_logprob = None
        for _ in range(epochs):
            result = completion_loss(
                model, ids, torch.ones_like(ids), completion_mask, advantages, old_logprob, clip_high=0.28
            )
            old_logprob = result.logprob if old_logprob is None else old_logprob
            optimizer.zero_grad()
            result.loss.backward()
            optimizer.step()
        rewards_by_step.append(float(rewards.mean()))
    return rewards_by_step


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    for step, reward in enumerate(train(parser.parse_args().steps)):
        print(f"step {step:3d}  reward {reward:.3f}")
