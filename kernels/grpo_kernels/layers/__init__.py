"""Elementwise operations of a decoder layer: RMS norm, rotary embedding with cache append, SwiGLU."""
