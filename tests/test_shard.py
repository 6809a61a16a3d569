"""Every kind of leaf over four devices says what it says on one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.arrays import QArray
from jaxllm.lm import forward
from jaxllm.params import flatten
from jaxllm.shard import RULES, SCATTER, check_mesh, param_shardings, sharding
from tests.conftest import TINY

TOKENS = np.random.default_rng(0).integers(0, 256, (4, 12)).astype(np.int32)
SMALL = dataclasses.replace(TINY, num_layers=1)
UNEVEN = dataclasses.replace(TINY, num_layers=2, num_heads=(8, 4), num_kv_heads=(4, 2), ffw_dim=(64, 48))


@functools.cache
def model(format):
    return jaxllm.quantize(format, calibration=TOKENS)(jaxllm.init(SMALL))


def on(mesh, lm):
    """Logits of the sharded model, and its weights as they lie on the devices."""
    params = jax.device_put(lm.params, param_shardings(lm.cfg, lm.params, mesh))
    tokens = jax.device_put(jnp.asarray(TOKENS), sharding(mesh, RULES, "batch", None))
    return jax.jit(functools.partial(forward, lm.cfg))(params, tokens), flatten(params)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"model": 4}, {"data": 2, "model": 2}])
@pytest.mark.parametrize(
    "format", ["int8-affine", "int4-g16", "int8-g16-affine", "int4-g32", "w8a8", "w8a8-static", "fp8"]
)
def test_every_format_over_four_devices(format, mesh):
    lm, chips = model(format), mesh["model"]
    logits, leaves = on(jaxllm.make_mesh(**mesh), lm)
    # A step of int8 activations may fall on the other side of a tie: sums come in another order.
    np.testing.assert_allclose(logits, jaxllm.logits(lm, TOKENS), atol=2e-2 if "w8a8" in format else 3e-3)
    gate, down = leaves["layers_0/mlp/gate/w"], leaves["layers_0/mlp/down/w"]
    assert isinstance(gate, QArray)
    for part in (gate.values, gate.scale, gate.zero_point):  # by outputs
        if part is not None:
            assert part.addressable_shards[0].data.shape[0] == 64 // chips
    assert down.values.addressable_shards[0].data.shape == (32, 64 // chips)  # by inputs
    groups = down.groups // chips if down.groups % chips == 0 else down.groups
    assert down.scale.addressable_shards[0].data.shape == (32, groups)


@pytest.mark.slow
def test_layers_of_different_widths_over_devices():
    lm = jaxllm.init(UNEVEN)
    logits, leaves = on(jaxllm.make_mesh(data=2, model=2), lm)
    np.testing.assert_allclose(logits, jaxllm.logits(lm, TOKENS), atol=1e-5)
    assert leaves["layers_1/mlp/down/w"].addressable_shards[0].data.shape == (32, 24)
    assert leaves["layers_1/attn/k/w"].addressable_shards[0].data.shape == (1, 8, 32)


@pytest.mark.slow
def test_an_int8_cache_and_uneven_quantised_layers_generate_the_same():
    lm = jaxllm.chain(jaxllm.quantize_kv(), jaxllm.quantize({".*/down/w": "int4-g16", ".*": "int8"}))(
        jaxllm.init(UNEVEN)
    )
    prompts = [list(range(3 + n, 12 - n)) for n in range(4)]
    plain = jaxllm.compile(lm, batch=4, max_len=16).generate(prompts, max_new_tokens=4)
    sharded = jaxllm.compile(lm, batch=4, max_len=16, mesh=jaxllm.make_mesh(data=2, model=2))
    assert [r.tokens for r in sharded.generate(prompts, max_new_tokens=4)] == [r.tokens for r in plain]


def test_a_scattered_residual_stream_generates_the_same():
    lm = jaxllm.init(dataclasses.replace(TINY, num_layers=2))
    prompts = [list(range(3 + n, 14 - n)) for n in range(2)]
    plain = jaxllm.compile(lm, batch=2, max_len=16).generate(prompts, max_new_tokens=4)
    sharded = jaxllm.compile(lm, batch=2, max_len=16, mesh=jaxllm.make_mesh(model=2, share=2), rules=SCATTER)
    assert [r.tokens for r in sharded.generate(prompts, max_new_tokens=4)] == [r.tokens for r in plain]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({**RULES, "residual": "data"}, r"one array twice over \['data'\]: batch: data, residual: data"),
        ({**RULES, "embed": "model"}, r"one array twice over \['model'\]"),
        ({**RULES, "ffw": "rows"}, r"split over \['rows'\]; expected axes of \('data', 'model', 'share'\)"),
        ({"batch": "data"}, r"The rules are for \['batch'\]; expected one for each of"),
        (SCATTER, r"embed_dim=30 does not divide over the mesh's model=4 .*model may be one of \[1, 2\]"),
    ],
)
def test_rules_that_cannot_be_are_refused(rules, message):
    cfg = dataclasses.replace(TINY, embed_dim=30)
    with pytest.raises(ValueError, match=message):
        check_mesh(cfg, jaxllm.make_mesh(model=4), 4, rules)
