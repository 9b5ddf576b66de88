"""Compare a model's packed and sampled log-probs with its own forward, one sequence at a time, before it is trained.

    from grpo_core import verify_model

    print(verify_model(AutoModelForCausalLM.from_pretrained(folder)))

The engine runs a model in two ways that it was not written for: groups packed on one axis, and a prompt's cache shared
by its completions. Most models of transformers allow both; some do not, and few of them say so. Trainers and samplers
call `verify_model` when they are made. It draws completions of random prompts with the sampler, and computes their
log-probs three times: in the draw, packed, and by `model(input_ids)` alone with transformers' eager attention.

Nothing is compared for models that are known to be right (`grpo_core.families.is_known_right`). Others cost seconds:

- **Weights.** The model's own, adapters included, in a float32 copy: a scale or a sink that is trained is seen as
  large as it is. The whole model if its copy is small (`WHOLE_BYTES`), else embeddings, head, and the first layers up
  to where one of each kind has come, at least two: the order of layers stays, by which many models choose masks.
- **Tokens.** Random ids of a fixed seed, the same on every rank; ids that the config gives a meaning are left out.
- **Lengths.** Short ones, and for every number in the config that may be a length up to `MOST_COMPARED`, one sequence
  that crosses it. What a model is known not to cross (a window, a `longrope`) is approached to the last token, and
  longer sequences are refused when they come.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as c10d
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from grpo_core import families
from grpo_core.config.options import RolloutConfig
from grpo_core.data import longest_sequence
from grpo_core.distributed import Distributed, gather_objects
from grpo_core.layout import GroupLayout
from grpo_core.types import Group, Prompt

TOLERANCE = 1e-4
"""Nats a token, in the median over a group's tokens: float32 rounding leaves 1e-6. The median, because a mixture of
experts may route single tokens otherwise after rounding."""

WHOLE_BYTES = 2 << 30
"""A model whose float32 copy is smaller is compared whole."""

PROMPT_LENGTHS = (5, 19, 11)
NEW_TOKENS = 6  # few: a state that leaks from the sequence before fades with distance
GROUP_SIZE = 2


@dataclass(frozen=True)
class Comparison:
    """Differences to the model's own forward, in nats a token."""

    model_type: str
    layers: int
    """Decoder layers that were compared."""
    longest: int
    """Tokens of the longest sequence."""
    packed: tuple[float, float]
    """Of log-probs over packed groups: the median over tokens, of the group where it is largest, and the maximum."""
    drawn: tuple[float, float]
    """Likewise of the sampler's log-probs."""
    training: tuple[float, float]
    """Likewise of log-probs over packed groups in training mode, dropout off."""


_compared: WeakKeyDictionary[nn.Module, Comparison | None] = WeakKeyDictionary()


def verify_model(model: PreTrainedModel | PeftModel, *, seed: int = 0) -> Comparison | None:
    """Refuse a model whose packed or sampled log-probs are not its own; a model is compared once in a process.

    Where a process group is initialised, every rank must call it: all of them refuse, or none.

    Args:
        model: as it will be trained, before FSDP2 shards it.
        seed: of the random tokens.

    Returns:
        The differences; None for a model that is known to be right, or has been compared before.

    Raises:
        ModelRefused: the model cannot run over packed groups or be sampled, or differs from its own forward by
            more than `TOLERANCE` in the median; one sentence with type, folder and figure.
    """
    causal_lm = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
    if causal_lm in _compared or families.is_known_right(causal_lm.config):
        return None
    comparison, problem = None, ""
    try:
        try:
            comparison = compare(causal_lm, seed)
        except torch.OutOfMemoryError:  # the device is full already; the host is slower and larger
            comparison = compare(causal_lm, seed, torch.device("cpu"))
        worst, way = max(
            (comparison.packed, "packed"), (comparison.drawn, "sampled"), (comparison.training, "training")
        )
        if not worst[0] <= TOLERANCE:  # NaN is refused, too
            problem = _WAYS[way].format(median=worst[0], maximum=worst[1])
    except families.ModelRefused as error:
        problem = error.reason
    # whatever a model of an unknown type raises in code that was not written for it, from the depths of its layers
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0]
        problem = f"its forward does not run over packed groups or a cache ({type(error).__name__}: {text})"
    if c10d.is_available() and c10d.is_initialized():
        device = causal_lm.device
        dist = Distributed(c10d.get_rank(), c10d.get_world_size(), device)
        problem = next((text for text in gather_objects(problem, dist) if text), "")
    if problem:
        raise families.ModelRefused(causal_lm.config, problem)
    _compared[causal_lm] = comparison
    return comparison


