"""What a compiled program does on one device, read from its text: products, traffic, collectives.

XLA's own cost analysis counts the body of a loop once and knows nothing of kernels written by hand.
Here everything counts as often as its loop runs, and a kernel costs what it says of itself; splash
attention says nothing and costs what all blocks of its rows do, as if they were one segment; so do
layers of text, though they visit the blocks of prompts alone.
Traffic is with the large memory alone: what moves between operations in a smaller one is free, and
what is sliced in place is read by the slice. An upper bound, as operations may share what one has
read.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator

import numpy as np

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
# They move nothing themselves.
FREE = {
    "after-all",
    "bitcast",
    "call",
    "conditional",
    "constant",
    "get-tuple-element",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
    "while",
}
_BITS = {"pred": 8, "token": 0}
# Products of a block of queries and one of keys, in JAX's splash attention, which tells no costs.
SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


@dataclasses.dataclass(frozen=True)
class Array:
    dtype: str
    dims: tuple[int, ...]
    large: bool  # whether it is in the large memory

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        bits = _BITS.get(self.dtype) or int((re.search(r"\d+", self.dtype) or "0")[0])
        return self.size * bits / 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    result: tuple[Array, ...]  # the leaves of a tuple
    opcode: str
    argument: str  # what stands in its parentheses
    attributes: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.argument)

    def called(self, attribute: str) -> list[str]:
        """The computations that an attribute such as `calls` names."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
        return re.findall(r"%([\w.\-]+)", found[1]) if found else []


