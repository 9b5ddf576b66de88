"""Options that cannot mean what they say are refused by key, before anything is loaded."""

import math
import warnings

import pytest

from grpo_core.config.fields import ConfigError
from grpo_core.config.loader import load_config
from grpo_core.config.options import GRPOConfig, OptimConfig


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max_steps", "0"), "run.max_steps is 0: set it to 1 or more"),
        (("--max_steps", "-3"), "run.max_steps is -3: set it to 1 or more"),
        (("--prompts_per_step", "0"), "run.prompts_per_step is 0: set it to 1 or more"),
        (("--eval_steps", "-1"), "run.eval_steps is -1: set it to 0 (off) or more"),
        (("--keep_checkpoints", "0"), "run.keep_checkpoints is 0: set it to 1 or more"),
        (("--lock_timeout", "-1"), "run.lock_timeout is -1.0: set it to 0 (off) or more"),
        (("--early_stopping_patience", "-1"), "run.early_stopping_patience is -1: set it to 0 (off) or more"),
        (
            ("--metric_for_best_model", "eval/f1"),
            "run.metric_for_best_model is eval/f1, and run.eval_steps is 0, so that nothing is evaluated: set "
            "run.eval_steps",
        ),
        (("--learning_rate", "-1"), "optim.learning_rate is -1.0: set it to 0 or above, and finite"),
        (("--learning_rate", ".inf"), "optim.learning_rate is inf: set it to 0 or above, and finite"),
        (("--weight_decay", "-1"), "optim.weight_decay is -1.0: set it to 0 or above, and finite"),
        (("--warmup_steps", "-1"), "optim.warmup_steps is -1: set it to 0 or above, and finite"),
        (("--betas", "0.9,1"), "optim.betas is (0.9, 1.0): set both in [0, 1)"),
        (("--eps", "0"), "optim.eps is 0.0: set it above 0, and finite"),
        (("--beta", ".inf"), "algorithm.beta is inf: set it to 0 (no reference) or above, and finite"),
        (("--max_grad_norm", "-1"), "optim.max_grad_norm is -1.0: set it to 0 (off) or above"),
        (("--run.name", "../x"), "run.name is '../x': give one plain name; its folder is made in run.output_dir"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_number_without_meaning_is_refused_with_key_value_and_limits(flags, message):
    with pytest.raises(ConfigError) as refused:
        load_config(GRPOConfig, flags)
    assert str(refused.value) == message


@pytest.mark.parametrize("rate", [5.0, 0.2, 1e6])
def test_a_learning_rate_out_of_all_proportion_is_warned_of(rate):
    with pytest.warns(UserWarning, match=rf"optim.learning_rate is {rate}: AdamW moves each weight by about that much"):
        OptimConfig(learning_rate=rate)


def test_usual_learning_rates_are_not():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rate in (0.0, 1e-6, 1e-2, 0.1):
            assert OptimConfig(learning_rate=rate).learning_rate < math.inf
