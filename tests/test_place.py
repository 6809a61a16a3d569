"""Loading onto a mesh gives, bit for bit, what loading and then placing gives, and reads no more than it places."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

import jaxllm
from jaxllm import shard
from jaxllm.checkpoint import tensors
from tests.conftest import FAMILIES, TINY
from tests.test_checkpoint import random_lm, write_gguf

BIASED = dataclasses.replace(FAMILIES["qwen2"], num_layers=2, tie_embeddings=False)
UNEVEN = dataclasses.replace(TINY, num_layers=2, num_heads=(8, 4), num_kv_heads=(4, 2), ffw_dim=(64, 48))


def both(path, mesh, rules=shard.RULES, dtype=None):
    """The leaves of a model loaded onto the mesh, and of one loaded and then put there."""
    lm, placed = jaxllm.load(path, dtype), jaxllm.load(path, dtype, mesh=mesh, rules=rules)
    assert (placed.cfg, placed.ledger) == (lm.cfg, lm.ledger)
    expected = jax.device_put(lm.params, shard.param_shardings(lm.cfg, lm.params, mesh, rules))
    assert jax.tree.structure(placed.params) == jax.tree.structure(expected)
    return zip(jax.tree.leaves(placed.params), jax.tree.leaves(expected), strict=True)


def assert_same(pairs):
    for ours, expected in pairs:
        assert (ours.shape, ours.dtype, ours.sharding) == (expected.shape, expected.dtype, expected.sharding)
        for a, b in zip(ours.addressable_shards, expected.addressable_shards, strict=True):
            assert (a.device, a.index) == (b.device, b.index)
            assert np.asarray(a.data).tobytes() == np.asarray(b.data).tobytes()


@pytest.mark.parametrize("mesh", [{"model": 4}, {"data": 2, "model": 2}, {"model": 2, "share": 2}], ids=str)
def test_safetensors(tmp_path, mesh):
    jaxllm.export_hf(random_lm(BIASED), tmp_path / "hf")
    assert_same(both(tmp_path / "hf", jaxllm.make_mesh(**mesh)))
    assert_same(both(tmp_path / "hf", jaxllm.make_mesh(**mesh), shard.FULLY_SHARDED, "bfloat16"))


@pytest.mark.parametrize("format", ["float", "sparse", "int8", "int4-g16-affine", "w8a8-static"])
def test_own_format(tmp_path, format):
    lm = random_lm(UNEVEN)
    if format == "sparse":
        lm = jaxllm.prune(0.7, "magnitude")(lm)
    elif format != "float":
        lm = jaxllm.quantize(format, calibration=np.arange(64).reshape(2, 32))(lm)
    jaxllm.save(lm, tmp_path / "own")
    assert_same(both(tmp_path / "own", jaxllm.make_mesh(data=2, model=2)))


def test_a_saved_int4_model_runs_on_one_device_too(tmp_path):
    lm = jaxllm.quantize("int4-g16")(random_lm(dataclasses.replace(TINY, num_layers=1)))
    jaxllm.save(lm, tmp_path / "own")
    answers = [jaxllm.compile(m, max_len=16).generate([1, 2])[0].tokens for m in (lm, jaxllm.load(tmp_path / "own"))]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("format", ["int8-g16-affine", "int4", "w8a8-static", "fp8"])
def test_compressed_tensors(tmp_path, format):
    lm = jaxllm.quantize(format, calibration=np.arange(64).reshape(2, 32))(random_lm(dataclasses.replace(TINY)))
    jaxllm.export_compressed(lm, tmp_path / "packed")
    assert_same(both(tmp_path / "packed", jaxllm.make_mesh(model=4)))


@pytest.mark.parametrize(("arch", "kind"), [("llama", "Q8_0"), ("llama", "F16"), ("qwen2", "F32")])
def test_gguf(tmp_path, arch, kind):
    lm = random_lm(BIASED if arch == "qwen2" else dataclasses.replace(TINY, tie_embeddings=False))
    write_gguf(tmp_path / "m.gguf", lm, arch=arch, kind=kind)
    assert_same(both(tmp_path / "m.gguf", jaxllm.make_mesh(data=2, model=2)))


def test_a_mesh_that_does_not_divide_is_refused_before_reading(tmp_path, monkeypatch):
    jaxllm.export_hf(random_lm(dataclasses.replace(TINY, num_kv_heads=2)), tmp_path / "hf")
    monkeypatch.setattr(jax, "make_array_from_callback", lambda *args: pytest.fail("a weight was read"))
    with pytest.raises(ValueError, match="num_kv_heads=2 does not divide"):
        jaxllm.load(tmp_path / "hf", mesh=jaxllm.make_mesh(model=4))


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 4), (3, 2, 2, 5)])
def test_any_box_of_a_tensor_is_read_and_nothing_else(tmp_path, shape):
    whole = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    file = tmp_path / "t.safetensors"
    pair = {"before": np.ones(3, np.float32), "it": whole.reshape(shape[0], -1)}
    write = {name: tensors.Tensor("F32", x.shape, lambda x=x: x) for name, x in pair.items()}
    tensors.write_file(file, write)
    for bounds in itertools.product(*([(0, size), (0, 1), (size // 2, size)] for size in shape)):
        box = tuple(slice(*ends) for ends in bounds)
        np.testing.assert_array_equal(tensors.read_tensor(file, "it", shape, box), whole[box])
        runs = list(tensors._runs(shape, box, np.empty(whole[box].shape, np.float32)))
        assert sum(piece.nbytes for _, piece in runs) == whole[box].nbytes
    with open(file, "r+b") as damaged:
        damaged.truncate(file.stat().st_size - 1)
    with pytest.raises(ValueError, match="no complete safetensors file"):
        tensors.read_tensor(file, "it")
