"""Reads the machine code of the persistent kernels: do the weights stay on the chip, are tensor cores used?

    python tests/check_sass.py [--arch sm_90a] [--cubins FOLDER] [--files csrc/cuda/persistent/grid_tf32.cu ...]

Compiles sources with nvcc, disassembles them with nvdisasm and, for every kernel of the families grid, cluster and block,
builds the graph of its branches. The loop over time is the largest cycle of that graph that has products in it. Of it is
proved:
* no plain load from global memory has an address made from the pointer to W_hh: a data-flow analysis follows that pointer
  from the kernel's arguments, and must itself find such loads before the loop, or it fails;
* nothing is loaded from or stored to local memory (spilled), and nothing empties the L1 of the SM;
* with tensor cores (all arithmetic but strict fp32): as many operands of weights as the planner counts on lie in registers
  that nothing in the loop writes, and the instructions are those of the planned kind; strict fp32 has none of them.
Not proved: what a driver makes of PTX, and how long anything takes. nvcc is found as tests/check_ptxas.py finds it; nvdisasm
is $NVDISASM, or the one on PATH, beside nvcc, or in the nvidia-cuda-nvdisasm wheel of the running Python.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from check_ptxas import CELLS, MATHS, ROOT, cubin_name, find_nvcc, kernel_name

# One source of each family; tensor cores with 16 bits and with TF32.
DEFAULT = (("grid_fp16.cu", "sm_80"), ("grid_tf32.cu", "sm_90a"), ("cluster_bf16.cu", "sm_90a"), ("block_bf16.cu", "sm_80"))
TENSOR_CORE = {"fp16": r"HMMA\.16816\.F32$", "bf16": r"HMMA\.16816\.F32\.BF16$", "tf32": r"HMMA\.1688\.F32\.TF32$"}
# What reaches memory or the flow of control without writing a register.
NO_RESULT = tuple(
    "ST RED BAR BRA EXIT BSSY BSYNC BREAK NOP MEMBAR WARPSYNC YIELD CCTL SYNCS ENDCOLLECTIVE ERRBAR UCGABAR DEPBAR "
    "LDGDEPBAR CALL RET BPT NANOSLEEP ACQ PREEXIT".split()
)

PROBE = r"""
#include <cstddef>
#include <cstdio>
#include <initializer_list>
#include "cuda/persistent/sequence.h"
#include "plan/block_geometry.h"
using namespace fused_rnn;
using namespace fused_rnn::cuda;
int main() {
  std::printf("{\"forward\": [%zu, %zu], \"backward\": [%zu, %zu]", offsetof(ForwardSequence, p.weights[0].w_hh),
              offsetof(ForwardSequence, p.weights[1].w_hh), offsetof(BackwardSequence, p.weights[0].w_hh),
              offsetof(BackwardSequence, p.weights[1].w_hh));
  for (int cell : {0, 3, 4}) for (int math = 1; math < 5; ++math) for (int tiles = 1; tiles < 5; ++tiles)
    for (bool backward : {false, true}) for (bool cluster : {false, true}) {
      const PersistentShape s{CellKind(cell), MathKind(math), tiles, backward, cluster};
      std::printf(", \"%d %d %d %d %d\": %d", cell, math, tiles, backward, cluster, register_fragments(s));
      const BlockShape b{CellKind(cell), MathKind(math), backward};
      if (tiles == 1 && cluster) {
        std::printf(", \"block %d %d %d\": %d", cell, math, backward, block_register_chunks(b) * block_tiles(b));
      }
    }
  std::printf("}\n");
}
"""


@dataclasses.dataclass
class Instruction:
    guard: str  # "P0", "!UP1", "" without a predicate
    opcode: str
    operands: list[str]
    text: str


@dataclasses.dataclass
class Kernel:
    name: str
    code: list[Instruction]
    labels: dict[str, int]


def find_nvdisasm(nvcc: str) -> str:
    site = Path(sysconfig.get_path("purelib")) / "nvidia"
    wheels = sorted([*site.glob("cu*/bin/nvdisasm"), *site.glob("cuda_nvdisasm/bin/nvdisasm")], reverse=True)
    beside = Path(nvcc).with_name("nvdisasm")
    for candidate in (os.environ.get("NVDISASM"), shutil.which("nvdisasm"), beside, *wheels):
        if candidate and Path(candidate).is_file():
            return str(candidate)
    sys.exit("no nvdisasm: set NVDISASM, or run: pip install nvidia-cuda-nvdisasm")


def parse(sass: str) -> list[Kernel]:
    """Every kernel of nvdisasm's listing."""
    kernels: list[Kernel] = []
    for line in sass.splitlines():
        if line.startswith(".text."):
            kernels.append(Kernel(line[len(".text.") :].rstrip(":"), [], {}))
        elif kernels and (
            found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@(!?U?P\d+)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;", line)
        ):
            guard, opcode, rest = found.groups()
            operands = [part.strip() for part in rest.split(",")] if rest else []
            kernels[-1].code.append(Instruction(guard or "", opcode, operands, line.strip()))
        elif kernels and (found := re.match(r"([.$][\w.$]+):", line)):
            kernels[-1].labels[found[1]] = len(kernels[-1].code)
    return [kernel for kernel in kernels if kernel.code]


