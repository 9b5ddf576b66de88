"""GRPO in a bare transformers loop: `linear_grpo_loss` of our kernels replaces the LM head and the loss.

    python recipes/examples/transformers_loop.py

The policy is any causal LM of transformers; nothing else of this project is used. As it is, a tiny random Qwen2 learns
to say one token, which takes seconds on a CPU. `completion_loss` is the part to copy into a loop of your own.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from grpo_kernels import GRPOLoss, linear_grpo_loss

WANTED_TOKEN = 7


def completion_loss(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_mask: Tensor,
    advantages: Tensor,
    old_logprob: Tensor | None = None,
    **options: Any,
) -> GRPOLoss:
    """Compute the GRPO loss of a padded batch, the mean over all completion tokens (as DAPO); no logits are kept.

    Args:
        input_ids, attention_mask: int64 `[M, S]` prompts, completions and padding.
        completion_mask: bool `[M, S − 1]`; entry t is whether token t + 1 belongs to a completion.
        advantages: float32 `[M]`.
        old_logprob: float32 `[R]` of the R completion tokens, the `logprob` of an earlier call; None where the policy
            has not moved since it sampled.
        options: of `linear_grpo_loss`, such as `clip_high` or `temperature`.
    """
    # The backbone without its head: the head is multiplied inside the loss, a chunk of rows at a time. Under PEFT the
    # backbone is model.get_base_model().base_model.
    hidden = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    # Only rows that predict a completion token go into the head: neither prompts nor padding cost anything there.
    completion_index, _ = completion_mask.nonzero(as_tuple=True)
    num_tokens = len(completion_index)
    return linear_grpo_loss(
        hidden[:, :-1][completion_mask],  # row t predicts token t + 1
        head.weight,
        input_ids[:, 1:][completion_mask],
        advantages[completion_index],
        # the loss is the sum of loss_weight · token loss: 1 / R gives the mean over tokens
        loss_weight=torch.full((num_tokens,), 1.0 / num_tokens, device=hidden.device),
        old_logprob=old_logprob,
        bias=head.bias,
        **options,
    )


def tiny_model() -> Qwen2ForCausalLM:
    """A random Qwen2 of two layers that never ends a completion early."""
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def train(steps: int = 20, epochs: int = 2, group_size: int = 8, length: int = 8, seed: int = 0) -> list[float]:
    """Train a tiny policy to say `WANTED_TOKEN`; returns each step's mean reward, the share of that token."""
    torch.manual_seed(seed)
    model: Any = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    prompts = torch.tensor([[1, 2, 3]]).repeat(group_size, 1)  # one group: the same prompt G times
    num_prompt_tokens = prompts.shape[1]
    rewards_by_step = []
    for _ in range(steps):
        # Sample a group.
        input_ids = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, max_new_tokens=length, pad_token_id=0
        )
        attention_mask = torch.ones_like(input_ids)  # all completions are equally long here
        completion_mask = torch.zeros(group_size, input_ids.shape[1] - 1, dtype=torch.bool)
        completion_mask[:, num_prompt_tokens - 1 :] = True  # the last prompt token predicts the first completion token

        # Score the completions, and compare each with its group.
        rewards = (input_ids[:, num_prompt_tokens:] == WANTED_TOKEN).float().mean(1)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)

        # Update the policy, several times on the same completions.
        old_logprob = None
        for _ in range(epochs):
            result = completion_loss(
                model, input_ids, attention_mask, completion_mask, advantages, old_logprob, clip_high=0.28
            )
            if old_logprob is None:
                # the policy has not moved since it sampled, so the first pass gives the old log-probs too
                old_logprob = result.logprob
            optimizer.zero_grad()
            result.loss.backward()
            optimizer.step()
        rewards_by_step.append(float(rewards.mean()))
    return rewards_by_step


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="optimiser steps; default 40")
    for step, reward in enumerate(train(parser.parse_args().steps)):
        print(f"step {step:3d}  reward {reward:.3f}")
