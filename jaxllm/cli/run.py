"""Commands that run a model: quickstart, generate, chat, eval, bench; and info and export."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console

import jaxllm
from jaxllm import measure, report
from jaxllm.arrays import QArray
from jaxllm.bundle import is_bundle, load_bundle
from jaxllm.cli import common
from jaxllm.generate import choose_max_len, encode_prompts
from jaxllm.measure import Workload
from jaxllm.params import flatten

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def quickstart(args: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()

    work = Workload(rounds=args.rounds, max_len=256)
    args.out.mkdir(parents=True, exist_ok=True)
    original = common.load(args.model)
    windows = common.windows(args, original)
    choose_max_len(original.cfg, work.max_len)
    prompt = _chat_prompt(original.tokenizer, [{"role": "user", "content": args.question}])
    common.log("compacting: scoring FFN channels on the calibration text")
    few = jaxllm.token_windows(original, jaxllm.calibration_text(), count=8)  # of 32, for time's sake
    compacted = jaxllm.compact(ffn=0.84, calibration=few)(original)
    int8 = jaxllm.quantize("int8")
    models = {"original": original, "compact": compacted, "int8": int8(original), "compact + int8": int8(compacted)}
    result, engines = report.compare_steps(models, windows, work, common.log)
    common.print_report(result, args.out)
    print(f"\nQuestion: {args.question}")
    answers = {}
    for name in ("original", "compact + int8"):
        answers[name] = engines[name].generate(prompt, max_new_tokens=96)[0].text.strip()
        print(f"{name}: {answers[name]}")
    seconds = time.perf_counter() - start
    common.log(f"done in {seconds:.0f} s; next: jaxllm chat {args.model}, jaxllm optimize --help")
    return dataclasses.asdict(result) | {"question": args.question, "answers": answers, "seconds": round(seconds, 1)}


def _chat_prompt(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    if tokenizer is None:
        raise ValueError("This model has no tokenizer, and so no chat template.")
    return tokenizer.encode_chat(messages)


def _compiler(args: argparse.Namespace) -> tuple[Any, Callable[[int], Any]]:
    """The model, or the engine of a bundle, and what makes an engine for so many prompts of it.

    Arguments that cannot work are refused first.
    """
    jaxllm.Sampling(**{name: getattr(args, name) for name in SAMPLING})
    if args.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {args.max_new_tokens}; expected a positive integer.")
    if "" in args.stop:
        raise ValueError("--stop is empty; it would end every answer before it begins.")
    if is_bundle(args.model):
        if given := [name for name in ("mesh", "max_len", "dtype") if getattr(args, name) is not None]:
            raise ValueError(f"{args.model} is a bundle, compiled already; leave --{given[0].replace('_', '-')} out.")
        engine = load_bundle(args.model)
        return engine, lambda batch: engine
    mesh = common.mesh(args.mesh)
    lm = common.load(args.model, args.dtype, mesh)

    def compile(batch: int) -> Any:
        common.log("compiling")
        return jaxllm.compile(lm, batch=batch, max_len=args.max_len, mesh=mesh)

    return lm, compile


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in (*SAMPLING, "max_new_tokens", "stop")}


def _messages(args: argparse.Namespace) -> list[dict[str, str]]:
    return [] if args.system is None else [{"role": "system", "content": args.system}]


def generate(args: argparse.Namespace) -> dict[str, Any]:
    if args.system is not None and not args.chat:
        raise ValueError("--system is part of a chat; add --chat.")
    texts = args.prompt or [sys.stdin.read().removesuffix("\n")]
    if "" in texts:
        raise ValueError("A prompt is empty; give some text to go on from.")
    lm, compile = _compiler(args)
    prompts: list[Any] = list(texts)
    if args.chat:
        turns = [[*_messages(args), {"role": "user", "content": text}] for text in texts]
        prompts = [_chat_prompt(lm.tokenizer, messages) for messages in turns]
    max_len = lm.max_len if isinstance(lm, jaxllm.Engine) else choose_max_len(lm.cfg, args.max_len)
    prompts = encode_prompts(prompts, lm.cfg, lm.tokenizer, max_len)
    engine = compile(len(prompts))
    if len(prompts) == 1 and not args.json:
        for text in engine.stream(prompts[0], **_options(args)):
            print(text, end="", flush=True)
        print()
        return {}
    results = engine.generate(prompts, **_options(args))
    if not args.json:
        for text, result in zip(texts, results, strict=True):
            print(f"--- {text}\n{result.text}")
    return {"results": [{"prompt": t} | dataclasses.asdict(r) for t, r in zip(texts, results, strict=True)]}


def chat(args: argparse.Namespace) -> dict[str, Any]:
    lm, compile = _compiler(args)
    messages = _messages(args)
    _chat_prompt(lm.tokenizer, [*messages, {"role": "user", "content": "Hello"}])  # no template: told now
    engine = compile(1)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            text = ""
        if not text.strip():
            return {"messages": messages}
        messages.append({"role": "user", "content": text})
        answer, first = "", len(_messages(args))
        while len(prompt := _chat_prompt(engine.tokenizer, messages)) >= engine.max_len and len(messages) > first + 1:
            del messages[first : first + 2]  # the oldest question and its answer
            common.log("the conversation outgrew --max-len; its oldest turn is forgotten")
        if len(prompt) >= engine.max_len:
            common.log(f"that has {len(prompt)} tokens and --max-len is {engine.max_len}; say it shorter")
            messages.pop()
            continue
        try:
            for piece in engine.stream(prompt, **_options(args)):
                print(piece, end="", flush=True)
                answer += piece
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        print()
        messages.append({"role": "assistant", "content": answer.strip()})


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    if args.tasks is None and (
        args.chat_template or any(value is not None for value in (args.task_dir, args.limit, args.num_fewshot))
    ):
        raise ValueError("--task-dir, --limit, --num-fewshot and --chat-template go with --tasks, which is not given.")
    if args.tasks is not None and any(value is not None for value in (args.reference, args.text, args.stride)):
        raise ValueError("--tasks is instead of a text; leave --reference, --text and --stride out.")
    if args.tasks is not None and args.mesh is not None:
        raise ValueError("--tasks run on one device; leave --mesh out.")
    mesh = common.mesh(args.mesh)
    lm = common.load(args.model, args.dtype, mesh)
    reference = lm if args.reference is None else common.load(args.reference, args.dtype, mesh)
    if args.tasks is not None:
        return _tasks(args, lm)
    windows = common.sliding_windows(args, lm)
    quality = dataclasses.asdict(jaxllm.compare(lm, reference, windows))
    error = f" ±{quality['perplexity'] * quality['nll_se']:.2f}" if math.isfinite(quality["nll_se"]) else ""
    print(f"perplexity {quality['perplexity']:.3f}{error} ({windows.protocol})")
    if args.reference is None:
        quality |= {"kl": None, "top1": None}
        print("KL and top-1 agreement: not measured; name the original with --reference")
    else:
        print(f"KL {quality['kl']:.4f} nats, top-1 agreement {quality['top1']:.1%} with {args.reference}")
    seen = {"windows": list(windows.tokens_NT.shape), "protocol": windows.protocol}
    return {"model": args.model, "reference": args.reference} | seen | quality


def _tasks(args: argparse.Namespace, lm: Any) -> dict[str, Any]:
    try:
        from jaxllm.harness import evaluate_tasks  # an extra
    except ImportError as error:
        raise ValueError(str(error)) from error
    try:
        results = evaluate_tasks(
            lm,
            args.tasks.split(","),
            args.task_dir,
            args.limit,
            num_fewshot=args.num_fewshot,
            apply_chat_template=args.chat_template,
        )
    except (ValueError, OSError):
        raise
    except Exception as error:  # whatever the harness and its libraries raise
        raise ValueError(f"The tasks could not be evaluated: {type(error).__name__}: {error}") from error
    for task, metrics in results["results"].items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                print(f"{task} {metric}: {value:.4f}")
    return {"model": args.model, "tasks": results["results"]}


def bench(args: argparse.Namespace) -> dict[str, Any]:
    work = Workload(args.prompt_tokens, args.new_tokens, args.rounds, args.batch, args.max_len)
    mesh = common.mesh(args.mesh)
    models = {name: common.load(name, args.dtype, mesh) for name in dict.fromkeys(args.model)}
    for lm in models.values():
        choose_max_len(lm.cfg, args.max_len)
    engines = {}
    for name, lm in models.items():
        common.log(f"compiling {name}")
        engines[name] = jaxllm.compile(lm, batch=args.batch, max_len=args.max_len, mesh=mesh)
    read_gb_s = measure.read_bandwidth()
    speeds = measure.measure(engines, work, read_gb_s, common.log)
    for name, speed in speeds.items():
        print(
            f"{name}: TTFT {speed.ttft_ms:.0f} ms, {speed.step_ms:.2f} ms a step (±{speed.step_spread / 2:.0%}), "
            f"{speed.tokens_per_s:.1f} tokens/s, {speed.bandwidth_use:.0%} of {read_gb_s:.0f} GB/s"
        )
    rows = {name: dataclasses.asdict(speed) for name, speed in speeds.items()}
    return dataclasses.asdict(work) | {"read_gb_s": read_gb_s, "machine": report.machine(), "models": rows}


def info(args: argparse.Namespace) -> dict[str, Any]:
    lm = common.load(args.model, args.dtype)
    weights = report.weight_groups(lm)
    ledger = [dataclasses.asdict(entry) for entry in lm.ledger]
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(report.info_table(lm, weights))
    for entry in ledger:
        console.print(f"{entry['name']}: {json.dumps(entry['args'])}", markup=False, highlight=False)
    sizes = {"params": lm.num_params, "weight_bytes": lm.weight_bytes}
    return {"config": dataclasses.asdict(lm.cfg), "weights": weights, "ledger": ledger} | sizes


def export(args: argparse.Namespace) -> dict[str, Any]:
    common.check_out(args.out)
    lm = common.load(args.model, args.dtype)
    if args.format == "hf":
        if lm.cfg.kv_dtype or any(
            isinstance(leaf, QArray) and leaf.int8_inputs for leaf in flatten(lm.params).values()
        ):
            common.log("note: rounding of activations and of the KV cache has no place in this format and is left out")
        jaxllm.export_hf(lm, args.out)
    else:
        jaxllm.export_compressed(lm, args.out, log=common.log)
    common.log(f"wrote {args.out}")
    return {"out": str(args.out)}
