"""A PostgreSQL server of one's own, for as long as a benchmark or a test runs."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_baqe.errors import ConfigError


def missing() -> str | None:
    """What :func:`server` lacks here, None if nothing."""
    if importlib.util.find_spec("psycopg") is None:
        return "the driver psycopg is not installed: pip install 'lightning-baqe[postgres]'"
    if _programs() is None:
        return "the server's programs are not installed: apt-get install postgresql"
    return None


def _programs() -> Path | None:
    """The folder of initdb and pg_ctl: Debian keeps those of the server off the path."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name), reverse=True)
    on_path = shutil.which("pg_ctl")
    folders += [Path(on_path).resolve().parent] if on_path else []
    return next((folder for folder in folders if (folder / "initdb").exists() and (folder / "pg_ctl").exists()), None)


@dataclass(frozen=True)
class Server:
    """A server that runs.

    Attributes:
        url: as SQLAlchemy takes it.
        call: runs one of its programs with arguments.
        data: its folder.
    """

    url: str
    call: Callable[..., None]
    data: str

    def restart(self, mode: str = "fast", down_s: float = 0.0) -> None:
        """Stop and start it.

        Args:
            mode: ``fast`` ends all connections in order, ``immediate`` leaves what a crash would.
            down_s: seconds in between.
        """
        self.call("pg_ctl", "-D", self.data, "-w", "-m", mode, "stop")
        time.sleep(down_s)
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        folder = Path(self.data).parent
        self.call("pg_ctl", "-D", self.data, "-w", "-o", f"-k {folder} -c listen_addresses='' -c fsync=off", "start")


@contextmanager
def server() -> Iterator[Server]:
    """Start an empty server that listens on a socket in a temporary folder only; removes all of it at the end.

    The server refuses to run as root: then it runs as ``postgres``, which its package brings.

    Raises:
        ConfigError: the server or its driver is not installed, or it does not start.
    """
    lacking, programs = missing(), _programs()
    if lacking is not None or programs is None:
        raise ConfigError(f"a PostgreSQL server is wanted, but {lacking}")
    folder = Path(tempfile.mkdtemp(prefix="baqe-pg-", dir="/tmp"))  # a socket's path must be short
    account: dict[str, Any] = {}
    if os.geteuid() == 0:
        postgres = pwd.getpwnam("postgres")
        os.chown(folder, postgres.pw_uid, postgres.pw_gid)
        account = {"user": postgres.pw_uid, "group": postgres.pw_gid, "extra_groups": []}

    def call(program: str, *arguments: str) -> None:
        # The server keeps pg_ctl's output open: only a log file lets go of it.
        with open(folder / "log", "a") as log:
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            done = subprocess.run([str(programs / program), *arguments], cwd=folder, **streams, **account)
        if done.returncode:
            raise ConfigError(f"{program} failed: {(folder / 'log').read_text()[-2000:]}")

    data = str(folder / "data")
    found = Server(f"postgresql+psycopg://baqe@/postgres?host={folder}", call, data)
    try:
        call("initdb", "-D", data, "-U", "baqe", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        found.start()
        try:
            yield found
        finally:
            call("pg_ctl", "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)
