"""Reads machine code for one compiler fault: on Hopper ptxas (12.8, 13.0) loses uniform registers, among them those that hold where in shared memory
the operands of a product lie, its descriptors. Such a kernel returns garbage or reads memory that is not its own (docs/log.md).

It shows without a GPU: `faults` walks through the PTX and through the machine code with the numbers that one thread would have, as far as they hang
on constants and the thread alone. Descriptors do, so every product must come out with the same ones in both.
"""

from __future__ import annotations

import operator
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import triton

DISASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
SHARED = 0x400  # where the shared memory of a block begins, of the first in its cluster
MOST_TURNS = 100  # of a loop
WORD, LONG = 2**32 - 1, 2**64 - 1
Value = int | None  # None: hangs on memory, arguments, the program's index or a register never written; or by an instruction not known here
Function = Callable[..., int]


class Line(NamedTuple):
    """An instruction, its guard "" if it has none; or a label."""

    label: str
    guard: str
    operation: str
    operands: list[str]

    def __str__(self) -> str:
        return f"{self.operation} {', '.join(self.operands)}"


def faults(ptx: str, cubin: bytes, num_warps: int) -> list[str]:
    """Instructions of a kernel that do not what its PTX says, seen by the first thread of the last warp; nothing is looked at without descriptors."""
    asked = Ptx(32 * (num_warps - 1)).products(ptx_code(ptx))
    if not asked:
        return []
    machine = Machine(32 * (num_warps - 1))
    found = machine.products(machine_code(cubin))
    wrong = [f"{line}: reads what was never written" for line in machine.never_written]
    if len(asked) != len(found):
        return [*wrong, f"{len(found)} products for {len(asked)}"]
    for (_, want), (line, got) in zip(asked, found, strict=True):
        if None in want or want != got:  # not known in the PTX: such code is beyond this check, which must not hide it
            shown = (", ".join("?" if value is None else hex(value) for value in values) for values in (got, want))
            wrong.append(f"{line}: reads {' for '.join(shown)}")
    return list(dict.fromkeys(wrong))


def lost_operands(ptx: str, cubin: bytes, num_warps: int) -> list[str]:
    """For kernels with a ring of buffers, where the order of the text is not that of the work and some descriptors hang on a loop's index: those that
    the PTX knows and no product of the machine code reads, and reads of what was never written."""
    machine = Machine(32 * (num_warps - 1))
    read = {one for _, descriptors in machine.products(machine_code(cubin)) for one in descriptors}
    asked = {one for _, descriptors in Ptx(32 * (num_warps - 1)).products(ptx_code(ptx)) for one in descriptors if one is not None}
    assert asked, "nothing is known of this kernel's operands"
    return [f"{line}: reads what was never written" for line in machine.never_written] + [f"nothing reads {one:#x}" for one in sorted(asked - read)]


def machine_code(cubin: bytes) -> list[Line]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([DISASSEMBLER, "-c", file.name], capture_output=True, text=True, check=True).stdout
    return parse(r"^(\.L\w+):|/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", text.replace(".reuse", ""))


def ptx_code(ptx: str) -> list[Line]:
    return parse(r"^(\$L_\w+):|^\s*(?:@(!?%p\d+)\s+)?([a-z][\w.:]*)\s*([^;\n]*);", ptx[ptx.index(".entry") :])


def parse(pattern: str, text: str) -> list[Line]:
    """The pattern's groups: a label, or guard, operation and operands; commas inside of brackets part no operands."""
    found = re.findall(pattern, text, re.MULTILINE)
    return [Line(label, guard, name, [part.strip() for part in re.split(r",(?![^\[{]*[\]}])", operands)]) for label, guard, name, operands in found]


def known(function: Function, *values: Value) -> Value:
    """A function of numbers, if all of them are known."""
    return None if None in values else int(function(*values))


def signed(x: int, bits: int) -> int:
    return x - (1 << bits) if x >> (bits - 1) else x