_WAYS = {
    "packed": "over packed groups its log-probs differ from its own forward's by {median:.2g} nats a token in the "
    f"median ({{maximum:.2g}} at most), more than float32 rounding ({TOLERANCE:g})",
    "sampled": "log-probs of tokens sampled over a cache differ from its own forward's by {median:.2g} nats a token in "
    f"the median ({{maximum:.2g}} at most), more than float32 rounding ({TOLERANCE:g})",
    "training": "in training mode, without dropout, its log-probs differ from those in evaluation mode by {median:.2g} "
    "nats a token in the median ({maximum:.2g} at most), so the ratio of a policy to itself would not be 1",
}


def compare(causal_lm: PreTrainedModel, seed: int = 0, device: torch.device | None = None) -> Comparison:
    """Measure how far a model's packed and sampled log-probs are from its own forward's, known to be right or not.

    Args:
        device: where to; None takes the model's.

    Raises:
        Exception: whatever the model's layers raise.
    """
    # here: the sampler calls verify_model
    from grpo_core.policy import Policy, disable_dropout
    from grpo_core.rollout.sampler import GroupSampler

    model, layers = float_copy(causal_lm)
    cast(nn.Module, model).to(device or causal_lm.device)
    _compared[model] = None  # its sampler must not compare it in turn
    disable_dropout(model)
    config = model.config
    text = families.text_config(config)
    generator = torch.Generator().manual_seed(seed)
    table = cast(Tensor, model.get_input_embeddings().weight)
    special = special_tokens(config)
    ordinary = torch.tensor([i for i in range(min(text.vocab_size, len(table))) if i not in special])
    prompts: list[Prompt] = []
    for length in prompt_lengths(config):
        ids = ordinary[torch.randint(len(ordinary), (length,), generator=generator)].tolist()
        prompts.append(Prompt(f"verify-{len(prompts)}-{length}", tuple(ids)))

    policy = Policy(model)
    model.eval()
    sampler = GroupSampler(policy, _NoTokenizer(text.vocab_size), seed=seed, forbidden_tokens=sorted(special))
    groups = sampler.sample(prompts, RolloutConfig(group_size=GROUP_SIZE, max_new_tokens=NEW_TOKENS, temperature=1.0))
    layout = GroupLayout.from_groups(groups, policy.device)
    with torch.no_grad():
        packed = policy.logprobs(layout, prompts).logprob.double().cpu()
        model.train()
        training = policy.logprobs(layout, prompts).logprob.double().cpu()
        model.eval()
        # eager, which knows every model's caps and sinks; transformers' SDPA drops some of them with a warning
        model.set_attn_implementation("eager")
        own = [own_logprobs(model, group) for group in groups]
    drawn = [
        torch.cat([torch.from_numpy(completion.logprobs).double() for completion in group.completions])
        for group in groups
    ]
    sizes = [len(values) for values in own]
    return Comparison(
        model_type=config.model_type,
        layers=layers,
        longest=max(len(group.prompt.token_ids) + NEW_TOKENS for group in groups),
        packed=_difference(packed.split(sizes), own),
        drawn=_difference(drawn, own),
        training=_difference(training.split(sizes), packed.split(sizes)),
    )


def own_logprobs(model: PreTrainedModel, group: Group) -> Tensor:
    """Compute log-probs of a group's completions by `model(input_ids)`, one sequence at a time: float64 on the host."""
    rows = []
    prompt = group.prompt.token_ids
    for completion in group.completions:
        ids = torch.tensor([[*prompt, *completion.token_ids]], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.double().log_softmax(-1)
        rows.append(logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0].cpu())
    return torch.cat(rows)


