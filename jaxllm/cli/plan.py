"""The command that looks at machines that are not at hand."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from jaxllm import bundle, shard, targets
from jaxllm import plan as planning
from jaxllm.arrays import QArray
from jaxllm.checkpoint import load_header, optimize_checkpoint
from jaxllm.checkpoint.hf import read_config
from jaxllm.cli import common
from jaxllm.compile import parse
from jaxllm.config import ModelConfig
from jaxllm.examine import Examined, examine
from jaxllm.generate import choose_max_len
from jaxllm.lm import LM
from jaxllm.params import flatten
from jaxllm.transforms.layerwise import check as check_steps
from jaxllm.transforms.quantize import quantize, quantize_kv


def plan(args: argparse.Namespace) -> dict[str, Any]:
    jax.config.update("jax_platforms", "cpu")  # nothing runs: chips that are here are left to others
    slices = []
    for name in args.target.split(","):
        one = targets.parse(name)
        slices += [one] if ":" in name else targets.slices(one.kind, args.max_chips)
    batches, contexts = common.numbers("--batch", args.batch), common.numbers("--context", args.context)
    formats = [None if name == "float" else name for name in args.quantize.split(",")]
    if args.prompt_tokens > min(contexts):
        raise ValueError(f"--prompt-tokens {args.prompt_tokens} do not fit a context of {min(contexts)}.")
    cfg = header(args.model, args.dtype).cfg
    for format in formats:
        planning.abstract_params(cfg, format)  # a wrong one is told first
    found = []
    for candidate in planning.sweep(
        cfg, slices, formats, batches, contexts, args.kv, args.prompt_tokens, args.price, args.exact, args.all_meshes
    ):
        common.log(line(candidate))
        found.append(candidate)
    if not found:
        raise ValueError("No mesh of these slices divides the model; a slice of fewer chips may.")
    best = planning.best(found)
    Console(width=None if sys.stdout.isatty() else 150).print(table(found, best))
    if args.plot:
        plot(found, best, args.plot)
        common.log(f"wrote {args.plot}")
    as_json = [dataclasses.asdict(candidate) for candidate in found]
    return {"candidates": as_json, "best": None if best is None else found.index(best)}


def compile_for(args: argparse.Namespace) -> dict[str, Any]:
    if args.out is not None:
        common.check_out(args.out)
        if _is_config(args.model):
            raise ValueError(f"{args.model} has no weights, and --out writes them; give a model, or leave --out out.")
    target, devices = _devices(args.target)
    if args.check and target is None:
        raise ValueError(f"--check holds TPU programs to their contract; --target {args.target} has none.")
    given = header(args.model, args.dtype)
    steps = [quantize(args.quantize)] if args.quantize else []
    steps += [quantize_kv()] if args.kv else []
    check_steps(given, steps)
    if args.quantize and any(isinstance(leaf, QArray) for leaf in flatten(given.params).values()):
        raise ValueError(f"{args.model} is quantised already; leave --quantize out.")
    spec = _spec(args, given.cfg, target)
    made: dict[str, Any] = {}
    report: list[Examined] = []

    def make(lm: LM) -> None:
        lowering, programs = bundle.lower(spec, lm.cfg, lm.params, devices)
        if args.out is None:
            programs = {name: one for name, one in programs.items() if parse(name)[0] in ("decode", "prefill")}
        found, compiled = examine(lowering, programs, lm.cfg.num_layers, target)
        show(found, spec, args.check, must_fit=args.check or args.out is not None)
        report.extend(found)
        made.update(compiled)

    if given.params:
        cfg = dataclasses.replace(given.cfg, kv_dtype=args.kv or given.cfg.kv_dtype)
        make(LM(cfg, planning.abstract_params(cfg, args.quantize) if args.quantize else given.params))
    elif args.out is None:
        raise ValueError(f"{args.model} was quantised by another tool: only its weights tell their shapes. Add --out.")

    def finish(path: Path) -> None:
        if not made:
            make(load_header(path))
        common.log("writing portable programs and golden logits")
        bundle.write(path, spec, made, devices)

    if args.out is not None:
        optimize_checkpoint(args.model, steps, args.out, dtype=args.dtype, finish=finish, log=common.log)
        common.log(f"wrote {args.out}; run it there: jaxllm generate {args.out} PROMPT")
    mesh = None if spec.mesh is None else dict(spec.mesh)
    out = None if args.out is None else str(args.out)
    return {
        "target": spec.target,
        "mesh": mesh,
        "out": out,
        "programs": [dataclasses.asdict(program) for program in report],
    }


def _devices(name: str) -> tuple[targets.Target | None, list[Any]]:
    """Of a slice that need not be here, or of this machine."""
    if name not in ("cpu", "gpu"):
        jax.config.update("jax_platforms", "cpu")  # nothing runs: chips that are here are left to others
        target = targets.parse(name)
        return target, target.devices()
    try:
        return None, jax.devices(name)
    except RuntimeError as error:
        raise ValueError(f"--target {name}: this machine has none that jax can use ({error}).") from error


def _spec(args: argparse.Namespace, cfg: ModelConfig, target: targets.Target | None) -> bundle.Spec:
    mesh: dict[str, int] | None = None
    if args.mesh is not None:
        mesh = common.counts("--mesh", args.mesh, ("data", "model", "share"), int)
    elif target is not None:
        sizes = next(planning.meshes(cfg, target, args.batch), None)
        if sizes is None:
            raise ValueError(f"No mesh of {target} divides the model and a batch of {args.batch}; try fewer chips.")
        mesh = {"data": sizes[0], "model": sizes[1], "share": sizes[2]}
    max_len = choose_max_len(cfg, args.context)
    return bundle.Spec(str(target or args.target), mesh, shard.RULES, args.batch, max_len)


def show(found: Sequence[Examined], spec: bundle.Spec, check: bool, must_fit: bool) -> None:
    """Prints what the compiler said. Raises ValueError for what does not fit where it must, and for breaches."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(examined_table(found, spec))
    for program in found:
        for buffer in program.buffers:
            console.print(f"{program.name}: {buffer.nbytes / 1e6:.1f} MB {buffer.shape} {buffer.source}", markup=False)
    breaches = [f"{program.name}: {breach}" for program in found for breach in program.breaches]
    for breach in breaches:
        console.print(breach, markup=False)
    large = sum(bool(program.reason) for program in found)
    if (check and breaches) or (must_fit and large):
        raise ValueError(f"{len(breaches)} breaches of the contract; {large} programs do not fit.")


