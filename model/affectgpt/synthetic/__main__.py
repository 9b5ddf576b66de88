"""`python -m affectgpt.synthetic make FOLDER`: the embedded clips from the command line, and what scores they allow."""

from __future__ import annotations

import argparse
from pathlib import Path

from affectgpt.synthetic.dataset import film_part, make_dataset


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m affectgpt.synthetic", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="make clips in the MER2025 layout")
    make.add_argument("folder", type=Path)
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("--train", type=int, default=400)
    make.add_argument("--test", type=int, default=150)
    make.add_argument("--workers", type=int, default=2)
    part = commands.add_parser("film", help="film one part of a folder's scripts (what `make` starts in parallel)")
    part.add_argument("folder", type=Path)
    part.add_argument("part", type=int)
    part.add_argument("parts", type=int)
    args = parser.parse_args()
    if args.command == "make":
        print(make_dataset(args.folder, seed=args.seed, train=args.train, test=args.test, workers=args.workers))
    else:
        film_part(args.folder, args.part, args.parts)


if __name__ == "__main__":
    main()
