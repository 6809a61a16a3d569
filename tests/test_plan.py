"""Compiling for TPUs that nobody has at hand, by the real compiler: what it says, and what is made of it."""

import dataclasses
import importlib.util
import json
import re

import jax
import jax.numpy as jnp
import pytest

import jaxllm
from jaxllm import contracts, hlo_cost, plan, shard, targets
from jaxllm.compile import Lowering
from jaxllm.config import to_hf
from jaxllm.params import flatten
from tests.conftest import TINY

aot = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the tpu extra is not installed")
SMALL = dataclasses.replace(
    TINY,
    vocab_size=4096,
    embed_dim=2048,
    num_layers=1,
    num_heads=16,
    num_kv_heads=2,
    head_dim=128,
    ffw_dim=8192,
    max_len=512,
    tie_embeddings=False,
    dtype="bfloat16",
)


def lowering(cfg, target, sizes, format="int8", batch=8, context=256, rules=shard.RULES):
    mesh = shard.make_mesh(*sizes, devices=targets.parse(target).devices())
    return Lowering(cfg, plan.abstract_params(cfg, format), batch, context, mesh, rules)


def breaches(lower, program, layers, **contract):
    with targets.uncached():
        compiled = program.compile()
    return contracts.check(compiled, lower.params, lower.state, layers, contracts.Contract(**contract))


@pytest.mark.parametrize(
    ("name", "chips", "host"),
    [("v5e", 1, (1, 1)), ("v5e:2x4", 8, (2, 4)), ("v5e:4x4", 16, (2, 2)), ("v5p:2x2x2", 8, (2, 2, 1))],
)
def test_targets_are_read(name, chips, host):
    target = targets.parse(name)
    assert (target.chips, target.host) == (chips, host)
    assert targets.parse(str(target)) == target


@pytest.mark.parametrize("name", ["", "v9", "v5e:2", "v5e:2x2x1", "v5p:2x2", "v5e:0x1", "v5e:2x2 ", "V5E"])
def test_other_targets_are_refused(name):
    with pytest.raises(ValueError, match=r"is no target. Expected a chip, one of v4, v5e"):
        targets.parse(name)


@pytest.mark.parametrize("format", ["int8", "int4-g32", "int4-g32-affine", "w8a8", "fp8", None])
def test_abstract_weights_are_those_that_quantize_makes(tiny, format):
    made = tiny if format is None else jaxllm.quantize(format)(tiny)
    for path, leaf in flatten(plan.abstract_params(tiny.cfg, format)).items():
        expected = flatten(made.params)[path]
        assert jax.tree.map(lambda x: (x.shape, x.dtype), leaf) == jax.tree.map(lambda x: (x.shape, x.dtype), expected)


@aot
@pytest.mark.parametrize(
    ("target", "sizes", "format", "kv"),
    [
        ("v5e:1x1", (1, 1, 1), "int8", None),
        ("v5e:2x2", (1, 2, 1), "int8", None),
        ("v6e:2x2", (1, 2, 2), "int4-g128", None),
        ("v5p:2x2x1", (2, 2, 1), "int8", "int8"),
    ],
)
def test_a_decode_step_keeps_its_contract_on_tpus(target, sizes, format, kv):
    cfg = dataclasses.replace(SMALL, kv_dtype=kv)
    lower = lowering(cfg, target, sizes, format)
    assert breaches(lower, lower.step(), layers=1, temp_share=0.2) == []


@aot
def test_the_contract_sees_what_breaks_it():
    lower = lowering(SMALL, "v5e:1x1", (1, 1, 1))

    def broken(params, state):
        floats = jax.tree.map(lambda x: x.astype(jnp.float32) * 2, params)
        return floats, jax.tree.map(jnp.copy, state)

    program = jax.jit(broken).lower(lower.params, lower.state)
    rules = {breach.rule for breach in breaches(lower, program, layers=1)}
    assert {"quantised weights have no float copy", "the cache is updated in place"} <= rules
    assert "matmuls run on the matmul units" in rules


