"""AffectGPT-R1: the same as `affectgpt train`; see `--help`."""

import sys

from affectgpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
