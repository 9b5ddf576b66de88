"""AffectGPT: an open-vocabulary emotion model over video, audio and subtitle."""