def successors(kernel: Kernel) -> list[list[int]]:
    """The instructions that may follow each; a call returns to the next, BSYNC goes on where its BSSY says."""
    result = []
    for index, instruction in enumerate(kernel.code):
        follow = [index + 1] if index + 1 < len(kernel.code) else []
        base = instruction.opcode.split(".")[0]
        if base in ("EXIT", "RET") and not instruction.guard:
            follow = []
        elif base in ("BRA", "WARPSYNC") and (target := label_of(kernel, instruction)) is not None:
            always = instruction.opcode == "BRA" and not instruction.guard and len(instruction.operands) == 1
            follow = [target] + ([] if always else follow)
        elif base == "CALL" and "`(.L" in instruction.text:  # a branch, by another name
            follow = [kernel.labels[re.search(r"`\(([^)]+)\)", instruction.text)[1]]] + (follow if instruction.guard else [])
        elif base in ("BRX", "JMP", "JMX"):
            raise ValueError(f"a jump that this cannot follow: {instruction.text}")
        result.append(follow)
    # Which BSSY reach which BSYNC: each known edge of a BSYNC may open the way to others.
    reaching: dict[int, frozenset[tuple[str, int]]] = {0: frozenset()}
    work = [0]
    while work:
        index = work.pop()
        known, instruction = reaching[index], kernel.code[index]
        base = instruction.opcode.split(".")[0]
        if base == "BSSY" and (target := label_of(kernel, instruction)) is not None:
            barrier = instruction.operands[0]
            known = frozenset([*(pair for pair in known if pair[0] != barrier), (barrier, target)])
        elif base == "BSYNC" and (targets := [to for name, to in known if name == instruction.operands[0]]):
            result[index] = sorted(set(targets) | (set(result[index]) if instruction.guard else set()))
        for follower in result[index]:
            before = reaching.get(follower)
            after = known if before is None else before | known
            if after != before:
                reaching[follower] = after
                work.append(follower)
    return result


def label_of(kernel: Kernel, instruction: Instruction) -> int | None:
    """Where an instruction's label is, if it has one inside the kernel."""
    found = re.search(r"`\(([^)]+)\)", instruction.text)
    return kernel.labels.get(found[1]) if found else None


