"""The words of the `jaxllm` command: its options, their defaults and their help."""

from __future__ import annotations

import argparse
import importlib.metadata
from pathlib import Path
from typing import Any

QUESTION = "What is the capital of France?"


def parser() -> argparse.ArgumentParser:
    """Its result's `command` is the command's name."""
    out = argparse.ArgumentParser(
        prog="jaxllm",
        description="Make a language model smaller and faster, compile it for TPU, GPU or CPU, and run it.",
        epilog="MODEL is smollm2-135m, a directory, a .gguf file or a Hugging Face id. "
        "JAXLLM_DEBUG=1 shows the traceback of an error.",
    )
    out.add_argument("--version", action="version", version=f"jaxllm {importlib.metadata.version('jaxllm')}")
    commands = out.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(command=name)
        sub.add_argument("--json", action="store_true", help="print one JSON object on the last line of stdout")
        return sub

    def model(sub: argparse.ArgumentParser, nargs: Any = None) -> None:
        sub.add_argument("model", metavar="MODEL", nargs=nargs, help="name, directory, .gguf file or Hugging Face id")
        sub.add_argument("--dtype", choices=("float32", "bfloat16"), help="of float weights; default: as stored")

    def windows(sub: argparse.ArgumentParser, count: int) -> None:
        sub.add_argument("--text", type=Path, help="file to measure quality on; default: the one that is shipped")
        sub.add_argument("--windows", type=int, default=count, help="of the text, from its start (default %(default)s)")
        sub.add_argument("--window-tokens", type=int, default=512, help="tokens a window (default %(default)s)")

    def timing(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--batch", type=int, default=1, help="sequences that run together (default %(default)s)")
        sub.add_argument("--max-len", type=int, default=512, help="tokens a sequence can hold (default %(default)s)")
        sub.add_argument("--rounds", type=int, default=5, help="timed rounds (default %(default)s)")

    def generation(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--max-new-tokens", type=int, default=256, help="default %(default)s")
        sub.add_argument("--max-len", type=int, help="tokens of prompt and answer (default: at most 2048)")
        sub.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
        sub.add_argument("--top-k", type=int, default=0, help="0 keeps all tokens (default)")
        sub.add_argument("--top-p", type=float, default=1.0, help="default %(default)s")
        sub.add_argument("--min-p", type=float, default=0.0, help="default %(default)s")
        sub.add_argument("--repetition-penalty", type=float, default=1.0, help="default %(default)s")
        sub.add_argument("--seed", type=int, default=0, help="default %(default)s")
        sub.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the answer; repeatable")
        sub.add_argument("--system", help="system message, for a chat model")
        sub.add_argument("--mesh", metavar="data=1,model=4", help="devices to shard over (default: one)")

    sub = command("quickstart", "compact, quantise, compile and compare a small model, and ask it something")
    sub.add_argument("--model", default="smollm2-135m", metavar="MODEL", help="default %(default)s")
    sub.add_argument("--question", default=QUESTION, help="default: %(default)r")
    sub.add_argument("--out", type=Path, default=Path("quickstart"), help="for the plot and JSON (default %(default)s)")
    sub.add_argument("--rounds", type=int, default=3, help="timed rounds (default %(default)s)")
    windows(sub, 4)

    sub = command("optimize", "make a model smaller and save it, with what each step gained and cost")
    model(sub)
    sub.add_argument("--prune", choices=("magnitude",), help="zero the weights that matter least")
    sub.add_argument("--sparsity", type=float, help="fraction of zeros, with --prune")
    sub.add_argument("--scope", choices=("layer", "global"), help="of --sparsity: each matrix (default) or all")
    sub.add_argument("--prune-match", metavar="REGEX", help="weight paths to prune (default: those in layers)")
    sub.add_argument(
        "--compact", metavar="ffn=0.75,kv_heads=2,layers=24", help="what is kept: a fraction (with a point) or a count"
    )
    sub.add_argument(
        "--calibration", type=Path, help="text that decides what --compact keeps; default: the shipped one"
    )
    sub.add_argument("--quantize", choices=("int8",), help="weights as int8, one scale for each output channel")
    sub.add_argument("--quantize-match", metavar="REGEX", help="weight paths to quantise (default: all)")
    sub.add_argument("--out", type=Path, required=True, help="directory to write; must not exist or be empty")
    sub.add_argument("--no-report", action="store_true", help="do not measure speed and quality of each step")
    timing(sub)
    windows(sub, 6)

    sub = command("generate", "continue prompts, or answer them with --chat")
    model(sub)
    sub.add_argument("prompt", nargs="*", metavar="PROMPT", help="default: one prompt, from standard input")
    sub.add_argument("--chat", action="store_true", help="put each prompt into the model's chat template")
    generation(sub)

    sub = command("chat", "talk to a model; an empty line or end of input ends it")
    model(sub)
    generation(sub)

    sub = command("eval", "perplexity on a text, with KL divergence and top-1 agreement against a reference")
    model(sub)
    sub.add_argument("--reference", metavar="MODEL", help="what KL and agreement are against (default: MODEL itself)")
    windows(sub, 16)

    sub = command("bench", "time one or more models in interleaved rounds")
    model(sub, nargs="+")
    sub.add_argument("--prompt-tokens", type=int, default=64, help="default %(default)s")
    sub.add_argument("--new-tokens", type=int, default=64, help="default %(default)s")
    sub.add_argument("--mesh", metavar="data=1,model=4", help="devices to shard over (default: one)")
    timing(sub)

    sub = command("info", "what is in a checkpoint: shape, precision, ledger")
    model(sub)

    sub = command("export", "write a model as a Hugging Face directory")
    model(sub)
    sub.add_argument("--out", type=Path, required=True, help="directory to write; must not exist or be empty")
    return out
