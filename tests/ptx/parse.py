"""PTX text to instructions. Only the syntax that Triton and nvcc emit is known; anything else is an error."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache

SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}


class PtxError(Exception):
    """PTX that this emulator does not know."""


@dataclass(frozen=True)
class Reg:
    """A virtual register: its place in the register file and its declared type ("b32", "pred", ...)."""

    index: int
    type: str
    name: str


@dataclass(frozen=True)
class Imm:
    """A number; a float is given by its bits and `width` in bytes, an integer has width 0."""

    value: int
    width: int = 0


@dataclass(frozen=True)
class Sym:
    """A name: of a special register, a parameter, shared memory or a label."""

    name: str


@dataclass(frozen=True)
class Vec:
    """{a, b, ...}; None is the sink `_`."""

    items: tuple


@dataclass(frozen=True)
class Pair:
    """a|b, two destinations."""

    first: object
    second: object


@dataclass(frozen=True)
class Mem:
    """[base + offset], with a tensor's coordinates for TMA."""

    base: object
    offset: int = 0
    coordinates: tuple = ()


@dataclass(frozen=True)
class Not:
    """!%p"""

    reg: Reg


@dataclass
class Instruction:
    """One instruction, with where in the source it comes from."""

    op: str
    parts: tuple[str, ...]
    operands: tuple
    guard: Reg | None
    negated: bool
    text: str
    place: str

    def __str__(self) -> str:
        return f"{self.text}  ({self.place})"


@dataclass
class Param:
    name: str
    offset: int
    size: int


@dataclass
class Kernel:
    """An entry: parameters, registers, instructions, and labels by name."""

    name: str
    params: dict[str, Param] = field(default_factory=dict)
    param_bytes: int = 0
    registers: list[Reg] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)  # name: (alignment, bytes or 0 if extern)
    local: dict[str, tuple[int, int]] = field(default_factory=dict)


_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(")
_SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]")
_LOCAL = re.compile(r"\.local\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]")
_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+\.\w+\s+\.align\s+\d+\s+)?([\w$]+)(?:\[(\d+)\])?"
)
_LABEL = re.compile(r"\s*([$\w]+):(?!:)")
_REG = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.S)


@lru_cache(maxsize=256)
def parse(text: str) -> dict[str, Kernel]:
    """All entries of a module."""
    files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text))
    files = {number: path.rsplit("/", 1)[-1] for number, path in files.items()}
    text = re.sub(r"\.section\s.*?\n\s*\}\n", "", text, flags=re.S)
    text = "\n".join(_without_comment(line) for line in text.splitlines())
    shared = {name: (int(align), int(size or 0)) for align, name, size in _SHARED.findall(text)}
    kernels = {}
    for match in _ENTRY.finditer(text):
        close = text.index(")", match.end())
        kernel = Kernel(match[1], shared=shared)
        _params(kernel, text[match.end() : close])
        start = text.index("{", close)
        _Body(kernel, files).parse(text[start + 1 :])
        kernels[kernel.name] = kernel
    return kernels


def _without_comment(line: str) -> str:
    at = line.find("//")
    return line if at < 0 else line[:at]