def examined_table(found: Sequence[Examined], spec: bundle.Spec) -> Table:
    sizes = "one device" if spec.mesh is None else f"mesh {' x '.join(map(str, spec.mesh.values()))}"
    out = Table(caption=f"{spec.target}, {sizes}; bytes are of one device; ms are predictions, nothing was run.")
    for name in (
        "program",
        "arguments",
        "temporaries",
        "code",
        "ms",
        "limit",
        "collectives",
        "compiled in",
        "contract",
    ):
        out.add_column(name, justify="left" if name in ("program", "limit", "collectives") else "right")
    for p in found:
        if p.reason and not p.argument_bytes:
            out.add_row(p.name, "does not fit", p.reason, *[""] * 6)
            continue
        sizes = (f"{size / 1e6:.1f} MB" for size in (p.argument_bytes, p.temp_bytes, p.program_bytes))
        kinds = ", ".join(f"{count} {kind}" for kind, count in p.collectives.items())
        state = p.reason or (f"{len(p.breaches)} breaches" if p.breaches else "kept" if p.ms_high else "")
        ms = f"{p.ms_low:.2f}-{p.ms_high:.2f}" if p.ms_high else ""
        out.add_row(p.name, *sizes, ms, p.bottleneck, kinds, f"{p.compile_s:.1f} s", state)
    return out


