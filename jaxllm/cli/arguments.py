"""The words of the `jaxllm` command: its options, their defaults and their help."""

from __future__ import annotations

import argparse
import importlib.metadata
import math
from pathlib import Path
from typing import Any, get_args

from jaxllm import formats
from jaxllm.hosts import JOIN_S
from jaxllm.losses import DIVERGENCES
from jaxllm.search import Unit
from jaxllm.transforms.quantize import Clip, Method

TEXT = "a text file, a directory or JSON lines"
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

    def model(sub: argparse.ArgumentParser, nargs: Any = None, also: str = "") -> None:
        where = f"name, directory, .gguf file or Hugging Face id{also}"
        sub.add_argument("model", metavar="MODEL", nargs=nargs, help=where)
        sub.add_argument("--dtype", choices=("float32", "bfloat16"), help="of float weights; default: as stored")

    def windows(sub: argparse.ArgumentParser, count: int) -> None:
        sub.add_argument("--text", type=Path, help=f"to measure quality on, {TEXT}; default: the one that is shipped")
        sub.add_argument("--windows", type=int, default=count, help="of the text, from its start (default %(default)s)")
        sub.add_argument("--window-tokens", type=int, default=512, help="tokens a window (default %(default)s)")

    def calibration(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--calibration", type=Path, help=f"what decides, {TEXT}; default: the shipped text")
        sub.add_argument("--calibration-windows", type=int, help="of it, at most (default: 32)")
        sub.add_argument("--calibration-tokens", type=int, help="tokens a window (default: 512)")

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
        mesh(sub)

    def mesh(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--mesh", metavar="data=1,model=4,share=1,stages=1", help="devices to shard over (default: one)"
        )
        sub.add_argument(
            "--hosts",
            metavar="auto|ADDRESS:PORT,COUNT,INDEX",
            help="join the processes that run this command on other hosts, for a --mesh over the devices of all; auto: "
            "on Cloud TPU slices, Slurm, MPI; else where process 0 is, how many there are, and which this is, from 0",
        )
        sub.add_argument(
            "--join-timeout", type=int, default=JOIN_S, help="seconds to wait for the other hosts (default %(default)s)"
        )

    sub = command("quickstart", "compact, quantise, compile and compare a small model, and ask it something")
    sub.add_argument("--model", default="smollm2-135m", metavar="MODEL", help="default %(default)s")
    sub.add_argument("--question", default=QUESTION, help="default: %(default)r")
    sub.add_argument("--out", type=Path, default=Path("quickstart"), help="for the plot and JSON (default %(default)s)")
    sub.add_argument("--rounds", type=int, default=3, help="timed rounds (default %(default)s)")
    windows(sub, 4)

    sub = command("optimize", "make a model smaller and save it, with what each step gained and cost")
    model(sub)
    sub.add_argument(
        "--compact",
        metavar="ffn=0.75,kv_heads=2,layers=24",
        help="what is kept, smaller shapes: a fraction (with a point) or a count",
    )
    sub.add_argument("--no-correct", action="store_true", help="do not fit weights anew to what --compact keeps")
    sub.add_argument("--prune", choices=("magnitude", "wanda", "sparsegpt"), help="zero the weights that matter least")
    sub.add_argument("--sparsity", type=float, help="fraction of zeros, with --prune")
    sub.add_argument("--pattern", metavar="unstructured|2:4|4:8|16x16", help="of the zeros (default: unstructured)")
    sub.add_argument(
        "--scope",
        choices=("layer", "global", "sensitivity"),
        help="of --sparsity: each matrix (default) or all together",
    )
    sub.add_argument("--prune-match", metavar="REGEX", help="weight paths to prune (default: those in layers)")
    sub.add_argument("--quantize", metavar="FORMAT", help=f"of weights: {formats.NAMES}")
    sub.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="REGEX=FORMAT",
        help="another format, or float, for weight paths; repeatable, the first that matches holds",
    )
    sub.add_argument("--method", choices=get_args(Method), help="of rounding (default: rtn, to nearest)")
    sub.add_argument("--clip", choices=get_args(Clip), help="the range that is kept (default: absmax)")
    sub.add_argument("--alpha", type=float, help="of smoothquant, 0 to 1 (default: 0.5)")
    sub.add_argument("--kv", choices=("int8",), help="keys and values of the cache")
    sub.add_argument(
        "--recipe", type=Path, metavar="FILE", help="a saved model or ledger to do again, or a .py file, which is run"
    )
    calibration(sub)
    sub.add_argument("--out", type=Path, required=True, help="directory to write; must not exist or be empty")
    sub.add_argument(
        "--stream",
        action="store_true",
        help="a layer at a time, for models larger than memory; run it again to go on; no report",
    )
    sub.add_argument("--dry-run", action="store_true", help="check names, shapes and disk space, and write nothing")
    sub.add_argument("--no-report", action="store_true", help="do not measure speed and quality of each step")
    timing(sub)
    windows(sub, 6)

    sub = command("distill", "train a model to predict what a larger or an uncompressed one does")
    sub.add_argument("--teacher", required=True, metavar="MODEL", help="name, directory, .gguf file or Hugging Face id")
    sub.add_argument("--student", required=True, metavar="MODEL", help="what is trained, in the same places")
    sub.add_argument("--text", type=Path, required=True, help=f"to train on, {TEXT}")
    sub.add_argument("--heldout", type=Path, help="to measure on, likewise (default: the last twentieth of --text)")
    sub.add_argument("--steps", type=int, required=True, help="of the optimiser")
    sub.add_argument(
        "--out", type=Path, required=True, help="directory of the trained model; OUT.run has the checkpoints"
    )
    sub.add_argument("--resume", action="store_true", help="go on with the run in OUT.run, from its latest checkpoint")
    sub.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="to load, compute and save in; masters are float32"
    )
    sub.add_argument("--tokens", type=int, default=256, help="of a window (default %(default)s)")
    sub.add_argument("--batch", type=int, default=8, help="windows a step (default %(default)s)")
    sub.add_argument("--accumulate", type=int, default=1, help="parts of the batch, one after the other (default 1)")
    sub.add_argument("--learning-rate", type=float, default=2e-4, help="the highest (default %(default)s)")
    sub.add_argument("--weight-decay", type=float, default=0.0, help="default %(default)s")
    sub.add_argument("--seed", type=int, default=0, help="default %(default)s")
    sub.add_argument(
        "--rank", type=int, default=0, help="train low-rank changes of the layers' matrices (default: all)"
    )
    sub.add_argument("--remat", action="store_true", help="compute activations again instead of keeping them")
    sub.add_argument("--divergence", choices=tuple(DIVERGENCES), default="forward_kl", help="default %(default)s")
    sub.add_argument("--temperature", type=float, default=1.0, help="of both models' predictions (default %(default)s)")
    sub.add_argument("--beta", type=float, default=0.5, help="of jensen_shannon (default %(default)s)")
    sub.add_argument("--ce", type=float, default=0.0, help="share of the text's own next token (default %(default)s)")
    sub.add_argument("--hidden", type=float, default=0.0, help="weight of matching residual streams (default 0)")
    sub.add_argument("--attention", type=float, default=0.0, help="weight of matching attention relations (default 0)")
    sub.add_argument(
        "--layer-map", metavar="0=1,1=3", help="student's layer = teacher's, for the two (default: by depth)"
    )
    sub.add_argument("--quantize", metavar="FORMAT", help=f"the student sees its weights so: {formats.NAMES}")
    sub.add_argument("--sparsity", type=float, help="prune to this fraction of zeros in the first half of the steps")
    sub.add_argument(
        "--on-policy", type=float, default=0.0, help="share of steps on the student's own text (default 0)"
    )
    sub.add_argument("--top-k", type=int, help="keep the teacher's K likeliest tokens on disk, in OUT.run, first")
    sub.add_argument("--save-every", type=int, help="steps between checkpoints (default: a tenth)")
    sub.add_argument("--keep", type=int, default=1, help="best checkpoints that stay (default %(default)s)")
    sub.add_argument("--mesh", metavar="data=4,model=2", help="devices to train on (default: one)")

    sub = command("search", "find the mix of precisions, channels, heads and layers that loses least within a budget")
    model(sub)
    sub.add_argument("--budget", type=float, required=True, help="fraction of the original's, or an amount above 1")
    sub.add_argument("--unit", choices=get_args(Unit), default="bytes", help="of the budget (default %(default)s)")
    sub.add_argument("--max-kl", type=float, default=math.inf, help="the most that the result may lose, in nats")
    sub.add_argument(
        "--formats", default="float,int8,int4-g32", help="that a layer's weights may have (default %(default)s)"
    )
    sub.add_argument("--ffn", default="1.0", help="fractions of a layer's channels that may stay: 1.0,0.75,0.5")
    sub.add_argument("--kv-heads", default="", help="counts of a layer's KV heads that may stay: 2,1")
    sub.add_argument("--drop-layers", action="store_true", help="whole layers may go")
    sub.add_argument("--method", choices=get_args(Method), default="rtn", help="of rounding (default %(default)s)")
    sub.add_argument("--clip", choices=get_args(Clip), default="mse", help="the range kept (default %(default)s)")
    sub.add_argument(
        "--sensitivity-windows",
        type=int,
        default=1,
        help="of the calibration text, for a layer (default %(default)s)",
    )
    calibration(sub)
    sub.add_argument("--out", type=Path, required=True, metavar="RECIPE.py", help="recipe to write; a plot beside it")
    windows(sub, 6)

    sub = command("bisect", "name the transform and the layer that broke a model")
    model(sub)
    sub.add_argument("--reference", metavar="MODEL", required=True, help="the original that it was made from")
    sub.add_argument(
        "--calibration", type=Path, help=f"the text that it was calibrated on, {TEXT}; default: the shipped"
    )
    windows(sub, 1)

    sub = command("generate", "continue prompts, or answer them with --chat")
    model(sub, also="; or a bundle, whose batch and lengths are its own")
    sub.add_argument("prompt", nargs="*", metavar="PROMPT", help="default: one prompt, from standard input")
    sub.add_argument("--chat", action="store_true", help="put each prompt into the model's chat template")
    generation(sub)

    sub = command("chat", "talk to a model; an empty line or end of input ends it")
    model(sub, also="; or a bundle, whose batch and lengths are its own")
    generation(sub)

    sub = command("eval", "perplexity on a text, with KL divergence and top-1 agreement against a reference")
    model(sub)
    sub.add_argument("--reference", metavar="MODEL", help="what KL and agreement are against (default: MODEL itself)")
    windows(sub, 16)
    mesh(sub)
    sub.add_argument("--stride", type=int, help="tokens that windows move on by (default: they do not overlap)")
    sub.add_argument("--tasks", help="lm-eval tasks, by name or .yaml file, separated by commas, instead of a text")
    sub.add_argument("--task-dir", type=Path, help="directory with the tasks that --tasks names")
    sub.add_argument("--limit", type=int, help="examples of each task (default: all)")
    sub.add_argument("--num-fewshot", type=int, help="of tasks that do not say it")
    sub.add_argument("--chat-template", action="store_true", help="put each task's question into the chat template")

    sub = command("bench", "time one or more models in interleaved rounds")
    model(sub, nargs="+")
    sub.add_argument("--prompt-tokens", type=int, default=64, help="default %(default)s")
    sub.add_argument("--new-tokens", type=int, default=64, help="default %(default)s")
    mesh(sub)
    timing(sub)

    sub = command("plan", "predict a model on TPU slices, by compiling it for them: no TPU is needed")
    sub.add_argument("model", metavar="MODEL", help="a config.json, or name, directory, .gguf file, Hugging Face id")
    sub.add_argument("--target", required=True, help="slices, or chips for all of theirs: v5e,v6e:2x4,2xv5e:4x4")
    sub.add_argument("--max-chips", type=int, default=16, help="of a chip's slices (default %(default)s)")
    sub.add_argument(
        "--quantize", default="int8", metavar="FORMATS", help="of weights: int8,int4-g32,float (default int8)"
    )
    sub.add_argument("--kv", choices=("int8",), help="keys and values of the cache")
    sub.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the rest (default %(default)s)"
    )
    sub.add_argument("--batch", default="1,8,32", help="sequences that run together (default %(default)s)")
    sub.add_argument("--context", default="2048", help="tokens of prompt and answer (default %(default)s)")
    sub.add_argument("--prompt-tokens", type=int, default=512, help="for the time to first token (default %(default)s)")
    sub.add_argument("--price", type=float, help="dollars for a chip and hour, for the cost of a million tokens")
    sub.add_argument(
        "--rules",
        default="tensor",
        metavar="TABLES",
        help="how layers are split: tensor (sums over chips), scatter (prefill's are scattered and gathered), sequence "
        "(caches of chips that share KV heads, by slots), fully (weights over the batch's chips) (default %(default)s)",
    )
    sub.add_argument(
        "--stages",
        metavar="COUNTS",
        help="runs that the layers are split in, each on its part of the target: 1,2 (default: one for each slice)",
    )
    sub.add_argument("--all-meshes", action="store_true", help="not only the one that splits a copy of the model most")
    sub.add_argument("--exact", action="store_true", help="compile every layer, not a few from which the rest follows")
    sub.add_argument("--plot", type=Path, metavar="FILE.png", help="draw speed against latency")

    sub = command("compile", "compile a model's programs for a machine that need not be here; check or ship them")
    sub.add_argument("model", metavar="MODEL", help="a config.json, or name, directory, .gguf file, Hugging Face id")
    sub.add_argument("--target", required=True, help="a slice, v5e:2x4, or several; or cpu or gpu, of this machine")
    sub.add_argument(
        "--out", type=Path, help="write a bundle: weights, programs, tokenizer; run it again to go on where it ended"
    )
    sub.add_argument("--mesh", metavar="data=1,model=4,share=1", help="default: the one that splits a copy most")
    sub.add_argument("--rules", default="tensor", metavar="TABLE", help="as for plan (default %(default)s)")
    sub.add_argument("--stages", type=int, help="as for plan; the mesh is then of each (default: one for each slice)")
    sub.add_argument("--quantize", metavar="FORMAT", help=f"of weights: {formats.NAMES} (default: as they are)")
    sub.add_argument("--kv", choices=("int8",), help="keys and values of the cache")
    sub.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the rest (default: the checkpoint's)")
    sub.add_argument("--batch", type=int, default=8, help="sequences that run together (default %(default)s)")
    sub.add_argument("--context", type=int, help="tokens of prompt and answer (default: at most 2048)")
    sub.add_argument("--check", action="store_true", help="fail where a program does not fit or breaks its contract")

    sub = command("info", "what is in a checkpoint: shape, precision, ledger")
    model(sub)

    sub = command("export", "write a model as a Hugging Face directory")
    model(sub)
    sub.add_argument(
        "--format",
        choices=("hf", "compressed-tensors"),
        default="hf",
        help="hf: dequantised, for transformers (default); compressed-tensors: as quantised, for vLLM",
    )
    sub.add_argument("--out", type=Path, required=True, help="directory to write; must not exist or be empty")
    return out
