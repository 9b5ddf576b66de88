"""Options that cannot be meant together are refused with the config."""

import pytest

from affectgpt.config import R1Config
from affectgpt.rewards import RewardConfig


def test_unknown_and_impossible_rewards_are_refused_with_the_config():
    with pytest.raises(ValueError, match=r"reward.names has 'speed', which is not a reward: choose among .*accuracy"):
        R1Config(reward=RewardConfig(names=("speed",)))
    with pytest.raises(ValueError, match="judges think and answer tags"):
        R1Config(reward=RewardConfig(names=("accuracy", "format")))
