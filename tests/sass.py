"""Reads machine code for one compiler fault: on Hopper, ptxas (12.8, 13.0) may read a uniform register that it has never written. Such a kernel
returns garbage or reads memory that is not its own (docs/log.md); which tiles are hit shows in the code, without a GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton

DISASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")


def instructions(cubin: bytes) -> Iterator[tuple[str, list[str]]]:
    """Operation and operands of every instruction, in the order of the code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([DISASSEMBLER, "-c", file.name], capture_output=True, text=True, check=True).stdout
    for operation, operands in _LINE.findall(text):
        yield operation, [part.strip() for part in re.split(r",(?![^\[]*\])", operands)] if operands else []


def never_written(code: Iterator[tuple[str, list[str]]]) -> list[str]:
    """The instructions that read a uniform register which none before them writes.

    In the order of the code, whatever its branches: an earlier value in the register hides the fault. What is found is wrong; nothing found proves
    nothing.
    """
    written: set[int] = set()
    found = []
    for operation, operands in code:
        target = next((i for i, part in enumerate(operands) if not re.fullmatch(r"U?P(T|\d)", part)), None)
        writes = target is not None and re.fullmatch(r"UR\d+", operands[target]) is not None and operation != "RET"
        sources = [part for i, part in enumerate(operands) if not (writes and i == target)]
        for part in sources:
            for number in map(int, re.findall(r"UR(\d+)", part)):
                if not _read(number, part, operation, operands) <= written:
                    found.append(f"{operation} {', '.join(operands)}")
        if writes and target is not None:
            first = int(operands[target][2:])
            words = 4 if ".128" in operation else 2 if ".64" in operation or ".WIDE" in operation else 1
            written |= set(range(first, first + words))
    return found


def _read(number: int, part: str, operation: str, operands: list[str]) -> set[int]:
    """The registers behind one name: a product's descriptors are two of two words, of which the first is not there if A comes from registers."""
    if "gdesc" in part:
        in_registers = operation.startswith("HGMMA") and re.fullmatch(r"R\d+", operands[1]) is not None
        return set(range(number + 2 * in_registers, number + 4))
    return {number, number + 1} if "desc" in part else {number}
