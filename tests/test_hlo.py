"""Contracts on the compiled programs: what is read, copied and kept in place."""

import dataclasses
import math
import re

import jax
import pytest

import jaxllm
from jaxllm.compile import compile_programs
from jaxllm.kernels import cpu
from jaxllm.params import flatten
from tests.conftest import TINY

# No weight has the extent of an activation: chunks have 16, 64 or 256 tokens.
CONFIG = dataclasses.replace(TINY, vocab_size=320, embed_dim=40, num_heads=6, num_kv_heads=3, ffw_dim=72)
# One layer of it that groups of 32 divide.
GROUPED = dataclasses.replace(
    CONFIG,
    num_layers=1,
    vocab_size=352,
    embed_dim=96,
    num_heads=10,
    num_kv_heads=5,
    head_dim=16,
    ffw_dim=224,
    tie_embeddings=False,
)
STORED = {"int8": "s8", "int4": "s4", "float8_e4m3fn": "f8e4m3fn"}


@pytest.fixture(scope="module", autouse=True)
def plain_xla():
    """What these contracts are about: test_cpu_kernels.py has those of programs with kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "library", lambda: None)
        yield


@pytest.fixture(scope="module")
def programs():
    lm = jaxllm.quantize("int8")(jaxllm.init(CONFIG))
    shapes = jax.eval_shape(lambda params: params, lm.params)  # shapes are enough
    return lm, compile_programs(lm.cfg, shapes, batch=1, max_len=512)


def executables(programs):
    return {"decode": programs.decode} | {f"prefill {chunk}": program for chunk, program in programs.prefill.items()}


def test_quantised_weights_enter_as_int8_and_no_float_copy_leaves_a_fusion(programs):
    check_weights(*programs)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("int8-g32-affine", "w8a8", "w8a8-static", "fp8")]


@pytest.mark.parametrize("format", ["int4-g32", *SLOW])
def test_no_format_has_a_float_copy_of_a_weight(format):
    """Where XLA on CPU has no kernel for a format, the weight is made float by quarters, one after the other."""
    lm = jaxllm.quantize(format, calibration=[[1, 2, 3]])(jaxllm.init(GROUPED))
    shapes = jax.eval_shape(lambda params: params, lm.params)
    programs = compile_programs(lm.cfg, shapes, batch=1, max_len=16)
    check_weights(lm, programs)
    # Nor do quarters lie about: there is never room for the whole of the largest weight, once embedding and head.
    largest = 4 * max(leaf.size for path, leaf in flatten(lm.params).items() if lm.info[path].contracted)
    for name, program in executables(programs).items():
        assert program.memory_analysis().temp_size_in_bytes < largest, name


def check_weights(lm, programs):
    leaves = {path: leaf for path, leaf in flatten(lm.params).items() if lm.info[path].contracted}
    shapes = {leaf.shape: STORED[str(leaf.values.dtype)] for leaf in leaves.values()}
    matrices = set()
    for path, leaf in leaves.items():
        rows = math.prod(leaf.shape[: -lm.info[path].contracted])
        matrices.add(tuple(sorted((rows, leaf.size // rows))))
    for name, program in executables(programs).items():
        text = program.as_text()
        entry = text[text.index("\nENTRY ") :]
        for shape, dtype in shapes.items():
            assert re.search(rf"{dtype}\[{','.join(map(str, shape))}\]\S* parameter\(", entry), (name, shape)
        # Outside fusion bodies, whose values never reach memory, no float value has a weight's extent.
        for line in _outside_fusions(text):
            results = re.match(r".*? = (\(.*?\)|\S+) [\w-]+\(", line)
            for dims in re.findall(r"(?:f32|bf16|f16)\[([\d,]+)\]", results.group(1) if results else ""):
                shape = tuple(int(extent) for extent in dims.split(",") if extent != "1")
                assert shape not in shapes, (name, line)
                assert tuple(sorted(shape)) not in matrices, (name, line)


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


@pytest.fixture(scope="module", params=[1, pytest.param(16, marks=pytest.mark.slow)])
def int8_cache(request):
    lm = jaxllm.quantize_kv()(jaxllm.init(dataclasses.replace(CONFIG, num_layers=2)))
    return lm, request.param, compile_programs(lm.cfg, lm.params, batch=request.param, max_len=48)


def test_an_int8_cache_is_updated_in_place_too(int8_cache):
    lm, batch, programs = int8_cache
    heads = 2 * lm.cfg.num_layers * batch * programs.slots * lm.cfg.num_kv_heads
    for name, program in executables(programs).items():
        assert program.memory_analysis().alias_size_in_bytes >= heads * (lm.cfg.head_dim + 4), name
        aliased = re.search(r"input_output_alias=\{(.*?)\}, entry", program.as_text()).group(1)
        assert aliased.count("alias)") >= 4 * lm.cfg.num_layers, name  # values and scales of keys and values


def of_the_caches_extent(lm, batch, programs):
    """(program, type, operation, line) of each value outside fusions that is as large as a layer's keys or values."""
    K, S, H = lm.cfg.num_kv_heads, programs.slots, lm.cfg.head_dim
    extents = {tuple(sorted(e for e in (batch, K, S, H) if e != 1)), tuple(sorted((batch * K, S, H)))}
    for name, program in executables(programs).items():
        for line in _outside_fusions(program.as_text()):
            if match := re.match(r"\s*(?:ROOT )?%\S+ = (\w+)\[([\d,]+)\]\S* (\S+)\(", line):
                extent = tuple(sorted(int(e) for e in match[2].split(",") if e != "1"))
                if extent in extents and match[3] not in ("parameter", "get-tuple-element", "bitcast"):
                    yield name, match[1], match[3], line


def test_no_copy_of_an_int8_cache(int8_cache):
    lm, _, programs = int8_cache
    written = [
        (name, operation, line) for name, dtype, operation, line in of_the_caches_extent(*int8_cache) if dtype == "s8"
    ]
    for name in executables(programs):
        here = [(operation, line) for program, operation, line in written if program == name]
        assert len(here) == 2 * lm.cfg.num_layers, (name, here)
        assert all(
            operation == "fusion" and re.search("dynamic.update.slice|scatter", line) for operation, line in here
        )


def test_no_more_than_one_layers_keys_or_values_are_float_at_a_time(int8_cache):
    """XLA on CPU has no int8 attention: what it makes float must not add up to the cache that int8 was to save."""
    lm, batch, programs = int8_cache
    for name in executables(programs):
        copies = [line for at, dtype, _, line in of_the_caches_extent(*int8_cache) if at == name and dtype != "s8"]
        assert len(copies) <= 2 * lm.cfg.num_layers, copies
    if batch > 1:  # so that the cache is what is large
        layer = 4 * batch * programs.slots * lm.cfg.num_kv_heads * lm.cfg.head_dim
        assert programs.decode.memory_analysis().temp_size_in_bytes < 2 * layer


def test_collectives_of_a_sharded_step_are_those_of_the_rule_table():
    lm = jaxllm.init(TINY)
    mesh = jaxllm.make_mesh(model=4)
    text = compile_programs(lm.cfg, lm.params, batch=1, max_len=64, mesh=mesh).decode.as_text()
    reduces = [line for line in text.splitlines() if " all-reduce(" in line and "/layer_" in line]
    assert 0 < len(reduces) <= 2 * lm.cfg.num_layers
    others = re.findall(r"^.* (?:all-gather|reduce-scatter|all-to-all|collective-permute)\(.*$", text, re.MULTILINE)
    assert not [line for line in others if "/layer_" in line]
