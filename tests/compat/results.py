"""What became of each test, and how two runs differ.

A result is "passed", "skipped" or "failed" under the test's full name. Only a test that passed in the first run and did
not in the second is a difference.
"""

import json
from pathlib import Path


def read(path: Path) -> dict[str, str]:
    """Lines of JSON: name and result. A test that is there twice counts as its worst."""
    if not path.exists():
        raise SystemExit(f"no results in {path}: the suite did not start; its output is beside it")
    found: dict[str, str] = {}
    for name, result in map(json.loads, path.read_text().splitlines()):
        found[name] = "failed" if "failed" in (result, found.get(name)) else result
    return found


def exceptions(path: Path) -> dict[str, str]:
    """Lines of `test name: reason`; a name may end in *."""
    lines = path.read_text().splitlines() if path.exists() else []
    pairs = (line.split(": ", 1) for line in lines if line.strip() and not line.startswith("#"))
    return {name.strip(): reason for name, reason in pairs}


def matches(name: str, pattern: str) -> bool:
    return name == pattern or (pattern.endswith("*") and name.startswith(pattern[:-1]))


def report(suite: str, direct: dict[str, str], through: dict[str, str], excepted: dict[str, str]) -> bool:
    """Prints the comparison. True: every test that passed directly passed through weir, or is a listed exception."""
    passed = [name for name, result in direct.items() if result == "passed"]
    different = [name for name in passed if through.get(name) != "passed"]
    reason_of = {name: next((why for pattern, why in excepted.items() if matches(name, pattern)), None) for name in direct}
    unexplained = [name for name in different if reason_of[name] is None]
    explained = [name for name in different if reason_of[name] is not None]
    stale = [
        pattern for pattern in excepted
        if not any(matches(name, pattern) for name in different)
    ]
    print(f"\n{suite}: {len(direct)} run directly, {len(passed)} passed directly,")
    print(f"  {len(passed) - len(different)} of those passed through weir, {len(explained)} are listed exceptions,")
    print(f"  {len(unexplained)} differ")
    missing = [name for name in unexplained if name not in through]
    if missing:
        print(f"  NOT RUN   {len(missing)} tests, the first of them {missing[0]}")
    for name in unexplained:
        if name in through:
            print(f"  DIFFERS   {name} ({through[name]})")
    for name in explained:
        print(f"  exception {name}: {reason_of[name]}")
    for pattern in stale:
        print(f"  no longer an exception: {pattern}")
    return not unexplained
