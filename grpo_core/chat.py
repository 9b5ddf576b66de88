"""Turn text and chat messages into the token ids of prompts, and read from a chat template how its turns begin and end.

A template may begin the model's answer itself (`<think>\\n`, as for DeepSeek-R1 or Qwen3-Thinking), and may end a turn
with another token than the tokenizer's end of sequence (Qwen's base models: `<|im_end|>` and `<|endoftext|>`). Rewards
and sampling must know both, or every completion lacks its opening tag, and none ever ends.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from grpo_core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# the last thing in a text: a tag such as <think>, <seed:think>, [THINK] or <|START_THINKING|>, not a closing one
_OPENED = re.compile(r"[<\[](?!/)[\w:.|-]*(?:think|thought|reason|answer)[\w:.|-]*[>\]]\s*\Z", re.IGNORECASE)
_ANSWER = "0123456789"  # stands for an answer where a template is asked what it writes behind one


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenize a prompt that is plain text, with what the tokenizer puts in front of a text, such as its
    begin-of-sequence token: once, also where the text begins with it already, and nothing behind the text, where an
    end-of-sequence token would tell the model that all is said.
    """
    plain: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    whole: list[int] = tokenizer(text).input_ids
    extra = len(whole) - len(plain)
    # where the text stands in the whole; nowhere, if the tokenizer splits a text otherwise behind a special token
    start = next((i for i in range(extra + 1) if whole[i : i + len(plain)] == plain), None)
    if start is None:
        begin = tokenizer.bos_token_id
        return whole[1:] if begin is not None and whole[:2] == [begin, begin] else whole
    front = whole[:start]
    return plain if plain[: len(front)] == front else front + plain


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], **template_options: Any
) -> tuple[list[int], str]:
    """Tokenize chat messages by the tokenizer's template, up to where the model's answer begins.

    Returns:
        Token ids, and the tag that the template opened for the answer (`opened_tag`), which is in the ids already.

    Raises:
        InputError: the tokenizer has no chat template, or the template refuses the messages.
    """
    text = render_chat(tokenizer, messages, **template_options)
    # the template has written the special tokens already; with a second BOS the model would see a new kind of text
    return tokenizer(text, add_special_tokens=False).input_ids, opened_tag(text)


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], **template_options: Any) -> str:
    """Write chat messages by the tokenizer's template, up to where the model's answer begins.

    Raises:
        InputError: the tokenizer has no chat template, or the template refuses the messages.
    """
    if not tokenizer.chat_template:
        raise InputError(
            "the tokenizer has no chat_template: write the prompt as text, or use a chat model's tokenizer"
        )
    try:
        text: Any = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=False, **template_options
        )
    # Exception: a template may raise what it likes (jinja2's TemplateError, KeyError, TypeError)
    except Exception as error:
        raise InputError(
            f"the tokenizer's chat template refuses the messages ({' '.join(str(error).split())})"
        ) from error
    return str(text)


def opened_tag(text: str) -> str:
    """Return the tag that a rendered prompt ends with, as `<think>\\n`; empty if its last tag is none of reasoning."""
    found = _OPENED.search(text)
    return found[0] if found else ""


def close_opened(text: str) -> str:
    """Close the block that a rendered prompt has opened, as Qwen3's template does where thinking is off.

    The text is returned as it is if it has opened none.
    """
    tag = opened_tag(text).strip()
    if not tag:
        return text
    if tag.isupper() and "START" in tag:
        closing = tag.replace("START", "END")
    else:
        closing = f"{tag[0]}/{tag[1:]}"
    return f"{text.rstrip()}\n\n{closing}\n\n"


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token with which the chat template ends the model's turn.

    None if there is no template, or it ends turns with text alone.
    """
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "0"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text: Any = tokenizer.apply_chat_template(turns, tokenize=False)
    # Exception: a template may raise what it likes; one that takes no such turns does not say how they end
    except Exception:
        return None
    _, found, behind = str(text).rpartition(_ANSWER)
    if not found:
        return None
    special = tokenizer.added_tokens_decoder
    return next((i for i in tokenizer(behind, add_special_tokens=False).input_ids if i in special), None)
