"""Group sampling: prompts prefilled once per group, completions decoded together over them."""
