"""Images per second of one training epoch: the suite's first section with a batch size of one's own.

    python benchmarks/epoch.py --data mnist --data-dir ../shared/data/mnist

Every row trains the same VAE (784-400-50, softplus, dynamic binarisation, Adam 1e-3) in a
process of its own. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json

import suite
from peers import Problem
from rounds import Group, run_group
from sections import epoch_rows, objective_rows
from summary import describe, heading, machine, rates_table, summarise_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    suite.common_arguments(parser)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5, help="timed epochs of each row")
    parser.add_argument("--images", type=int, default=60_000, help="train on the first ... images")
    parser.add_argument("--rows", nargs="+", help="only these rows")
    args = parser.parse_args()
    if min(args.rounds, args.batch_size, args.threads) < 1 or args.images < args.batch_size:
        parser.error("wanted --rounds, --batch-size, --threads >= 1 and --images >= --batch-size.")
    rows = epoch_rows(args.device) + objective_rows(args.device)
    unknown = set(args.rows or ()) - {row.key for row in rows}
    if unknown:
        parser.error(f"no row {', '.join(sorted(unknown))}; there are {', '.join(row.key for row in rows)}.")
    pixels = suite.load_pixels(args)
    problem = Problem(batch_size=args.batch_size, device=args.device)
    group = suite.adapted(Group(f"batch {args.batch_size}", problem, rows, args.images, args.rounds), args, len(pixels))
    setup = machine(args.threads, args.device) | {"data": args.data, "seed": args.seed}
    print(heading(setup))
    print(f"{args.data}, {group.images:,} images, {problem}, {group.title}, dynamic binarisation, Adam 1e-3; "
          f"{group.warm_up} warm-up epochs, then {group.rounds} interleaved rounds\n", flush=True)  # fmt: skip
    results = summarise_all(run_group(group, pixels, args.threads, args.workers, say=suite.say))
    print(rates_table(results, group.value))
    if args.json is not None:
        args.json.write_text(json.dumps({"setup": setup} | describe(group) | {"rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
