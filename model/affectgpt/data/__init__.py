"""Clips and labels on disk, media decoding, and the cache of encoder outputs."""