def prompt_lengths(config: Any) -> list[int]:
    """Choose lengths of prompts, with `NEW_TOKENS` to come, on both sides of every threshold of a config."""
    limit, longest = families.length_limit(config), longest_sequence(config)
    most = 2**31 if longest is None else longest.tokens
    lengths = [max(1, min(length, most - NEW_TOKENS)) for length in PROMPT_LENGTHS]
    if limit is not None and limit.tokens == most and max(lengths) < most - NEW_TOKENS <= families.MOST_COMPARED:
        lengths.append(most - NEW_TOKENS)  # up to its last token, beside the short ones
    for _, tokens in families.thresholds(config):
        crossing = tokens - NEW_TOKENS // 2  # a completion crosses it
        if max(PROMPT_LENGTHS) < crossing <= most - NEW_TOKENS:
            lengths.append(crossing)
    return sorted(dict.fromkeys(lengths), key=lengths.index)


def special_tokens(config: Any) -> set[int]:
    """Collect the ids that a config names: a model may treat padding, ends and placeholders in a way of their own."""
    named: set[int] = set()
    for part in (config, families.text_config(config)):
        for key, value in part.to_dict().items():
            if "token" in key and ("_id" in key or "index" in key):
                named.update(token for token in (value if isinstance(value, list) else [value]) if type(token) is int)
    return named


def float_copy(model: PreTrainedModel) -> tuple[PreTrainedModel, int]:
    """Copy a model in float32: whole if that is small, else with the fewest first layers that hold one of each kind.

    Returns:
        The copy, on the model's device, and the number of its decoder layers.

    Raises:
        ModelRefused: the model is sharded or quantised.
    """
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise families.ModelRefused(
            model.config, "it is sharded and cannot be compared: call verify_model before fully_shard"
        )
    if getattr(model, "is_quantized", False):
        raise families.ModelRefused(
            model.config, "it is quantised, of a type that is not known, and cannot be compared"
        )
    count: int = getattr(families.text_config(model.config), "num_hidden_layers", 0)
    # the decoder's list, not a vision tower's of the same length
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    memo: dict[int, Any] = {}
    if lists and 4 * sum(parameter.numel() for parameter in model.parameters()) > WHOLE_BYTES:
        layers = max(lists, key=lambda module: sum(parameter.numel() for parameter in module.parameters()))
        kinds = [layer_kind(layer) for layer in layers]
        count = min(count, max(2, 1 + max(kinds.index(kind) for kind in kinds)))
        # deepcopy takes what memo has for an object: the other layers are never copied
        memo[id(layers)] = nn.ModuleList(copy.deepcopy(layer, memo) for layer in list(layers)[:count])
    copied = copy.deepcopy(model, memo)
    for parameter in copied.parameters():
        parameter.grad = None
        # Policy wants something to train; nothing is: no gradient is computed
        parameter.requires_grad_(parameter.is_floating_point())
    return copied.float(), count


def layer_kind(layer: nn.Module) -> tuple[Any, ...]:
    """Describe what tells a decoder layer from others: its modules' classes, their shapes, numbers, flags and names."""
    return tuple(
        (
            name,
            type(module).__name__,
            tuple((key, tuple(value.shape)) for key, value in module.named_parameters(recurse=False)),
            tuple(
                (key, value)
                for key, value in sorted(vars(module).items())
                # layers are numbered: by that alone all would differ
                if isinstance(value, bool | int | float | str) and "idx" not in key and "index" not in key
            ),
        )
        for name, module in layer.named_modules()
    )


class _NoTokenizer:
    """As many ids as the model has, no text and no end."""

    eos_token_id = None

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def decode(self, token_ids: list[int], /, *, skip_special_tokens: bool = False) -> str:
        return ""

    def batch_decode(self, sequences: list[list[int]], /) -> list[str]:
        return [""] * len(sequences)


def _difference(ours: Sequence[Tensor], own: Sequence[Tensor]) -> tuple[float, float]:
    """Return the median over tokens of the group where it is largest, and the maximum over all tokens."""
    # by group: a rotation that is wrong for the short sequences of a pack must not drown among the long ones
    differences = [(a - b).abs() for a, b in zip(ours, own, strict=True)]
    medians = torch.stack([group.median() for group in differences])
    return float(medians.max()), float(torch.cat(differences).max())
