"""The LM head without `[T, V]` logits: log-probs, entropy, KL and GRPO losses, from hidden states or from logits."""
