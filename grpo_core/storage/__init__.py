"""Files of a run: checkpoints, metrics, completions."""