COMPARE: dict[str, Function] = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}


class Walker:
    """Goes through a kernel in the order of its text, whatever it branches on, and through a loop as often as its condition says: twice if that is
    not known, since what a loop keeps in registers must still be there the second time."""

    def __init__(self, thread: int) -> None:
        self.thread = thread
        self.registers: dict[str, Value] = {}

    def products(self, code: list[Line]) -> list[tuple[Line, list[Value]]]:
        """Every product on the way with its descriptors: that of A, if A is not in registers, and that of B."""
        labels = {line.label: i for i, line in enumerate(code) if line.label}
        found = []
        taken = Counter[int]()
        i = 0
        while i < len(code):
            line = code[i]
            target = labels.get(line.operands[-1].strip("`()"), i) if line.operation.lower().startswith("bra") else i
            holds = self.registers.get(line.guard.strip("!"))
            if target < i and (taken[target] < 1 if holds is None else holds != line.guard.startswith("!") and taken[target] < MOST_TURNS):
                taken[target] += 1  # a loop may be left for its next turn from several places
                i = target
                continue
            if not line.label and (descriptors := self.step(line)) is not None:
                found.append((line, descriptors))
            i += 1
        return found

    def step(self, line: Line) -> list[Value] | None:
        """Runs an instruction; returns the descriptors of a product."""
        raise NotImplementedError


PTX_FUNCTIONS: dict[str, Function] = {
    "mov": operator.pos,
    "cvt": operator.pos,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "mad": lambda a, b, c: a * b + c,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "shl": operator.lshift,
    "shr": operator.rshift,
    "bfe": lambda a, at, bits: a >> at & (1 << bits) - 1,
    "selp": lambda a, b, p: a if p else b,
    "min": min,
    "max": max,
}


class Ptx(Walker):
    """PTX as Triton writes it."""

    def step(self, line: Line) -> list[Value] | None:
        name, *kinds = line.operation.split(".")
        if line.operation.startswith("wgmma.mma_async"):
            return [self.value(part, "u64") for part in line.operands[1:3] if part[0] != "{"]
        target, *sources = line.operands
        value = None if line.guard or not kinds else self.result(name, kinds, sources)
        parts = re.findall(r"%\w+", target)
        if name == "mov" and len(parts) > 1:
            bits = int(kinds[-1][1:]) // len(parts)
            self.registers.update({part: known(lambda x, i=i: x >> bits * i & (1 << bits) - 1, value) for i, part in enumerate(parts)})
        else:
            self.registers.update(dict.fromkeys(parts, value))
        return None

    def result(self, name: str, kinds: list[str], sources: list[str]) -> Value:
        if not re.fullmatch(r"[sub]\d+|pred", kinds[-1]):
            return None
        if name == "shfl":  # number 0 of a warp speaks for all
            return self.value(sources[0], kinds[-1]) if "idx" in kinds and sources[1] == "0" else None
        values = [self.value(source, kinds[-1]) for source in sources]
        if name == "setp":
            return known(COMPARE[kinds[0]], *values) if len(kinds) == 2 and kinds[0] in COMPARE else None
        if name == "selp":
            values[2] = self.value(sources[2], "pred")
        bits = 1 if kinds[-1] == "pred" else int(kinds[-1][1:]) * (2 if "wide" in kinds else 1)
        return known(lambda *x: PTX_FUNCTIONS[name](*x) & (1 << bits) - 1, *values) if name in PTX_FUNCTIONS and "hi" not in kinds else None

    def value(self, text: str, kind: str) -> Value:
        if text.startswith("{"):
            parts = text.strip("{}").split(",")
            half = int(kind[1:]) // 2
            values = [self.value(part.strip(), f"u{half}") for part in parts]
            return known(lambda low, high: low | high << half, *values) if len(parts) == 2 else None
        found = {"%tid.x": self.thread, "global_smem": SHARED}.get(text, self.registers.get(text))
        value = int(text) if re.fullmatch(r"-?\d+", text) else found
        bits = 1 if kind == "pred" else int(kind[1:])
        return known(lambda x: signed(x & (1 << bits) - 1, bits) if kind[0] == "s" else x & (1 << bits) - 1, value)


