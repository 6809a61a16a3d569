import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.arrays import QArray
from jaxllm.bisect import UNRECORDED, bisect, stand_out
from jaxllm.lm import Entry
from jaxllm.params import flatten, unflatten
from tests.conftest import TINY

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 24)).astype(np.int32)
CALIBRATION = np.random.default_rng(1).integers(0, 256, (2, 24)).astype(np.int32)


@pytest.fixture(scope="module")
def original():
    """Ends of their own, and six layers of about the same worth."""
    return jaxllm.init(dataclasses.replace(TINY, num_layers=6, tie_embeddings=False))


def changed(lm, **leaves):
    """The model with leaves replaced by function, behind the ledger's back; path with __ for /."""
    flat = flatten(lm.params)
    for name, change in leaves.items():
        path = name.replace("__", "/")
        flat[path] = change(flat[path])
    return dataclasses.replace(lm, params=unflatten(flat))


def noisy(leaf):
    """Three times as much noise as weight."""
    values = leaf.scale if isinstance(leaf, QArray) else leaf
    values = values + 3 * jnp.std(values) * jax.random.normal(jax.random.key(0), values.shape, values.dtype)
    return dataclasses.replace(leaf, scale=values) if isinstance(leaf, QArray) else values


def place(diagnosis, layer):
    (found,) = [each for each in diagnosis.places if each.layer == layer]
    return found


def test_noise_in_one_weight_after_an_honest_quantise(original):
    healthy = jaxllm.quantize()(original)
    broken = changed(healthy, layers_3__mlp__down__w=lambda q: dataclasses.replace(q, scale=q.scale * -2.0))
    found = bisect(broken, original, TOKENS)
    assert found.culprits == ("layer 3",)
    assert found.verdict.startswith("layer 3 (mlp/down) by something that the ledger does not have: KL ")
    assert [step.name for step in found.steps] == ["quantize", UNRECORDED]
    assert found.steps[0].kl < 0.05 * found.steps[1].kl_increase
    worst = place(found, 3)
    assert worst.local_snr_db < 10 < min(place(found, i).local_snr_db for i in (0, 1, 2, 4, 5))
    # The stream is fine before the layer and spoilt from it on.
    assert place(found, 2).stream_snr_db > 25 > place(found, 3).stream_snr_db > place(found, 5).stream_snr_db - 10
    assert max(worst.parts, key=lambda part: part.kl).modules == ("mlp/down",)
    assert {part.modules for part in worst.parts} == {(f"{m}",) for m in MATMULS}


MATMULS = ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")


def test_a_prune_rule_that_kills_a_layer(original):
    rules = {r"layers_1/.*": 0.95, r"layers_\d+/.*": 0.02}
    broken = jaxllm.chain(jaxllm.prune(rules), jaxllm.quantize())(original)
    found = bisect(broken, original, TOKENS)
    assert found.culprits == ("layer 1",)
    assert found.verdict.startswith("layer 1 by prune: KL ")  # all of it, not one weight
    assert [step.name for step in found.steps] == ["prune", "quantize"]
    assert found.steps[0].kl_increase > 10 * abs(found.steps[1].kl_increase)
    assert found.steps[1].kl == pytest.approx(found.quality.kl)
    assert found.steps[1].top1 == found.quality.top1


@pytest.mark.parametrize(
    ("path", "module"), [("embed__w", "embed"), ("head__w", "head"), ("final_norm__w", "final_norm")]
)
def test_broken_ends(original, path, module):
    found = bisect(changed(jaxllm.quantize()(original), **{path: noisy}), original, TOKENS)
    assert found.culprits == ("embedding and head",)
    assert found.verdict.startswith(f"embedding and head ({module}) by something that the ledger does not have")


def test_swaps_are_what_they_say(original):
    """Against models put together by hand, scored by `compare`."""
    made = jaxllm.chain(
        jaxllm.compact(ffn=32, kv_heads=[4, 4, 2, 4, 4, 4], calibration=CALIBRATION), jaxllm.quantize()
    )(original)
    found = bisect(made, original, TOKENS, CALIBRATION)
    assert found.quality == jaxllm.compare(made, original, TOKENS)
    assert found.reference_perplexity == pytest.approx(jaxllm.perplexity(original, TOKENS))
    for i in (0, 2, 5):
        widths = {}
        for name in ("num_heads", "num_kv_heads", "ffw_dim"):
            theirs, mine = original.cfg.widths(name), made.cfg.widths(name)
            widths[name] = (*theirs[:i], mine[i], *theirs[i + 1 :])
        params = {**original.params, f"layers_{i}": made.params[f"layers_{i}"]}
        mixed = dataclasses.replace(original, cfg=dataclasses.replace(original.cfg, **widths), params=params)
        expected = jaxllm.compare(mixed, original, TOKENS)
        assert place(found, i).kl == pytest.approx(expected.kl, rel=1e-4)
        assert place(found, i).flips == pytest.approx(1 - expected.top1)
    ends = {name: leaf for name, leaf in made.params.items() if not name.startswith("layers")}
    mixed = dataclasses.replace(original, params={**original.params, **ends})
    assert place(found, None).kl == pytest.approx(jaxllm.compare(mixed, original, TOKENS).kl, rel=1e-4)


