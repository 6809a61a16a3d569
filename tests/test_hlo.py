"""Contracts on the compiled programs: what is read, copied and kept in place."""

import dataclasses
import math
import re

import jax
import pytest

import jaxllm
from jaxllm.compile import compile_programs
from jaxllm.params import flatten
from tests.conftest import TINY

# No weight has the extent of an activation: chunks have 16, 64 or 256 tokens.
CONFIG = dataclasses.replace(TINY, vocab_size=320, embed_dim=40, num_heads=6, num_kv_heads=3, ffw_dim=72)


@pytest.fixture(scope="module")
def programs():
    lm = jaxllm.quantize("int8")(jaxllm.init(CONFIG))
    shapes = jax.eval_shape(lambda params: params, lm.params)  # shapes are enough
    return lm, compile_programs(lm.cfg, shapes, batch=1, max_len=512)


def executables(programs):
    return {"decode": programs.decode} | {f"prefill {chunk}": program for chunk, program in programs.prefill.items()}


def test_quantised_weights_enter_as_int8_and_no_float_copy_leaves_a_fusion(programs):
    lm, programs = programs
    shapes = {leaf.values.shape for path, leaf in flatten(lm.params).items() if lm.info[path].contracted}
    matrices = {tuple(sorted((lm_rows(shape), math.prod(shape) // lm_rows(shape)))) for shape in shapes}
    for name, program in executables(programs).items():
        text = program.as_text()
        entry = text[text.index("\nENTRY ") :]
        for shape in shapes:
            assert re.search(rf"s8\[{','.join(map(str, shape))}\]\S* parameter\(", entry), (name, shape)
        # Outside fusion bodies, whose values never reach memory, no float value has a weight's extent.
        for line in _outside_fusions(text):
            results = re.match(r".*? = (\(.*?\)|\S+) [\w-]+\(", line)
            for dims in re.findall(r"(?:f32|bf16|f16)\[([\d,]+)\]", results.group(1) if results else ""):
                shape = tuple(int(extent) for extent in dims.split(",") if extent != "1")
                assert shape not in shapes, (name, line)
                assert tuple(sorted(shape)) not in matrices, (name, line)


def lm_rows(shape):
    """Output channels of a weight: all axes but the contracted ones, here head_dim and heads of "o" or the last."""
    return shape[0] if len(shape) == 3 and shape[0] == CONFIG.embed_dim else math.prod(shape[:-1])


def _outside_fusions(text):
    fused = set(re.findall(r"fusion\(.*calls=%?([\w.-]+)", text))
    body = None
    for line in text.splitlines():
        if match := re.match(r"(?:ENTRY )?%([\w.-]+) .*\{$", line):
            body = match.group(1)
        elif body not in fused and " parameter(" not in line and "get-tuple-element(" not in line:
            yield line


def test_the_check_above_sees_a_float_copy():
    def upcast(x, w):
        return x @ w.astype(x.dtype).T

    shapes = jax.ShapeDtypeStruct((300, 96), "float32"), jax.ShapeDtypeStruct((64, 96), "int8")
    text = jax.jit(upcast).lower(*shapes).compile().as_text()
    found = [line for line in _outside_fusions(text) if re.search(r"= f32\[(64,96|96,64)\]", line)]
    assert found


def test_the_state_is_updated_in_place(programs):
    lm, programs = programs
    cache_bytes = 2 * lm.cfg.num_layers * programs.slots * lm.cfg.num_kv_heads * lm.cfg.head_dim * 4
    for name, program in executables(programs).items():
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes >= cache_bytes, name
        aliased = re.search(r"input_output_alias=\{(.*?)\}, entry", program.as_text()).group(1)
        assert aliased.count("alias)") >= 2 * lm.cfg.num_layers, name


def test_no_copy_of_the_cache_in_a_decode_step(programs):
    lm, programs = programs
    K, S, H = lm.cfg.num_kv_heads, programs.slots, lm.cfg.head_dim
    caches = {f"{K},{S},{H}", f"{K},{H},{S}"}
    writes = 0
    for line in _outside_fusions(programs.decode.as_text()):
        if match := re.match(r"\s*(?:ROOT )?%(\S+) = f32\[(?:1,)?([\d,]+)\]\S* (\S+)\(", line):
            name, extent, operation = match.groups()
            if extent in caches and operation not in ("parameter", "get-tuple-element", "bitcast"):
                assert operation == "fusion", line
                assert "dynamic-update-slice" in name, line
                writes += 1
    assert writes == 2 * lm.cfg.num_layers


def test_collectives_of_a_sharded_step_are_those_of_the_rule_table():
    lm = jaxllm.init(TINY)
    mesh = jaxllm.make_mesh(model=4)
    text = compile_programs(lm.cfg, lm.params, batch=1, max_len=64, mesh=mesh).decode.as_text()
    reduces = [line for line in text.splitlines() if " all-reduce(" in line and "/layer_" in line]
    assert 0 < len(reduces) <= 2 * lm.cfg.num_layers
    others = re.findall(r"^.* (?:all-gather|reduce-scatter|all-to-all|collective-permute)\(.*$", text, re.MULTILINE)
    assert not [line for line in others if "/layer_" in line]