def _params(kernel: Kernel, text: str) -> None:
    offset = 0
    for align, kind, name, count in _PARAM.findall(text):
        size = SIZES[re.sub(r"\D", "", kind)]
        offset = -(-offset // int(align or size)) * int(align or size)
        kernel.params[name] = Param(name, offset, size * int(count or 1))
        offset += size * int(count or 1)
    kernel.param_bytes = offset


class _Body:
    """The statements between a function's braces, with nested scopes for registers and labels."""

    def __init__(self, kernel: Kernel, files: dict[str, str]) -> None:
        self.kernel, self.files = kernel, files
        self.scopes: list[dict[str, Reg]] = [{}]
        self.prefixes: list[str] = [""]
        self.place = "?"
        self.opened = 0
        self.pending: list[tuple[Instruction, list[str]]] = []  # branches, whose labels may come later

    def parse(self, text: str) -> None:
        statement, depth = "", 0
        for token in re.finditer(r"[{};\n]|[^{};\n]+", text):
            piece = token[0]
            if piece == "\n":
                statement = self._labels(statement) if not depth else statement
                if statement.strip().startswith((".loc", ".pragma", ".file")):
                    self._directive(statement.strip())
                    statement = ""
                else:
                    statement += " "
            elif piece == "{" and not depth and not self._labels(statement).strip():
                statement = ""
                self.opened += 1
                self.scopes.append({})
                self.prefixes.append(f"{self.opened}/")
            elif piece == "{":
                depth, statement = depth + 1, statement + piece
            elif piece == "}" and depth:
                depth, statement = depth - 1, statement + piece
            elif piece == "}":
                self._labels(statement)
                statement = ""
                self.scopes.pop()
                self.prefixes.pop()
                if not self.scopes:
                    break
            elif piece == ";":
                self._statement(self._labels(statement).strip())
                statement = ""
            else:
                statement += piece
        for instruction, names in self.pending:
            at = next((name for name in names if name in self.kernel.labels), None)
            if at is None:
                raise PtxError(f"{self.kernel.name}: no label for {instruction}")
            instruction.operands = (self.kernel.labels[at],)

    def _directive(self, statement: str) -> None:
        if found := re.match(r"\.loc\s+(\d+)\s+(\d+)", statement):
            self.place = f"{self.files.get(found[1], found[1])}:{found[2]}"

    def _labels(self, statement: str) -> str:
        while found := _LABEL.match(statement):
            self.kernel.labels[self.prefixes[-1] + found[1]] = len(self.kernel.instructions)
            statement = statement[found.end() :]
        return statement

    def _statement(self, statement: str) -> None:
        if not statement or statement.startswith(".pragma"):
            return
        if found := _REG.match(statement):
            self._declare(found[1], found[2])
            return
        if found := _LOCAL.match(statement):
            self.kernel.local[found[2]] = (int(found[1]), int(found[3]))
            return
        if found := _SHARED.match(statement):
            self.kernel.shared = {**self.kernel.shared, found[2]: (int(found[1]), int(found[3] or 0))}
            return
        if statement.startswith("."):
            raise PtxError(f"{self.kernel.name}: directive {statement}")
        guard, negated, text = None, False, statement
        if found := re.match(r"@(!?)([%\w$]+)\s+", statement):
            guard, negated = self._register(found[2]), found[1] == "!"
            statement = statement[found.end() :]
        op, _, rest = statement.partition(" ")
        op, _, more = op.partition("\t")
        rest = f"{more} {rest}"
        instruction = Instruction(op, tuple(op.split(".")), (), guard, negated, " ".join(text.split()), self.place)
        if instruction.parts[0] == "bra":
            name = rest.strip()
            self.pending.append((instruction, [prefix + name for prefix in reversed(self.prefixes)]))
        else:
            instruction.operands = tuple(self._operand(piece) for piece in _split(rest))
        self.kernel.instructions.append(instruction)

    def _declare(self, kind: str, names: str) -> None:
        for name in map(str.strip, names.split(",")):
            if found := re.match(r"([%\w$]+)<(\d+)>", name):
                for number in range(int(found[2])):
                    self._new(kind, f"{found[1]}{number}")
            else:
                self._new(kind, name)

    def _new(self, kind: str, name: str) -> None:
        reg = Reg(len(self.kernel.registers), kind, name)
        self.kernel.registers.append(reg)
        self.scopes[-1][name] = reg

    def _register(self, name: str) -> Reg | None:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), None)

    def _operand(self, text: str) -> object:
        text = text.strip()
        if text == "_":
            return None
        if text.startswith("{"):
            return Vec(tuple(self._operand(piece) for piece in _split(text[1:-1])))
        if text.startswith("["):
            base, *coordinates = _split(text[1:-1])
            found = re.match(r"^(.*?)\s*\+\s*(-?\w+)$", base.strip())
            base, offset = (found[1], int(found[2], 0)) if found else (base.strip(), 0)
            return Mem(self._operand(base), offset, self._operand(coordinates[0]).items if coordinates else ())
        if "|" in text:
            return Pair(*(self._operand(piece) for piece in text.split("|")))
        if text.startswith("!"):
            return Not(self._operand(text[1:]))
        if reg := self._register(text):
            return reg
        if found := re.fullmatch(r"0([fFdD])([0-9A-Fa-f]+)", text):
            return Imm(int(found[2], 16), 4 if found[1] in "fF" else 8)
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", text):
            return Imm(int(text.rstrip("U"), 0))
        if re.fullmatch(r"[%$\w]+(\.[xyz])?", text):
            return Sym(text)
        raise PtxError(f"{self.kernel.name}: operand {text!r}")


def _split(text: str) -> list[str]:
    """Split at commas outside brackets."""
    pieces, depth, piece = [], 0, ""
    for char in text:
        depth += (char in "{[(") - (char in "}])")
        if char == "," and not depth:
            pieces.append(piece)
            piece = ""
        else:
            piece += char
    return [*pieces, piece] if piece.strip() else pieces
