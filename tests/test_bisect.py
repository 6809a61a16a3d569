import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import jaxllm
from jaxllm.arrays import QArray
from jaxllm.bisect import UNRECORDED, bisect, stand_out, table
from jaxllm.lm import Entry
from jaxllm.params import flatten, unflatten
from tests.conftest import TINY

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 24)).astype(np.int32)
pytestmark = pytest.mark.slow
CALIBRATION = np.random.default_rng(1).integers(0, 256, (2, 24)).astype(np.int32)
MATMULS = ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")
BEHIND = "by something that the ledger does not have"


@pytest.fixture(scope="module")
def original():
    """Embedding and head apart, and a stream in which six layers are of about the same worth."""
    lm = jaxllm.init(dataclasses.replace(TINY, num_layers=6, tie_embeddings=False))
    return changed(lm, "embed/w", lambda w: 20 * w)


def changed(lm, path, change):
    """The model with one leaf changed behind the ledger's back."""
    flat = flatten(lm.params)
    flat[path] = change(flat[path])
    return dataclasses.replace(lm, params=unflatten(flat))


def noisy(leaf):
    """Each weight, or each channel of a quantised one, times a random number."""
    values = leaf.scale if isinstance(leaf, QArray) else leaf
    values = values * 3 * jax.random.normal(jax.random.key(0), values.shape, values.dtype)
    return dataclasses.replace(leaf, scale=values) if isinstance(leaf, QArray) else values


def silent(q):
    return dataclasses.replace(q, scale=0 * q.scale)


def place(diagnosis, layer):
    (found,) = [each for each in diagnosis.places if each.layer == layer]
    return found


def test_noise_in_one_weight_after_an_honest_quantise(original):
    found = bisect(changed(jaxllm.quantize()(original), "layers_3/mlp/down/w", noisy), original, TOKENS)
    assert found.culprits == ("layer 3",)
    assert found.verdict.startswith(f"layer 3 (mlp/down) {BEHIND}: KL ")
    assert [step.name for step in found.steps] == ["quantize", UNRECORDED]
    assert found.steps[0].kl < 0.05 * found.steps[1].kl_increase
    worst = place(found, 3)
    assert worst.local_snr_db < 10 < 25 < min(place(found, i).local_snr_db for i in (0, 1, 2, 4, 5))
    # The stream is good before the layer and spoilt from it on.
    assert place(found, 2).stream_snr_db > 25 > 15 > max(place(found, i).stream_snr_db for i in (3, 4, 5))
    assert {part.modules for part in worst.parts} == {(name,) for name in MATMULS}
    assert max(worst.parts, key=lambda part: part.kl).modules == ("mlp/down",)


def test_a_prune_rule_that_kills_a_layer(original):
    rules = {r"layers_1/.*": 0.95, r"layers_\d+/.*": 0.02}
    found = bisect(jaxllm.chain(jaxllm.prune(rules), jaxllm.quantize())(original), original, TOKENS)
    assert found.culprits == ("layer 1",)
    assert found.verdict.startswith("layer 1 by prune: KL ")  # all of it, not one weight
    assert [step.name for step in found.steps] == ["prune", "quantize"]
    assert found.steps[0].kl_increase > 10 * abs(found.steps[1].kl_increase)
    last = found.steps[-1]
    assert last.perplexity == found.quality.perplexity
    assert (last.kl, last.top1) == (found.quality.kl, found.quality.top1)
    assert last.culprits_kl == {"layer 1": pytest.approx(place(found, 1).kl)}


@pytest.mark.parametrize(("path", "module"), [("embed/w", "embed"), ("head/w", "head"), ("final_norm/w", "final_norm")])
def test_broken_ends(original, path, module):
    found = bisect(changed(jaxllm.quantize()(original), path, noisy), original, TOKENS)
    assert found.culprits == ("embedding and head",)
    assert found.verdict.startswith(f"embedding and head ({module}) {BEHIND}: KL ")
    assert place(found, None).local_snr_db < 10


def test_each_culprit_has_its_own_step(original):
    pruned = jaxllm.chain(jaxllm.prune({r"layers_4/attn/.*": 0.99}), jaxllm.quantize())(original)
    found = bisect(changed(pruned, "layers_1/attn/v/w", silent), original, TOKENS)
    assert set(found.culprits) == {"layer 1", "layer 4"}
    assert f"layer 1 (attn/v) {BEHIND}: KL " in found.verdict
    assert re.search(r"layer 4 \(attn/[^)]*\) by prune: KL ", found.verdict)


