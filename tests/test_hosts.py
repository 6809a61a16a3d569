"""Real processes on this machine's CPU: they answer as one would, read only their parts, and end together."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

import jaxllm
from jaxllm import hosts
from jaxllm.cli import main
from tests.test_checkpoint import random_lm
from tests.test_cli import byte_tokenizer

BOUND_S = 15  # from a kill to the end of every other process; here about 0.1, when the machine is not busy
START_S = 300  # for everything before: a loaded machine compiles slowly
CFG = jaxllm.ModelConfig(
    vocab_size=1024,
    embed_dim=64,
    num_layers=1,  # programs of two take half as long again to compile
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    ffw_dim=2048,
    max_len=128,
    tie_embeddings=True,
)
PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]

# sys.argv: the coordinator's address, how many processes, which this is, and what the test wants.
JOIN = """
import json, os, sys, time
import jax
import jaxllm
from jaxllm import hosts
place = hosts.Place(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
def say(**what):
    print(json.dumps(what), flush=True)
"""
GENERATE = (
    JOIN
    + """
def read():
    return int(open("/proc/self/io").read().split()[1])
path, prompts, axes = sys.argv[4], json.loads(sys.argv[5]), json.loads(sys.argv[6])
with hosts.join(place):
    split = jaxllm.make_mesh(model=jax.device_count())
    jaxllm.load(path, mesh=split)  # what is imported when it is wanted is read as well
    before = read()
    leaves = jax.tree.leaves(jaxllm.load(path, mesh=split).params)
    after = read()
    own = sum(part.data.nbytes for leaf in leaves for part in leaf.addressable_shards)
    mesh = jaxllm.make_mesh(**axes)
    engine = jaxllm.compile(jaxllm.load(path, mesh=mesh), batch=4, max_len=32, mesh=mesh)
    greedy, drawn = (engine.generate(prompts, max_new_tokens=12, temperature=t, seed=3) for t in (0.0, 1.0))
    say(read=after - before, own=own, greedy=[r.tokens for r in greedy], drawn=[r.tokens for r in drawn])
    while True:
        engine.generate(prompts, max_new_tokens=28)
"""
)


class Processes:
    """Python programs that know of one another; each has a directory's files for its stdout and stderr."""

    def __init__(self, path: Path, count: int, devices: int = 1):
        self.path, self.count = path, count
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.coordinator = f"localhost:{free.getsockname()[1]}"
        self.env = os.environ | {
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "XLA_FLAGS": re.sub(r"device_count=\d+", f"device_count={devices}", os.environ["XLA_FLAGS"]),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.all: list[subprocess.Popen] = []

    def script(self, text: str, *args: str, only: int | None = None) -> None:
        for i in range(self.count) if only is None else [only]:
            self._start("-c", text, self.coordinator, str(self.count), str(i), *args)

    def command(self, *args: str) -> None:
        for i in range(self.count):
            self._start("-m", "jaxllm.cli", *args, "--hosts", f"{self.coordinator},{self.count},{i}")

    def _start(self, *args: str) -> None:
        n = len(self.all)
        with open(self.path / f"out{n}", "wb") as out, open(self.path / f"err{n}", "wb") as err:
            self.all.append(subprocess.Popen([sys.executable, *args], env=self.env, stdout=out, stderr=err))

    def read(self, name: str, index: int) -> str:
        return (self.path / f"{name}{index}").read_text(errors="replace")

    def wait_for(self, name: str, index: int, pattern: str) -> re.Match[str]:
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            if found := re.search(pattern, self.read(name, index), re.M):
                return found
            if self.all[index].poll() is not None:
                break
            time.sleep(0.02)
        pytest.fail(f"process {index} never said {pattern!r}, but:\n{self.read('err', index)}")

    def said(self, index: int) -> dict:
        return json.loads(self.wait_for("out", index, r"^\{.*\}$")[0])

    def codes(self, within_s: float = START_S) -> list[int]:
        end = time.monotonic() + within_s
        return [process.wait(max(0.01, end - time.monotonic())) for process in self.all]

    def errors(self, index: int) -> list[str]:
        """Without the words of JAX, which may come first where its coordinator was killed, and Gloo's."""
        return [line for line in self.read("err", index).splitlines() if line.startswith("jaxllm: error: ")]


@pytest.fixture
def processes(tmp_path):
    made = []

    def make(count, devices=1):
        made.append(Processes(tmp_path, count, devices))
        return made[-1]

    yield make
    for one in made:
        for process in one.all:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "hf"
    jaxllm.export_hf(random_lm(CFG), path)
    return path


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    lm = dataclasses.replace(random_lm(dataclasses.replace(CFG, vocab_size=256)), tokenizer=byte_tokenizer())
    path = tmp_path_factory.mktemp("model") / "own"
    jaxllm.save(jaxllm.quantize({".*mlp/up.*": "int4-g16", ".*": "int8"})(lm), path)
    return path


def expected(model):
    engine = jaxllm.compile(jaxllm.load(model), batch=4, max_len=32)
    return [[r.tokens for r in engine.generate(PROMPTS, max_new_tokens=12, temperature=t, seed=3)] for t in (0.0, 1.0)]


def check_generation(group, model, mesh, killed):
    wanted, total = expected(model), (model / "model.safetensors").stat().st_size
    group.script(GENERATE, str(model), json.dumps(PROMPTS), json.dumps(mesh))
    for said in [group.said(i) for i in range(group.count)]:
        assert [said["greedy"], said["drawn"]] == wanted
        assert said["own"] < 1.02 * total / group.count
        assert said["own"] < said["read"] < said["own"] + 0.08 * total  # besides: headers, and a config

    group.all[killed].kill()
    start = time.monotonic()
    codes = group.codes(BOUND_S)
    assert time.monotonic() - start < BOUND_S
    for i, code in enumerate(codes):
        if i == killed:
            assert code == -signal.SIGKILL
        else:
            assert code not in (0, -signal.SIGKILL)
            [error] = group.errors(i)
            assert re.search(rf"Process {killed} of {group.count} \(on \S+\) is gone", error)


def test_four_processes_generate_as_one_and_end_when_one_is_killed(processes, model):
    check_generation(processes(4), model, {"data": 2, "model": 2}, killed=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "mesh", "killed"), [(2, {"model": 2}, 1), (2, {"data": 2}, 0), (4, {"model": 4}, 0)], ids=str
)
def test_other_meshes_and_deaths(processes, model, count, mesh, killed):
    check_generation(processes(count), model, mesh, killed)


def test_the_first_alone_prints_and_all_end_when_it_is_killed(processes, model):
    group = processes(2, devices=2)
    shape = ["--prompt-tokens", "8", "--new-tokens", "9", "--max-len", "32", "--rounds", "100000"]
    group.command("bench", str(model), "--mesh", "model=4", *shape)
    group.wait_for("err", 0, "timing round 3")
    assert [group.read("out", i) for i in range(2)] == ["", ""]
    assert group.read("err", 1) == ""
    group.all[0].kill()
    assert group.codes(BOUND_S)[1] != 0
    assert "Process 0 of 2" in group.errors(1)[0]


@pytest.mark.slow
def test_commands_print_what_one_process_prints(processes, text_model, capsys):
    for args, mesh in (
        (["generate", str(text_model), "Hello", "Bye", "--max-new-tokens", "9", "--max-len", "32", "--json"], "data=2"),
        (["eval", str(text_model), "--windows", "1", "--window-tokens", "32", "--json"], "model=2"),
    ):
        assert main(args) == 0
        alone = json.loads(capsys.readouterr().out.splitlines()[-1])
        group = processes(2)
        group.command(*args, "--mesh", mesh)
        assert group.codes() == [0, 0], group.read("err", 0) + group.read("err", 1)
        together = json.loads(group.read("out", 0).splitlines()[-1])
        assert together.pop("perplexity", 1) == pytest.approx(alone.pop("perplexity", 1), rel=1e-4)
        assert together.pop("nll_se", 1) == alone.pop("nll_se", 1)
        assert together == alone
        assert group.read("out", 1) == group.read("err", 1) == ""


def test_processes_that_want_different_things_are_told(processes):
    group = processes(2)
    group.script(JOIN + "with hosts.join(place): hosts.require_same('the prompts', place.index)")
    assert group.codes() == [1, 1]
    for i in range(2):
        assert "The prompts differ among the processes: [1] differ from process 0" in group.errors(i)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [("raise OSError('no such disk')", 1), ("sys.exit(7)", 7)])
