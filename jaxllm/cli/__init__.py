"""The `jaxllm` command: calls the library, prints. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import _thread
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

from jaxllm.cli import arguments, compress, distill, plan, run
from jaxllm.cli.common import finite, log, together

COMMANDS = {
    "quickstart": run.quickstart,
    "optimize": compress.optimize,
    "distill": distill.distill,
    "search": compress.search,
    "bisect": compress.bisect,
    "generate": run.generate,
    "chat": run.chat,
    "eval": run.evaluate,
    "bench": run.bench,
    "plan": plan.plan,
    "compile": plan.compile_for,
    "info": run.info,
    "export": run.export,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, 1 for an error that is told in one line, 130 for an interrupt."""
    parser = arguments.parser()
    args, extra = parser.parse_known_args(argv)
    if hasattr(args, "prompt") and not any(word.startswith("-") for word in extra):
        args.prompt += extra  # argparse gives up positionals after the first option that follows one
    elif extra:
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    _show_progress()
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _interrupt_again
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an interrupt does: what is half-written is removed
    try:
        with together(args):
            result = COMMANDS[args.command](args)
            if args.json:
                print(json.dumps(finite(result), allow_nan=False))
            sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        print("\njaxllm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at exit
        return 141
    except (ValueError, OSError, RuntimeError, MemoryError, FloatingPointError) as error:
        if os.environ.get("JAXLLM_DEBUG"):
            raise
        print(f"jaxllm: error: {error or type(error).__name__}", file=sys.stderr)
        return 1


def _interrupt_again(found: Any) -> None:
    """Repeats an interrupt that fell into a destructor or a callback of the garbage collector, which would lose it."""
    if issubclass(found.exc_type, KeyboardInterrupt):
        threading.Timer(0.05, _thread.interrupt_main).start()  # not from in here, where it would be lost too
    else:
        sys.__unraisablehook__(found)


class _Progress(logging.Handler):
    """What the library logs of its progress goes to stderr, whichever that is when it is logged."""

    def emit(self, record: logging.LogRecord) -> None:
        log(record.getMessage())


def _show_progress() -> None:
    logger = logging.getLogger("jaxllm")
    logger.handlers = [_Progress()]  # one, however often main is called in a process
    logger.setLevel(logging.INFO)
    logger.propagate = False