def components(graph: list[list[int]]) -> list[set[int]]:
    """Strongly connected components of more than one instruction (Tarjan, without recursion)."""
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    found = []
    for root in range(len(graph)):
        if root in order:
            continue
        work = [(root, iter(graph[root]))]
        order[root] = low[root] = len(order)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, rest = work[-1]
            for child in rest:
                if child not in order:
                    order[child] = low[child] = len(order)
                    stack.append(child)
                    on_stack.add(child)
                    work.append((child, iter(graph[child])))
                    break
                if child in on_stack:
                    low[node] = min(low[node], order[child])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == order[node]:
                    members = set()
                    while True:
                        member = stack.pop()
                        on_stack.discard(member)
                        members.add(member)
                        if member == node:
                            break
                    if len(members) > 1:
                        found.append(members)
    return found


def registers(operand: str, width: int) -> list[str]:
    """The registers of an operand that starts at this one; none for constants, predicates and the zero register."""
    found = re.match(r"[-|~!]*(U?R)(\d+)", operand)
    return [f"{found[1]}{int(found[2]) + i}" for i in range(width)] if found else []


def result_registers(instruction: Instruction) -> list[str]:
    """What an instruction may write."""
    base = instruction.opcode.split(".")[0]
    if base.startswith(NO_RESULT) or not instruction.operands:
        return []
    wide = re.search(r"\.(64|128)\b", instruction.opcode)
    width = {"64": 2, "128": 4}[wide[1]] if wide else 1
    if base == "HMMA":
        width = 4
    elif base == "LDSM":
        width = 4
    elif "WIDE" in instruction.opcode or base in ("CS2R", "DMUL", "DADD", "DFMA"):
        width = max(width, 2) if ".32" not in instruction.opcode or base != "CS2R" else 1
    return registers(instruction.operands[0], width)


@dataclasses.dataclass(frozen=True)
class Value:
    """What is known of a register."""

    pointer: bool = False  # whether it may depend on the pointer to W_hh
    constants: frozenset[int] | None = None  # what it may be; None: anything
    guard: str = ""  # the predicate of its latest write, while that predicate still holds its value, and what that wrote
    written: Value | None = None
    same: str = ""  # of a predicate: the one that it is a copy of, while that one still holds its value

    def under(self, guard: str) -> Value:
        """The value where this predicate is true."""
        return self.written if self.written is not None and guard and guard == self.guard else self


UNKNOWN = Value()
State = dict[str, Value]


def merge(a: Value, b: Value) -> Value:
    if a == b:
        return a
    same = a.same if a.same == b.same else ""
    constants = None if a.constants is None or b.constants is None else a.constants | b.constants
    if a.guard == b.guard and a.written is not None and b.written is not None:
        return Value(a.pointer or b.pointer, constants, a.guard, merge(a.written, b.written), same)
    return Value(a.pointer or b.pointer, constants, same=same)


def opposite(guard: str) -> str:
    return guard[1:] if guard.startswith("!") else "!" + guard


def original(guard: str, state: State) -> str:
    """The guard in terms of the predicate that its predicate is a copy of."""
    name = guard.lstrip("!")
    return guard.replace(name, state.get(name, UNKNOWN).same or name) if name else ""


def copied_predicate(instruction: Instruction) -> str:
    """What an instruction copies to its first operand, if it is the compiler's copy of a predicate: true and true and it."""
    o = instruction.operands
    plain = instruction.opcode == "PLOP3.LUT" and not instruction.guard and o[1:4] == ["PT"] * 3 and o[5:] == ["0x80", "0x0"]
    return o[4] if plain and re.fullmatch(r"U?P\d+", o[4]) else ""


