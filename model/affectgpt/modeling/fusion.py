"""Project encoder outputs to the vectors of a prompt's placeholders, one vector per placeholder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from grpo_core.errors import InputError

Branch = Literal["image", "audio", "video", "multi"]


@dataclass(frozen=True)
class FusionInput:
    """Features of one placeholder.

    Attributes:
        branch: the projections that apply; faces and frames share `video`.
        visual: `[T, Dv]` CLIP vectors over time, for every branch but `audio`.
        audio: `[T, Da]` HuBERT vectors over time, for `audio` and `multi`.
    """

    branch: Branch
    visual: Tensor | None = None
    audio: Tensor | None = None


class Fusion(nn.Module):
    """AffectGPT's attention fusion and multi (pre-)fusion: 10 linear layers, 20 tensors, with upstream's names.

    With h `[T, d]` the encoder's vectors of T time steps:

    * one modality: weights w = Linear(d→1)(h), then Σₜ wₜ hₜ, then Linear(d→H). There is **no softmax**: the weights
      are signed and unbounded and the result grows with |h|² and with T, so it is computed in float32 whatever the
      LLM's dtype.
    * multi: visual and audio are averaged over time and projected to the width M of the audio encoder; their
      concatenation, visual first, gives two weights by Linear(2M→M) then Linear(M→2), without a non-linearity in
      between; the weighted sum of the two goes through Linear(M→H).
    * image: the mean over its rows, then Linear(Dv→H).

    Each layer has PyTorch's default initialisation, as upstream. The vectors of a fresh projection therefore have a
    larger norm than token embeddings; the decoder's first RMSNorm removes the scale, only the residual stream keeps it.

    Args:
        visual_dim: Dv, width of the visual encoder's projected output (CLIP ViT-L/14: 768).
        audio_dim: Da = M, width of the audio encoder (HuBERT large: 1024).
        hidden_size: H, width of the LLM (Qwen2.5-7B: 3584).
    """

    def __init__(self, visual_dim: int, audio_dim: int, hidden_size: int) -> None:
        super().__init__()
        multi_dim = audio_dim
        self.visual_dim, self.audio_dim, self.hidden_size = visual_dim, audio_dim, hidden_size
        # names, shapes and order are upstream's, so that its checkpoints load by name
        self.image_llama_proj = nn.Linear(visual_dim, hidden_size)
        self.video_attention_mlp = nn.Linear(visual_dim, 1)
        self.affectgpt_proj = nn.Linear(visual_dim, hidden_size)
        self.audio_attention_mlp = nn.Linear(audio_dim, 1)
        self.audio_llama_proj = nn.Linear(audio_dim, hidden_size)
        self.multi_audio_embs = nn.Linear(audio_dim, multi_dim)
        self.multi_video_embs = nn.Linear(visual_dim, multi_dim)
        self.attention_mlp = nn.Linear(2 * multi_dim, multi_dim)
        self.fc_att = nn.Linear(multi_dim, 2)
        self.multi_llama_proj = nn.Linear(multi_dim, hidden_size)

    def forward(self, inputs: Sequence[FusionInput]) -> Tensor:
        """Compute one vector for each of S placeholders of any branches: `[S, H]`, in the weights' dtype.

        Placeholders of one branch are computed as one batch, whichever prompts they come from. Inputs of a branch must
        have the same T; features are moved to the weights' device and dtype.
        """
        weight = self.image_llama_proj.weight
        rows_of: defaultdict[Branch, list[int]] = defaultdict(list)
        for row, item in enumerate(inputs):
            rows_of[item.branch].append(row)
        out = torch.empty(len(inputs), self.hidden_size, dtype=weight.dtype, device=weight.device)
        # under autocast the sums of products above would be computed in bfloat16
        with torch.autocast(weight.device.type, enabled=False):
            for branch, rows in rows_of.items():
                index = torch.tensor(rows, device=weight.device)
                out = out.index_copy(0, index, self._branch(branch, [inputs[row] for row in rows]))
        return out

    def _stack(self, features: Iterable[Tensor | None]) -> Tensor:
        weight = self.image_llama_proj.weight
        return torch.stack([x for x in features if x is not None]).to(weight.device, weight.dtype)

    def _branch(self, branch: Branch, inputs: Sequence[FusionInput]) -> Tensor:
        """Fuse the inputs of one branch, `[T, Dv]` and/or `[T, Da]` each, to `[B, H]`."""

        def visual() -> Tensor:
            return self._stack(item.visual for item in inputs)

        def audio() -> Tensor:
            return self._stack(item.audio for item in inputs)

        match branch:
            case "image":
                return self.image_llama_proj(visual().mean(1))
            case "video":
                seen = visual()
                return self.affectgpt_proj(attend(seen, self.video_attention_mlp(seen)))
            case "audio":
                heard = audio()
                return self.audio_llama_proj(attend(heard, self.audio_attention_mlp(heard)))
            case "multi":
                heard = self.multi_audio_embs(audio().mean(1))
                seen = self.multi_video_embs(visual().mean(1))
                weights = self.fc_att(self.attention_mlp(torch.cat([seen, heard], dim=-1)))  # [B, 2]
                return self.multi_llama_proj(attend(torch.stack([seen, heard], dim=1), weights.unsqueeze(-1)))
        raise InputError(f"unknown fusion branch {branch!r}")


def attend(values: Tensor, weights: Tensor) -> Tensor:
    """Compute Σₜ wₜ vₜ: `[B, T, d]` and `[B, T, 1]` to `[B, d]`."""
    return (values * weights).sum(1)