def test_swaps_are_what_they_say(original):
    """Against models put together by hand, scored by `compare`."""
    narrow = jaxllm.compact(ffn=32, kv_heads=[4, 4, 2, 4, 4, 4], calibration=CALIBRATION)
    made = jaxllm.chain(narrow, jaxllm.quantize())(original)
    found = bisect(made, original, TOKENS, CALIBRATION)
    assert found.quality == jaxllm.compare(made, original, TOKENS)
    assert found.reference_perplexity == jaxllm.perplexity(original, TOKENS)
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


def test_signal_to_noise_is_that_of_what_a_layer_adds(original):
    base = changed(original, "layers_2/mlp/down/w", lambda w: 0 * w)
    found = bisect(changed(base, "layers_2/attn/o/w", lambda w: 1.1 * w), base, TOKENS)
    assert place(found, 2).local_snr_db == pytest.approx(20, abs=0.01)  # an error of a tenth of the signal
    assert all(place(found, i).local_snr_db == math.inf for i in (0, 1, 3, 4, 5, None))
    assert place(found, 1).stream_snr_db == math.inf
    assert place(found, 1).kl == pytest.approx(0, abs=1e-6)


def test_signal_to_noise_of_the_predictions_equals_numpys(original):
    made = jaxllm.quantize("int4")(original)
    found = bisect(made, original, TOKENS)
    ours, theirs = (np.asarray(jaxllm.logits(lm, TOKENS), np.float64) for lm in (made, original))
    noise = np.mean(((ours - theirs) ** 2).sum(-1) / (theirs**2).sum(-1))
    assert place(found, None).stream_snr_db == pytest.approx(-10 * np.log10(noise), abs=0.01)


def test_a_removed_layer_is_a_place_too(original):
    first = jaxllm.compact(ffn=56, layers=[0, 1, 3, 4, 5], calibration=CALIBRATION)
    made = jaxllm.chain(first, jaxllm.compact(layers=[0, 1, 2, 3], calibration=CALIBRATION))(original)
    found = bisect(made, original, TOKENS, CALIBRATION)
    assert [each.model_layer for each in found.places] == [None, 0, 1, None, 2, 3, None]
    for gone, step in {2: 1, 5: 2}.items():
        assert place(found, gone).name == f"layer {gone} (removed)"
        assert place(found, gone).local_snr_db == pytest.approx(0)
        assert place(found, gone).parts == ()
        if place(found, gone).name in found.culprits:
            assert f"layer {gone} (removed) by compact (step {step}): " in found.verdict
    assert found.culprits
    assert set(found.culprits) <= {"layer 2 (removed)", "layer 5 (removed)"}
    broken = bisect(changed(made, "layers_2/attn/o/w", lambda w: 30 * w), original, TOKENS, CALIBRATION)
    assert broken.verdict.startswith(f"layer 3 (attn/o, 2 in the model) {BEHIND}: ")


def test_two_broken_layers_are_both_named(original):
    made = changed(original, "layers_1/mlp/down/w", lambda w: -3 * w)
    made = changed(made, "layers_4/mlp/down/w", lambda w: -3 * w)
    found = bisect(made, original, TOKENS)
    assert set(found.culprits) == {"layer 1", "layer 4"}
    assert f"layer 1 (mlp/down) {BEHIND}: " in found.verdict
    assert f"layer 4 (mlp/down) {BEHIND}: " in found.verdict


@pytest.mark.parametrize("format", ["int8", "int4", "int4-g8"])
def test_a_healthy_model_has_no_culprit(original, format):
    found = bisect(jaxllm.quantize(format)(original), original, TOKENS)
    assert found.culprits == ()
    assert found.verdict.startswith("Nothing ")
    if found.quality.kl > 1e-4:
        assert "Of the steps, quantize costs most: " in found.verdict


def test_the_model_itself_is_not_broken(original):
    found = bisect(original, original, TOKENS)
    assert found.verdict.startswith("Nothing is broken: the model predicts what the reference does")
    assert (found.steps, found.no_steps, found.culprits) == ((), "", ())
    assert not any(each.parts for each in found.places)


@pytest.mark.parametrize("quantized", [True, False])
def test_nan_is_damage(original, quantized):
    def ruin(leaf):
        return dataclasses.replace(leaf, scale=leaf.scale * jnp.nan) if quantized else leaf.at[0, 0].set(jnp.nan)

    made = changed(jaxllm.quantize()(original) if quantized else original, "layers_4/attn/o/w", ruin)
    found = bisect(made, original, TOKENS)
    assert found.verdict.startswith(f"layer 4 (attn/o) {BEHIND}: predictions that are not finite")
    assert math.isnan(place(found, 4).local_snr_db)
    assert math.isfinite(place(found, 3).kl)
    with pytest.raises(ValueError, match="reference's own predictions are not finite"):
        bisect(original, made, TOKENS)


