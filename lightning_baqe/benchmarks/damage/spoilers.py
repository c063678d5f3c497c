"""Ways to spoil a file: its bytes, and values of what it holds."""

from __future__ import annotations

import contextlib
import copy
import gzip
import io
import json
import os
import pickle
import shutil
import sqlite3
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lightning_baqe.files import replace_file

Spoiled = Iterator[tuple[str, Callable[[Path], None]]]  # what was done, and what does it to the file


class _Runs:
    """A pickle that would write a file."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch executed",)


def _put(content: bytes) -> Callable[[Path], None]:
    return lambda path: replace_file(path, content)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _huge(path: Path) -> None:
    with path.open("ab") as file:
        file.truncate(1 << 40)  # a hole: no block of it is on the disk


def spoiled_bytes(content: bytes, random: np.random.Generator) -> Spoiled:
    """Any file."""
    yield "empty", _put(b"")
    yield "first half", _put(content[: len(content) // 2])
    yield "last byte missing", _put(content[:-1])
    yield "zeros", _put(bytes(len(content)))
    yield "noise", _put(random.bytes(len(content)))
    yield "a pickle", _put(pickle.dumps(_Runs()))
    yield "as UTF-16", _put(content.decode("latin-1").encode("utf-16"))
    yield "twice", _put(content * 2)
    yield "a pipe", _pipe
    yield "a folder", _folder
    yield "without end", _endless
    yield "2^40 bytes", _huge
    for _ in range(8):
        place, bit = int(random.integers(len(content))), int(random.integers(8))
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit
        yield f"bit {bit} of byte {place}", _put(bytes(flipped))


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from _places(child, (*path, key))


_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 50_000_000, 2**31, 2**63, 10**400, -(10**30), 0.5, 1e308, float("nan"), float("inf")),
    *("", "../../escaped", "x" * 100_000, "\ud800", "0", [], [[]], {}, {"": 0}, [0] * 1000),
)


def spoiled_values(content: Any, random: np.random.Generator, count: int) -> Iterator[tuple[str, Any]]:
    """JSON with one value changed, a key taken away or added, at random places, as many of each depth."""
    by_depth: dict[int, list[tuple[Any, ...]]] = {}
    for path in _places(content):
        by_depth.setdefault(len(path), []).append(path)
    for number in range(count):
        paths = by_depth[sorted(by_depth)[number % len(by_depth)]]
        path = paths[int(random.integers(len(paths)))]
        changed = copy.deepcopy(content)
        if not path:
            yield "the whole", _VALUES[number % len(_VALUES)]
            continue
        owner = changed
        for key in path[:-1]:
            owner = owner[key]
        place = ".".join(map(str, path))
        match number % 5:
            case 0:
                del owner[path[-1]]
                yield f"without {place}", changed
            case 1 if isinstance(owner, dict):
                owner["surprise"] = 1
                yield f"a key beside {place}", changed
            case 2 if isinstance(owner[path[-1]], int | float) and not isinstance(owner[path[-1]], bool):
                factor = (0, -1, 2, 10, 1000)[int(random.integers(5))]
                owner[path[-1]] *= factor
                yield f"{place} times {factor}", changed
            case _:
                owner[path[-1]] = value = _VALUES[int(random.integers(len(_VALUES)))]
                yield f"{place} = {str(value)[:20]}", changed


def spoiled_json(content: bytes, random: np.random.Generator, count: int = 40) -> Spoiled:
    """JSON: bytes, values, and what only text can say."""
    yield from spoiled_bytes(content, random)
    yield "100,000 deep", _put(b"[" * 100_000)
    yield "100,000 deep, closed", _put(b'{"a":' * 100_000 + b"0" + b"}" * 100_000)
    text = content.decode()
    brace = text.index("{") + 1
    first = text[brace:].split(":", 1)[0].strip()
    yield "a key twice", _put((text[:brace] + f"{first}: 0, " + text[brace:]).encode())
    yield "1e999", _put((text[:brace] + '"a": 1e999, ' + text[brace:]).encode())
    yield "5,000 digits", _put((text[:brace] + '"a": ' + "9" * 5000 + ", " + text[brace:]).encode())
    yield from spoiled_fields(content, random, count)


def spoiled_fields(content: bytes, random: np.random.Generator, count: int = 60) -> Spoiled:
    """JSON that stays JSON: values alone."""
    for what, changed in spoiled_values(json.loads(content), random, count):
        yield what, _put(json.dumps(changed).encode())


def spoiled_lines(content: bytes, random: np.random.Generator, count: int = 40) -> Spoiled:
    """JSON lines: bytes, and values of one line."""
    yield from spoiled_bytes(content, random)
    lines = content.splitlines()
    for number in range(count):
        place = number % len(lines)
        for what, changed in spoiled_values(json.loads(lines[place]), random, 1 + number % 4):
            line = json.dumps(changed).encode()
            yield f"line {place + 1}, {what}", _put(b"\n".join([*lines[:place], line, *lines[place + 1 :]]) + b"\n")
            break


def spoiled_gzip(content: bytes, random: np.random.Generator) -> Spoiled:
    """Gzipped JSON: packed bytes, unpacked ones, and a bomb."""
    yield from spoiled_bytes(content, random)
    yield "a bomb", _put(gzip.compress(b" " * (1 << 30), 9))
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder, "unpacked")
        for what, spoil in spoiled_json(gzip.decompress(content), random):
            scratch.write_bytes(b"")
            with contextlib.suppress(ValueError):
                spoil(scratch)
            if scratch.is_file() and scratch.stat().st_size < 1 << 30:
                yield f"unpacked: {what}", _put(gzip.compress(scratch.read_bytes(), 1))
            shutil.rmtree(folder)
            Path(folder).mkdir()


def spoiled_idx(content: bytes, random: np.random.Generator) -> Spoiled:
    """IDX: bytes, and every byte of the head."""
    yield from spoiled_bytes(content, random)
    for place in range(16):
        for value in (0, 1, 255):
            yield f"byte {place} = {value}", _put(content[:place] + bytes((value,)) + content[place + 1 :])


def spoiled_yaml(content: bytes, random: np.random.Generator) -> Spoiled:
    """YAML of a configuration."""
    import yaml

    yield from spoiled_bytes(content, random)
    yield "deep", _put(b"[" * 20_000)
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
    yield "2^40 references", _put(bomb.encode())
    for text in ("!!python/object/apply:os.system [touch executed]", "a: ${oc.env:HOME}", "a: ${a}", "a: 1\na: 2"):
        yield text, _put(text.encode())
    for what, changed in spoiled_values(yaml.safe_load(content), random, 30):
        with contextlib.suppress(yaml.YAMLError, UnicodeEncodeError):
            yield what, _put(yaml.safe_dump(changed).encode())


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=True)
    return file.getvalue()


def spoiled_arrays(content: bytes, random: np.random.Generator) -> Spoiled:
    """Arrays of ``numpy.savez``: bytes, and entries of the archive."""
    yield from spoiled_bytes(content, random)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}

    def packed(changed: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> Callable[[Path], None]:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", how) as archive:
            for name, entry in changed.items():
                archive.writestr(name, entry)
        return _put(file.getvalue())

    yield "compressed", packed(members, zipfile.ZIP_DEFLATED)
    yield "a bomb", packed({**members, "bomb.npy": bytes(1 << 28)}, zipfile.ZIP_DEFLATED)
    yield "a name outside", packed({**members, "../escaped.npy": b""})
    for name in list(members)[:: max(len(members) // 8, 1)]:
        array = np.lib.format.read_array(io.BytesIO(members[name]))
        yield f"without {name}", packed({other: entry for other, entry in members.items() if other != name})
        yield f"{name} as objects", packed({**members, name: _npy(np.array([_Runs()], dtype=object))})
        yield f"{name} as text", packed({**members, name: _npy(np.array(["x"]))})
        yield f"{name} as float64", packed({**members, name: _npy(array.astype(np.float64))})
        yield f"{name} flat", packed({**members, name: _npy(np.concatenate([array.reshape(-1)] * 2))})
        header = members[name].replace(str(array.shape).encode(), b"(99999999999999,)", 1)
        yield f"{name} claims 10^14", packed({**members, name: header})
        high = np.iinfo(array.dtype).max if array.dtype.kind in "iu" else np.inf
        if array.dtype.kind in "iuf":
            yield f"{name} at its highest", packed({**members, name: _npy(np.full_like(array, high))})
            yield f"{name} at 50 million", packed({**members, name: _npy(np.full_like(array, min(high, 5 * 10**7)))})


def spoiled_checkpoint(content: bytes, random: np.random.Generator) -> Spoiled:
    """What ``torch.save`` wrote."""
    import torch

    yield from spoiled_bytes(content, random)
    good = torch.load(io.BytesIO(content), weights_only=True)

    def saved(value: Any) -> Callable[[Path], None]:
        file = io.BytesIO()
        torch.save(value, file)
        return _put(file.getvalue())

    yield "an object", saved(_Runs())
    yield "objects among tensors", saved({**good, "more": _Runs()})
    for value in (None, 1, "text", [1], torch.zeros(2), {1: torch.zeros(2)}, {}):
        yield f"holds {str(value)[:20]}", saved(value)
    for name in list(good)[:6]:
        for value in (None, 1, "text", [], torch.zeros(0), torch.zeros(3).to_sparse()):
            yield f"{name} = {str(value)[:20]}", saved({**good, name: value})


def spoiled_picture(content: bytes, random: np.random.Generator) -> Spoiled:
    """A PNG."""
    from PIL import Image

    yield from spoiled_bytes(content, random)
    file = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(file, "png")
    yield "30,000 x 30,000", _put(file.getvalue())
    text = io.BytesIO()
    Image.new("L", (4, 4)).save(text, "gif")
    yield "a GIF by that name", _put(text.getvalue())


def spoiled_database(content: bytes, random: np.random.Generator) -> Spoiled:
    """An SQLite file: bytes, pages, and rows."""
    yield from spoiled_bytes(content, random)
    pages = range(0, len(content), 4096)
    for start in [int(page) for page in random.choice(list(pages), min(len(pages), 12), replace=False)]:
        yield f"page {start // 4096} of noise", _put(content[:start] + random.bytes(4096) + content[start + 4096 :])
        yield f"page {start // 4096} of zeros", _put(content[:start] + bytes(4096) + content[start + 4096 :])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "copy.db")
        path.write_bytes(content)
        with contextlib.closing(sqlite3.connect(path)) as connection:
            tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            filled = [t for t in tables if connection.execute(f'SELECT count(*) FROM "{t}"').fetchone()[0]]
            columns = {t: [row[1] for row in connection.execute(f'PRAGMA table_info("{t}")')] for t in filled}
    for table in tables:
        yield f"without table {table}", _sql(f'DROP TABLE "{table}"')
    for table in filled:
        for column in columns[table]:
            for value in ("NULL", "'no JSON'", "'{\"a\": NaN}'", "-1", "1e999"):
                yield f"{table}.{column} = {value}", _sql(f'UPDATE OR IGNORE "{table}" SET "{column}" = {value}')


def _sql(statement: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with contextlib.closing(sqlite3.connect(path)) as connection, contextlib.suppress(sqlite3.DatabaseError):
            connection.execute("PRAGMA foreign_keys = OFF")
            connection.execute(statement)
            connection.commit()

    return change
