"""The `jaxllm` command: calls the library, prints. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import jaxllm
from jaxllm import arguments, measure, params, report
from jaxllm.generate import choose_max_len, encode_prompts
from jaxllm.measure import Workload
from jaxllm.transforms.compact import kept_counts

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, 1 for an error that is told in one line, 130 for an interrupt."""
    parser = arguments.parser()
    args, extra = parser.parse_known_args(argv)
    if hasattr(args, "prompt") and not any(word.startswith("-") for word in extra):
        args.prompt += extra  # argparse gives up positionals after the first option that follows one
    elif extra:
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an interrupt does: what is half-written is removed
    try:
        result = COMMANDS[args.command](args)
        if args.json:
            print(json.dumps(_finite(result), allow_nan=False))
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        print("\njaxllm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at exit
        return 141
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if os.environ.get("JAXLLM_DEBUG"):
            raise
        print(f"jaxllm: error: {error or type(error).__name__}", file=sys.stderr)
        return 1


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity; a ruined model's perplexity is null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _log(message: str) -> None:
    print(f"jaxllm: {message}", file=sys.stderr, flush=True)


def _load(name: str, dtype: str | None = None) -> Any:
    start = time.perf_counter()
    lm = jaxllm.load(name, dtype, log=_log)
    _log(
        f"loaded {name}: {lm.num_params / 1e6:.1f} M parameters, {lm.weight_bytes / 1e6:.0f} MB, "
        f"{time.perf_counter() - start:.1f} s"
    )
    return lm


def _windows(args: argparse.Namespace, lm: Any) -> Any:
    text = jaxllm.evaluation_text() if args.text is None else _read(args.text)
    return jaxllm.token_windows(lm, text, args.window_tokens, args.windows)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}.") from error


def _check_out(path: Path) -> None:
    """Before the slow work, not after it."""
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OSError(f"{path} cannot be written: {parent} is not a directory that you may write to.")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(
            f"{path} exists already and is not an empty directory; choose another --out or remove it."
        )


def _mesh(spec: str | None) -> Any:
    return None if spec is None else jaxllm.make_mesh(**_counts("--mesh", spec, ("data", "model"), int))


def _counts(option: str, spec: str, names: Sequence[str], number: Callable[[str], Any]) -> dict[str, Any]:
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


def _fraction_or_count(value: str) -> int | float:
    return float(value) if "." in value else int(value)


