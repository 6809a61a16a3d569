"""Weights in and out: what goes in comes out, and what is damaged is refused by name."""

import dataclasses
import errno
import json
import shutil
import struct
import subprocess
import sys
import types

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

import jaxllm
from jaxllm import arrays, checkpoint, hub, lm
from jaxllm.checkpoint import gguf as ours
from jaxllm.checkpoint import hf, leaves, names, native, pad
from jaxllm.config import LinearRope, Llama3Rope, ModelConfig
from jaxllm.params import flatten, unflatten
from jaxllm.text import Tokenizer

TINY = ModelConfig(
    vocab_size=64, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffw_dim=64, max_len=128
)
TIED = dataclasses.replace(TINY, tie_embeddings=True)
BIAS = dataclasses.replace(TINY, qkv_bias=True)
QK_NORM = dataclasses.replace(TINY, qk_norm=True, head_dim=16, tie_embeddings=True)
WINDOW = dataclasses.replace(TINY, sliding_window=7, rope_scaling=LinearRope(2.0))
LLAMA3 = dataclasses.replace(TINY, rope_theta=500000.0, rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 8192))
CONFIGS = {"tiny": TINY, "tied": TIED, "bias": BIAS, "qk_norm": QK_NORM, "window": WINDOW, "llama3": LLAMA3}
TOKENS = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 12))


def random_lm(cfg=TINY, seed=0):
    """Random in every leaf: norms of ones and biases of zeros would hide a mistake."""
    rng, info = np.random.default_rng(seed), lm.param_info(cfg)
    flat = {path: jnp.asarray(rng.normal(0, 0.3, i.shape).astype(jnp.dtype(cfg.dtype))) for path, i in info.items()}
    return lm.LM(cfg, unflatten(flat), (lm.Entry("init", {"seed": seed}),))


def quantised(model):
    return jaxllm.quantize({r".*mlp.*|embed.*": "int8"})(model)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    vocab = {c: i for i, c in enumerate("abcdefghij")} | {"</s>": 10}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.add_special_tokens(["</s>"])
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3]}))
    return Tokenizer.from_dir(path)


def assert_same(a, b):
    """Bit for bit, types included."""
    assert jax.tree.structure(a.params) == jax.tree.structure(b.params)
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    assert a.cfg == b.cfg


def load(path, dtype=None):
    return checkpoint.load_path(path, origin="test", dtype=dtype)


def refuses(path, *words, error=ValueError):
    with pytest.raises(error) as caught:
        load(path)
    for word in (str(path), *words):
        assert str(word) in str(caught.value)


# --- names


@pytest.mark.parametrize("fmt", ["hf", "gguf"])
def test_names_are_distinct(fmt):
    cfg = dataclasses.replace(BIAS, qk_norm=True, num_layers=12)
    stored = [names.stored_name(path, fmt) for path in lm.param_info(cfg)]
    assert len(set(stored)) == len(stored) == 3 + 12 * 14


def test_names_in_both_formats():
    assert names.stored_name("layers_10/attn/q/b", "hf") == "model.layers.10.self_attn.q_proj.bias"
    assert names.stored_name("layers_3/attn/o/w", "gguf") == "blk.3.attn_output.weight"
    assert names.stored_shape(lm.param_info(TINY)["layers_0/attn/o/w"]) == (32, 32)


# --- jaxllm's own format


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("quantise", [False, True])
def test_save_then_load_is_bitwise(tmp_path, dtype, quantise, capfd, caplog):
    model = random_lm(dataclasses.replace(LLAMA3, dtype=dtype, qkv_bias=True))
    model = quantised(model) if quantise else model
    capfd.readouterr()
    checkpoint.save(model, tmp_path / "a" / "model")
    loaded = load(tmp_path / "a" / "model")
    assert_same(model, loaded)
    assert loaded.ledger == model.ledger
    assert loaded.tokenizer is None
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["model"]


