"""The shape of a model, in particular one whose layers differ."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.config import to_hf
from jaxllm.lm import forward
from jaxllm.params import flatten
from tests.conftest import TINY

UNEVEN = dataclasses.replace(TINY, num_heads=(8, 4, 4), num_kv_heads=(4, 2, 1), ffw_dim=(64, 40, 24))
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 12)).astype(np.int32)


def test_equal_widths_are_written_as_one_number():
    same = dataclasses.replace(TINY, num_heads=(8, 8, 8), num_kv_heads=(4, 4, 4), ffw_dim=(64, 64, 64))
    assert same == TINY
    assert hash(same) == hash(TINY)
    assert same.widths("ffw_dim") == (64, 64, 64)


def test_layers_of_one_shape_have_equal_configs():
    cfg = dataclasses.replace(TINY, ffw_dim=(64, 40, 64))
    assert cfg.layer(0) == cfg.layer(2) != cfg.layer(1)
    assert (cfg.layer(1).num_layers, cfg.layer(1).ffw_dim) == (1, 40)


def test_a_config_survives_json():
    for cfg in (UNEVEN, TINY, dataclasses.replace(UNEVEN, kv_dtype="int8")):
        assert jaxllm.ModelConfig.from_json(json.loads(json.dumps(dataclasses.asdict(cfg)))) == cfg


def test_weights_have_their_layers_widths():
    lm = jaxllm.init(UNEVEN)
    shapes = {path: leaf.shape for path, leaf in flatten(lm.params).items()}
    assert shapes == {path: info.shape for path, info in lm.info.items()}
    assert [shapes[f"layers_{i}/mlp/down/w"] for i in range(3)] == [(32, 64), (32, 40), (32, 24)]
    assert [shapes[f"layers_{i}/attn/o/w"] for i in range(3)] == [(32, 8, 8), (32, 4, 8), (32, 4, 8)]
    assert [shapes[f"layers_{i}/attn/k/w"] for i in range(3)] == [(4, 8, 32), (2, 8, 32), (1, 8, 32)]


def whole(lm):
    return jax.jit(forward, static_argnums=0)(lm.cfg, lm.params, jnp.asarray(TOKENS))


def test_logits_layer_by_layer_are_those_of_one_program(family):
    np.testing.assert_allclose(jaxllm.logits(family, TOKENS), whole(family), atol=1e-5)


def test_logits_of_uneven_and_of_quantised_layers_are_those_of_one_program():
    lm = jaxllm.init(dataclasses.replace(TINY, num_layers=2, num_heads=(8, 4), num_kv_heads=(4, 2), ffw_dim=(64, 40)))
    mixed = jaxllm.quantize({"layers_0/.*": "int8", "layers_1/mlp/.*": "int4", "embed/w": "int8"})(lm)
    np.testing.assert_allclose(jaxllm.logits(lm, TOKENS), whole(lm), atol=1e-5)
    # Activations that meet int8 weights have 16 bits, which two programs may round apart.
    np.testing.assert_allclose(jaxllm.logits(mixed, TOKENS), whole(mixed), atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ffw_dim": (64, 40)}, "ffw_dim has 2 widths; the model has 3 layers"),
        ({"ffw_dim": (64, 0, 40)}, "expected a positive integer"),
        ({"ffw_dim": (64, True, 40)}, "expected a positive integer"),
        ({"ffw_dim": [64, 40, 40]}, "expected a positive integer"),
        ({"embed_dim": (32, 32, 32)}, "embed_dim is .*; expected a positive integer"),
        ({"num_heads": (8, 4, 6), "num_kv_heads": (4, 2, 4)}, "num_heads=6 is not a multiple of num_kv_heads=4"),
        ({"kv_dtype": "int4"}, "kv_dtype is 'int4'; expected None, for dtype, or \"int8\""),
    ],
)
def test_nonsense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_uneven_layers_have_no_hugging_face_config():
    with pytest.raises(ValueError, match="layers differ in num_heads, num_kv_heads, ffw_dim; a Hugging Face config"):
        to_hf(UNEVEN)


def test_a_mesh_must_divide_every_layer():
    with pytest.raises(ValueError, match=r"num_kv_heads=1 does not divide"):
        jaxllm.compile(jaxllm.init(UNEVEN), max_len=32, mesh=jaxllm.make_mesh(model=2))
