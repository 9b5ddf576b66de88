"""Emotion wheels: open-vocabulary label strings scored against each other on five wheels, in whole batches."""

from .parse import parse_labels
from .score import CorpusScore, EmotionWheel, Scores
from .tables import Tables, TablesError

__all__ = ["CorpusScore", "EmotionWheel", "Scores", "Tables", "TablesError", "parse_labels"]