def shift(kinds: list[str], low: int, by: int, high: int) -> int:
    pair = signed(high << 32 | low, 64) if {"S32", "S64"} & set(kinds) else high << 32 | low
    pair = pair >> by if "R" in kinds else pair << by
    return pair >> 32 if "HI" in kinds else pair


def logic(_: list[str], a: int, b: int, c: int, table: int, *__: int) -> int:
    rows = (tuple(x if i & bit else ~x for x, bit in ((a, 4), (b, 2), (c, 1))) for i in range(8) if table >> i & 1)
    return sum((x & y & z) & WORD for x, y, z in rows)


FUNCTIONS: dict[str, Function] = {  # of what follows the first point of an instruction's name, and of its operands
    "MOV": lambda _, a: a,
    "R2R": lambda _, a: a,  # R2UR
    "SHFL": lambda _, a, *__: a,
    "SHF": shift,
    "LOP3": logic,
    "PRMT": lambda _, a, bytes_, b: sum(((b << 32 | a) >> 8 * (bytes_ >> 4 * i & 7) & 255) << 8 * i for i in range(4)),
    "SEL": lambda _, a, b, p: a if p else b,
    "SGXT": lambda kinds, a, bits: a & (1 << bits) - 1 if "U32" in kinds else signed(a & (1 << bits) - 1, bits),
}


