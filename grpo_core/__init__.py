"""GRPO Core: group-relative policy optimisation in one process per GPU."""
