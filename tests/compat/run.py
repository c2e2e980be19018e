#!/usr/bin/env python3
"""Runs a Python driver's own test suite directly against Postgres and through weir, and compares test by test.

    tests/compat/run.py asyncpg
    tests/compat/run.py psycopg --tree ~/src/psycopg
    tests/compat/run.py django --only weir -- transactions

See README.md beside this file. Needs Python 3.11 and the server programs of Postgres; nothing else but this directory's
own modules and what pip installs into a virtual environment below the work directory.
"""

import argparse
import os
import sys
from pathlib import Path

import results
import suites
from tier import Tier

ROOT = Path(__file__).resolve().parents[2]
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s SUITE [options] [-- TEST ...]", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=[*suites.SUITES, "all"])
    parser.add_argument("--tree", type=Path, help="sources with the tests, instead of the package registry's archive")
    parser.add_argument("--weir", type=Path, help="the weir binary; default: the newest build")
    parser.add_argument("--only", choices=["direct", "weir"], help="run one side; the other side's last results are kept")
    parser.add_argument("--work", type=Path, default=TARGET / "compat", help="where everything is put")
    parser.add_argument("--seconds-max", type=int, default=1800, help="longest time for one side of one suite")
    ours = sys.argv[1:]
    if "--" in ours:
        ours = ours[: ours.index("--")]
    arguments = parser.parse_args(ours)
    arguments.chosen = sys.argv[len(ours) + 2 :]
    names = list(suites.SUITES) if arguments.suite == "all" else [arguments.suite]
    return 0 if all([compare(suites.SUITES[name], arguments) for name in names]) else 1


def compare(suite: suites.Suite, arguments: argparse.Namespace) -> bool:
    work = arguments.work.absolute()
    python = suites.environment_for(suite, work)
    tree = suites.tree_of(suite, arguments.tree, python, work)
    found = work / "results"
    found.mkdir(parents=True, exist_ok=True)
    kind = ".part" if arguments.chosen else ""
    outcomes = {}
    for side in ("direct", "weir"):
        path = found / f"{suite.name}.{side}{kind}"
        if arguments.only in (None, side):
            path.unlink(missing_ok=True)
            binary = weir_binary(arguments.weir) if side == "weir" else None
            log = path.with_name(path.name + ".log")
            print(f"{suite.name}: {'through weir' if binary else 'directly'}; output in {log}", flush=True)
            with Tier(binary) as tier:
                run = suites.Run(python, tree, tier.endpoint, path, arguments.chosen)
                code = suites.run(suite, run, log, arguments.seconds_max)
                if code < 0:
                    print(f"  ended by signal {-code}: what it had not got to counts as not run")
                for server in ("postgres", "weir"):
                    path.with_name(f"{path.name}.{server}.log").write_text(tier.log_tail(server, 20000))
        if path.exists() or arguments.only in (None, side):
            outcomes[side] = results.read(path)
    if len(outcomes) < 2:
        passed = sum(result == "passed" for result in next(iter(outcomes.values())).values())
        print(f"{suite.name}: {passed} passed; nothing to compare with yet")
        return True
    excepted = results.exceptions(Path(__file__).parent / "exceptions" / f"{suite.name}.txt")
    return results.report(suite.name, outcomes["direct"], outcomes["weir"], excepted)


def weir_binary(given: Path | None) -> Path:
    built = [path for path in (TARGET / "release" / "weir", TARGET / "debug" / "weir") if path.exists()]
    if given is None and not built:
        raise SystemExit("no weir has been built: cargo build --release -p weir, or give --weir")
    return (given or max(built, key=lambda path: path.stat().st_mtime)).absolute()


if __name__ == "__main__":
    raise SystemExit(main())
