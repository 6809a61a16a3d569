"""tpu_setup/tpu against programs that record their arguments in place of gcloud, xpk and kubectl. No cloud is asked."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxllm.cli.arguments import parser

ROOT = Path(__file__).parents[1]
TPU = ROOT / "tpu_setup" / "tpu"
ZONE = ["--zone", "us-west4-a"]

# Answers a query for a state with the next line of `states`, the last one for ever; a worker named in `failing` fails.
STAND_IN = f"""#!{sys.executable} -IS
import json, os, sys, time
here = os.path.dirname(sys.argv[0])
argv = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
with open(os.path.join(here, "log"), "a") as log:
    log.write(json.dumps(argv) + "\\n")
def read(name):
    path = os.path.join(here, name)
    return open(path).read().split() if os.path.exists(path) else []
if any(arg.startswith("--format=value(") for arg in argv):
    states = read("states")
    if not states:
        sys.exit("NOT_FOUND")
    print(states[0])
    with open(os.path.join(here, "states"), "w") as file:
        file.write(" ".join(states[1:] or states))
for arg in argv:
    if arg.startswith("--worker=") and arg != "--worker=all" and "ssh" in argv:
        worker = arg.partition("=")[2]
        print("first of", worker, flush=True)
        sys.stdout.write("no newline at the end")
        sys.stdout.flush()
        if "slow" in read("failing"):
            time.sleep(60)
        if worker in read("failing"):
            sys.exit(3)
if argv[0] == "xpk" and any("wait-for-job" in arg for arg in argv) and "job" in read("failing"):
    sys.exit(125)
if any(arg in read("failing") for arg in argv[4:5]):
    sys.exit(1)
