"""AMX's tile registers: eight of up to 16 rows of 64 bytes, and the five operations that kernels use of them.

A tile product adds ``(rows x 64 bytes) x (64 x 16)`` to ``rows x 16`` sums of 32 bits: unsigned input values times
signed weights, in quads as VNNI has them. Where there is no AMX, the same operations are emitted on buffers that stand
for the registers, in VNNI or in plain code, so that a kernel's layouts, tails and epilogues are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B  # the same names as T's, as functions that build; no source is parsed

from lightning_baqe.kernels.x86.arithmetic import vpdpbusd
from lightning_baqe.kernels.x86.emit import at, put

ROWS, BYTES, COLUMNS, QUAD = 16, 64, 16, 4  # of a register: rows, bytes of a row, sums of a row; bytes of a sum
REGISTERS = 8
How = Literal["amx", "vnni", "plain"]


class Tiles:
    """The registers of one thread in one kernel; made where the kernel's code for a thread begins, since each thread
    configures its own.

    Args:
        how: the instructions themselves, or what stands for them.
        rows: of each register that is used, in order.
    """

    def __init__(self, how: How, rows: Sequence[int]) -> None:
        self.how, self.rows = how, list(rows)
        if how == "amx":
            self._configure()
        else:
            self._bytes = B.alloc_buffer((REGISTERS * ROWS * BYTES,), "uint8")
            self._sums = B.alloc_buffer((REGISTERS * ROWS * COLUMNS,), "int32")

    def load(self, register: int, buffer: Any, index: Any, stride: int) -> None:
        """Rows of input values or of weights, ``stride`` bytes apart."""
        if self.how == "amx":
            _emit("tileloadd64", T.int8(register), T.address_of(buffer[index]), T.int64(stride))
            return
        with B.serial(self.rows[register]) as row:
            value = T.reinterpret(at(buffer, index + row * stride, BYTES), dtype=f"uint8x{BYTES}")
            put(self._bytes, value, (register * ROWS + row) * BYTES, BYTES)

    def begin(self, register: int, buffer: Any, index: Any) -> None:
        """The same 16 numbers of an int32 buffer in every row of sums."""
        if self.how == "amx":
            _emit("tileloadd64", T.int8(register), T.address_of(buffer[index]), T.int64(0))
            return
        with B.serial(self.rows[register]) as row:
            put(self._sums, at(buffer, index, COLUMNS), (register * ROWS + row) * COLUMNS, COLUMNS)

    def add(self, sums: int, values: int, weights: int) -> None:
        """Add the products of a register of input values and one of weights."""
        if self.how == "amx":
            _emit("tdpbusd", T.int8(sums), T.int8(values), T.int8(weights))
            return
        with B.serial(self.rows[sums]) as row, B.serial(BYTES // QUAD) as quad:
            place = (sums * ROWS + row) * COLUMNS
            signed = T.reinterpret(at(self._bytes, (weights * ROWS + quad) * BYTES, BYTES), dtype=f"int8x{BYTES}")
            first, total = (values * ROWS + row) * BYTES + quad * QUAD, at(self._sums, place, COLUMNS)
            if self.how == "vnni":
                word = T.reinterpret(at(self._bytes, first, QUAD), dtype="int32")
                total = vpdpbusd(total, T.broadcast(word, COLUMNS), signed, COLUMNS)
            else:
                for byte in range(QUAD):
                    value = T.broadcast(T.Cast("int32", self._bytes[first + byte]), COLUMNS)
                    column = T.Shuffle([signed], list(range(byte, BYTES, QUAD)))
                    total = total + value * T.Cast(f"int32x{COLUMNS}", column)
            put(self._sums, total, place, COLUMNS)

    def store(self, register: int, buffer: Any, index: Any, stride: int) -> None:
        """Rows of sums to an int32 buffer, ``stride`` numbers apart."""
        if self.how == "amx":
            _emit("tilestored64", T.int8(register), T.address_of(buffer[index]), T.int64(QUAD * stride))
            return
        with B.serial(self.rows[register]) as row:
            value = at(self._sums, (register * ROWS + row) * COLUMNS, COLUMNS)
            put(buffer, value, index + row * stride, COLUMNS)

    def release(self) -> None:
        """Give the registers back: what the system saves of a thread is smaller without."""
        if self.how == "amx":
            _emit("tilerelease")

    def _configure(self) -> None:
        """Intel's palette 1: bytes of a row as 16 bits from byte 16 on, rows from byte 48 on."""
        palette = np.zeros(64, np.uint8)
        palette[0] = 1
        palette[16 : 16 + 2 * len(self.rows)].view(np.uint16)[:] = BYTES
        palette[48 : 48 + len(self.rows)] = self.rows
        buffer = B.alloc_buffer((8,), "int64")
        for index, word in enumerate(palette.view(np.int64)):
            B.buffer_store(buffer, T.int64(int(word)), [index])
        _emit("ldtilecfg", T.address_of(buffer[0]))


def _emit(name: str, *arguments: Any) -> None:
    B.evaluate(T.call_llvm_intrin(T.llvm_lookup_intrinsic_id(f"llvm.x86.{name}"), *arguments, dtype="void"))
