"""Drawing tokens: from logits (`sample_row`), from hidden states (`sample_head`), and their bookkeeping."""