def test_what_one_says_at_its_end_is_said_by_all(processes, how, code):
    group = processes(3)
    group.script(JOIN + f"with hosts.join(place):\n  if place.index == 2: {how}\n  time.sleep(600)")
    assert group.codes() == [1, 1, code]
    for i in range(3):
        [error] = group.errors(i)
        assert ("no such disk" in error) == (code == 1)
        assert ("Process 2 of 3 failed" in error) == (i != 2)


@pytest.mark.slow
def test_one_that_stands_still_ends_all(processes):
    group = processes(2)
    group.script(JOIN + "hosts.LOST_S = 10\nwith hosts.join(place): say(); time.sleep(600)")
    assert group.said(0) == group.said(1) == {}
    group.all[1].send_signal(signal.SIGSTOP)
    assert group.all[0].wait(60) != 0
    assert "stopped sending heartbeats" in group.read("err", 0)  # JAX's words


@pytest.mark.slow
def test_sigterm_ends_all(processes):
    group = processes(2)
    group.script(JOIN + "with hosts.join(place): say(); time.sleep(600)")
    assert group.said(0) == group.said(1) == {}
    group.all[1].terminate()
    assert group.codes(BOUND_S) == [1, -signal.SIGTERM]


@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_wait_for_the_others_is_bounded(processes, index):
    group = processes(2)
    group.script(JOIN + "start = time.monotonic(); hosts.join(place, timeout_s=2)", only=index)
    assert group.codes() == [1]
    [error] = group.errors(0)
    assert f"did not all come at {group.coordinator} within 2 s. Start the same command on every host." in error