def test_signal_to_noise_equals_numpys(original):
    """One layer whose own part of the stream is made twice as large: an error as large as the signal, 0 dB."""
    made = changed(original, layers_2__attn__o__w=lambda w: 2 * w, layers_2__mlp__down__w=lambda w: 0 * w)
    base = changed(original, layers_2__mlp__down__w=lambda w: 0 * w)
    found = bisect(made, base, TOKENS)
    assert place(found, 2).local_snr_db == pytest.approx(0, abs=1e-3)
    assert all(place(found, i).local_snr_db == math.inf for i in (0, 1, 3, 4, 5, None))
    assert place(found, 1).stream_snr_db == math.inf
    assert place(found, 1).kl == pytest.approx(0, abs=1e-6)

    def stream(lm, layers):
        return jaxllm.logits(first(lm, layers), TOKENS)

    def first(lm, layers):  # with the identity as head and no norm to speak of, logits are the stream
        keep = {f"layers_{i}": lm.params[f"layers_{i}"] for i in range(layers)}
        head = {
            "embed": lm.params["embed"],
            "final_norm": lm.params["final_norm"],
            "head": {"w": lm.params["head"]["w"]},
        }
        return dataclasses.replace(lm, cfg=dataclasses.replace(lm.cfg, num_layers=layers), params={**head, **keep})

    ours, theirs = (np.asarray(stream(lm, 6), np.float64) for lm in (made, base))
    ratio = np.mean(((ours - theirs) ** 2).sum(-1) / (theirs**2).sum(-1))
    assert place(found, None).stream_snr_db == pytest.approx(-10 * np.log10(ratio), abs=0.01)


def test_a_removed_layer_is_a_place_too(original):
    made = jaxllm.compact(ffn=56, layers=[0, 1, 3, 4, 5], calibration=CALIBRATION)(original)
    made = jaxllm.compact(layers=[0, 1, 2, 3], calibration=CALIBRATION)(made)
    found = bisect(made, original, TOKENS, CALIBRATION)
    assert [each.model_layer for each in found.places] == [None, 0, 1, None, 2, 3, None]
    for gone in (2, 5):
        assert place(found, gone).name == f"layer {gone} (removed)"
        assert place(found, gone).local_snr_db == pytest.approx(0)
        assert place(found, gone).parts == ()
    assert set(found.culprits) <= {"layer 2 (removed)", "layer 5 (removed)"}
    broken = changed(made, layers_2__attn__o__w=lambda w: 30 * w)
    assert bisect(broken, original, TOKENS, CALIBRATION).verdict.startswith(
        "layer 3 (attn/o, 2 in the model) by something"
    )


def test_two_broken_layers_are_both_named(original):
    made = changed(jaxllm.quantize()(original), layers_1__attn__v__w=noisy, layers_4__mlp__up__w=noisy)
    made = changed(original, layers_1__mlp__down__w=lambda w: -3 * w, layers_4__mlp__down__w=lambda w: -3 * w)
    found = bisect(made, original, TOKENS)
    assert set(found.culprits) == {"layer 1", "layer 4"}
    assert "layer 1 (mlp/down)" in found.verdict
    assert "layer 4 (mlp/down)" in found.verdict


@pytest.mark.parametrize("format", ["int8", "int4", "int4-g8"])
def test_a_healthy_model_has_no_culprit(original, format):
    found = bisect(jaxllm.quantize(format)(original), original, TOKENS)
    assert found.culprits == ()
    assert found.verdict.startswith("Nothing ")
    assert "quantize" in found.verdict or found.quality.kl < 1e-4


def test_the_model_itself_is_not_broken(original):
    found = bisect(original, original, TOKENS)
    assert found.verdict == "Nothing is broken: the model predicts what the reference does (KL 0)."
    assert found.steps == ()
    assert found.no_steps == ""


def test_nan_is_damage(original):
    made = changed(
        jaxllm.quantize()(original), layers_4__attn__o__w=lambda q: dataclasses.replace(q, scale=q.scale * jnp.nan)
    )
    found = bisect(made, original, TOKENS)
    assert found.verdict == (
        "layer 4 (attn/o) by something that the ledger does not have: the predictions are not finite."
    )
    assert math.isnan(place(found, 4).local_snr_db)
    assert math.isfinite(place(found, 3).stream_snr_db)
    with pytest.raises(ValueError, match="reference's own predictions are not finite"):
        bisect(original, made, TOKENS)


