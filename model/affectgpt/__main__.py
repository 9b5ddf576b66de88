"""`python -m affectgpt COMMAND`: the `affectgpt` command, also under torchrun (`torchrun -m affectgpt`)."""

import sys

from affectgpt.cli import main

if __name__ == "__main__":
    sys.exit(main())
