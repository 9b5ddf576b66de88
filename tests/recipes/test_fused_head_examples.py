"""The two adapter examples do what they say: the same training as TRL's own head, and a bare loop that learns."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

RECIPES = Path(__file__).parents[2] / "recipes/examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_bare_transformers_loop_learns():
    rewards = load("transformers_loop").train(steps=20)
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.15


def test_bare_transformers_loss_is_the_padded_one():
    """Packing the scored rows gives the loss and gradient of dense logits under a mask."""
    loop = load("transformers_loop")
    torch.manual_seed(0)
    config = loop.Qwen2Config(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = loop.Qwen2ForCausalLM(config)
    ids, advantages = torch.randint(30, (3, 7)), torch.randn(3)
    attention = torch.ones_like(ids)
    attention[1, 5:] = 0
    mask = attention[:, 1:].bool() & (torch.arange(6) >= 2)
    loop.completion_loss(model, ids, attention, mask, advantages, temperature=0.8).loss.backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1] / 0.8
    logprob = torch.log_softmax(logits, -1).gather(2, ids[:, 1:, None])[..., 0]
    ratio = torch.exp(logprob - logprob.detach())
    (-(ratio * advantages[:, None] * mask).sum() / mask.sum()).backward()
    for gradient, parameter in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-7)


def tiny_tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(30))]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def train_with_trl(trainer_class, folder, **options):
    from datasets import Dataset
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from trl import GRPOConfig

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    arguments = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        num_iterations=2,
        max_steps=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        seed=0,
        save_strategy="no",
        disable_tqdm=True,
        bf16=False,
        temperature=0.8,
        model_init_kwargs={"dtype": "float32"},
        **options,
    )
    trainer = trainer_class(
        model=str(folder / "model"),  # a path, so that TRL can load the reference from it
        processing_class=tiny_tokenizer(),
        reward_funcs=lambda completions, **_: [float(text.count("w7")) + len(text) / 100 for text in completions],
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["w1 w2 w3", "w4 w5"] * 4}),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("options", [{"beta": 0.1, "loss_type": "grpo"}, {"entropy_coef": 0.01}], ids=str)
def test_trl_trains_alike_with_this_head_and_with_its_own(options, tmp_path, monkeypatch):
    trl = pytest.importorskip("trl", minversion="1.16")
    module = load("trl_trainer")
    calls = []
    head = module.linear_logprob
    monkeypatch.setattr(module, "linear_logprob", lambda *a, **k: calls.append(1) or head(*a, **k))
    own = train_with_trl(trl.GRPOTrainer, tmp_path / "a", **options)
    assert not calls
    ours = train_with_trl(module.FusedHeadGRPOTrainer, tmp_path / "b", **options)
    assert len(calls) >= 4
    for a, b in zip(own.state.log_history, ours.state.log_history, strict=True):
        for name in ("loss", "grad_norm", "entropy", "reward", "kl", "clip_ratio/region_mean"):
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), name
    for (name, a), b in zip(own.model.named_parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)
