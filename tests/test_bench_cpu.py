"""The benchmarks' recipes: their arithmetic, and their processes with engines that answer at once, fail or die."""

import dataclasses
import importlib.metadata
import json
import sys
from pathlib import Path

import pytest

import jaxllm

from .conftest import TINY

RECIPES = Path(__file__).parents[1] / "recipes"
sys.path.insert(0, str(RECIPES))

import bench_gpu  # noqa: E402
from engines import rounds, summary  # noqa: E402
from engines.driver import Worker, WorkerError  # noqa: E402
from engines.rounds import Plan, Spec  # noqa: E402
from engines.summary import Case  # noqa: E402

# Prefill is measured at 100 tokens a second, decode at `speed` of each row.
FAKE = """
import os, sys
class Engine:
    def __init__(self, folder, variant, threads):
        self.folder, self.variant, self.threads = folder, variant, threads
    def prepare(self, source):
        if self.variant == "unconvertible":
            raise ValueError("no such architecture")
        (self.folder / "weights").write_text(source)
    def open(self, batch, max_len):
        print("engines may print")
        if self.variant == "small" and max_len > 20:
            raise ValueError(f"{max_len} tokens are too many")
        assert (self.folder / "weights").exists() and len(os.sched_getaffinity(0)) == self.threads
        return {"step_bytes": 10**9}
    def prefill(self, prompts):
        return len(prompts[0]) / 100
    def decode(self, prompts, new_tokens):
        if self.variant == "mortal" and len(prompts) > 1:
            sys.exit("out of memory")
        return (new_tokens - 1) / {"fast": 40.0}.get(self.variant, 20.0), list(range(new_tokens))
"""
BANDWIDTH = """
class Engine:
    def __init__(self, *_): pass
    def read(self): return 100.0
"""
CASES = [Case("decode", 1, 16), Case("decode", 4, 16), Case("prefill", 1, 32)]


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    (tmp_path / "fake_engine.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Plan(CASES, tmp_path / "source", range(50), tmp_path, rounds=2, starts=1, threads=1, new_tokens=8)


@pytest.fixture
def no_bandwidth(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A quick stand-in for the process that measures memory bandwidth."""
    (tmp_path / "fake_bandwidth.py").write_text(BANDWIDTH)

    def worker(module: str, *args: object) -> Worker:
        return Worker("fake_bandwidth" if module == "engines.bandwidth" else module, *args)  # pyright: ignore

    monkeypatch.setattr(rounds, "Worker", worker)


def fake(name: str, variant: str = "", kind: str = "int8", needs: tuple[str, ...] = ("numpy",)) -> Spec:
    return Spec(name, kind, "fake_engine", variant, needs)


@pytest.mark.usefixtures("no_bandwidth")
def test_engines_are_measured_and_those_that_cannot_are_told_with_the_reason(plan: Plan) -> None:
    specs = [
        fake("ours", "fast", needs=("jaxllm",)),
        fake("peer"),
        fake("missing", needs=("numpy", "not-a-distribution")),
        fake("unconvertible", "unconvertible"),
        fake("small", "small"),
        fake("mortal", "mortal", kind="int4"),
    ]
    said: list[str] = []
    found = rounds.measure(specs, plan, said.append)
    engines, names = found["engines"], [case.name for case in CASES]
    ours, peer = engines["ours"], engines["peer"]
    assert [ours["cases"][name]["median"] for name in names] == pytest.approx([40, 160, 100])
    assert [peer["cases"][name]["values"] for name in names] == [pytest.approx([x, x]) for x in (20, 80, 100)]
    assert ours["start_s"]["median"] > 0
    assert ours["peak_mb"] > 1
    assert (ours["same_tokens"], found["read_gb_s"]["median"]) == (8, 100)
    assert ours["bound_share"] == pytest.approx(0.4)  # 40 steps a second of 1 GB, where 100 could be read
    assert found["others_cores"] is not None
    assert engines["missing"]["reason"] == "skipped: not-a-distribution is not installed"
    assert "ValueError: no such architecture" in engines["unconvertible"]["reason"]
    assert "32 tokens are too many" in engines["small"]["cases"][names[2]]["reason"]
    assert engines["small"]["cases"][names[1]]["median"] == pytest.approx(80)
    # One that died is started anew for the next case.
    assert "ended with code 1: out of memory" in engines["mortal"]["cases"][names[1]]["reason"]
    assert engines["mortal"]["cases"][names[2]]["median"] == pytest.approx(100)
    assert any(line.startswith("missing: skipped") for line in said)
    result = {"machine": "here", "threads": 1, "ratios": summary.ratios(engines, CASES), **found}
    assert result["ratios"][names[0]]["int8"]["ratio"] == pytest.approx(2)
    json.dumps(result, allow_nan=False)
    summary.plot(result, CASES, plan.folder / "plot.png")
    table = summary.table(result, CASES)
    assert table.row_count == len(specs) + 2  # and the ratios of int8 and overall; int4 has none of ours

    # Converted once: a second run with other sources still reads the first's.
    again = rounds.measure([fake("peer")], dataclasses.replace(plan, source=plan.folder / "other"), said.append)
    assert "median" in again["engines"]["peer"]["cases"][names[0]]
    version = importlib.metadata.version("numpy")
    assert (plan.folder / f"peer-{version}" / "weights").read_text() == str(plan.source)


def test_a_worker_that_takes_too_long_is_ended(plan: Plan) -> None:
    (plan.folder / "slow_engine.py").write_text(FAKE + "    def wait(self):\n        import time; time.sleep(60)\n")
    worker = Worker("slow_engine", "", plan.folder, 1, plan.folder / "log")
    with pytest.raises(WorkerError, match="wait: took more than 1 s") as told:
        worker.call("wait", 1)
    worker.close()
    assert told.value.dead
    assert worker.process.returncode is not None


def test_ratios_are_above_one_where_ours_is_better() -> None:
    def engine(kind: str, ours: bool, tokens_per_s: float | None, start_s: float, peak_mb: float) -> dict:
        cases = {CASES[0].name: {"reason": "why"} if tokens_per_s is None else summary.spread([tokens_per_s])}
        return {"class": kind, "ours": ours, "cases": cases, "start_s": summary.spread([start_s]), "peak_mb": peak_mb}

    engines = {
        "ours-int8": engine("int8", True, 300, 2, 200),
        "ours-int4": engine("int4", True, 500, 2, 150),
        "a": engine("int8", False, 200, 1, 300),
        "b": engine("int8", False, None, 4, 100),
        "c": engine("int4", False, 250, 3, 600),
        "d": engine("16-bit", False, 900, 3, 600),
    }
    found = summary.ratios(engines, CASES[:1])
    decode = found[CASES[0].name]
    assert decode["int8"] == {
        "ours": {"name": "ours-int8", "value": 300},
        "peer": {"name": "a", "value": 200},
        "ratio": 1.5,
    }
    assert decode["int4"]["ratio"] == 2
    assert decode["16-bit"]["ratio"] is None
    assert decode["overall"]["ratio"] == pytest.approx(500 / 900)
    assert found["start-up"]["int8"]["ratio"] == 0.5
    assert found["memory"]["int8"]["ratio"] == 0.5
    assert found["memory"]["int4"]["ratio"] == 4
    assert summary.same_start([1, 2, 3], [1, 2, 4]) == 2
    assert Case("decode", 8, 128).tokens(64) == 8 * 63
    assert Case("prefill", 1, 512).tokens(64) == 512


def test_ours_answers_through_the_protocol(tmp_path: Path) -> None:
    """A tiny model goes from a Hugging Face directory to tokens, which are those of the library."""
    lm = jaxllm.quantize("int8")(jaxllm.init(TINY))
    jaxllm.save(lm, tmp_path / "model")
    worker = Worker("engines.ours", "int8", tmp_path / "model", 1, tmp_path / "log")
    prompts = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    try:
        assert worker.call("open", 120, batch=2, max_len=32)["step_bytes"] > 0
        seconds, tokens = worker.call("decode", 120, prompts=prompts, new_tokens=12)
        assert worker.call("prefill", 120, prompts=prompts) > 0
        assert worker.peak_mb > 10
        with pytest.raises(WorkerError, match="no_such") as told:
            worker.call("no_such", 10)
        assert not told.value.dead
    finally:
        worker.close()
    assert seconds > 0
    expected = jaxllm.compile(lm, batch=2, max_len=32).generate(prompts, max_new_tokens=12, stop_tokens=())
    assert tokens == expected[0].tokens


# A step takes 20, 10 and 40 ms; int8 has no memory for two rows.
FAKE_GPU = """
class Engine:
    def __init__(self, folder, variant, threads):
        self.kind = variant.split()[1]
    def open(self, batch, max_len):
        if self.kind == "int8" and batch > 1:
            raise ValueError("no memory")
        return {} if self.kind == "peer" else {"step_bytes": 10**9, "device": "a card"}
    def decode(self, prompts, new_tokens):
        return {"bf16": 0.02, "int8": 0.01, "peer": 0.04}[self.kind] * (new_tokens - 1), list(range(new_tokens))
    def read(self):
        return 100.0
"""


def test_on_a_gpu_engines_are_compared_with_the_card_and_with_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fake_gpu.py").write_text(FAKE_GPU)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    kinds = {"ours bfloat16": "bf16", "ours int8": "int8", "transformers bfloat16": "peer"}
    monkeypatch.setattr(bench_gpu, "ENGINES", {name: ("fake_gpu", kind) for name, kind in kinds.items()})
    monkeypatch.setattr(bench_gpu.shutil, "which", lambda name: name)
    monkeypatch.setattr(
        sys, "argv", ["bench_gpu", "--models", "llama-3-8b", "--batches", "1,2", "--rounds", "2", "--new-tokens", "5"]
    )
    bench_gpu.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    measured = {(one["engine"], one["batch"]): one for one in result["measured"]}
    assert (result["device"], result["read_gb_s"], len(measured)) == ("a card", 100, 6)
    ours, int8 = measured["ours bfloat16", 2], measured["ours int8", 1]
    assert (ours["ms"], ours["tokens_per_s"]) == pytest.approx((20, 100))
    assert (ours["of_the_card"], ours["over transformers bfloat16"]) == pytest.approx((0.5, 2))
    assert (int8["of_the_card"], int8["over ours bfloat16"]) == pytest.approx((1, 2))
    assert "no memory" in measured["ours int8", 2]["reason"]


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_gpu.shutil, "which", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["bench_gpu"])
    with pytest.raises(SystemExit, match="nvidia-smi was not found"):
        bench_gpu.main()


def test_an_engine_for_a_gpu_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_gpu", "--engines", "ours,vllm"])
    with pytest.raises(SystemExit):
        bench_gpu.main()
    assert "no engine is named 'vllm'; there are ours bfloat16" in capsys.readouterr().err
