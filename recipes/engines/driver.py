"""The other end of `worker`: starts engines, gives them turns, and takes what they say or why they do not."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).parents[1]


def cpu_s(pid: int | None = None) -> float:
    """CPU time that the machine has spent on anything so far, or on one process."""
    if pid is None:
        user, nice, system, _, _, *more = map(int, Path("/proc/stat").read_text().split()[1:9])
        used = user + nice + system + sum(more)
    else:
        used = sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return used / os.sysconf("SC_CLK_TCK")


class WorkerError(RuntimeError):
    """An engine could not do what it was asked; the text says why. `dead`: nor anything else from now on."""

    def __init__(self, reason: str, dead: bool):
        super().__init__(reason)
        self.dead = dead


class Worker:
    """An engine's process. Between its calls it is stopped, so that threads that spin cost the others nothing.

    platform: jax's.
    """

    def __init__(self, module: str, variant: str, folder: Path, threads: int, log: Path, platform: str = "cpu"):
        self.log, self.peak_mb = log, 0.0
        paths = os.pathsep.join([str(RECIPES), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
        settings = {"OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": platform, "HF_HUB_OFFLINE": "1"}
        env = os.environ | settings | {"PYTHONPATH": paths}
        argv = [sys.executable, "-m", "engines.worker", module, variant, str(folder), str(threads)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with open(log, "w") as errors:
            self.process = subprocess.Popen(argv, env=env, stderr=errors, start_new_session=True, **pipes)

    def call(self, do: str, limit_s: float, **arguments: Any) -> Any:
        """The answer. Raises WorkerError when there is none within the limit, after which the process is gone."""
        late = threading.Event()

        def kill() -> None:
            late.set()
            self.process.kill()

        timer = threading.Timer(limit_s, kill)
        assert self.process.stdin
        assert self.process.stdout
        timer.start()
        try:
            self.process.send_signal(signal.SIGCONT)
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            code = self.process.wait()
            told = self.log.read_text(errors="replace").strip().splitlines()
            why = (
                f"took more than {limit_s:.0f} s" if late.is_set() else f"ended with code {code}: {' '.join(told[-1:])}"
            )
            raise WorkerError(f"{do}: {why}", dead=True)
        self.process.send_signal(signal.SIGSTOP)
        answer = json.loads(line)
        self.peak_mb = answer["peak_mb"]
        if "error" in answer:
            raise WorkerError(f"{do}: {answer['error']}", dead=False)
        return answer["answer"]

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def jaxllm_fingerprint() -> str:
    """Of all of jaxllm's files: what it compiled, kept in bundles, is that of the code that is measured."""
    import jaxllm

    hashed = hashlib.sha256()
    for file in sorted(Path(jaxllm.__file__).parent.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            hashed.update(file.read_bytes())
    return hashed.hexdigest()[:8]