@pytest.mark.parametrize(
    ("method", "groups"),
    [
        (
            "awq",
            {("attn_norm", "attn/q", "attn/k", "attn/v", "attn/o"), ("mlp_norm", "mlp/gate", "mlp/up", "mlp/down")},
        ),
        (
            "smoothquant",
            {
                ("attn_norm", "attn/q", "attn/k", "attn/v"),
                ("attn/o",),
                ("mlp_norm", "mlp/gate", "mlp/up"),
                ("mlp/down",),
            },
        ),
    ],
)
def test_modules_that_were_scaled_together_are_swapped_together(original, method, groups):
    made = jaxllm.quantize("w8a8" if method == "smoothquant" else "int4-g8", method, calibration=CALIBRATION)(original)
    for lm in (made, dataclasses.replace(made, ledger=(Entry("load", {}), Entry("quantize", {"imported": "X"})))):
        found = bisect(lm, original, TOKENS, CALIBRATION)
        (parts,) = [each.parts for each in found.places if each.parts]
        if lm is made:
            assert {part.modules for part in parts} == groups
            assert max(part.kl for part in parts) < 10 * found.quality.kl  # alone they would be ruin


def test_channels_that_left_are_swapped_as_one(original):
    made = jaxllm.compact(ffn=[64, 64, 8, 64, 64, 64], calibration=CALIBRATION)(original)
    found = bisect(made, original, TOKENS, CALIBRATION)
    assert found.verdict.startswith("layer 2 (mlp/gate, mlp/up, mlp/down) by compact")
    assert place(found, 2).parts[0].why == "narrower"
    assert place(found, 2).parts[0].kl == pytest.approx(place(found, 2).kl, rel=1e-3)


def test_the_cache_is_a_part(original):
    found = bisect(jaxllm.quantize_kv()(original), original, TOKENS)
    parts = [part for each in found.places for part in each.parts]
    assert [part.modules for part in parts] == [("KV cache",)]


def test_without_a_ledger_that_can_be_done_again_there_are_layers_only(original):
    made = jaxllm.prune({r"layers_2/.*": 0.9}, "wanda", calibration=CALIBRATION)(original)
    found = bisect(made, original, TOKENS)
    assert found.steps == ()
    assert "saw the calibration text" in found.no_steps
    assert found.verdict.startswith("layer 2")
    imported = dataclasses.replace(made, ledger=(Entry("load", {}), Entry("quantize", {"imported": "GGUF"})))
    assert "before the weights were imported" in bisect(imported, original, TOKENS).no_steps
    other = jaxllm.prune(0.1)(original)
    assert "does not begin with the reference's" in bisect(made, other, TOKENS).no_steps


def test_a_reference_may_be_a_step_itself(original):
    pruned = jaxllm.prune(0.1)(original)
    made = jaxllm.quantize("int4")(pruned)
    found = bisect(made, pruned, TOKENS)
    assert [step.name for step in found.steps] == ["quantize"]
    assert found.steps[0].kl == pytest.approx(found.quality.kl)


def test_models_of_two_types_can_be_compared(original):
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), original.params)
    made = dataclasses.replace(original, cfg=dataclasses.replace(original.cfg, dtype="bfloat16"), params=half)
    found = bisect(changed(made, layers_2__mlp__up__w=noisy), original, TOKENS)
    assert found.verdict.startswith("layer 2 (mlp/up)")


def test_what_stands_out():
    assert stand_out([1, 2, 90, 3]) == [2]
    assert stand_out([50, 1, 40, 1]) == [0, 2]
    assert stand_out([30, 25, 20, 1]) == []  # most of them
    assert stand_out([4, 3, 2, 1]) == []
    assert stand_out([1.0] + [0.1] * 100) == []  # ten times the others, and a tenth of the damage
    assert stand_out([0, 0, 0]) == []
    assert stand_out([5]) == [0]
    assert stand_out([]) == []
    assert stand_out([5, 5]) == []
    assert stand_out([9, math.nan, 1, math.inf]) == [1, 3]


def test_models_that_do_not_belong_together_are_refused(original):
    with pytest.raises(ValueError, match="vocab_size is 128 and the reference's 256"):
        bisect(jaxllm.init(dataclasses.replace(TINY, vocab_size=128)), original, TOKENS)
    with pytest.raises(ValueError, match="3 layers and the reference 6; the ledger between them makes it 6"):
        bisect(jaxllm.init(TINY), original, TOKENS)
    with pytest.raises(ValueError, match="at least two tokens"):
        bisect(original, original, TOKENS[:, :1])


def test_a_diagnosis_is_json(original):
    found = bisect(jaxllm.prune({r"layers_2/.*": 0.9})(original), original, TOKENS)
    back = json.loads(json.dumps(dataclasses.asdict(found)))
    assert back["verdict"] == found.verdict
    assert back["places"][3]["layer"] == 2