NATIVE = {
    "int4-g32": jaxllm.quantize("int4-g32"),
    "int4-g32-affine": jaxllm.quantize("int4-g32-affine"),
    "int8-g32-affine": jaxllm.quantize("int8-g32-affine"),
    "fp8": jaxllm.quantize("fp8"),
    "w8a8": jaxllm.quantize("w8a8"),
    "w8a8-static": jaxllm.quantize("w8a8-static", calibration=TOKENS),
    "some float, some int4 of odd size": jaxllm.quantize({r"layers_0/mlp/.*": "int4-affine", r".*/o/w": "int8"}),
    "sparse": jaxllm.prune(0.6),
    "sparse and int4": jaxllm.chain(jaxllm.prune(0.6), jaxllm.quantize({r".*/mlp/.*": "int4"})),
    "per-layer widths": jaxllm.compact(ffn=[32, 57], kv_heads=[1, 2], calibration=TOKENS),
    "int8 cache": jaxllm.quantize_kv(),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in NATIVE), ("int4-g32-affine", "bfloat16"), ("sparse", "bfloat16")],
)
def test_every_leaf_is_restored_bitwise(tmp_path, name, dtype):
    model = NATIVE[name](random_lm(dataclasses.replace(BIAS, dtype=dtype)))
    checkpoint.save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert_same(model, loaded)
    assert [entry.name for entry in loaded.ledger] == [entry.name for entry in model.ledger]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sparse_leaves_keep_every_bit(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(leaves, "_CHUNK", 64)  # several pieces, and a last one that is not whole
    model = jaxllm.prune(0.7, match=r".*")(
        random_lm(dataclasses.replace(TINY, dtype=dtype, vocab_size=67, embed_dim=31))
    )
    odd = jnp.asarray([-0.0, np.nan, -np.nan, np.inf, -np.inf, float(jnp.finfo(dtype).smallest_subnormal)], dtype)
    flat = flatten(model.params)
    flat["layers_1/mlp/up/w"] = flat["layers_1/mlp/up/w"].at[3, : odd.size].set(odd)
    flat["layers_0/mlp/up/w"] = jnp.zeros_like(flat["layers_0/mlp/up/w"])
    flat["layers_0/mlp/gate/w"] = -jnp.zeros_like(flat["layers_0/mlp/gate/w"])
    model = dataclasses.replace(model, params=unflatten(flat))
    checkpoint.save(model, tmp_path / "model")
    kinds = {k: v["kind"] for k, v in json.loads((tmp_path / "model" / "jaxllm.json").read_text())["leaves"].items()}
    assert kinds["layers_0/mlp/up/w"] == kinds["layers_1/mlp/up/w"] == kinds["head/w"] == "sparse"
    assert kinds["layers_0/mlp/gate/w"] == kinds["final_norm/w"] == "array"
    assert_same(model, load(tmp_path / "model"))


def test_files_are_as_small_as_they_say(tmp_path):
    cfg = dataclasses.replace(TINY, embed_dim=128, ffw_dim=512)
    model, sizes = random_lm(cfg), {}
    for name, transform in {
        "float": lambda model: model,
        "sparse": jaxllm.prune(0.75),
        "int8": jaxllm.quantize({".*": "int8"}),
        "int4": jaxllm.quantize({".*": "int4"}),
    }.items():
        checkpoint.save(transform(model), tmp_path / name)
        sizes[name] = sum(file.stat().st_size for file in (tmp_path / name / "arrays").rglob("*") if file.is_file())
    in_layers = sum(w.size for w in jax.tree.leaves([model.params["layers_0"], model.params["layers_1"]]))
    assert sizes["float"] > 0.85 * model.weight_bytes  # random bits do not compress
    assert sizes["sparse"] < sizes["float"] - in_layers * (4 * 0.75 - 1 / 8) * 0.8
    assert sizes["int4"] < 0.6 * sizes["int8"] < 0.2 * sizes["float"]


def test_dtype_casts_the_floats_among_new_kinds(tmp_path):
    model = NATIVE["sparse and int4"](random_lm())
    checkpoint.save(model, tmp_path / "model")
    loaded = load(tmp_path / "model", "bfloat16")
    for path, leaf in flatten(model.params).items():
        mine = flatten(loaded.params)[path]
        assert_leaf(mine, leaf if isinstance(leaf, arrays.QArray) else leaf.astype("bfloat16"))


def assert_leaf(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, np.asarray(x).tobytes()) == (y.dtype, np.asarray(y).tobytes())


def test_arrays_larger_than_orbax_may_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "_ORBAX_BYTES", 1)
    checkpoint.save(quantised(random_lm()), tmp_path / "model")
    assert_same(load(tmp_path / "model"), quantised(random_lm()))


def test_load_by_path(tmp_path):
    checkpoint.export_hf(random_lm(), tmp_path / "model")
    model = checkpoint.load(tmp_path / "model", dtype="bfloat16")
    assert model.cfg.dtype == "bfloat16"
    assert model.ledger[0].args["origin"] == hub.resolve(tmp_path / "model").origin


def test_save_keeps_the_tokenizer(tmp_path, tokenizer):
    checkpoint.save(dataclasses.replace(random_lm(), tokenizer=tokenizer), tmp_path / "model")
    loaded = load(tmp_path / "model").tokenizer
    assert loaded.encode("abc") == [0, 1, 2]
    assert loaded.stop_ids == {3, 10}


def test_loaded_weights_are_those_jax_would_make(tmp_path):
    checkpoint.save(random_lm(), tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert jnp.array_equal(lm.logits(loaded, TOKENS), lm.logits(random_lm(), TOKENS))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_native_dtype_casts_only_float_weights(tmp_path, dtype):
    model = quantised(random_lm())
    checkpoint.save(model, tmp_path / "model")
    loaded = load(tmp_path / "model", dtype)
    assert loaded.cfg == dataclasses.replace(model.cfg, dtype=dtype)
    assert loaded.ledger == model.ledger
    params = jax.tree.map(
        lambda w: w if isinstance(w, arrays.QArray) else w.astype(dtype),
        model.params,
        is_leaf=lambda w: isinstance(w, arrays.QArray),
    )
    assert_same(loaded, dataclasses.replace(model, cfg=loaded.cfg, params=params))


@pytest.mark.parametrize("write", [checkpoint.save, checkpoint.export_hf])
def test_float16_refuses_what_it_cannot_hold(tmp_path, write):
    model = random_lm()
    flat = flatten(model.params)
    flat["layers_1/mlp/up/w"] = flat["layers_1/mlp/up/w"].at[0, 0].set(1e5)
    write(dataclasses.replace(model, params=unflatten(flat)), tmp_path / "model")
    with pytest.raises(ValueError, match=r"layers.1.mlp.up.*float16"):
        load(tmp_path / "model", "float16")
    with pytest.raises(ValueError, match="int8"):
        load(tmp_path / "model", "int8")


WRITERS = pytest.mark.parametrize("write", [checkpoint.save, checkpoint.export_hf])


@WRITERS
def test_writes_into_an_empty_directory_only(tmp_path, write):
    write(random_lm(), tmp_path)  # empty
    assert_same(load(tmp_path), random_lm())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match=r"exists.*another path"):
        write(random_lm(), tmp_path)
    with pytest.raises(FileExistsError):
        write(random_lm(), tmp_path / "config.json" if write is checkpoint.export_hf else tmp_path / "jaxllm.json")
    assert sorted(tmp_path.rglob("*")) == before


