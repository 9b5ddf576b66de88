"""Build prompts and training targets from samples, and extract answers from completions."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from affectgpt.data.datasets import check_emotion_labels
from affectgpt.emotion_wheel import parse_labels
from grpo_core.chat import close_opened, opened_tag, render_chat, turn_end
from grpo_core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from affectgpt.data.datasets import Sample
    from affectgpt.modeling.fusion import Branch
    from grpo_core.types import Prompt

Value = TypeVar("Value")

_THINK = "<think>"

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
    """List the features from which a placeholder's vector is computed.

    `<MultiHere>` combines the audio with faces if the prompt has them, otherwise with frames: `build_prompt` gives a
    prompt only the features that its `face_or_frame` needs, and no multiframe choice needs faces.
    """
    if placeholder == "<MultiHere>":
        return ("face" if "face" in available or "frame" not in available else "frame", "audio")
    return (placeholder.removeprefix("<").removesuffix("Here>").lower(),)


@dataclass(frozen=True)
class Modalities:
    """Modalities of a `face_or_frame` value: clauses in prompt order, features needed, with subtitle or without."""

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
"""Upstream's names (`face` and `frame` include the audio and the subtitle)."""

# upstream's wording, spaces included: its checkpoints were trained on these very tokens
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
    """Return the features (`frame`, `face`, `audio`, `image`) that a choice of modalities needs."""
    return _lookup(FACE_OR_FRAME, face_or_frame, "face_or_frame").features


def stop_strings(template: Template) -> tuple[str, ...]:
    """Return the strings that end a completion, beside the tokenizer's end token."""
    # a chat template ends a turn with a token, see `grpo_core.chat.turn_end`
    return _lookup({"upstream": ("###",), "chat": ()}, template, "template")


def check_mode(mode: str) -> None:
    """Refuse an unknown mode.

    Raises:
        InputError: listing the known modes.
    """
    if mode not in get_args(Mode):
        raise InputError(f"unknown mode {mode!r}: choose one of {', '.join(get_args(Mode))}")


def question_text(mode: Mode, answer_form: AnswerForm = "list") -> str:
    """Return the default question of a mode."""
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
    """Build a sample's prompt: text with placeholder tokens, and exactly the features that replace these.

    It has no bos token: upstream trains with one and infers without. The prompt is tokenised separately from the
    answer, so its ids are the same in supervised training, in sampling and in evaluation.

    The subtitle is foreign text. Everything in it that could be read as markup is made harmless: angle brackets become
    ‹ and ›, runs of three or more `#` become one, and the tokenizer's special tokens are broken up.

    Args:
        sample: source of the prompt's id and subtitle.
        features: encoder outputs of the sample, `[T, d]` each; more than needed is fine.
        tokenizer: `AffectGPT.tokenizer`, which knows the placeholders.
        template: `upstream` is AffectGPT's `###Human: … ###Assistant: `; `chat` is the tokenizer's.
        mode: `think` asks for `<think>…</think><answer>…</answer>`, `no_think` for the labels only.
        face_or_frame: modalities of the prompt, a key of `FACE_OR_FRAME`.
        answer_form: form of the labels in no_think mode.
        question: replaces the mode's default question.

    Raises:
        InputError: a name is unknown, a feature is missing, the tokenizer lacks placeholders or a chat template, or the
            question contains placeholders.
    """
    from grpo_core.types import Prompt  # here, so that options are read without importing the engine

    modalities = _lookup(FACE_OR_FRAME, face_or_frame, "face_or_frame")
    if missing := sorted(modalities.features - features.keys()):
        raise InputError(
            f"sample {sample.name!r} has no {', '.join(missing)} feature, which face_or_frame {face_or_frame!r} needs: "
            "extract it, or choose one without it"
        )
    clauses = "".join(_CLAUSES[name] for name in modalities.clauses)
    body = clauses + _CLOSING + (question_text(mode, answer_form) if question is None else question)
    # the subtitle is inserted last, by replacement and not by `format`: braces in it or in the question are only text
    if modalities.subtitle:
        body = body.replace("{subtitle}", neutralise(sample.subtitle, tokenizer), 1)
    text, opened = _frame(body, template, mode, tokenizer)
    token_ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    # counted in the ids and not in the text: a tokenizer that lacks a placeholder would split it into ordinary tokens
    vocabulary = tokenizer.get_added_vocab()
    for token in PLACEHOLDERS:
        expected, found = clauses.count(token), token_ids.count(vocabulary.get(token, -1))
        if found != expected:
            raise InputError(
                f"the prompt of sample {sample.name!r} contains {token} {found} times instead of {expected}: "
                "use AffectGPT.tokenizer, and a question without placeholders"
            )
    used = {name: features[name] for name in sorted(modalities.features)}
    return Prompt(sample.name, token_ids, used, sample, opened)