Computation = dict[str, Instruction]  # in the order in which they run


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a module by name, and which of them is the entry."""
    computations: dict[str, Computation] = {}
    current, entry = {}, ""
    # What kernels tell may go over several lines.
    for line in re.split(r"\n(?=\s+(?:ROOT )?%|ENTRY |%|\}\s*(?:\n|$))", text):
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if header:
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif found := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.*)", line, re.DOTALL):
            current[found[1]] = _instruction(found[1], found[2])
    return computations, entry


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    begin = rest.index("(")
    end = _closing(rest, begin)
    return Instruction(name, arrays(shape), rest[:begin], rest[begin + 1 : end - 1], rest[end:])


def _closing(text: str, begin: int) -> int:
    """Behind the bracket that closes the one at `begin`."""
    depth = 0
    for found in re.finditer(r"[()]", text[begin:]):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return begin + found.end()
    raise ValueError(f"no closing bracket in {text[begin : begin + 60]!r}")


def arrays(shape: str) -> tuple[Array, ...]:
    """The leaves of a shape such as `(f32[2,3]{1,0:T(8,128)S(1)}, u32[])`."""
    return tuple(
        Array(dtype, tuple(map(int, filter(None, dims.split(",")))), "S(" not in layout)
        for dtype, dims, layout in re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", shape)
    )


@dataclasses.dataclass(frozen=True)
class Collective:
    kind: str
    groups: tuple[tuple[int, ...], ...]  # of devices by number: one group, or the pairs that send
    sent: float  # bytes that each device sends, at the least
    arrays: tuple[Array, ...]  # what it makes; of a reduce-scatter, what it is made of
    name: str


@dataclasses.dataclass(frozen=True)
class Operation:
    """Something that takes time, as often as it runs in a step."""

    times: int
    flops: float
    bytes: float
    collective: Collective | None
    hidden_by: tuple["Operation", ...]  # what runs while an asynchronous collective is under way
    asynchronous: bool


def operations(text: str) -> Iterator[Operation]:
    """All operations of a program, those of loops with how often they run.

    Of the branches of a choice all are counted.
    """
    reader = _Reader(*parse(text))
    yield from reader.run(reader.entry, 1)


class _Reader:
    def __init__(self, computations: dict[str, Computation], entry: str):
        self.computations, self.entry = computations, entry

    def run(self, name: str, times: int) -> Iterator[Operation]:
        waiting: dict[str, list[Operation]] = {}  # collectives under way -> what ran meanwhile
        started: dict[str, Collective] = {}
        chains: set[str] = set()  # those under way in the steps of fusions

        def ended(key: str) -> Operation:
            return Operation(times, 0.0, 0.0, started[key], tuple(waiting.pop(key)), True)

        for instruction in self.computations[name].values():
            phase, key, chained = self.phase(instruction)
            if phase == "done" and key in waiting:
                yield ended(key)
                continue
            found = list(self._one(name, instruction, times, counted=not phase))
            if phase == "start":
                found = [one for one in found if one.flops]  # it may begin beside a product
            for other, meanwhile in waiting.items():
                if other not in chains or other == key:  # a chain goes on in its own steps alone
                    meanwhile += found
            yield from found
            if phase == "start":
                waiting[key], started[key] = [], self.collective(instruction)
                chains |= {key} if chained else set()
        for key in list(waiting):  # they end in the next round of a loop
            yield ended(key)

    def phase(self, instruction: Instruction) -> tuple[str, str, bool]:
        """Of an asynchronous collective: its phase, its name, and whether it is a chain.

        On a TPU it may be a chain of fusions, whose steps compute something else beside it. The
        phase is "start", "step" or "done"; "" of anything else.
        """
        opcode = instruction.opcode
        if opcode.endswith("-done") and instruction.operands:
            return "done", instruction.operands[0], False
        if opcode.endswith("-start") and self.collective(instruction):
            return "start", instruction.name, False
        if opcode == "fusion":
            (called,) = instruction.called("calls")
            inner = self.computations[called].values()
            chains = set(filter(None, map(_chain, inner)))
            if len(chains) > 1:
                raise ValueError(f"fusion {instruction.name} is of several chains: {chains}")
            if chains:
                attributes = " ".join(one.attributes for one in inner)
                ends = ("start", "done")
                named = [end for end in ends if f"AsyncCollective{end.title()}" in attributes]
                return (named or ["step"])[0], chains.pop(), True
        return "", "", False

    def _one(
        self, within: str, instruction: Instruction, times: int, *, counted: bool
    ) -> Iterator[Operation]:
        """What an instruction does; an exchange that its phases tell of is not `counted`."""
        opcode = instruction.opcode
        if opcode == "while":
            (condition,), (body,) = map(instruction.called, ("condition", "body"))
            yield from self.run(body, times * self.trips(instruction, condition))
        elif opcode in ("call", "conditional"):
            names = ("to_apply", "branch_computations", "true_computation", "false_computation")
            for called in (inner for name in names for inner in instruction.called(name)):
                yield from self.run(called, times)
        elif opcode not in FREE and not opcode.endswith(("-start", "-done")):
            moved = self.bytes(within, instruction)
            one = self.collective(instruction) if counted else None
            yield Operation(times, self.flops(within, instruction), moved, one, (), False)
        elif opcode == "copy-start":
            moved = max(array.bytes for array in instruction.result[:2] if array.large)
            yield Operation(times, 0.0, moved, None, (), False)

    def trips(self, loop: Instruction, condition: str) -> int:
        """How often a loop of `jax.lax.scan` runs: its counter goes from 0 to a constant."""
        if told := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(told[1])
        limits = [
            int(found.argument)
            for found in self.computations[condition].values()
            if found.opcode == "constant" and re.fullmatch(r"\d+", found.argument)
        ]
        if len(limits) != 1:
            raise ValueError(f"loop {loop.name} has no constant number of rounds: {limits}")
        return limits[0]

    def _result_of(self, within: str, name: str) -> tuple[Array, ...]:
        return self.computations[within][name].result

    def bytes(self, within: str, instruction: Instruction) -> float:
        """Traffic with the large memory."""
        if instruction.opcode == "fusion":
            return self._bytes_of_fusion(within, instruction)
        if told := _told(instruction):
            return float(told["bytes_accessed"])
        read = [self._result_of(within, operand) for operand in instruction.operands]
        made = sum(array.bytes for array in instruction.result if array.large)
        if instruction.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * made
        if instruction.opcode == "dynamic-update-slice":
            return 2 * sum(array.bytes for array in read[1])
        return made + sum(array.bytes for one in read for array in one if array.large)

    def _bytes_of_fusion(self, within: str, instruction: Instruction) -> float:
        (called,) = instruction.called("calls")
        inner = self.computations[called]
        # A step of a chain hands on what the chain exchanges, neither read nor written.
        passes = any(map(_chain, inner.values()))
        users: dict[str, list[Instruction]] = {}
        for one in inner.values():
            for operand in one.operands:
                if not (passes and (one.opcode == "tuple" or _chain(one))):
                    users.setdefault(operand, []).append(one)
        total = 0.0
        for one in inner.values():
            if one.opcode != "parameter":
                continue
            operand = self._result_of(within, instruction.operands[int(one.argument)])
            if operand[0].large:
                total += self._read(one, users, inner)
        *_, root = inner.values()
        handed_on = [False] * len(instruction.result)
        if passes and root.opcode == "tuple":
            made = [inner[operand] for operand in root.operands]
            handed_on = [one.opcode == "parameter" or bool(_chain(one)) for one in made]
        written = sum(
            array.bytes
            for array, untouched in zip(instruction.result, handed_on, strict=True)
            if array.large and not untouched
        )
        updates = [one for one in inner.values() if one.opcode == "dynamic-update-slice"]
        for one in updates:
            if written >= one.result[0].bytes:  # in place: all but the slice stays
                written += inner[one.operands[1]].result[0].bytes - one.result[0].bytes
        return total + max(written, 0.0)

    def _read(self, one: Instruction, users: dict[str, list[Instruction]], inner) -> float:
        """Bytes that a fusion reads of a parameter, or of what is made of it."""
        total = 0.0
        for user in users.get(one.name, ()):
            if user.opcode == "bitcast":
                total += self._read(user, users, inner)
            elif user.opcode in ("dynamic-slice", "slice"):
                total += user.result[0].bytes
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == one.name:
                total += 0.0
            else:
                return one.result[0].bytes
        return min(total, one.result[0].bytes)

    def flops(self, within: str, instruction: Instruction) -> float:
        """Of matrix products and convolutions; a kernel tells its own, or is known here."""
        if instruction.opcode == "fusion":
            (called,) = instruction.called("calls")
            return sum(self.flops(called, one) for one in self.computations[called].values())
        if instruction.opcode in ("convolution", "dot"):
            left, right = (self._result_of(within, name)[0] for name in instruction.operands[:2])
            count = _of_convolution if instruction.opcode == "convolution" else _of_dot
            return count(instruction, left, right)
        if told := _told(instruction):
            return float(told["flops"])
        if products := re.match(r"splash_mha_(fwd|dq|dkv)", instruction.name):
            (q,), (k,) = (self._result_of(within, name) for name in instruction.operands[2:4])
            return 2.0 * SPLASH_PRODUCTS[products[1]] * q.size * k.dims[-2]
        return 0.0

    def collective(self, instruction: Instruction) -> Collective | None:
        """What an operation exchanges between devices."""
        opcode = instruction.opcode.removesuffix("-start")
        if opcode in ("async", "fusion"):
            (called,) = instruction.called("calls")
            inner = self.computations[called].values()
            found = next(filter(None, map(self.collective, inner)), None)
            # A fusion of an all-reduce and a slice is a reduce-scatter; a chain's is whole.
            alone = opcode == "fusion" and not any(map(_chain, inner))
            if found and alone and found.kind == "all-reduce":
                return dataclasses.replace(found, kind="reduce-scatter", sent=found.sent / 2)
            return found
        if opcode not in COLLECTIVES:
            return None
        made = instruction.result
        if instruction.opcode.endswith("-start") and opcode != "all-reduce":
            # Operands, results, and counters of what is under way.
            made = tuple(array for array in made if not (array.dtype == "u32" and not array.dims))
            made = made[len(made) // 2 :]
        if opcode == "collective-permute":
            pairs = re.findall(r"\{(\d+),(\d+)\}", instruction.attributes.split("metadata=")[0])
            groups = tuple((int(source), int(target)) for source, target in pairs)
            return Collective(opcode, groups, sum(a.bytes for a in made), made, instruction.name)
        group = first_group(instruction.attributes)
        n = len(group)
        whole = sum(array.bytes for array in made) * (n if opcode == "reduce-scatter" else 1)
        sent = whole * (n - 1) / n * (2 if opcode == "all-reduce" else 1)
        return Collective(opcode, (group,), sent, made, instruction.name)


def first_group(attributes: str) -> tuple[int, ...]:
    """The devices of the first of `replica_groups`, which are written in one of three ways.

    {{0,1},{2,3}}     [2,2]<=[2,2]T(1,0)     mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}
    """
    text = attributes[attributes.index("replica_groups=") + len("replica_groups=") :]
    if listed := re.match(r"\{\{([\d,]+)\}", text):
        return tuple(map(int, listed[1].split(",")))
    if iota := re.match(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return tuple(_iota(iota[3], iota[4])[: int(iota[2])].tolist())
    ids = r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    if over := re.match(r"mesh\[([^\]]*)\]" + ids + r"\s*\{([^}]*)\}", text):
        axes = {name: int(size) for name, size in re.findall(r"'([\w]+)'=(\d+)", over[1])}
        chosen = re.findall(r"'([\w]+)'", over[4])
        count = math.prod(axes.values())
        devices = _iota(over[2] or str(count), over[3]).reshape(tuple(axes.values()))
        first = devices[tuple(slice(None) if name in chosen else 0 for name in axes)]
        return tuple(first.reshape(-1).tolist())
    raise ValueError(f"replica groups of an unknown form: {text[:80]}")


def _iota(dims: str, order: str | None) -> np.ndarray:
    """0, 1, ... as an array of `dims` whose axes are put in another order, flat."""
    sizes = [int(size) for size in dims.split(",")]
    axes = [int(axis) for axis in order.split(",")] if order else None
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(axes).reshape(-1)


def _chain(instruction: Instruction) -> str | None:
    """The name of the chain of fusions that a collective is exchanged in, if it is."""
    found = re.search(r'\bchain_id="([^"]*)"', instruction.attributes)
    return found and found[1]


def _told(instruction: Instruction) -> dict | None:
    """What a kernel written by hand says that it costs."""
    found = re.search(r'"cost_estimate":(\{[^}]*\})', instruction.attributes)
    return json.loads(found[1]) if found else None


def _of_dot(instruction: Instruction, left: Array, right: Array) -> float:
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    axes = [int(axis) for axis in filter(None, found[1].split(","))] if found else []
    return 2.0 * instruction.result[0].size * math.prod(left.dims[axis] for axis in axes)


def _of_convolution(instruction: Instruction, left: Array, right: Array) -> float:
    """2 x outputs x input features x taps, of the taps those alone that meet no padding."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    _, kernel, output = labels.groups()
    out = instruction.result[0]
    features = out.dims[output.index("b")] * out.dims[output.index("f")]
    total = 2.0 * features * right.dims[kernel.index("i")]
    window = _window(instruction.attributes)
    for axis in range(len(window["size"])):
        size = left.dims[labels[1].index(str(axis))]
        outputs = out.dims[output.index(str(axis))]
        total *= _meetings(size, outputs, *(window[name][axis] for name in window))
    return total


def _window(attributes: str) -> dict[str, list]:
    """Size, stride, padding before, and dilations of a convolution, for each axis of its window."""
    text = re.search(r"window=\{([^}]*)\}", attributes)
    told = dict(part.split("=") for part in text[1].split()) if text else {}
    sizes = [int(size) for size in told.get("size", "").split("x") if size]

    def numbers(name: str, default: int) -> list[int]:
        given = told.get(name)
        return [int(x.split("_")[0]) for x in given.split("x")] if given else [default] * len(sizes)

    return {
        "size": sizes,
        "stride": numbers("stride", 1),
        "pad": numbers("pad", 0),
        "lhs_dilate": numbers("lhs_dilate", 1),
        "rhs_dilate": numbers("rhs_dilate", 1),
    }


def _meetings(
    size: int, outputs: int, taps: int, stride: int, pad: int, dilate: int, tap_dilate: int
) -> int:
    """Pairs of an output and a tap along an axis where the tap meets an input."""
    if taps == outputs == 1 == size:
        return 1
    at = np.arange(outputs)[:, None] * stride + np.arange(taps)[None] * tap_dilate - pad
    return int(((at >= 0) & (at <= (size - 1) * dilate) & (at % dilate == 0)).sum())
