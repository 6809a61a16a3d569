"""A model and the programs that run it on one target, in a directory: on that target nothing is compiled.

A bundle is a directory of `save` that `load` reads as any other, and beside it
    bundle.json         what it was compiled for: target, mesh, rules, batch, lengths, versions, hashes
    programs/*.bin      compiled programs, which run where `executable.environment` is the same
    portable/*.jax      the same programs as StableHLO, by jax.export: for any other machine, and other compilers
    weights.safetensors for one CPU: the weights as its programs take them, each by its name in `portable`
    golden.npy          float32 logits [T, V] after each of the GOLDEN tokens, computed on the CPU that wrote it
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import logging
import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.sharding import Mesh
from jax.tree_util import keystr

from jaxllm import executable, hosts, shard
from jaxllm.checkpoint import load_path
from jaxllm.checkpoint.names import read_json
from jaxllm.checkpoint.reader import Reader
from jaxllm.checkpoint.source import open_path
from jaxllm.checkpoint.tensors import Tensor, code, read_all, write_file
from jaxllm.compile import DONATING, Lowering, Programs, compile_programs, parse, prefill_chunks
from jaxllm.config import ModelConfig
from jaxllm.generate import Engine, storable
from jaxllm.hub import cache_dir
from jaxllm.kernels import cpu
from jaxllm.lm import embed_tokens, predict, run_layer
from jaxllm.params import Params, unflatten

_log = logging.getLogger(__name__)

MANIFEST = "bundle.json"
GOLDEN = 16  # tokens: the length of the shortest prefill
_VERSION = 1
_PROBE = f"probe {GOLDEN}"
_LOGITS = "golden.npy"
_WEIGHTS = "weights.safetensors"
_MAX_KL = 0.02  # nats; of bfloat16 on another machine about 1e-3, of any weight or program that is wrong above 0.1
_MAX_LOSS = 0.25  # nats that a greedy token may be less likely than the likeliest, when logits are computed anew
_PORTABLE = ("cpu", "tpu", "cuda")


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a bundle's programs are compiled for.

    target: "v5e:2x4", "cpu" or "gpu", as a name for people. mesh: sizes of `shard.make_mesh`; None for one device.
    batch, max_len: as of `compile`.
    """

    target: str
    mesh: Mapping[str, int] | None
    rules: shard.Rules
    batch: int
    max_len: int

    def __post_init__(self):
        if self.max_len < GOLDEN:
            raise ValueError(
                f"The context is {self.max_len}; a bundle's has at least {GOLDEN} tokens, to be checked with."
            )

    def make_mesh(self, devices: Sequence[Any]) -> Mesh | None:
        return None if self.mesh is None else shard.make_mesh(**self.mesh, devices=devices)


def is_bundle(path: str | Path) -> bool:
    return (Path(path) / MANIFEST).is_file()


def lower(spec: Spec, cfg: ModelConfig, params: Params, devices: Sequence[Any]) -> tuple[Lowering, dict[str, Any]]:
    """The programs of a bundle, to be compiled. params: shapes. devices: of the target."""
    lowering = _lowering(spec, cfg, params, devices)
    return lowering, lowering.serving() | {_PROBE: lowering.probe(GOLDEN)}


def _lowering(spec: Spec, cfg: ModelConfig, params: Params, devices: Sequence[Any]) -> Lowering:
    mesh, kind = spec.make_mesh(devices), devices[0].platform
    return Lowering(cfg, storable(params, mesh, kind), spec.batch, spec.max_len, mesh, spec.rules, kind)


def _environment(lowering: Lowering, machine: Mapping[str, Any]) -> dict[str, Any]:
    """All that must be the same for compiled programs to run. signature: what this jaxllm calls them with."""
    signatures = [str(lowering.signature(*parse(name))) for name in (*lowering.names(), _PROBE)]
    return {**machine, "signature": _hash("".join(signatures).encode())}


