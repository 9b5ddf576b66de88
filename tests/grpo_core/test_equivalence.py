"""One step is one number, however it is computed: split, distributed, packed, cached or fused; and a curve is kept.

`python -m tests.grpo_core.test_equivalence` writes the curve anew, after a change that is meant to move it.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo_core.distributed.collectives import all_reduce_gradients
from grpo_core.policy import LogProbs, Policy
from grpo_core.training.grpo import GRPOTrainer, Rollout
from grpo_core.types import Group

from .toy import make_trainer

OPTIONS = {
    "beta": 0.05,
    "entropy_coef": 0.01,
    "temperature": 0.8,
    "prompts_per_step": 5,
    "group_size": 4,
    "max_new_tokens": 8,
}
GOLDEN = Path(__file__).with_name("golden_curve.json")
CURVE = ("loss", "reward", "kl", "grad_norm", "entropy")


def prepare(trainer: GRPOTrainer, live_reference: bool = False, dense: bool = False) -> Rollout:
    """A rollout ready for its update, and a policy that has moved since it was sampled, as in a later pass.

    So ratios are not 1, some are clipped, and the KL is not 0. The move is a fixed draw, the same everywhere.
    """
    groups = trainer.sample(trainer.next_prompts())
    trainer.score(groups)
    rollout = trainer.pack(groups)
    trainer.compare(groups, rollout)
    if dense:
        rollout = [[trainer.micro_batch(copies(groups), 20, rollout[0][0].total_tokens)]]
        for batch in rollout[0]:
            batch.advantages = batch.layout.per_token(np.concatenate([group.advantages for group in batch.groups]))
    for batch in rollout[0]:
        with torch.no_grad():
            batch.old_logprob = trainer.policy.logprobs(batch.layout, batch.prompts, temperature=0.8).logprob
    if not live_reference:
        trainer.reference(rollout)
    generator = torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.parameters.values():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    if live_reference:
        trainer.reference(rollout)
    return rollout


def copies(groups: list[Group]) -> list[Group]:
    """Every completion as a group of its own, with its own copy of the prompt and its group's verdict."""
    return [
        Group(group.prompt, [completion], advantages=group.advantages[i : i + 1])
        for group in groups
        for i, completion in enumerate(group.completions)
    ]


def step(trainer: GRPOTrainer, rollout: Rollout) -> tuple[float, float, torch.Tensor]:
    """Loss, gradient norm and gradient of the rollout's update, over all ranks."""
    trainer.optimizer_step = lambda *_: all_reduce_gradients(trainer.parameters.values(), trainer.dist)
    trainer.update(rollout[0], 0)
    return trainer.report(0.0)["loss"], *gradient(trainer)


def gradient(trainer: GRPOTrainer) -> tuple[float, torch.Tensor]:
    flat = torch.cat([p.grad.flatten() for p in trainer.parameters.values()])
    return flat.norm().item(), flat


def assert_same(result, expected) -> None:
    (loss, norm, flat), (expected_loss, expected_norm, expected_flat) = result, expected
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert norm == pytest.approx(expected_norm, rel=1e-5)
    assert (flat - expected_flat).norm() <= 1e-5 * expected_norm


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """The step in one process and one micro-batch."""
    trainer = make_trainer(tmp_path_factory.mktemp("usual"), **OPTIONS)
    rollout = prepare(trainer)
    assert [len(batch.groups) for batch in rollout[0]] == [5]
    result = step(trainer, rollout)
    assert abs(result[0]) > 1e-2
    assert result[1] > 1e-2
    return result


@pytest.mark.parametrize(("budget", "count"), [(1, 5), (80, 3)])
def test_micro_batches_and_accumulation(tmp_path, usual, budget, count):
    trainer = make_trainer(tmp_path, max_tokens_per_micro_batch=budget, **OPTIONS)
    rollout = prepare(trainer)
    assert len(rollout[0]) == count
    assert_same(step(trainer, rollout), usual)


WORKER = """
import sys
sys.path.insert(0, {root!r})
from tests.grpo_core.test_equivalence import work
work({folder!r})
"""


def work(folder: str) -> None:
    """What one of several ranks does: its share of the step."""
    from grpo_core import distributed

    dist = distributed.init("cpu")
    trainer = make_trainer(Path(folder), dist=dist, **OPTIONS)
    loss, norm, flat = step(trainer, prepare(trainer))
    result = {"loss": torch.tensor(loss, dtype=torch.float64), "norm": torch.tensor(norm), "gradient": flat}
    save_file(result, f"{folder}/rank{dist.rank}.safetensors")
    distributed.finalize(dist)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks(tmp_path, usual, ranks):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(Path(__file__).parents[2]), folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", str(script)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    for rank in range(ranks):
        result = load_file(tmp_path / f"rank{rank}.safetensors")
        assert_same((result["loss"].item(), result["norm"].item(), result["gradient"]), usual)