@pytest.mark.slow
def test_a_port_in_use_is_told(processes):
    group = processes(2)
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        group.coordinator = f"localhost:{server.getsockname()[1]}"
        group.script(JOIN + "hosts.join(place)", only=0)
        assert group.codes() == [1]
    assert f"RuntimeError: This process cannot join the others at {group.coordinator}" in group.read("err", 0)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("generate m Hi --hosts auto", "--hosts needs --mesh"),
        ("generate m --mesh model=2 --hosts auto", "give prompts as arguments"),
        ("chat m --mesh model=2 --hosts auto", "chat is for one host"),
        ("eval m --tasks t --mesh model=2 --hosts auto", "--tasks run on one host"),
        ("bench m --mesh model=2 --hosts 10.0.0.1,2,0", "expected auto, or ADDRESS:PORT,COUNT,INDEX"),
        ("bench m --mesh model=2 --hosts 10.0.0.1:1,2,2", "expected auto, or ADDRESS:PORT,COUNT,INDEX"),
        ("bench m --mesh model=2 --hosts auto --join-timeout 0", "--join-timeout is 0"),
    ],
)
def test_misuse_is_refused_before_joining(args, said, monkeypatch, capsys):
    monkeypatch.setattr(hosts, "join", lambda *args, **kwargs: pytest.fail("it joined"))
    assert main(args.split()) == 1
    assert said in capsys.readouterr().err


def test_a_mesh_leaves_no_process_out(monkeypatch):
    devices = [SimpleNamespace(process_index=i // 2, device_kind="none") for i in range(4)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    with pytest.raises(ValueError, match=r"2 of the 4 devices leaves processes \[1\] without any"):
        jaxllm.make_mesh(model=2)
