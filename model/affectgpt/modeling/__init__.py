"""The emotion model: an LLM with adapters, fusion layers, and the frozen encoders."""
