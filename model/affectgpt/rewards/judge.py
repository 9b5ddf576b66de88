"""Judge answers for the perception reward by a multimodal chat model that sees the clip."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from affectgpt.data.datasets import Sample
from affectgpt.data.media import SAMPLE_RATE, MediaError, read_frames, read_image, read_waveform
from affectgpt.prompts import neutralise
from affectgpt.rewards.perception import Comparison
from grpo_core.errors import InputError
from grpo_core.pretrained import LOCAL, check_weights, load_model, one_line, read_config

FRAME_SIZE = 448  # pixels per side, which the model's image processor then resizes

logger = logging.getLogger(__name__)

_VIDEO = "These are frames of a video of a person, in order of time."
_IMAGE = "This is a picture of a person."
_SUBTITLE = " The person says: “{subtitle}”."
_QUESTION = """{clip} Below are two answers to the question which emotions this person feels.

Answer A:
{a}

Answer B:
{b}

Which of the two describes the person's emotions in this clip better? Reply with one letter, A or B."""


class ModelJudge:
    """A `Judge` that asks a chat model which of two answers describes a clip better.

    The model sees frames of the clip, hears its sound if it can, and reads the subtitle and both answers in full. A
    verdict is the probability of the letter `A` against `B` as the first token of its reply. Every pair is asked in
    both orders: with p₁ for the first answer as A and p₂ for the second as A, the verdict is `(p₁ + 1 − p₂) / 2`, so a
    preference for a letter cancels, and swapped answers get the exact complement. Equal answers get 0.5 without being
    asked, answers to a clip that cannot be read NaN.

    Clips are never mixed in a batch, and the pairs of a clip are asked in a fixed order: a verdict depends on neither
    the rest of the step nor the number of ranks.

    Args:
        folder: config, safetensors and processor of a model that transformers knows as image-text-to-text.
        frames: number of frames shown of a video, uniformly over its length; a still image is shown once.
        batch: pairs in one forward pass, two rows each.
        dtype: dtype of the weights; `auto` is the checkpoint's.
        device: None takes this process's CUDA device, or the CPU if there is none.

    The processor is loaded here, the weights by the first comparison.

    Attributes:
        hears: whether the model takes sound.

    Raises:
        InputError: the folder holds no such model, an incomplete one, or one that cannot chat.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        frames: int = 8,
        batch: int = 4,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        device: torch.device | str | None = None,
    ):
        self.folder, self.frames, self.batch, self.dtype = Path(folder), frames, batch, dtype
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        config = _load_config(self.folder)
        self.processor = _load_processor(self.folder)
        # a shallow copy: everything is shared but the image processor, which then works once per clip
        self._for_one_clip = copy.copy(self.processor)
        self._for_one_clip.image_processor = _OneClip(self.processor.image_processor)
        letters = [self.processor.tokenizer.encode(letter, add_special_tokens=False) for letter in "AB"]
        if any(len(tokens) != 1 for tokens in letters):
            raise _refusal(self.folder, "its tokenizer has no single tokens for A and B", "choose another model")
        self.letters = [token for (token,) in letters]
        self._evasive = False
        ear: Any = getattr(self.processor, "feature_extractor", None)
        self.hears = getattr(config, "audio_config", None) is not None and ear is not None
        if self.hears and ear.sampling_rate != SAMPLE_RATE:
            reason = f"it hears at {ear.sampling_rate} Hz, not at {SAMPLE_RATE}"
            raise _refusal(self.folder, reason, "choose another model")

    @cached_property
    def model(self) -> PreTrainedModel:
        """The frozen model, loaded on first use: after the cold start, when the memory for it is there.

        Raises:
            InputError: weights are missing or do not load.
        """
        dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        # without a probe: pictures and text go through every part, so no weight may be missing
        model: Any = load_model(AutoModelForImageTextToText, self.folder, _KEY, dtype=dtype)
        judge: PreTrainedModel = model.to(self.device).eval().requires_grad_(False)
        return judge

    def __call__(self, comparisons: Sequence[Comparison]) -> np.ndarray:
        """Judge comparisons, float64 `[n]`: the probability that the first answer is the better one, or NaN."""
        # a set of unordered pairs per clip: answers that are compared twice in a step are asked about once
        asked: dict[Sample, set[tuple[str, str]]] = {}
        for prompt, first, second in comparisons:
            if first != second:
                asked.setdefault(prompt.sample, set()).add(_pair(first, second))
        # sorted: the batches, and so the rounding of their padded rows, must not depend on the order of a set
        known = {sample: self._judge_clip(sample, sorted(pairs)) for sample, pairs in asked.items()}

        verdicts = np.full(len(comparisons), 0.5)
        for i, (prompt, first, second) in enumerate(comparisons):
            if first != second:
                pair = _pair(first, second)
                better = known[prompt.sample].get(pair, np.nan)
                verdicts[i] = better if first == pair[0] else 1.0 - better
        return verdicts

    def _judge_clip(self, sample: Sample, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], float]:
        """Compute the probability that the first of each pair is better; empty if the clip cannot be shown."""
        try:
            clip = self.read_clip(sample)
        except MediaError as error:
            logger.warning("the judge gives no verdict on sample %s: %s", sample.name, error)
            return {}
        verdicts: dict[tuple[str, str], float] = {}
        for start in range(0, len(pairs), self.batch):
            batch = pairs[start : start + self.batch]
            orders = [order for pair in batch for order in (pair, pair[::-1])]
            prefers_a = self.preference([self.conversation(sample, clip, *order) for order in orders])
            for pair, (as_a, as_b) in zip(batch, prefers_a.view(-1, 2).tolist(), strict=True):
                verdicts[pair] = (as_a + 1.0 - as_b) / 2
        return verdicts

    def read_clip(self, sample: Sample) -> list[dict[str, Any]]:
        """Read a clip as content of a message: images, and the sound if there is any.

        A file whose end is missing is read as far as it goes: a run that leaves such clips out asks about none.

        Raises:
            MediaError: there is no video or image, or a file cannot be read.
        """
        if sample.video is not None:
            frames = read_frames(sample.video, self.frames, FRAME_SIZE, truncated=True)
        elif sample.image is not None:
            frames = read_image(sample.image, FRAME_SIZE)
        else:
            raise MediaError(sample.name, "it has no video or image to show", "Leave perception out of reward.names")
        content: list[dict[str, Any]] = [{"type": "image", "image": Image.fromarray(frame)} for frame in frames]
        if self.hears and sample.audio is not None:
            content.append({"type": "audio", "audio": read_waveform(sample.audio, truncated=True)})
        elif self.hears and sample.video is not None:
            with suppress(MediaError):  # a video without sound is shown without it
                content.append({"type": "audio", "audio": read_waveform(sample.video, truncated=True)})
        return content

    def conversation(self, sample: Sample, clip: Sequence[dict[str, Any]], a: str, b: str) -> list[dict[str, Any]]:
        """Write the question as messages of a chat; foreign text is made harmless by `neutralise`."""
        subtitle, a, b = (neutralise(text, self.processor.tokenizer).strip() for text in (sample.subtitle, a, b))
        shown = _VIDEO if sample.video is not None else _IMAGE
        said = _SUBTITLE.format(subtitle=subtitle) if subtitle else ""
        text = _QUESTION.format(clip=shown + said, a=a, b=b)
        return [{"role": "user", "content": [*clip, {"type": "text", "text": text}]}]

    @torch.no_grad()
    def preference(self, conversations: Sequence[list[dict[str, Any]]]) -> Tensor:
        """Compute P(A) / (P(A) + P(B)) for the first token of each reply, float64 `[n]` on the CPU.

        All conversations are about one clip, which is processed once.

        Raises:
            InputError: the model computes NaN.
        """
        # models that think first must answer at once here; templates of other models do not know the switch
        options: dict[str, Any] = (
            {"enable_thinking": False} if "enable_thinking" in str(self.processor.chat_template) else {}
        )
        template: Any = self._for_one_clip.apply_chat_template
        inputs = template(
            list(conversations),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            # on the right, so that a row's positions, and with them its verdict, do not depend on its batch
            processor_kwargs={"padding": True, "padding_side": "right"},
            **options,
        ).to(self.device, self.model.dtype)
        # rows end at different positions: logits are computed only there, if the model can leave out the others
        last = inputs["attention_mask"].sum(1) - 1
        kept, column = last.unique(return_inverse=True)
        keep = {"logits_to_keep": kept}
        if "logits_to_keep" not in inspect.signature(self.model.forward).parameters:
            keep, column = {}, last
        logits = self.model(**inputs, **keep, use_cache=False).logits
        replies = logits[torch.arange(len(last), device=logits.device), column]
        # float64 keeps the digits of nearly certain verdicts
        preferences = replies[:, self.letters].double().softmax(1)[:, 0].cpu()
        if preferences.isnan().any():
            raise _refusal(self.folder, "its logits are not finite", "set reward.judge_dtype to bfloat16 or float32")
        self._warn_if_evasive(replies.double().softmax(1)[:, self.letters].sum(1).mean().item())
        return preferences

    def _warn_if_evasive(self, share: float) -> None:
        """Warn once if the model prefers other replies: a choice between two unlikely tokens means little."""
        if share < 0.5 and not self._evasive:
            self._evasive = True
            logger.warning(
                "the judge %s begins its reply with A or B with a probability of only %.2g: its verdicts may mean "
                "little. Take a model tuned for instructions that does not think before it answers",
                self.folder,
                share,
            )


class _OneClip:
    """Image processor for batches whose rows show the same images: it processes the first row, once per clip."""

    def __init__(self, image_processor: Any):
        self._processor = image_processor
        self._shown: list[Any] = []
        self._result: Mapping[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, images: list[Any], *args: Any, **kwargs: Any) -> BatchFeature:
        """Process images, `[rows][frames]` or `[rows · frames]`, whichever way the model's processor passes them."""
        nested = isinstance(images[0], list | tuple)
        # flat: rows repeat the very same image objects, so the first image's second appearance ends the first row
        again = next((i for i in range(1, len(images)) if not nested and images[i] is images[0]), len(images))
        first = images[:1] if nested else images[:again]
        shown = list(first[0]) if nested else first
        if len(shown) != len(self._shown) or any(a is not b for a, b in zip(shown, self._shown, strict=True)):
            self._result, self._shown = self._processor(first, *args, **kwargs), shown
        rows = len(images) // len(first)
        return BatchFeature({name: _repeat(value, rows) for name, value in self._result.items()})


