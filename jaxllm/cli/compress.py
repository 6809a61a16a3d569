"""Commands that make a model smaller: optimize, search, bisect."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

import jaxllm
from jaxllm import report
from jaxllm.bisect import bisect as find_culprit
from jaxllm.bisect import table as bisect_table
from jaxllm.checkpoint import load_header, optimize_checkpoint
from jaxllm.cli import common
from jaxllm.generate import choose_max_len
from jaxllm.lm import LM, Transform
from jaxllm.measure import Workload
from jaxllm.params import select
from jaxllm.replay import load_recipe
from jaxllm.search import FLOAT, Space, plot, write_recipe
from jaxllm.search import search as find_mix
from jaxllm.textfiles import read_text
from jaxllm.transforms.layerwise import check
from jaxllm.transforms.quantize import default_rules

# Options that say how, by the one that asks for it.
_NEEDS = {
    "prune": ("sparsity", "pattern", "scope", "prune_match"),
    "compact": ("no_correct",),
    "quantize": ("rule", "method", "clip", "alpha"),
}


def optimize(args: argparse.Namespace) -> dict[str, Any]:
    _check_options(args)
    if args.stream or args.dry_run:
        return _stream(args)
    common.check_out(args.out)
    work = None if args.no_report else Workload(rounds=args.rounds, batch=args.batch, max_len=args.max_len)
    lm = common.load(args.model, args.dtype)
    steps = _steps(args, lm)
    check(lm, list(steps.values()))
    windows = None
    if work is not None:
        windows = common.windows(args, lm)
        choose_max_len(lm.cfg, work.max_len)
    models, name = {"original": lm}, ""
    for step, transform in steps.items():
        common.log(f"applying {step}")
        name = f"{name} + {step}" if name else step
        lm = transform(lm)
        models = {**models, name: lm} if work is not None else {}  # without a report none has to stay
    jaxllm.save(lm, args.out)
    common.log(f"saved {args.out}: {lm.num_params / 1e6:.1f} M parameters, {lm.weight_bytes / 1e6:.0f} MB")
    if any(entry.name == "prune" for entry in lm.ledger):
        common.log("note: zeros in place change no dense program's speed; --compact does")
    out: dict[str, Any] = {"out": str(args.out), "ledger": [dataclasses.asdict(entry) for entry in lm.ledger]}
    if work is not None and windows is not None:
        result, _ = report.compare_steps(models, windows, work, common.log)
        common.print_report(result, args.out)
        out |= dataclasses.asdict(result)
    return out


def _check_options(args: argparse.Namespace) -> None:
    asked = [option for option in ("prune", "compact", "quantize", "kv", "recipe") if getattr(args, option) is not None]
    if not asked:
        raise ValueError("Nothing to do; give --prune, --compact, --quantize, --kv or --recipe.")
    if args.recipe is not None and len(asked) > 1:
        raise ValueError(f"--recipe says all that is done; leave --{asked[0]} out, or write it into the recipe.")
    for option, others in _NEEDS.items():
        for other in others:
            given = getattr(args, other)
            if getattr(args, option) is None and given is not None and given is not False and given != []:
                raise ValueError(f"--{other.replace('_', '-')} goes with --{option}, which is not given.")
    if args.alpha is not None and "smoothquant" not in (args.method or ""):
        raise ValueError("--alpha goes with --method smoothquant, which is not given.")
    formats = [args.quantize or "", *args.rule]
    looks = args.compact or args.recipe or args.prune in ("wanda", "sparsegpt") or args.scope == "sensitivity"
    looks = looks or args.method not in (None, "rtn") or any(name.endswith("static") for name in formats)
    asked = [o for o in ("calibration", "calibration_windows", "calibration_tokens") if getattr(args, o) is not None]
    if asked and not looks:
        raise ValueError(f"--{asked[0].replace('_', '-')} is given, and none of the steps looks at a text.")
    if args.prune is not None and args.sparsity is None and args.pattern in (None, "unstructured"):
        raise ValueError("--prune needs --sparsity, the fraction of zeros, or an N:M --pattern.")


def _steps(args: argparse.Namespace, lm: LM) -> dict[str, Transform]:
    """By name, in the order they are done. Everything that can be refused without the weights is."""
    calibration = _calibration(args, lm)
    if args.recipe is not None:
        recipe = load_recipe(args.recipe, calibration)
        names = [getattr(transform, "name", "transform") for transform in recipe.transforms]
        return {f"{n} {name}": step for n, (name, step) in enumerate(zip(names, recipe.transforms, strict=True), 1)}
    steps: dict[str, Transform] = {}
    if args.compact is not None:
        kept = common.counts("--compact", args.compact, ("ffn", "kv_heads", "layers"), common.fraction_or_count)
        # Channels leave first: what is zeroed afterwards is chosen among those that stay.
        steps["compact"] = jaxllm.compact(**kept, correct=not args.no_correct, calibration=calibration)
    if args.prune is not None:
        given = _given(args, pattern="pattern", scope="scope", match="prune_match")
        steps[f"prune {args.prune}"] = jaxllm.prune(args.sparsity, args.prune, **given, calibration=calibration)
    if args.quantize is not None:
        given = _given(args, method="method", clip="clip", alpha="alpha")
        method = "" if args.method in (None, "rtn") else f" {args.method}"
        steps[f"{args.quantize}{method}"] = jaxllm.quantize(_rules(args, lm), **given, calibration=calibration)
    if args.kv is not None:
        steps["kv int8"] = jaxllm.quantize_kv()
    return steps


def _calibration(args: argparse.Namespace, lm: LM) -> Any:
    if not _calibration_options(args):
        return None
    windows, tokens = args.calibration_windows or 32, args.calibration_tokens or 512
    if args.calibration is None:
        text = jaxllm.calibration_text()
    else:
        text = read_text(args.calibration, max_chars=12 * windows * tokens)  # more than the tokens are likely to have
    return jaxllm.token_windows(lm, text, tokens, windows)


def _calibration_options(args: argparse.Namespace) -> str:
    """As they were given, for another command line."""
    names = ("calibration", "calibration_windows", "calibration_tokens")
    given = {name.replace("_", "-"): value for name in names if (value := getattr(args, name)) is not None}
    return "".join(f" --{name} {shlex.quote(str(value))}" for name, value in given.items())


def _given(args: argparse.Namespace, **names: str) -> dict[str, Any]:
    """The options that were given, by the names that the library has for them."""
    return {ours: value for ours, option in names.items() if (value := getattr(args, option)) is not None}


def _rules(args: argparse.Namespace, lm: LM) -> str | Mapping[str, str | None]:
    if not args.rule:
        return args.quantize
    rules: dict[str, str | None] = {}
    for rule in args.rule:
        pattern, found, name = rule.rpartition("=")
        if not found or not pattern:
            raise ValueError(f'--rule is {rule!r}; expected REGEX=FORMAT, where "float" leaves the weights alone.')
        rules[pattern] = None if name == FLOAT else name
    taken = {path for pattern in rules for path in select(lm.info, pattern)}
    for pattern, name in default_rules(args.quantize).items():  # for what the rules leave
        if left := [path for path in lm.info if path not in taken and re.fullmatch(pattern, path)]:
            rules[pattern] = name
            taken |= {*left}
    return rules


def _stream(args: argparse.Namespace) -> dict[str, Any]:
    steps = _steps(args, load_header(args.model, args.dtype, log=common.log))
    expected = optimize_checkpoint(
        args.model, list(steps.values()), args.out, dtype=args.dtype, dry_run=args.dry_run, log=common.log
    )
    print(f"{'would write' if args.dry_run else 'wrote'} {args.out}: {expected}")
    return {"out": str(args.out), "dry_run": args.dry_run} | dataclasses.asdict(expected)


def search(args: argparse.Namespace) -> dict[str, Any]:
    if args.out.suffix != ".py":
        raise ValueError(f"--out is {args.out}; a recipe is a Python file, NAME.py.")
    if args.out.exists():
        raise FileExistsError(f"{args.out} exists already; choose another --out or remove it.")
    names = [name for name in args.formats.split(",") if name]
    space = Space(
        tuple(names), _numbers("--ffn", args.ffn, float), _numbers("--kv-heads", args.kv_heads, int), args.drop_layers
    )
    lm = common.load(args.model, args.dtype)
    calibration = _calibration(args, lm)
    result = find_mix(
        lm,
        common.windows(args, lm),
        args.budget,
        args.unit,
        space,
        max_kl=args.max_kl,
        method=args.method,
        clip=args.clip,
        calibration=calibration,
        windows=args.sensitivity_windows,
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    dtype = "" if args.dtype is None else f" --dtype {args.dtype}"
    options = _calibration_options(args) + dtype
    picture = args.out.with_suffix(".png")
    plot(result, picture)
    table = Table(
        caption=f"Original: {result.original_cost:.5g} {result.unit}, perplexity {result.original.perplexity:.2f}"
    )
    for column in ("mix", result.unit, "parameters", "MB", "KL predicted", "KL", "top-1", "perplexity"):
        table.add_column(column, justify="left" if column == "mix" else "right")
    for i, found in enumerate(result.candidates):
        q = found.quality
        table.add_row(
            f"{found.name}{' *' if i == result.best else ''}",
            f"{found.cost:.5g}",
            f"{found.params / 1e6:.1f} M",
            f"{found.weight_bytes / 1e6:.1f}",
            f"{found.predicted_kl:.4f}",
            f"{q.kl:.4f}",
            f"{q.top1:.1%}",
            f"{q.perplexity:.2f}",
        )
    Console(width=None if common.to_terminal() else 150).print(table)
    if result.best is None:
        raise ValueError(f"None of these is within {result.budget:.4g} {result.unit} and KL {args.max_kl}.")
    write_recipe(result, args.out, args.model, options)
    common.log(f"wrote {args.out} (*) and {picture}")
    common.log(f"next: jaxllm optimize {args.model} --recipe {args.out}{options} --out DIR")
    return dataclasses.asdict(result) | {"out": str(args.out)}


def _numbers(option: str, text: str, number: Any) -> tuple[Any, ...]:
    try:
        return tuple(number(item) for item in text.split(",") if item)
    except ValueError:
        raise ValueError(f"{option} is {text!r}; expected numbers separated by commas.") from None


def bisect(args: argparse.Namespace) -> dict[str, Any]:
    lm, reference = common.load(args.model, args.dtype), common.load(args.reference, args.dtype)
    calibration = None if args.calibration is None else read_text(args.calibration)
    diagnosis = find_culprit(lm, reference, common.windows(args, reference), calibration, log=common.log)
    Console(width=None if common.to_terminal() else 150).print(bisect_table(diagnosis))
    return dataclasses.asdict(diagnosis)
