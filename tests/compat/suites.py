"""The suites: where each comes from, what it needs, and how it is pointed at a server.

A suite is taken at one version, with the driver of that version, so that two runs compare like with like.
"""

import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from tier import Endpoint, psql

HERE = Path(__file__).parent


@dataclass
class Suite:
    name: str
    #: What pip installs besides pytest.
    packages: list[str]
    #: Command and environment for a run in `tree` against an endpoint; results go to the given file.
    command: Callable[["Run"], tuple[list[str], dict[str, str]]]
    #: The source archive with the tests, for pip. None: the archive has none, a directory must be given.
    archive: str | None = None
    #: Run in `compat` before the suite.
    prepare: str = ""


@dataclass
class Run:
    python: Path
    tree: Path
    endpoint: Endpoint
    results: Path
    chosen: list[str]

    def pytest(self, *arguments: str) -> list[str]:
        options = ["-q", "--tb=short", "--continue-on-collection-errors", "-p", "compat_results", "--timeout=90"]
        return [str(self.python), "-m", "pytest", *options, *arguments]

    def libpq(self) -> dict[str, str]:
        to = self.endpoint
        return {
            "PGHOST": to.host, "PGPORT": str(to.port), "PGUSER": to.user, "PGPASSWORD": to.password,
            "PGDATABASE": to.database,
        }


def asyncpg(run: Run):
    # Their source-style checks are no concern of ours.
    return run.pytest(*(run.chosen or ["tests", "--ignore=tests/test__sourcecode.py"])), run.libpq()


def psycopg(run: Run):
    to = run.endpoint
    dsn = f"host={to.host} port={to.port} user={to.user} password={to.password} dbname={to.database}"
    chosen = run.chosen or ["tests", "--ignore=tests/pool", "--ignore=tests/crdb", "--ignore=tests/test_typing.py"]
    return run.pytest("--test-dsn", dsn, "-m", "not slow", *chosen), {"PSYCOPG_IMPL": "binary"}


def psycopg2(run: Run):
    to = run.endpoint
    names = {"": to.database, "_HOST": to.host, "_PORT": str(to.port), "_USER": to.user, "_PASSWORD": to.password}
    environment = {f"PSYCOPG2_TESTDB{name}": value for name, value in names.items()}
    return run.pytest(*(run.chosen or ["tests"])), environment


def sqlalchemy(run: Run):
    to = run.endpoint
    uri = f"postgresql+psycopg2://{to.user}:{to.password}@{to.host}:{to.port}/{to.database}"
    engine = [f"test/engine/test_{name}.py" for name in ("execute", "reconnect", "reflection", "transaction")]
    chosen = run.chosen or ["test/dialect/postgresql", "test/dialect/test_suite.py", *engine, "test/sql/test_query.py"]
    return run.pytest("--dburi", uri, "-p", "no:logging", *chosen), {}


DJANGO_LABELS = """backends db_functions transactions transaction_hooks queries select_for_update postgres_tests
    get_or_create bulk_create delete_regress lookup aggregation annotations constraints introspection inspectdb
    expressions expressions_case expressions_window model_fields schema migrations datetimes timezones savepoints
    test_runner async raw_query prefetch_related prepared_statements""".split()


def django(run: Run):
    to = run.endpoint
    tests = run.tree / "tests"
    labels = run.chosen or [label for label in DJANGO_LABELS if (tests / label).is_dir()]
    environment = {
        "COMPAT_HOST": to.host, "COMPAT_PORT": str(to.port),
        "COMPAT_USER": to.user, "COMPAT_PASSWORD": to.password, "COMPAT_DATABASE": to.database,
        "PYTHONPATH": f"{HERE}:{run.tree}",
    }
    return [str(run.python), str(tests / "runtests.py"), "--settings=django_settings", "--parallel=1", "--noinput", *labels], environment


SUITES = {
    suite.name: suite
    for suite in [
        Suite("asyncpg", ["asyncpg==0.32.0", "distro", "uvloop"], asyncpg, archive="asyncpg==0.32.0"),
        Suite("psycopg", ["psycopg[binary]==3.3.4", "anyio"], psycopg),
        Suite("psycopg2", ["psycopg2-binary==2.9.13"], psycopg2, archive="psycopg2==2.9.13", prepare="CREATE EXTENSION hstore"),
        Suite(
            "sqlalchemy", ["SQLAlchemy==2.1.9", "psycopg2-binary==2.9.13", "greenlet"], sqlalchemy,
            archive="SQLAlchemy==2.1.9",
            prepare="CREATE SCHEMA test_schema; CREATE SCHEMA test_schema_2; CREATE EXTENSION hstore; CREATE EXTENSION citext",
        ),
        Suite(
            "django", ["Django==5.2.19", "psycopg[binary,pool]==3.3.4", "Pillow", "jinja2", "PyYAML", "tblib"], django,
            archive="Django==5.2.19",
        ),
    ]
}


def environment_for(suite: Suite, work: Path) -> Path:
    """A virtual environment with what the suite needs; returns its Python."""
    python = work / "venv" / suite.name / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", python.parent.parent], check=True)
    needs = ["pytest", "pytest-timeout", "setuptools", *suite.packages]
    subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *needs], check=True)
    return python


def tree_of(suite: Suite, given: Path | None, python: Path, work: Path) -> Path:
    """The suite's sources with all they need built, below `work`, from the registry or from a directory."""
    tree = work / "tree" / suite.name
    if tree.exists():
        return tree
    if given:
        shutil.copytree(given, tree, ignore=shutil.ignore_patterns(".git"))
    elif suite.archive:
        unpacked = work / "archive" / suite.name
        unpacked.mkdir(parents=True, exist_ok=True)
        package = suite.archive.split("==")[0]
        pip = [python, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--no-binary", package, "-d", unpacked, suite.archive], check=True)
        with tarfile.open(next(unpacked.glob("*.tar.gz"))) as archive:
            archive.extractall(unpacked, filter="data")
        tree.parent.mkdir(parents=True, exist_ok=True)
        next(path for path in unpacked.iterdir() if path.is_dir()).rename(tree)
    else:
        raise SystemExit(f"the archives of {suite.name} have no tests: give --tree DIRECTORY with a checkout of its sources")
    # The installed driver is under test, not the sources beside the tests.
    for package in ("asyncpg", "psycopg"):
        shadow = tree / package
        if suite.name == "asyncpg" and shadow.is_dir():
            shadow.rename(tree / f"{package}.sources")
    return tree


def run(suite: Suite, run_: Run, log: Path, seconds_max: int) -> int:
    # What an earlier run remembers (psycopg refuses to start after a crash) is no business of this one.
    shutil.rmtree(run_.tree / ".pytest_cache", ignore_errors=True)
    if suite.prepare:
        psql(run_.endpoint, run_.endpoint.database, suite.prepare)
    command, environment = suite.command(run_)
    environment = {"PYTHONPATH": str(HERE), "COMPAT_RESULTS": str(run_.results)} | environment
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command, cwd=run_.tree, env=os.environ | environment, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(seconds_max)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            return process.wait()
