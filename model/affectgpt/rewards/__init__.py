"""The AffectGPT-R1 rewards (arXiv 2508.01318) and related ones, each a vectorised function over all groups of a step.

Called with N groups of G completions, a reward returns float64 `[N, G]`, NaN where it cannot judge. Importing this
package needs only NumPy, so that options are read and `--help` is printed without torch.
"""

from affectgpt.rewards.accuracy import AccuracyReward, DualReward
from affectgpt.rewards.alignment import AlignmentReward
from affectgpt.rewards.closed_labels import HitRateReward, SentimentReward
from affectgpt.rewards.config import RewardConfig, check_rewards, make_rewards
from affectgpt.rewards.format import FormatReward, has_think_answer_format, split_think_answer
from affectgpt.rewards.length import LengthPenalty
from affectgpt.rewards.perception import Comparison, Judge, PerceptionReward, bradley_terry
from affectgpt.rewards.registry import REWARDS, RewardContext, register_reward
from affectgpt.rewards.shaping import RepetitionPenalty, SoftOverlongPunishment
from affectgpt.rewards.words import EmotionWords, wordnet_lemmas

__all__ = [
    "REWARDS",
    "AccuracyReward",
    "AlignmentReward",
    "Comparison",
    "DualReward",
    "EmotionWords",
    "FormatReward",
    "HitRateReward",
    "Judge",
    "LengthPenalty",
    "PerceptionReward",
    "RepetitionPenalty",
    "RewardConfig",
    "RewardContext",
    "SentimentReward",
    "SoftOverlongPunishment",
    "bradley_terry",
    "check_rewards",
    "has_think_answer_format",
    "make_rewards",
    "register_reward",
    "split_think_answer",
    "wordnet_lemmas",
]
