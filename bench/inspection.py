"""What the compiler made of a kernel: registers, shared memory, occupancy, instructions, hot loop.

Kernels are compiled for GPUs that need not be there; nothing runs.  A process that interprets
kernels cannot compile them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from tritorch import launch as launching
from tritorch.bench import estimate, machine_code
from tritorch.bench.occupancy import occupancy
from tritorch.bench.recording import Recorded, record
from tritorch.registry import Maker, OpSpec, Sample
from tritorch.testing import calls, configurations, dry, hosting, input_guess, redirect, requests
from tritorch.testing import inputs as texts
from tritorch.testing.errors import RequestError

# what a kernel of `--emit` can be shown as, from its source to its machine code
STAGES = ("ttir", "ttgir", "llir", "ptx", "sass", "amdgcn")
# sizes of a user's tensors where nothing else is said, and elements of the largest
_SIZE, _MOST = 1024, 1 << 24


@dataclass(frozen=True)
class Label:
    """Which launch it is: of which op, in which call, dtype and pass, and for which target.

    `configuration`: the table's entry that was forced, empty where selection chose.  `number`: of
    the launches of one kernel in one pass.
    """

    op: str
    call: str
    dtype: str
    which: str
    target: str
    configuration: str = ""
    kernel: str = ""
    number: int = 0

    @property
    def key(self) -> tuple[str | int, ...]:
        return tuple(asdict(self).values())


@dataclass(frozen=True)
class Inspection:
    """One kernel, compiled and launched in one way.

    `stack` and `shared` in bytes.  `kinds`, `shapes`, `widths`: counts of instructions, of the
    matrix instructions by shape, of the accesses to global memory by bytes per thread.  `hot`: the
    same of one turn of the hot loop; `per_product` its instructions per matrix instruction.
    """

    label: Label
    settings: dict[str, Any]
    grid: tuple[int, int, int]
    registers: int
    stack: int
    spills: int
    shared: int
    shared_limit: int
    blocks: int
    warps: int
    most_warps: int
    limit: str
    instructions: int
    kinds: dict[str, int]
    shapes: dict[str, int]
    widths: dict[str, dict[str, int]]
    hot: dict[str, Any]
    per_product: float | None
    serialized: bool
    problems: list[str]
    estimate: dict[str, Any]
    launch: dry.Launch = field(repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """As a row of a result file."""
        row = {name: value for name, value in vars(self).items() if name not in ("label", "launch")}
        return {**asdict(self.label), **row, "grid": list(self.grid)}


def inspected(launch: dry.Launch, label: Label) -> Inspection:
    """The inspection of one launch that was compiled for the label's target."""
    target = label.target
    limits, used = dry.TARGETS[target], dry.resources(launch)
    held = occupancy(used, target)
    code = machine_code.read(used.code)
    loop = machine_code.hot_loop(code)
    path = [] if loop is None else [code[n] for n in loop.path]
    products = sum(one.kind == machine_code.TENSOR_CORE for one in path)
    guess = estimate.of_launch(launch, target)
    return Inspection(
        label=label,
        settings={
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in {
                **launch.constexprs,
                "num_warps": launch.num_warps,
                "num_stages": launch.num_stages,
            }.items()
        },
        grid=launch.grid,
        registers=used.registers,
        stack=used.stack,
        spills=used.spills,
        shared=used.shared,
        shared_limit=limits.shared_memory,
        blocks=held.blocks,
        warps=held.warps,
        most_warps=held.most,
        limit=held.limit,
        instructions=len(code),
        kinds=machine_code.kinds(code),
        shapes=_shapes(machine_code.shapes(code), launch),
        widths=machine_code.widths(code),
        hot={
            "instructions": len(path),
            "kinds": machine_code.kinds(path),
            "shapes": _shapes(machine_code.shapes(path), launch),
            "widths": machine_code.widths(path),
        }
        if path
        else {},
        per_product=round(len(path) / products, 2) if products else None,
        serialized=used.serialized,
        problems=dry.problems(launch, target),
        estimate={
            "us": round(guess.us, 3),
            "bound": guess.bound,
            "parts": {name: round(us, 3) for name, us in guess.parts.items()},
            "waves": round(guess.waves, 2),
            "turns": round(guess.turns, 1),
            "dram_bytes": int(guess.dram),
            "flops": int(guess.flops),
            "unknown": list(guess.unknown),
        },
        launch=launch,
    )


