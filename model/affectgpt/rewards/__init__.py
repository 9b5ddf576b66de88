"""The AffectGPT-R1 rewards (arXiv 2508.01318) and their kin, each a vectorised function over all groups of a step.

Called with N groups of G completions, a reward gives float64 `[N, G]`, NaN where it cannot judge.
"""

from .accuracy import AccuracyReward, DualReward
from .alignment import AlignmentReward
from .closed_labels import HitRateReward, SentimentReward
from .config import REWARDS, RewardConfig, make_rewards
from .format import FormatReward, has_think_answer_format, split_think_answer
from .length import LengthPenalty
from .perception import Comparison, Judge, PerceptionReward, bradley_terry
from .shaping import RepetitionPenalty, SoftOverlongPunishment
from .words import EmotionWords, wordnet_lemmas

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
    "SentimentReward",
    "SoftOverlongPunishment",
    "bradley_terry",
    "has_think_answer_format",
    "make_rewards",
    "split_think_answer",
    "wordnet_lemmas",
]
