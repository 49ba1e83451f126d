"""What kernels cost by their machine code: instructions by pipe, and a predicted time.

Nothing here was measured. A kernel's time in a captured graph is taken to be

    overhead + max(issue, each pipe, L1, L2, DRAM, waves · the latency of one warp)

`benchmarks.sass` counts the instructions of a warp: lanes that are masked out count like others,
slow paths not at all, and of a branch on data what it would skip. Rates are those of NVIDIA's
programming guide and data sheets as far as they say them; bandwidths are of copies, a tenth below
the data sheet. Doubts: 30 % on large grids; a factor of 1.5 to 2 below 10 us, where launches and
latency decide. The overhead may lie between 1.3 and 3 us. That the L1 looks up two tags a clock is
a guess. Integer rates of sm_100 are taken to be those of sm_90.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.sass import Assumption, Instruction, Machine, Route

OVERHEAD_US = 2.0  # of a kernel in a graph: gap, start, cold instructions, drain
ISSUE_EFFICIENCY = 0.8
PIPE_EFFICIENCY = 0.9
COPY_EFFICIENCY = 0.9  # of a data sheet's bandwidth


class Gpu(NamedTuple):
    """A model of a GPU. Rates are lanes, or what is said, per clock and multiprocessor.

    Attributes:
        name: As tables show it.
        arch: The architecture it executes.
        sms: Multiprocessors.
        ghz: Clock under load.
        fp32: Float operations.
        convert: I2FP and F2FP.
        fp64: Double operations.
        tensor: Multiply-adds of halves by HMMA; of tf32 half as many.
        grouped: The same by instructions of a group of warps, HGMMA and UTCHMMA.
        warps: That are resident.
        blocks: That are resident.
        shared_kb: Shared memory.
        dram: Bandwidth of a copy in GB/s.
        l2: Bandwidth of a copy that stays in the L2, in GB/s.
        l2_mb: Size of the L2.
        l2_latency: Clocks.
        dram_latency: Clocks.
    """

    name: str
    arch: int
    sms: int
    ghz: float
    fp32: int
    convert: int
    fp64: int
    tensor: int
    grouped: int
    warps: int
    blocks: int
    shared_kb: int
    dram: float
    l2: float
    l2_mb: int
    l2_latency: int
    dram_latency: int


IMAD, ALU, XU, ISSUE = 64, 64, 16, 4  # alike on all: lanes; warps
L1_BYTES, L1_TAGS = 128, 2

GPUS = {
    80: Gpu("A100", 80, 108, 1.41, 64, 16, 32, 1024, 1024, 64, 32, 164, 1650, 4000, 40, 220, 560),
    89: Gpu("RTX 4090", 89, 128, 2.5, 128, 64, 2, 256, 256, 48, 24, 100, 920, 5000, 72, 280, 600),
    90: Gpu("H100", 90, 132, 1.75, 128, 64, 64, 1280, 2048, 64, 32, 228, 3000, 5500, 50, 270, 650),
    100: Gpu(
        "B200", 100, 148, 1.85, 128, 64, 64, 1280, 4096, 64, 32, 228, 7000, 9000, 126, 350, 800
    ),
}


def gpu_of(name: str, arch: int, sms: int, l2_bytes: int = 0) -> Gpu:
    """The model of a device that is there: that of its architecture, with what it tells.

    Args:
        name: Of the device.
        arch: Its compute capability, such as 90.
        sms: Its multiprocessors.
        l2_bytes: Of its L2; 0 if it does not tell.

    Raises:
        ValueError: If there is no model of the architecture.
    """
    if arch not in GPUS:
        raise ValueError(f"the device must be of one of {sorted(GPUS)}, got {name}, sm_{arch}")
    gpu = GPUS[arch]._replace(name=name, sms=sms)
    if l2_bytes:
        gpu = gpu._replace(l2_mb=round(l2_bytes / 2**20))
    for part, gb_per_s in _SHEETS.items():
        if part in name:
            return gpu._replace(dram=round(COPY_EFFICIENCY * gb_per_s, -1))
    return gpu


_SHEETS = {  # where a device's memory is not that of its architecture's model
    "H200": 4800,
    "H100 PCIe": 2040,
    "H100 NVL": 3940,
    "A100-PCIE-40GB": 1560,
    "A100-SXM4-40GB": 1560,
}

# What data decides, by kernel. Whoever adds a loop that data ends, or an exit that data takes,
# says here how often: without it the count is refused.
ASSUMED: dict[str, Assumption] = {
    # a warp of 32 rows walks on half a time on average, at 192 rows
    "draw_kernel": Assumption(turns=0.5),
    # one program adds up the sums of all
    "mixmatch_loss_kernel": Assumption(goes_on=lambda programs: 1 / programs),
    # of the programs that count a view's pixels, three at 96 px, the last makes its tables
    "event_kernel": Assumption(goes_on=lambda programs: 1 / 3),
}

_NAMES = {
    "alu": "IADD3 IADD LOP3 SHF LEA ISETP SEL PRMT VIMNMX VIMNMX3 IMNMX FMNMX FMNMX3 FSETP FSEL "
    "IABS VIADD VIADDMNMX SGXT PLOP3 MOV BMSK P2R R2P VABSDIFF CS2R FCHK FSWZADD VOTE",
    "fma": "FFMA FMUL FADD HFMA2 HADD2 HMUL2 HSET2 HSETP2 HMNMX2 FFMA2 FADD2 FMUL2",
    "imad": "IMAD IMUL",
    "xu": "MUFU I2F F2I F2F POPC FLO FRND BREV",
    "convert": "I2FP F2FP",
    "fp64": "DFMA DMUL DADD DSETP DMNMX",
    "lsu": "LDG STG LDS STS LDL STL LDSM STSM LD ST ATOMG ATOMS RED SHFL LDGSTS",
    "tensor": "HMMA HGMMA IMMA QGMMA UTCHMMA UTCQMMA",
}
PIPES = {name: pipe for pipe, names in _NAMES.items() for name in names.split()}
OF_SHARED = ("LDS", "STS", "LDSM", "STSM", "ATOMS")
OF_GLOBAL = ("LDG", "STG", "LDGSTS", "ATOMG", "RED")


class Count(NamedTuple):
    """What a warp of a launch executes, on average over the programs.

    Attributes:
        pipes: Instructions by pipe; "other" is what has none that could be busy.
        loads: Loads from memory.
        stores: Stores to memory.
        multiply_adds: Of the tensor cores, in halves; those of tf32 count twice.
        grouped: The same of instructions that a group of four warps shares, a warp's part.
        tags: Look-ups of the L1.
        bytes_l1: That pass through L1 and shared memory, with what comes along in sectors.
    """

    pipes: dict[str, float]
    loads: float
    stores: float
    multiply_adds: float
    grouped: float
    tags: float
    bytes_l1: float

    @property
    def instructions(self) -> float:
        """All of them."""
        return sum(self.pipes.values())


class Prediction(NamedTuple):
    """What a launch is predicted to take.

    Attributes:
        us: The time.
        bound: What binds it, a key of ``of``; "overhead" where all of ``of`` is less than that.
        of: Microseconds that each resource would take alone.
        resident: Programs that a multiprocessor holds.
        clocks: Latency of a program.
    """

    us: float
    bound: str
    of: dict[str, float]
    resident: int
    clocks: float


Layout = dict[str, list[int]]  # of a tile, as Triton's intermediate code tells it


def counted(machine: Machine, routes: Sequence[Route], layouts: Sequence[Layout] = ()) -> Count:
    """Count what a warp executes.

    Args:
        machine: The kernel.
        routes: From `benchmarks.sass.trace`.
        layouts: Of the tiles that are loaded byte by byte.
    """
    times: Counter[int] = Counter()
    for route in routes:
        for step, expected in zip(route.steps, route.times, strict=True):
            times[step] += route.share * expected  # type: ignore[assignment]
    pipes: dict[str, float] = defaultdict(float)
    loads = stores = alone = grouped = tags = bytes_l1 = 0.0
    for step, count in times.items():
        i = machine.code[step]
        pipes[_pipe(i) or "other"] += count
        loads += count * (i.name in ("LDG", "LDGSTS"))
        stores += count * (i.name in ("STG", "RED"))
        if _pipe(i) == "tensor":
            work = count * _multiply_adds(i)
            alone, grouped = alone + work * (not _grouped(i)), grouped + work * _grouped(i)
        if i.name in OF_SHARED:
            bytes_l1 += count * 32 * i.width
        elif i.name in OF_GLOBAL:
            per_request = _request(i, layouts)
            tags += count * per_request[0]
            bytes_l1 += count * 32 * per_request[1]
    return Count(dict(pipes), loads, stores, alone, grouped, tags, bytes_l1)


def _pipe(i: Instruction) -> str | None:
    return PIPES.get(i.name)  # those of the uniform path keep no pipe busy


def _grouped(i: Instruction) -> bool:
    """Whether four warps share a tensor instruction."""
    return i.name not in ("HMMA", "IMMA")


def _multiply_adds(i: Instruction) -> float:
    """A warp's multiply-adds of a tensor instruction, in halves.

    Raises:
        ValueError: If its shape is not part of its name.
    """
    if i.name.startswith("UTC"):  # the shape lies in a descriptor: a guess, and the least there is
        return 64 * 32 * 16 / 4
    shape = next((s for s in i.suffixes if re.fullmatch(r"\d{3,6}|\d+x\d+x\d+", s)), None)
    if shape is None:
        raise ValueError(f"a tensor instruction must name its shape, got {i}")
    if "x" in shape:
        sizes = [int(size) for size in shape.split("x")]
    else:  # 16816 is 16 by 8 by 16
        sizes = [int(shape[:2]), int(shape[2]), int(shape[3:])]
    product = sizes[0] * sizes[1] * sizes[2] / (4 if _grouped(i) else 1)
    return product * (2 if "TF32" in i.suffixes else 1)


def _request(i: Instruction, layouts: Sequence[Layout]) -> tuple[float, float]:
    """Tags and sectors of 32 bytes of a warp's access, whose addresses are not known.

    Single bytes lie as the tile of pixels does. Of what is four or eight bytes wide and loaded, all
    threads are taken to want the same or neighbours: draws, words of a line.
    """
    if {"U8", "S8"} & {*i.suffixes} and layouts:
        lines, threads = (1, *layouts[0]["threadsPerWarp"])[-2:]
        span = threads * layouts[0]["sizePerThread"][-1]
        return lines * max(1.0, span / 128 + 0.25), lines * (span / 32 + 0.75)
    return max(1.0, 32 * i.width / 128), float(i.width)


def latency(machine: Machine, route: Route, gpu: Gpu, far: float) -> float:
    """Clocks of one warp that issues in order and waits for its operands.

    Args:
        machine: The kernel.
        route: What its program executes; what is expected less than 0.3 times is left out, and
            what data lets few programs do counts whole, since the last one does it.
        gpu: Whose latencies these are.
        far: Clocks of the first load at a place in the code; later turns find the L1.
    """
    ready: dict[str, float] = defaultdict(float)
    clock = 0.0
    seen: set[int] = set()
    for step in route.steps:
        i = machine.code[step]
        clock = max([clock + 1, *(ready[name] for name in i.reads)])
        pipe = _pipe(i)
        delay = 4.5
        if i.name in ("LDG", "ATOMG", "LDGSTS"):
            delay = 40.0 if step in seen else far
        elif i.name in (*OF_SHARED, "SHFL", "LDC", "LDCU", "ULDC", "S2R", "S2UR", "REDUX"):
            delay = 28.0
        elif pipe == "xu":
            delay, clock = 20.0, clock + 3
        elif pipe == "fp64":
            delay, clock = 8.0 + 64 / gpu.fp64, clock + 32 * 4 / gpu.fp64 / 2 - 1
        elif pipe == "tensor":
            rate = gpu.grouped if _grouped(i) else gpu.tensor
            delay, clock = 30.0, clock + 4 * _multiply_adds(i) / rate - 1
        seen.add(step)
        for name in i.writes:
            ready[name] = clock + delay
    return clock


def predicted(
    machine: Machine,
    routes: Sequence[Route],
    count: Count,
    gpu: Gpu,
    *,
    programs: int,
    warps: int,
    shared: int,
    moved: int,
    distinct: int,
    overhead_us: float = OVERHEAD_US,
) -> Prediction:
    """Predict the time of a launch in a captured graph, and what binds it.

    Args:
        machine: The kernel.
        routes: What its programs execute.
        count: Of a warp.
        gpu: Where it is to run.
        programs: Of the launch.
        warps: Of a program.
        shared: Bytes of shared memory of a program.
        moved: Bytes read and written; the L2 serves them.
        distinct: Bytes that differ; the DRAM serves them, unless half the L2 holds them.
        overhead_us: Of any kernel.
    """
    pipes: dict[str, float] = defaultdict(float, count.pipes)
    lanes = 32 * warps / PIPE_EFFICIENCY
    clocks = {  # that a program keeps a multiprocessor busy
        "issue": count.instructions * warps / ISSUE / ISSUE_EFFICIENCY,
        "alu": lanes * pipes["alu"] / ALU,
        "fma": lanes * max(pipes["imad"] / IMAD, (pipes["fma"] + pipes["imad"]) / gpu.fp32),
        "xu": lanes * pipes["xu"] / XU,
        "convert": lanes * pipes["convert"] / gpu.convert,
        "fp64": lanes * pipes["fp64"] / gpu.fp64,
        "tensor": warps
        * (count.multiply_adds / gpu.tensor + count.grouped / gpu.grouped)
        / PIPE_EFFICIENCY,
        "L1": warps
        * max(pipes["lsu"], count.tags / L1_TAGS, count.bytes_l1 / L1_BYTES)
        / PIPE_EFFICIENCY,
    }
    resident = _resident(machine.resources.registers, warps, shared, gpu)
    held = -(-programs // gpu.sms)  # by the multiprocessor that has most
    turns = held if held <= resident else programs / gpu.sms
    waves = max(programs / (gpu.sms * resident), 1.0)
    cached = distinct < gpu.l2_mb * 2**20 / 2
    far = gpu.l2_latency if cached else (gpu.l2_latency + gpu.dram_latency) / 2
    latencies = [latency(machine, route, gpu, far) for route in routes]
    mean = sum(route.share * one for route, one in zip(routes, latencies, strict=True))
    single = max(latencies) if waves == 1 else mean
    of = {bound: value * turns / gpu.ghz / 1e3 for bound, value in clocks.items()}
    of["latency"] = single * waves / gpu.ghz / 1e3
    of["L2"] = moved / gpu.l2 / 1e3
    of["DRAM"] = 0.0 if cached else distinct / gpu.dram / 1e3
    largest = max(of, key=lambda bound: of[bound])
    bound = largest if of[largest] >= overhead_us else "overhead"
    return Prediction(overhead_us + of[largest], bound, of, resident, single)


def _resident(registers: int, warps: int, shared: int, gpu: Gpu) -> int:
    """Programs that a multiprocessor holds."""
    of_warp = -(-registers // 8) * 8 * 32
    found = min(gpu.blocks, gpu.warps // warps, 65536 // (of_warp * warps))
    if shared:
        found = min(found, gpu.shared_kb * 1024 // (shared + 1024))
    return max(found, 1)
