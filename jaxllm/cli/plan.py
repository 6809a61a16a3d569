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

from jaxllm import bundle, prediction, shard, targets
from jaxllm import plan as planning
from jaxllm.arrays import QArray
from jaxllm.checkpoint import load_header, optimize_checkpoint
from jaxllm.checkpoint.hf import read_config
from jaxllm.cli import common
from jaxllm.compile import Lowering
from jaxllm.config import ModelConfig
from jaxllm.examine import Examined, contract, examine
from jaxllm.generate import choose_max_len
from jaxllm.lm import LM
from jaxllm.params import flatten
from jaxllm.stages import count_groups, split
from jaxllm.transforms.layerwise import check as check_steps
from jaxllm.transforms.quantize import quantize, quantize_kv


def plan(args: argparse.Namespace) -> dict[str, Any]:
    jax.config.update("jax_platforms", "cpu")  # nothing runs: chips that are here are left to others
    slices = []
    for name in args.target.split(","):
        one = targets.parse(name)
        slices += [one] if ":" in name or one.count > 1 else targets.slices(one.kind, args.max_chips)
    batches, contexts = common.numbers("--batch", args.batch), common.numbers("--context", args.context)
    formats = [None if name == "float" else name for name in args.quantize.split(",")]
    if args.prompt_tokens > min(contexts):
        raise ValueError(f"--prompt-tokens {args.prompt_tokens} do not fit a context of {min(contexts)}.")
    rules = common.one_of("--rules", args.rules, shard.TABLES)
    stages = None if args.stages is None else common.numbers("--stages", args.stages)
    cfg = header(args.model, args.dtype).cfg
    for format in formats:
        prediction.abstract_params(cfg, format)  # what is wrong is told first
    for count in stages or [target.count for target in slices]:
        split(cfg, count)
    for target in slices:
        for count in stages or [target.count]:
            target.part(count)
    found = []
    for candidate in planning.sweep(
        cfg,
        slices,
        formats,
        batches,
        contexts,
        args.kv,
        args.prompt_tokens,
        args.price,
        args.exact,
        args.all_meshes,
        rules,
        stages,
    ):
        common.log(line(candidate))
        found.append(candidate)
    if not found:
        raise ValueError("No mesh of these slices divides the model; a slice of fewer chips may.")
    best = planning.best(found)
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table(found, best))
    if any(len(candidate.stages) > 1 for candidate in found):
        console.print(stage_table(found))
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
    (rules,) = common.one_of("--rules", args.rules, shard.TABLES)[:1]
    stages = args.stages or (target.count if target else 1)
    split(given.cfg, stages)
    if stages > 1 and (target is None or args.out is not None):
        raise ValueError(f"{stages} stages are for TPU targets, and a bundle has one; leave --out out.")
    spec = _spec(args, given.cfg, target, rules, stages)
    if target is not None and stages > 1:
        target = target.part(stages)
        devices = target.devices()
    made: dict[str, Any] = {}
    report: list[Examined] = []

    def make(lm: LM) -> None:
        if stages > 1:
            programs = _of_stages(spec, stages, rules, lm, devices)
        else:
            lowering, lowered = bundle.lower(spec, lm.cfg, lm.params, devices)
            programs = {name: (lowering, one, contract(name, rules)) for name, one in lowered.items()}
            if args.out is None:
                programs = {name: one for name, one in programs.items() if one[2]}
        found, compiled = examine(programs, target)
        show(found, spec, args.check, must_fit=args.check or args.out is not None)
        report.extend(found)
        made.update(compiled)

    if given.params:
        cfg = dataclasses.replace(given.cfg, kv_dtype=args.kv or given.cfg.kv_dtype)
        make(LM(cfg, prediction.abstract_params(cfg, args.quantize) if args.quantize else given.params))
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
        "rules": rules,
        "stages": stages,
        "out": out,
        "programs": [dataclasses.asdict(program) for program in report],
    }


def _of_stages(spec: bundle.Spec, stages: int, rules: str, lm: LM, devices: list[Any]) -> dict[str, Any]:
    """A step and prefill of each stage, for its devices."""
    mesh = spec.make_mesh(devices)
    assert mesh is not None
    batch, programs = spec.batch // count_groups(spec.batch, stages, mesh.shape["data"]), {}
    for number, stage in enumerate(split(lm.cfg, stages), 1):
        lowering = Lowering(
            stage.cfg, stage.params(lm.params), batch, spec.max_len, mesh, shard.TABLES[rules], part=stage.part
        )
        lowered = {"step": lowering.step()} | {f"prefill {n}": lowering.prefill(n) for n in lowering.chunks}
        programs |= {f"stage {number} {name}": (lowering, one, contract(name, rules)) for name, one in lowered.items()}
    return programs


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


def _spec(
    args: argparse.Namespace, cfg: ModelConfig, target: targets.Target | None, rules: str, stages: int
) -> bundle.Spec:
    max_len = choose_max_len(cfg, args.context)
    mesh: dict[str, int] | None = None
    if args.mesh is not None:
        mesh = common.counts("--mesh", args.mesh, ("data", "model", "share"), int)
    elif target is not None:
        sizes = next(planning.meshes(cfg, target, args.batch, stages, rules, max_len), None)
        if sizes is None:
            raise ValueError(f"No mesh of {target} divides the model and a batch of {args.batch}; try fewer chips.")
        mesh = {"data": sizes[0], "model": sizes[1], "share": sizes[2]}
    return bundle.Spec(str(target or args.target), mesh, shard.TABLES[rules], args.batch, max_len)


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
        return LM(cfg, prediction.abstract_params(cfg, None))
    return load_header(model, dtype, log=common.log)


def line(c: planning.Candidate) -> str:
    size = f"{(c.argument_bytes + c.temp_bytes + c.program_bytes) / 1e9:.2f} GB"
    speed = f"{c.step_ms_low:.2f}-{c.step_ms_high:.2f} ms" if c.fits else c.reason
    return f"{c.target} {_mesh(c)} {c.quantize or 'float'} batch {c.batch} context {c.context}: {size}, {speed}"


def _mesh(c: planning.Candidate) -> str:
    sizes = " x ".join(str(size) for size in c.mesh.values())
    count = f"{len(c.stages)} stages of " if len(c.stages) > 1 else ""
    return f"{count}{sizes}{'' if c.rules == 'tensor' else f' {c.rules}'}"


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


def stage_table(candidates: Sequence[planning.Candidate]) -> Table:
    out = Table(
        caption="Each stage, for one group of the batch. bubble: of its time a stage waits while all groups go through "
        "once; a decode loop goes on with the next token instead."
    )
    for name in ("target", "mesh", "batch", "stage", "layers", "GB", "ms a step", "ms to the next", "limit", "bubble"):
        out.add_column(name, justify="left" if name in ("target", "mesh", "limit") else "right")
    for c in (c for c in candidates if len(c.stages) > 1):
        for number, stage in enumerate(c.stages, 1):
            each = f"{c.batch // c.groups} x {c.groups}"
            start = [c.target, _mesh(c), each] if number == 1 else [""] * 3
            size = (stage.argument_bytes + stage.temp_bytes + stage.program_bytes) / 1e9
            out.add_row(
                *start,
                str(number),
                str(stage.layers),
                f"{size:.1f}",
                f"{stage.step_ms_low:.2f}-{stage.step_ms_high:.2f}",
                f"{stage.transfer_ms_low:.3f}-{stage.transfer_ms_high:.3f}",
                stage.reason or stage.bottleneck,
                f"{c.bubble:.0%}" if number == 1 else "",
            )
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