def target_text(
    sample: Sample,
    mode: Mode = "no_think",
    answer_form: AnswerForm = "list",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> str:
    """Write the answer that supervised training teaches, without its end token.

    no_think: `happy, sad`, or upstream's sentence. think: `<think> {reason} </think> <answer> happy, sad </answer>`. An
    empty label list becomes `neutral`, as in upstream's loaders.

    A bare list is the default: every sampled token then belongs to an answer that any parser reads, including the
    metric's strict one, and no reward is spent on a fixed sentence.

    Args:
        tokenizer: its special tokens in the labels and the reason, which are foreign text, are made harmless as those
            of a subtitle are.

    Raises:
        InputError: the sample lacks labels or, in think mode, a reason; or a label is a number.
    """
    if sample.labels is None:
        raise InputError(f"sample {sample.name!r} has no labels: it cannot be a training target")
    check_emotion_labels([sample], "training target")
    # dict.fromkeys drops repeats and keeps the table's order, where a set would not
    labels = ", ".join(dict.fromkeys(label.lower() for label in parse_labels(sample.labels, "strict"))) or "neutral"
    if tokenizer is not None:
        labels = neutralise(labels, tokenizer)
    if mode == "no_think":
        return _lookup({"list": "{labels}", "sentence": _SENTENCE}, answer_form, "answer form").format(labels=labels)
    check_mode(mode)
    description = sample.reason or ""
    if not description.strip():
        raise InputError(f"sample {sample.name!r} has no reason, which think mode learns: use mode no_think")
    # a description is foreign text too: tags in it would end the block, and ### would end the turn
    reason = re.sub(r"#{3,}", "#", re.sub(r"</?(think|answer)>", "", description)).strip()
    if tokenizer is not None:
        reason = neutralise(reason, tokenizer)
    return f"<think> {reason} </think> <answer> {labels} </answer>"


def build_target(
    sample: Sample,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: Template = "upstream",
    mode: Mode = "no_think",
    answer_form: AnswerForm = "list",
    opened: str = "",
) -> tuple[int, ...]:
    """Tokenise `target_text` and its end: `###` and the end-of-sequence token for upstream, for chat the token with
    which the chat template ends a turn.

    Args:
        opened: the prompt's `opened`: a tag that the template has written, which is not in the target again.

    Raises:
        InputError: `target_text` refuses the sample, or the tokenizer has no end token.
    """
    end = end_token(tokenizer, template)
    if end is None:
        raise InputError("the tokenizer has no eos_token: set it in the LLM's tokenizer_config.json")
    text = target_text(sample, mode, answer_form, tokenizer)
    if opened:
        text = text.removeprefix(opened.strip()).lstrip()
    return (*tokenizer(text + "".join(stop_strings(template)), add_special_tokens=False)["input_ids"], end)


def end_token(tokenizer: PreTrainedTokenizerBase, template: Template) -> int | None:
    """Return the token that ends an answer by a template; None if the tokenizer has none."""
    turn = turn_end(tokenizer) if template == "chat" else None
    end: Any = tokenizer.eos_token_id if turn is None else turn
    return end


def answer_text(completion: str, mode: Mode = "no_think") -> str:
    """Extract the text of a completion that names emotions; an empty string if there is none.

    no_think: the whole text. think: the text of the last closed `<answer>…</answer>`, the model's final word; an
    answer that was cut off before its end tag does not count.
    """
    check_mode(mode)
    if mode == "no_think":
        return completion.strip()
    # no <answer> within the answer: after an unclosed tag only the text behind the next one counts
    answers = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", completion, re.DOTALL)
    return answers[-1].strip() if answers else ""


def neutralise(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Make foreign text harmless: break up everything that could be read as template, placeholder or special token."""
    # brackets first: they end think and answer tags and most special tokens with one rule
    text = re.sub(r"#{3,}", "#", text.replace("<", "‹").replace(">", "›"))
    for token in tokenizer.added_tokens_decoder.values():
        if token.special:
            # a space after the first character: the text stays readable, but no longer matches the token
            text = text.replace(token.content, f"{token.content[0]} {token.content[1:]}")
    return text


def _frame(body: str, template: Template, mode: Mode, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Format the user's turn by its template, up to where the answer begins; also return the tag that is open there."""
    if template == "upstream":
        return f"###Human: {body} ###Assistant: ", ""
    _lookup({"chat": True}, template, "template")
    if not tokenizer.chat_template:
        raise InputError("template is 'chat', but the LLM's tokenizer has no chat_template: use template 'upstream'")
    # templates of reasoning models (Qwen3) read enable_thinking; others ignore it
    text = render_chat(tokenizer, [{"role": "user", "content": body}], enable_thinking=mode == "think")
    opened = opened_tag(text)
    if opened and (mode == "no_think" or opened.strip() != _THINK):
        # a label list is no thought, and a think block is ours: what the template has opened ends before it
        text, opened = close_opened(text), ""
    return text, opened


def _lookup(table: Mapping[Any, Value], key: object, what: str) -> Value:
    """Return `table[key]`, or raise a ValueError that lists the known keys."""
    if key not in table:
        raise InputError(f"unknown {what} {key!r}: choose one of {', '.join(map(str, table))}")
    return table[key]
