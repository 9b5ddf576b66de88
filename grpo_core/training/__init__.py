"""The training loops: the GRPO step (`grpo`), supervised training (`sft`), and what surrounds a step (`loop`)."""
