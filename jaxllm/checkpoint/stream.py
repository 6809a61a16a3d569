"""Compression of models that are larger than memory: from checkpoint to checkpoint, a group of weights at a time.

What is being made lies in `.OUT.partial`, beside OUT:
    job.json            what makes what, of which files
    model/              what becomes OUT; arrays/<group> appears by one rename when the group is finished
    state/<group>/      what the manifest will say of the group, and after the latest one stream/, the residual streams
    tmp/                what is being written
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm import hub
from jaxllm.arrays import Weight
from jaxllm.checkpoint import native
from jaxllm.checkpoint.estimate import Estimate, estimate
from jaxllm.checkpoint.leaves import Description, check_leaves
from jaxllm.checkpoint.names import read_json
from jaxllm.checkpoint.reader import Reader
from jaxllm.checkpoint.source import open_path
from jaxllm.compile import use_compilation_cache
from jaxllm.lm import LM, Transform, record
from jaxllm.transforms.layerwise import Layerwise, Leaves, Stage, groups, run

_JOB = "job.json"


def optimize_checkpoint(
    source: str | os.PathLike[str],
    transforms: Sequence[Transform],
    out: str | os.PathLike[str],
    *,
    origin: str | None = None,
    dtype: str | None = None,
    dry_run: bool = False,
    finish: Callable[[Path], None] | None = None,
    log: Callable[[str], None] | None = None,
) -> Estimate:
    """Transforms a checkpoint into one in jaxllm's own format, without ever holding the model in memory.

    The result is, bit for bit, what `load`, `chain(*transforms)` and `save` give. A run that ended early, however it
    did, goes on at the first missing group when the same thing is called again; so does one whose disk was full.

    source: see `load`; a Hugging Face or jaxllm directory, or a .gguf file.
    transforms: applied from left to right; only those that work layer by layer: quantize, quantize_kv, prune but for
        scope="global", and compact but for layers.
    out: a new or empty directory. Until it is finished, what there is lies in `.NAME.partial` beside it.
    origin: a line for the ledger on where the files come from; by default what `hub.resolve` says.
    dtype: see `load_path`.
    dry_run: checks everything that can be checked without reading weights, and writes nothing.
    finish: called with the directory of the result before that becomes `out`, to add files to it; called again when a
        run that ended in it goes on.
    log: takes progress in whole lines; by default `logging.getLogger("jaxllm").info`.
    Memory: without calibration one weight more than a group of the result, with it a group, its statistics and the
        text's residual stream for each calibrated transform.
    Raises ValueError for a transform that needs the whole model, for what transforms and `load_path` refuse, and when
    `.NAME.partial` is of another job; FileExistsError when `out` is there, OSError when the disk is too full.
    """
    log = log or logging.getLogger("jaxllm").info
    _check_layerwise(transforms)
    use_compilation_cache()
    found = hub.resolve(source, log=log)
    reader = open_path(found.path, origin=origin or found.origin, dtype=dtype)
    model, stages = LM(reader.cfg, {}, reader.ledger, reader.tokenizer), []
    for transform in transforms:
        plan = transform.prepare(model)  # pyright: ignore[reportFunctionMemberAccess]
        stages.append(Stage(transform.name, model.cfg, plan))  # pyright: ignore[reportFunctionMemberAccess]
        model = record(model, stages[-1].name, plan.args, plan.touched, cfg=plan.cfg)

    out = Path(out).resolve()
    work = _Partial(out, _job(reader, model))
    expected = estimate(reader, stages, model.cfg, out)
    finished = work.check()
    if finished and not dry_run:
        work.remove()  # an earlier run did all but this
    if finished:
        return expected
    written = sum(file.stat().st_size for file in work.model.rglob("*") if file.is_file())
    native.check_room(out, max(0, expected.bytes_out + expected.stream_bytes - written))
    if dry_run:
        return expected
    with work.open():
        _run(reader, stages, model, work, log)
        if finish is not None:
            finish(work.model)
        native.move(work.model, out)
        work.remove()
    return expected


def _check_layerwise(transforms: Sequence[Transform]) -> None:
    for number, transform in enumerate(transforms, 1):
        if not isinstance(transform, Layerwise):
            name = getattr(transform, "func", transform)
            name = getattr(name, "__qualname__", repr(name)).partition(".")[0].strip("_")
            raise ValueError(
                f"Transform {number}, {name}, looks at the whole model at once, so it cannot go layer by layer. "
                'prune(scope="global") and compact(layers=…) are of that kind: leave them out, or load the model, '
                "apply them and save it where memory allows."
            )


def _job(reader: Reader, model: LM) -> dict[str, Any]:
    """All that the result depends on, as JSON. The ledger has the transforms' arguments and hashes of their texts."""
    job = {
        "ledger": [dataclasses.asdict(entry) for entry in model.ledger],
        "config": dataclasses.asdict(model.cfg),
        "source": {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in reader.files},
        "jax": f"{jax.__version__} on {jax.default_backend()}",
    }
    return json.loads(json.dumps(job))


