"""Compiling for TPUs that nobody has at hand, by the real compiler: what it says, and what is made of it."""

import collections
import dataclasses
import importlib.util
import json
import re
import sys

import jax
import jax.numpy as jnp
import pytest

import jaxllm
from jaxllm import contracts, hlo, hlo_cost, plan, prediction, shard, targets
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
    return Lowering(cfg, prediction.abstract_params(cfg, format), batch, context, mesh, rules)


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
    for path, leaf in flatten(prediction.abstract_params(tiny.cfg, format)).items():
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
@pytest.mark.parametrize("kv", [None, "int8"])
def test_decode_steps_in_a_loop_write_the_cache_in_place(kv):
    """Each device has two rows or more, and two KV heads: with one head alone a scatter copies nothing."""
    cfg = dataclasses.replace(SMALL, num_kv_heads=4, kv_dtype=kv)
    lower = lowering(cfg, "v5e:2x2", (2, 2, 1), batch=4, context=4096)
    assert breaches(lower, lower.decode(4), layers=1, temp_share=0.1) == []


@aot
@pytest.mark.parametrize("batch", [1, 8])
def test_a_step_has_two_collectives_a_layer_one_to_look_up_and_one_to_choose(batch):
    lower = lowering(dataclasses.replace(SMALL, num_kv_heads=4, kv_dtype="int8"), "v5e:2x2", (1, 4, 1), batch=batch)
    with targets.uncached():
        compiled = lower.step().compile()
    # With one row as well matmuls run on the matmul units, and no table is laid out anew.
    contract = contracts.Contract(temp_share=0.1)
    assert contracts.check(compiled, lower.params, lower.state, 1, contract) == []
    greedy, _ = hlo_cost.cost(hlo.parse(compiled.as_text()))
    assert sum(greedy.collectives.values()) == 2 + 1 + 1


@aot
def test_options_that_a_compiler_does_not_know_are_left_out(monkeypatch, caplog):
    where = lowering(SMALL, "v5e:1x1", (1, 1, 1))._sharded.of()
    compile_module = sys.modules["jaxllm.compile"]
    assert compile_module._options.__wrapped__(where) == compile_module._TPU_OPTIONS
    monkeypatch.setattr(compile_module, "_TPU_OPTIONS", {"xla_tpu_no_such_thing": "1"})
    assert compile_module._options.__wrapped__(where) is None
    assert "does not know xla_tpu_no_such_thing" in caplog.text


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
    monkeypatch.setattr(plan, "FEW_LAYERS", {"prefill": 4, "step": 8})
    case = prediction.Case(targets.parse("v5e:2x2"), 1, 2, 2, "int8", None, 8, 256)
    some, whole = (plan.predict(cfg, case, prompt_tokens=64, exact=exact) for exact in (False, True))
    assert (some.layers, whole.layers) == ((8, 12), (12, 12))
    assert some.argument_bytes == pytest.approx(whole.argument_bytes, rel=0.001)
    assert some.memory_bytes == pytest.approx(whole.memory_bytes, rel=0.1)
    assert some.flops == pytest.approx(whole.flops, rel=0.01)
    assert some.collectives["all-reduce"] == whole.collectives["all-reduce"]
    assert some.ttft_ms_low == pytest.approx(whole.ttft_ms_low, rel=0.1)
    assert whole.fits
    assert whole.step_ms_low < whole.step_ms_high
    # The roofline: all weights but the embedding, and the cache, are read once.
    params = flatten(prediction.abstract_params(cfg, "int8"))
    leaves = [part for path, leaf in params.items() if path != "embed/w" for part in jax.tree.leaves(leaf)]
    read = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / 4
    cache = 2 * 12 * 8 * 256 * 2 * 128 * 2 / 2
    assert read + cache < whole.memory_bytes < 1.15 * (read + cache)
    # Nothing is compiled twice.
    monkeypatch.setattr(prediction.Program, "of", None)
    again = plan.predict(cfg, case, prompt_tokens=64)
    assert dataclasses.asdict(again) == dataclasses.asdict(some)


