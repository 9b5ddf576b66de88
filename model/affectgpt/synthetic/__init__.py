"""The embedded default: small real clips drawn and voiced by the program, and tiny models to train on them."""

from typing import TYPE_CHECKING, Any

from affectgpt.synthetic.dataset import make_dataset, read_truth, shuffle_media

if TYPE_CHECKING:
    from affectgpt.synthetic.tiny_models import TinyModels, make_tiny_models

__all__ = ["TinyModels", "make_dataset", "make_tiny_models", "read_truth", "shuffle_media"]


def __getattr__(name: str) -> Any:
    """Import the models on first use: they need torch and transformers, the processes that draw clips do not."""
    if name in ("TinyModels", "make_tiny_models"):
        from affectgpt.synthetic import tiny_models

        return getattr(tiny_models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