@pytest.mark.parametrize(
    ("format", "method", "groups"),
    [
        ("int4-g8", "awq", ["attn_norm attn/q attn/k attn/v attn/o", "mlp_norm mlp/gate mlp/up mlp/down"]),
        ("w8a8", "smoothquant", ["attn_norm attn/q attn/k attn/v", "attn/o", "mlp_norm mlp/gate mlp/up", "mlp/down"]),
    ],
)
def test_what_was_scaled_together_is_swapped_together(original, format, method, groups):
    made = jaxllm.quantize({r"layers_.*": format}, method, calibration=CALIBRATION)(original)
    found = bisect(made, original, TOKENS, CALIBRATION)
    (parts,) = [each.parts for each in found.places if each.parts]
    assert {frozenset(part.modules) for part in parts} == {frozenset(group.split()) for group in groups}
    assert {part.why for part in parts} <= {"", "scaled together"}
    assert max(part.kl for part in parts) < found.quality.kl  # a scaled norm alone would be ruin
    imported = dataclasses.replace(made, ledger=(Entry("load", {}), Entry("quantize", {"imported": "GGUF"})))
    assert "before the weights were imported (GGUF)" in bisect(imported, original, TOKENS).no_steps


def test_channels_that_left_are_swapped_as_one(original):
    made = jaxllm.compact(ffn=[64, 64, 8, 64, 64, 64], calibration=CALIBRATION)(original)
    found = bisect(made, original, TOKENS, CALIBRATION)
    assert found.verdict.startswith("layer 2 (mlp/down, mlp/gate, mlp/up) by compact: KL ")
    (part,) = place(found, 2).parts
    assert part.why == "narrower"
    assert part.kl == pytest.approx(place(found, 2).kl, rel=1e-3)


def test_the_cache_is_a_part(original):
    found = bisect(jaxllm.quantize_kv()(original), original, TOKENS)
    assert [part.modules for each in found.places for part in each.parts] == [("KV cache",)]


def test_without_a_ledger_that_can_be_done_again_there_are_layers_only(original):
    made = jaxllm.prune({r"layers_2/.*": 0.9}, "wanda", calibration=CALIBRATION)(original)
    found = bisect(made, original, TOKENS)
    assert found.steps == ()
    assert "saw the calibration text" in found.no_steps
    assert found.verdict.startswith("layer 2: KL ")
    assert "does not begin with the reference's" in bisect(made, jaxllm.prune(0.1)(original), TOKENS).no_steps


def test_a_reference_may_be_a_step_itself(original):
    pruned = jaxllm.prune(0.1)(original)
    found = bisect(jaxllm.quantize("int4")(pruned), pruned, TOKENS)
    assert [step.name for step in found.steps] == ["quantize"]
    assert found.steps[0].kl == pytest.approx(found.quality.kl)


def test_models_of_two_types_can_be_compared(original):
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), original.params)
    made = dataclasses.replace(original, cfg=dataclasses.replace(original.cfg, dtype="bfloat16"), params=half)
    found = bisect(changed(made, "layers_2/mlp/up/w", noisy), original, TOKENS)
    assert found.verdict.startswith("layer 2 (mlp/up)")


def test_what_stands_out():
    assert stand_out([1, 2, 90, 3]) == [2]
    assert stand_out([10, 1, 40, 20]) == [2]  # more than all others together
    assert stand_out([50, 1, 40, 1]) == [0, 2]
    assert stand_out([30, 25, 20, 1]) == []  # most of them
    assert stand_out([4, 3, 2, 1]) == []
    assert stand_out([1.0] + [0.1] * 100) == []  # ten times any other, and a tenth of the damage
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
    stranger = dataclasses.replace(original, ledger=(Entry("load", {}), Entry("compact", {"layers": [0, 99]})))
    with pytest.raises(ValueError, match=r"layers \[0, 99\] were kept of 6"):
        bisect(stranger, original, TOKENS)


def test_a_diagnosis_is_json_and_a_table(original):
    found = bisect(jaxllm.prune({r"layers_2/.*": 0.9})(original), original, TOKENS)
    assert json.loads(json.dumps(dataclasses.asdict(found)))["places"][3]["layer"] == 2
    console = Console(width=150)
    with console.capture() as captured:
        console.print(table(found))
    text = captured.get()
    for shown in ("prune", f"{found.reference_perplexity:.2f}", "layer 2", "mlp/down", found.verdict):
        assert shown in text
