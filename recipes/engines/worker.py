"""The process that an engine runs in: one JSON command a line comes in, one JSON answer a line goes out.

A process each, so that thread pools do not share one, memory can be told apart, and one that dies takes no other along.
Run: python -m engines.worker MODULE VARIANT FOLDER THREADS
"""

import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any, Protocol

Prompts = list[list[int]]  # [B][T], all of one length


class Engine(Protocol):
    """What a module of this folder has under this name. Nothing is loaded before `open`.

    Decoding is greedy, never ends early, and its time goes from the first new token of every row to the last.
    """

    def __init__(self, folder: Path, variant: str, threads: int): ...

    def prepare(self, source: Path) -> None:
        """Converts a Hugging Face directory in float32 to what the engine reads, into the empty `folder`."""
        ...

    def open(self, batch: int, max_len: int) -> dict[str, Any]:
        """Makes ready for that many prompts of which each has, with its answer, max_len tokens. Returns what is known.

        step_bytes: weights and cache that a decode step has to read.
        """
        ...

    def prefill(self, prompts: Prompts) -> float:
        """Seconds from the prompts to the first new token of each."""
        ...

    def decode(self, prompts: Prompts, new_tokens: int) -> tuple[float, list[int]]:
        """Seconds for all new tokens but the first of each row, and the new tokens of the first row."""
        ...


def peak_mb() -> float:
    """Most memory that the process ever had resident, in MB (1e6 bytes)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


def main() -> None:
    module, variant, folder, threads = sys.argv[1:]
    # Of the cores as well as of the engine's own setting: XLA has no other, and no pool can be larger than it says.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(threads)])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print is no answer
    engine: Engine = importlib.import_module(module).Engine(Path(folder), variant, int(threads))
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = {"answer": getattr(engine, command.pop("do"))(**command)}
        except Exception as error:  # whatever it is, the other cases may work
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        print(json.dumps(answer | {"peak_mb": peak_mb()}), file=answers, flush=True)


if __name__ == "__main__":
    main()
