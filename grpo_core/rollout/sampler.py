"""Group sampling: every prompt prefilled once, its G completions decoded together, many groups at a time."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from grpo_core import rng
from grpo_core.config.options import RolloutConfig
from grpo_core.policy import Policy
from grpo_core.rollout.backends.base import check_lengths, make_decoder
from grpo_core.rollout.sampling import DrawRules
from grpo_core.rollout.scheduler import Rollout, timed
from grpo_core.rollout.stopping import StopConditions
from grpo_core.types import Completion, Group, Prompt

_CPU_BUDGET = 2 << 30


class GroupSampler:
    """Samples G completions for each of N prompts from the policy as it is at the call.

    A completion depends on the seed, the step, its prompt and its index in the group alone: not on what else is in the
    batch, in which order, or on how many ranks. In fp32 on one thread of a CPU with AVX2 that holds bit for bit.
    Elsewhere rounding may depend on the batch, and a draw within rounding of two tokens may fall on either. Prompts
    with the same id are the same draw.

    Args:
        policy: gives the model and the prompts' embeddings.
        tokenizer: decodes completions and tells the end-of-sequence token.
        seed: of the run.
        forbidden_tokens: ids that are never sampled, such as the placeholders of a multimodal prompt. Ids that the
            tokenizer does not have (spare rows of the head) never are.
        memory_budget: bytes for caches and logits; unset, 80 % of the device's free memory (2 GiB on a CPU).

    Attributes:
        timings: of the last call: seconds of `refresh` (merging adapters), `embed`, `prefill`, `decode` and `text`, and
            the counts `prompt_tokens`, `completion_tokens`, `steps` and `slots` (groups decoded at a time).
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer,
        *,
        seed: int = 0,
        forbidden_tokens: Collection[int] = (),
        memory_budget: int | None = None,
    ):
        self.policy, self.tokenizer, self.seed = policy, tokenizer, seed
        self.forbidden_tokens = tuple(forbidden_tokens)
        self.memory_budget = memory_budget
        self.model = policy.causal_lm
        self.decoder = make_decoder(self.model)
        self.timings: dict[str, float] = {}
        self._stops: dict[tuple[str, ...], StopConditions] = {}

    def sample(
        self, prompts: Sequence[Prompt], rollout: RolloutConfig, *, step: int = 0, progress: bool = False
    ) -> list[Group]:
        """One group per prompt, in the order of the prompts.

        Args:
            prompts: `[N]`.
            rollout: group size, lengths, temperature, truncation and stop strings.
            step: the optimiser step that the rollout belongs to; another step draws other completions.
            progress: show a bar.

        Raises:
            ValueError: a prompt that is too long for the model, or whose embeddings do not fit its tokens.
        """
        self.timings = dict.fromkeys(("refresh", "embed", "prefill", "decode", "text"), 0.0)
        self.timings |= dict.fromkeys(("prompt_tokens", "completion_tokens", "steps", "slots"), 0)
        if not prompts:
            return []
        check_lengths(self.model, max(len(prompt.token_ids) for prompt in prompts), rollout.max_new_tokens)
        with timed(self.timings, "embed"), torch.no_grad():
            embeds = self._embed(prompts)
        stop = self._stop_conditions(rollout.stop_strings)
        with torch.inference_mode(), tqdm(total=len(prompts), disable=not progress, desc="sample", leave=False) as bar:
            with timed(self.timings, "refresh"):
                self.decoder.refresh()
            limit = min(len(self.tokenizer), self.model.get_output_embeddings().weight.shape[0])
            prompt_keys = np.array([rng.prompt_key(prompt.id) for prompt in prompts], dtype=np.uint64)
            run = Rollout(
                self.decoder,
                embeds,
                keys=rng.row_key(self.seed, step, prompt_keys[:, None], np.arange(rollout.group_size)).ravel(),
                rules=DrawRules(rollout, self.forbidden_tokens, limit, stop.end),
                stop=stop,
                timings=self.timings,
                bar=bar,
            )
            run.run(self._budget())
        with timed(self.timings, "text"):
            completions = [_completion(run, i) for i in range(len(prompts) * rollout.group_size)]
        self.timings["prompt_tokens"] = sum(map(len, embeds))
        self.timings["completion_tokens"] = int(run.lengths.sum())
        size = rollout.group_size
        return [Group(prompt, completions[n * size : (n + 1) * size]) for n, prompt in enumerate(prompts)]

    def _embed(self, prompts: Sequence[Prompt]) -> list[Tensor]:
        embeds = list(self.policy.embed(prompts))
        if len(embeds) != len(prompts):
            raise ValueError(f"policy.embed gave {len(embeds)} tensors for {len(prompts)} prompts")
        for prompt, embed in zip(prompts, embeds, strict=True):
            if embed.ndim != 2 or len(embed) != len(prompt.token_ids):
                raise ValueError(
                    f"prompt {prompt.id!r} has {len(prompt.token_ids)} tokens, but policy.embed gave "
                    f"{tuple(embed.shape)}: it must give one row per token"
                )
        return [embed.detach().to(self.policy.device, self.policy.dtype) for embed in embeds]

    def _stop_conditions(self, strings: Sequence[str]) -> StopConditions:
        key = tuple(strings)
        if key not in self._stops:
            self._stops[key] = StopConditions(self.model, self.tokenizer, key)
        return self._stops[key]

    def _budget(self) -> int:
        if self.memory_budget is not None:
            return self.memory_budget
        if self.policy.device.type == "cuda":
            device = self.policy.device
            unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            return int(0.8 * (torch.cuda.mem_get_info(device)[0] + unused + self.decoder.held_bytes))
        return _CPU_BUDGET


def _completion(run: Rollout, i: int) -> Completion:
    length = run.lengths[i]
    token_ids = run.tokens[i, :length].tolist()
    reason = "stop" if run.stopped[i] else "length"
    return Completion(tuple(token_ids), run.logprobs[i, :length].copy(), reason, run.stop.text(token_ids))
