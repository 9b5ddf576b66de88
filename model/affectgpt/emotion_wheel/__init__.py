"""Emotion wheels: open-vocabulary label strings scored against each other on five wheels, in whole batches."""

from affectgpt.emotion_wheel.parse import distinct_labels, parse_labels
from affectgpt.emotion_wheel.score import CorpusScore, EmotionWheel, Scores
from affectgpt.emotion_wheel.tables import Tables, TablesError

__all__ = ["CorpusScore", "EmotionWheel", "Scores", "Tables", "TablesError", "distinct_labels", "parse_labels"]
