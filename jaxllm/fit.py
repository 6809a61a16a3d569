"""The loop around training steps: batches, checkpoints from which it goes on, the held-out loss, and a log."""

from __future__ import annotations

import csv
import ctypes
import dataclasses
import functools
import math
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm import measure
from jaxllm.generate import compile as compile_engine
from jaxllm.lm import LM
from jaxllm.manifest import claim
from jaxllm.params import Params
from jaxllm.teachers import CachedTeacher
from jaxllm.training import State, Trainer

_LOG_S = 10.0
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h
LOG, CURVE = "log.csv", "curve.png"
_SETTINGS = "run.json"
_COLUMNS: tuple[str, ...] = (
    "step",
    "loss",
    "divergence",
    "ce",
    "hidden",
    "attention",
    "gradient_norm",
    "heldout_loss",
    "tokens_per_s",
    "use",
)


def keep_freed_memory() -> None:
    """Lets glibc's malloc keep what is freed for the next use, from all threads; elsewhere does nothing.

    A step on the CPU takes and frees gigabytes. Given back to the system and taken anew they are filled with zeros each
    time: a tenth to a quarter of a step's time for SmolLM2-135M. In return the process stays as large as it ever was.
    To be called before JAX makes its threads.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
            libc.mallopt(option, value)


@dataclasses.dataclass(frozen=True)
class Run:
    """What one training is made of, but for the weights.

    tokens_NT: windows that are trained on, by the shuffled epoch. heldout_MT: that are not. save_every: steps between
    checkpoints, at each of which the held-out loss is measured. best_from: the first step that may count as the best.
    keep: how many of the best stay, beside the latest.
    on_policy: the share of steps, in [0, 1], whose text the student draws itself after the first quarter of each window
    (Agarwal et al. 2024, GKD). path: of checkpoints and log; None for neither.
    """

    trainer: Trainer
    tokens_NT: np.ndarray
    heldout_MT: np.ndarray
    save_every: int
    best_from: int = 0
    keep: int = 1
    on_policy: float = 0.0
    path: Path | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Fitted:
    """params: of the step with the least held-out loss. curve: rows of the log, by name."""

    params: Params
    step: int
    heldout_loss: float
    first_loss: float
    curve: list[dict[str, float]]


def fit(run: Run, student: LM, teacher: LM | CachedTeacher, resume: bool, log: Callable[[str], None]) -> Fitted:
    """Trains, from the latest checkpoint where there is one and `resume`.

    Raises FileExistsError when a run is there and not to be resumed, ValueError when it was made with other settings.
    """
    trainer, how = run.trainer, run.trainer.training
    fixed, state = trainer.begin(student.params)
    places = None if trainer.mesh is None else (jax.tree.map(lambda x: x.sharding, state), None)
    step = jax.jit(trainer.step, donate_argnums=0, out_shardings=places)
    evaluate = jax.jit(lambda trained, fixed, *batch: trainer.losses(trained, fixed, *batch)[1]["loss"])
    batches = _Batches(run, student, teacher)
    curve: list[dict[str, float]] = []
    with _Checkpoints(run, resume) as checkpoints:
        best, kept = _Best(math.inf, 0), None
        if (at := checkpoints.latest) is not None:
            state, curve, best = checkpoints.restore(at, state)
            checkpoints.write_log(curve)
            log(f"goes on after step {at} of {how.steps}")
        heldout = functools.partial(_heldout_loss, run, evaluate, batches, fixed)
        if not curve:
            first = heldout(state)
            curve.append({"step": 0, "heldout_loss": first})
            log(f"held-out loss before training {first:.4f}")
        devices = 1 if trainer.mesh is None else trainer.mesh.size
        peak = devices * measure.matmul_rate(student.cfg.dtype)
        length = run.tokens_NT.shape[1] - 1
        needed = trainer.flops(how.batch * length, length)
        since, program, batch, began, said = int(state.step), None, (), 0.0, 0.0
        for n in range(since, how.steps):
            if program is None:
                batch = batches(n, fixed, state)
                program = step.lower(state, fixed, *batch).compile()
                memory: Any = program.memory_analysis()
                log(
                    f"a step takes {memory.temp_size_in_bytes / 1e9:.2f} GB beside "
                    f"{memory.argument_size_in_bytes / 1e9:.2f} GB of weights, optimiser and teacher"
                )
                began = time.perf_counter()
            start = time.perf_counter()
            state, found = program(state, fixed, *batch)
            if n + 1 < how.steps:
                batch = batches(n + 1, fixed, state)  # while the device is at this step
            row = {name: float(value) for name, value in found.items()}
            if not math.isfinite(row["loss"]):
                raise FloatingPointError(f"The loss of step {n + 1} is {row['loss']}. Lower the learning rate.")
            took = time.perf_counter() - start
            row |= {"step": n + 1, "tokens_per_s": how.batch * length / took, "use": needed / took / peak}
            if (n + 1) % run.save_every == 0 or n + 1 == how.steps:
                row["heldout_loss"] = heldout(state)
                if row["heldout_loss"] <= best.loss and n + 1 >= run.best_from:
                    best = _Best(row["heldout_loss"], n + 1)
                    if run.path is None:
                        kept = jax.device_get(state.weights)
            curve.append(row)
            if "heldout_loss" in row:
                checkpoints.save(n + 1, state, curve, row["heldout_loss"])
            now = time.perf_counter()
            if now - said > _LOG_S or "heldout_loss" in row:
                said = now
                left = (now - began) / (n + 1 - since) * (how.steps - n - 1)
                shown = f", held-out {row['heldout_loss']:.4f}" if "heldout_loss" in row else ""
                log(
                    f"step {n + 1} of {how.steps}: loss {row['loss']:.4f}{shown}, {row['tokens_per_s']:.0f} tokens/s, "
                    f"{row['use']:.0%} of {peak / 1e9:.0f} GFLOP/s, {left / 60:.0f} min left"
                )
        first = curve[0]["heldout_loss"]
        if best.step == 0:
            raise FloatingPointError("The held-out loss was never a number. Lower the learning rate.")
        if best.loss >= first and not run.best_from:
            log(f"no step was better than none: {first:.4f} before, {best.loss:.4f} at best. Lower the learning rate.")
        weights: Any = state.weights
        if best.step != int(state.step):
            weights = kept if run.path is None else checkpoints.restore(best.step, state)[0].weights
        return Fitted(trainer.weights.finish(fixed, weights), best.step, best.loss, first, curve)


@dataclasses.dataclass(frozen=True)
class _Best:
    loss: float
    step: int


class _Batches:
    """What each step sees; a function of its number alone, so that nothing about it has to be saved."""

    def __init__(self, run: Run, student: LM, teacher: LM | CachedTeacher):
        import grain  # takes a second

        how = run.trainer.training
        self._run, self._student, self._teacher = run, student, teacher
        rows = grain.MapDataset.source(range(len(run.tokens_NT))).seed(how.seed).shuffle()
        self._rows = rows.repeat().batch(how.batch)
        self._engine: Any = None

    def __call__(self, n: int, fixed: Any, state: State) -> tuple[Any, np.ndarray, np.ndarray]:
        """What the teacher gives, tokens [B, T], and which of them are predicted."""
        rows_B = np.asarray(self._rows[n])
        tokens_BT = self._run.tokens_NT[rows_B]
        scored_BT = np.ones(tokens_BT.shape, bool)
        chance = np.random.default_rng((self._run.trainer.training.seed, n))
        if chance.random() < self._run.on_policy:
            tokens_BT, scored_BT = self._drawn(int(chance.integers(2**31)), tokens_BT, fixed, state)
        return self.teacher(rows_B), tokens_BT, scored_BT

    def teacher(self, rows_B: np.ndarray) -> Any:
        """Its weights, or what it said of these windows; the held-out ones come after the others."""
        return self._teacher.params if isinstance(self._teacher, LM) else self._teacher.rows(rows_B)

    def _drawn(self, seed: int, tokens_BT: np.ndarray, fixed: Any, state: State) -> tuple[np.ndarray, np.ndarray]:
        """The windows' first quarter, and what the student says to it."""
        trainer = self._run.trainer
        params = trainer.weights.model(fixed, state.weights)
        batch, length = tokens_BT.shape
        if self._engine is None:
            made = dataclasses.replace(self._student, params=params)
            self._engine = compile_engine(made, batch=batch, max_len=length, mesh=trainer.mesh, rules=trainer.rules)
        engine, given = dataclasses.replace(self._engine, params=params), max(1, length // 4)
        results = engine.generate(
            tokens_BT[:, :given].tolist(), max_new_tokens=length - given, stop_tokens=(), temperature=1.0, seed=seed
        )
        drawn = np.array([result.tokens for result in results], np.int32)
        scored_BT = np.broadcast_to(np.arange(length) >= given, tokens_BT.shape)
        return np.concatenate([tokens_BT[:, :given], drawn], axis=1), scored_BT


def _heldout_loss(run: Run, evaluate: Any, batches: _Batches, fixed: Any, state: State) -> float:
    """The objective's mean over the held-out windows."""
    windows, batch = run.heldout_MT, run.trainer.training.batch
    total = 0.0
    for start in range(0, len(windows), batch):
        count = min(batch, len(windows) - start)
        rows_B = start + np.minimum(np.arange(batch), count - 1)  # the last batch is filled up with what is not scored
        scored_BT = np.broadcast_to((np.arange(batch) < count)[:, None], (batch, windows.shape[1]))
        given = batches.teacher(len(run.tokens_NT) + rows_B)
        total += count * float(evaluate(state.weights, fixed, given, windows[rows_B], scored_BT))
    return total / len(windows)


class _Checkpoints:
    """The best and the latest states in run.path, written by Orbax beside the training, whole or not at all."""

    def __init__(self, run: Run, resume: bool):
        self._run, self._manager = run, None
        if run.path is None:
            return
        import orbax.checkpoint as ocp  # takes half a second

        self._ocp, file = ocp, run.path / _SETTINGS
        if file.exists() and not resume:
            raise FileExistsError(f"{run.path} holds a run already. Go on with it by --resume, or remove it.")
        claim(file, run.settings)
        policies = ocp.checkpoint_managers
        best = policies.BestN(get_metric_fn=lambda metrics: metrics["rank"], reverse=True, n=run.keep)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(1), best]),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        self._manager = ocp.CheckpointManager((run.path / "checkpoints").absolute(), options=options)

    def __enter__(self) -> _Checkpoints:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._manager is not None:
            self._manager.wait_until_finished()
            self._manager.close()

    @property
    def latest(self) -> int | None:
        return None if self._manager is None else self._manager.latest_step()

    def save(self, step: int, state: State, curve: list[dict[str, float]], heldout_loss: float) -> None:
        if self._manager is None or self._run.path is None:
            return
        args = self._ocp.args
        items = args.Composite(state=args.StandardSave(state), curve=args.JsonSave({"rows": curve}))
        counts = step >= self._run.best_from and math.isfinite(heldout_loss)
        self._manager.save(step, args=items, metrics={"rank": heldout_loss if counts else math.inf})
        self.write_log(curve)

    def write_log(self, curve: list[dict[str, float]]) -> None:
        assert self._run.path is not None
        half = self._run.path / f".{LOG}"
        with half.open("w", newline="") as file:
            writer = csv.DictWriter(file, _COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(curve)
        half.replace(self._run.path / LOG)

    def restore(self, step: int, state: State) -> tuple[State, list[dict[str, float]], _Best]:
        """What was saved, where `state` lies, which is gone then: two of them may be more than there is room for."""
        assert self._manager is not None
        self._manager.wait_until_finished()
        args = self._ocp.args
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        jax.tree.map(lambda x: x.delete(), state)
        found = self._manager.restore(
            step, args=args.Composite(state=args.StandardRestore(shapes), curve=args.JsonRestore())
        )
        curve = found["curve"]["rows"]
        measured = [_Best(row["heldout_loss"], int(row["step"])) for row in curve[1:] if "heldout_loss" in row]
        good = [each for each in measured if each.step >= self._run.best_from and math.isfinite(each.loss)]
        best = min(good, key=lambda each: (each.loss, -each.step), default=_Best(math.inf, 0))
        return found["state"], curve, best


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a run's log.csv."""
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def plot(curve: list[dict[str, float]], path: Path) -> None:
    """The loss of each step and the held-out one, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots()
    steps, held = ([row for row in curve if name in row] for name in ("loss", "heldout_loss"))
    axes.plot([row["step"] for row in steps], [row["loss"] for row in steps], lw=0.8, alpha=0.5, label="training")
    axes.plot([row["step"] for row in held], [row["heldout_loss"] for row in held], "o-", ms=3, label="held out")
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
