"""Tables, plots and the JSON line: what each step gained and what it cost."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Table

from jaxllm import evaluate, generate
from jaxllm.arrays import QArray
from jaxllm.lm import LM
from jaxllm.measure import Workload, measure, read_bandwidth
from jaxllm.params import flatten


@dataclasses.dataclass(frozen=True)
class Row:
    """One model beside the original. Fields as in `measure.Speed` and `evaluate.Quality`.

    pruning_rate: α, the fraction of the original's parameters that are gone or zero.
    speedup: β, the original's step_ms over this one's.
    """

    name: str
    params: int
    pruning_rate: float
    weight_bytes: int
    ttft_ms: float
    step_ms: float
    step_spread: float
    tokens_per_s: float
    speedup: float
    bandwidth_use: float
    perplexity: float
    kl: float
    top1: float
    nll_se: float


@dataclasses.dataclass(frozen=True)
class Report:
    """Rows, the original first, with what is needed to read them."""

    rows: tuple[Row, ...]
    source: str  # where the original's weights came from
    machine: str
    read_gb_s: float
    batch: int
    protocol: str  # of perplexity, KL and top-1 agreement: `evaluate.Windows`


def compare_steps(
    models: Mapping[str, LM],
    windows: Any,
    work: Workload,
    log: Callable[[str], None] = lambda _: None,
) -> tuple[Report, dict[str, generate.Engine]]:
    """Compiles, times and evaluates models made from one another; the first is the original.

    windows: what quality is measured on, as for `evaluate.compare`. Returns the engines as well, ready to generate.
    """
    first = next(iter(models))
    original = models[first]
    windows = evaluate.as_windows(original, windows)
    engines = {}
    for name, lm in models.items():
        log(f"compiling {name}")
        engines[name] = generate.compile(lm, batch=work.batch, max_len=work.max_len)
    log("measuring memory bandwidth")
    read_gb_s = read_bandwidth()
    speeds = measure(engines, work, read_gb_s, log)
    log(f"evaluating: {windows.protocol}")
    rows = []
    qualities = evaluate.compare_all(list(models.values()), original, windows)
    for (name, lm), quality in zip(models.items(), qualities, strict=True):
        row = Row(
            name=name,
            params=lm.num_params,
            pruning_rate=1 - _remaining(lm) / original.num_params,
            weight_bytes=lm.weight_bytes,
            speedup=speeds[first].step_ms / speeds[name].step_ms,
            **dataclasses.asdict(speeds[name]),
            **dataclasses.asdict(quality),
        )
        rows.append(row)
    origin = original.ledger[0].args.get("origin", original.ledger[0].name) if original.ledger else "unknown"
    return Report(tuple(rows), str(origin), machine(), read_gb_s, work.batch, windows.protocol), engines


def _remaining(lm: LM) -> int:
    """Parameters less the zeros that pruning made; zeros of an unpruned model, int8's included, are no pruning."""
    if not any(entry.name.startswith("prune") for entry in lm.ledger):
        return lm.num_params
    leaves = [leaf.values if isinstance(leaf, QArray) else leaf for leaf in flatten(lm.params).values()]
    return sum(int(jnp.count_nonzero(leaf)) for leaf in leaves)


def machine() -> str:
    """The devices and versions that figures were measured with."""
    device = jax.devices()[0]
    kind = device.device_kind if device.platform != "cpu" else f"CPU, {os.cpu_count()} cores, {platform.machine()}"
    return f"{len(jax.devices())} x {kind}, jax {jax.__version__}, Python {platform.python_version()}"