def write(path: Path, spec: Spec, compiled: Mapping[str, Any], devices: Sequence[Any]) -> None:
    """Makes a directory of `save` a bundle. compiled: what `lower` gave, by its names. devices: as for that."""
    reader = open_path(path, origin="")
    for folder in ("programs", "portable"):
        (path / folder).mkdir(exist_ok=True)  # of a run that was cut off
    hashes = {
        name: _write(path / "programs" / _file(name, "bin"), executable.serialize(program))
        for name, program in compiled.items()
    }
    np.save(path / _LOGITS, golden_logits(reader, golden_tokens(reader.cfg.vocab_size)), allow_pickle=False)
    for name, blob in portable(reader, spec).items():
        _write(path / "portable" / _file(name, "jax"), blob)
    used = devices[:1] if spec.mesh is None else devices[: math.prod(spec.mesh.values())]
    assert reader.shapes is not None
    lowering = _lowering(spec, reader.cfg, unflatten(reader.shapes), used)
    here = _environment(lowering, executable.environment(used))
    weights = _write_weights(path) if spec.mesh is None and used[0].platform == "cpu" else None
    parts = {"environment": here, "programs": hashes, "weights": weights}
    manifest = {"version": _VERSION, **dataclasses.asdict(spec), **parts}
    _write(path / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


def golden_tokens(vocab_size: int) -> np.ndarray:
    """int32 [GOLDEN], spread over the vocabulary."""
    return (np.arange(1, GOLDEN + 1, dtype=np.int64) * 7919 % vocab_size).astype(np.int32)


def golden_logits(reader: Reader, tokens: np.ndarray) -> np.ndarray:
    """float32 [T, V] after each token. Memory: a layer's weights at a time."""
    cfg = reader.cfg

    def group(name: str) -> Params:
        return unflatten({key: load() for key, load in reader.read(name).items()})

    x_BTD = embed_tokens(cfg.layer(0), group("embed"), jnp.asarray(tokens[None]))
    for i in range(cfg.num_layers):
        x_BTD = run_layer(cfg.layer(i), group(f"layers_{i}"), x_BTD)
    last = {name: group(name) for name in ("embed" if cfg.tie_embeddings else "head", "final_norm")}
    return np.asarray(predict(cfg.layer(0), last, x_BTD))[0]


def portable(reader: Reader, spec: Spec) -> dict[str, bytes]:
    """Each program as jax.export serialises it, for _PORTABLE platforms, by name; unsharded.

    A program takes and gives {name: array}: weights as "params/layers_3/mlp/up/w/values", what goes from call to call
    as "state/position_B", the rest by the names in compile.py; and gives "state/…" and "tokens".
    """
    assert reader.shapes is not None
    lowering = Lowering(reader.cfg, unflatten(reader.shapes), spec.batch, spec.max_len, None, platform="any")

    def one(name: str) -> bytes:
        kind, size = parse(name)
        function = lowering.function(kind, size)
        given = dict(zip(inspect.signature(function).parameters, lowering.signature(kind, size)[0], strict=False))

        def run(named: dict[str, jax.Array]) -> dict[str, jax.Array]:
            arguments = jax.tree.unflatten(jax.tree.structure(given), [named[name] for name in _by_name(given)])
            results = function(*(arguments[name] for name in given))
            results = (results,) if kind == "start" else results
            return _by_name(dict(zip(("state", "tokens"), results, strict=False)))

        return bytes(export.export(jax.jit(run), platforms=_PORTABLE)(_by_name(given)).serialize())

    return {name: one(name) for name in lowering.names()}


def _by_name(tree: Any) -> dict[str, Any]:
    return {keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.flatten_with_path(tree)[0]}


def load_bundle(path: str | Path) -> Engine:
    """An engine that is ready to generate on this machine's devices.

    Where devices, versions or instructions are not those that it was compiled for, that is logged, and its programs
    are compiled anew. Its logits are held against those that it came with; where the weights are kept as programs take
    them, and have their hash, the first time on a machine.
    A bundle is machine code, as any program is: load those of people whom you trust.

    Raises ValueError when it is no bundle, is damaged, needs more devices than there are, or computes something else.
    """
    path = Path(path).absolute()
    spec, manifest = _read(path)
    mesh = spec.make_mesh(jax.devices())
    devices = jax.devices()[:1] if mesh is None else list(mesh.devices.flat)
    if shard.across_hosts(mesh):
        hosts.require_same("the bundle", manifest)
    was, machine = manifest["environment"], executable.environment(devices)
    same = all(was.get(key) == machine[key] for key in machine)
    loads = _loads(path, manifest["programs"], devices) if same else {}
    passed = _passed(path, manifest, machine) if same and manifest["weights"] else None
    checked = passed is not None and passed.is_file()
    with ThreadPoolExecutor(1) as pool:  # what is called first is loaded while all else is read
        loads |= {name: pool.submit(loads[name]).result for name in _first(loads, spec.max_len, probe=not checked)}
        reader = open_path(path, origin="")
        assert reader.shapes is not None
        lowering = _lowering(spec, reader.cfg, unflatten(reader.shapes), devices)
        here = _environment(lowering, machine)
        if differ := [key for key in {**was, **here} if was.get(key) != here.get(key)]:
            told = (", ".join(f"{key} {side.get(key)}" for key in differ) for side in (was, here))
            _log.info("%s was compiled for %s; this is %s: compiling for it", path.name, *told)
            params = _load(path, spec, mesh)
            programs = compile_programs(reader.cfg, params, spec.batch, spec.max_len, mesh, rules=spec.rules)
            probe, passed, checked = lowering.probe(GOLDEN).compile(), None, False
        else:
            compiled = _programs(path, loads, lowering, devices)
            probe = compiled.pop(_PROBE)
            programs = Programs.of(compiled, spec.batch, lowering.slots)
            digest = manifest["weights"]
            params = _load(path, spec, mesh) if digest is None else _read_weights(path, digest, lowering.params)
        engine = Engine(reader.cfg, params, programs, reader.tokenizer, spec.max_len, mesh, spec.rules)
        if not checked:
            rows = lowering.signature(*parse(_PROBE))[0][1].shape[0]
            _check(engine, lambda tokens: np.asarray(probe(params, np.tile(tokens, (rows, 1))))[0], path)
            if passed is not None:
                passed.parent.mkdir(parents=True, exist_ok=True)
                passed.touch()
    return engine


def _passed(path: Path, manifest: Mapping[str, Any], machine: Mapping[str, Any]) -> Path:
    """The file that says that `_check` passed here, of these programs, weights and logits, which have their hashes."""
    what = [manifest, _digest(path / _LOGITS), machine, platform.node()]
    return cache_dir() / "bundles" / _hash(json.dumps(what).encode())


def _load(path: Path, spec: Spec, mesh: Mesh | None) -> Params:
    lm = load_path(path, origin="", mesh=mesh, rules=spec.rules)
    params = storable(lm.params, mesh)
    return params if mesh is None else shard.put(params, shard.param_shardings(lm.cfg, params, mesh, spec.rules))


def _write_weights(path: Path) -> str | None:
    """Returns the file's hash; None, and writes none, where it cannot hold a type."""
    leaves = _by_name(storable(load_path(path, origin="").params, None))
    try:
        tensors = {
            name: Tensor(code(leaf.dtype), leaf.shape, functools.partial(np.asarray, leaf))
            for name, leaf in leaves.items()
        }
    except KeyError:  # int4, where there are no kernels that read it packed
        return None
    write_file(path / _WEIGHTS, tensors)
    return _digest(path / _WEIGHTS)


def _read_weights(path: Path, digest: str, expected: Params) -> Params:
    """What `_write_weights` wrote, of the expected shapes."""
    file = path / _WEIGHTS
    if not file.is_file() or _digest(file) != digest:
        raise ValueError(f"{file} is missing or damaged: its hash is not that in {MANIFEST}. Make the bundle again.")
    leaves = _by_name(expected)
    params = cpu.in_huge_pages([*leaves.values()], lambda rooms: read_all(file, dict(zip(leaves, rooms, strict=True))))
    return jax.tree.unflatten(jax.tree.structure(expected), params)


def _read(path: Path) -> tuple[Spec, dict[str, Any]]:
    if not is_bundle(path):
        raise ValueError(
            f"{path} is no bundle: it has no {MANIFEST}. Make one: jaxllm compile MODEL --target T --out DIR"
        )
    manifest = read_json(path / MANIFEST)
    if manifest.get("version") != _VERSION:
        raise ValueError(
            f"{path} is a bundle of version {manifest.get('version')!r}; expected {_VERSION}. Make it again."
        )
    try:
        fields = {field.name: manifest[field.name] for field in dataclasses.fields(Spec)}
        fields["rules"] = {axis: tuple(to) if isinstance(to, list) else to for axis, to in fields["rules"].items()}
        for name, kind in {"environment": dict, "programs": dict, "weights": str | None}.items():
            if not isinstance(manifest[name], kind):
                raise TypeError(f"{name} is {manifest[name]!r}")
        return Spec(**fields), manifest
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / MANIFEST} is damaged: {type(error).__name__}: {error}. Make it again.") from error


