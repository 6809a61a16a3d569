"""What was measured, in numbers, as a table and as a plot. Pure functions of the results."""

import math
import os
import platform
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table


class Case(NamedTuple):
    """kind: "decode", where prompt and answer have `length` tokens together, or "prefill", where the prompt has."""

    kind: str
    batch: int
    length: int

    @property
    def name(self) -> str:
        return f"{self.kind} {self.length}, batch {self.batch}"

    def tokens(self, new_tokens: int) -> int:
        """That the measured seconds are for."""
        return self.batch * (new_tokens - 1 if self.kind == "decode" else self.length)


def machine() -> str:
    """The processor, by its own name."""
    names = re.findall(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def spread(values: Sequence[float]) -> dict[str, Any]:
    """low and high: the extremes."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "values": list(values)}


def median(measured: Mapping[str, Any] | None) -> float | None:
    """None for what was not measured."""
    return (measured or {}).get("median")


def compare(engines: Mapping[str, Any], pick: Any, larger_is_better: bool = True) -> dict[str, Any]:
    """Ours beside the best peer, of each class and overall.

    engines: {name: {"class": …, "ours": whether it is, …}}. pick: what an engine measured, or None.
    ratio: above 1 where ours is better; None, as are names, where one of the two was not measured.
    """
    best = max if larger_is_better else min
    classes = list(dict.fromkeys(engine["class"] for engine in engines.values()))
    found = {}
    for kind in [*classes, "overall"]:
        sides = {}
        for ours in (True, False):
            values = {
                name: value
                for name, engine in engines.items()
                if engine["ours"] is ours
                and kind in (engine["class"], "overall")
                and (value := pick(engine)) is not None
            }
            name = best(values, key=values.__getitem__, default=None)
            sides["ours" if ours else "peer"] = {"name": name, "value": None if name is None else values[name]}
        ours, peer = sides["ours"]["value"], sides["peer"]["value"]
        if ours is None and peer is None:
            continue
        ratio = None if ours is None or peer is None else ours / peer if larger_is_better else peer / ours
        found[kind] = sides | {"ratio": ratio}
    return found


def ratios(engines: Mapping[str, Any], cases: Sequence[Case]) -> dict[str, Any]:
    """{what: {class: comparison}} of every case, of start-up and of memory."""
    found = {case.name: compare(engines, lambda e, name=case.name: median(e["cases"].get(name))) for case in cases}
    found["start-up"] = compare(engines, lambda e: median(e.get("start_s")), larger_is_better=False)
    found["memory"] = compare(engines, lambda e: e.get("peak_mb"), larger_is_better=False)
    return found


def same_start(tokens: Sequence[int], others: Sequence[int]) -> int:
    """How many agree before one differs."""
    pairs = zip(tokens, others, strict=True)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), len(tokens))


def bound_share(case: Mapping[str, Any] | None, step_bytes: int, batch: int, read_gb_s: float) -> float | None:
    """Time that reading a step's weights and cache would take at the measured rate, over the time it took."""
    tokens_per_s = median(case)
    return None if tokens_per_s is None else tokens_per_s / batch * step_bytes / (read_gb_s * 1e9)


def table(result: Mapping[str, Any], cases: Sequence[Case]) -> Table:
    read, others = median(result["read_gb_s"]), result["others_cores"]
    caption = (
        "Tokens/s of all rows, median (half the range in %); start-up to the first token. "
        f"Memory reads {_number(read, '.0f')} GB/s; other work took {_number(others, '.2f')} cores meanwhile."
    )
    made = Table(caption=caption, caption_justify="left")
    made.add_column("")
    for case in cases:
        made.add_column(f"{case.kind}\n{case.length}, b{case.batch}", justify="right")
    for column in ("start-up\ns", "memory\nMB", "of the\nbound", "same\ntokens"):
        made.add_column(column, justify="right")
    for name, engine in result["engines"].items():
        if engine["reason"]:
            made.add_row(name, engine["reason"])
            continue
        cells = [_cell(engine["cases"].get(case.name)) for case in cases]
        share, same = engine.get("bound_share"), engine.get("same_tokens")
        start, peak = median(engine.get("start_s")), engine.get("peak_mb")
        made.add_row(
            name,
            *cells,
            _number(start, ".2f"),
            _number(peak, ".0f"),
            _number(share, ".0%"),
            _number(same, "d"),
        )
    columns = [*(case.name for case in cases), "start-up", "memory"]
    for kind in dict.fromkeys(kind for found in result["ratios"].values() for kind in found):
        found = [result["ratios"][column].get(kind, {}).get("ratio") for column in columns]
        if any(found):
            made.add_row(f"ours / best peer, {kind}", *(_number(ratio, ".2f") for ratio in found), "", "", style="bold")
    return made


def _number(value: float | None, how: str) -> str:
    return "–" if value is None else format(value, how)


def _cell(measured: Mapping[str, Any] | None) -> str:
    value = median(measured)
    if value is None or measured is None:
        return "–"
    return f"{value:.0f} ({(measured['high'] - measured['low']) / value / 2:.0%})"


def plot(result: Mapping[str, Any], cases: Sequence[Case], path: Path) -> None:
    """Bars of every engine, a panel for each case; the lines are the extremes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(4, len(cases))
    rows = math.ceil(len(cases) / columns)
    names = [name for name, engine in result["engines"].items() if not engine["reason"]]
    figure, axes = plt.subplots(
        rows, columns, figsize=(4 * columns, (0.3 * len(names) + 0.9) * rows), sharey=True, squeeze=False
    )
    for axis, case in zip(axes.flat, cases, strict=False):
        for i, name in enumerate(names):
            measured = result["engines"][name]["cases"].get(case.name)
            if (value := median(measured)) is not None and measured is not None:
                error = [[value - measured["low"]], [measured["high"] - value]]
                axis.barh(i, value, xerr=error, color="C1" if result["engines"][name]["ours"] else "C0")
        axis.set_title(f"{case.name}, tokens/s", fontsize=9)
        axis.set_yticks(range(len(names)), names, fontsize=8)
    for axis in axes.flat[len(cases) :]:
        axis.axis("off")
    axes[0, 0].invert_yaxis()  # shared by all
    figure.suptitle(f"{result['machine']}, {result['threads']} threads", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
