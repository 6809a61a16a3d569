"""From checkpoint to checkpoint: what whole models give, whatever happens on the way, in the memory of a group."""

import dataclasses
import errno
import fcntl
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm import checkpoint
from jaxllm.checkpoint import native, optimize_checkpoint, stream
from jaxllm.lm import LM, param_info
from jaxllm.params import flatten, unflatten
from tests.test_checkpoint import TINY, assert_same, random_lm, write_gguf

CFG = dataclasses.replace(TINY, tie_embeddings=True)
TOKENS = np.random.default_rng(1).integers(0, CFG.vocab_size, (2, 12))
OTHER = TOKENS[:, ::-1].copy()
GPTQ = (jaxllm.quantize("int4-g32", method="gptq", calibration=TOKENS),)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "hf"
    checkpoint.export_hf(random_lm(CFG), path)
    return path


def load(path):
    return checkpoint.load_path(path, origin="unused")


def assert_equal(path, model):
    """What is at `path` is what saving the model gives, bit for bit, and nothing lies beside it."""
    loaded = load(path)
    assert_same(loaded, model)
    assert json.dumps(list(map(dataclasses.asdict, loaded.ledger))) == json.dumps(
        list(map(dataclasses.asdict, model.ledger))
    )
    assert not [p.name for p in path.parent.iterdir() if p.name.startswith(".")]


def whole(source, transforms, dtype=None):
    return jaxllm.chain(*transforms)(checkpoint.load(source, dtype))


CHAINS = {
    "nothing": [],
    "prune, int8": [jaxllm.prune(0.5, match=".*"), jaxllm.quantize("int8")],
    "2:4, int8 cache": [jaxllm.prune(pattern="2:4"), jaxllm.quantize_kv()],
    "gptq": GPTQ,
    "sparsegpt, int8": [jaxllm.prune(0.5, method="sparsegpt", calibration=TOKENS), jaxllm.quantize("int8")],
    "compact, wanda, cache, w8a8": [
        jaxllm.compact(ffn=[40, 64], kv_heads=[2, 1], calibration=TOKENS),
        jaxllm.prune(0.4, method="wanda", calibration=OTHER),
        jaxllm.quantize_kv(),
        jaxllm.quantize("w8a8-static", method="smoothquant", calibration=TOKENS),
    ],
    # The second needs the stream no further than the first layer.
    "some layers": [
        jaxllm.quantize({r"layers_1/mlp/.*": "int4-affine"}, method="awq", calibration=TOKENS),
        jaxllm.quantize({r"layers_0/attn/.*": "int8"}, method="gptq", calibration=OTHER),
    ],
}


@pytest.mark.parametrize("name", CHAINS)
def test_equals_the_whole_model(source, tmp_path, name):
    lines = []
    optimize_checkpoint(source, CHAINS[name], tmp_path / "out", log=lines.append)
    assert_equal(tmp_path / "out", whole(source, CHAINS[name]))
    assert [line.split()[0] for line in lines] == ["embed", "layers_0", "layers_1", "final_norm"]


@pytest.mark.parametrize("how", ["native", "native sparse", "gguf", "bfloat16", "untied"])
def test_equals_the_whole_model_from_other_sources(tmp_path, how):
    path, transforms, dtype = tmp_path / "in", CHAINS["prune, int8"], None
    if how == "gguf":
        path = tmp_path / "in.gguf"
        write_gguf(path, random_lm(CFG), kind="Q8_0")
    elif how == "untied":
        checkpoint.export_hf(random_lm(TINY), path)
    else:
        dtype = "bfloat16" if how == "bfloat16" else None
        model = random_lm(CFG)
        checkpoint.save(jaxllm.prune(0.5)(model) if how == "native sparse" else model, path)
    optimize_checkpoint(path, transforms, tmp_path / "out", dtype=dtype)
    assert_equal(tmp_path / "out", whole(path, transforms, dtype))


