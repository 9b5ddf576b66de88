"""Rebuild the project's tables from the command line: `affectgpt wheel build --wordnet FOLDER`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from affectgpt.emotion_wheel.build import build_tables
from affectgpt.emotion_wheel.score import DEFAULT_TABLES
from affectgpt.emotion_wheel.tables import TablesError, save_tables


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="affectgpt wheel", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser(
        "build", help="build the tables from data/wheels.yaml, data/lexicon.txt and WordNet 3.0"
    )
    build.add_argument("--wordnet", type=Path, required=True, help="WordNet database folder, e.g. /usr/share/wordnet")
    build.add_argument("--out", type=Path, default=DEFAULT_TABLES, help="file to write (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        tables = build_tables(args.wordnet)
        save_tables(tables, args.out)
    except TablesError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    counts = " ".join(
        f"{name}={n}" for name, n in zip(tables.names, (tables.clusters[0] >= 0).sum(axis=1), strict=True)
    )
    print(f"{args.out}: {len(tables.words)} word forms, {tables.base.sum()} base words; on the wheels: {counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
