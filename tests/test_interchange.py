"""Quantised checkpoints of other tools: what goes out is read by its own library, what comes in keeps every bit."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jaxllm
from jaxllm import arrays, checkpoint, formats
from jaxllm.arrays import QArray
from jaxllm.checkpoint import hf, names, tensors
from jaxllm.config import ModelConfig
from jaxllm.params import flatten, unflatten

TINY = ModelConfig(
    vocab_size=64, embed_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, ffw_dim=96, max_len=128
)
BFLOAT16 = dataclasses.replace(TINY, dtype="bfloat16", qkv_bias=True, tie_embeddings=True)
TOKENS = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 24))
pytestmark = pytest.mark.slow
FORMATS = [
    "int4", "int4-affine", "int4-g16", "int4-g32-affine", "int8", "int8-affine", "int8-g16", "int8-g16-affine",
    "fp8", "w8a8", "w8a8-static",
]  # fmt: skip
MIXED = {
    r"layers_0/attn/.*": "w8a8",
    r"layers_0/mlp/down/w": "fp8",
    r"layers_0/.*": "int4-g16-affine",
    r"layers_1/.*/(o|down)/w": None,
    r"layers_.*": "int8",
}


def random_lm(cfg=TINY):
    """Random in every leaf, norms about one: norms of ones and biases of zeros would hide a mistake."""
    rng, info = np.random.default_rng(0), jaxllm.init(cfg).info
    flat = {path: rng.normal(0, 0.1, i.shape) + ("norm" in path) for path, i in info.items()}
    return jaxllm.LM(cfg, unflatten({k: jnp.asarray(w.astype(jnp.dtype(cfg.dtype))) for k, w in flat.items()}))


def quantised(fmt, cfg=TINY):
    model = random_lm(cfg)
    rules = MIXED if fmt == "mixed" else {r"layers_.*": fmt}
    return jaxllm.quantize(rules, calibration=TOKENS)(model)


def load(path, dtype=None):
    return checkpoint.load_path(path, origin="test", dtype=dtype)


def export(model, path):
    lines = []
    checkpoint.export_compressed(model, path, log=lines.append)
    return lines


def assert_same(a, b):
    """Bit for bit, types included."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def read_config(path):
    return json.loads((path / "config.json").read_text())["quantization_config"]


def rewrite(path, changed=None, **config):
    """Replaces tensors and fields of quantization_config; None removes."""
    file = path / "model.safetensors"
    if changed:
        stored = safetensors.numpy.load_file(file) | changed
        safetensors.numpy.save_file({k: v for k, v in stored.items() if v is not None}, file)
    whole = json.loads((path / "config.json").read_text())
    whole["quantization_config"] = whole.get("quantization_config", {}) | config
    (path / "config.json").write_text(json.dumps(whole))


