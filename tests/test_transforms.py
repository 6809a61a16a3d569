"""The algebra of transforms: what the ledger says, and which orders there are."""

import numpy as np
import pytest

import jaxllm

TOKENS = np.random.default_rng(0).integers(0, 256, (3, 40)).astype(np.int32)


def test_the_ledger_tells_what_was_done(tiny):
    lm = jaxllm.chain(
        jaxllm.compact(ffn=32, calibration=TOKENS), jaxllm.prune(0.5), jaxllm.quantize("int8"), jaxllm.quantize_kv()
    )(tiny)
    assert [entry.name for entry in lm.ledger] == ["init", "compact", "prune", "quantize", "quantize_kv"]
    assert lm.ledger[2].args == {
        "sparsity": 0.5,
        "method": "magnitude",
        "pattern": "unstructured",
        "scope": "layer",
        "match": r"layers_\d+/.*",
    }
    assert lm.ledger[2].touched["layers_N/mlp/gate/w"] == 3
    assert len({entry.parent for entry in lm.ledger}) == 5
    assert tiny.ledger == lm.ledger[:1]


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("prune", lambda: jaxllm.prune(0.5)),
        ("prune", lambda: jaxllm.prune(0.5, scope="global")),
        ("prune", lambda: jaxllm.prune(0.5, "sparsegpt", calibration=TOKENS)),
        ("compact", lambda: jaxllm.compact(ffn=32, calibration=TOKENS)),
        ("compact", lambda: jaxllm.compact(layers=2, calibration=TOKENS)),
    ],
)
def test_what_needs_float_weights_is_refused_after_quantize(tiny, format, name, after):
    message = rf"{name} cannot follow quantize: .* The order is compact, prune, quantize, .* start from"
    with pytest.raises(ValueError, match=message):
        jaxllm.chain(jaxllm.quantize(format), after())(tiny)


def test_one_weight_that_is_quantised_is_enough_to_refuse(tiny):
    with pytest.raises(ValueError, match="prune cannot follow quantize"):
        jaxllm.chain(jaxllm.quantize({"embed/w": "int8"}), jaxllm.prune(0.5))(tiny)
