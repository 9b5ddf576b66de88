"""Attention over groups: packed training and prefill (`group_attention`), decoding (`group_decode_attention`)."""
