"""Prompt templates and their inverse: samples to prompts and targets, completions to answers."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from affectgpt.emotion_wheel import parse_labels

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from affectgpt.data.datasets import Sample
    from affectgpt.modeling.fusion import Branch
    from grpo_core.types import Prompt

Value = TypeVar("Value")

Template = Literal["upstream", "chat"]
Mode = Literal["no_think", "think"]
AnswerForm = Literal["list", "sentence"]

PLACEHOLDERS: dict[str, Branch] = {
    "<ImageHere>": "image",
    "<AudioHere>": "audio",
    "<FrameHere>": "video",
    "<FaceHere>": "video",
    "<MultiHere>": "multi",
}
"""Placeholder tokens, in the order upstream adds them to its tokenizer, and the fusion branch that replaces each."""


def placeholder_features(placeholder: str, available: Collection[str]) -> tuple[str, ...]:
    """List the features that a placeholder's vector is made of.

    `<MultiHere>` joins the audio with faces where the prompt has them, else with frames: `build_prompt` hands a prompt
    only the features its `face_or_frame` needs, and every multiframe one is without faces.
    """
    if placeholder == "<MultiHere>":
        return ("face" if "face" in available or "frame" not in available else "frame", "audio")
    return (placeholder.removeprefix("<").removesuffix("Here>").lower(),)


@dataclass(frozen=True)
class Modalities:
    """What a `face_or_frame` value shows the model: clauses in prompt order, features, subtitle or not."""

    clauses: tuple[str, ...]
    features: frozenset[str]
    subtitle: bool


def _modalities(clauses: str, multi: str | None = None) -> Modalities:
    names = tuple(clauses.split())
    features = (set(names) - {"subtitle", "multi"}) | ({multi, "audio"} if multi else set())
    return Modalities(names, frozenset(features), "subtitle" in names)


FACE_OR_FRAME: dict[str, Modalities] = {
    "multiface_audio_face_text": _modalities("multi audio face subtitle", multi="face"),
    "multiframe_audio_frame_text": _modalities("multi audio frame subtitle", multi="frame"),
    "multiface_audio_face_frame_text": _modalities("multi audio face frame subtitle", multi="face"),
    "multiface_text": _modalities("multi subtitle", multi="face"),
    "faceframe": _modalities("audio face frame subtitle"),
    "face": _modalities("audio face subtitle"),
    "frame": _modalities("audio frame subtitle"),
    "audio_text": _modalities("audio subtitle"),
    "face_text": _modalities("face subtitle"),
    "frame_text": _modalities("frame subtitle"),
    "audioonly": _modalities("audio"),
    "faceonly": _modalities("face"),
    "frameonly": _modalities("frame"),
    "textonly": _modalities("subtitle"),
    "image": _modalities("image"),
}
"""Upstream's names (`face` and `frame` alone hear the audio and read the subtitle too)."""

_CLAUSES = {
    "multi": "The audio and video merged info is: <Multi><MultiHere></Multi>. ",
    "audio": "The audio content is as follows: <Audio><AudioHere></Audio>. ",
    "face": (
        "Meanwhile, we uniformly sample raw frames from the video and extract faces from these frames: "
        "<Video><FaceHere></Video>. "
    ),
    "frame": "Meanwhile, we uniformly sample raw frames from the video: <Video><FrameHere></Video>. ",
    "image": "The image content is as follows: <Image><ImageHere></Image>. ",
    "subtitle": "The subtitle of this video is: <Subtitle>{subtitle}</Subtitle>. ",
}
_CLOSING = "Now, please answer my question based on all the provided information. "

_LABEL_QUESTION = "Please recognize all possible emotional states of the character."
_QUESTIONS: dict[tuple[Mode, AnswerForm], str] = {
    ("no_think", "sentence"): _LABEL_QUESTION,
    ("no_think", "list"): f"{_LABEL_QUESTION} Answer with emotion words alone, separated by commas.",
    ("think", "list"): (
        "Please recognize emotional states of the character. Output the thinking process in <think> </think> and final "
        "answer in <answer> </answer> tags."
    ),
}
_SENTENCE = "The character's emotional state is {labels}."


def required_features(face_or_frame: str) -> frozenset[str]:
    """Features (`frame`, `face`, `audio`, `image`) a sample needs for this choice of modalities."""
    return _lookup(FACE_OR_FRAME, face_or_frame, "face_or_frame").features


def stop_strings(template: Template) -> tuple[str, ...]:
    """Strings that end a completion, beside the tokenizer's end token."""
    return _lookup({"upstream": ("###",), "chat": ()}, template, "template")


