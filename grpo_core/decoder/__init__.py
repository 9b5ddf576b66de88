"""The decode side of the engine: prompts prefilled once per group, their completions decoded together over them."""

from grpo_core.decoder.base import Decoder, check_lengths, make_decoder
from grpo_core.decoder.choice import TokenChooser
from grpo_core.decoder.drawing import DrawRules
from grpo_core.decoder.rollout import Rollout, timed
from grpo_core.decoder.stopping import StopConditions

__all__ = [
    "Decoder",
    "DrawRules",
    "Rollout",
    "StopConditions",
    "TokenChooser",
    "check_lengths",
    "make_decoder",
    "timed",
]