def _repeat(value: Any, rows: int) -> Any:
    """Repeat the first row's result for all rows: tensors and arrays are concatenated, lists too."""
    if isinstance(value, Tensor):
        return torch.cat([value] * rows)
    return np.concatenate([value] * rows) if isinstance(value, np.ndarray) else value * rows


_KEY = "reward.judge"
_COPY = "copy the folder again, whole"
_FOLDER = "give the folder of a multimodal chat model as save_pretrained writes it"


def _load_config(folder: Path) -> PreTrainedConfig:
    """Load the config of an image-text-to-text model, checking that its weights are beside it."""
    config = read_config(folder, _KEY)
    check_weights(folder, _KEY)  # by their headers, since their loading comes hours later
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        reason = f"a model of type {config.model_type!r} does not answer questions about images"
        raise _refusal(folder, reason, "give the folder of one that does, such as Qwen2.5-VL, Gemma 3 or LLaVA")
    return config


def _load_processor(folder: Path) -> ProcessorMixin:
    """Load the processor of a model that chats about images."""
    try:
        processor = AutoProcessor.from_pretrained(folder, **LOCAL)
    except ImportError as error:
        raise _refusal(folder, f"its processor needs a library: {one_line(error)}", "install it") from error
    except (OSError, ValueError, TypeError) as error:
        raise _refusal(folder, f"its processor does not load ({one_line(error)})", _COPY) from error
    for attribute in ("image_processor", "tokenizer", "chat_template"):
        if getattr(processor, attribute, None) is None:
            raise _refusal(folder, f"its processor has no {attribute}", _FOLDER)
    return processor


def _refusal(folder: Path, reason: str, fix: str) -> InputError:
    return InputError(f"{_KEY}: {folder}: {reason}: {fix}")


def _pair(first: str, second: str) -> tuple[str, str]:
    return (first, second) if first < second else (second, first)