def check_mode(mode: str) -> None:
    """Refuse an unknown mode.

    Raises:
        ValueError: listing the modes there are.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"unknown mode {mode!r}: choose one of {', '.join(get_args(Mode))}")


def question_text(mode: Mode, answer_form: AnswerForm = "list") -> str:
    """The default question of a mode."""
    return _lookup(_QUESTIONS, (mode, answer_form), "mode and answer form")


def build_prompt(
    sample: Sample,
    features: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: Template = "upstream",
    mode: Mode = "no_think",
    face_or_frame: str = "multiface_audio_face_text",
    answer_form: AnswerForm = "list",
    question: str | None = None,
) -> Prompt:
    """Build a sample's prompt: text with placeholder tokens, and exactly the features these stand for.

    No bos token is put before it. Upstream trains with one and infers without: here the prompt is tokenised apart from
    what follows, so its ids are the same in supervised training, in sampling and in evaluation.

    The subtitle is foreign text. Whatever in it could be read as markup is made harmless: angle brackets become ‹ and
    ›, runs of three or more `#` become one, and the tokenizer's special tokens are broken up.

    Args:
        sample: gives the prompt's id and the subtitle.
        features: encoder outputs of the sample, `[T, d]` each; more than needed is fine.
        tokenizer: `AffectGPT.tokenizer`, which knows the placeholders.
        template: `upstream` is AffectGPT's `###Human: … ###Assistant: `; `chat` is the tokenizer's own.
        mode: `think` asks for `<think>…</think><answer>…</answer>`, `no_think` for the labels alone.
        face_or_frame: which modalities the prompt shows, a key of `FACE_OR_FRAME`.
        answer_form: how labels are asked for in no_think mode.
        question: instead of the mode's own.

    Raises:
        ValueError: an unknown name, a missing feature, a tokenizer without placeholders or chat template, or a question
            that holds placeholders.
    """
    from grpo_core.types import Prompt  # torch: options are read without

    modalities = _lookup(FACE_OR_FRAME, face_or_frame, "face_or_frame")
    if missing := sorted(modalities.features - features.keys()):
        raise ValueError(
            f"sample {sample.name!r} has no {', '.join(missing)} feature, which face_or_frame {face_or_frame!r} needs: "
            "extract it, or choose one without it"
        )
    clauses = "".join(_CLAUSES[name] for name in modalities.clauses)
    body = clauses + _CLOSING + (question_text(mode, answer_form) if question is None else question)
    # the subtitle goes in last, and by replacement: braces in it or in the question mean nothing
    if modalities.subtitle:
        body = body.replace("{subtitle}", neutralise(sample.subtitle, tokenizer), 1)
    token_ids = tuple(tokenizer(_frame(body, template, mode, tokenizer), add_special_tokens=False)["input_ids"])
    vocabulary = tokenizer.get_added_vocab()
    for token in PLACEHOLDERS:
        expected, found = clauses.count(token), token_ids.count(vocabulary.get(token, -1))
        if found != expected:
            raise ValueError(
                f"the prompt of sample {sample.name!r} holds {token} {found} times instead of {expected}: "
                "use AffectGPT.tokenizer, and a question without placeholders"
            )
    return Prompt(sample.name, token_ids, {name: features[name] for name in sorted(modalities.features)}, sample)


def target_text(sample: Sample, mode: Mode = "no_think", answer_form: AnswerForm = "list") -> str:
    """Write the answer that supervised training teaches, without its end token.

    no_think: `happy, sad`, or as a sentence in upstream's form. think: `<think> {reason} </think> <answer> happy, sad
    </answer>`. An empty label list reads `neutral`, as upstream's loaders have it.

    A bare list is the default: every sampled token is then a part of an answer that any parser reads, the strict one of
    the metric included, and no reward is spent on a fixed sentence.

    Raises:
        ValueError: the sample lacks labels, or, in think mode, a reason.
    """
    if sample.labels is None:
        raise ValueError(f"sample {sample.name!r} has no labels: it cannot be a training target")
    labels = ", ".join(dict.fromkeys(label.lower() for label in parse_labels(sample.labels, "strict"))) or "neutral"
    if mode == "no_think":
        return _lookup({"list": "{labels}", "sentence": _SENTENCE}, answer_form, "answer form").format(labels=labels)
    check_mode(mode)
    description = sample.reason or ""
    if not description.strip():
        raise ValueError(f"sample {sample.name!r} has no reason, which think mode learns: use mode no_think")
    reason = re.sub(r"#{3,}", "#", re.sub(r"</?(think|answer)>", "", description)).strip()
    return f"<think> {reason} </think> <answer> {labels} </answer>"


def build_target(
    sample: Sample,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: Template = "upstream",
    mode: Mode = "no_think",
    answer_form: AnswerForm = "list",
) -> tuple[int, ...]:
    """Token ids of `target_text` and its end: `###` and the end token upstream, the end token alone in chat.

    Raises:
        ValueError: as `target_text`, or the tokenizer has no end token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token: set it in the LLM's tokenizer_config.json")
    text = target_text(sample, mode, answer_form) + "".join(stop_strings(template))
    return (*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)


def answer_text(completion: str, mode: Mode = "no_think") -> str:
    """Cut out the part of a completion that names emotions; an empty string if there is none.

    no_think: the whole text. think: the text of the last closed `<answer>…</answer>`, the model's final word; an
    answer that was cut off before its end tag does not count.
    """
    check_mode(mode)
    if mode == "no_think":
        return completion.strip()
    answers = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", completion, re.DOTALL)
    return answers[-1].strip() if answers else ""


def neutralise(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Make foreign text harmless: break up everything that could be read as template, placeholder or special token."""
    text = re.sub(r"#{3,}", "#", text.replace("<", "‹").replace(">", "›"))
    for token in tokenizer.added_tokens_decoder.values():
        if token.special:
            text = text.replace(token.content, f"{token.content[0]} {token.content[1:]}")
    return text


def _frame(body: str, template: Template, mode: Mode, tokenizer: PreTrainedTokenizerBase) -> str:
    """Put the user's turn into its template, up to where the answer begins."""
    if template == "upstream":
        return f"###Human: {body} ###Assistant: "
    _lookup({"chat": True}, template, "template")
    if not tokenizer.chat_template:
        raise ValueError("template is 'chat', but the LLM's tokenizer has no chat_template: use template 'upstream'")
    turn = [{"role": "user", "content": body}]
    # templates of reasoning models (Qwen3) look at enable_thinking; others take no notice of it
    text: Any = tokenizer.apply_chat_template(
        turn, add_generation_prompt=True, tokenize=False, enable_thinking=mode == "think"
    )
    return text


def _lookup(table: Mapping[Any, Value], key: object, what: str) -> Value:
    """`table[key]`, or an error that lists what there is."""
    if key not in table:
        raise ValueError(f"unknown {what} {key!r}: choose one of {', '.join(map(str, table))}")
    return table[key]