def _run(reader: Reader, stages: Sequence[Stage], model: LM, work: _Partial, log: Callable[[str], None]) -> None:
    names, start = groups(model.cfg), time.monotonic()
    done, leaves, files = work.restore(names, stages)
    if done:
        log(f"{done} of {len(names)} groups were written before; going on with {names[min(done, len(names) - 1)]}.")
    for number, group in enumerate(names[done:], done + 1):
        new: dict[str, Weight] = {}
        for _, piece in run(stages, _pieces(reader, group, stages)):
            new |= piece
            del piece
        described, digests = work.commit(group, new, [stage for stage in stages if stage.walks_past(group)])
        leaves |= described
        files |= digests
        del new
        log(f"{group} written, {number} of {len(names)}, {time.monotonic() - start:.0f} s")
    check_leaves(model.cfg, leaves, "The result")
    native.write_manifest(work.model, model, leaves, files)


def _pieces(reader: Reader, group: str, stages: Sequence[Stage]) -> Iterator[tuple[str, Leaves]]:
    """The group's leaves; one by one where no calibration needs the whole group. None is held on to."""
    lazy = reader.read(group)
    if any(stage.walk for stage in stages):
        yield group, {name: load() for name, load in lazy.items()}
    else:
        for name, load in lazy.items():
            yield group, {name: load()}


