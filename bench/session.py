"""What `tritorch bench` measures: the cases that a user names, beside whom he wants to see."""

from __future__ import annotations

import difflib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

import tritorch.ops  # noqa: F401  declares the specs
from tritorch.bench import baselines, cases, ceilings, clocks, fatal, peers, rows, timing
from tritorch.bench.baselines import COMPILED
from tritorch.bench.cases import OURS, TORCH, Case, Planner
from tritorch.registry import Maker, Sample, specs
from tritorch.testing import loading, requests
from tritorch.testing.errors import RequestError

# sizes of the letters of a user's inputs that he did not choose, by the number of letters
_SIZES = {1: 1 << 24, 2: 4096, 3: 2048}
_MANY_LETTERS = 64
EXTRAS = frozenset({"host", "graph", "memory", "kernels"})


@dataclass(frozen=True)
class Wanted:
    """What to measure.

    `targets`: names of ops, or "module:function".  `passes`: empty for all.  `beside`: of
    "compile", the names of peers, and "module:function".  `small`: the samples of the tests
    instead of real shapes.  `reference`, `inputs`: of a user's function, as `tritorch check` takes
    them; `sizes`: numbers for the letters of its inputs, a choice each.
    """

    targets: tuple[str, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    passes: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    small: bool = False
    reference: str = ""
    inputs: str = ""
    sizes: tuple[dict[str, int], ...] = ()


def plan(wanted: Wanted) -> list[Case]:
    """The cases; raises RequestError, which says what is wrong with a target."""
    known = {spec.name for spec in specs()}
    found: list[Case] = []
    names = [target for target in wanted.targets if ":" not in target]
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else ", ".join(sorted(known))
            raise RequestError(f"bench: there is no op {name!r}; {hint}")
    if len(names) == len(wanted.targets):
        for option in ("reference", "inputs", "sizes"):
            if getattr(wanted, option):
                raise RequestError(
                    f"bench: --{option} is of a function of yours, MODULE:FUNCTION; received "
                    f"{', '.join(names) or 'none'}"
                )
    if names or not wanted.targets:
        found += cases.workloads(names, wanted.dtype, small=wanted.small)
    for target, name in _shown(wanted.targets, (OURS, TORCH, *names)).items():
        found += _of_user(target, name, wanted)
    chosen = [_with_passes(case, wanted.passes) for case in found]
    return [case for case in chosen if case.passes]


def _with_passes(case: Case, passes: Sequence[str]) -> Case:
    if not passes:
        return case
    return replace(case, passes={n: w for n, w in case.passes.items() if n in passes})


def _of_user(target: str, name: str, wanted: Wanted) -> Iterator[Case]:
    request = requests.Request(target, reference=wanted.reference, inputs=wanted.inputs)
    asked = requests.find(request)
    subject, text = asked.subject, asked.inputs
    if text is None:
        if wanted.sizes:
            raise RequestError("bench: --sizes needs --inputs, whose letters it gives numbers")
        samples: Callable[[Maker], Any] = subject.samples
    else:
        chosen = wanted.sizes or ({},)
        for sizes in chosen:
            unknown = sorted(set(sizes) - set(text.letters))
            if unknown:
                letters = ", ".join(text.letters)
                raise RequestError(f"bench: --sizes: no letter {unknown[0]} in {letters}")
        default = _SIZES.get(len(text.letters), _MANY_LETTERS)
        whole = [dict.fromkeys(text.letters, default) | sizes for sizes in chosen]
        samples = text.samples(whole)
    for sample in _planned(samples, wanted.dtype):
        yield cases.of_subject(subject, sample, wanted.dtype, name=name)


def _planned(samples: Callable[[Maker], Any], dtype: torch.dtype) -> Iterator[Sample]:
    for number, one in enumerate(samples(Planner(dtype))):
        yield one if isinstance(one, Sample) else Sample(f"sample {number}", **one)


def beside(case: Case, names: Sequence[str]) -> dict[str, Case]:
    """For each pass the case with more implementations: torch.compile, the user's functions, and
    the peers that have it.

    Raises what a peer raises when it is imported, or when it is asked.
    """
    both: dict[str, Any] = {}
    shown = _shown(names, case.implementations)
    for name in names:
        if name == "compile":
            both[COMPILED] = baselines.compiled(case.reference, again=True)
        elif ":" in name:
            both[shown[name]] = loading.find(name).value
    found = {}
    for which in case.passes:
        more = dict(both)
        for name in (name for name in names if name in peers.NAMES):
            if (function := peers.of_case(case, name, which)) is not None:
                more[name] = function
        found[which] = case.on(**more) if more else case
    return found


def _shown(targets: Sequence[str], taken: Iterable[str]) -> dict[str, str]:
    """What rows call each "module:function": the function's name, or all of it where another one
    of them, a peer or what is `taken` has that name.
    """
    own = {target: target.rpartition(":")[2] for target in targets if ":" in target}
    count = Counter([*own.values(), *peers.NAMES, *taken])
    return {target: name if count[name] == 1 else target for target, name in own.items()}


# called with what is about to be measured, its number and how many there are
Doing = Callable[[str, int, int], None]


def measure(
    found: Sequence[Case],
    wanted: Wanted,
    bench: rows.Bench,
    on_row: Callable[[rows.Row], None],
    on_case: Doing = lambda what, number, count: None,
) -> list[str]:
    """Measures the cases, and the ceilings first; says which cases could not be, and why.

    Rows go to `on_row` as they are measured, and what was measured is kept by it whatever happens.
    """
    problems = []
    on_case("the ceilings of this machine", 0, len(found))
    measured = []
    for row in ceilings.measure(bench.device, _rates(found), bench.plan.seconds):
        measured.append(row)
        on_row({"section": "ceilings", **row})
    bench.ceilings = ceilings.of_rows(measured)
    for number, case in enumerate(found):
        what = f"{case.op} {case.name}".strip()
        on_case(what, number, len(found))
        try:
            slots = bench.slots(case)
            for which, whole in beside(case, wanted.beside).items():
                for row in bench.rows(whole, which, slots):
                    on_row(row)
        except torch.OutOfMemoryError:
            problems.append(f"{what}: out of memory with {case.text()}")
        except Exception as error:
            fatal.reraise(error)
            problems.append(f"{what}: {type(error).__name__}: {error}")
    return problems


def _rates(found: Sequence[Case]) -> list[str]:
    """Of products in the dtypes that occur."""
    names = dict.fromkeys(str(case.dtype).removeprefix("torch.") for case in found)
    return [name for name in names if name in ("bfloat16", "float16", "float32", "float64")]


def bench_on(device: torch.device, plan: timing.Plan, seed: int, *, extras: bool) -> rows.Bench:
    """A bench with torch's switches set as a careful user would."""
    torch.manual_seed(seed)
    baselines.use_fast_algorithms()
    baselines.use_full_float32()
    return rows.Bench(
        device,
        plan,
        extras=EXTRAS if extras else frozenset(),
        seed=seed,
        watch=clocks.watch(device),
    )


def sizes_of(text: str) -> tuple[dict[str, int], ...]:
    """Reads "M=4096,K=64; M=8,K=64": a choice of sizes each; raises RequestError."""
    found = []
    for choice in filter(None, (part.strip() for part in text.split(";"))):
        sizes = {}
        for word in filter(None, (word.strip() for word in choice.split(","))):
            name, _, number = word.partition("=")
            if not number.strip().isdigit():
                raise RequestError(f"bench: --sizes: expects M=4096,K=64;M=8,K=64, received {word}")
            sizes[name.strip()] = int(number)
        found.append(sizes)
    return tuple(found)


def geometric_means(found: Sequence[rows.Row]) -> dict[tuple[str, str], tuple[float, int]]:
    """Of the speed-ups by implementation and pass, and how many rows they are of."""
    quick = [row for row in found if row.get("speedup")]
    ordered = sorted(quick, key=_group)
    return {
        group: (torch.tensor([row["speedup"] for row in some]).log().mean().exp().item(), len(some))
        for group, some in ((g, list(s)) for g, s in itertools.groupby(ordered, key=_group))
    }


def _group(row: rows.Row) -> tuple[str, str]:
    return str(row["implementation"]), str(row["pass"])