@WRITERS
def test_full_disk_is_told_before_writing(tmp_path, write, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"needs .* GB and .* has") as caught:
        write(random_lm(), tmp_path / "new" / "model")
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


@WRITERS
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "disk full")])
def test_interrupted_write_leaves_nothing(tmp_path, write, error, monkeypatch, tokenizer):
    def stop(self, path):
        (path / "tokenizer.json").write_text("half")
        raise error

    monkeypatch.setattr(Tokenizer, "save", stop)  # after the weights
    with pytest.raises((KeyboardInterrupt, OSError), match=r"disk full|^$"):
        write(dataclasses.replace(random_lm(), tokenizer=tokenizer), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_disk_that_fills_up_leaves_nothing(tmp_path):
    code = (
        "import resource, signal, sys; from jaxllm import checkpoint, lm\n"
        "from jaxllm.config import ModelConfig\n"
        "model = lm.init(ModelConfig(512, 256, 2, 4, 2, 64, 512, 128))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "for write in (checkpoint.save, checkpoint.export_hf):\n"
        "    try: write(model, sys.argv[1] + '/model')\n"
        "    except Exception as error: print(type(error).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert len(done.stdout.split()) == 2, done.stderr
    assert not list(tmp_path.iterdir())


def test_save_refuses_weights_that_are_not_its_configs(tmp_path):
    model = random_lm()
    for cfg, word in (
        (TIED, "head/w"),
        (BIAS, "attn/q/b"),
        (dataclasses.replace(TINY, dtype="bfloat16"), "bfloat16"),
        (dataclasses.replace(TINY, ffw_dim=96), "96"),
        (dataclasses.replace(TINY, num_layers=10**8), "layers"),
    ):
        for write in (checkpoint.save, checkpoint.export_hf):
            with pytest.raises(ValueError, match=word):
                write(dataclasses.replace(model, cfg=cfg), tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    checkpoint.save(quantised(random_lm()), path)
    return path


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def test_changed_or_missing_arrays_are_noticed(saved, copy):
    files = [p.relative_to(saved) for p in (saved / "arrays").rglob("*") if p.is_file()]
    assert files
    assert {file.parts[1] for file in files} == {"embed", "layers_0", "layers_1", "final_norm", "head"}
    for file in files:
        stored = (saved / file).read_bytes()
        middle = len(stored) // 2
        for damaged in (None, stored[:middle], stored[:middle] + bytes([stored[middle] ^ 16]) + stored[middle + 1 :]):
            (copy / file).unlink()
            if damaged is not None:
                (copy / file).write_bytes(damaged)
            refuses(copy, file.name, "Copy or save")
            (copy / file).write_bytes(stored)
    load(copy)
    shutil.rmtree(copy / "arrays")
    refuses(copy, "lacks")


def changed(manifest, field, value):
    """Of the embedding, which is quantised."""
    leaf = manifest["leaves"]["embed/w"]
    return manifest | {"leaves": {**manifest["leaves"], "embed/w": {**leaf, field: value}}}


def sparse(manifest, nonzeros):
    leaf = {"kind": "sparse", "shape": [64, 32], "dtype": "float32", "nonzeros": nonzeros}
    return manifest | {"leaves": {**manifest["leaves"], "head/w": leaf}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m | {"version": 1}, ["version 1", "reads 2", "Make it again"]),
        (lambda m: {}, ["version None"]),
        (lambda m: m | {"config": {**m["config"], "experts": 8}}, ["experts"]),
        (lambda m: m | {"config": {**m["config"], "num_layers": 10**9}}, ["layers"]),
        (lambda m: m | {"config": {**m["config"], "ffw_dim": 96}}, ["mlp/down/w", "96"]),
        (lambda m: m | {"config": 3}, ["jaxllm.json"]),
        (lambda m: {k: v for k, v in m.items() if k != "ledger"}, ["ledger"]),
        (lambda m: m | {"ledger": [{"nome": "load"}]}, ["nome"]),
        (lambda m: m | {"leaves": {k: v for k, v in m["leaves"].items() if k != "head/w"}}, ["lacks head/w"]),
        (lambda m: m | {"leaves": {**m["leaves"], "tail/w": {}}}, ["tail/w"]),
        (lambda m: m | {"leaves": {**m["leaves"], "head/w": 1}}, ["jaxllm.json"]),
        (lambda m: m | {"leaves": {**m["leaves"], "head/w": {**m["leaves"]["head/w"], "kind": "int3"}}}, ["int3"]),
        (lambda m: m | {"leaves": {**m["leaves"], "head/w": {**m["leaves"]["head/w"], "dtype": "int8"}}}, ["int8"]),
        (lambda m: m | {"leaves": {**m["leaves"], "final_norm/w": {"kind": "qarray"}}}, ["no matmul weight"]),
        (lambda m: changed(m, "groups", 3), ["embed/w", "3"]),
        (lambda m: changed(m, "groups", "1"), ["embed/w"]),
        (lambda m: changed(m, "groups", 10**9), ["embed/w"]),
        (lambda m: changed(m, "scale_dtype", "float64"), ["float64"]),
        (lambda m: changed(m, "zero_point", 1), ["embed/w"]),
        (lambda m: changed(m, "x_scale", True), ["embed/w"]),
        (lambda m: {**m, "leaves": {**m["leaves"], "embed/w": {"kind": "qarray"}}}, ["KeyError"]),
        (lambda m: sparse(m, -1), ["head/w", "-1"]),
        (lambda m: sparse(m, 64 * 32 + 1), ["head/w"]),
        # Right in itself, and not what the arrays are:
        (lambda m: sparse(m, 7), ["cannot be read"]),
        (lambda m: changed(m, "zero_point", True), ["cannot be read"]),
        (lambda m: changed(m, "groups", 2), ["cannot be read"]),
        (lambda m: changed(m, "dtype", "int4"), ["cannot be read"]),
        (
            lambda m: m | {"leaves": {**m["leaves"], "head/w": m["leaves"]["embed/w"]}},
            ["cannot be read"],
        ),
    ],
)
def test_manifest_is_checked(copy, change, words):
    file = copy / "jaxllm.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    refuses(copy, *words)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100000, "\x00"])
def test_manifest_that_is_no_json(copy, text):
    (copy / "jaxllm.json").write_text(text)
    refuses(copy, "jaxllm.json")


# --- Hugging Face


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shard_bytes", [2_000_000_000, 9000])
def test_export_then_load_is_bitwise(tmp_path, name, shard_bytes, monkeypatch):
    monkeypatch.setattr(hf, "_SHARD_BYTES", shard_bytes)
    for dtype in ("float32", "bfloat16", "float16"):
        model = random_lm(dataclasses.replace(CONFIGS[name], dtype=dtype))
        checkpoint.export_hf(model, tmp_path / dtype)
        loaded = load(tmp_path / dtype)
        assert_same(model, loaded)
        args = {"origin": "test", "format": "safetensors", "dtype": dtype}
        assert loaded.ledger == (lm.Entry("load", args),)
    shards = list((tmp_path / "float32").glob("*.safetensors"))
    assert len(shards) == 1 or shard_bytes == 9000
    assert (tmp_path / "float32/model.safetensors.index.json").exists() == (len(shards) > 1)


def test_export_dequantises(tmp_path):
    model = quantised(random_lm())
    checkpoint.export_hf(model, tmp_path / "model")
    floats = {path: arrays.dequantize(w) for path, w in flatten(model.params).items()}
    assert_same(load(tmp_path / "model"), dataclasses.replace(model, params=unflatten(floats)))


def test_export_is_what_safetensors_reads(tmp_path):
    model = random_lm()
    checkpoint.export_hf(model, tmp_path / "model")
    stored = safetensors.numpy.load_file(tmp_path / "model" / "model.safetensors")
    assert np.array_equal(stored["model.layers.1.self_attn.q_proj.weight"].reshape(4, 8, 32), q_of(model))
    assert len(stored) == len(model.info)


def q_of(model):
    return np.asarray(model.params["layers_1"]["attn"]["q"]["w"])


def test_export_names_the_stop_ids(tmp_path, tokenizer):
    checkpoint.export_hf(dataclasses.replace(random_lm(), tokenizer=tokenizer), tmp_path / "with")
    checkpoint.export_hf(random_lm(), tmp_path / "without")
    config = json.loads((tmp_path / "with/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (None, [3, 10])
    assert json.loads((tmp_path / "with/generation_config.json").read_text())["eos_token_id"] == [3, 10]
    assert json.loads((tmp_path / "without/config.json").read_text())["eos_token_id"] is None
    assert load(tmp_path / "with").tokenizer.stop_ids == {3, 10}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_hf_dtype_is_a_cast(tmp_path, dtype):
    model = random_lm(dataclasses.replace(TINY, dtype="bfloat16"))
    checkpoint.export_hf(model, tmp_path / "model")
    cast = jax.tree.map(lambda w: w.astype(dtype), model.params)
    cfg = dataclasses.replace(TINY, dtype=dtype)
    assert_same(load(tmp_path / "model", dtype), dataclasses.replace(model, cfg=cfg, params=cast))


def write_hf(path, cfg=TINY, tensors=None, **changes):
    """A Hugging Face directory, with some tensors and config fields replaced; None removes."""
    checkpoint.export_hf(random_lm(cfg), path)
    stored = safetensors.numpy.load_file(path / "model.safetensors") | (tensors or {})
    safetensors.numpy.save_file({k: v for k, v in stored.items() if v is not None}, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_hf_ignores_what_follows_from_the_config(tmp_path):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    assert_same(load(write_hf(tmp_path / "a", TINY, extra)), random_lm())
    extra = {"lm_head.weight": np.ones((64, 32), np.float32)}
    assert_same(load(write_hf(tmp_path / "b", TIED, extra)), random_lm(TIED))


@pytest.mark.parametrize("name", ["bias", "qk_norm"])
def test_export_pads_layers_of_different_widths(tmp_path, name):
    cfg = dataclasses.replace(CONFIGS[name], num_layers=3, num_heads=8, num_kv_heads=4)
    model = jaxllm.compact(ffn=[40, 64, 24], kv_heads=[1, 3, 2], calibration=TOKENS)(random_lm(cfg))
    checkpoint.export_hf(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert loaded.cfg == dataclasses.replace(cfg, num_heads=6, num_kv_heads=3)
    assert np.allclose(lm.logits(loaded, TOKENS), lm.logits(model, TOKENS), rtol=0, atol=1e-5)
    narrow, wide = model.params["layers_0"], loaded.params["layers_0"]
    assert jnp.array_equal(wide["mlp"]["down"]["w"][:, :40], narrow["mlp"]["down"]["w"])
    assert not wide["mlp"]["down"]["w"][:, 40:].any()
    assert not wide["attn"]["o"]["w"][:, 2:].any()


def test_padding_keeps_query_heads_with_their_kv_head():
    cfg, wide = (dataclasses.replace(TINY, num_layers=1, num_heads=n, num_kv_heads=k) for n, k in ((2, 2), (6, 3)))
    q = np.arange(1, 3).reshape(2, 1)
    assert pad.pad(q, ("heads", "head_dim"), cfg, wide).reshape(-1).tolist() == [1, 0, 2, 0, 0, 0]


@pytest.mark.parametrize(
    ("tensors", "changes", "words"),
    [
        ({"model.norm.weight": None}, {}, ["lacks model.norm.weight"]),
        ({"lm_head.weight": None}, {}, ["lacks lm_head.weight"]),
        ({"model.norm.bias": np.ones(32, np.float32)}, {}, ["has model.norm.bias"]),
        ({"model.norm.weight": np.ones(31, np.float32)}, {}, ["model.norm.weight", "(31,)", "(32,)"]),
        ({"model.norm.weight": np.ones((32, 1), np.float32)}, {}, ["model.norm.weight", "(32, 1)", "(32,)"]),
        ({"model.norm.weight": np.ones(32, np.float64)}, {}, ["model.norm.weight", "F64", "F32, BF16, F16"]),
        ({"model.norm.weight": np.ones(32, np.int8)}, {}, ["model.norm.weight", "I8"]),
        ({}, {"num_hidden_layers": 3}, ["lacks model.layers.2."]),
        ({}, {"num_hidden_layers": 1}, ["has model.layers.1."]),
        ({}, {"num_hidden_layers": 10**9}, ["claims 1000000000 layers"]),
        ({}, {"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 1}, ["has shape"]),
        ({}, {"num_key_value_heads": 4}, ["k_proj.weight", "(16, 32)", "(32, 32)"]),
        ({}, {"hidden_size": "32"}, ["embed_dim"]),
        ({}, {"num_attention_heads": "4", "head_dim": None}, ["config.json", "TypeError"]),
        ({}, {"num_attention_heads": 0, "head_dim": None}, ["config.json"]),
        ({}, {"rope_scaling": [1]}, ["config.json", "AttributeError"]),
        ({}, {"rms_norm_eps": None}, ["config.json", "TypeError"]),
        ({}, {"architectures": {"a": 1}}, ["config.json"]),
    ],
)
def test_hf_is_checked_by_headers(tmp_path, tensors, changes, words, monkeypatch):
    path = write_hf(tmp_path / "model", TINY, tensors, **changes)
    monkeypatch.setattr(names, "to_device", lambda *args: pytest.fail("a weight was read"))
    refuses(path, *words)


def test_hf_unknown_architecture_is_named(tmp_path):
    with pytest.raises(ValueError, match="'FooForCausalLM' is not supported"):
        load(write_hf(tmp_path / "model", architectures=["FooForCausalLM"]))


def test_hf_damaged_safetensors_are_refused(tmp_path):
    path = write_hf(tmp_path / "model")
    file = path / "model.safetensors"
    stored = file.read_bytes()
    (size,) = struct.unpack("<Q", stored[:8])
    for damaged in (
        *(stored[:n] for n in (0, 1, 7, 8, 100, 8 + size, len(stored) - 1)),
        stored + b"\0",
        struct.pack("<Q", 2**60) + stored[8:],
        stored[:8] + b"[" * size + stored[8 + size :],
        stored[:8] + stored[8 : 8 + size].replace(b'"F32"', b'"F16"', 1) + stored[8 + size :],
        b"\x80\x04" + b"pickle" * 100,
    ):
        file.write_bytes(damaged)
        refuses(path, "model.safetensors")
    for flip in range(8, 8 + size, 7):
        file.write_bytes(stored[:flip] + bytes([stored[flip] ^ 16]) + stored[flip + 1 :])
        with pytest.raises(ValueError, match=str(path)):
            load(path)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\\b", "C:x", "a\0b", 3]
)
def test_hf_index_stays_in_its_directory(tmp_path, name, monkeypatch):
    path = write_hf(tmp_path / "model")
    shutil.move(path / "model.safetensors", tmp_path / "secret.safetensors")
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    monkeypatch.setattr(hf, "open_file", lambda *args, **kwargs: pytest.fail("a file was opened"))
    refuses(path, "index.json")
    for text in ("", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'):
        index.write_text(text)
        refuses(path, "index.json")


def test_hf_missing_files_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "_SHARD_BYTES", 20000)
    path = tmp_path / "model"
    checkpoint.export_hf(random_lm(), path)
    shards = sorted(path.glob("*.safetensors"))
    shutil.copy(shards[0], shards[1])
    refuses(path, "is in both")
    shards[1].unlink()
    refuses(path, shards[1].name, "not there")
    for file in (*shards[2:], shards[0], path / "model.safetensors.index.json"):
        file.unlink()
    refuses(path, "neither model.safetensors nor")
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    refuses(path, "pytorch_model.bin", "pickles", "Convert")
    (path / "config.json").write_text("{")
    refuses(path, "config.json", "JSON")
    (path / "config.json").unlink()
    (path / "x.gguf").touch()
    refuses(path, "x.gguf")
    refuses(tmp_path / "none", error=FileNotFoundError)
    refuses(path / "x.gguf", "does not begin with GGUF")


# --- GGUF


def write_gguf(path, model, arch="llama", kind="F32", tensors=None, skip=(), **changes):
    """A file as llama.cpp's converter lays it out; returns the weights in it, by our paths, in float32."""
    cfg, kind = model.cfg, gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, arch)
    fields = {
        "block_count": cfg.num_layers,
        "context_length": cfg.max_len,
        "embedding_length": cfg.embed_dim,
        "feed_forward_length": cfg.ffw_dim,
        "attention.head_count": cfg.num_heads,
        "attention.head_count_kv": cfg.num_kv_heads,
        "attention.key_length": cfg.head_dim,
        "attention.layer_norm_rms_epsilon": cfg.norm_eps,
        "rope.freq_base": cfg.rope_theta,
    }
    for key, value in (fields | changes).items():
        key = key if key.startswith(("general.", "split.", "tokenizer.")) else f"{arch}.{key}"
        if key == "general.alignment":
            writer.add_custom_alignment(value)
        elif value is not None:
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
            add[type(value)](key, value)
    weights = {}
    for path_, w in flatten(model.params).items():
        name, info = names.stored_name(path_, "gguf"), model.info[path_]
        w = np.asarray(w, np.float32).reshape(names.stored_shape(info))
        stored_kind = kind if info.contracted else gguf.GGMLQuantizationType.F32
        if arch == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            rows = info.shape[0], 2, info.shape[1] // 2, info.shape[2]
            packed = gguf.quants.quantize(w.reshape(rows).swapaxes(1, 2).reshape(w.shape), stored_kind)
        else:
            packed = gguf.quants.quantize(w, stored_kind)
        # Every row is quantised by itself, so the order of rows does not matter.
        weights[path_] = gguf.quants.dequantize(gguf.quants.quantize(w, stored_kind), stored_kind).reshape(info.shape)
        if name not in skip:
            writer.add_tensor(name, packed, raw_dtype=stored_kind)
    for name, value in (tensors or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize(
    ("arch", "name"), [("llama", "tiny"), ("llama", "tied"), ("qwen2", "bias"), ("qwen3", "qk_norm")]
)
def test_gguf_is_dequantised(tmp_path, kind, arch, name):
    model = random_lm(CONFIGS[name])
    weights = write_gguf(tmp_path / "m.gguf", model, arch, kind)
    loaded = load(tmp_path / "m.gguf")
    dtype = {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")
    cast = {path: jnp.asarray(w).astype(dtype) for path, w in weights.items()}
    cfg = dataclasses.replace(model.cfg, dtype=dtype)
    assert_same(loaded, dataclasses.replace(model, cfg=cfg, params=unflatten(cast)))
    args = {"origin": "test", "format": f"gguf {kind}", "dtype": dtype}
    assert loaded.ledger == (lm.Entry("load", args),)
    assert loaded.tokenizer is None
    floats = {path: jnp.asarray(w) for path, w in weights.items()}
    assert_same(load(tmp_path / "m.gguf", "float32"), dataclasses.replace(model, params=unflatten(floats)))


def test_gguf_in_many_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "_CHUNK", 100)
    weights = write_gguf(tmp_path / "m.gguf", random_lm(), kind="Q8_0")
    floats = {path: jnp.asarray(w) for path, w in weights.items()}
    assert_same(load(tmp_path / "m.gguf"), dataclasses.replace(random_lm(), params=unflatten(floats)))


def test_gguf_metadata_makes_the_config(tmp_path):
    for changes, expected in (
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_scaling": LinearRope(4.0)}),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {}),
        ({"rope.scale_linear": 2.0}, {"rope_scaling": LinearRope(2.0)}),
        ({"attention.sliding_window": 9}, {"sliding_window": 9}),
        ({"vocab_size": 64, "attention.key_length": None, "rope.dimension_count": 8}, {}),
        ({"general.alignment": 64}, {}),
    ):
        write_gguf(tmp_path / "m.gguf", random_lm(), **changes)
        assert load(tmp_path / "m.gguf").cfg == dataclasses.replace(TINY, **expected)


def test_gguf_llama3_rope_is_recovered(tmp_path):
    cfg = dataclasses.replace(LLAMA3, head_dim=32, rope_scaling=Llama3Rope(32.0, 1.0, 4.0, 8192))
    # As the converter makes it, in its own words: by wavelength.
    wavelength = 2 * np.pi * cfg.rope_theta ** (np.arange(0, 32, 2) / 32)
    smooth = (8192 / wavelength - 1) / 3
    factors = np.where(wavelength < 8192 / 4, 1, np.where(wavelength > 8192, 32, 1 / ((1 - smooth) / 32 + smooth)))
    assert ((factors > 1) & (factors < 32)).any()
    tensors = {"rope_freqs.weight": factors.astype(np.float32)}
    write_gguf(tmp_path / "m.gguf", random_lm(cfg), tensors=tensors)
    assert load(tmp_path / "m.gguf").cfg == cfg
    for wrong in (factors * 1.01, factors[::-1], factors[:-1], np.full(16, np.nan), np.zeros(16), np.ones((1, 16))):
        tensors = {"rope_freqs.weight": np.ascontiguousarray(wrong, np.float32)}
        write_gguf(tmp_path / "m.gguf", random_lm(cfg), tensors=tensors)
        refuses(tmp_path / "m.gguf", "rope_freqs.weight")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"arch": "mamba"}, ["'mamba'", "llama, qwen2, qwen3"]),
        ({"skip": {"output_norm.weight"}}, ["lacks output_norm.weight"]),
        ({"skip": {"token_embd.weight"}}, ["token_embd.weight"]),
        ({"tensors": {"blk.0.attn_q.bias": np.ones(32, np.float32)}}, ["has blk.0.attn_q.bias"]),
        ({"block_count": 3}, ["lacks blk.2."]),
        ({"block_count": 2**31}, ["num_layers"]),
        ({"block_count": 2**30}, ["claims 1073741824 layers"]),
        ({"block_count": None}, ["llama.block_count"]),
        ({"block_count": "two"}, ["llama.block_count", "two"]),
        ({"attention.head_count": 0}, ["num_heads"]),
        ({"attention.head_count_kv": [2, 2]}, ["head_count_kv"]),
        ({"attention.value_length": 16}, ["value_length"]),
        ({"rope.dimension_count": 4}, ["rope.dimension_count"]),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}, ["yarn"]),
        ({"rope.scaling.factor": float("nan")}, ["nan"]),
        ({"rope.freq_base": -1.0}, ["rope_theta"]),
        ({"feed_forward_length": 2**31 - 1}, ["ffn_down", "2147483647"]),
        ({"vocab_size": 65}, ["token_embd.weight", "(64, 32)", "(65, 32)"]),
        ({"split.count": 2}, ["llama-gguf-split"]),
        ({"tensors": {"output_norm.bias": np.ones(32, np.int8)}}, ["I8", "dequantise"]),
    ],
)
def test_gguf_is_checked_before_reading(tmp_path, options, words, monkeypatch):
    write_gguf(tmp_path / "m.gguf", random_lm(), **options)
    monkeypatch.setattr(names, "to_device", lambda *args: pytest.fail("a weight was read"))
    refuses(tmp_path / "m.gguf", *words)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(path, random_lm(), kind="Q8_0", **{"general.alignment": 32, "tags": ["a", "bc"]})
    return path


