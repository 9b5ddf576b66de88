"""Name the emotions of clips: the same as `affectgpt predict`; see `--help`."""

import sys

from affectgpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
