"""The paper's ablation table on synthetic clips: the same as `affectgpt ablations`; see `--help`."""

import sys

from affectgpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["ablations", *sys.argv[1:]]))