def _shapes(shapes: dict[str, int], launch: dry.Launch) -> dict[str, int]:
    """With the size of Blackwell's products, which its machine code keeps in a register."""
    block = re.search(r"blockM = (\d+), blockN = (\d+)", launch.compiled.asm["ttgir"])
    if block is None:
        return shapes
    known = {name: machine_code.sizes_of(name) is not None for name in shapes}
    return {
        name if known[name] else f"{name} {block[1]}x{block[2]}": count
        for name, count in shapes.items()
    }


def labelled(recorded: Recorded, label: Label) -> Iterator[Inspection]:
    """The inspections of a recorded call, each kernel once for each grid."""
    seen: set[tuple[str, tuple[int, int, int]]] = set()
    for which, launches in (("forward", recorded.forward), ("backward", recorded.backward)):
        numbers: dict[str, int] = {}
        for launch in launches:
            identity = launch.compiled.hash, launch.grid
            if identity in seen:
                continue
            seen.add(identity)
            number = numbers.setdefault(launch.kernel, 0)
            numbers[launch.kernel] += 1
            fields = {"which": which, "kernel": launch.kernel, "number": number}
            yield inspected(launch, Label(**{**asdict(label), **fields}))


def of_op(
    spec: OpSpec, target: str, dtype: torch.dtype, *, calls: str = "", tables: bool = False
) -> Iterator[Inspection]:
    """What an op's workloads launch; with `tables` also in every shipped configuration.

    `calls`: part of the names of the workloads that are meant.  The same kernel on the same grid
    comes once.
    """
    for label, recorded in recordings(spec, target, dtype, calls=calls, tables=tables):
        yield from labelled(recorded, label)


def recordings(
    spec: OpSpec,
    target: str,
    dtype: torch.dtype,
    *,
    calls: str = "",
    tables: bool = False,
    most: int | None = None,
) -> Iterator[tuple[Label, Recorded]]:
    """The same before anything is read off the machine code.

    `most`: workloads that run as selection chooses; all are asked for the tables' configurations.
    """
    short = str(dtype).removeprefix("torch.")

    def recorded(sample: Sample, configuration: str) -> tuple[Label, Recorded]:
        label = Label(spec.name, sample.name, short, "", target, configuration)
        return label, record(spec.op, sample.arguments, target, gradients=spec.gradients)

    samples = [sample for sample in spec.workloads(Maker(dtype)) if calls in sample.name]
    for sample in samples[:most]:
        yield recorded(sample, "")
    for name, entry, sample in shipped(spec, target, dtype, samples) if tables else ():
        with launching.override(name, entry):
            yield recorded(sample, f"{name} {shown(entry)}")


def shipped(
    spec: OpSpec, target: str, dtype: torch.dtype, samples: Iterable[Sample]
) -> Iterator[tuple[str, Any, Sample]]:
    """(choosing function, entry, first sample that asks it) of the op's tables of configurations.

    An entry that no sample asks for is left out.
    """
    asking: dict[str, Sample] = {}
    for sample in samples:
        with (
            redirect.replaced(launching.Prepared, "__call__", lambda *_, **__: None),
            launching.choices() as chosen,
        ):
            record(spec.op, sample.arguments, target, gradients=spec.gradients)
        for name, _ in chosen:
            asking.setdefault(name, sample)
    for name, entry in configurations.entries(spec, dtype):
        if name in asking:
            yield name, entry, asking[name]


def shown(entry: Any) -> str:
    """A configuration on one line, without Triton's defaults."""
    settings: dict[str, Any] = entry.all_kwargs()
    plain = {"num_ctas": 1, "maxnreg": None}
    return ", ".join(
        f"{name}={value}"
        for name, value in settings.items()
        if name not in plain or value != plain[name]
    )