def refuses(path, *words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are what is matched
        load(path)
    for word in (str(path), *words):
        assert word in str(caught.value)


@pytest.fixture
def no_weight(monkeypatch):
    """What is refused is refused before a weight is read."""
    monkeypatch.setattr(hf, "to_leaf", lambda *args: pytest.fail("a weight was read"))
    monkeypatch.setattr(names, "to_device", lambda *args: pytest.fail("a weight was read"))


# --- small integers in int32


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [1, 7, 8, 12])
def test_packing_is_by_the_lowest_bits_first(bits, size):
    numbers = np.random.default_rng(0).integers(0, 2**bits, (3, size)).astype(np.uint8)
    expected = np.zeros((3, -(-size * bits // 32)), np.int64)
    for row in range(3):
        for i in range(size):
            expected[row, i * bits // 32] |= int(numbers[row, i]) << (i * bits % 32)
    packed = tensors.pack(numbers, bits)
    assert packed.dtype == np.int32
    assert np.array_equal(packed, expected.astype(np.uint32).view(np.int32))
    assert np.array_equal(tensors.unpack(packed, bits).reshape(3, -1)[:, :size], numbers)
    middle = 2 ** (bits - 1)
    assert np.array_equal(tensors.signed(numbers, bits), numbers.astype(int) - middle)
    assert np.array_equal(tensors.unsigned(tensors.signed(numbers, bits), bits), numbers)


# --- compressed-tensors, out and back


@pytest.mark.parametrize("cfg", [TINY, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("fmt", [*FORMATS, "mixed"])
def test_export_then_load_is_bitwise(tmp_path, fmt, cfg, monkeypatch):
    model = quantised(fmt, cfg)
    if fmt == "mixed":
        monkeypatch.setattr(hf, "_SHARD_BYTES", 20000)
    export(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert_same(model.params, loaded.params)
    assert loaded.cfg == cfg
    assert (len(list((tmp_path / "model").glob("*.safetensors"))) > 1) == (fmt == "mixed")


@pytest.mark.parametrize("fmt", FORMATS)
def test_what_is_loaded_can_be_exported_again_and_run(tmp_path, fmt):
    export(quantised(fmt), tmp_path / "a")
    loaded = load(tmp_path / "a")
    export(loaded, tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert np.array_equal(jaxllm.logits(loaded, TOKENS), jaxllm.logits(quantised(fmt), TOKENS))


def test_file_is_as_small_as_the_weights(tmp_path):
    model = quantised("int4-g32")
    export(model, tmp_path / "model")
    stored = safetensors.numpy.load_file(tmp_path / "model/model.safetensors")
    shapes = sum(w.nbytes for name, w in stored.items() if name.endswith("weight_shape"))
    assert sum(w.nbytes for w in stored.values()) == model.weight_bytes + shapes


def test_embedding_head_and_cache_are_not_the_formats(tmp_path):
    model = jaxllm.quantize_kv()(jaxllm.quantize("int4-g32")(random_lm()))
    embed, cache = export(model, tmp_path / "model")
    assert "embed/w and head/w" in embed
    assert "float32" in embed
    assert "int8 KV cache is left out" in cache
    loaded = load(tmp_path / "model")
    assert np.array_equal(loaded.params["head"]["w"], arrays.dequantize(model.params["head"]["w"]))
    assert loaded.cfg.kv_dtype is None
    assert read_config(tmp_path / "model")["ignore"] == ["lm_head"]


def test_import_is_in_the_ledger_and_ends_pruning(tmp_path):
    export(quantised("int4-g32"), tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert [entry.name for entry in loaded.ledger] == ["load", "quantize"]
    assert loaded.ledger[1].args == {"imported": "compressed-tensors"}
    assert sum(loaded.ledger[1].touched.values()) == 14
    with pytest.raises(ValueError, match="cannot follow quantize"):
        jaxllm.prune(0.5)(loaded)
    with pytest.raises(ValueError, match="is quantised already"):
        jaxllm.quantize("int8")(loaded)


def test_dtype_is_that_of_float_weights(tmp_path):
    export(quantised("int4-g32"), tmp_path / "model")
    loaded = load(tmp_path / "model", "bfloat16")
    assert loaded.params["embed"]["w"].dtype == jnp.bfloat16
    assert_same(loaded.params["layers_0"]["mlp"], quantised("int4-g32").params["layers_0"]["mlp"])


def test_mixed_precision_is_one_group_a_scheme(tmp_path):
    export(quantised("mixed"), tmp_path / "model")
    config = read_config(tmp_path / "model")
    groups = {group["format"]: group for group in config["config_groups"].values() if group["weights"]["symmetric"]}
    assert config["format"] == "mixed-precision"
    assert groups["float-quantized"]["targets"] == ["model.layers.0.mlp.down_proj"]
    assert groups["int-quantized"]["targets"] == [f"model.layers.0.self_attn.{x}_proj" for x in "koqv"]
    assert config["ignore"] == ["model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj", "lm_head"]
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    assert len(targets) == len(set(targets)) == 12


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({r".*/(q|k)/w": "int8", r"layers_0/.*": "int4"}, r"layers_0.*attn/q int8, attn/k int8, attn/v int4"),
        ({r".*/gate/w": "int8"}, r"layers_0.*mlp/gate int8, mlp/up float"),
        ({r"embed/w": "int8"}, "No weight of a layer"),
    ],
)
def test_what_vllm_cannot_run_is_refused(tmp_path, rules, words):
    with pytest.raises(ValueError, match=words):
        export(jaxllm.quantize(rules)(random_lm()), tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fmt", "words"),
    [
        (formats.Format("float8_e4m3fn", group=16), "float8 by group"),
        (formats.Format("int8", group=16, inputs="dynamic"), "symmetric int8 weights by channel"),
        (formats.Format("int8", affine=True, inputs="dynamic"), "symmetric int8 weights by channel"),
        (formats.Format("int4", inputs="dynamic"), "symmetric int8 weights by channel"),
    ],
)
def test_what_the_format_does_not_have_is_refused(tmp_path, fmt, words):
    model = random_lm()
    flat = flatten(model.params)
    flat["layers_0/mlp/down/w"] = formats.quantize(flat["layers_0/mlp/down/w"], 1, fmt)
    with pytest.raises(ValueError, match=words):
        export(dataclasses.replace(model, params=unflatten(flat)), tmp_path / "model")


def test_weights_that_are_not_the_configs_are_refused(tmp_path):
    model = quantised("int8")
    for cfg in (dataclasses.replace(TINY, ffw_dim=32), dataclasses.replace(TINY, tie_embeddings=True)):
        with pytest.raises(ValueError, match="config"):
            export(dataclasses.replace(model, cfg=cfg), tmp_path / "model")


def group_with(**changes):
    """A config group of weight-only int4 in groups of 32; `inputs` are its activations."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    inputs = changes.pop("inputs", None)
    layout = changes.pop("layout", "pack-quantized")
    return {"g": {"targets": ["Linear"], "weights": weights | changes, "input_activations": inputs, "format": layout}}


INT8_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "bitsandbytes"}, ["'bitsandbytes'", "gptq, awq"]),
        ({"quant_method": ["gptq"]}, ["Supported"]),
        ({"config_groups": {}}, ["config_groups"]),
        ({"config_groups": [1]}, ["config_groups"]),
        ({"config_groups": {"g": 1}}, ["config_groups"]),
        ({"config_groups": {"g": {}}}, ["No weights", "in g", "Supported"]),
        ({"config_groups": group_with(layout="marlin-24")}, ["'marlin-24'", "pack-quantized"]),
        ({"config_groups": group_with(layout=["int-quantized"])}, ["The format is ['int-quantized']"]),
        ({"config_groups": group_with(num_bits=3)}, ["of 3 bits"]),
        ({"config_groups": group_with(num_bits=[4])}, ["of [4] bits"]),
        ({"config_groups": group_with(type="float")}, ["float of 4 bits"]),
        ({"config_groups": group_with(strategy="block")}, ["'block'"]),
        ({"config_groups": group_with(strategy=None, group_size=None)}, ["'tensor'"]),
        ({"config_groups": group_with(strategy=None, group_size=[32])}, ["[32]"]),
        ({"config_groups": group_with(group_size=0)}, ["group size is 0"]),
        ({"config_groups": group_with(group_size="32")}, ["group size is '32'"]),
        ({"config_groups": group_with(actorder="group")}, ["actorder"]),
        ({"config_groups": group_with(dynamic=True)}, ["dynamic"]),
        ({"config_groups": group_with(inputs=INT8_TOKEN)}, ["pack-quantized has int4", "dynamic activations"]),
        ({"config_groups": group_with(num_bits=8, layout="int-quantized", inputs=INT8_TOKEN)}, ["by group"]),
        ({"config_groups": group_with(inputs=INT8_TOKEN | {"type": "float"})}, ["Activations", "'float'"]),
        ({"config_groups": group_with(inputs=INT8_TOKEN | {"symmetric": False})}, ["Activations"]),
        ({"config_groups": group_with(inputs=INT8_TOKEN | {"strategy": ["token"]})}, ["Activations"]),
        ({"config_groups": group_with(inputs="int8")}, ["Activations are 'int8'"]),
        ({"config_groups": {"g": group_with()["g"] | {"output_activations": INT8_TOKEN}}}, ["Output"]),
        ({"kv_cache_scheme": INT8_TOKEN}, ["kv_cache_scheme"]),
        ({"transform_config": {"config_groups": {}}}, ["transform_config"]),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, ["sparsity_config"]),
        # Supported, and not what the tensors are:
        ({"config_groups": group_with(group_size=16)}, ["weight_scale F32[64, 6]", "weight_scale BF16[64, 3]"]),
        ({"config_groups": group_with(group_size=2**31 - 1)}, ["model.layers.0"]),
        ({"config_groups": group_with(num_bits=8)}, ["weight_packed I32[64, 24]", "weight_packed I32[64, 12]"]),
        ({"config_groups": group_with(symmetric=False)}, ["weight_zero_point"]),
    ],
)
def test_compressed_config_is_checked(tmp_path, config, words, no_weight):
    export(quantised("int4-g32"), tmp_path / "model")
    rewrite(tmp_path / "model", **config)
    refuses(tmp_path / "model", *words)


Q0 = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"weight_packed": None}, [Q0, "no weight of two dimensions"]),
        ({"weight_scale": None}, [Q0, "By its config it would have"]),
        ({"weight_shape": None}, [Q0, "no weight_shape"]),
        ({"weight_shape": np.array([64.0, 64.0])}, [Q0, "no weight_shape"]),
        ({"weight_shape": np.array([64, 64, 1])}, [Q0, "no weight_shape"]),
        ({"weight_shape": np.array([64, -64])}, [Q0, "(64, -64)"]),
        ({"weight_shape": np.array([64, 2**62])}, [Q0]),
        ({"weight_shape": np.array([64, 32])}, [Q0, "weight_packed I32[64, 4]"]),
        ({"weight_packed": np.zeros((64, 9), np.int32)}, [Q0, "I32[64, 9]", "I32[64, 8]"]),
        ({"weight_packed": np.zeros((64, 8), np.uint32)}, [Q0, "U32[64, 8]"]),
        ({"weight_scale": np.ones((64, 2), np.float64)}, [Q0, "F64[64, 2]"]),
        ({"weight_zero_point": np.zeros((8, 2), np.int32)}, [Q0, "weight_zero_point"]),
        ({"weight_g_idx": np.zeros(64, np.int32)}, ["weight_g_idx is I32"]),
        ({"input_scale": np.ones(1, np.float32)}, [Q0, "input_scale"]),
        ({"weight": np.ones((64, 64), np.float32)}, [Q0, "weight F32[64, 64]"]),
    ],
)
def test_compressed_tensors_are_checked(tmp_path, changed, words, no_weight):
    export(quantised("int4-g32"), tmp_path / "model")
    rewrite(tmp_path / "model", {f"{Q0}.{part}": array for part, array in changed.items()})
    refuses(tmp_path / "model", *words)


def test_model_of_another_shape_is_refused(tmp_path, no_weight):
    path = tmp_path / "model"
    export(quantised("int4-g32"), path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    refuses(path, "mlp.down_proj.weight", "(64, 96)", "(64, 128)")
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    refuses(path, "claims 1000000000 layers")
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "quantization_config"}))
    refuses(path, "weight_packed is I32", "quantization_config")
    jaxllm.export_hf(random_lm(), tmp_path / "float")
    rewrite(tmp_path / "float", quant_method="compressed-tensors", config_groups=group_with())
    refuses(tmp_path / "float", "no tensor is quantised")


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_scales_that_are_no_numbers_are_refused(tmp_path, value):
    export(quantised("w8a8-static"), tmp_path / "model")
    scale = np.ones((64, 1), np.float32)
    scale[3] = value
    rewrite(tmp_path / "model", {f"{Q0}.weight_scale": scale})
    with pytest.raises(ValueError, match=rf"{Q0}.*scale has values"):
        load(tmp_path / "model")
    rewrite(
        tmp_path / "model",
        {f"{Q0}.weight_scale": abs(np.nan_to_num(scale)), f"{Q0}.input_scale": np.zeros(1, np.float32)},
    )
    with pytest.raises(ValueError, match=rf"{Q0}.*input scale is 0"):
        load(tmp_path / "model")


def test_group_that_cannot_be_told_is_refused(tmp_path, no_weight):
    """int8 weights alone do not say whether activations are rounded, and targets are not run."""
    export(quantised("w8a8"), tmp_path / "model")
    groups = read_config(tmp_path / "model")["config_groups"]
    groups["other"] = groups["group_0"] | {"input_activations": None, "targets": ["re:(a+)+$"]}
    rewrite(tmp_path / "model", config_groups=groups)
    refuses(tmp_path / "model", "several config groups", "dynamic", "float")


# --- compressed-tensors by its own library


def library():
    pytest.importorskip("torch", reason="the peer extra is not installed")
    return pytest.importorskip("compressed_tensors", reason="the peer extra is not installed")


def torch_files(path):
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


def scheme_of(config, module):
    """The library's scheme for a module: the group that names it, or the only one."""
    groups = list(config.config_groups.values())
    return groups[0] if len(groups) == 1 else next(group for group in groups if module in group.targets)


@pytest.mark.peer
@pytest.mark.parametrize("fmt", [*FORMATS, "mixed"])
def test_the_library_decompresses_what_we_mean(tmp_path, fmt):
    """Bit for bit, in the type of the scale, which is what the library computes in."""
    library()
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    model = quantised(fmt)
    export(model, tmp_path / "model")
    config = QuantizationConfig.model_validate(read_config(tmp_path / "model"))
    stored, seen = torch_files(tmp_path / "model"), 0
    for path, leaf in flatten(model.params).items():
        if not isinstance(leaf, QArray):
            continue
        module = names.stored_name(path, "hf").removesuffix(".weight")
        scheme = scheme_of(config, module)
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        state = {name.rpartition(".")[2]: t for name, t in stored.items() if name.rpartition(".")[0] == module}
        assert set(compressor.compression_param_names(scheme)) <= set(state)
        found = compressor.decompress(state, scheme)["weight"]
        expected = np.asarray(arrays.dequantize(leaf).astype(leaf.scale.dtype).astype(jnp.float32))
        assert np.array_equal(found.to(torch.float32).numpy().reshape(leaf.shape), expected)
        inputs = scheme.input_activations
        assert (inputs is None, inputs is not None and inputs.dynamic) == (
            not leaf.int8_inputs,
            leaf.int8_inputs and leaf.x_scale is None,
        )
        if leaf.x_scale is not None:
            assert state["input_scale"].numpy() == np.asarray(leaf.x_scale)[None]
        seen += 1
    assert seen == (12 if fmt == "mixed" else 14)


@pytest.mark.peer
@pytest.mark.parametrize(("bits", "affine", "group"), [(4, False, 32), (4, True, 16), (8, True, None), (8, False, 16)])
def test_what_the_library_compresses_is_read(tmp_path, bits, affine, group):
    """Files of the library's own making."""
    library()
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file, save_file

    path = tmp_path / "model"
    jaxllm.export_hf(random_lm(), path)
    group_config = group_with(
        num_bits=bits, symmetric=not affine, group_size=group, strategy="group" if group else "channel"
    )
    raw = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": group_config}
    scheme = QuantizationConfig.model_validate(raw).config_groups["g"]
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    stored, expected, rng = load_file(path / "model.safetensors"), {}, torch.Generator().manual_seed(0)
    for name in [name for name in stored if name.endswith("_proj.weight")]:
        weight, module = stored.pop(name), name.removesuffix(".weight")
        shape = weight.shape[0], weight.shape[1] // (group or weight.shape[1])
        state = {"weight": weight, "weight_scale": torch.rand(shape, generator=rng) / 2 ** (bits - 1)}
        if affine:
            half = 2 ** (bits - 1)
            state["weight_zero_point"] = torch.randint(-half, half, shape, generator=rng, dtype=torch.int8)
        packed = compressor.compress(state, scheme)
        stored |= {f"{module}.{part}": tensor for part, tensor in packed.items()}
        expected[name] = compressor.decompress(packed, scheme)["weight"].numpy()
    save_file(stored, path / "model.safetensors")
    rewrite(path, **raw)
    loaded = load(path)
    for key, leaf in flatten(loaded.params).items():
        if isinstance(leaf, QArray):
            weight = expected.pop(names.stored_name(key, "hf"))
            assert np.array_equal(arrays.dequantize(leaf), weight.reshape(leaf.shape))
            assert (leaf.zero_point is not None, leaf.values.dtype) == (affine, f"int{bits}")
    assert not expected


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("fmt", ["int4", "int4-affine", "int8-g16", "fp8", "w8a8-static", "mixed"])
def test_transformers_runs_it(tmp_path, fmt):
    library()
    import torch

    transformers = pytest.importorskip("transformers", reason="the peer extra is not installed")
    rules = MIXED | {r"layers_0/attn/.*": "fp8"} if fmt == "mixed" else {r"layers_.*": fmt}
    rules = {match: "int4-g16" if name == "int4-g16-affine" else name for match, name in rules.items()}
    model = jaxllm.quantize(rules, calibration=TOKENS)(random_lm())
    if fmt == "w8a8-static":  # nothing is to be saturated: there, int8 activations end at -127 and in torch at -128
        model = with_leaves(model, lambda w: dataclasses.replace(w, x_scale=w.x_scale * 1.1))
    export(model, tmp_path / "model")
    # With zero points, transformers' other way gives their packed tensor an unpacked one's shape, and stops.
    how = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if "affine" in fmt else {}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32, **how).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    ours = load(tmp_path / "model")
    if fmt != "w8a8-static":  # as floats: on CPU, our int8 kernels keep 16 bits of activations
        ours = with_leaves(ours, arrays.dequantize)
    np.testing.assert_allclose(jaxllm.logits(ours, TOKENS), expected, atol=1e-4, rtol=0)


def with_leaves(model, fn):
    flat = {path: fn(leaf) if isinstance(leaf, QArray) else leaf for path, leaf in flatten(model.params).items()}
    return dataclasses.replace(model, params=unflatten(flat))


# --- GPTQ and AWQ


def pack_loops(numbers, bits, axis, order=range(8)):
    """int32 from unsigned integers along an axis, number by number, as both formats are published."""
    numbers = np.moveaxis(numbers.astype(np.int64), axis, -1)
    per_word = 32 // bits
    words = np.zeros((*numbers.shape[:-1], numbers.shape[-1] // per_word), np.int64)
    for i in range(words.shape[-1]):
        for place, j in zip(range(per_word), order if per_word == 8 else range(per_word), strict=True):
            words[..., i] |= numbers[..., i * per_word + j] << (place * bits)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis)).astype(np.uint32).view(np.int32)


def write_quantised(path, method, bits=4, group=16, sym=False, cfg=TINY, **config):
    """A directory as AutoGPTQ or AutoAWQ writes it; returns q, z and scales of each module, [in, out] and [G, out]."""
    rng = np.random.default_rng(1)
    jaxllm.export_hf(random_lm(cfg), path)
    stored, truth = safetensors.numpy.load_file(path / "model.safetensors"), {}
    for name in [name for name in stored if name.endswith("_proj.weight")]:
        module, (out, inputs) = name.removesuffix(".weight"), stored.pop(name).shape
        g = inputs if group == -1 else group
        q = rng.integers(0, 2**bits, (inputs, out))
        z = np.full((inputs // g, out), 2 ** (bits - 1)) if sym else rng.integers(0, 2**bits, (inputs // g, out))
        scales = (rng.random((inputs // g, out)) / 2**bits).astype(np.float16)
        truth[module] = q, z, scales
        if method == "gptq":
            kept = (z - 1) % 2**bits if config.get("checkpoint_format", "gptq") == "gptq" else z
            packed = {"qweight": pack_loops(q, bits, 0), "qzeros": pack_loops(kept, bits, 1)}
            packed["g_idx"] = (np.arange(inputs) // g).astype(np.int32)
        else:
            order = [0, 2, 4, 6, 1, 3, 5, 7]
            packed = {"qweight": pack_loops(q, bits, 1, order), "qzeros": pack_loops(z, bits, 1, order)}
        packed["scales"] = scales
        stored |= {f"{module}.{part}": array for part, array in packed.items()}
    safetensors.numpy.save_file(stored, path / "model.safetensors")
    config = {"quant_method": method, "bits": bits, "group_size": group, "sym": sym} | config
    rewrite(path, **(config | ({"version": "gemm", "zero_point": True} if method == "awq" else {})))
    return truth


def assert_is(model, truth, bits, sym):
    half = 2 ** (bits - 1)
    for path, leaf in flatten(model.params).items():
        if not isinstance(leaf, QArray):
            continue
        q, z, scales = truth.pop(names.stored_name(path, "hf").removesuffix(".weight"))
        assert leaf.values.dtype == f"int{bits}"
        assert np.array_equal(np.asarray(leaf.values).astype(int).reshape(q.T.shape), q.T - half)
        assert leaf.scale.dtype == np.float16
        assert np.array_equal(np.asarray(leaf.scale).reshape(scales.T.shape), scales.T)
        assert (leaf.zero_point is None) == sym
        g = q.shape[0] // z.shape[0]
        shifted = (q - np.repeat(z, g, 0)).astype(np.float32)
        weight = (shifted * np.repeat(scales, g, 0).astype(np.float32)).T
        assert np.array_equal(arrays.dequantize(leaf).reshape(weight.shape), weight)
    assert not truth


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [16, -1])
@pytest.mark.parametrize("sym", [False, True])
def test_gptq(tmp_path, layout, bits, group, sym):
    config = {"checkpoint_format": layout, "desc_act": group == -1}  # whose order does not matter in one group
    truth = write_quantised(tmp_path / "model", "gptq", bits, group, sym, **config)
    loaded = load(tmp_path / "model")
    assert_is(loaded, truth, bits, sym)
    assert loaded.ledger[1].args == {"imported": "gptq"}
    assert np.isfinite(jaxllm.logits(loaded, TOKENS)).all()


@pytest.mark.parametrize("group", [16, -1])
@pytest.mark.parametrize("sym", [False, True])
def test_awq(tmp_path, group, sym):
    truth = write_quantised(tmp_path / "model", "awq", 4, group, sym)
    loaded = load(tmp_path / "model")
    assert_is(loaded, truth, 4, sym)
    assert loaded.ledger[1].args == {"imported": "awq"}


@pytest.mark.peer
def test_awq_as_compressed_tensors_converts_it(tmp_path):
    """The library's own reading of AutoAWQ's files, and ours."""
    library()
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.entrypoints.convert import AutoAWQConverter

    write_quantised(tmp_path / "model", "awq")
    converter = AutoAWQConverter(group_size=16)
    scheme = converter.update_config(None).config_groups["config_group_0"]
    stored = converter.process(torch_files(tmp_path / "model"))
    flat = flatten(load(tmp_path / "model").params)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    for path, leaf in flat.items():
        if isinstance(leaf, QArray):
            module = names.stored_name(path, "hf").removesuffix(".weight")
            state = {name.rpartition(".")[2]: t for name, t in stored.items() if name.rpartition(".")[0] == module}
            state["weight_scale"] = state["weight_scale"].to(torch.float32)
            found = compressor.decompress(state, scheme)["weight"].numpy().reshape(leaf.shape)
            assert np.array_equal(found, arrays.dequantize(leaf))


def test_gptq_goes_out_as_compressed_tensors(tmp_path):
    write_quantised(tmp_path / "gptq", "gptq")
    loaded = load(tmp_path / "gptq")
    export(loaded, tmp_path / "model")
    assert_same(load(tmp_path / "model").params, loaded.params)


def test_gptq_biases_of_zeros(tmp_path):
    path = tmp_path / "model"
    truth = write_quantised(path, "gptq", cfg=dataclasses.replace(TINY, qkv_bias=True))
    biases = {f"{module}.bias": np.zeros(q.shape[1], np.float16) for module, (q, _, _) in truth.items()}
    rewrite(path, {name: bias for name, bias in biases.items() if "self_attn.o" in name or "mlp" in name})
    loaded = load(path)
    assert_same(loaded.params["layers_1"]["attn"]["q"]["b"], flatten(random_lm(loaded.cfg).params)["layers_1/attn/q/b"])
    name = "model.layers.1.mlp.up_proj.bias"
    for bias in (biases[name] + 1, biases[name][1:], biases[name].astype(np.int32)):
        rewrite(path, {name: bias})
        refuses(path, f"{name} is not all zeros")


@pytest.mark.parametrize(
    ("method", "changed", "config", "words"),
    [
        ("gptq", {}, {"bits": 3}, ["bits is 3", "4, 8"]),
        ("gptq", {}, {"bits": "4"}, ["bits is '4'"]),
        ("gptq", {}, {"bits": 8}, ["qzeros"]),
        ("gptq", {}, {"group_size": 0}, ["group_size is 0"]),
        ("gptq", {}, {"group_size": None}, ["group_size is None"]),
        ("gptq", {}, {"group_size": True}, ["group_size is True"]),
        ("gptq", {}, {"group_size": 32}, ["mlp.down_proj.qzeros", "(6, 8)", "(3, 8)"]),
        ("gptq", {}, {"group_size": 40}, ["96 inputs", "groups of 40"]),
        ("gptq", {}, {"group_size": 2**40}, ["group_size"]),
        ("gptq", {}, {"checkpoint_format": "marlin"}, ["'marlin'", "gptq_v2"]),
        ("gptq", {}, {"is_marlin_format": True}, ["Marlin"]),
        ("gptq", {}, {"dynamic": {".*": {"bits": 8}}}, ["dynamic"]),
        ("gptq", {"g_idx": np.arange(64, dtype=np.int32) % 4}, {"desc_act": True}, ["g_idx", "desc_act=false"]),
        ("gptq", {"g_idx": np.full(64, -1, np.int32)}, {}, ["g_idx"]),
        ("gptq", {"g_idx": np.zeros(2, np.int32)}, {}, ["g_idx", "(2,)", "(64,)"]),
        ("gptq", {"g_idx": None}, {"desc_act": True}, [f"lacks {Q0}.g_idx"]),
        ("gptq", {"qzeros": None}, {}, [f"lacks {Q0}.qzeros"]),
        ("gptq", {"scales": None}, {}, [f"lacks {Q0}.scales"]),
        ("gptq", {"qweight": None}, {}, [f"lacks {Q0}.qweight"]),
        ("gptq", {"qweight": np.zeros((4, 64), np.int32)}, {}, [Q0, "(2, 8)"]),
        ("gptq", {"qweight": np.zeros((0, 64), np.int32)}, {}, [Q0, "(0, 64)"]),
        ("gptq", {"qweight": np.zeros((8, 60), np.int32)}, {}, [Q0, "60 outputs"]),
        ("gptq", {"qweight": np.zeros(64, np.int32)}, {}, [Q0, "(64,)"]),
        ("gptq", {"qweight": np.zeros((8, 64), np.int64)}, {}, [f"{Q0}.qweight", "I64"]),
        ("gptq", {"scales": np.ones((4, 64), np.int8)}, {}, [f"{Q0}.scales", "I8"]),
        ("gptq", {"scales": np.ones((64, 4), np.float16)}, {}, [f"{Q0}.scales", "(64, 4)", "(4, 64)"]),
        ("gptq", {"weight": np.ones((64, 64), np.float32)}, {}, [f"{Q0}.weight", "float and quantised"]),
        ("awq", {}, {"bits": 8}, ["bits is 8"]),
        ("awq", {}, {"version": "gemv"}, ["'gemv'", "'gemm'"]),
        ("awq", {}, {"group_size": 32}, ["(6, 8)", "(3, 8)"]),
        ("awq", {"qzeros": None}, {}, [f"lacks {Q0}.qzeros"]),
        ("awq", {"qweight": np.zeros((8, 64), np.int32)}, {}, [Q0]),
    ],
)
def test_gptq_and_awq_are_checked(tmp_path, method, changed, config, words, no_weight):
    write_quantised(tmp_path / "model", method)
    rewrite(tmp_path / "model", {f"{Q0}.{part}": array for part, array in changed.items()}, **config)
    refuses(tmp_path / "model", *words)


def test_float_modules_among_quantised_ones(tmp_path):
    """What AutoAWQ lists in modules_to_not_convert is simply there as a weight."""
    path = tmp_path / "model"
    write_quantised(path, "awq")
    weight = np.ones((64, 64), np.float32)
    rewrite(path, {f"{Q0}.{part}": None for part in ("qweight", "qzeros", "scales")} | {f"{Q0}.weight": weight})
    loaded = load(path)
    assert isinstance(loaded.params["layers_0"]["attn"]["q"]["w"], jax.Array)
    assert isinstance(loaded.params["layers_1"]["attn"]["q"]["w"], QArray)