class PointerFlow:
    """Follows the pointer to W_hh through a kernel: `loads` are the loads whose address may depend on it."""

    def __init__(self, kernel: Kernel, graph: list[list[int]], parameters: int, offsets: list[int]) -> None:
        self.kernel, self.graph = kernel, graph
        self.pointers = [parameters + offset for offset in offsets]
        self.loads: set[int] = set()
        self.run()

    def run(self) -> None:
        states: dict[int, State] = {0: {}}
        work = [0]
        while work:
            index = work.pop()
            stepped = self.step(index, dict(states[index]))
            for follower in self.graph[index]:
                after = self.along(index, follower, stepped)
                known = states.get(follower)
                if known is None:
                    states[follower] = dict(after)
                    work.append(follower)
                    continue
                changed = False
                for register in known.keys() | after.keys():
                    old = known.get(register, UNKNOWN)
                    new = merge(old, after.get(register, UNKNOWN))
                    if new != old:
                        known[register] = new
                        changed = True
                if changed:
                    work.append(follower)

    def along(self, index: int, follower: int, state: State) -> State:
        """The state on one of the ways from an instruction on: a branch that is taken tells that its predicate is true."""
        instruction = self.kernel.code[index]
        if instruction.opcode != "BRA" or not instruction.guard or len(set(self.graph[index])) < 2:
            return state
        guard = original(instruction.guard, state)
        if follower != label_of(self.kernel, instruction):
            if len(instruction.operands) > 1:
                return state
            guard = opposite(guard)
        return {register: value.under(guard) for register, value in state.items()}

    def constant_operand(self, operand: str, state: State, width: int) -> list[Value] | None:
        """Values of a constant-bank operand's registers, None if it is another kind of operand."""
        found = re.match(r"[-|~]*c\[0x0\]\[(?:(U?R\d+|U?RZ)(?:\.\w+)?\+?)?(?:(-?0x[0-9a-f]+))?\]", operand)
        if not found:
            return None
        base = int(found[2] or "0", 16)
        starts: frozenset[int] | None = frozenset([base])
        if found[1] and not found[1].endswith("RZ"):
            known = state.get(found[1], UNKNOWN).constants
            starts = None if known is None else frozenset(base + index for index in known)
        hits = [
            starts is None or any(p <= start + 4 * i < p + 8 for start in starts for p in self.pointers)
            for i in range(width)
        ]
        return [Value(hit) for hit in hits]

    def value_of(self, operand: str, state: State, guard: str) -> Value:
        if found := re.fullmatch(r"-?0x[0-9a-f]+", operand):
            return Value(constants=frozenset([int(found[0], 16)]))
        constant = self.constant_operand(operand, state, 2)
        if constant is not None:
            return Value(any(value.pointer for value in constant))
        values = [state.get(name, UNKNOWN).under(guard) for name in re.findall(r"\bU?R\d+\b", operand)]
        return Value(any(v.pointer for v in values), values[0].constants if len(values) == 1 else None)

    def step(self, index: int, state: State) -> State:
        """The state after an instruction; notes loads through the pointer."""
        instruction = self.kernel.code[index]
        base, guard = instruction.opcode.split(".")[0], original(instruction.guard, state)
        # Loads with the scope of the device are ld.relaxed of the exchange; no compiler makes one of a plain load.
        if base in ("LDG", "LD", "LDGSTS") and ".STRONG" not in instruction.opcode:
            address = next(part for part in reversed(instruction.operands) if "[" in part)
            names = re.findall(r"\bU?R\d+\b", re.findall(r"\[([^\[\]]*)\]", address)[-1])
            names += [registers(name, 2)[1] for name in names]
            if any(state.get(name, UNKNOWN).under(guard).pointer for name in names):
                self.loads.add(index)
        results = result_registers(instruction)
        values = self.results(instruction, base, results, state, guard)
        # A predicate that is written no longer says which value a register has. Which of the first operands are results does
        # not matter here: to forget too much is safe.
        predicates = {part for part in instruction.operands[:3] if re.fullmatch(r"U?P\d+", part)}
        if predicates or base == "R2P":
            copied = original(copied_predicate(instruction), state)
            for register, value in state.items():
                if value.guard and (base == "R2P" or value.guard.lstrip("!") in predicates):
                    state[register] = Value(value.pointer, value.constants)
                if value.same and (base == "R2P" or register in predicates or value.same in predicates):
                    state[register] = UNKNOWN
            if copied and copied not in predicates:
                state[instruction.operands[0]] = Value(same=copied)
        for register, value in zip(results, values, strict=True):
            old = state.get(register, UNKNOWN)
            plain = Value(value.pointer, value.constants)
            if guard and guard.lstrip("!") not in predicates:
                both = merge(plain, old.under(opposite(guard)))
                state[register] = Value(both.pointer, both.constants, guard, plain)
            else:
                state[register] = merge(plain, old) if guard else plain
        return state

    def results(self, instruction: Instruction, base: str, results: list[str], state: State, guard: str) -> list[Value]:
        """The values of what an instruction writes."""
        sources = instruction.operands[1:]
        if base in ("LDC", "ULDC", "LDCU"):
            return self.constant_operand(sources[0], state, len(results)) or [UNKNOWN] * len(results)
        if base in ("LDG", "LD", "LDS", "LDL", "LDSM", "ATOM", "ATOMG", "ATOMS", "S2R", "S2UR", "CS2R"):
            return [UNKNOWN] * len(results)
        read = [self.value_of(part, state, guard) for part in sources if not re.fullmatch(r"!?U?P[\dT]+|0xf", part)]
        if instruction.opcode.startswith("IMAD.MOV"):  # zero times zero plus the last
            return read[-1:] * len(results)
        if base == "HFMA2" and sources[:2] == ["-RZ", "RZ"]:  # a constant as two halves
            halves = struct.unpack("<2H", struct.pack("<2e", float(sources[3]), float(sources[2])))
            return [Value(constants=frozenset([halves[0] | halves[1] << 16]))]
        if base in ("MOV", "UMOV", "SEL", "USEL") and read:
            value = read[0]
            for other in read[1:]:
                value = merge(value, other)
            return [value] * len(results)
        return [Value(any(value.pointer for value in read))] * len(results)


