"""Options of a run: the dataclasses (`options`) and their reader for YAML and the command line (`loader`)."""
