"""The database of a study: what keeps it from being opened is told."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from optuna.storages._rdb.models import BaseModel

from lightning_baqe.benchmarks import postgres
from lightning_baqe.benchmarks.damage.disturbed import fill
from lightning_baqe.benchmarks.damage.interruptions import small_disk
from lightning_baqe.errors import ConfigError
from lightning_baqe.runs.study_storage import open_storage
from lightning_baqe.search.patience import Patience


@pytest.mark.parametrize("url", ["mysql://host/study", "redis://host"])
def test_other_databases_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"SQLite file .* or PostgreSQL"):
        open_storage(url)


def test_a_damaged_database_says_how_to_recover(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_bytes(b"SQLite format 3\0" + os.urandom(5000))
    with pytest.raises(ConfigError, match=r"cannot be opened .*search\.recover=true"):
        open_storage(f"sqlite:///{tmp_path / 'study.db'}")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_full_disk_is_not_called_damage(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk"):
        fill(tmp_path / "disk" / "filler")
        with pytest.raises(ConfigError, match=r"cannot be opened .*is full: free some space") as caught:
            open_storage(f"sqlite:///{tmp_path / 'disk' / 'study.db'}")
    assert "recover" not in str(caught.value)


@pytest.mark.skipif(postgres.missing() is not None, reason=str(postgres.missing()))
def test_a_server_that_goes_away_while_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_baqe.search.patience._PAUSE_S", 0.01)
    tries = 0

    with postgres.server() as server:

        def create_and_restart(*arguments: Any, **options: Any) -> None:
            nonlocal tries
            tries += 1
            if tries in (1, 2):  # before the tables are made
                server.restart(("fast", "immediate")[tries - 1])
            create(*arguments, **options)
            if tries == 3:  # after that, while the lock is held
                server.restart("fast")

        create = BaseModel.metadata.create_all
        monkeypatch.setattr(BaseModel.metadata, "create_all", create_and_restart)
        with pytest.warns(UserWarning, match="does not answer"):
            open_storage(server.url, Patience("the database")).engine.dispose()
        assert tries == 4
        gc.collect()  # psycopg warns here of connections that were left open
        server.call("pg_ctl", "-D", server.data, "-w", "-m", "fast", "stop")
        with pytest.raises(ConfigError, match=r"does not answer .*see that it runs"):
            open_storage(server.url)
        starting = threading.Timer(0.3, server.start)
        starting.start()
        with pytest.warns(UserWarning, match="does not answer"):
            open_storage(server.url, Patience("the database")).engine.dispose()
        starting.join()