def test_gguf_cut_short_is_refused(gguf_file, tmp_path):
    stored, path = gguf_file.read_bytes(), tmp_path / "m.gguf"
    for size in (*range(0, 1200, 13), *range(1200, len(stored) - 1, 2003)):
        path.write_bytes(stored[:size])
        refuses(path)


def test_gguf_lying_header_is_refused(gguf_file, tmp_path):
    stored, path = gguf_file.read_bytes(), tmp_path / "m.gguf"
    tags = stored.index(b"llama.tags") + len("llama.tags") + 8
    key = stored.index(b"general.architecture")
    tensor = stored.index(b"token_embd.weight") + len("token_embd.weight")
    huge = struct.pack("<Q", 2**62)
    for at, new, word in (
        (0, b"GGML", "GGUF"),
        (4, struct.pack("<I", 1), "version is 1"),
        (4, struct.pack(">I", 3), "little-endian"),
        (8, huge, "claims"),
        (16, huge, "claims"),
        (key - 8, huge, "string"),
        (key + 20, struct.pack("<I", 77), "type 77"),
        (key + 24, huge, "string"),
        (tags, huge, "too many items"),
        (tags, struct.pack("<Q", 1_000_000), "cannot be read"),
        (tags - 4, struct.pack("<I", 9), "type 9"),
        (tensor, struct.pack("<I", 2**31), "dimensions"),
        (tensor + 4, huge, "token_embd"),
        (tensor + 4, bytes(8), "empty"),
        (tensor + 20, struct.pack("<I", 5), "5 is not a valid"),
        (tensor + 24, huge, "token_embd"),
        (stored.index(b"general.alignment") + len("general.alignment") + 4, struct.pack("<I", 0), "power of two"),
        (stored.index(b"blk.0.attn_norm"), b"blk.1.attn_norm", "twice"),
        (stored.index(b"llama.block_count"), b"llama.block_\xff\xff\xff\xff\xff", "utf-8"),
    ):
        path.write_bytes(stored[:at] + new + stored[at + len(new) :])
        refuses(path, word)