def _quickstart(args: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()

    work = Workload(rounds=args.rounds, max_len=256)
    args.out.mkdir(parents=True, exist_ok=True)
    original = _load(args.model)
    windows = _windows(args, original)
    choose_max_len(original.cfg, work.max_len)
    prompt = _chat_prompt(original.tokenizer, [{"role": "user", "content": args.question}])
    _log("compacting: scoring FFN channels on the calibration text")
    compacted = jaxllm.compact(ffn=0.84)(original)
    int8 = jaxllm.quantize_int8()
    models = {"original": original, "compact": compacted, "int8": int8(original), "compact + int8": int8(compacted)}
    result, engines = report.compare_steps(models, windows, work, _log)
    _print_report(result, args.out)
    print(f"\nQuestion: {args.question}")
    answers = {}
    for name in ("original", "compact + int8"):
        answers[name] = engines[name].generate(prompt, max_new_tokens=96)[0].text.strip()
        print(f"{name}: {answers[name]}")
    seconds = time.perf_counter() - start
    _log(f"done in {seconds:.0f} s; next: jaxllm chat {args.model}, jaxllm optimize --help")
    return dataclasses.asdict(result) | {"question": args.question, "answers": answers, "seconds": round(seconds, 1)}


def _print_report(result: Any, out: Path) -> None:
    """Table to stdout, plot and JSON to `out`."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(report.table(result))
    report.plot(result, out / "report.png")
    (out / "report.json").write_text(json.dumps(_finite(dataclasses.asdict(result)), indent=2) + "\n")
    _log(f"wrote {out / 'report.png'} and {out / 'report.json'}")


def _optimize(args: argparse.Namespace) -> dict[str, Any]:
    _check_out(args.out)
    needs = {
        "prune": ("sparsity", "scope", "prune_match"),
        "compact": ("calibration",),
        "quantize": ("quantize_match",),
    }
    for option, others in needs.items():
        for other in others:
            if getattr(args, option) is None and getattr(args, other) is not None:
                raise ValueError(f"--{other.replace('_', '-')} goes with --{option}, which is not given.")
    if args.prune is not None and args.sparsity is None:
        raise ValueError("--prune needs --sparsity, the fraction of zeros.")
    if args.prune is None and args.compact is None and args.quantize is None:
        raise ValueError("Nothing to do; give --prune, --compact or --quantize.")
    matches = {"match": args.prune_match} if args.prune_match is not None else {}
    scope = {"scope": args.scope} if args.scope is not None else {}
    prune = None if args.prune is None else jaxllm.prune_magnitude(args.sparsity, **matches, **scope)
    kept = None
    if args.compact is not None:
        kept = _counts("--compact", args.compact, ("ffn", "kv_heads", "layers"), _fraction_or_count)
    work = None if args.no_report else Workload(rounds=args.rounds, batch=args.batch, max_len=args.max_len)

    lm = _load(args.model, args.dtype)
    windows = None
    if work is not None:
        windows = _windows(args, lm)
        choose_max_len(lm.cfg, work.max_len)
    for match in (args.prune_match, args.quantize_match):
        if match is not None:
            params.select(lm.info, match)
    steps: dict[str, Any] = {}
    if kept is not None:
        kept_counts(lm.cfg, **kept)
        calibration = None if args.calibration is None else jaxllm.token_windows(lm, _read(args.calibration))
        # Channels leave first: what is zeroed afterwards is chosen among those that stay.
        steps["compact"] = jaxllm.compact(**kept, calibration=calibration)
    if prune is not None:
        steps["prune"] = prune
    if args.quantize is not None:
        match = {} if args.quantize_match is None else {"match": args.quantize_match}
        steps["int8"] = jaxllm.quantize_int8(**match)
    models, name = {"original": lm}, ""
    for step, transform in steps.items():
        _log(f"applying {step}")
        name = f"{name} + {step}" if name else step
        lm = models[name] = transform(lm)
    jaxllm.save(lm, args.out)
    _log(f"saved {args.out}: {lm.num_params / 1e6:.1f} M parameters, {lm.weight_bytes / 1e6:.0f} MB")
    if "prune" in steps:
        _log("note: zeros in place change no dense program's speed; --compact does")
    out: dict[str, Any] = {"out": str(args.out), "ledger": [dataclasses.asdict(entry) for entry in lm.ledger]}
    if work is not None and windows is not None:
        result, _ = report.compare_steps(models, windows, work, _log)
        _print_report(result, args.out)
        out |= dataclasses.asdict(result)
    return out


def _chat_prompt(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    if tokenizer is None:
        raise ValueError("This model has no tokenizer, and so no chat template.")
    return tokenizer.encode_chat(messages)


def _model_for(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model and the mesh; arguments that cannot work are refused first."""
    jaxllm.Sampling(**{name: getattr(args, name) for name in SAMPLING})
    if args.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {args.max_new_tokens}; expected a positive integer.")
    if "" in args.stop:
        raise ValueError("--stop is empty; it would end every answer before it begins.")
    mesh = _mesh(args.mesh)
    return _load(args.model, args.dtype), mesh


def _compile(args: argparse.Namespace, lm: Any, mesh: Any, batch: int) -> Any:
    _log("compiling")
    return jaxllm.compile(lm, batch=batch, max_len=args.max_len, mesh=mesh)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in (*SAMPLING, "max_new_tokens", "stop")}


def _messages(args: argparse.Namespace) -> list[dict[str, str]]:
    return [] if args.system is None else [{"role": "system", "content": args.system}]


def _generate(args: argparse.Namespace) -> dict[str, Any]:
    if args.system is not None and not args.chat:
        raise ValueError("--system is part of a chat; add --chat.")
    texts = args.prompt or [sys.stdin.read().removesuffix("\n")]
    if "" in texts:
        raise ValueError("A prompt is empty; give some text to go on from.")
    lm, mesh = _model_for(args)
    prompts: list[Any] = list(texts)
    if args.chat:
        turns = [[*_messages(args), {"role": "user", "content": text}] for text in texts]
        prompts = [_chat_prompt(lm.tokenizer, messages) for messages in turns]
    prompts = encode_prompts(prompts, lm.cfg, lm.tokenizer, choose_max_len(lm.cfg, args.max_len))
    engine = _compile(args, lm, mesh, len(prompts))
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


