"""Everything that a GPU can tell, by one command, in sections that can be run one by one.

    python -m tritorch.bench.gpu --out DIR [--sections conv,matmul] [--seconds 200]

Rows go to DIR/gpu.json as they are measured; a second run in the same folder goes on where the
first one stopped.  Kernels are compiled by many processes while the first sections run.  What
measures runs in a process of its own: after an error of the GPU, or when it hangs, it is started
again behind the row where that happened.  Needs torch, Triton and numpy.
"""

from __future__ import annotations

import argparse
import importlib
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tritorch import tuned
from tritorch.bench import calibration, fatal, precompile, rows, suite, told
from tritorch.bench.baselines import use_fast_algorithms, use_full_float32
from tritorch.bench.cases import FORWARD, OURS
from tritorch.bench.environment import environment
from tritorch.bench.sections import LIMIT, WEIGHTS, Runner, Setting, planned
from tritorch.bench.store import OtherResults, Store

SECTIONS = (*WEIGHTS, "calibration", "correctness")
# seconds without a word after which what measures is taken to hang
_PATIENCE = 90.0
# seconds after its end that a budget is overdrawn by, at most
_GRACE = 10.0
# seconds that a section waits for its kernels to be compiled
_COMPILING = 90.0

# exit statuses: what was measured is kept, what was measured last is not
_INTERRUPTED, _UNABLE = 130, 3

# threads of the parent are of no use to its children
_processes: Any = multiprocessing.get_context("fork")


class NoGpu(RuntimeError):
    """There is none, and no other device was asked for."""


@dataclass
class Waiting:
    """How many kernels of each section are still to be compiled, as children see it."""

    left: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, sections: tuple[str, ...]) -> Waiting:
        # -1 until the jobs are known
        return cls({section: _processes.Value("i", -1) for section in sections})

    def wait(self, section: str, until: float) -> None:
        """What is not compiled by then is compiled when it is called."""
        until = min(until, time.time() + _COMPILING)
        while self.left[section].value != 0 and time.time() < until:
            time.sleep(0.05)


def _measure(
    connection: Any,
    sections: tuple[str, ...],
    setting: Setting,
    waiting: Waiting,
    deadline: float | None,
) -> None:
    """The child that measures."""

    def tell(event: str, **fields: Any) -> None:
        connection.send((event, fields))

    # the parent gets the event, and ends this process
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.manual_seed(0)
    use_fast_algorithms()
    use_full_float32()
    tell("environment", environment=environment())
    done, earlier, ended, lost = connection.recv()
    runner = Runner(setting, tell, done, waiting.wait)
    runner.know(earlier)
    kept = [section for section in sections if section not in lost]
    rest = [section for section in kept if section not in ended]
    if deadline is None:
        for section in rest:
            _section(runner, section, time.time() + LIMIT, tell)
    else:
        runner.gives_up = False
        for number, section in enumerate(rest):
            now, shares = time.time(), sum(WEIGHTS[name] for name in rest[number:])
            _section(runner, section, now + (deadline - now) * WEIGHTS[section] / shares, tell)
        # what sections had no time for that others have left
        runner.gives_up = True
        for section in kept:
            _section(runner, section, deadline, tell)
    tell("finished")


def _section(runner: Runner, section: str, until: float, tell: Callable[..., None]) -> None:
    start = time.time()
    tell("section", section=section)
    before = runner.clocks()
    try:
        runner.run(section, min(until, start + LIMIT))
    except Exception as error:
        fatal.reraise(error)
        tell("skip", section=section, what="the rest", why=f"{error!r}"[:500])
    seen = {"before": before, "after": runner.clocks()}
    tell("ended", section=section, seconds=time.time() - start, clocks=seen)


