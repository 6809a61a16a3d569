"""What the commands share: loading, texts, checks before slow work, printing."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import jaxllm
from jaxllm import report
from jaxllm.textfiles import read_text

MESH = ("data", "model", "share", "stages")


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity; a ruined model's perplexity is null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def log(message: str) -> None:
    print(f"jaxllm: {message}", file=sys.stderr, flush=True)


def load(name: str, dtype: str | None = None) -> Any:
    start = time.perf_counter()
    lm = jaxllm.load(name, dtype, log=log)
    log(
        f"loaded {name}: {lm.num_params / 1e6:.1f} M parameters, {lm.weight_bytes / 1e6:.0f} MB, "
        f"{time.perf_counter() - start:.1f} s"
    )
    return lm


def windows(args: argparse.Namespace, lm: Any) -> Any:
    text = jaxllm.evaluation_text() if args.text is None else read_text(args.text)
    return jaxllm.token_windows(lm, text, args.window_tokens, args.windows)


def sliding_windows(args: argparse.Namespace, lm: Any) -> Any:
    text = jaxllm.evaluation_text() if args.text is None else read_text(args.text)
    stride = args.window_tokens if args.stride is None else args.stride
    return jaxllm.sliding_windows(lm, text, args.window_tokens, stride, args.windows)


def to_terminal() -> bool:
    return sys.stdout.isatty()


def check_out(path: Path) -> None:
    """Before the slow work, not after it."""
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OSError(f"{path} cannot be written: {parent} is not a directory that you may write to.")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(
            f"{path} exists already and is not an empty directory; choose another --out or remove it."
        )


def numbers(option: str, given: str) -> list[int]:
    """numbers("--batch", "1,8") == [1, 8]."""
    try:
        out = [int(word) for word in given.split(",")]
    except ValueError:
        out = [0]
    if min(out) < 1:
        raise ValueError(f"{option} is {given!r}; expected positive integers: 1,8.")
    return out


def mesh(spec: str | None) -> Any:
    return None if spec is None else jaxllm.make_mesh(**counts("--mesh", spec, MESH, int))


def counts(option: str, spec: str, names: Sequence[str], number: Callable[[str], Any]) -> dict[str, Any]:
    """'a=1,b=2' as a dict; ValueError for other names or values."""
    out = {}
    for item in spec.split(","):
        name, _, value = item.partition("=")
        try:
            if name not in names or name in out:
                raise ValueError
            out[name] = number(value)
        except ValueError:
            raise ValueError(
                f"{option} has {item!r}; expected NAME=NUMBER with NAME one of {', '.join(names)}, each once."
            ) from None
    return out


def one_of(option: str, given: str, names: Iterable[str]) -> list[str]:
    """one_of("--rules", "tensor,scatter", …) == ["tensor", "scatter"]; ValueError for what is not among the names."""
    names, words = list(names), given.split(",")
    if unknown := [word for word in words if word not in names]:
        raise ValueError(f"{option} has {unknown[0]!r}; expected some of {', '.join(names)}.")
    return words


def fraction_or_count(value: str) -> int | float:
    return float(value) if "." in value else int(value)


def print_report(result: Any, out: Path) -> None:
    """Table to stdout, plot and JSON to `out`."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(report.table(result))
    report.plot(result, out / "report.png")
    (out / "report.json").write_text(json.dumps(finite(dataclasses.asdict(result)), indent=2) + "\n")
    log(f"wrote {out / 'report.png'} and {out / 'report.json'}")
