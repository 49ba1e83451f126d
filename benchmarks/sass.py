"""A kernel's machine code, and which of its instructions its programs execute.

`trace` follows the first thread of many programs at once: it computes the integers that come from
the program's number, the launch's arguments and constants, and so knows how often loops run and
which programs pass a condition. Of what is loaded it knows the integers of the tensors that it is
given; nothing that was computed in floats. A branch on other data falls through, so that what it
would skip counts; a loop that such data ends, or an exit that it takes, needs an `Assumption`. A
loop that only waits for another unit counts once.
"""

import operator
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.uint64]  # a register of 32 bits, of all programs
Truths = NDArray[np.bool_]  # a predicate of all programs
Memory = Sequence[tuple[int, NDArray[np.uint8]]]  # what can be read: where it begins, and its bytes

# where the constant bank holds the launch's arguments and the number of programs, by architecture
_ARGUMENTS_AT = {8: 0x160, 9: 0x210, 10: 0x380, 12: 0x380}
_PROGRAMS_AT = {8: 0xC, 9: 0xC, 10: 0x370, 12: 0x370}
_MOST_SAMPLES = 8192  # programs that are followed
_MOST_STEPS = 400_000  # instructions of one program
_MOST_ROUTES = 256

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;", re.MULTILINE)
_GUARD = re.compile(r"@(!?)(U?P(?:\d|T))\s+")
_REGISTER = re.compile(r"(U?R)(\d+)$")
_PREDICATE = re.compile(r"!?U?P(\d|T)$")
_CONSTANT = re.compile(r"c\[0x0\]\[(0x[0-9a-f]+)\]$")
_PLACE = re.compile(r"\[(R\d+)(?:\.64)?((?:\+-?\w+)*)\]$")
_ENTRY = re.compile(r"\.visible \.entry \w+\((.*?)\)", re.DOTALL)
_LOADS = ("LDG", "LDS", "LDC", "LDCU", "ULDC", "LDL", "LDSM", "LD")
_WITHOUT_RESULT = (
    *("STG", "STS", "STL", "STSM", "ST", "RED", "BAR", "BRA", "EXIT", "CALL", "RET"),
    *("BSSY", "BSYNC", "WARPSYNC", "NOP", "MEMBAR", "DEPBAR", "ERRBAR"),
)
_WAITS = ("NANOSLEEP", "SYNCS", "UTCATOMSWS")
_LOW = np.uint64(0xFFFFFFFF)
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "EQ": operator.eq,
    "NE": operator.ne,
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
}