def test_packed_with_shared_prompts_and_separate_padded_sequences(tmp_path, usual):
    """Transformers' own attention over padded sequences, plain log-softmax, and the loss as its papers write it."""
    trainer = make_trainer(tmp_path, **OPTIONS)
    (batch,) = prepare(trainer)[0]
    members = copies(batch.groups)
    logprob, entropy = padded(trainer.policy.causal_lm, members, temperature=0.8)
    ratio = (logprob - batch.old_logprob).exp()
    advantage = torch.cat([torch.full((len(m.completions[0].token_ids),), float(m.advantages[0])) for m in members])
    low, high = trainer.algorithm.loss.clip_range
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    assert (surrogate < ratio * advantage).any()  # some tokens are clipped
    log_ratio = batch.reference_logprob - logprob
    kl = log_ratio.exp() - log_ratio - 1
    loss = (-surrogate + 0.05 * kl).mean() - 0.01 * entropy.mean()
    loss.backward()
    assert_same((loss.item(), *gradient(trainer)), usual)


def padded(model, members: list[Group], temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies `[R]` of right-padded sequences, each with its own prompt."""
    rows = [(m.prompt.token_ids, m.completions[0].token_ids) for m in members]
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.tensor([[*p, *c] + [0] * (width - len(p) - len(c)) for p, c in rows])
    mask = torch.tensor([[1] * (len(p) + len(c)) + [0] * (width - len(p) - len(c)) for p, c in rows])
    model.set_attn_implementation("eager")
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits / temperature
    scores = torch.log_softmax(logits, -1)
    places = [(i, len(p) - 1 + t, token) for i, (p, c) in enumerate(rows) for t, token in enumerate(c)]
    row, position, token = (torch.tensor(column) for column in zip(*places, strict=True))
    chosen = scores[row, position]
    return chosen.gather(1, token[:, None])[:, 0], -(chosen.exp() * chosen).sum(1)


def test_shared_prompts_and_a_copy_for_every_completion(tmp_path, usual):
    trainer = make_trainer(tmp_path, **OPTIONS)
    rollout = prepare(trainer, dense=True)
    assert rollout[0][0].layout.num_completions == len(rollout[0][0].groups) == 20
    assert_same(step(trainer, rollout), usual)


def test_reference_before_and_after_the_policy_moved(tmp_path, usual):
    trainer = make_trainer(tmp_path, **OPTIONS)
    assert_same(step(trainer, prepare(trainer, live_reference=True)), usual)


class PlainHead(Policy):
    """The same policy with all its logits in memory."""

    def logprobs(self, layout, prompts, *, temperature=1.0, entropy=False, reference_hidden=None):
        hidden = self.hidden_states(layout, prompts)
        scores = torch.log_softmax(self.causal_lm.get_output_embeddings()(hidden) / temperature, -1)
        return LogProbs(scores.gather(1, layout.target_ids[:, None])[:, 0], -(scores.exp() * scores).sum(1))


def test_fused_head_and_plain_log_softmax(tmp_path, usual):
    trainer = make_trainer(tmp_path, **OPTIONS)
    trainer.policy.__class__ = PlainHead
    assert_same(step(trainer, prepare(trainer)), usual)


def curves(folder: Path) -> dict[str, dict[str, list[float]]]:
    """The golden runs: 10 steps of two passes with a KL penalty, of adapters and of all weights."""
    result = {}
    for name, lora in (("lora", True), ("full", False)):
        make_trainer(folder / name, steps=10, beta=0.05, num_iterations=2, group_size=8, lora=lora).train()
        rows = [json.loads(line) for line in (folder / name / "toy" / "metrics.jsonl").read_text().splitlines()]
        result[name] = {key: [row[key] for row in rows] for key in CURVE}
    return result


def test_the_curve_is_the_one_that_is_kept(tmp_path):
    """Rewards count sampled tokens, which do not depend on rounding, so they are equal. The rest goes through 20 Adam
    steps, whose first ones divide a gradient by its own size: another CPU's rounding (1e-7) grows to some 1e-5."""
    golden, now = json.loads(GOLDEN.read_text()), curves(tmp_path)
    for name, curve in golden.items():
        assert now[name]["reward"] == pytest.approx(curve["reward"], rel=1e-12)
        for key in CURVE:
            assert now[name][key] == pytest.approx(curve[key], rel=1e-3, abs=1e-6), (name, key)
        assert curve["kl"][-1] > 1e-3


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(json.dumps(curves(Path(folder)), indent=1) + "\n")
    print(GOLDEN)
