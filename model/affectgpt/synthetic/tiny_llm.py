"""Make a tiny Qwen2 and its tokenizer, and pretrain it on generated texts, without any clip.

A real LLM knows its language, the prompt's format, and that lowered brows express anger. This one learns as much from
descriptions in words, inserted where a clip's vectors will be later.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from affectgpt.data.datasets import Sample
from affectgpt.modeling.affectgpt import add_placeholders
from affectgpt.prompts import PLACEHOLDERS, Mode, Template, build_prompt, build_target
from affectgpt.synthetic.dataset import Script, write_script
from affectgpt.synthetic.emotions import EMOTIONS, PLAIN_FACE, PLAIN_VOICE

VOCABULARY = 1400
PROMPTS, NOTES = 13, 14  # keys of random streams other than the data set's and the encoders'
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_PROMPTS: tuple[tuple[Template, Mode, str], ...] = (  # template, mode and face_or_frame of the texts
    ("upstream", "no_think", "multiface_audio_face_text"),
    ("upstream", "think", "multiface_audio_face_text"),
    ("chat", "no_think", "multiface_audio_face_text"),
    ("chat", "think", "multiface_audio_face_text"),
    ("upstream", "no_think", "multiframe_audio_frame_text"),
    ("upstream", "no_think", "textonly"),
)
_NO_FEATURES = dict.fromkeys(("frame", "face", "audio"), torch.zeros(1, 1))


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (which can write any text) on prompts and answers, with ChatML's template."""
    # `corpus` gives token ids, so a tokenizer of bytes makes the texts on which the real one is trained
    plain = _tokenizer(())
    texts = [plain.decode(ids) for prompt_and_answer in corpus(plain, seed, 600) for ids in prompt_and_answer]
    words = [form for emotion in EMOTIONS.values() for word in emotion.words for form in (word, f" {word}")]
    return _tokenizer([*texts, *(words * 5)])


def make_llm(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """Make a Qwen2 of 2 layers, 96 wide, 4 heads over 2 key-value heads, with random weights."""
    config = Qwen2Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen2ForCausalLM(config)


def pretrain(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, steps: int = 360) -> float:
    """Train on next tokens of label lists, notes and full prompts in turn; return the mean loss of the last ten steps.

    Answers have as much weight as the text before them.
    """
    lists, notes = short_texts(tokenizer, seed, 64 * steps // 3, 32 * steps // 3)
    prompts = corpus(tokenizer, seed, 6 * steps // 3)
    batches = [
        texts[k * rows : (k + 1) * rows]
        for k in range(steps // 3)
        for texts, rows in ((lists, 64), (notes, 32), (prompts, 6))
    ]
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=len(batches), pct_start=0.1)
    model.train()
    losses = []
    for texts in batches:
        loss = _next_token_loss(model, texts)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return float(np.mean(losses[-10:]))


def corpus(tokenizer: PreTrainedTokenizerFast, seed: int, count: int) -> list[tuple[list[int], list[int]]]:
    """Make prompts in all templates, with words in place of the vectors, and their answers, as token ids."""
    tokenizer = _with_placeholders(tokenizer)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in PLACEHOLDERS}
    texts = []
    for k in range(count):
        rng = np.random.default_rng((seed, PROMPTS, k))
        script = write_script(f"text_{k}", rng, (0,))
        sample = Sample(str(k), None, None, None, script.subtitle, f"[{', '.join(script.labels)}]", script.reason)
        template, mode, shown = _PROMPTS[k % len(_PROMPTS)]
        prompt = build_prompt(sample, _NO_FEATURES, tokenizer, template=template, mode=mode, face_or_frame=shown)
        words = {ids[token]: tokenizer(text)["input_ids"] for token, text in _in_words(script).items()}
        prompt_ids = [i for token in prompt.token_ids for i in words.get(token, (token,))]
        texts.append((prompt_ids, list(build_target(sample, tokenizer, template=template, mode=mode))))
    return texts


def short_texts(tokenizer: PreTrainedTokenizerFast, seed: int, lists: int, notes: int) -> tuple[list, list]:
    """Make label lists, and notes that lead from cues to labels, in the form of `corpus`.

    They teach which words go together, and with which cues.
    """
    texts = []
    for k in range(lists + notes):
        rng = np.random.default_rng((seed, NOTES, k))
        script = write_script(f"note_{k}", rng, (0,))
        cues = "###"
        if k >= lists:
            words = _in_words(script)
            cues = f"<Audio>{words['<AudioHere>']}</Audio>. <Video>{words['<FaceHere>']}</Video>. "
            cues += f"<Subtitle>{script.subtitle}</Subtitle>. ###Assistant: "
        texts.append((tokenizer(cues)["input_ids"], tokenizer(f"{', '.join(script.labels)}###")["input_ids"]))
    return texts[:lists], texts[lists:]


def _in_words(script: Script) -> dict[str, str]:
    """Describe in words what each placeholder's vector will express."""
    seen = EMOTIONS[script.channels["face"]].seen if "face" in script.channels else PLAIN_FACE
    heard = EMOTIONS[script.channels["voice"]].heard if "voice" in script.channels else PLAIN_VOICE
    both = f"{seen} and {heard}"
    return {"<FaceHere>": seen, "<FrameHere>": seen, "<AudioHere>": heard, "<MultiHere>": both}


def _next_token_loss(model: Qwen2ForCausalLM, texts: list[tuple[list[int], list[int]]]) -> Tensor:
    """Compute the mean cross-entropy of prompt tokens plus that of answer tokens, over right-padded rows."""
    longest = max(len(prompt) + len(answer) for prompt, answer in texts)
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    role = torch.zeros(len(texts), longest, dtype=torch.long)  # 1 prompt, 2 answer, 0 padding
    for row, (prompt, answer) in enumerate(texts):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        role[row, : len(prompt)], role[row, len(prompt) : len(prompt) + len(answer)] = 1, 2
    logits = model(input_ids=ids, attention_mask=(role > 0).long()).logits[:, :-1]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    masks = [(role[:, 1:] == which).float() for which in (1, 2)]
    total: Any = sum((losses * mask).sum() / mask.sum().clamp(min=1) for mask in masks)
    return total


def _with_placeholders(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Copy a tokenizer and add the placeholders as `AffectGPT` does; the saved one stays that of a plain LLM."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copied = _wrap(backend)
    add_placeholders(copied)
    return copied


def _tokenizer(texts: Iterable[Any]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=2,
        # sorted: the alphabet is a set, and its order decides the token ids
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _wrap(backend)


def _wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    return tokenizer