def table(report: Report) -> Table:
    """The report for a terminal."""
    caption = (
        f"Weights: {report.source}. Machine: {report.machine}, reads {report.read_gb_s:.0f} GB/s. "
        f"Batch {report.batch}; medians. α: fraction of parameters gone or zero; β: speed against the first row; "
        f"MBU: share of the read bandwidth. Perplexity, KL and top-1 agreement with the first row: "
        f"{report.protocol}."
    )
    out = Table(caption=caption, caption_justify="left")
    names = (
        "model",
        "params",
        "α",
        "weights",
        "TTFT ms",
        "ms/step",
        "±",
        "tokens/s",
        "β",
        "MBU",
        "ppl",
        "KL",
        "top-1",
    )
    for name in names:
        out.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    for row in report.rows:
        out.add_row(*_cells(row))
    return out


def _cells(row: Row) -> Sequence[str]:
    return (
        row.name,
        f"{row.params / 1e6:.1f} M",
        f"{row.pruning_rate:.1%}",
        f"{row.weight_bytes / 1e6:.0f} MB",
        f"{row.ttft_ms:.0f}",
        f"{row.step_ms:.2f}",
        f"{row.step_spread / 2:.0%}",
        f"{row.tokens_per_s:.1f}",
        f"{row.speedup:.2f}x",
        f"{row.bandwidth_use:.0%}",
        f"{row.perplexity:.2f}",
        f"{row.kl:.3f}",
        f"{row.top1:.1%}",
    )


def plot(report: Report, path: Path) -> None:
    """Writes a PNG: tokens per second against perplexity, one point a model."""
    # The object interface, not pyplot: no global state and no window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for row in report.rows:
        axes.scatter(row.tokens_per_s, row.perplexity, s=row.weight_bytes / 2e6 + 10, alpha=0.7)
        axes.annotate(
            f"{row.name}\n{row.weight_bytes / 1e6:.0f} MB",
            (row.tokens_per_s, row.perplexity),
            textcoords="offset points",
            xytext=(0, 12),
            ha="center",
            fontsize=9,
        )
    axes.set_xlabel(f"tokens per second, batch {report.batch}")
    axes.set_ylabel("perplexity")
    axes.set_title("Speed against perplexity; area is the size of the weights")
    axes.margins(0.25)
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def weight_groups(lm: LM) -> list[dict[str, Any]]:
    """The weights by kind, layers together: path with layer numbers as N, shape, precision, count, bytes, sparsity."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path, leaf in flatten(lm.params).items():
        values = leaf.values if isinstance(leaf, QArray) else leaf
        key = re.sub(r"\d+", "N", path), values.shape, str(values.dtype)
        empty = {"path": key[0], "shape": list(values.shape), "dtype": key[2], "count": 0, "bytes": 0, "zeros": 0}
        group = groups.setdefault(key, empty)
        group["count"] += 1
        group["bytes"] += leaf.nbytes
        group["zeros"] += values.size - int(jnp.count_nonzero(values))
    return list(groups.values())


def info_table(lm: LM, groups: Sequence[dict[str, Any]]) -> Table:
    """What the model is made of, for a terminal; groups: from `weight_groups`."""
    cfg = lm.cfg
    title = (
        f"{cfg.num_layers} layers, embed {cfg.embed_dim}, FFN {cfg.ffw_dim}, {cfg.num_heads} heads and "
        f"{cfg.num_kv_heads} KV heads of {cfg.head_dim}, vocabulary {cfg.vocab_size}, context {cfg.max_len}, "
        f"{cfg.dtype}"
    )
    out = Table(title=title, caption=f"{lm.num_params / 1e6:.1f} M parameters, {lm.weight_bytes / 1e6:.1f} MB")
    for name in ("weight", "shape", "precision", "count", "MB", "zeros"):
        out.add_column(name, justify="left" if name == "weight" else "right", no_wrap=True)
    for group in groups:
        size = group["count"] * math.prod(group["shape"])
        shape = " x ".join(map(str, group["shape"]))
        cells = (group["path"], shape, group["dtype"], str(group["count"]), f"{group['bytes'] / 1e6:.2f}")
        out.add_row(*cells, f"{group['zeros'] / size:.1%}")
    return out