def check_kernel(kernel: Kernel, parameters: int, probe: dict) -> tuple[str, list[str]]:
    """(a line of figures, what is wrong)."""
    kind = re.search(r"CellKindE(\d)E.*?MathKindE(\d)E(?:Li(\d)E)?Lb(\d)E", kernel.name)
    if not kind:
        return "", []
    cell, math, tiles, backward = (int(digit or 0) for digit in kind.groups())
    block = "BlockGeometry" in kernel.name
    name = f"{kernel_name(kernel.name)}"
    tensor_core = TENSOR_CORE.get(MATHS[math])
    pattern = re.compile(tensor_core or r"FFMA(\.\w+)*$")
    graph = successors(kernel)
    products = {i for i, instruction in enumerate(kernel.code) if pattern.match(instruction.opcode)}
    loop = max(components(graph), key=lambda members: len(members & products), default=set())
    wrong = []
    if not products or not products & loop:
        return f"{name}: no products in a loop", [f"{name}: no {pattern.pattern} inside a loop"]
    flow = PointerFlow(kernel, graph, parameters, probe["backward" if backward else "forward"])
    inside, before = flow.loads & loop, flow.loads - loop
    if inside:
        wrong.append(f"{name}: W_hh is loaded in the time loop: {kernel.code[min(inside)].text}")
    if not before:
        wrong.append(f"{name}: no load of W_hh was found at all: the analysis does not understand this code")
    local = [kernel.code[i].text for i in loop if kernel.code[i].opcode.startswith(("LDL", "STL"))]
    if local:
        wrong.append(f"{name}: local memory in the time loop: {local[0]}")
    if any(kernel.code[i].opcode == "CCTL.IVALL" for i in loop):
        wrong.append(f"{name}: L1 is emptied in the time loop, by an acquire of all memory")
    written = {register for i in loop for register in result_registers(kernel.code[i])}
    figures = f"{len(before)} loads of W_hh before the time loop, {len(inside)} in it"
    if tensor_core:
        # Family block makes the product after the last step of backward behind the loop.
        if products - loop and not (block and backward):
            wrong.append(f"{name}: products outside of the time loop")
        quads = {tuple(registers(kernel.code[i].operands[1], 4)) for i in products}
        resident = {quad for quad in quads if quad and not set(quad) & written}
        shape = (
            f"block {cell} {math} {backward}"
            if block
            else f"{cell} {math} {tiles} {backward} {int('Cluster' in kernel.name)}"
        )
        planned = probe[shape]
        figures += f"; {len(products)} {kernel.code[min(products)].opcode}, {len(resident)} of {planned} operands resident"
        if len(resident) < planned:
            wrong.append(f"{name}: {len(resident)} operands of weights stay in registers, {planned} are planned")
    else:
        figures += f"; {len(products & loop)} FFMA in it"
        if any(instruction.opcode.startswith("HMMA") for instruction in kernel.code):
            wrong.append(f"{name}: tensor cores in strict {MATHS[math]}")
    return f"{name} ({CELLS[cell]}): {figures}", wrong