"""


class Cloud:
    """A directory of stand-ins, first on PATH."""

    def __init__(self, path: Path):
        self.bin, self.tmp = path / "bin", path / "tmp"
        self.bin.mkdir()
        self.tmp.mkdir()
        for name in ("gcloud", "xpk", "kubectl"):
            self.add(name, STAND_IN)
        self.add("sleep", "#!/bin/sh\n")
        self.env = {"PATH": f"{self.bin}:{os.environ['PATH']}", "TMPDIR": str(self.tmp), "HOME": str(self.tmp)}

    def add(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def states(self, *states: str) -> None:
        (self.bin / "states").write_text(" ".join(states))

    def failing(self, *what: str) -> None:
        (self.bin / "failing").write_text(" ".join(what))

    def run(self, *args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(TPU), *args], input=stdin, capture_output=True, text=True, env=self.env, timeout=20, check=False
        )

    def calls(self) -> list[list[str]]:
        """What was called since the last time."""
        log = self.bin / "log"
        if not log.exists():
            return []
        lines = log.read_text().splitlines()
        log.unlink()
        return [json.loads(line) for line in lines]


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)


GCE = (
    "gcloud compute instances create t1 --machine-type=ct6e-standard-4t "
    "--image-family=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e --image-project=ubuntu-os-accelerator-images "
    "--zone=us-west4-a --maintenance-policy=TERMINATE --boot-disk-size=200GB --scopes=cloud-platform "
    "--max-run-duration=4h --instance-termination-action=DELETE"
)
QUEUED = (
    "gcloud compute tpus queued-resources create t1 --node-id=t1 --accelerator-type=v5litepod-8 "
    "--runtime-version=v2-alpha-tpuv5-lite --zone=us-west4-a --valid-until-duration=30m --async"
)
TPU_VM = "gcloud compute tpus tpu-vm create t1 --accelerator-type=v6e-8 --version=v2-alpha-tpuv6e --zone=us-west4-a"
GKE = "xpk cluster create --cluster=t1 --tpu-type=v5litepod-16 --num-slices=1 --zone=us-west4-a"


@pytest.mark.parametrize(
    ("options", "states", "expected"),
    [
        ("--type v5e-8", "WAITING_FOR_RESOURCES PROVISIONING ACTIVE", QUEUED),
        ("--type v5e-8 --model spot", "ACTIVE", QUEUED + " --spot"),
        (
            "--type v5e-8 --model flex-start --hours 2 --project p1",
            "ACTIVE",
            QUEUED.replace("gcloud", "gcloud alpha").replace("us-west4-a", "us-west4-a --project=p1")
            + " --provisioning-model=flex-start --max-run-duration=2h",
        ),
        ("--type v6e-8 --via tpu-vm", "CREATING READY", TPU_VM),
        ("--type v6e-8 --via tpu-vm --model=spot", "READY", TPU_VM + " --spot"),
        ("--type v6e-4 --via gce", "STAGING RUNNING", GCE),
        ("--type v6e-4 --via gce --model spot", "RUNNING", GCE + " --provisioning-model=SPOT"),
        (
            "--type v6e-4 --via gce --model flex-start --wait 90",
            "PENDING RUNNING",
            f"{GCE} --provisioning-model=FLEX_START --request-valid-for-duration=90m "
            "--reservation-affinity=none --async",
        ),
        ("--type v5e-16 --via gke", "", GKE + " --on-demand"),
        ("--type v5e-16 --via gke --model spot", "", GKE + " --spot"),
        ("--type v5e-16 --via gke --model flex-start", "", GKE + " --flex"),
    ],
)
def test_create(cloud: Cloud, options: str, states: str, expected: str):
    cloud.states(*states.split())
    args = ["create", "t1", *ZONE, *options.split()]
    dry = cloud.run(*args, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert cloud.calls() == []
    done = cloud.run(*args)
    assert done.returncode == 0, done.stderr
    calls = cloud.calls()
    assert calls[0] == expected.split()
    assert len(calls) == 1 + len(states.split())
    assert [shlex.split(line) for line in dry.stdout.splitlines()] == list(map(list, dict.fromkeys(map(tuple, calls))))
    assert "USD an hour" in done.stderr
    assert "delete t1 --zone=us-west4-a" in done.stderr
    assert all(f"t1 is {state}" in done.stderr for state in states.split())


def test_a_refused_creation_says_what_to_do(cloud: Cloud):
    cloud.failing("create")
    done = cloud.run("create", "t1", *ZONE, "--type", "v5e-1", "--via", "tpu-vm")
    assert done.returncode == 1
    assert "t1 was not created" in done.stderr
    assert done.stderr.strip().endswith("delete t1 --zone=us-west4-a --via=tpu-vm")
    assert len(cloud.calls()) == 1


def test_the_wait_is_bounded(cloud: Cloud):
    cloud.states("WAITING_FOR_RESOURCES")
    done = cloud.run("create", "t1", *ZONE, "--type", "v5e-1", "--wait", "1")
    assert done.returncode == 1
    assert "still WAITING_FOR_RESOURCES after 1 minutes" in done.stderr
    assert done.stderr.count("t1 is WAITING_FOR_RESOURCES") == 1
    assert len(cloud.calls()) == 5


@pytest.mark.parametrize(
    ("via", "states", "said"),
    [
        ("queued", "WAITING_FOR_RESOURCES FAILED", "lost: FAILED"),
        ("tpu-vm", "PREEMPTED", "lost: PREEMPTED"),
        ("gce", "RUNNING", "t1 is RUNNING"),
        ("gce", "", "gone, or was never there"),
    ],
)
def test_watch_tells_what_became_of_it(cloud: Cloud, via: str, states: str, said: str):
    cloud.states(*states.split())
    done = cloud.run("watch", "t1", *ZONE, "--via", via)
    assert said in done.stderr
    assert done.returncode == (0 if "RUNNING" in states else 1)


HOSTS = ["--type", "v5e-16", *ZONE]
SINGLE = ["--type", "v6e-4", "--via", "gce", *ZONE]


def test_run_is_on_every_worker_with_its_name(cloud: Cloud):
    args = ["run", "t1", *HOSTS, "--", "python", "-c", "print('a & \"b\"')"]
    done = cloud.run(*args, "--dry-run")  # After '--' it is part of the command.
    assert done.returncode == 0
    calls = cloud.calls()
    assert sorted(call[8] for call in calls) == [f"--worker={i}" for i in range(4)]
    for call in calls:
        assert call[:8] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "t1", "--zone=us-west4-a", "--quiet"]
        remote = call[9].removeprefix("--command=cd jaxllm && . .venv/bin/activate && ")
        assert shlex.split(remote) == [*args[args.index("--") + 1 :], "--dry-run"]
    for i in range(4):
        mine = [line for line in done.stdout.splitlines() if line.startswith(f"[worker {i}] ")]
        assert mine == [f"[worker {i}] first of {i}", f"[worker {i}] no newline at the end"]


def test_run_fails_with_a_worker_and_names_it(cloud: Cloud):
    cloud.failing("2")
    done = cloud.run("run", "t1", *HOSTS, "--", "jaxllm", "info")
    assert done.returncode == 1
    assert "[worker 2] failed, exit 3" in done.stderr
    assert "worker 2 of 4 failed" in done.stderr
    assert len(cloud.calls()) == 4


def test_an_interrupt_ends_the_workers(cloud: Cloud):
    cloud.failing("slow")
    started = time.monotonic()
    process = subprocess.Popen(
        [TPU, "run", "t1", *HOSTS, "--", "x"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=cloud.env
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)  # to the end of its output: no worker holds it open
    assert process.returncode == 130
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    "args",
    [
        ["install", "t1", *HOSTS],
        ["install", "t1", *HOSTS, "--from", "git+https://example.org/jaxllm@main"],
        ["install", "t1", *SINGLE, "--project=p1"],
        ["run", "t1", *HOSTS, "--", "jaxllm", "generate", "small", "Why?"],
        ["run", "t1", *SINGLE, "--", "true"],
        ["run", "t1", *HOSTS, "--via", "gke", "--wait", "5", "--", "jaxllm", "info", "a b"],
        ["watch", "t1", *ZONE],
        ["watch", "t1", *ZONE, "--via", "gke"],
        ["copy", "t1", "quickstart", "out", *ZONE, "--worker", "3"],
        ["copy", "t1", "/tmp/log", "out", *ZONE, "--via", "gce"],
        ["delete", "t1", *ZONE, "--yes"],
        ["delete", "t1", *ZONE, "--via", "tpu-vm", "--yes"],
        ["delete", "t1", *ZONE, "--via", "gce", "--yes"],
        ["delete", "t1", *ZONE, "--via", "gke", "--yes"],
        ["list", *ZONE, "--project", "p1"],
    ],
    ids=" ".join,
)
def test_a_dry_run_prints_what_is_then_run(cloud: Cloud, args: list[str]):
    cloud.states("ACTIVE")
    at = args.index("--") if "--" in args else len(args)
    dry = cloud.run(*args[:at], "--dry-run", *args[at:])
    assert dry.returncode == 0, dry.stderr
    assert cloud.calls() == []
    assert list(cloud.tmp.iterdir()) == []
    done = cloud.run(*args)
    assert done.returncode == 0, done.stderr
    calls = cloud.calls()
    printed = [shlex.split(line) for line in dry.stdout.splitlines()]
    recorded = [words for words in printed if words[0] in ("gcloud", "xpk", "kubectl")]
    if args[0] in ("install", "run"):  # the workers start together
        calls, recorded = sorted(calls), sorted(recorded)
    assert calls == recorded
    assert {words[0] for words in printed} <= {"gcloud", "xpk", "kubectl", "tar", "mkdir", "rm"}


def test_install_sends_a_package_that_can_be_built(cloud: Cloud, tmp_path: Path):
    assert cloud.run("install", "t1", *HOSTS).returncode == 0
    [scp, *ssh] = cloud.calls()
    names = subprocess.run(["tar", "-tzf", scp[5]], capture_output=True, text=True, check=True).stdout.split()
    assert {"pyproject.toml", "README.md", "LICENSE", "jaxllm/__init__.py", "tpu_setup/tpu"} <= set(names)
    assert not any("__pycache__" in name for name in names)
    assert scp[6:] == ["t1:", "--zone=us-west4-a", "--quiet", "--worker=all"]
    assert all("uv venv --clear --python 3.12" in call[-1] and "'./src[tpu]'" in call[-1] for call in ssh)

    wheel = tmp_path / "jaxllm-0.1.0-py3-none-any.whl"
    wheel.touch()
    assert cloud.run("install", "t1", *HOSTS, "--from", str(wheel)).returncode == 0
    assert all(f"'../{wheel.name}[tpu]'" in call[-1] for call in cloud.calls()[1:])


def test_what_the_workers_are_told_is_a_shell_s(cloud: Cloud, tmp_path: Path):
    """The texts of install and run, in a home directory of their own, with a uv that records."""
    home = tmp_path / "home"
    (home / ".local" / "bin").mkdir(parents=True)
    uv = home / ".local" / "bin" / "uv"
    uv.write_text('#!/bin/sh\necho "$@"\nmkdir -p .venv/bin && echo "answer=42" >.venv/bin/activate\n')
    uv.chmod(0o755)
    cloud.add("curl", "#!/bin/sh\necho 'echo installing uv'\n")

    def worker(*args: str) -> list[str]:
        assert cloud.run(*args).returncode == 0
        text = cloud.calls()[-1][-1].removeprefix("--command=")
        env = cloud.env | {"HOME": str(home)}
        done = subprocess.run(["bash", "-c", text], cwd=home, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    (home / "jaxllm").mkdir()
    (home / "jaxllm" / "results").touch()
    assert cloud.run("install", "t1", *HOSTS).returncode == 0
    shutil.copy(cloud.calls()[0][5], home)
    assert worker("install", "t1", *HOSTS) == [
        "installing uv",
        "venv --clear --python 3.12 .venv",
        "pip install --python .venv ./src[tpu]",
    ]
    assert (home / "jaxllm" / "src" / "pyproject.toml").exists()
    assert (home / "jaxllm" / "results").exists()
    spec = "git+https://example.org/jaxllm@main"
    assert worker("install", "t1", *HOSTS, "--from", spec)[-1] == f"pip install --python .venv jaxllm[tpu] @ {spec}"
    assert worker("run", "t1", *HOSTS, "--", "bash", "-c", "pwd; echo \"it's\" $1 '*'", "x", "a  & b") == [
        str(home / "jaxllm"),
        "it's a & b *",
    ]


def test_install_tries_again_and_then_fails(cloud: Cloud):
    cloud.failing("scp")
    done = cloud.run("install", "t1", *HOSTS)
    assert done.returncode == 1
    assert "cannot copy to t1" in done.stderr
    assert len(cloud.calls()) == 5


def test_a_failing_workload_fails_is_shown_and_deleted(cloud: Cloud):
    cloud.failing("job")
    done = cloud.run("run", "t1", *HOSTS, "--via", "gke", "--", "false")
    assert done.returncode == 1
    assert "125" in done.stderr
    assert [call[:3] for call in cloud.calls()[-2:]] == [
        ["kubectl", "logs", "--selector=xpk.google.com/workload=t1-run"],
        ["xpk", "workload", "delete"],
    ]


@pytest.mark.parametrize(("answer", "deleted"), [("y\n", True), ("n\n", False), ("\n", False), ("", False)])
def test_delete_shows_and_asks(cloud: Cloud, answer: str, deleted: bool):
    cloud.states("t1-v5e-ACTIVE")
    done = cloud.run("delete", "t1", *ZONE, stdin=answer)
    assert "t1-v5e-ACTIVE" in done.stdout
    assert "Delete t1 and its disk?" in done.stderr
    assert (done.returncode == 0) == deleted
    assert [call[4] for call in cloud.calls()] == (["describe", "delete"] if deleted else ["describe"])
    assert deleted or "goes on costing" in done.stderr


def test_what_is_not_there_is_not_deleted(cloud: Cloud):
    done = cloud.run("delete", "t1", *ZONE, "--yes")
    assert done.returncode == 1
    assert len(cloud.calls()) == 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("create t1 --type v9-8 --zone us-west4-a", "--type is 'v9-8'; expected one of: v4-8 "),
        ("create t1 --type --zone us-west4-a", "--type needs a value; got '--zone'"),
        ("create t1 --zone us-west4-a", "--type is ''"),
        ("create t1 --type v5e-8", "--zone is ''; expected a zone"),
        ("create t1 --type v5e-8 --zone us-west4", "--zone is 'us-west4'"),
        ("create T_1 --type v5e-8 --zone us-west4-a", "NAME is 'T_1'"),
        ("create --type v5e-8 --zone us-west4-a", "got 0 argument(s); expected NAME"),
        ("create t1 t2 --type v5e-8 --zone us-west4-a", "got 2 argument(s)"),
        ("create t1 --type v5e-8 --zone us-west4-a --via gce", "--via gce does not offer v5e-8"),
        ("create t1 --type v6e-16 --zone us-west4-a --via gce", "--via gce does not offer v6e-16"),
        ("create t1 --type v5e-1 --zone us-west4-a --via gke", "--via gke does not offer v5e-1"),
        ("create t1 --type v5e-8 --zone us-west4-a --via aws", "--via is 'aws'; expected queued"),
        ("create t1 --type v5e-8 --zone us-west4-a --model cheap", "--model is 'cheap'; expected on-demand"),
        ("create t1 --type v5e-8 --zone us-west4-a --via tpu-vm --model flex-start", "no flex-start; use --via queued"),
        ("create t1 --type v5e-8 --zone us-west4-a --hours 2", "--hours needs --via gce"),
        ("create t1 --type v6e-8 --zone us-west4-a --via gce --hours 169", "--hours is '169'"),
        ("create t1 --type v6e-8 --zone us-west4-a --via gce --model flex-start --wait 121", "120 minutes at most"),
        ("create t1 --type v5e-8 --zone us-west4-a --wait 0", "--wait is '0'; expected a whole number from 1 to 1440"),
        ("create t1 --type v5e-8 --zone us-west4-a --wait 1h", "--wait is '1h'"),
        ("create t1 --type v5e-8 --zone us-west4-a --yes", "there is no option '--yes'"),
        ("create t1 --type v5e-8 --zone us-west4-a --project=", "--project needs a value"),
        ("install t1 --type v5e-16 --zone us-west4-a --via gke", "'run' does it"),
        ("install t1 --type v5e-16 --zone us-west4-a --from /", "--from is '/'; expected a checkout"),
        ("install t1 --type v5e-16 --zone us-west4-a --from no.whl", "there is no such file"),
        ("run t1 --type v5e-16 --zone us-west4-a", "there is no command"),
        ("run t1 --type v5e-16 --zone us-west4-a jaxllm info", "comes after '--'"),
        ("copy t1 out --zone us-west4-a", "expected NAME REMOTE LOCAL"),
        ("copy t1 out out --zone us-west4-a --via gke", "gs:// bucket"),
        ("copy t1 out out --zone us-west4-a --via gce --worker 1", "--worker is '1'"),
        ("delete t1 --zone us-west4-a --yes=no", "--yes takes no value"),
        ("delete t1 --zone us-west4-a -- x", "'--' has no meaning here"),
        ("list", "--zone is ''"),
        ("types v5e", "got 'v5e'; expected no arguments"),
        ("destroy t1", "there is no command 'destroy'"),
        ("", "there is no command ''"),
    ],
)
def test_misuse_is_refused_before_any_call(cloud: Cloud, args: str, said: str):
    done = cloud.run(*args.split())
    assert done.returncode == 2
    assert said in done.stderr
    assert "--help" in done.stderr
    assert done.stdout == ""
    assert cloud.calls() == []


def test_a_missing_gcloud_is_told(cloud: Cloud):
    (cloud.bin / "gcloud").unlink()
    for name in ("bash", "env", "dirname", "grep", "awk", "wc"):
        (cloud.bin / name).symlink_to(str(shutil.which(name)))
    cloud.env["PATH"] = str(cloud.bin)
    done = cloud.run("create", "t1", *HOSTS)
    assert done.returncode == 1
    assert "gcloud is not on PATH" in done.stderr


@pytest.mark.parametrize("command", ["create", "install", "run", "watch", "copy", "delete", "list", "types"])
def test_help(cloud: Cloud, command: str):
    done = cloud.run(command, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"tpu {command}")
    assert ("--dry-run" in done.stdout) == (command != "types")


def test_types_lists_chips_and_price(cloud: Cloud):
    done = cloud.run("types")
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["v5e-16", "16", "4", "4x4", "256", "19.20", "queued", "tpu-vm", "gke"] in rows
    for row in rows[1:-1]:
        assert int(row[1]) == math.prod(map(int, row[3].split("x")))


def types() -> list[list[str]]:
    lines = (ROOT / "tpu_setup" / "types.txt").read_text().splitlines()
    return [line.split() for line in lines if not line.startswith("#")]


def page_commands() -> list[str]:
    text = (ROOT / "tpu_setup" / "README.md").read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if "tpu_setup/tpu " in line]


def test_every_command_of_the_page_is_accepted(cloud: Cloud):
    commands = page_commands()
    assert {shlex.split(command)[1] for command in commands} >= {"create", "install", "run", "copy", "delete", "list"}
    for command in commands:
        words = shlex.split(command, comments=True)
        assert words[0] == "tpu_setup/tpu", command
        at = words.index("--") if "--" in words else len(words)
        if words[1] != "types":
            words.insert(at, "--dry-run")
        done = cloud.run(*words[1:])
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        remote = words[at + 2 :]
        if remote[:1] == ["jaxllm"]:
            args, prompts = parser().parse_known_args(remote[1:])
            assert not any(word.startswith("-") for word in prompts), command
            several = int(next(row for row in types() if row[0] == words[words.index("--type") + 1])[2]) > 1
            assert getattr(args, "hosts", None) == ("auto" if several else None), command
        elif remote and remote[1] != "-c":
            assert (ROOT / remote[1].removeprefix("src/")).exists(), command
    assert cloud.calls() == []


def test_shellcheck():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck is not None, "the test extra brings it"
    done = subprocess.run([shellcheck, TPU], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
