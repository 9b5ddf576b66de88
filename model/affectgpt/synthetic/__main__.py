"""Make the embedded clips and models from the command line: `affectgpt synthetic make FOLDER`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from affectgpt.synthetic.dataset import film_part, make_dataset


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(prog="affectgpt synthetic", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="make clips in the MER2025 layout")
    make.add_argument("folder", type=Path)
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("--train", type=int, default=400)
    make.add_argument("--test", type=int, default=450)
    make.add_argument("--workers", type=int, default=2)
    film = commands.add_parser("film", help="film one worker's share of a folder's scripts (started by `make`)")
    film.add_argument("folder", type=Path)
    film.add_argument("worker", type=int)
    film.add_argument("workers", type=int)
    models = commands.add_parser("models", help="make the tiny LLM, CLIP and HuBERT")
    models.add_argument("folder", type=Path)
    models.add_argument("--seed", type=int, default=0)
    encoders = commands.add_parser("encoders", help="make CLIP and HuBERT only (started by `models`)")
    encoders.add_argument("folder", type=Path)
    encoders.add_argument("--seed", type=int, default=0)
    scores = commands.add_parser("ceiling", help="held-out scores of the best possible and of constant answers")
    scores.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    match args.command:  # torch is imported only by the commands that need it
        case "make":
            print(make_dataset(args.folder, seed=args.seed, train=args.train, test=args.test, workers=args.workers))
        case "film":
            film_part(args.folder, args.worker, args.workers)
        case "models":
            from affectgpt.synthetic.tiny_models import make_tiny_models

            print(*make_tiny_models(args.folder, seed=args.seed), sep="\n")
        case "encoders":
            from affectgpt.synthetic.tiny_models import make_encoder_folders

            make_encoder_folders(args.folder, args.seed)
        case "ceiling":
            from affectgpt.synthetic.ceiling import report

            print(report(args.folder))


if __name__ == "__main__":
    main()
