"""Make a tiny CLIP and HuBERT, and train them to measure drawn faces and synthetic voices.

Real encoders are pretrained; random ones of this size would be nearly blind and deaf. These are trained to regress the
drawing and voicing parameters (smile, brow height, pitch, tempo, …), drawn uniformly and independently of each other,
without any emotion, label or clip of the data set.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, HubertConfig, HubertModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from affectgpt.synthetic import face, voice

CLIP_SECONDS = 2.0
PICTURES, SOUNDS = 11, 12  # keys of random streams other than the data set's, whose second key is its split, 0 or 1

VISUAL_RANGES = {name: (-1.0, 1.0) for name in face.EXPRESSION} | {"mouth_open": (0.0, 1.0), "nose_wrinkle": (0.0, 1.0)}
TONE_RANGES = {
    "pitch": (-6.0, 7.0),
    "pitch_range": (0.2, 4.0),
    "pitch_slope": (-6.0, 9.0),
    "tempo": (2.0, 6.5),
    "effort": (-1.0, 1.2),
    "roughness": (0.0, 0.8),
    "breath": (0.0, 0.6),
    "tremor": (0.0, 1.2),
}


def tiny_clip() -> CLIPVisionModelWithProjection:
    """Make CLIP's image tower with random weights: 56 px in 2 × 2 patches, 128 wide, 2 layers, projected to Dv = 64.

    Large patches suit faces in the middle of the picture: a projection fitted to them replaces several layers.
    """
    config = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=56,
        patch_size=28,
        projection_dim=64,
    )
    return CLIPVisionModelWithProjection(config)


def tiny_hubert() -> HubertModel:
    """Make a HuBERT, Da = 64, 4 layers, 20 frames per second, whose first convolution is a bank of Gabor filters.

    The filters (32 ms, four phases each) replace the similar ones that a pretrained model has learnt.
    """
    frequencies = np.concatenate([np.arange(75, 705, 21), np.geomspace(720, 6500, 18)])  # 30 + 18
    config = HubertConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        conv_dim=(4 * len(frequencies), 96),
        conv_kernel=(512, 5),
        conv_stride=(200, 4),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        feat_extract_norm="layer",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        layerdrop=0.0,
        mask_time_prob=0.0,
        vocab_size=32,
    )
    model = HubertModel(config)
    layers: Any = model.feature_extractor.conv_layers
    first, second = (layer.conv for layer in layers)
    time = (np.arange(512) - 255.5) / voice.SAMPLE_RATE
    phases = np.arange(4)[None, :, None] * np.pi / 2
    bank = np.cos(2 * np.pi * frequencies[:, None, None] * time - phases) * np.hanning(512)
    bank *= (frequencies[:, None, None] / 500) ** 0.5 / 16  # tilted up, as speech is tilted down
    with torch.no_grad():
        first.weight.copy_(torch.from_numpy(bank.reshape(-1, 1, 512)))
        mixed = torch.randn(96, len(frequencies), 1, 5) / math.sqrt(20 * len(frequencies))
        second.weight.copy_(mixed.expand(-1, -1, 4, -1).flatten(1, 2))  # equal over phases: a magnitude
    first.requires_grad_(False)
    return model


def teach_clip(model: CLIPVisionModelWithProjection, seed: int, images: int = 4096, epochs: int = 8) -> float:
    """Train `image_embeds` to encode the expression parameters linearly; return the last epoch's unexplained variance.

    The patch projection starts as the whitened principal components of patches.
    """
    config: Any = model.config
    pixels, targets = _pictures(seed, images, config.image_size)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    pixels = (pixels / 255 - mean) / std

    embeddings, side = model.vision_model.embeddings, config.patch_size
    patches = nn.functional.unfold(pixels[::2], side, stride=side).transpose(1, 2).flatten(0, 1)
    _, strength, components = torch.svd_lowrank(patches, model.config.hidden_size, niter=3)
    scale = strength / len(patches) ** 0.5
    weight = embeddings.patch_embedding.weight
    with torch.no_grad():
        weight.copy_((components / (scale + scale[-1])).T.reshape(weight.shape))
        nn.init.normal_(embeddings.position_embedding.weight, std=0.5)

    def encode(rows: Tensor) -> Tensor:
        return model(pixel_values=pixels[rows]).image_embeds

    loss = _regress(model, encode, targets, model.config.projection_dim, seed, epochs, lr=1e-3)
    with torch.no_grad():
        model.visual_projection.weight /= encode(torch.arange(256)).std(0).mean()  # features of unit deviation
    return loss


def teach_hubert(model: HubertModel, seed: int, utterances: int = 768, epochs: int = 8) -> float:
    """Train the mean over time of the last four hidden states to encode the voicing parameters linearly.

    Returns the last epoch's unexplained variance. The filter bank is not trained, so its output is computed once.
    """
    sounds, targets = _sounds(seed, utterances)
    layers = model.feature_extractor.conv_layers
    bank = layers[0]
    with torch.no_grad():
        filtered = torch.cat([bank(rows[:, None]) for rows in sounds.split(64)])
    # in place of the bank, whose output is computed above; it removes the channel axis that the extractor adds
    layers[0] = nn.Flatten(1, 2)

    def encode(rows: Tensor) -> Tensor:
        states = model(filtered[rows], output_hidden_states=True).hidden_states
        return torch.stack(states[-4:]).mean(dim=(0, 2))

    loss = _regress(model, encode, targets, model.config.hidden_size, seed, epochs, lr=3e-3)
    layers[0] = bank
    return loss


def _regress(
    model: nn.Module, encode: Callable[[Tensor], Tensor], targets: Tensor, width: int, seed: int, epochs: int, lr: float
) -> float:
    """Train `model` and a readout of `encode(rows)` on standardised `targets` `[N, P]`; last epoch's loss."""
    targets = (targets - targets.mean(0)) / targets.std(0)
    readout = nn.Linear(width, targets.shape[1])
    batch = 64
    steps = epochs * (len(targets) // batch)
    parameters = [p for p in (*model.parameters(), *readout.parameters()) if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.15)
    order = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        losses = []
        for rows in torch.randperm(len(targets), generator=order).split(batch)[: len(targets) // batch]:
            loss = nn.functional.mse_loss(readout(encode(rows)), targets[rows])
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
    model.eval()
    return float(np.mean(losses))


def _pictures(seed: int, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Draw faces, float32 `[count, 3, size, size]` in 0…255, and their parameters `[count, P]`.

    Every person is drawn four times, each as a whole frame and as a face crop.
    """
    pictures, targets = [], []
    for person in range(count // 8):
        rng = np.random.default_rng((seed, PICTURES, person))
        who = face.Appearance.random(rng)
        curves = {n: rng.uniform(*VISUAL_RANGES[n], 4).astype(np.float32) for n in face.EXPRESSION}
        frames = face.render(curves, who)
        for views in (frames, face.face_crops(frames, who)):
            shown = torch.from_numpy(views).permute(0, 3, 1, 2).float()
            pictures.append(nn.functional.interpolate(shown, (size, size), mode="bicubic", antialias=True))
            targets.append(np.stack([curves[n] for n in face.EXPRESSION], 1))
    return torch.cat(pictures), torch.from_numpy(np.concatenate(targets))


def _sounds(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Voice utterances of 2 s, normalised, float32 `[count, 32000]`, with parameters `[count, P]`, pitch absolute."""
    sounds, targets = [], []
    for k in range(count):
        rng = np.random.default_rng((seed, SOUNDS, k))
        who = voice.Speaker.random(rng)
        tone = {name: rng.uniform(*TONE_RANGES[name]) for name in voice.TONE}
        sound = voice.speak(tone, who, CLIP_SECONDS, rng)
        sounds.append((sound - sound.mean()) / sound.std())
        targets.append([tone[n] + (12 * math.log2(who.base_pitch) if n == "pitch" else 0) for n in voice.TONE])
    return torch.from_numpy(np.stack(sounds)), torch.tensor(targets, dtype=torch.float32)