def _is_config(model: str) -> bool:
    return Path(model).suffix == ".json" and Path(model).is_file()


def header(model: str, dtype: str | None) -> LM:
    """The shapes of a config.json, or of anything that `load` takes. dtype: of float weights and activations."""
    if _is_config(model):
        cfg = read_config(Path(model), dtype)[0]
        return LM(cfg, planning.abstract_params(cfg, None))
    return load_header(model, dtype, log=common.log)


def line(c: planning.Candidate) -> str:
    size = f"{(c.argument_bytes + c.temp_bytes + c.program_bytes) / 1e9:.2f} GB"
    speed = f"{c.step_ms_low:.2f}-{c.step_ms_high:.2f} ms" if c.fits else c.reason
    return f"{c.target} {_mesh(c)} {c.quantize or 'float'} batch {c.batch} context {c.context}: {size}, {speed}"


def _mesh(c: planning.Candidate) -> str:
    return " x ".join(str(size) for size in c.mesh.values())


def table(candidates: Sequence[planning.Candidate], best: planning.Candidate | None) -> Table:
    out = Table(
        caption="Predictions by the TPU compiler; nothing was run. Bytes are of a device; ms from the roofline to its "
        "own estimate; mesh: data x model x share; *: most tokens a second and chip."
    )
    for name in ("target", "mesh", "weights", "batch", "context", "GB", "ms a step", "limit", "TTFT ms"):
        out.add_column(name, justify="left" if name in ("target", "mesh", "weights", "limit") else "right")
    for name in ("tokens/s", "a chip", "$ / M", "max batch"):
        out.add_column(name, justify="right")
    for c in candidates:
        size = f"{(c.argument_bytes + c.temp_bytes + c.program_bytes) / 1e9:.1f} of {c.hbm_bytes / 1e9:.1f}"
        start = [c.target + (" *" if c is best else ""), _mesh(c), c.quantize or "float", str(c.batch), str(c.context)]
        if not c.fits:
            out.add_row(*start, size, "does not fit", c.reason, "", "", "", "", str(c.largest_batch))
            continue
        cost = "" if c.cost_low is None else f"{c.cost_low:.2f}-{c.cost_high:.2f}"
        rates = f"{c.tokens_per_s_low:.0f}-{c.tokens_per_s_high:.0f}"
        each = f"{c.tokens_per_s_low / c.chips:.0f}-{c.tokens_per_s_high / c.chips:.0f}"
        steps = f"{c.step_ms_low:.2f}-{c.step_ms_high:.2f}"
        first = f"{c.ttft_ms_low:.0f}-{c.ttft_ms_high:.0f}"
        out.add_row(*start, size, steps, c.bottleneck, first, rates, each, cost, str(c.largest_batch))
    return out


def plot(candidates: Sequence[planning.Candidate], best: planning.Candidate | None, path: Path) -> None:
    """A PNG: tokens a second and chip against ms a token, a bar from the low to the high end of each candidate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = list(dict.fromkeys((c.target, c.quantize or "float") for c in candidates))
    for c in candidates:
        if c.fits:
            color = f"C{names.index((c.target, c.quantize or 'float')) % 10}"
            ends = [c.step_ms_low, c.step_ms_high], [c.tokens_per_s_high / c.chips, c.tokens_per_s_low / c.chips]
            axes.plot(*ends, "-", color=color, linewidth=3 if c is best else 1.5)
            axes.annotate(f"{c.batch}", (ends[0][0], ends[1][0]), fontsize=7)
    for number, (target, format) in enumerate(names):
        axes.plot([], [], "-", color=f"C{number % 10}", label=f"{target} {format}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("ms a decode step; numbers are batches")
    axes.set_ylabel("tokens a second and chip")
    axes.set_title("Predicted, from the roofline to the compiler's estimate")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
