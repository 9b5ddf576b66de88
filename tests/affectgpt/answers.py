"""Groups of given answers, as rewards and evaluation get them."""

import numpy as np
from hypothesis import strategies as st

from affectgpt.data.datasets import Sample
from affectgpt.emotion_wheel import EmotionWheel
from grpo_core.types import Completion, Group, Prompt

WHEEL = EmotionWheel.default()

LABELS = ("happy", "joyful", "sad", "angry", "worried", "surprised", "proud", "zorp", "calm", "Annoyed")
texts = st.lists(st.sampled_from(LABELS), max_size=6).map(", ".join)
thoughts = st.lists(st.sampled_from([*LABELS, "the man", "smiles.", "</think>", "so"]), max_size=8).map(" ".join)
answers = st.builds("<think>{}</think><answer>{}</answer>".format, thoughts, texts) | texts | thoughts


def sample(name: str, labels: str | None) -> Sample:
    return Sample(name, None, None, None, labels=labels)


def group(labels: str | None, *texts: str, tokens: int = 1) -> Group:
    completions = [Completion((1,) * tokens, np.zeros(tokens, np.float32), "stop", text) for text in texts]
    return Group(Prompt("p", (1,), sample=Sample("p", None, None, None, labels=labels)), completions)


def think(thought: str, answer: str) -> str:
    return f"<think> {thought} </think> <answer> {answer} </answer>"


class Ranking:
    """A judge with a known order of answers, which remembers what it was asked."""

    def __init__(self, *order: str):
        self.order, self.asked = order, []

    def __call__(self, comparisons):
        self.asked += [(c.first, c.second) for c in comparisons]
        rank = self.order.index
        return np.array([0.5 if a == b else float(rank(a) < rank(b)) for a, b in self.asked[-len(comparisons) :]])