@pytest.mark.slow
@aot
def test_extending_few_layers_says_what_all_of_them_do(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path))
    cfg = dataclasses.replace(SMALL, num_layers=12)
    case = plan.Case(targets.parse("v5e:2x2"), 1, 2, 2, "int8", None, 8, 256)
    some, whole = (plan.predict(cfg, case, prompt_tokens=64, exact=exact) for exact in (False, True))
    assert (some.layers, whole.layers) == ((8, 12), (12, 12))
    assert some.argument_bytes == pytest.approx(whole.argument_bytes, rel=0.001)
    assert some.memory_bytes == pytest.approx(whole.memory_bytes, rel=0.1)
    assert some.flops == pytest.approx(whole.flops, rel=0.01)
    assert some.collectives["all-reduce"] == whole.collectives["all-reduce"]
    assert whole.fits
    assert whole.step_ms_low < whole.step_ms_high
    # The roofline: all weights but the embedding, and the cache, are read once.
    params = flatten(plan.abstract_params(cfg, "int8"))
    leaves = [part for path, leaf in params.items() if path != "embed/w" for part in jax.tree.leaves(leaf)]
    read = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / 4
    cache = 2 * 12 * 8 * 256 * 2 * 128 * 2 / 2
    assert read + cache < whole.memory_bytes < 1.15 * (read + cache)
    # Nothing is compiled twice.
    monkeypatch.setattr(plan, "Lowering", None)
    again = plan.predict(cfg, case, prompt_tokens=64)
    assert dataclasses.asdict(again) == dataclasses.asdict(some)


@aot
def test_what_does_not_fit_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path))
    cfg = dataclasses.replace(SMALL, num_layers=2, ffw_dim=1 << 20, embed_dim=8192)
    found = plan.predict(cfg, plan.Case(targets.parse("v5e"), 1, 1, 1, "int8", None, 8, 256), prompt_tokens=16)
    assert not found.fits
    assert re.fullmatch(r"needs [\d.]+GiB of 15.75GiB", found.reason)


@aot
def test_meshes_share_kv_heads_only_where_they_must():
    assert [*plan.meshes(SMALL, targets.parse("v5e:2x4"), 8)] == [(1, 2, 4), (2, 2, 2), (4, 2, 1), (8, 1, 1)]
    assert [*plan.meshes(SMALL, targets.parse("v5e:2x2"), 1)] == [(1, 2, 2)]


def program(**changes):
    cost = hlo_cost.Cost(memory_bytes=0.82e9, flops=1.97e9, cycles=3e6, **changes)
    return plan.Program(1.0, 1.0, 1.0, cost, cost, 0.0)


def test_the_interval_runs_from_the_roofline_to_the_cycles():
    low, high, bottleneck = plan.interval(program(), targets.parse("v5e"))
    assert (low, high, bottleneck) == (pytest.approx(1e-3), pytest.approx(2e-3), "memory")
    _, high, _ = plan.interval(program(kernel_bytes=0.82e9, kernel_flops=1.97e9), targets.parse("v5e"))
    assert high == pytest.approx(3e-3)  # of kernels the compiler has no cycles: their roofline comes on top
    slow_links = program(wire_bytes=0.9e9, collectives={"all-reduce": 2})
    low, high, bottleneck = plan.interval(slow_links, targets.parse("v5e:2x2"))
    assert (low, bottleneck) == (pytest.approx(0.9e9 / (4 * 45e9)), "links")
    assert high == pytest.approx(2e-3 + 2 * low + 2 * 4 * plan.HOP_S)


@aot
def test_the_command_plans_from_a_config_alone(tmp_path, monkeypatch, capsys):
    from jaxllm.cli import main

    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_hf(SMALL)))
    options = ["--batch", "8", "--context", "256", "--prompt-tokens", "64", "--price", "1.2", "--json"]
    assert main(["plan", str(path), "--target", "v5e:1x1", *options, "--plot", str(tmp_path / "plan.png")]) == 0
    out, _ = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    (found,) = result["candidates"]
    assert result["best"] == 0
    assert found["fits"]
    assert found["cost_low"] == pytest.approx(1.2 / 3600 / found["tokens_per_s_high"] * 1e6)
    assert {"target", "mesh", "argument_bytes", "temp_bytes", "step_ms_low", "bottleneck", "compile_s"} <= found.keys()
    assert (tmp_path / "plan.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--target", "v5x"], "'v5x' is no target"),
        (["--target", "v5e", "--batch", "0"], "--batch is '0'; expected positive integers"),
        (["--target", "v5e", "--quantize", "int3"], "'int3' is no format"),
        (["--target", "v5e", "--context", "256", "--prompt-tokens", "300"], "do not fit a context of 256"),
    ],
)
def test_nonsense_is_refused_before_anything_is_compiled(tmp_path, capsys, argv, message):
    from jaxllm.cli import main

    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_hf(SMALL)))
    assert main(["plan", str(path), *argv]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[1]", '{"architectures": ["GPT2LMHeadModel"]}'])
def test_other_files_are_no_config(tmp_path, capsys, text):
    from jaxllm.cli import main

    path = tmp_path / "config.json"
    path.write_text(text)
    assert main(["plan", str(path), "--target", "v5e"]) == 1
    assert "JSON" in (err := capsys.readouterr().err) or "config.json" in err or "not supported" in err
