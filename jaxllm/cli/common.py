"""What the commands share: loading, texts, checks before slow work, printing."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import jaxllm
from jaxllm import hosts, report
from jaxllm.bundle import is_bundle
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


@contextlib.contextmanager
def together(args: argparse.Namespace) -> Iterator[None]:
    """Runs a block with the processes on other hosts, if --hosts is given: all compute, the first alone prints."""
    if (spec := getattr(args, "hosts", None)) is None:
        yield
        return
    if args.command == "chat":
        raise ValueError("chat is for one host, where someone types; use generate --chat with --hosts.")
    if args.mesh is None and not is_bundle(args.model):
        raise ValueError("--hosts needs --mesh, which says how the devices of all of them are used.")
    if args.join_timeout < 1:
        raise ValueError(f"--join-timeout is {args.join_timeout}; expected a positive number of seconds.")
    if args.command == "generate" and not args.prompt:
        raise ValueError("With --hosts, give prompts as arguments: standard input is another on each host.")
    if getattr(args, "tasks", None) is not None:
        raise ValueError("--tasks run on one host; leave --hosts out.")
    with hosts.join(place(spec), timeout_s=args.join_timeout) as group, _first_prints(group.index):
        yield


def place(spec: str) -> hosts.Place | None:
    """place("10.0.0.1:1234,4,0"); None for "auto"."""
    if spec == "auto":
        return None
    try:
        coordinator, count, index = spec.split(",")
        return hosts.Place(coordinator, int(count), int(index))
    except ValueError:
        raise ValueError(
            f"--hosts is {spec!r}; expected auto, or ADDRESS:PORT,COUNT,INDEX with the address of process 0 and an "
            "index from 0 to COUNT - 1."
        ) from None


@contextlib.contextmanager
def _first_prints(index: int) -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, os.fdopen(os.dup(1), "w") as real:
        os.dup2(nowhere.fileno(), 1)  # to which Gloo writes
        out, errors = (nowhere, nowhere) if index else (real, sys.stderr)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            yield


def load(name: str, dtype: str | None = None, mesh: Any = None) -> Any:
    start = time.perf_counter()
    lm = jaxllm.load(name, dtype, mesh=mesh, log=log)
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
