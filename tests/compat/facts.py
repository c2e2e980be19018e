#!/usr/bin/env python3
"""Compares what weir learns of a statement with what Postgres's own grammar says of it.

    tests/compat/facts.py DIRECTORY...     with .sql files, such as src/test/regress/sql of Postgres's sources

Each SELECT, VALUES, INSERT, UPDATE and DELETE of the files is read by libpg_query (through pglast, from the Python package
index, in a virtual environment below the target directory) and by weir's Facts (the example `facts` of weir-core). What weir does not
parse it treats as unknown, which is safe; of what it does parse it must see every table, every write, every function, and every row lock. What it
overlooks is printed, and is the exit status. Needs Python 3.11 and cargo.
"""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
PGLAST = "pglast==7.22"
#: What the grammar makes of LIKE … ESCAPE and SIMILAR TO: functions of pg_catalog, immutable.
SYNTAX = {"like_escape", "similar_to_escape"}


def main() -> int:
    try:
        import pglast  # noqa: F401
    except ImportError:
        return in_environment()
    files = [file for name in sys.argv[1:] for file in ([Path(name)] if Path(name).is_file() else sorted(Path(name).rglob("*.sql")))]
    if not files:
        print(__doc__)
        return 2
    statements = list(dict.fromkeys(one for file in files for one in statements_of(file)))
    lines = learnt(statements)
    counts, overlooked = Counter(), []
    for (sql, seen), line in zip(statements_seen(statements), lines, strict=True):
        if seen is None:
            continue
        counts["statements"] += 1
        kind, *fields = line.split("\t")
        if kind == "unparsed":
            counts[f"not parsed: {fields[0]}"] += 1
            continue
        counts["parsed"] += 1
        missing = compared(seen, fields)
        if missing:
            overlooked.append((sql, missing))
    print(f"{counts['statements']} statements, {counts['parsed']} parsed by weir, {len(overlooked)} of them with something overlooked")
    for what, count in counts.most_common():
        if what.startswith("not parsed"):
            print(f"  {count:6} {what}")
    for sql, missing in overlooked:
        print(f"\n{missing}\n  {' '.join(sql.split())[:400]}")
    return 1 if overlooked else 0


def in_environment() -> int:
    """Runs this again where pglast is installed."""
    home = TARGET / "compat" / "facts-venv"
    python = home / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", PGLAST], check=True)
    return subprocess.run([python, __file__, *sys.argv[1:]]).returncode


def statements_of(file: Path):
    """The statements of a psql script, without psql's own commands, its variables, and the data of COPY."""
    import pglast

    kept, copying = [], False
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        if copying:
            copying = line != "\\."
        elif re.match(r"\s*copy\b.*\bfrom\s+stdin\b", line, re.IGNORECASE):
            copying = True
        elif not line.lstrip().startswith("\\"):
            kept.append(re.sub(r"\\(g|gset|gexec|gdesc|crosstabview|;).*$", ";", line))
    text = "\n".join(kept).replace("\0", "")
    try:
        parts = pglast.split(text, with_parser=False)
    except pglast.Error:
        # Somewhere a quote is left open on purpose.
        parts = re.split(r";\s*\n", text)
    for part in parts:
        if part.strip():
            yield part.strip()


def learnt(statements):
    """What weir says, a line for each."""
    command = ["cargo", "run", "-q", "-p", "weir-core", "--example", "facts"]
    fed = "\0".join(statements).encode()
    return subprocess.run(command, cwd=ROOT, input=fed, stdout=subprocess.PIPE, check=True).stdout.decode().splitlines()


def statements_seen(statements):
    for sql in statements:
        yield sql, seen_in(sql)


class Seen:
    def __init__(self):
        self.read, self.written, self.functions = Counter(), Counter(), set()
        self.locks = False


def seen_in(sql):
    """What the grammar sees; None for what is not ours to compare."""
    import pglast
    from pglast import ast

    try:
        parsed = pglast.parse_sql(sql)
    except (pglast.Error, UnicodeDecodeError):
        return None
    if len(parsed) != 1:
        return None
    statement = parsed[0].stmt
    if not isinstance(statement, (ast.SelectStmt, ast.InsertStmt, ast.UpdateStmt, ast.DeleteStmt)):
        return None
    if isinstance(statement, ast.SelectStmt) and statement.intoClause:
        return None
    seen = Seen()
    walk(statement, frozenset(), seen)
    return seen


def walk(node, ctes, seen):
    """Collects tables that are not names of WITH, by the rules of where such names are visible."""
    from pglast import ast

    if isinstance(node, (list, tuple)):
        for one in node:
            walk(one, ctes, seen)
        return
    if not isinstance(node, ast.Node):
        return
    writing = (ast.InsertStmt, ast.UpdateStmt, ast.DeleteStmt, ast.MergeStmt)
    if isinstance(node, (ast.SelectStmt, *writing)) and node.withClause:
        names = [cte.ctename for cte in node.withClause.ctes]
        for index, cte in enumerate(node.withClause.ctes):
            visible = names if node.withClause.recursive else names[:index]
            walk(cte, ctes | set(visible), seen)
        ctes = ctes | set(names)
    if isinstance(node, writing):
        seen.written[node.relation.relname] += 1
    if isinstance(node, ast.SelectStmt) and node.lockingClause:
        seen.locks = True
    if isinstance(node, ast.RangeVar):
        if node.schemaname or node.relname not in ctes:
            seen.read[node.relname] += 1
        return
    if isinstance(node, ast.MultiAssignRef) and node.colno > 1:
        # The same source again, for the next column.
        return
    if isinstance(node, ast.FuncCall) and node.funcformat.name != "COERCE_SQL_SYNTAX":
        seen.functions.add(node.funcname[-1].sval)
    seen_already = {"withClause", "lockedRels"}
    if isinstance(node, writing):
        seen_already.add("relation")
    for name in node:
        if name not in seen_already:
            walk(getattr(node, name), ctes, seen)


def compared(seen, fields):
    """What weir has overlooked, in words; empty if nothing."""
    _verb, tables, functions, holds = fields
    words = tables.split()
    written = Counter(word[1:] for word in words if word.startswith("+"))
    read = Counter(word for word in words if not word.startswith("+"))
    missing = []
    for what, theirs, ours in [("reads", seen.read, read), ("writes", seen.written, written)]:
        for name, count in (theirs - ours).items():
            missing.append(f"{what} {name} ({count} more)")
    for name in seen.functions - set(functions.split()) - SYNTAX:
        missing.append(f"calls {name}")
    if seen.locks and "locks" not in holds.split():
        missing.append("locks rows")
    return ", ".join(missing)


if __name__ == "__main__":
    sys.exit(main())