def _loads(path: Path, hashes: Mapping[str, str], devices: Sequence[Any]) -> dict[str, Callable[[], Any]]:
    """What loads each program, by name."""

    def one(name: str) -> Callable[[], Any]:
        file = path / "programs" / _file(name, "bin")
        if not file.is_file() or _hash(file.read_bytes()) != hashes[name]:
            raise ValueError(
                f"{file} is missing or damaged: its hash is not that in {MANIFEST}. Make the bundle again."
            )
        return lambda: executable.deserialize(file.read_bytes(), devices)

    return {name: one(name) for name in hashes}


def _first(names: Iterable[str], max_len: int, probe: bool) -> list[str]:
    """Those of a short prompt and its answer, and before them the one that `_check` needs."""
    wanted = ("start", f"prefill {prefill_chunks(max_len)[0]}")
    first = [name for name in names if name in wanted or name.startswith(("decode", "greedy"))]
    return [_PROBE, *first] if probe and first else first


def _programs(
    path: Path, loads: Mapping[str, Callable[[], Any]], lowering: Lowering, devices: Sequence[Any]
) -> dict[str, executable.Program]:
    """By name. Each is loaded at its first call: long prompts' prefill may never be needed."""
    if set(loads) != (names := {*lowering.names(), _PROBE}):
        raise ValueError(f"{path} has programs {sorted(loads)}; expected {sorted(names)}. Make it again.")

    def one(name: str) -> executable.Program:
        kind, size = parse(name)
        donated = 1 if kind in DONATING else None

        @functools.cache
        def program() -> executable.Program:
            return executable.callable_program(loads[name](), *lowering.signature(kind, size), donated, devices)

        return lambda *args: program()(*args)

    return {name: one(name) for name in loads}


