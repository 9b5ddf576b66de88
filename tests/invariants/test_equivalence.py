"""One step is one number, however it is computed: split, distributed, packed, cached or fused; and a curve is kept.

`python -m tests.invariants.test_equivalence` writes the curve anew, after a change that is meant to move it.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo_core.policy import LogProbs, Policy
from grpo_core.training.batch import Experience, OldPass, make_minibatches
from grpo_core.training.grpo import GRPOTrainer
from grpo_core.types import Completion, Group, Prompt
from tests.grpo_core.toy import loss_and_gradient, make_trainer

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


def prepare(trainer: GRPOTrainer, live_reference: bool = False, dense: bool = False) -> Experience:
    """Experience ready for its update, and a policy that has moved since it was sampled, as in a later pass.

    So ratios are not 1, some are clipped, and the KL is not 0. The move is a fixed draw, the same everywhere.
    """
    experience = trainer.collect()
    if dense:
        experience = copies(trainer, experience)
    batches = [batch for minibatch in experience.minibatches for batch in minibatch]
    with torch.no_grad():
        logprobs = [trainer.policy.logprobs(b.layout, b.prompts, temperature=0.8).logprob for b in batches]
    experience = experience._replace(old={b: OldPass(l) for b, l in zip(batches, logprobs, strict=True)})
    if not live_reference:
        experience = experience._replace(reference=trainer.reference_values(experience.minibatches))
    generator = torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.parameters.values():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    if live_reference:
        experience = experience._replace(reference=trainer.reference_values(experience.minibatches))
    return experience


def copies(trainer: GRPOTrainer, experience: Experience) -> Experience:
    """Every completion as a group of its own, with its own copy of the prompt and its group's verdict."""
    groups = [Group(group.prompt, [completion]) for group in experience.groups for completion in group.completions]
    config = replace(trainer.config, optim=replace(trainer.config.optim, max_tokens_per_micro_batch=10**6))
    positions = [0] * len(groups)  # all in the step's only minibatch
    minibatches = make_minibatches(groups, positions, config, trainer.dist, trainer.policy.device)
    scores = replace(experience.scores, total=experience.scores.total.reshape(-1, 1))
    scores = replace(scores, by_reward=scores.by_reward.reshape(len(scores.names), -1, 1))
    advantages = experience.advantages.reshape(-1, 1)
    return experience._replace(
        groups=groups, scores=scores, positions=positions, minibatches=minibatches, advantages=advantages
    )


def step(trainer: GRPOTrainer, experience: Experience) -> tuple[float, float, torch.Tensor]:
    """Loss, gradient norm and gradient of the experience's update, over all ranks."""
    loss, flat = loss_and_gradient(trainer, experience)
    return loss, flat.norm().item(), flat


def assert_same(result, expected) -> None:
    (loss, norm, flat), (expected_loss, expected_norm, expected_flat) = result, expected
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert norm == pytest.approx(expected_norm, rel=1e-5)
    assert (flat - expected_flat).norm() <= 1e-5 * expected_norm


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """The step in one process and one micro-batch."""
    trainer = make_trainer(tmp_path_factory.mktemp("usual"), **OPTIONS)
    experience = prepare(trainer)
    assert [len(batch.groups) for batch in experience.minibatches[0]] == [5]
    result = step(trainer, experience)
    assert abs(result[0]) > 1e-2
    assert result[1] > 1e-2
    return result


@pytest.mark.parametrize(("budget", "count"), [(1, 5), (80, 3)])
def test_micro_batches_and_accumulation(tmp_path, usual, budget, count):
    trainer = make_trainer(tmp_path, max_tokens_per_micro_batch=budget, **OPTIONS)
    experience = prepare(trainer)
    assert len(experience.minibatches[0]) == count
    assert_same(step(trainer, experience), usual)


WORKER = """
import sys
sys.path.insert(0, {root!r})
from tests.invariants.test_equivalence import work
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
    experience = prepare(trainer)
    ((batch,),) = experience.minibatches
    members = [(batch.groups[n].prompt, c) for n in range(5) for c in batch.groups[n].completions]
    logprob, entropy = padded(trainer.policy.causal_lm, members, temperature=0.8)
    ratio = (logprob - experience.old[batch].logprob).exp()
    verdicts = zip(members, experience.advantages.ravel(), strict=True)
    advantage = torch.cat([torch.full((len(completion.token_ids),), float(a)) for (_, completion), a in verdicts])
    low, high = trainer.config.algorithm.loss.clip_range
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    assert (surrogate < ratio * advantage).any()  # some tokens are clipped
    log_ratio = experience.reference[batch] - logprob
    kl = log_ratio.exp() - log_ratio - 1
    loss = (-surrogate + 0.05 * kl).mean() - 0.01 * entropy.mean()
    loss.backward()
    flat = torch.cat([p.grad.flatten() for p in trainer.parameters.values()])
    assert_same((loss.item(), flat.norm().item(), flat), usual)


def padded(model, members: list[tuple[Prompt, Completion]], temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies `[R]` of right-padded sequences, each with its own prompt."""
    rows = [(prompt.token_ids, completion.token_ids) for prompt, completion in members]
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
    experience = prepare(trainer, dense=True)
    ((batch,),) = experience.minibatches
    assert batch.layout.num_completions == len(batch.groups) == 20
    assert_same(step(trainer, experience), usual)


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