def test_int8_checkpoint_gets_an_int8_cache(tmp_path):
    checkpoint.save(jaxllm.quantize("int8")(random_lm(CFG)), tmp_path / "in")
    done = optimize_checkpoint(tmp_path / "in", [jaxllm.quantize_kv()], tmp_path / "out")
    assert_equal(tmp_path / "out", whole(tmp_path / "in", [jaxllm.quantize_kv()]))
    assert done.bytes_out == load(tmp_path / "out").weight_bytes
    with pytest.raises(ValueError, match="quantised already"):
        optimize_checkpoint(tmp_path / "in", [jaxllm.quantize("int8")], tmp_path / "again")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


# --- a run that ends early

_CHILD = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
import numpy as np
import jaxllm
from jaxllm.checkpoint import optimize_checkpoint
source, out = sys.argv[1:]
tokens = np.random.default_rng(1).integers(0, 64, (2, 12))
transforms = [
    jaxllm.compact(ffn=48, calibration=tokens),
    jaxllm.quantize("int4-g16", method="gptq", calibration=tokens),
]
print("begin", flush=True)
optimize_checkpoint(source, transforms, out, log=lambda line: print(line, flush=True))
"""


@pytest.mark.slow
def test_ten_kills_change_nothing(tmp_path):
    source, rng, env = tmp_path / "in", random.Random(0), os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    checkpoint.export_hf(random_lm(dataclasses.replace(CFG, num_layers=10)), source)

    def start(out):
        command = [sys.executable, "-c", _CHILD, str(source), str(out)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
        assert child.stdout is not None
        assert child.stdout.readline() == "begin\n"
        return child

    def finish(child):
        child.communicate(timeout=300)
        return child.returncode

    assert finish(start(tmp_path / "reference")) == 0
    written, finished = [], 0
    while len(written) < 10:
        child = start(tmp_path / f"out-{finished}")
        for _ in range(rng.randrange(4)):  # most of the time goes by before the first line
            child.stdout.readline()
        time.sleep(rng.uniform(0, 0.5))
        child.send_signal(signal.SIGKILL)
        assert finish(child) in (0, -signal.SIGKILL)
        partial = tmp_path / f".out-{finished}.partial"
        if (tmp_path / f"out-{finished}").exists() and not partial.exists():  # if killed, then on its way out
            finished += 1
        else:
            written.append(len([*partial.glob("model/arrays/*")]))
    assert finish(start(tmp_path / f"out-{finished}")) == 0
    assert len(set(written)) > 2, written
    reference = load(tmp_path / "reference")
    for i in range(finished + 1):
        assert_equal(tmp_path / f"out-{i}", reference)


class Killed(BaseException):
    pass


class Death:
    """Ends a run before, or in the middle of, its n-th change on disk; after that nothing changes any more."""

    def __init__(self, monkeypatch):
        self.left = -1
        for owner, name in (
            (stream.os, "rename"),
            (stream.shutil, "rmtree"),
            (native, "write_arrays"),
            (native, "write_manifest"),
            (Path, "unlink"),
            (Path, "rmdir"),
        ):
            monkeypatch.setattr(owner, name, self.watched(getattr(owner, name)))

    def watched(self, real):
        def call(*args, **kwargs):
            if ".partial" not in str(args[0]) or ".orbax" in str(args[0]):  # Orbax's own, in threads
                return real(*args, **kwargs)
            if self.left == 0:
                raise Killed
            self.left -= 1
            if self.left == 0:
                if real.__name__ == "rmtree" and args[0].is_dir():
                    for file in [p for p in args[0].rglob("*") if p.is_file()][::2]:
                        os.remove(file)
                if real.__name__ in ("write_arrays", "write_manifest"):
                    real(*args, **kwargs)
                raise Killed
            return real(*args, **kwargs)

        return call


@pytest.mark.slow
def test_death_at_every_change_on_disk(source, tmp_path, monkeypatch):
    expected, death = whole(source, GPTQ), Death(monkeypatch)
    for step in itertools.count(1):
        death.left = step
        try:
            optimize_checkpoint(source, GPTQ, tmp_path / "out")
        except Killed:
            pass
        else:
            break
        death.left = -1
        optimize_checkpoint(source, GPTQ, tmp_path / "out")
        assert_equal(tmp_path / "out", expected)
        shutil.rmtree(tmp_path / "out")
    assert step > 25


def fail_at(monkeypatch, group, error):
    real = native.write_group

    def write_group(path, name, leaves):
        if name == group:
            raise error
        return real(path, name, leaves)

    monkeypatch.setattr(native, "write_group", write_group)


def begun(source, tmp_path, transforms=GPTQ, **options):
    """A run that ended with the disk full before layers_1."""
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, "layers_1", OSError(errno.ENOSPC, "disk full"))
        with pytest.raises(OSError, match="disk full"):
            optimize_checkpoint(source, transforms, tmp_path / "out", **options)
    assert (tmp_path / ".out.partial").is_dir()
    assert not (tmp_path / "out").exists()


def test_what_is_written_is_not_made_again(source, tmp_path, monkeypatch):
    begun(source, tmp_path)
    made, real = [], native.write_group
    monkeypatch.setattr(native, "write_group", lambda path, name, leaves: made.append(name) or real(path, name, leaves))
    optimize_checkpoint(source, GPTQ, tmp_path / "out")
    assert made == ["layers_1", "final_norm"]


def test_failure_before_the_first_group_leaves_nothing(source, tmp_path, monkeypatch):
    fail_at(monkeypatch, "embed", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        optimize_checkpoint(source, GPTQ, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_other_jobs_are_refused(source, tmp_path):
    mine = shutil.copytree(source, tmp_path / "mine")
    begun(mine, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    gptq = {"format": "int4-g32", "method": "gptq", "calibration": TOKENS}
    for changes, words in (
        ({"calibration": OTHER}, "calibration/sha256"),
        ({"format": "int4-g16"}, "format.*int4-g32.*int4-g16"),
        ({"method": "awq+gptq"}, "method"),
    ):
        with pytest.raises(ValueError, match=rf"\.out\.partial was begun by another job.*{words}.*remove"):
            optimize_checkpoint(mine, [jaxllm.quantize(**gptq | changes)], tmp_path / "out")
    for options in ({"dtype": "bfloat16"}, {"origin": "elsewhere"}, {"dry_run": True, "dtype": "bfloat16"}):
        with pytest.raises(ValueError, match="another job"):
            optimize_checkpoint(mine, GPTQ, tmp_path / "out", **options)
    with pytest.raises(ValueError, match="another job"):
        optimize_checkpoint(mine, [*GPTQ, jaxllm.quantize_kv()], tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before
    os.utime(mine / "model.safetensors")
    with pytest.raises(ValueError, match=r"source.*model\.safetensors"):
        optimize_checkpoint(mine, GPTQ, tmp_path / "out")


@pytest.mark.parametrize("lost", ["state/layers_0/stream", "state/embed", "model/arrays/embed"])
def test_damaged_partial_is_told(source, tmp_path, lost):
    begun(source, tmp_path)
    shutil.rmtree(tmp_path / ".out.partial" / lost)
    with pytest.raises(ValueError, match=r"\.out\.partial is damaged.*Remove it"):
        optimize_checkpoint(source, GPTQ, tmp_path / "out")
    (tmp_path / ".out.partial" / "job.json").unlink()
    with pytest.raises(ValueError, match=r"no job\.json"):
        optimize_checkpoint(source, GPTQ, tmp_path / "out")


def test_two_processes_do_not_share_a_partial(source, tmp_path):
    begun(source, tmp_path)
    holder = os.open(tmp_path / ".out.partial", os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    with pytest.raises(OSError, match="Another process"):
        optimize_checkpoint(source, GPTQ, tmp_path / "out")
    os.close(holder)
    optimize_checkpoint(source, GPTQ, tmp_path / "out")


# --- what is checked first


def test_transforms_of_the_whole_model_are_refused_by_name(source, tmp_path):
    for transform, name in (
        (jaxllm.prune(0.5, scope="global"), "Transform 2, prune_globally"),
        (jaxllm.compact(layers=1), "Transform 2, compact"),
        (lambda model: model, "Transform 2, test_transforms_of_the_whole"),
    ):
        with pytest.raises(ValueError, match=f"{name}.*looks at the whole model"):
            optimize_checkpoint(source, [jaxllm.prune(0.5), transform], tmp_path / "out")


@pytest.mark.parametrize("dry_run", [True, False])
def test_mistakes_are_told_before_a_weight_is_read(source, tmp_path, dry_run, monkeypatch):
    monkeypatch.setattr(checkpoint.names, "to_device", lambda *args: pytest.fail("a weight was read"))
    bad = np.full((1, 4), CFG.vocab_size)
    for transforms, words in (
        ([jaxllm.quantize("int4-g24")], "groups of 24"),
        ([jaxllm.prune(0.5, pattern="7x7")], "7 x 7"),
        ([jaxllm.prune(0.5, match="layer.*/mlp2/.*")], "No weight path"),
        ([jaxllm.quantize("int8"), jaxllm.prune(0.5)], "cannot follow"),
        ([jaxllm.quantize("int8", method="gptq", calibration=bad)], "token ids"),
        ([jaxllm.compact(ffn=65, calibration=TOKENS)], "ffn=65"),
    ):
        with pytest.raises(ValueError, match=words):
            optimize_checkpoint(source, transforms, tmp_path / "out", dry_run=dry_run)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(FileExistsError, match="Remove it"):
        optimize_checkpoint(source, GPTQ, tmp_path / "out", dry_run=dry_run)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_dry_run_writes_nothing_and_says_what_would_be(source, tmp_path):
    found = optimize_checkpoint(source, GPTQ, tmp_path / "new" / "out", dry_run=True)
    assert not list(tmp_path.iterdir())
    assert found.groups == 4
    assert found.bytes_in == sum((source / name).stat().st_size for name in ("model.safetensors", "config.json"))
    assert found.bytes_out == pytest.approx(whole(source, GPTQ).weight_bytes, rel=0.01)
    assert found.stream_bytes == 2 * TOKENS.size * CFG.embed_dim * 4
    assert found.peak_bytes > found.bytes_out
    assert "4 groups" in str(found)
    done = optimize_checkpoint(source, GPTQ, tmp_path / "new" / "out")
    assert dataclasses.replace(done, free_bytes=0) == dataclasses.replace(found, free_bytes=0)


@pytest.mark.parametrize("dry_run", [True, False])
def test_full_disk_is_told_first(source, tmp_path, monkeypatch, dry_run):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"needs .* GB and .* has") as caught:
        optimize_checkpoint(source, GPTQ, tmp_path / "out", dry_run=dry_run)
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


# --- memory

_MEASURE = """
import pathlib, sys
import jax
import orbax.checkpoint
import jaxllm
from jaxllm.checkpoint import optimize_checkpoint

def high_water_mb():
    text = pathlib.Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) / 1024

jax.numpy.zeros(1).block_until_ready()
before = high_water_mb()
optimize_checkpoint(sys.argv[1], [jaxllm.prune(0.5), jaxllm.quantize("int8")], sys.argv[2])
print(high_water_mb() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_that_of_a_group(tmp_path):
    cfg = dataclasses.replace(CFG, vocab_size=4096, embed_dim=1024, ffw_dim=4096, num_layers=10, head_dim=64)
    model = LM(cfg, unflatten({p: jnp.zeros(info.shape, cfg.dtype) for p, info in param_info(cfg).items()}))
    checkpoint.export_hf(model, tmp_path / "in")
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path / "in"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        env={**os.environ, "XLA_FLAGS": ""},  # large arrays: here fast programs pay
    )
    assert model.weight_bytes > 550e6
    # A layer has 54 MB; pruning one weight takes several times its 17 MB. Orbax and the programs take the rest, more of
    # it where nothing is in the compilation cache yet.
    assert float(done.stdout) < 420
    assert not flatten(load(tmp_path / "out").params)["layers_9/mlp/up/w"].values.any()