class _Partial:
    """The directory of an unfinished result."""

    def __init__(self, out: Path, job: dict[str, Any]):
        self._out, self._job = out, job
        self._path = out.parent / f".{out.name}.partial"
        self.model, self._state, self._tmp = (self._path / name for name in ("model", "state", "tmp"))
        self._latest: str | None = None

    def check(self) -> bool:
        """Whether the result is there already, and only this directory was not removed in time.

        Raises ValueError when the directory is of another job, FileExistsError when `out` is in use.
        """
        if (self._path / _JOB).is_file():
            theirs = read_json(self._path / _JOB)
            if different := _difference(theirs, self._job):
                raise ValueError(
                    f"{self._path} was begun by another job: {different}. To go on with that one, ask for the same "
                    "again; to begin anew, remove the directory."
                )
        elif self._path.exists() and any(file.name != f"{_JOB}.tmp" for file in self._path.iterdir()):
            raise ValueError(f"{self._path} holds files but no {_JOB}, so it cannot be told what of. Remove it.")
        if self._path.exists() and not self.model.exists() and (self._out / native.MANIFEST).is_file():
            made = read_json(self._out / native.MANIFEST)
            if all(made.get(key) == self._job[key] for key in ("ledger", "config")):
                return True
        native.check_free(self._out)
        return False

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Makes the directory, or goes on with it, and keeps other processes out meanwhile."""
        self._path.mkdir(parents=True, exist_ok=True)
        with _lock(self._path):
            (self._path / f"{_JOB}.tmp").write_text(json.dumps(self._job, indent=1) + "\n", encoding="utf-8")
            os.rename(self._path / f"{_JOB}.tmp", self._path / _JOB)
            shutil.rmtree(self._tmp, ignore_errors=True)
            for path in (self._tmp, self._state, self.model / native.ARRAYS):
                path.mkdir(parents=True, exist_ok=True)
            try:
                yield
            except BaseException:
                arrays = self.model / native.ARRAYS
                if arrays.is_dir() and not any(arrays.iterdir()):  # nothing to go on with
                    self.remove()
                raise

    def restore(self, names: Sequence[str], stages: Sequence[Stage]) -> tuple[int, dict[str, Any], dict[str, str]]:
        """How many groups there are, what describes their leaves, their files' digests. Stages get their streams."""
        present = [(self.model / native.ARRAYS / group).is_dir() for group in names]
        done = present.index(False) if False in present else len(present)
        leaves: dict[str, Description] = {}
        files: dict[str, str] = {}
        try:
            if any(present[done:]):
                raise ValueError(f"{names[done]} is missing, and later groups are there")
            for group in names[:done]:
                state = read_json(self._state / group / "group.json")
                leaves |= state["leaves"]
                files |= state["files"]
                if group != names[done - 1]:
                    shutil.rmtree(self._state / group / "stream", ignore_errors=True)
            if done:
                self._latest = names[done - 1]
                _read_streams(self._state / self._latest / "stream", [s for s in stages if s.walks_past(self._latest)])
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ValueError(f"{self._path} is damaged: {error}. Remove it and begin anew.") from error
        return done, leaves, files

    def commit(
        self, group: str, leaves: Leaves, walking: Sequence[Stage]
    ) -> tuple[dict[str, Description], dict[str, str]]:
        """Writes a group, and before it counts, all that going on after it takes."""
        described = native.write_group(self._tmp / "group", group, leaves)
        files = native.digests(self._tmp / "group", group)
        state = self._tmp / "state"
        state.mkdir()
        (state / "group.json").write_text(json.dumps({"leaves": described, "files": files}), encoding="utf-8")
        if walking:
            streams = [jnp.concatenate(stage.walk.x_NTD) for stage in walking if stage.walk]
            native.write_arrays(state / "stream", {str(i): {"x_NTD": x_NTD} for i, x_NTD in enumerate(streams)})
        _sync(self._tmp)
        shutil.rmtree(self._state / group, ignore_errors=True)  # of a run that ended right here
        os.rename(state, self._state / group)
        os.rename(self._tmp / "group", self.model / native.ARRAYS / group)  # now it counts
        if self._latest:
            shutil.rmtree(self._state / self._latest / "stream", ignore_errors=True)
        self._latest = group
        return described, files

    def remove(self) -> None:
        """The job last: without it nobody could tell what the rest is."""
        for path in (self._tmp, self._state, self.model):
            shutil.rmtree(path, ignore_errors=True)
        for name in (f"{_JOB}.tmp", _JOB):
            (self._path / name).unlink(missing_ok=True)
        self._path.rmdir()


def _read_streams(path: Path, walking: Sequence[Stage]) -> None:
    if not walking:
        return
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    expected = {}
    for i, stage in enumerate(walking):
        assert stage.plan.tokens_NT is not None
        shape = (*stage.plan.tokens_NT.shape, stage.plan.cfg.embed_dim)
        expected[str(i)] = {"x_NTD": jax.ShapeDtypeStruct(shape, jnp.dtype(stage.plan.cfg.dtype), sharding=device)}
    arrays = native.read_arrays(path, expected)
    for i, stage in enumerate(walking):
        assert stage.walk is not None
        stage.walk.x_NTD = [x_TD[None] for x_TD in arrays[str(i)]["x_NTD"]]


def _difference(theirs: Any, ours: Any, at: str = "") -> str:
    """The first thing in which two JSON values differ; "" for none."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        pairs = [(key, theirs.get(key), ours.get(key)) for key in [*ours, *(key for key in theirs if key not in ours)]]
    elif isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        pairs = [(i, *pair) for i, pair in enumerate(zip(theirs, ours, strict=True))]
    else:
        return "" if theirs == ours else f"{at} is {json.dumps(theirs)[:200]} there and {json.dumps(ours)[:200]} here"
    return next((found for key, a, b in pairs if (found := _difference(a, b, f"{at}/{key}" if at else str(key)))), "")


def _sync(path: Path) -> None:
    """Files to the disk, so that what a rename says is true after a power cut as well."""
    for file in path.rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Raises OSError when another process has it. The lock goes with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(f"Another process is writing to {path}; wait for it, or end it.") from error
        yield
    finally:
        os.close(descriptor)