@dataclass(frozen=True)
class Function:
    """A user's function and what to call it with."""

    name: str
    function: Callable[..., Any]
    samples: Callable[[Maker], Iterable[Sample]]
    gradients: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] | None


def user_function(target: str, inputs: str = "", gradients: Sequence[str] = ()) -> Function:
    """The function that "package.module:function" or "path/to/file.py:function" names.

    `inputs` as `tritorch check` takes them, by default INPUTS beside the function, else they are
    guessed with the `reference` beside it.  Raises RequestError: says what is missing.
    """
    named = hosting.function(target, "inspect")
    function = named.value
    given: Any = inputs or named.beside("INPUTS", "")
    if isinstance(given, str) and "[" not in given and ":" in given:
        given = hosting.load(given)
    reference = named.beside("reference")
    if given == "" and callable(reference):
        given = input_guess.guess(function, reference)
    if given == "":
        raise RequestError(
            f"inspect: what the arguments of {target} look like is not known: say it by "
            "--inputs 'x[M, K] w[K, N]', or in INPUTS beside the function"
        )
    dtypes = named.beside("DTYPES")
    return Function(
        target,
        function,
        _samples(given, function),
        tuple(gradients),
        None if dtypes is None else tuple(dtypes),
    )


def _samples(given: Any, function: Callable[..., Any]) -> Callable[[Maker], Iterable[Sample]]:
    if not isinstance(given, str):

        def named(make: Maker) -> Iterator[Sample]:
            for number, one in enumerate(given(make)):
                yield one if isinstance(one, Sample) else Sample(f"sample {number}", **one)

        return named
    text = texts.parse(given, function)
    size = _SIZE
    sizes = {letter: text.allowed(letter, size) for letter in text.letters}
    while text.elements(sizes) > _MOST and size > 4:
        size //= 2
        sizes = {letter: text.allowed(letter, size) for letter in text.letters}
    return text.samples([sizes])


def of_function(one: Function, target: str, dtype: torch.dtype) -> Iterator[Inspection]:
    """What a user's function launches, in every configuration of its autotuned kernels."""
    for sample in itertools.islice(one.samples(Maker(dtype)), 1):
        short = str(_dtype_of(sample, dtype)).removeprefix("torch.")
        label = Label(one.name, sample.name, short, "", target)
        first = _hosted(one, sample, target, 0)
        count = max([1, *map(len, first.configurations.values())])
        for number in range(count):
            recorded = first if number == 0 else _hosted(one, sample, target, number)
            text = "; ".join(
                shown(known[min(number, len(known) - 1)]) for known in first.configurations.values()
            )
            yield from labelled(recorded, Label(**{**asdict(label), "configuration": text}))


def _dtype_of(sample: Sample, asked: torch.dtype) -> torch.dtype:
    """That of its floating-point tensors, which may be fixed in the text: the first's, or `asked`
    where one has it.
    """
    tensors = [one for value in sample.arguments.values() for one in calls.tensors_of(value)]
    found = [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
    return asked if asked in found or not found else found[0]


def _hosted(one: Function, sample: Sample, target: str, number: int) -> Recorded:
    return record(
        one.function,
        sample.arguments,
        target,
        gradients=one.gradients,
        hosted=True,
        configuration=number,
    )


def own_ops(names: Sequence[str]) -> list[OpSpec]:
    """The ops of these names, all where there are none; RequestError for one that is not ours."""
    import tritorch.ops  # noqa: F401  declares the specs
    from tritorch.registry import specs

    found = [requests.own_op(name, "inspect") for name in names]
    return [spec for spec in found if spec is not None] or list(specs())


def assembly(one: Inspection, stage: str) -> str:
    """The kernel's text at a stage of `STAGES`; RequestError where the target has no such."""
    held: Mapping[str, Any] = one.launch.compiled.asm
    if stage == "sass" and "cubin" in held:
        return dry.resources(one.launch).code
    if stage not in held or not isinstance(held[stage], str):
        has = ", ".join(
            name for name in STAGES if name in held or (name == "sass" and "cubin" in held)
        )
        raise RequestError(f"inspect: {one.label.target} has no {stage}, it has {has}")
    return str(held[stage])