def _check(engine: Engine, probe: Callable[[np.ndarray], np.ndarray], path: Path) -> None:
    """Raises ValueError when logits are not the golden ones, or greedy tokens not those of the logits."""
    vocab = engine.cfg.vocab_size
    golden, tokens = np.load(path / _LOGITS, allow_pickle=False), golden_tokens(vocab)
    if golden.shape != (GOLDEN, vocab):
        raise ValueError(
            f"{path / _LOGITS} has shape {golden.shape}; expected {(GOLDEN, vocab)}. Make the bundle again."
        )
    expected, found = _log_softmax(golden), _log_softmax(probe(tokens))
    kl = float(np.mean(np.sum(np.exp(expected) * (expected - found), axis=-1)))
    if not kl <= _MAX_KL:
        raise ValueError(
            f"{path}: its logits differ from those that it was made with by {kl:.3g} nats (KL); expected at most "
            f"{_MAX_KL}. Weights and programs are undamaged: are device and compiler sound? Make the bundle again here."
        )
    half = GOLDEN // 2
    answer = engine.generate([tokens[:half].tolist()], max_new_tokens=half, stop_tokens=())[0].tokens
    logits_TV = _log_softmax(probe(np.array([*tokens[:half], *answer], np.int32))[half - 1 : -1])
    loss = float(np.max(logits_TV.max(axis=-1) - logits_TV[np.arange(half), answer]))
    if not loss <= _MAX_LOSS:
        raise ValueError(
            f"{path}: a greedy token is {loss:.3g} nats less likely than the likeliest; expected at most {_MAX_LOSS}. "
            "Prefill or decode does not compute what the model does. Make the bundle again here."
        )


def _log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    """By NumPy, which compiles nothing."""
    logits_TV = logits_TV - logits_TV.max(axis=-1, keepdims=True)
    return logits_TV - np.log(np.sum(np.exp(logits_TV), axis=-1, keepdims=True))


def _file(name: str, suffix: str) -> str:
    return f"{name.replace(' ', '-')}.{suffix}"


def _write(file: Path, content: bytes) -> str:
    """Returns the hash."""
    file.write_bytes(content)
    return _hash(content)


def _digest(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