@aot
def test_what_does_not_fit_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path))
    cfg = dataclasses.replace(SMALL, num_layers=2, ffw_dim=1 << 20, embed_dim=8192)
    found = plan.predict(cfg, prediction.Case(targets.parse("v5e"), 1, 1, 1, "int8", None, 8, 256), prompt_tokens=16)
    assert not found.fits
    assert re.fullmatch(r"needs [\d.]+GiB of 15.75GiB", found.reason)


@aot
def test_meshes_share_kv_heads_only_where_they_must():
    assert [*plan.meshes(SMALL, targets.parse("v5e:2x4"), 8)] == [(1, 2, 4), (2, 2, 2), (4, 2, 1), (8, 1, 1)]
    assert [*plan.meshes(SMALL, targets.parse("v5e:2x2"), 1)] == [(1, 2, 2)]


def program(**changes):
    cost = hlo_cost.Cost(memory_bytes=0.82e9, flops=1.97e9, cycles=3e6, **changes)
    return prediction.Program(1.0, 1.0, 1.0, cost, cost, 0.0, 0.0, hlo_cost.Cost(), hlo_cost.Cost())


def test_the_interval_runs_from_the_roofline_to_the_cycles():
    low, high, bottleneck = prediction.interval(program(), targets.parse("v5e"))
    assert (low, high, bottleneck) == (pytest.approx(1e-3), pytest.approx(2e-3), "memory")
    _, high, _ = plan.interval(program(kernel_bytes=0.82e9, kernel_flops=1.97e9), targets.parse("v5e"))
    assert high == pytest.approx(3e-3)  # of kernels the compiler has no cycles: their roofline comes on top
    slow_links = program(wire_bytes=0.9e9, collectives={"all-reduce": 2})
    low, high, bottleneck = prediction.interval(slow_links, targets.parse("v5e:2x2"))
    assert (low, bottleneck) == (pytest.approx(0.9e9 / (4 * 45e9)), "links")
    assert high == pytest.approx(2e-3 + 2 * low + 2 * 4 * prediction.HOP_S)


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


@pytest.mark.parametrize(
    ("name", "parts", "expected"),
    [
        ("v5e:4x8", 2, "v5e:4x4"),
        ("v5e:4x4", 2, "v5e:2x4"),
        ("v5e:2x4", 4, "v5e:1x2"),
        ("v5p:2x2x2", 2, "v5p:2x2x1"),
        ("2xv5e:4x4", 2, "v5e:4x4"),
        ("2xv5e:4x4", 4, "v5e:2x4"),
        ("v5e", 1, "v5e:1x1"),
    ],
)
def test_parts_of_slices(name, parts, expected):
    assert str(targets.parse(name).part(parts)) == expected


@pytest.mark.parametrize(("name", "parts"), [("v5e:2x2", 3), ("v5e:2x2", 8), ("2xv5e:4x4", 1), ("3xv5e:4x4", 2)])
def test_other_parts_are_refused(name, parts):
    with pytest.raises(ValueError, match=f"has no {parts} equal parts"):
        targets.parse(name).part(parts)


def fake(monkeypatch, step_s, hbm=1e9):
    """Programs that take so many seconds for each layer, and half as many for what comes beside them."""

    def compiled(stage, case, kind):
        def cost(layers):
            return hlo_cost.Cost(memory_bytes=step_s * layers * case.target.chip.memory_bytes_per_s)

        rest = cost(0.5) if stage.part.predicts else cost(0)
        both = cost(len(stage.layers)) + rest
        return prediction.Program(hbm * len(stage.layers) + 1e9, 0.0, 0.0, both, both, 0.0, 1e9, rest, rest)

    monkeypatch.setattr(plan, "compiled", compiled)
    monkeypatch.setattr(plan, "weight_bytes", lambda stage, case: hbm * len(stage.layers))
    monkeypatch.setattr(targets, "_devices", lambda target: list(range(target.chips)))
    monkeypatch.setattr(shard, "make_mesh", lambda *sizes, devices: None)
    monkeypatch.setattr(
        plan, "_transfer", lambda run, case, number, tokens: (1e-6, 3e-6) if case.stages > 1 else (0, 0)
    )