def disassemble(source: Path, arch: str, cubins: Path | None = None) -> str:
    """nvdisasm's listing of a source's device code, taken from the folder `cubins` where it is there."""
    nvcc, includes = find_nvcc()
    if cubins and (made := cubins / cubin_name(source, arch)).is_file():
        return subprocess.run([find_nvdisasm(nvcc), "-c", str(made)], check=True, capture_output=True, text=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/out.cubin"
        options = [
            "-std=c++17",
            "-O3",
            "-cubin",
            f"-arch={arch}",
            f"-I{ROOT / 'csrc'}",
            f"-I{ROOT / 'csrc' / 'cuda' / 'device'}",
        ]
        subprocess.run([nvcc, *options, *includes, str(source), "-o", cubin], check=True)
        return subprocess.run([find_nvdisasm(nvcc), "-c", cubin], check=True, capture_output=True, text=True).stdout


def probe_sources() -> dict:
    """From the sources: offsets of the pointers in the kernels' arguments, and operands of weights kept in registers."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(PROBE)
        compiler = os.environ.get("CXX", "c++")
        options = ["-std=c++17", "-Wno-invalid-offsetof", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cuda' / 'device'}"]
        subprocess.run([*compiler.split(), *options, str(source), "-o", f"{folder}/probe"], check=True)
        return json.loads(subprocess.run([f"{folder}/probe"], check=True, capture_output=True, text=True).stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", help="for all files; default: a source of each family, see DEFAULT")
    parser.add_argument("--files", nargs="+", type=Path)
    parser.add_argument("--cubins", type=Path, help="folder of device code that tests/check_ptxas.py --cubins has left")
    args = parser.parse_args()
    folder = ROOT / "csrc" / "cuda"
    jobs = [(source, arch) for name, arch in DEFAULT for source in folder.rglob(name)]
    if args.files or args.arch:
        sources = args.files or [
            path for family in ("grid", "cluster", "block") for path in sorted(folder.glob(f"*/{family}_*.cu"))
        ]
        jobs = [(source, args.arch or "sm_90a") for source in sources]
    probe = probe_sources()
    failures, count = [], 0
    for source, arch in jobs:
        start = time.monotonic()
        # Where a kernel's arguments begin in constant bank 0.
        number = int(re.sub(r"\D", "", arch))
        parameters = 0x380 if number >= 100 else 0x210 if number >= 90 else 0x160
        kernels = parse(disassemble(source, arch, args.cubins))
        print(f"{source.name} {arch}: {len(kernels)} kernels, {time.monotonic() - start:.1f} s", flush=True)
        for kernel in kernels:
            figures, wrong = check_kernel(kernel, parameters, probe)
            if figures:
                count += 1
                print(f"  {figures}", flush=True)
            failures += [f"{source.name} {arch}: {text}" for text in wrong]
        print(f"  {time.monotonic() - start:.1f} s", flush=True)
    if not count:
        failures.append("no kernel was checked")
    print(f"\n{count} kernels, {len(failures)} failures")
    print("\n".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