class Run:
    """The parent: starts what compiles and what measures, and keeps what they find."""

    def __init__(
        self, store: Store, sections: tuple[str, ...], setting: Setting, deadline: float | None
    ) -> None:
        self.store, self.sections, self.setting = store, sections, setting
        self.deadline = deadline
        self.waiting = Waiting.of(sections)
        self.done: set[tuple[str, ...]] = set()
        # sections that have had their share of time, and those that are given up
        self.ended: set[str] = set()
        self.lost: set[str] = set()
        self.doing: dict[str, Any] = {}
        self.pool: Any = None
        # seconds of a case, as they become known
        self.compiled: dict[tuple[str, ...], float | None] = {}
        self.workers = 0

    def run(self, workers: int, target: str | None) -> None:
        """Until everything is measured, skipped or has failed."""
        self.workers = workers
        try:
            while not self._attempt(target):
                pass
        except KeyboardInterrupt:
            self.store.write()
            raise
        finally:
            if self.pool is not None:
                self.pool.terminate()
        self.store.write()

    def _attempt(self, target: str | None) -> bool:
        """Runs a child until it has finished; False if it must be started again."""
        ours, theirs = _processes.Pipe()
        arguments = (theirs, self.sections, self.setting, self.waiting, self.deadline)
        child = _processes.Process(target=_measure, args=arguments)
        child.start()
        theirs.close()
        try:
            return self._listen(ours, target)
        except TimeoutError:
            if self._is_over():
                self._failed("no time left")
                return True
            self._failed("nothing was heard of it any more")
            return False
        except (EOFError, ConnectionError):
            self._failed("the process ended")
            return False
        finally:
            child.kill()
            # a GPU that hangs may keep it
            child.join(10)

    def _is_over(self) -> bool:
        return self.deadline is not None and time.time() > self.deadline + _GRACE

    def _listen(self, connection: Any, target: str | None) -> bool:
        patience = _PATIENCE
        while True:
            if self.deadline is not None:
                patience = max(0.0, min(patience, self.deadline + _GRACE - time.time()))
            if not connection.poll(patience):
                raise TimeoutError
            event, fields = connection.recv()
            if event == "finished":
                return True
            if event == "environment":
                if self.setting.device == "cuda" and fields["environment"]["gpu"] is None:
                    raise NoGpu("--device cuda: torch finds no GPU")
                self.store.go_on(fields["environment"])
                self.done |= {rows.key(row) for row in self.store.rows}
                connection.send((self.done, self.store.rows, self.ended, self.lost))
                self._compile(target or precompile.target_of(self.store.capability()))
            elif event == "row":
                self._keep(fields["row"])
            elif event == "details":
                self._detail(**fields)
            elif event == "skip":
                self.store.skip(**fields)
                print(f"skipped: {fields['section']}: {fields['what']}: {fields['why']}")
            elif event == "ended":
                self._end(**fields)
            patience = fields.get("patience", _PATIENCE + (_COMPILING if event == "section" else 0))
            if event == "doing":
                self.doing = fields

    def _end(self, section: str, seconds: float, clocks: dict[str, Any]) -> None:
        self.ended.add(section)
        ended = self.store.more.setdefault("sections", [])
        ended.append({"section": section, "seconds": round(seconds, 1), "clocks": clocks})
        self.store.write()
        print(f"{section}: {seconds:.1f} s", flush=True)

    def _keep(self, row: dict[str, Any]) -> None:
        self.done.add(rows.key(row))
        if row["implementation"] == OURS:
            # of all passes together, by a process among others, unless they were in Triton's cache
            row["compile_seconds"] = self.compiled.get(_case_of(row))
        self.store.add(row)
        if row["implementation"] != "torch":
            print(told.line(row), flush=True)

    def _detail(self, key: tuple[str, ...], row: dict[str, Any]) -> None:
        """Adds fields to a row that is there."""
        for one in reversed(self.store.rows):
            if rows.key(one) == key:
                self.store.change(one, row)
                break

    def _failed(self, why: str) -> None:
        """The row that was being measured is not tried again, or its section if it has none."""
        doing, self.doing = self.doing, {}
        section = doing.get("section", "the start")
        self.store.skip(section, doing.get("what", ""), why)
        self.store.write()
        print(f"failed: {section}: {doing.get('what', '')}: {why}", flush=True)
        if doing.get("key"):
            self.done.add(tuple(doing["key"]))
        elif doing:
            self.lost.add(section)
        else:
            raise RuntimeError(f"what measures does not start: {why}")

    def _compile(self, target: str | None) -> None:
        """Hands out the kernels of all sections, once."""
        if any(left.value >= 0 for left in self.waiting.left.values()):
            return
        if self.workers and target is not None:
            # after the child, which so starts from a parent without threads
            table = precompile.table_of(self.store.environment)
            self.pool = _processes.Pool(self.workers, _lower, (table,))
        for section in self.sections:
            jobs = planned(section, self.setting) if self.pool is not None else ()
            left = self.waiting.left[section]
            left.value = len(jobs)
            for number in range(len(jobs)):
                case = _case_of(rows.head(jobs[number], FORWARD, OURS))
                done = self._counting(section, case)
                self.pool.apply_async(
                    _compiled,
                    (section, self.setting, number, target),
                    callback=done,
                    error_callback=lambda error, done=done: done((repr(error), None)),
                )

    def _counting(
        self, section: str, case: tuple[str, ...]
    ) -> Callable[[tuple[str, float | None]], None]:
        left = self.waiting.left[section]

        def count(result: tuple[str, float | None]) -> None:
            why, self.compiled[case] = result
            if why:
                print(f"not compiled: {section}: {why}", flush=True)
            with left.get_lock():
                left.value -= 1

        return count