class Instruction:
    """A line of machine code.

    Attributes:
        address: In bytes.
        guard: The predicate under which it acts, such as "!P0", or "" where it always does.
        name: Such as "IMAD".
        suffixes: Such as "HI" and "U32".
        operands: As they are written.
    """

    def __init__(self, address: int, text: str) -> None:
        self.address = address
        guard = _GUARD.match(text)
        self.guard = guard[1] + guard[2] if guard else ""
        head, _, rest = text[guard.end() if guard else 0 :].partition(" ")
        self.name, *self.suffixes = head.split(".")
        operands = rest.replace(".reuse", "").split(",")
        self.operands = [operand.strip() for operand in operands if operand.strip()]

    def __repr__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{self.address:#06x} {guard}{self.full_name} {', '.join(self.operands)}"

    @property
    def full_name(self) -> str:
        """The name with its suffixes."""
        return ".".join([self.name, *self.suffixes])

    @cached_property
    def target(self) -> int | None:
        """Where a branch leads."""
        if self.name not in ("BRA", "CALL") or not self.operands:
            return None
        last = self.operands[-1]
        return int(last, 16) if last.startswith("0x") else None

    @cached_property
    def width(self) -> int:
        """Bytes that a thread loads or stores."""
        if {"M88", "MT88"} & {*self.suffixes}:  # matrices of 8 by 8 halves
            return 4 * next((int(suffix) for suffix in self.suffixes if suffix in ("2", "4")), 1)
        for suffix in self.suffixes:
            if suffix.lstrip("US") in ("8", "16", "32", "64", "128"):
                return int(suffix.lstrip("US")) // 8
        return 4

    @cached_property
    def writes(self) -> tuple[str, ...]:
        """The registers and predicates that it changes."""
        if self.name in _WITHOUT_RESULT or not self.operands:
            return ()
        if self.name == "R2P":
            return tuple(f"P{number}" for number in range(7))
        name, first, *further = self.name.removeprefix("U"), *self.operands
        if _PREDICATE.match(first):
            found = [first]
            if name.endswith("SETP") or name == "PLOP3":
                found += further[:1]
            elif name in ("LOP3", "SHFL", "ATOMG", "ATOMS"):
                found += _registers(further[0], self._results)
        else:
            found = _registers(first, self._results)
            for operand in further[:2]:  # carries
                if not _PREDICATE.match(operand) or operand.startswith("!"):
                    break
                found.append(operand)
        return tuple(name for name in found if not name.endswith("PT"))

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """The registers and predicates that it waits for."""
        start = int(self.name not in _WITHOUT_RESULT)
        found = [self.guard.lstrip("!")] if self.guard else []
        for operand in self.operands[start:]:
            for kind, number in re.findall(r"\b(U?[RP])(\d+)", operand):
                found.append(f"{kind}{number}")
                if kind != "P" and self._takes_pairs:
                    found.append(f"{kind}{int(number) + 1}")
        data = _REGISTER.match(self.operands[-1]) if self.name.startswith("ST") else None
        if data:
            found += [f"R{int(data[2]) + n}" for n in range(1, self.width // 4)]
        return tuple(found)

    @property
    def _takes_pairs(self) -> bool:
        return self.name in ("LDG", "STG", "DFMA", "DMUL", "DADD", "DSETP", "HMMA", "IMMA")

    @property
    def _results(self) -> int:
        """Registers that hold the result."""
        if self.name in _LOADS:
            return max(1, self.width // 4)
        if self.name in ("HMMA", "IMMA"):
            return 4 if "F32" in self.suffixes or self.name == "IMMA" else 2
        if self.name == "HGMMA":
            return 128
        if self.name == "CS2R":
            return 1 if "32" in self.suffixes else 2
        wide = self.name in ("DFMA", "DMUL", "DADD") or {"WIDE", "64", "F64"} & {*self.suffixes}
        return 2 if wide else 1


def _registers(first: str, count: int) -> list[str]:
    """The names of neighbouring registers; none of what is always zero."""
    match = _REGISTER.match(first)
    return [f"{match[1]}{int(match[2]) + n}" for n in range(count)] if match else []


class Resources(NamedTuple):
    """What a kernel takes; what is spilled lies in the stack or in local memory.

    Attributes:
        registers: Per thread.
        stack: Bytes per thread.
        local: Bytes per thread.
    """

    registers: int
    stack: int
    local: int


class Machine(NamedTuple):
    """A kernel as it was compiled.

    Attributes:
        code: Its instructions, in order.
        resources: What it takes.
    """

    code: tuple[Instruction, ...]
    resources: Resources

    @property
    def last(self) -> int:
        """The address of the last exit; slow paths lie behind it."""
        return max(i.address for i in self.code if i.name == "EXIT")


class Route(NamedTuple):
    """What some of a launch's programs execute.

    Attributes:
        share: The part of all programs.
        steps: Places in the code, in the order of execution.
        times: How often each step is to be expected: 1, where nothing had to be assumed.
    """

    share: float
    steps: list[int]
    times: list[float]


class Assumption(NamedTuple):
    """What data decides in a kernel.

    Attributes:
        turns: How often a loop that data ends is run through.
        goes_on: The share of programs that go on where data lets others end, of their number.
    """

    turns: float | None = None
    goes_on: Callable[[int], float] | None = None


@cache
def disassembled(cubin: bytes) -> Machine:
    """Read the machine code and the resources of a kernel."""
    return parsed(_cuobjdump(cubin, "-sass", "--dump-resource-usage"))


@cache
def resources(cubin: bytes) -> Resources:
    """Read the resources of a kernel alone, which takes a hundredth of the time."""
    return _resources(_cuobjdump(cubin, "--dump-resource-usage"))


def parsed(text: str) -> Machine:
    """Read what cuobjdump prints.

    Raises:
        RuntimeError: If it does not tell the resources.
    """
    code = tuple(Instruction(int(address, 16), body) for address, body in _LINE.findall(text))
    return Machine(code, _resources(text))


def _resources(text: str) -> Resources:
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if numbers is None:
        raise RuntimeError(f"cuobjdump must tell the resources of a kernel, got {text[:500]!r}")
    return Resources(*map(int, numbers.groups()))


def _cuobjdump(cubin: bytes, *options: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [str(tool), *options, str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def constants(ptx: str, arguments: list[Any], programs: int, arch: int) -> dict[int, int]:
    """What the constant bank holds, by address: integers among the arguments, and the grid.

    Args:
        ptx: Names the types of the kernel's parameters.
        arguments: Those that the kernel was not specialised on, in order; an address is an integer.
        programs: Their number.
        arch: The architecture, such as 90.
    """
    entry = _ENTRY.search(ptx)
    if entry is None:
        raise RuntimeError(f"PTX must have an entry with parameters, got {ptx[:500]!r}")
    generation = arch // 10
    bank = {_PROGRAMS_AT[generation]: programs, _PROGRAMS_AT[generation] + 4: 1}
    at = _ARGUMENTS_AT[generation]
    sizes = [int(bits) // 8 for bits in re.findall(r"\.param \.[a-z](\d+)", entry[1])]
    if len(sizes) < len(arguments):
        raise RuntimeError(f"the kernel must take {len(arguments)} arguments, got {len(sizes)}")
    values = [*arguments, *[None] * (len(sizes) - len(arguments))]  # scratch memory comes last
    for size, value in zip(sizes, values, strict=True):
        at = -(at // -size) * size
        if isinstance(value, int):
            for word in range(max(1, size // 4)):
                bank[at + 4 * word] = (int(value) >> 32 * word) & 0xFFFFFFFF
        at += size
    return bank


def trace(
    machine: Machine,
    bank: Mapping[int, int],
    programs: int,
    assumption: Assumption | None = None,
    memory: Memory = (),
) -> list[Route]:
    """Follow a launch's programs through the code.

    Args:
        machine: The kernel.
        bank: From `constants`.
        programs: Their number; a sample of them is followed.
        assumption: Of what data decides.
        memory: The data that is known.

    Raises:
        ValueError: If data decides over a loop or an exit, and nothing is assumed of it.
    """
    step = 1
    while -(programs // -step) > _MOST_SAMPLES or (step > 1 and not programs % step):
        step += 1  # no divisor, so that no place within an image is left out
    numbers = np.arange(0, programs, step, dtype=np.uint64)
    walks = [_Walk(machine, bank, numbers, memory)]
    routes: list[Route] = []
    while walks:
        walk = walks.pop()
        other = walk.run(assumption or Assumption(), programs)
        if other is not None:
            walks += [walk, other]
            if len(walks) + len(routes) > _MOST_ROUTES:
                raise ValueError(f"programs must take at most {_MOST_ROUTES} routes")
            continue
        routes.append(Route(len(walk.numbers) / len(numbers), walk.steps, walk.times))
    return routes


class _Walk:
    """Programs that have taken the same way so far, and what their registers hold."""

    def __init__(
        self, machine: Machine, bank: Mapping[int, int], numbers: Values, memory: Memory
    ) -> None:
        self.machine, self.bank, self.numbers, self.memory = machine, bank, numbers, memory
        self.registers: dict[str, Values] = {}
        self.predicates: dict[str, Truths] = {}
        self.place = 0
        self.steps: list[int] = []
        self.times: list[float] = []
        self.share = 1.0  # of these programs that still go on, if data lets others end
        self.left_once: set[int] = set()  # exits of loops that data takes
        self.written: set[str] = set()  # registers that hold something, known or not
        self.last = machine.last
        self.places = {i.address: place for place, i in enumerate(machine.code)}
        self.loops = [
            (i.target, i.address)
            for i in machine.code
            if i.target is not None and i.target < i.address <= self.last
        ]

    def run(self, assumption: Assumption, programs: int) -> "_Walk | None":
        """Go on to the end, or to where ways part: the other programs are returned."""
        code = self.machine.code
        while True:
            if len(self.steps) > _MOST_STEPS:
                raise ValueError(f"a program must execute at most {_MOST_STEPS} instructions")
            i = code[self.place]
            self.steps.append(self.place)
            self.times.append(self.share)
            if i.name not in ("BRA", "EXIT", "CALL"):
                self._execute(i)
                self.place += 1
                continue
            if i.name == "CALL" and (i.target is None or i.target > self.last):
                self.place += 1  # a slow path
                continue
            taken = self._condition(i)
            if taken is None:
                taken = np.array([self._assumed(i, assumption, programs)])
            if taken.size > 1 and taken.any() and not taken.all():
                self.steps.pop()
                self.times.pop()
                return self._part(taken)
            if not taken.any():
                self.place += 1
            elif i.name == "EXIT":
                return None
            else:
                if i.target is None:
                    raise ValueError(f"a branch must have a target, got {i}")
                self.place = self.places[i.target]

    def _condition(self, i: Instruction) -> Truths | None:
        """Whether a branch is taken; None if data decides."""
        names = [i.guard] if i.guard else []
        names += [operand for operand in i.operands if _PREDICATE.match(operand)]
        if "DIV" in i.suffixes:  # threads of a warp went different ways
            return np.array([False])
        known: Truths | None = np.array([True])
        for name in names:
            known = _both(known, self._predicate(name))
        return known

    def _assumed(self, i: Instruction, assumption: Assumption, programs: int) -> bool:
        """Whether a branch is taken that data decides over."""
        if i.name == "EXIT":
            if assumption.goes_on is None:
                raise ValueError(f"an exit depends on data, of which nothing is assumed: {i}")
            self.share *= assumption.goes_on(programs)
            return False
        target = i.target or 0
        if target > self.last:
            return False  # a slow path
        if target < i.address:
            self._weigh((target, i.address), assumption, i)
            return False
        around = [loop for loop in self.loops if loop[0] <= i.address <= loop[1] < target]
        if not around:
            return False
        if i.address not in self.left_once:
            self.left_once.add(i.address)
            return False
        self.left_once.discard(i.address)
        self._weigh(min(around, key=lambda loop: loop[1] - loop[0]), assumption, i)
        return True

    def _weigh(self, loop: tuple[int, int], assumption: Assumption, i: Instruction) -> None:
        """Let the turn of a loop that was just made stand for all that are expected."""
        code = self.machine.code
        inside = (step for step in range(self.places[loop[0]], self.places[loop[1]]))
        if any(code[step].name in _WAITS for step in inside):
            return
        if assumption.turns is None:
            raise ValueError(f"a loop ends by data, of which nothing is assumed: {i}")
        for number in range(len(self.steps) - 1, -1, -1):
            if not loop[0] <= code[self.steps[number]].address <= loop[1]:
                break
            self.times[number] *= assumption.turns

    def _part(self, taken: Truths) -> "_Walk":
        """Leave the programs in which a condition holds to another walk."""
        other = _Walk(self.machine, self.bank, self.numbers[taken], self.memory)
        other.place, other.share = self.place, self.share
        other.steps, other.times = [*self.steps], [*self.times]
        other.left_once, other.written = {*self.left_once}, {*self.written}
        pairs: list[tuple[dict[str, Any], dict[str, Any]]] = [
            (other.registers, self.registers),
            (other.predicates, self.predicates),
        ]
        for of_other, of_self in pairs:
            for name, value in of_self.items():
                if value.size > 1:
                    of_other[name], of_self[name] = value[taken], value[~taken]
                else:
                    of_other[name] = value
        self.numbers = self.numbers[~taken]
        return other

    # what instructions do

    def _execute(self, i: Instruction) -> None:
        guard = self._predicate(i.guard) if i.guard else np.array([True])
        if guard is not None and not guard.any():
            return
        found = self._results_of(i)
        self.written.update(i.writes)
        for name in i.writes:
            into: dict[str, Any] = self.predicates if "P" in name else self.registers
            new = found.get(name)
            if guard is None or not guard.all():
                old = into.get(name)
                known = new is not None and old is not None
                new = np.where(guard, new, old) if guard is not None and known else None
            if new is None:
                into.pop(name, None)
            else:
                into[name] = new

    def _results_of(self, i: Instruction) -> dict[str, Any]:
        """What an instruction writes, as far as it is known."""
        name = i.name[1:] if i.name.startswith("U") and i.name[1:] in _OPERATIONS else i.name
        evaluate = _OPERATIONS.get(name)
        if evaluate is None or not i.writes:
            return {}
        return evaluate(self, i)

    def _predicate(self, name: str) -> Truths | None:
        plain = name.lstrip("!")
        value = np.array([True]) if plain.endswith("PT") else self.predicates.get(plain)
        return ~value if value is not None and name.startswith("!") else value

    def value(self, operand: str) -> Values | None:
        """The bits of an operand."""
        if operand.startswith("-") and not operand.startswith("-0x"):
            inner = self.value(operand[1:])
            return None if inner is None else (~inner + np.uint64(1)) & _LOW
        if operand.startswith("~"):
            inner = self.value(operand[1:])
            return None if inner is None else ~inner & _LOW
        if operand in ("RZ", "URZ", "SRZ"):
            return np.array([0], np.uint64)
        if re.fullmatch(r"-?0x[0-9a-f]+", operand):
            return np.array([int(operand, 16) & 0xFFFFFFFF], np.uint64)
        constant = _CONSTANT.match(operand)
        if constant:
            word = self.bank.get(int(constant[1], 16))
            return None if word is None else np.array([word], np.uint64)
        return self.registers.get(operand)

    def values(self, operands: list[str]) -> "list[Values] | None":
        """The bits of all operands, or None if one is unknown."""
        found = [self.value(operand) for operand in operands]
        known = [value for value in found if value is not None]
        return known if len(known) == len(found) else None


def _both(first: Truths | None, second: Truths | None) -> Truths | None:
    """Whether both hold; known where one is known not to."""
    for one, other in ((first, second), (second, first)):
        if one is None:
            return other if other is not None and not other.any() else None
    return first & second  # type: ignore[operator]


def _signed(value: Values) -> NDArray[np.int64]:
    return value.astype(np.uint32).view(np.int32).astype(np.int64)


def _bits(value: Any) -> Values:
    return np.asarray(value).astype(np.int64).view(np.uint64) & _LOW


def _parts(i: Instruction) -> tuple[list[str], list[str], list[str]]:
    """The operands of an instruction: results, sources, and the predicates behind those."""
    count = 0
    for operand in i.operands[:3]:
        if count and not (_PREDICATE.match(operand) and operand[0] != "!"):
            break
        count += 1
    rest = i.operands[count:]
    sources = [operand for operand in rest if not _PREDICATE.match(operand)]
    return i.operands[:count], sources, [operand for operand in rest if _PREDICATE.match(operand)]


def _sum(walk: _Walk, i: Instruction) -> dict[str, Any]:
    """IADD3 and its kin, with carries."""
    results, sources, carried = _parts(i)
    carries = [walk._predicate(name) for name in carried] if "X" in i.suffixes else []
    total = np.array([0], np.uint64)
    for operand in sources:
        negative = operand.startswith(("-R", "-UR"))  # the complement and a carry
        term = walk.value("~" + operand[1:] if negative else operand)
        if term is None:
            return {}
        total = total + term + np.uint64(negative)
    for carry in carries:
        if carry is None:
            return {}
        total = total + carry.astype(np.uint64)
    found: dict[str, Any] = {results[0]: total & _LOW}
    if len(results) > 1:
        found[results[1]] = total >> np.uint64(32) > 0
    return found


def _product(walk: _Walk, i: Instruction) -> dict[str, Any]:
    """IMAD in all its forms."""
    results, sources, carried = _parts(i)
    terms = walk.values(sources[:3])
    if terms is None or len(terms) < 3:
        return {}
    first, second, third = terms
    if {"WIDE", "HI"} & {*i.suffixes}:
        if _REGISTER.match(sources[2]):
            register = _REGISTER.match(sources[2])
            assert register
            high = walk.value(f"{register[1]}{int(register[2]) + 1}")
            if high is None:
                return {}
            third = third | high << np.uint64(32)
        product = first * second
        if "U32" not in i.suffixes:
            product = (_signed(first) * _signed(second)).view(np.uint64)
        product = product + third
        low, high = product & _LOW, product >> np.uint64(32)
        if "HI" in i.suffixes:
            return {results[0]: high}
        return dict(zip(i.writes, (low, high), strict=False))
    total = first * second + third
    if "X" in i.suffixes:
        carry = walk._predicate(carried[0]) if carried else None
        if carry is None:
            return {}
        total = total + carry.astype(np.uint64)
    return {results[0]: total & _LOW}


def _moved(walk: _Walk, i: Instruction) -> dict[str, Any]:
    return {i.operands[0]: walk.value(i.operands[1])}


def _special(walk: _Walk, i: Instruction) -> dict[str, Any]:
    zero = np.array([0], np.uint64)
    name = i.operands[1]
    if name == "SR_CTAID.X":
        return {i.operands[0]: walk.numbers}
    if name == "SRZ" or name.startswith(("SR_TID", "SR_LANEID", "SR_CTAID", "SR_VIRTID")):
        return dict.fromkeys(i.writes, zero)
    return {}


def _constant(walk: _Walk, i: Instruction) -> dict[str, Any]:
    match = _CONSTANT.match(i.operands[1])
    if match is None:
        return {}
    at = int(match[1], 16)
    return {name: walk.value(f"c[0x0][{at + 4 * n:#x}]") for n, name in enumerate(i.writes)}


def _loaded(walk: _Walk, i: Instruction) -> dict[str, Any]:
    """LDG from memory that is known."""
    match = _PLACE.search(i.operands[-1])
    if match is None or not walk.memory:
        return {}
    low, high = walk.value(match[1]), walk.value(f"R{int(match[1][1:]) + 1}")
    if low is None or high is None:
        return {}
    address = (low | high << np.uint64(32)).view(np.int64)
    for offset in re.findall(r"-?\w+", match[2]):
        if not re.fullmatch(r"-?0x[0-9a-f]+", offset):
            return {}
        address = address + int(offset, 16)
    for start, content in walk.memory:
        at = address - start
        if at.min() >= 0 and at.max() + i.width <= content.size:
            read = content[at[:, None] + np.arange(i.width)].astype(np.uint64)
            break
    else:
        return {}
    if i.width < 4:
        found = sum(read[:, n] << np.uint64(8 * n) for n in range(i.width))
        if {"S8", "S16"} & {*i.suffixes}:
            found = _bits((found.astype(np.int64) << 64 - 8 * i.width) >> 64 - 8 * i.width)
        return {i.writes[0]: found}
    words = read.reshape(len(read), -1, 4) << np.arange(0, 32, 8, dtype=np.uint64)
    return dict(zip(i.writes, words.sum(2, dtype=np.uint64).T, strict=False))


def _absolute(walk: _Walk, i: Instruction) -> dict[str, Any]:
    value = walk.value(i.operands[1])
    return {} if value is None else {i.operands[0]: _bits(np.abs(_signed(value)))}


def _logic(walk: _Walk, i: Instruction) -> dict[str, Any]:
    start = 1 if _PREDICATE.match(i.operands[0]) else 0
    # predicates are kept as single bits of a register that holds nothing before
    sources = [
        "RZ" if operand == i.operands[start] and operand not in walk.written else operand
        for operand in i.operands[start + 1 : start + 4]
    ]
    terms = walk.values(sources)
    table = int(i.operands[start + 4], 16)
    if terms is None:
        return {}
    found = np.array([0], np.uint64)
    for number in range(8):
        if table >> number & 1:
            term = np.array([_LOW])
            for bit, value in zip((4, 2, 1), terms, strict=True):
                term = term & (value if number & bit else ~value & _LOW)
            found = found | term
    answers: dict[str, Any] = {i.operands[start]: found}
    if start:
        answers[i.operands[0]] = found != 0
    return answers


def _shift(walk: _Walk, i: Instruction) -> dict[str, Any]:
    """SHF: a register, or the high or low half of a pair, shifted."""
    terms = walk.values(i.operands[1:4])
    if terms is None:
        return {}
    low, amount, high = terms
    kind = next((s for s in i.suffixes if s in ("U32", "S32", "U64", "S64")), "U32")
    pair = low | high << np.uint64(32)
    if kind.endswith("32") and "HI" in i.suffixes:
        pair = high if "R" in i.suffixes else high << np.uint64(32)
    elif kind.endswith("32"):
        pair = low
    amount = np.minimum(amount, np.uint64(63))
    if "L" in i.suffixes:
        found = pair << amount
        found = found >> np.uint64(32) if "HI" in i.suffixes else found
    elif kind.startswith("S"):
        signed = _signed(pair) if kind == "S32" else pair.view(np.int64)
        found = (signed >> amount.astype(np.int64)).view(np.uint64)
        found = found >> np.uint64(32) if kind == "S64" and "HI" in i.suffixes else found
    else:
        found = pair >> amount
        found = found >> np.uint64(32) if kind == "U64" and "HI" in i.suffixes else found
    return {i.operands[0]: found & _LOW}


def _scaled(walk: _Walk, i: Instruction) -> dict[str, Any]:
    """LEA: (a << shift) + b, or the same of the high half, with carries."""
    results, sources, carried = _parts(i)
    terms = walk.values(sources)
    carry: Truths | None = np.array([False])
    if "X" in i.suffixes:
        carry = walk._predicate(carried[-1]) if carried else None
    if terms is None or carry is None:
        return {}
    if "HI" not in i.suffixes:
        total = (terms[0] << terms[2] & _LOW) + terms[1]
        found: dict[str, Any] = {results[0]: total & _LOW}
        if len(results) > 1:
            found[results[1]] = total >> np.uint64(32) > 0
        return found
    if len(terms) == 3 and "SX32" in i.suffixes:
        low, addend, amount = terms
        pair = _signed(low).view(np.uint64)
    elif len(terms) == 4:
        low, addend, high, amount = terms
        pair = low | high << np.uint64(32)
    else:
        return {}
    total = (pair >> (np.uint64(32) - amount)) + addend + carry.astype(np.uint64)
    return {results[0]: total & _LOW}


def _compared(walk: _Walk, i: Instruction) -> dict[str, Any]:
    _, sources, _ = _parts(i)
    results = i.operands[:2]
    further = [name for name in i.operands[2:] if _PREDICATE.match(name)]
    terms = walk.values(sources[:2])
    found: Truths | None = None
    if i.suffixes[0] in _COMPARISONS and terms is not None:
        signed = "U32" not in i.suffixes
        first, second = (_signed(term) if signed else term for term in terms)
        compare = _COMPARISONS[i.suffixes[0]]
        found = np.atleast_1d(compare(first, second))
        if "EX" in i.suffixes:  # the low halves were compared before
            low = walk._predicate(further[-1])
            if low is None:
                return {}
            strict = found & (first != second)
            found = strict | ((first == second) & low)
    elif i.suffixes[0] in ("F", "T"):
        found = np.array([i.suffixes[0] == "T"])
    with_ = walk._predicate(further[0]) if further else np.array([True])
    answers: dict[str, Any] = {}
    for name, holds in ((results[0], found), (results[1], None if found is None else ~found)):
        if "AND" in i.suffixes:
            answers[name] = _both(holds, with_)
        elif holds is not None and with_ is not None:
            answers[name] = holds | with_ if "OR" in i.suffixes else holds ^ with_
    return answers


def _selected(walk: _Walk, i: Instruction) -> dict[str, Any]:
    terms = walk.values(i.operands[1:3])
    choice = walk._predicate(i.operands[3])
    if terms is None or choice is None:
        return {}
    return {i.operands[0]: np.where(choice, terms[0], terms[1])}


def _extreme(walk: _Walk, i: Instruction) -> dict[str, Any]:
    """The lesser or the greater, and of a sum with the third."""
    results, sources, chosen = _parts(i)
    terms = walk.values(sources)
    least = walk._predicate(chosen[-1]) if chosen else None
    if terms is None or least is None or len(terms) != (3 if "ADD" in i.name else 2):
        return {}
    if "ADD" in i.name:
        terms = [(terms[0] + terms[1]) & _LOW, terms[2]]
    first, second = terms if "U32" in i.suffixes else map(_signed, terms)
    found = np.where(least, np.minimum(first, second), np.maximum(first, second))
    return {results[0]: _bits(found)}


def _permuted(walk: _Walk, i: Instruction) -> dict[str, Any]:
    terms = walk.values(i.operands[1:4])
    if terms is None or i.suffixes:
        return {}
    pair = terms[0] | terms[2] << np.uint64(32)
    found = np.array([0], np.uint64)
    for byte in range(4):
        choice = terms[1] >> np.uint64(4 * byte) & np.uint64(15)
        value = pair >> (choice % np.uint64(8) * np.uint64(8)) & np.uint64(255)
        sign = np.where(value > 127, np.uint64(255), np.uint64(0))
        found = found | np.where(choice > 7, sign, value) << np.uint64(8 * byte)
    return {i.operands[0]: found}


def _predicates_combined(walk: _Walk, i: Instruction) -> dict[str, Any]:
    inputs = [walk._predicate(name) for name in i.operands[2:5]]
    if any(value is None for value in inputs):
        return {}
    first, second, third = (value.astype(int) for value in inputs if value is not None)
    number = first << 2 | second << 1 | third
    answers = {}
    for name, table in zip(i.operands[:2], i.operands[5:7], strict=False):
        answers[name] = (int(table, 16) >> number & 1).astype(bool)
    return answers


def _halves(walk: _Walk, i: Instruction) -> dict[str, Any]:
    """HFMA2 as a way to load a constant."""
    if [operand.lstrip("-") for operand in i.operands[1:3]] != ["RZ", "RZ"]:
        return {}
    try:
        high, low = (np.float16(float(operand)).view(np.uint16) for operand in i.operands[3:5])
    except ValueError:
        return {}
    return {i.operands[0]: np.array([int(high) << 16 | int(low)], np.uint64)}


def _extended(walk: _Walk, i: Instruction) -> dict[str, Any]:
    """SGXT: the low bits, with their sign or without."""
    terms = walk.values(i.operands[1:3])
    if terms is None or "U32" not in i.suffixes:
        return {}
    value, bits = terms
    return {i.operands[0]: value & ((np.uint64(1) << bits) - np.uint64(1))}


def _packed_predicates(walk: _Walk, i: Instruction) -> dict[str, Any]:
    """P2R: predicates as bits."""
    if i.operands[1:3] != ["PR", "RZ"]:
        return {}
    mask, found = int(i.operands[3], 16), np.array([0], np.uint64)
    for number in range(7):
        if mask >> number & 1:
            value = walk._predicate(f"P{number}")
            if value is None:
                return {}
            found = found | value.astype(np.uint64) << np.uint64(number)
    return {i.operands[0]: found}


def _voted(walk: _Walk, i: Instruction) -> dict[str, Any]:
    return {i.writes[-1]: walk._predicate(i.operands[-1])}


# Division by what is known at the launch alone: an approximate reciprocal in float32, corrected


def _to_float(walk: _Walk, i: Instruction) -> dict[str, Any]:
    value = walk.value(i.operands[1])
    if value is None or {"U16", "U8", "F64"} & {*i.suffixes}:
        return {}
    number = value if "U32" in i.suffixes else _signed(value)
    return {i.operands[0]: number.astype(np.float32).view(np.uint32).astype(np.uint64)}


def _reciprocal(walk: _Walk, i: Instruction) -> dict[str, Any]:
    value = walk.value(i.operands[1])
    if value is None or i.suffixes != ["RCP"]:
        return {}
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.float32(1) / value.astype(np.uint32).view(np.float32)
    return {i.operands[0]: found.view(np.uint32).astype(np.uint64)}


def _to_integer(walk: _Walk, i: Instruction) -> dict[str, Any]:
    value = walk.value(i.operands[1])
    if value is None or not {"U32", "TRUNC"} <= {*i.suffixes}:
        return {}
    number = value.astype(np.uint32).view(np.float32).astype(np.float64)
    number = np.nan_to_num(number, nan=0.0, posinf=2.0**32 - 1, neginf=0.0)
    return {i.operands[0]: np.clip(number, 0, 2.0**32 - 1).astype(np.uint64)}


_OPERATIONS: dict[str, Callable[[_Walk, Instruction], dict[str, Any]]] = {
    **dict.fromkeys(("IADD3", "IADD", "VIADD"), _sum),
    **dict.fromkeys(("IMAD", "IMUL"), _product),
    **dict.fromkeys(("MOV", "R2UR"), _moved),
    **dict.fromkeys(("S2R", "S2UR", "CS2R"), _special),
    **dict.fromkeys(("LDC", "ULDC", "LDCU"), _constant),
    **dict.fromkeys(("IMNMX", "VIMNMX", "VIADDMNMX"), _extreme),
    "LDG": _loaded,
    "IABS": _absolute,
    "HFMA2": _halves,
    "SGXT": _extended,
    "LOP3": _logic,
    "SHF": _shift,
    "LEA": _scaled,
    "ISETP": _compared,
    "SEL": _selected,
    "PRMT": _permuted,
    "PLOP3": _predicates_combined,
    "P2R": _packed_predicates,
    "VOTEU": _voted,
    "I2F": _to_float,
    "MUFU": _reciprocal,
    "F2I": _to_integer,
}
