"""Supervised training of AffectGPT: the same as `affectgpt sft`; see `--help`."""

import sys

from affectgpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["sft", *sys.argv[1:]]))
