"""What sampler and decoder tests share: a tokenizer of single characters, prompts, a policy that reads features."""

import numpy as np
import torch

from grpo_core.config.options import RolloutConfig
from grpo_core.policy import Policy
from grpo_core.types import Prompt

VOCABULARY = 97
PLACEHOLDER = 2


class CharTokenizer:
    """Token i is the character i + 33; 0 pads, 1 ends."""

    eos_token_id = 1

    def __init__(self, size: int = VOCABULARY):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def decode(self, ids, skip_special_tokens: bool = False) -> str:
        return "".join(chr(33 + i) for i in ids if i > 1 or not skip_special_tokens)

    def batch_decode(self, batch) -> list[str]:
        return [self.decode(ids) for ids in batch]


def make_prompts(lengths, seed: int = 0, features: bool = False) -> list[Prompt]:
    """Random prompts; with features, each one's first row is a placeholder that an 8-vector stands in for."""
    random = np.random.default_rng(seed)
    prompts = []
    for i, length in enumerate(lengths):
        ids = [int(token) for token in random.integers(3, VOCABULARY, length)]
        vector = torch.from_numpy(random.normal(size=8)).float()
        if features:
            ids[0] = PLACEHOLDER
        prompts.append(Prompt(f"prompt-{seed}-{i}", tuple(ids), {"audio": vector} if features else {}))
    return prompts


class FeaturePolicy(Policy):
    """A policy whose placeholder rows come from a projection of the prompt's feature."""

    def __init__(self, model):
        super().__init__(model, embed=self.embed_features)
        torch.manual_seed(5)
        self.projection = torch.nn.Linear(8, self.causal_lm.config.hidden_size)

    def embed_features(self, prompts):
        embeds = Policy(self.model).embed(prompts)
        for prompt, rows in zip(prompts, embeds, strict=True):
            if "audio" in prompt.features:
                rows.data[0] = self.projection(prompt.features["audio"])
        return embeds


def sampled(sampler, prompts, step=0, **rollout):
    """The groups of one rollout."""
    return sampler.sample(prompts, RolloutConfig(**rollout), step=step)


def token_ids(groups):
    """`[N][G]` token ids."""
    return [[completion.token_ids for completion in group.completions] for group in groups]


def generated(policy, prompt, new_tokens):
    """Greedy tokens of transformers' own generate, from the prompt's embeddings."""
    embeds = policy.embed([prompt])[0].detach()[None]
    mask = torch.ones(embeds.shape[:2], dtype=torch.int64)
    model = policy.model
    return tuple(
        model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)[
            0
        ].tolist()
    )
