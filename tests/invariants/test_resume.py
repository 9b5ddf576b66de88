"""A resumed run is the uninterrupted run, bit for bit."""

import pytest
import torch

from tests.grpo_core.toy import lines, make_trainer, weights

RESUMED = {
    "plain": {},
    "beta-mu2": {"beta": 0.05, "num_iterations": 2},
    "parts": {"steps_per_generation": 2, "num_iterations": 2},
    "moving-reference": {"beta": 0.1, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5},
    "adaptive": {"beta": 0.1, "kl_target": 0.001, "kl_horizon": 32, "entropy_coef": 0.01, "entropy_target": 4.4},
}


@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(tmp_path, options):
    whole = make_trainer(tmp_path / "whole", steps=6, save_steps=3, **options)
    whole.train()
    killed = make_trainer(tmp_path / "parts", steps=6, save_steps=3, **options)
    step = killed.step

    def die_in_the_fifth_step():
        if killed.step_index == 4:
            raise KeyboardInterrupt
        return step()

    killed.step = die_in_the_fifth_step
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = make_trainer(tmp_path / "parts", steps=6, save_steps=3, **options)
    resumed.train()
    assert torch.equal(weights(resumed), weights(whole))

    def read(part, name):
        rows = lines(tmp_path / part / "toy" / name)
        return [
            {
                key: row[key]
                for key in row
                if not key.startswith("time/") and "step_time" not in key and "second" not in key
            }
            for row in rows
        ]

    for name in ("metrics.jsonl", "completions.jsonl"):
        assert read("parts", name) == read("whole", name)