def test_stages_add_up(monkeypatch):
    cfg = dataclasses.replace(SMALL, num_layers=24)
    fake(monkeypatch, 1e-3)
    case = prediction.Case(targets.parse("v5e:2x2"), 1, 1, 1, "int8", None, 8, 256, stages=4)
    found = plan.predict(cfg, case, prompt_tokens=512)
    assert [stage.layers for stage in found.stages] == [6, 6, 6, 6]
    assert [stage.step_ms_low for stage in found.stages] == pytest.approx([6, 6, 6, 6.5])
    assert found.groups == 4
    assert found.bubble == pytest.approx(3 / 7)
    # Four groups keep the last stage, which is the slowest, always busy.
    assert found.step_ms_low == pytest.approx(4 * 6.5)
    # Two chunks of four groups: the first through all stages, then one after the other through the slowest.
    assert found.ttft_ms_low == pytest.approx(24.5 + 3e-3 + 7 * 6.5)
    assert found.tokens_per_s_high == pytest.approx(8 / 26e-3)
    # A cache of 1 GB for each group, beside 6 GB of weights.
    assert found.argument_bytes == pytest.approx(10e9)
    alone = plan.predict(cfg, dataclasses.replace(case, batch=1), prompt_tokens=16)
    assert (alone.groups, alone.bubble) == (1, 0.75)
    assert alone.step_ms_low == pytest.approx(24.5 + 4e-3)
    assert alone.step_ms_high == pytest.approx(24.5 + 12e-3)


def test_the_stage_that_does_not_fit_is_named(monkeypatch):
    fake(monkeypatch, 1e-3, hbm=2e9)
    cfg = dataclasses.replace(SMALL, num_layers=15)
    case = prediction.Case(targets.parse("v5e:1x2"), 1, 1, 1, "int8", None, 2, 256, stages=2)
    found = plan.predict(cfg, case)
    assert [stage.fits for stage in found.stages] == [False, True]
    assert found.reason.startswith("stage 1 needs 18.0 GB of 16.9")


@aot
def test_each_stage_is_compiled_for_its_part_of_the_slice(tmp_path, monkeypatch, capsys):
    from jaxllm.cli import main

    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_hf(dataclasses.replace(SMALL, num_layers=2))))
    options = ["--batch", "16", "--context", "16", "--prompt-tokens", "16", "--json"]
    assert main(["plan", str(path), "--target", "v5e:1x2", "--stages", "2", *options]) == 0
    out, _ = capsys.readouterr()
    (found,) = json.loads(out.splitlines()[-1])["candidates"]
    first, last = found["stages"]
    assert (found["chips"], found["groups"], found["bubble"]) == (2, 2, pytest.approx(1 / 3))
    # The last reads the head as well: 4096 x 2048 bytes at 0.82 TB/s.
    assert last["step_ms_low"] - first["step_ms_low"] == pytest.approx(4096 * 2048 / 0.82e9, rel=0.3)
    assert first["transfer_ms_low"] == pytest.approx((8 * 2048 * 2 / 45e9 + prediction.HOP_S) * 1e3)
    assert found["step_ms_low"] >= sum(stage["step_ms_low"] + stage["transfer_ms_low"] for stage in found["stages"])
    assert not found["collectives"]
    assert "bubble" in out


@aot
def test_a_table_of_rules_chooses_the_collectives(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path))
    kinds = {}
    for name in ("tensor", "scatter"):
        lower = lowering(SMALL, "v5e:2x2", (1, 2, 2), context=16, rules=shard.TABLES[name])
        with targets.uncached():
            module = hlo.parse(lower.prefill(16).compile().as_text())
        inside = (hlo_cost.collective(module, i) for _, i in module.executed() if "layer_" in i.source)
        kinds[name] = collections.Counter(found[0] for found in inside if found)
    assert kinds["tensor"] == {"all-reduce": 2}
    # The all-reduces are those of the norms, of a number for each token.
    assert kinds["scatter"] == {"reduce-scatter": 2, "all-gather": 2, "all-reduce": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rules", "tensor,ring"], "--rules has 'ring'; expected some of tensor, scatter, sequence, fully"),
        (["--stages", "2"], "stages=2; a model of 1 layers has 1 to 1"),
        (["--stages", "0"], "--stages is '0'; expected positive integers"),
    ],
)
def test_choices_that_are_none_are_refused(tmp_path, capsys, options, message):
    from jaxllm.cli import main

    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_hf(SMALL)))
    assert main(["plan", str(path), "--target", "v5e:2x2", *options]) == 1
    assert message in capsys.readouterr().err
