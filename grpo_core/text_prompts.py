"""Read the prompts of a text run from a jsonl: text or chat messages, and columns for the rewards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_core.chat import encode_chat, encode_text
from grpo_core.data import check_coverage, longest_sequence, read_jsonl, report_skipped
from grpo_core.errors import InputError
from grpo_core.types import Prompt

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def load_text_prompts(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    model_config: PretrainedConfig,
    *,
    max_new_tokens: int,
    min_coverage: float = 0.8,
    report: bool = True,
) -> list[Prompt]:
    """Make one prompt of each line of a jsonl; a line whose prompt cannot be used is left out, and named in the log.

    Args:
        model_config: config of the model, for the longest sequence that it takes.
        max_new_tokens: room that each prompt must leave for its completion.
        min_coverage: share of the lines whose prompt must be usable.
        report: name the lines that are left out.

    Raises:
        InputError: a line is not a JSON object with a `prompt`, or too few lines can be used.
    """
    limit = longest_sequence(model_config)
    prompts: list[Prompt] = []
    skipped: dict[str, str] = {}  # reason by file and line
    for where, line, row in read_jsonl(path):
        if not isinstance(row, dict) or "prompt" not in row:
            columns = ", ".join(row) if isinstance(row, dict) else repr(row)
            raise InputError(f"{where} has no column 'prompt', but {columns}: add it")
        if not is_prompt(row["prompt"]):
            skipped[where] = f"prompt is {row['prompt']!r}, not text or a list of messages with role and content"
            continue
        try:
            prompt = make_text_prompt(str(line), row, tokenizer)
        except Exception as error:  # a chat template may refuse a conversation by any error
            skipped[where] = f"its prompt cannot be tokenized ({type(error).__name__}: {error})"
            continue
        # one that leaves no room for its completion would end the run in the step that draws it
        fault = limit and limit.fault(len(prompt.token_ids), max_new_tokens, "rollout.max_new_tokens")
        if fault:
            skipped[where] = fault
        else:
            prompts.append(prompt)
    total = len(prompts) + len(skipped)
    if not total:
        raise InputError(f"{path} is empty: write one JSON object with a `prompt` per line")
    if report:
        report_skipped(skipped, total, "prompts")
    check_coverage(skipped, total, min_coverage, what="prompts", key="min_coverage")
    return prompts


def is_prompt(value: object) -> bool:
    """Whether a value is text or chat messages. Templates print what they do not find as nothing, or as `None`."""
    if not isinstance(value, list):
        return isinstance(value, str) and bool(value)
    return bool(value) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str | list)
        for message in value
    )


def make_text_prompt(prompt_id: str, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Tokenize the `prompt` of a row, and keep the row for the rewards.

    Args:
        prompt_id: names the group in logs and keys its random numbers: unique, and the same when a run is resumed.
    """
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return Prompt(prompt_id, tuple(encode_text(tokenizer, prompt)), sample=row)
    # What the template opens for the answer (`<think>`) is the prompt's to the model, and the answer's to the rewards.
    token_ids, opened = encode_chat(tokenizer, prompt)
    return Prompt(prompt_id, tuple(token_ids), sample=row, opened=opened)
