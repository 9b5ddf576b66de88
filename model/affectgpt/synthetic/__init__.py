"""The embedded default: small real clips drawn and voiced by the program, and tiny models to train on them."""

from affectgpt.synthetic.dataset import make_dataset, read_truth, shuffle_media

__all__ = ["make_dataset", "read_truth", "shuffle_media"]
