"""Engines, started and measured in turns: case by case, and in each case round by round."""

import dataclasses
import importlib.metadata
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engines.driver import Worker, WorkerError, cpu_s, jaxllm_fingerprint
from engines.summary import Case, bound_share, same_start, spread

_TURN_S = 0.3  # a shorter prefill is repeated for so long, and its median taken
_FIRST_S = 1800.0  # limit of what converts or compiles


@dataclasses.dataclass(frozen=True)
class Spec:
    """An engine with one kind of weights.

    kind: the class that it is compared in. needs: the distributions that it needs, its own first.
    """

    name: str
    kind: str
    module: str
    variant: str
    needs: tuple[str, ...]

    @property
    def ours(self) -> bool:
        return self.needs[0] == "jaxllm"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured and how.

    cases: start-up and memory are those of the first. source: the model, a Hugging Face directory in float32. ids: of a
    text, which prompts are cut from. limit_s: of a turn. minutes: after which no other round begins. folder: for what
    is kept.
    """

    cases: Sequence[Case]
    source: Path
    ids: Sequence[int]
    folder: Path
    rounds: int = 5
    starts: int = 3
    threads: int = 2
    new_tokens: int = 64
    limit_s: float = 300
    minutes: float = 90

    def prompts(self, case: Case) -> list[list[int]]:
        length = case.length - (self.new_tokens if case.kind == "decode" else 0)
        return [[self.ids[(row * 997 + i) % len(self.ids)] for i in range(length)] for row in range(case.batch)]


def measure(specs: Sequence[Spec], plan: Plan, log: Callable[[str], None]) -> dict[str, Any]:
    """{"engines": {name: what was measured, or the reason why not}, "read_gb_s": …, "others_cores": …}.

    others_cores: that were, on average, busy with something else while an engine had its turn.
    """
    bench = _Bench(plan, log)
    try:
        for spec in specs:
            bench.prepare(spec)
        bench.start()
        for case in plan.cases:
            bench.measure(case)
    finally:
        bench.close()
    return {
        "engines": bench.finish(),
        "read_gb_s": spread(bench.read_gb_s) if bench.read_gb_s else None,
        "others_cores": bench.others_s / bench.turns_s if bench.turns_s else None,
    }


class _Bench:
    def __init__(self, plan: Plan, log: Callable[[str], None]):
        self.plan, self.log = plan, log
        self.deadline = time.monotonic() + plan.minutes * 60
        self.engines: dict[str, dict[str, Any]] = {}  # what is found out
        self.launch: dict[str, Callable[[], Worker]] = {}  # of those that can be measured
        self.workers: dict[str, Worker] = {}
        self.tokens: dict[str, list[int]] = {}  # the answer to the first case
        self.read_gb_s: list[float] = []
        self.turns_s = self.others_s = 0.0  # of the rounds: their time, and CPU time of what is no engine
        self.bandwidth = Worker("engines.bandwidth", "", plan.folder, plan.threads, plan.folder / "bandwidth.log")

    def drop(self, name: str, reason: str) -> None:
        self.log(f"{name}: {reason}")
        self.engines[name]["reason"] = reason
        self.launch.pop(name, None)
        if worker := self.workers.pop(name, None):
            worker.close()

    def prepare(self, spec: Spec) -> None:
        """Converts the weights, unless that was done already for the engine's version."""
        self.engines[spec.name] = {"class": spec.kind, "ours": spec.ours, "reason": None, "cases": {}}
        try:
            versions = {name: importlib.metadata.version(name) for name in spec.needs}
        except importlib.metadata.PackageNotFoundError as error:
            self.drop(spec.name, f"skipped: {error.name} is not installed")
            return
        self.engines[spec.name]["versions"] = versions
        edition = f"{versions['jaxllm']}-{jaxllm_fingerprint()}" if spec.ours else versions[spec.needs[0]]
        final, partial = self.plan.folder / f"{spec.name}-{edition}", self.plan.folder / f"{spec.name}.partial"

        def launch(folder: Path = final) -> Worker:
            return Worker(spec.module, spec.variant, folder, self.plan.threads, self.plan.folder / f"{spec.name}.log")

        if not final.exists():
            self.log(f"{spec.name}: converting")
            for old in (*self.plan.folder.glob(f"{spec.name}-*"), partial):
                shutil.rmtree(old, ignore_errors=True)
            partial.mkdir()
            worker = launch(partial)
            try:
                worker.call("prepare", _FIRST_S, source=str(self.plan.source))
            except WorkerError as error:
                self.drop(spec.name, f"failed: {error}")
                return
            finally:
                worker.close()
            partial.rename(final)
        self.launch[spec.name] = launch

    def start(self) -> None:
        """Times from each process's start to its first token. The first time is not counted: it may fill caches."""
        case = self.plan.cases[0]
        times: dict[str, list[float]] = {name: [] for name in self.launch}
        for number in range(self.plan.starts + 1):
            for name in list(self.launch):
                self.log(f"{name}: start {number} of {self.plan.starts}")
                if name in self.workers:
                    self.workers.pop(name).close()
                began = time.perf_counter()
                self.workers[name] = worker = self.launch[name]()
                try:
                    worker.call("open", _FIRST_S, batch=case.batch, max_len=case.length)
                    worker.call("decode", _FIRST_S, prompts=self.plan.prompts(case), new_tokens=1)
                except WorkerError as error:
                    self.drop(name, f"failed: {error}")
                    continue
                if number:
                    times[name].append(time.perf_counter() - began)
        for name in self.launch:
            if times[name]:
                self.engines[name]["start_s"] = spread(times[name])

    def measure(self, case: Case) -> None:
        """Every engine in a case. A process that dies is started anew for the next one."""
        facts: dict[str, dict[str, Any]] = {}
        values: dict[str, list[float]] = {name: [] for name in self.launch}

        def attempt(name: str, do: Callable[[], Any]) -> None:
            try:
                do()
            except WorkerError as error:
                self.log(f"{name}: {case.name}: {error}")
                self.engines[name]["cases"][case.name] = {"reason": str(error)}
                facts.pop(name, None)
                if error.dead:
                    self.workers.pop(name).close()

        def get_ready(name: str) -> None:
            if name not in self.workers:
                self.workers[name] = self.launch[name]()
            facts[name] = self.workers[name].call("open", _FIRST_S, batch=case.batch, max_len=case.length)
            self.turn(name, case, _FIRST_S)

        for name in self.launch:
            if time.monotonic() > self.deadline:
                self.engines[name]["cases"][case.name] = {"reason": "no time was left"}
                continue
            self.log(f"{case.name}: {name}: getting ready")
            attempt(name, lambda name=name: get_ready(name))
        for number in range(self.plan.rounds):
            if not facts or (number and time.monotonic() > self.deadline):
                break
            self.log(f"{case.name}: round {number + 1} of {self.plan.rounds}")
            self.read()
            order = list(facts)
            for name in order[number % len(order) :] + order[: number % len(order)]:  # nobody is always the first
                attempt(name, lambda name=name: values[name].append(self.watched(name, case)))
        for name in facts:
            found = facts[name] | spread(values[name]) | {"peak_mb": self.workers[name].peak_mb}
            self.engines[name]["cases"][case.name] = found
            if case is self.plan.cases[0]:
                self.engines[name]["peak_mb"] = found["peak_mb"]

    def watched(self, name: str, case: Case) -> float:
        """A turn that counts."""
        pid = self.workers[name].process.pid
        began, used = time.perf_counter(), cpu_s() - cpu_s(pid)
        value = self.turn(name, case, self.plan.limit_s)
        self.turns_s += time.perf_counter() - began
        self.others_s += cpu_s() - cpu_s(pid) - used
        return value

    def read(self) -> None:
        try:
            self.read_gb_s.append(self.bandwidth.call("read", self.plan.limit_s))
        except WorkerError as error:  # no reason to lose what was measured
            self.log(f"memory bandwidth: {error}")

    def turn(self, name: str, case: Case, limit_s: float) -> float:
        """Tokens a second. Raises WorkerError."""
        worker, prompts, new_tokens = self.workers[name], self.plan.prompts(case), self.plan.new_tokens
        if case.kind == "decode":
            seconds, tokens = worker.call("decode", limit_s, prompts=prompts, new_tokens=new_tokens)
            if len(tokens) != new_tokens:
                raise WorkerError(f"gave {len(tokens)} tokens, not {new_tokens}", dead=False)
            self.tokens.setdefault(name, tokens)
        else:
            found: list[float] = []
            while sum(found) < _TURN_S:
                found.append(worker.call("prefill", limit_s, prompts=prompts))
            seconds = spread(found)["median"]
        return case.tokens(new_tokens) / seconds

    def finish(self) -> dict[str, dict[str, Any]]:
        case = self.plan.cases[0]
        for name, engine in self.engines.items():
            measured = engine["cases"].get(case.name, {})
            if name in self.tokens:
                engine["same_tokens"] = same_start(self.tokens[name], next(iter(self.tokens.values())))
            if self.read_gb_s and "step_bytes" in measured:
                read_gb_s = spread(self.read_gb_s)["median"]
                engine["bound_share"] = bound_share(measured, measured["step_bytes"], case.batch, read_gb_s)
        return self.engines

    def close(self) -> None:
        for worker in (self.bandwidth, *self.workers.values()):
            worker.close()
