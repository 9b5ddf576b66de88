"""Decoders: plain torch (`torch`), Triton kernels (`triton`), and any causal LM (`transformers`)."""