class Machine(Walker):
    """Machine code of sm_90. The name of an instruction for uniform registers is that of the ordinary one, with a U."""

    def __init__(self, thread: int) -> None:
        super().__init__(thread)
        self.registers |= {"RZ": 0, "URZ": 0, "SRZ": 0, "PT": 1, "UPT": 1, "SR_CgaCtaId": 0, "SR_TID.X": thread}
        self.never_written: list[Line] = []

    def step(self, line: Line) -> list[Value] | None:
        name, *kinds = line.operation.split(".")
        if name == "HGMMA":
            return self.descriptors(line)
        if name in ("STL", "LDL"):
            self.spill(line, 4 if "128" in kinds else 2 if "64" in kinds else 1)
            return None
        predicates, target, sources = targets(name, line.operands)
        if not {f"UR{number}" for part in sources for number in re.findall(r"UR(\d+)", part)} <= self.registers.keys():
            self.never_written.append(line)
        value, carry = self.result(re.sub("U(?!$)", "", name, count=1), kinds, sources)
        guard = self.value(line.guard) if line.guard else 1
        written = dict.fromkeys(predicates) | dict.fromkeys(predicates[:1], carry)
        if name == "R2P":
            written |= {f"P{i}": None for i in range(7)}
        if target:
            words = 4 if "128" in kinds else 2 if {"64", "WIDE"} & set(kinds) or name == "CS2R" else 1
            written |= {after(target, i): known(lambda x, i=i: x >> 32 * i & WORD, value) for i in range(words)}
        for register, word in written.items():
            if guard is None and self.registers.get(register, word) != word:
                self.registers[register] = None
            elif guard != 0:
                self.registers[register] = word
        return None

    def spill(self, line: Line, words: int) -> None:
        """To the stack, or back."""
        stores = line.operation.startswith("STL")
        place, register = line.operands if stores else line.operands[::-1]
        for i in range(words):
            at, word = f"{place} {i}", register if register == "RZ" else after(register, i)
            self.registers[word if not stores else at] = self.registers.get(at if not stores else word)

    def descriptors(self, line: Line) -> list[Value]:
        """Two of two words behind one name, of which the first is not there if A comes from registers."""
        at = next(i for i, part in enumerate(line.operands) if part.startswith("gdesc"))
        first = re.findall(r"UR\d+", line.operands[at])[0]
        return [self.value(after(first, 2 * i), wide=True) for i in range(at - 1, 2)]

    def value(self, text: str, wide: bool = False) -> Value:
        name = text.lstrip("-~!")
        sign = text.removesuffix(name)
        value = int(name, 16) if name.startswith("0x") else self.registers.get(name)
        if wide and re.fullmatch(r"U?R\d+", name):
            value = known(lambda low, high: low | high << 32, value, self.registers.get(after(name, 1)))
        signs: dict[str, Function] = {"-": lambda x: -x, "~": lambda x: ~x, "!": lambda x: 1 - x, "": lambda x: x}
        return known(lambda x: signs[sign](x) & (LONG if wide else WORD), value)

    def result(self, name: str, kinds: list[str], sources: list[str]) -> tuple[Value, Value]:
        """The number that an instruction writes, and its carry or comparison."""
        values = [self.value(part, wide="64" in kinds or ("WIDE" in kinds and i == 2)) for i, part in enumerate(sources)]
        if name == "ISETP" and values[2] == 1 and "AND" in kinds:
            a, b = (known(lambda x: x if "U32" in kinds else signed(x, 32), one) for one in values[:2])
            equal = "EX" in kinds and a == b is not None  # the upper halves of 64 bits: the comparison of the lower ones decides
            return None, values[3] if equal else known(COMPARE[kinds[0].lower()], a, b)
        if name == "PLOP3" and sources[-2:] == ["0x80", "0x0"]:
            return None, known(lambda a, b, c: a & b & c, *values[:3])
        if name == "IMAD" and "HI" not in kinds:
            sign = 32 if "U32" not in kinds and "WIDE" in kinds else 64
            value = known(lambda a, b, *rest: signed(a, sign) * signed(b, sign) + sum(rest) & LONG, *values)
        elif name in ("IADD3", "IADD", "VIADD"):
            value = known(lambda *x: sum(x), *values)
        elif name == "LEA" and "HI" not in kinds:
            value = known(lambda a, b, by: (a << by & WORD) + b, *values[:3])
        elif name == "LEA" and kinds == ["HI"]:
            return known(lambda a, b, c, by: ((c << 32 | a) << by >> 32) + b & WORD, *values[:4]), None
        elif name in ("S2R", "CS2R") or (name in FUNCTIONS and (name != "SHFL" or kinds == ["IDX"])):
            function = FUNCTIONS.get(name, FUNCTIONS["MOV"])
            return known(lambda *x: function(kinds, *x) & WORD, *values), None
        else:
            return None, None
        exact = not any(re.match("-U?R", part) for part in sources)
        return value, known(lambda x: x >> 32, value) if exact else None


def after(register: str, i: int) -> str:
    """The i-th register after one."""
    letters = register.rstrip("0123456789")
    return f"{letters}{int(register.removeprefix(letters)) + i}"


def targets(name: str, operands: list[str]) -> tuple[list[str], str, list[str]]:
    """The predicates that an instruction writes, the (first) register that it writes or "", and what it reads."""
    is_predicate = [re.fullmatch(r"U?P(T|\d)", part) is not None for part in operands] + [False]
    at, target = is_predicate.index(False), ""
    first = at
    if re.search("SETP|PLOP3", name):
        at = first = 2
    elif name not in ("RET", "WARPSYNC") and re.fullmatch(r"U?R(Z|\d+)", [*operands, ""][at]):
        target = operands[at]
        at += 1
        if name.lstrip("U") in ("IADD3", "LEA"):  # predicates behind the register: carries
            at += is_predicate[at:].index(False)
    predicates = [part for part in (*operands[first + 1 : at], *operands[:first]) if part[-1] != "T"]
    return predicates, "" if target[-1:] == "Z" else target, operands[at:]