def _case_of(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row.get(name)) for name in ("op", "name", "shape", "dtype"))


# what the GPU's launches will take, in a process that compiles
_table: Mapping[tuned.Key, Any] = {}


def _lower(table: Mapping[tuned.Key, Any]) -> None:
    global _table
    _table = table
    # the parent ends its workers, by the one or the other
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.nice(5)
    torch.set_num_threads(1)


def _compiled(section: str, setting: Setting, number: int, target: str) -> tuple[str, float]:
    start = time.monotonic()
    why = precompile.compile_case(planned(section, setting)[number], target, _table)
    return why, round(time.monotonic() - start, 3)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder of gpu.json")
    parser.add_argument(
        "--sections", default=",".join(SECTIONS), help="some of %(default)s; all by default"
    )
    parser.add_argument("--seconds", type=float, help="share that much time among the sections")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--workers", type=int, default=max(1, min(14, (os.cpu_count() or 2) - 2)))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--shrink", type=int, default=1, help="divide sizes by that, for a machine without a GPU"
    )
    parser.add_argument("--target", help="compile for this GPU, sm_90 say, where there is none")
    options = parser.parse_args(arguments)
    start = time.time()
    chosen = options.sections.split(",")
    unknown = set(chosen) - set(SECTIONS)
    if unknown:
        parser.error(f"--sections: unknown {', '.join(sorted(unknown))}: {', '.join(SECTIONS)}")
    for name in ("batch", "shrink"):
        if (number := getattr(options, name)) < 1:
            parser.error(f"--{name}: expects 1 or more, received {number}")
    if options.seconds is not None and not 0 < options.seconds < math.inf:
        parser.error(f"--seconds: expects more than 0, received {options.seconds}")
    setting = Setting(
        batch=options.batch,
        shrink=options.shrink,
        small=options.shrink > 1,
        seconds=0.2 if options.seconds else 0.5,
        device=options.device,
    )
    sections = tuple(section for section in WEIGHTS if section in chosen)
    deadline = start + options.seconds if options.seconds else None
    store = Store(options.out / "gpu.json")
    compiles = options.device == "cuda" or options.target
    if compiles:
        # once, for all processes
        importlib.import_module("triton")
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        workers = options.workers if compiles else 0
        if sections:
            Run(store, sections, setting, deadline).run(workers, options.target)
        else:
            store.again()
        if "calibration" in chosen:
            until = None if deadline is None else deadline + _GRACE
            # rows that are measured now are of today's kernels
            calibration.add(store, options.workers, until, fresh=True if sections else None)
        if "correctness" in chosen:
            if options.device == "cuda":
                suite.run(options.out.resolve(), LIMIT)
            else:
                print("skipped: correctness: it is about a GPU")
        _pictures(store)
    except (NoGpu, OtherResults) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print(f"interrupted: {len(store.rows)} rows are kept in {store.path}", flush=True)
        return _INTERRUPTED
    except OSError as error:
        print(f"the result could not be written: {error}", file=sys.stderr)
        return _UNABLE
    finally:
        signal.signal(signal.SIGTERM, before)
    told.summary(store)
    return 0


def _pictures(store: Store) -> None:
    try:
        told.pictures(store)
    except OSError:
        raise
    except Exception as error:
        # the numbers are there, and can be drawn again
        print(f"skipped: pictures: {type(error).__name__}: {error}")


def _interrupt(number: int, frame: object) -> None:
    """Whoever ends this program with manners keeps what it has measured."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
