"""Prompts of text and chat: special tokens stand once, what a template opens is known, and how its turns end."""

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from grpo_core.chat import close_opened, encode_chat, encode_text, opened_tag, turn_end
from tests.conftest import make_tokenizer


def with_template(template: str, **special: str) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    if special:
        tokenizer.add_special_tokens(special)
    return tokenizer


def framed(tokens: str) -> PreTrainedTokenizerFast:
    """A tokenizer that puts special tokens around a text, as Llama's, or one with add_eos_token."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|im_start|>", "<|im_end|>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=tokens, special_tokens=ids)
    return tokenizer


@pytest.mark.parametrize("frame", ["<|im_start|> $A", "<|im_start|> $A <|im_end|>", "$A", "$A <|im_end|>"])
@pytest.mark.parametrize("text", ["happy", "<|im_start|>happy", "h", "<|im_start|>"])
def test_a_begin_token_stands_once_and_no_end_token_is_put_behind_a_prompt(frame, text):
    tokenizer = framed(frame)
    begin = tokenizer.bos_token_id
    plain = tokenizer(text, add_special_tokens=False).input_ids
    expected = plain if "<|im_start|>" not in frame or plain[0] == begin else [begin, *plain]
    assert encode_text(tokenizer, text) == expected


def test_without_special_tokens_a_text_is_tokenized_as_it_was():
    tokenizer = make_tokenizer()
    for text in ("", "the character's emotional state", "é\u2028"):
        assert encode_text(tokenizer, text) == tokenizer(text).input_ids


QWEN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OPENS = QWEN + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"


@pytest.mark.parametrize(
    ("end", "opened"),
    [
        ("<|im_start|>assistant\n<think>\n", "<think>\n"),
        ("<|im_start|>assistant\n<think>", "<think>"),
        ("[/INST][THINK]", "[THINK]"),
        ("<|CHATBOT_TOKEN|><|START_THINKING|>", "<|START_THINKING|>"),
        ("<seed:think>", "<seed:think>"),
        ("<|im_start|>assistant\n", ""),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", ""),
        ("Use <think> tags.<|im_end|>\n<|im_start|>assistant\n", ""),
        ("<start_of_turn>model\n", ""),
        ("###Assistant: ", ""),
    ],
)
def test_the_tag_that_a_template_opens_is_found_at_its_end(end, opened):
    assert opened_tag("a question" + end) == opened


def test_what_a_template_opens_can_be_closed_before_an_answer_without_thoughts():
    assert close_opened("x<think>\n") == "x<think>\n\n</think>\n\n"
    assert close_opened("x[THINK]") == "x[THINK]\n\n[/THINK]\n\n"
    assert close_opened("x<|START_THINKING|>") == "x<|START_THINKING|>\n\n<|END_THINKING|>\n\n"
    assert close_opened("x\n") == "x\n"


def test_a_chat_prompt_holds_the_opened_tag_and_names_it():
    tokenizer = with_template(OPENS)
    ids, opened = encode_chat(tokenizer, [{"role": "user", "content": "sad?"}])
    assert tokenizer.decode(ids).endswith("assistant\n<think>\n")
    assert opened == "<think>\n"


@pytest.mark.parametrize(
    ("template", "eos", "end"),
    [
        (QWEN, "<|endoftext|>", "<|im_end|>"),  # Qwen's base models
        (QWEN, "<|im_end|>", "<|im_end|>"),
        (QWEN.replace("<|im_end|>", "{{ eos_token }}"), "<|endoftext|>", "<|endoftext|>"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "<|endoftext|>", None),
        ("{{ raise_exception('no') }}", "<|endoftext|>", None),
        (None, "<|endoftext|>", None),
    ],
)
def test_the_token_that_ends_a_turn_is_read_from_the_template(template, eos, end):
    tokenizer = with_template(template, eos_token=eos)
    assert turn_end(tokenizer) == (None if end is None else tokenizer.convert_tokens_to_ids(end))


def test_messages_that_a_template_refuses_are_one_sentence():
    with pytest.raises(ValueError, match=r"chat template refuses the messages \(roles alternate\)"):
        encode_chat(with_template("{{ raise_exception('roles alternate') }}"), [{"role": "user", "content": "x"}])
    with pytest.raises(ValueError, match="has no chat_template"):
        encode_chat(with_template(None), [{"role": "user", "content": "x"}])
