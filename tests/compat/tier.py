"""A throw-away Postgres, and a weir in front of it, for one run of one suite.

Everything lives in one temporary directory and is gone at the end, also after Ctrl-C. The servers listen on free ports of
127.0.0.1. Non-goals: replicas, shards, Redis (`weir dev` starts those).
"""

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

USER = "compat"
DATABASE = "compat"
START_SECONDS_MAX = 60


class Endpoint:
    """Where a suite connects to."""

    def __init__(self, port: int, password: str):
        self.host = "127.0.0.1"
        self.port = port
        self.user = USER
        self.password = password
        self.database = DATABASE


class Tier:
    """One Postgres with role and database `compat`; weir on request. Use it as a context manager."""

    def __init__(self, weir: Path | None, databases: list[str]):
        self.weir_binary = weir
        self.databases = [DATABASE, *databases]
        self.password = secrets.token_hex(12)
        self.directory = Path(tempfile.mkdtemp(prefix="weir-compat-"))
        self.directory.chmod(0o711)
        self.processes: list[subprocess.Popen] = []

    def __enter__(self) -> "Tier":
        try:
            self.postgres = self._start_postgres()
            self.endpoint = self._start_weir() if self.weir_binary else self.postgres
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for process in reversed(self.processes):
            process.send_signal(signal.SIGINT)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def log_tail(self, name: str, lines: int = 20) -> str:
        path = self.directory / f"{name}.log"
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""

    def _start_postgres(self) -> Endpoint:
        binaries = postgres_binaries()
        data, port = self.directory / "data", free_port()
        data.mkdir(mode=0o700)
        account = unprivileged()
        if account:
            os.chown(data, account.pw_uid, account.pw_gid)
        password_file = self.directory / "password"
        password_file.write_text(self.password)
        as_account = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []} if account else {}
        if account:
            os.chown(password_file, account.pw_uid, account.pw_gid)
        subprocess.run(
            [binaries / "initdb", "-D", data, "-U", USER, "-A", "scram-sha-256", f"--pwfile={password_file}"]
            + ["-E", "UTF8", "--locale=C.UTF-8", "--no-sync"],
            check=True, stdout=subprocess.DEVNULL, cwd=self.directory, **as_account,
        )
        settings = {
            "port": port, "listen_addresses": "127.0.0.1", "unix_socket_directories": data, "fsync": "off",
            "max_connections": 200, "max_prepared_transactions": 50, "wal_level": "logical",
            "synchronous_commit": "off", "full_page_writes": "off",
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        self._spawn("postgres", [binaries / "postgres", "-D", data, *options], **as_account)
        endpoint = Endpoint(port, self.password)
        self._wait(lambda: psql(endpoint, "postgres", "SELECT 1"), "postgres")
        for database in self.databases:
            psql(endpoint, "postgres", f'CREATE DATABASE "{database}"')
        return endpoint

    def _start_weir(self) -> Endpoint:
        port, http_port = free_port(), free_port()
        users = self.directory / "users.toml"
        users.touch(mode=0o600)
        users.write_text(f'[user.{USER}]\npassword = "{self.password}"\n')
        secret = self.directory / "admin.pw"
        secret.touch(mode=0o600)
        secret.write_text(self.password)
        config = self.directory / "weir.toml"
        lines = [f'listen = "127.0.0.1:{port}"', f'http_listen = "127.0.0.1:{http_port}"', 'users_file = "users.toml"']
        lines += ["[server_auth]", f'user = "{USER}"', 'password_file = "admin.pw"']
        for database in [*self.databases, "postgres"]:
            lines += [f"[database.{database}]", f"[[database.{database}.shard]]"]
            lines += ['name = "main"', f'primary = "127.0.0.1:{self.postgres.port}"']
        config.write_text("\n".join(lines) + "\n")
        self._spawn("weir", [self.weir_binary, "run", "--config", config])
        self._wait(lambda: urllib.request.urlopen(f"http://127.0.0.1:{http_port}/readyz", timeout=2).read(), "weir")
        return Endpoint(port, self.password)

    def _spawn(self, name: str, command: list, **how):
        with open(self.directory / f"{name}.log", "wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.directory, **how)
        self.processes.append(process)

    def _wait(self, ready, name: str):
        deadline = time.monotonic() + START_SECONDS_MAX
        while True:
            try:
                return ready()
            except (OSError, subprocess.CalledProcessError):
                died = self.processes[-1].poll() is not None
                if died or time.monotonic() > deadline:
                    raise SystemExit(f"{name} did not start:\n{self.log_tail(name)}") from None
                time.sleep(0.1)


def psql(endpoint: Endpoint, database: str, sql: str) -> str:
    environment = os.environ | {"PGPASSWORD": endpoint.password}
    where = ["-h", endpoint.host, "-p", str(endpoint.port), "-U", endpoint.user, "-d", database]
    command = [postgres_binaries() / "psql", "-XAtq", "-v", "ON_ERROR_STOP=1", *where, "-c", sql]
    return subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout.strip()


def postgres_binaries() -> Path:
    """Where initdb and postgres are: PG_BIN, else the newest that Debian's packages have installed, else PATH."""
    if "PG_BIN" in os.environ:
        return Path(os.environ["PG_BIN"])
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    found = installed[-1] if installed else shutil.which("initdb")
    if not found:
        raise SystemExit("PostgreSQL's server programs are not installed: scripts/deps.sh test, or set PG_BIN")
    return Path(found).parent


def unprivileged() -> pwd.struct_passwd | None:
    """Postgres does not run as root; neither do we make it."""
    return pwd.getpwnam("postgres") if os.geteuid() == 0 else None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