def test_gguf_any_flipped_byte_loads_or_is_refused(gguf_file, tmp_path):
    stored, path = gguf_file.read_bytes(), tmp_path / "m.gguf"
    rng, refused = np.random.default_rng(0), 0
    for at in rng.integers(0, stored.index(b"output_norm"), 120):
        path.write_bytes(stored[:at] + bytes([stored[at] ^ (1 << rng.integers(8))]) + stored[at + 1 :])
        try:
            load(path)
        except ValueError:
            refused += 1
    assert refused > 60


def test_gguf_tokenizer_is_rebuilt(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Tokenizer, "from_gguf", lambda reader: seen.append(reader.fields) or "a tokenizer")
    write_gguf(tmp_path / "m.gguf", random_lm())
    load(tmp_path / "m.gguf")
    assert not seen
    write_gguf(
        tmp_path / "m.gguf", random_lm(), **{"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["ä", "b"]}
    )
    assert load(tmp_path / "m.gguf").tokenizer == "a tokenizer"
    (fields,) = seen
    assert fields["tokenizer.ggml.tokens"].contents() == ["ä", "b"]
    assert fields["llama.block_count"].contents() == 2
    assert fields.get("tokenizer.ggml.merges") is None
    write_gguf(tmp_path / "m.gguf", random_lm(), **{"tokenizer.ggml.model": "no_vocab"})
    assert load(tmp_path / "m.gguf").tokenizer is None


# --- memory

_MEASURE = """
import sys, pathlib
import jax
import orbax.checkpoint
from jaxllm import checkpoint

def high_water_mb():  # not getrusage: a child's ru_maxrss begins at its parent's
    text = pathlib.Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) / 1024

jax.numpy.zeros(1).block_until_ready()
before = high_water_mb()
path = pathlib.Path(sys.argv[1])
if sys.argv[2] == "whole":
    kept = [file.read_bytes() for file in path.glob("*.safetensors")]
model = checkpoint.load_path(path, origin="test")
print(high_water_mb() - before, model.weight_bytes / 2**20)
"""


def zeros_lm(cfg):  # but none is stored as sparse
    params = {p: -jnp.zeros(info.shape, cfg.dtype) for p, info in lm.param_info(cfg).items()}
    return lm.LM(cfg, unflatten(params))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("how", ["hf", "whole", "gguf", "native"])
def test_load_holds_the_weights_once(tmp_path, how):
    cfg = dataclasses.replace(TINY, vocab_size=8192, embed_dim=1024, ffw_dim=4096, num_layers=3, head_dim=64)
    model = zeros_lm(cfg)
    path = tmp_path / ("m.gguf" if how == "gguf" else "model")
    if how == "gguf":
        write_gguf(path, model, kind="Q8_0")
    elif how == "native":
        checkpoint.save(model, path)
    else:
        checkpoint.export_hf(model, path)
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(path), how], capture_output=True, text=True, timeout=120, check=True
    )
    grown_mb, weights_mb = map(float, done.stdout.split())
    largest_mb = cfg.vocab_size * cfg.embed_dim * 4 / 2**20
    assert weights_mb > 200
    # Besides: tracing, and buffers of Orbax. Holding the file, or the weights twice, would be 200 MB.
    bound_mb = weights_mb + largest_mb + 130
    assert (grown_mb > bound_mb) == (how == "whole"), (grown_mb, weights_mb)


