"""Score a model on a labelled set: the same as `affectgpt evaluate`; see `--help`."""

import sys

from affectgpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