def _chat(args: argparse.Namespace) -> dict[str, Any]:
    lm, mesh = _model_for(args)
    messages = _messages(args)
    _chat_prompt(lm.tokenizer, [*messages, {"role": "user", "content": "Hello"}])  # no template: told now
    engine = _compile(args, lm, mesh, 1)
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
            _log("the conversation outgrew --max-len; its oldest turn is forgotten")
        if len(prompt) >= engine.max_len:
            _log(f"that has {len(prompt)} tokens and --max-len is {engine.max_len}; say it shorter")
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


def _eval(args: argparse.Namespace) -> dict[str, Any]:
    lm = _load(args.model, args.dtype)
    reference = lm if args.reference is None else _load(args.reference, args.dtype)
    tokens = _windows(args, lm)
    quality = dataclasses.asdict(jaxllm.compare(lm, reference, tokens))
    print(f"perplexity {quality['perplexity']:.3f} on {tokens.shape[0]} windows of {tokens.shape[1]} tokens")
    if args.reference is None:
        quality |= {"kl": None, "top1": None}
        print("KL and top-1 agreement: not measured; name the original with --reference")
    else:
        print(f"KL {quality['kl']:.4f} nats, top-1 agreement {quality['top1']:.1%} with {args.reference}")
    return {"model": args.model, "reference": args.reference, "windows": list(tokens.shape)} | quality


def _bench(args: argparse.Namespace) -> dict[str, Any]:
    work = Workload(args.prompt_tokens, args.new_tokens, args.rounds, args.batch, args.max_len)
    mesh = _mesh(args.mesh)
    models = {name: _load(name, args.dtype) for name in dict.fromkeys(args.model)}
    for lm in models.values():
        choose_max_len(lm.cfg, args.max_len)
    engines = {}
    for name, lm in models.items():
        _log(f"compiling {name}")
        engines[name] = jaxllm.compile(lm, batch=args.batch, max_len=args.max_len, mesh=mesh)
    read_gb_s = measure.read_bandwidth()
    speeds = measure.measure(engines, work, read_gb_s, _log)
    for name, speed in speeds.items():
        print(
            f"{name}: TTFT {speed.ttft_ms:.0f} ms, {speed.step_ms:.2f} ms a step (±{speed.step_spread / 2:.0%}), "
            f"{speed.tokens_per_s:.1f} tokens/s, {speed.bandwidth_use:.0%} of {read_gb_s:.0f} GB/s"
        )
    rows = {name: dataclasses.asdict(speed) for name, speed in speeds.items()}
    return dataclasses.asdict(work) | {"read_gb_s": read_gb_s, "machine": report.machine(), "models": rows}


def _info(args: argparse.Namespace) -> dict[str, Any]:
    lm = _load(args.model, args.dtype)
    weights = report.weight_groups(lm)
    ledger = [dataclasses.asdict(entry) for entry in lm.ledger]
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(report.info_table(lm, weights))
    for entry in ledger:
        console.print(f"{entry['name']}: {json.dumps(entry['args'])}", markup=False, highlight=False)
    sizes = {"params": lm.num_params, "weight_bytes": lm.weight_bytes}
    return {"config": dataclasses.asdict(lm.cfg), "weights": weights, "ledger": ledger} | sizes


def _export(args: argparse.Namespace) -> dict[str, Any]:
    _check_out(args.out)
    lm = _load(args.model, args.dtype)
    jaxllm.export_hf(lm, args.out)
    _log(f"wrote {args.out}")
    return {"out": str(args.out)}


COMMANDS = {
    "quickstart": _quickstart,
    "optimize": _optimize,
    "generate": _generate,
    "chat": _chat,
    "eval": _eval,
    "bench": _bench,
    "info": _info,
    "export": _export,
}

if __name__ == "__main__":
    sys.exit(main())
