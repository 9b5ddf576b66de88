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
from grpo_core.rollout.backends import Decoder, make_decoder
from grpo_core.rollout.sampling import SamplingParams, StopConditions, Tokenizer
from grpo_core.rollout.scheduler import Scheduler, timed
from grpo_core.types import Completion, FinishReason, Group, Prompt


class GroupSampler:
    """Samples G completions for each of N prompts from the policy as it is at the call.

    A completion depends on the seed, the step, its prompt and its index in the group alone: not on what else is in the
    batch, in which order, or on how many ranks. In fp32 on one thread of a CPU with AVX2 that holds bit for bit.
    Elsewhere rounding may depend on the batch, and a draw within rounding of two tokens may give either. Prompts with
    the same id get the same completions.

    Args:
        policy: gives the model and the prompts' embeddings.
        tokenizer: decodes completions and names the end-of-sequence token.
        seed: of the run.
        forbidden_tokens: ids that are never sampled, such as the placeholders of a multimodal prompt. Ids that the
            tokenizer does not have (spare rows of the head) never are.
        memory_budget: bytes for caches and logits; None takes 80 % of the device's free memory (2 GiB on a CPU).

    Attributes:
        timings: of the last call: seconds of `refresh` (merging adapters), `embed`, `prefill`, `decode` and `text`, and
            the counts `prompt_tokens`, `completion_tokens`, `steps` and `slots` (groups decoded at a time).

    Raises:
        NotImplementedError: the model would be sampled wrongly; see `grpo_core.families.check_model`.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: Tokenizer,
        *,
        seed: int = 0,
        forbidden_tokens: Collection[int] = (),
        memory_budget: int | None = None,
    ):
        self.policy, self.tokenizer, self.seed = policy, tokenizer, seed
        self.forbidden_tokens = tuple(forbidden_tokens)
        self.memory_budget = memory_budget
        self.model = policy.causal_lm
        self.decoder: Decoder = make_decoder(self.model)
        self.timings: dict[str, float] = {}
        # kept between calls: with stop strings, one is made by decoding the whole vocabulary
        self._stop_conditions: dict[tuple[str, ...], StopConditions] = {}

    def sample(
        self, prompts: Sequence[Prompt], rollout: RolloutConfig, *, step: int = 0, progress: bool = False
    ) -> list[Group]:
        """Sample one group per prompt, in the order of the prompts.

        Args:
            prompts: `[N]`.
            rollout: group size, lengths, temperature, truncation and stop strings.
            step: the optimiser step that the rollout belongs to; another step samples other completions.
            progress: show a bar.

        Raises:
            ValueError: a prompt that is too long for the model, or whose embeddings do not fit its tokens.
            FloatingPointError: the policy's logits are not finite.
        """
        self.timings = dict.fromkeys(("refresh", "embed", "prefill", "decode", "text"), 0.0)
        self.timings |= dict.fromkeys(("prompt_tokens", "completion_tokens", "steps", "slots"), 0)
        if not prompts:
            return []
        strings = tuple(rollout.stop_strings)
        if strings not in self._stop_conditions:
            self._stop_conditions[strings] = StopConditions(self.model, self.tokenizer, strings)
        stop = self._stop_conditions[strings]
        # heads are padded: their rows beyond the tokenizer's ids have no text
        head_rows = self.model.get_output_embeddings().weight.shape[0]
        forbidden = {token for token in self.forbidden_tokens if 0 <= token < head_rows}
        never_sampled = sorted(forbidden.union(range(len(self.tokenizer), head_rows)))
        params = SamplingParams(rollout, np.array(never_sampled, dtype=np.int64), stop.end_tokens)
        prompt_keys = np.array([rng.prompt_key(prompt.id) for prompt in prompts], dtype=np.uint64)
        keys = rng.row_key(self.seed, step, prompt_keys[:, None], np.arange(rollout.group_size)).ravel()

        # no_grad, not inference_mode: a policy may cache what it embeds, and inference tensors cannot be in a backward
        with timed(self.timings, "embed"), torch.no_grad():
            embeds = self._embed(prompts, rollout.max_new_tokens)
        with torch.inference_mode(), tqdm(total=len(prompts), disable=not progress, desc="sample", leave=False) as bar:
            with timed(self.timings, "refresh"):
                self.decoder.refresh()
            budget = self.memory_budget
            if budget is None and self.policy.device.type == "cuda":
                # measured now, after the embeddings and fused weights have taken their memory: what the driver has
                # free, plus what torch's allocator holds unused, plus the last rollout's caches, which this one reuses
                # or frees; a fifth is left to activations and fragmentation
                device = self.policy.device
                unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
                budget = int(0.8 * (torch.cuda.mem_get_info(device)[0] + unused + self.decoder.held_bytes))
            scheduler = Scheduler(self.decoder, embeds, keys, params, stop, self.timings, bar)
            scheduler.run(2 << 30 if budget is None else budget)

        with timed(self.timings, "text"):
            completions = []
            for i, length in enumerate(scheduler.lengths):
                token_ids = scheduler.tokens[i, :length].tolist()
                # a copy, as a view would keep the whole rollout's array alive
                logprobs = scheduler.logprobs[i, :length].copy()
                reason: FinishReason = "stop" if scheduler.stopped[i] else "length"
                completions.append(Completion(tuple(token_ids), logprobs, reason, stop.text(token_ids)))
        self.timings["prompt_tokens"] = sum(map(len, embeds))
        self.timings["completion_tokens"] = int(scheduler.lengths.sum())
        size = rollout.group_size
        return [Group(prompt, completions[n * size : (n + 1) * size]) for n, prompt in enumerate(prompts)]

    def _embed(self, prompts: Sequence[Prompt], new_tokens: int) -> list[Tensor]:
        """Embed prompts, `[P_n, H]` each, in the policy's dtype and on its device.

        Raises:
            ValueError: the longest prompt and `new_tokens` are more than the model has positions for, or than its
                attention window, which would cut them; or embeddings that do not fit their prompt's tokens.
        """
        config, longest = self.model.config, max(len(prompt.token_ids) for prompt in prompts)
        total = longest + new_tokens
        asked = (
            f"the longest prompt has {longest} tokens and rollout.max_new_tokens is {new_tokens}: {total} is more than"
        )
        for key in ("max_position_embeddings", "n_positions"):
            limit = getattr(config, key, None)
            if limit is not None and total > limit:
                raise ValueError(f"{asked} config.{key} {limit}; shorten the prompt or lower rollout.max_new_tokens")
        window, layer_types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
        # Qwen2 configs name a window that no layer uses; a config without layer_types means it for all layers
        if window is not None and total > window and (layer_types is None or "sliding_attention" in layer_types):
            raise ValueError(
                f"{asked} config.sliding_window {window}, and group attention has no window; shorten the prompt, lower "
                "rollout.max_new_tokens, or set config.sliding_window to None"
            )
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