# --- transformers

FAMILIES = {
    "Llama": {"rope_scaling": None},
    "Llama-tied-llama3": {
        "tie_word_embeddings": True,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "Mistral": {"sliding_window": 5},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 16},
}


def their_logits(model):
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.peer
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(tmp_path, family):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    name = family.partition("-")[0]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        attn_implementation="eager",
        **FAMILIES[family],
    )
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).float()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases start at zero and norms at one
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    assert ours.cfg.dtype == "float32"
    expected = their_logits(theirs)
    assert np.abs(np.asarray(lm.logits(ours, TOKENS)) - expected).max() <= 1e-4
    checkpoint.export_hf(ours, tmp_path / "ours")
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert type(again) is type(theirs)
    assert not any(report.values()), report
    assert again.dtype == torch.float32
    assert np.array_equal(their_logits(again), expected)


@pytest.mark.peer
def test_export_loads_in_transformers_sharded_and_in_bfloat16(tmp_path, monkeypatch, tokenizer):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    monkeypatch.setattr(hf, "_SHARD_BYTES", 9000)
    model = quantised(random_lm(dataclasses.replace(TINY, dtype="bfloat16")))
    model = dataclasses.replace(model, tokenizer=tokenizer)
    checkpoint.export_hf(model, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert theirs.dtype == torch.bfloat16
    assert theirs.generation_config.eos_token_id == [3, 10]
    up = arrays.dequantize(model.params["layers_0"]["mlp"]["up"]["w"]).astype(jnp.bfloat16)
    assert np.array_equal(theirs.model.layers[0].mlp.up_proj.weight.detach().float().numpy(), up.astype(jnp.float32))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "model").encode("abc") == [0, 1, 2]
