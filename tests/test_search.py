import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.params import flatten, unflatten
from jaxllm.search import Space, plot, search, write_recipe
from jaxllm.sensitivity import Option, allocate, layer_damage, within
from jaxllm.transforms.compact import keep_layers
from jaxllm.transforms.layerwise import each_alone

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 40)).astype(np.int32)
OTHER = np.random.default_rng(1).integers(0, 256, (2, 40)).astype(np.int32)


def with_scaled(lm, scales):
    """The model with what each layer adds to the residual stream multiplied."""
    flat = flatten(lm.params)
    for i, scale in enumerate(scales):
        for out in ("attn/o", "mlp/down"):
            flat[f"layers_{i}/{out}/w"] = flat[f"layers_{i}/{out}/w"] * scale
    return dataclasses.replace(lm, params=unflatten(flat))


def test_allocation_is_the_best_there_is_at_every_point_of_its_front():
    rng = np.random.default_rng(0)
    places = [
        [Option(f"{place}.{i}", cost, damage) for i, (cost, damage) in enumerate(rng.integers(0, 50, (4, 2)).tolist())]
        for place in range(4)
    ]
    everything = [(sum(o.cost for o in choice), sum(o.damage for o in choice)) for choice in itertools.product(*places)]
    front = [(sum(o.cost for o in choice), sum(o.damage for o in choice)) for choice in allocate(places)]
    for cost, damage in front:
        assert damage == min(d for c, d in everything if c <= cost)
    assert [c for c, _ in front] == sorted((c for c, _ in front), reverse=True)
    assert front[-1][0] == min(c for c, _ in everything)
    assert front[0][1] == min(d for _, d in everything)


def test_a_budget_below_the_cheapest_is_refused():
    front = allocate([[Option("a", 4, 0), Option("b", 2, 1)], [Option("c", 3, 0)]])
    assert [option.name for option in within(front, 6.9)] == ["b", "c"]
    with pytest.raises(ValueError, match="cheapest choice of the options given costs 5"):
        within(front, 4.9)


def test_the_damage_of_one_layer_equals_comparing_the_whole_models(tiny):
    pruned = jaxllm.prune(0.6)(tiny)

    def variants(i):
        return {"pruned": (tiny.cfg.layer(i), pruned.params[f"layers_{i}"]), "gone": None}

    found = layer_damage(tiny, TOKENS, variants)
    for i in range(tiny.cfg.num_layers):
        params = {**tiny.params, f"layers_{i}": pruned.params[f"layers_{i}"]}
        expected = jaxllm.compare(dataclasses.replace(tiny, params=params), tiny, TOKENS).kl
        np.testing.assert_allclose(found[i]["pruned"], expected, rtol=1e-4)
        without = keep_layers(tiny, [j for j in range(tiny.cfg.num_layers) if j != i])
        np.testing.assert_allclose(found[i]["gone"], jaxllm.compare(without, tiny, TOKENS).kl, rtol=1e-4)


def test_a_layer_alone_is_what_the_transform_makes_of_it_first(tiny):
    transforms = {
        "wanda": jaxllm.prune(0.5, "wanda", calibration=TOKENS),
        "narrow": jaxllm.compact(ffn=40, kv_heads=2, calibration=TOKENS),
        "int8": jaxllm.quantize("int8"),
    }
    variants = each_alone(tiny, transforms, TOKENS)
    first = variants(0)
    for name, transform in transforms.items():
        cfg, layer = first[name]
        whole = transform(tiny)
        assert cfg == whole.cfg.layer(0)
        jax.tree.map(np.testing.assert_array_equal, layer, whole.params["layers_0"])
    cfg, layer = variants(1)["wanda"]
    only = jaxllm.prune({r"layers_1/.*": 0.5}, "wanda", calibration=TOKENS)(tiny)
    jax.tree.map(np.testing.assert_array_equal, layer, only.params["layers_1"])


def test_sparsity_by_sensitivity_spares_the_layer_that_matters(tiny):
    lm = with_scaled(tiny, [1.0, 0.01, 1.0])
    pruned = jaxllm.prune(0.5, scope="sensitivity", calibration=TOKENS)(lm)
    sizes, zeros = [], []
    for i in range(3):
        weights = [w for path, w in flatten(pruned.params).items() if path.startswith(f"layers_{i}/") and w.ndim > 1]
        sizes.append(sum(w.size for w in weights))
        zeros.append(sum(int(jnp.sum(w == 0)) for w in weights) / sizes[-1])
    assert zeros[1] == pytest.approx(0.7, abs=1e-3)
    assert min(zeros[0], zeros[2]) < 0.5
    assert np.average(zeros, weights=sizes) >= 0.5 - 1e-3
    assert set(pruned.ledger[-1].args["sparsity"]) == {rf"(?=layers_{i}/)(?:layers_\d+/.*)" for i in range(3)}


def made_by(recipe, lm):
    names = {}
    exec(compile(recipe, "recipe", "exec"), names)  # what `search` wrote
    return jaxllm.chain(*names["transforms"](TOKENS))(lm)


@pytest.mark.parametrize(
    ("unit", "budget", "space"),
    [
        ("bytes", 0.4, Space(("float", "int8", "int4-g16"))),
        ("params", 0.7, Space(("float",), (1.0, 0.75, 0.5), (2,), drop=True)),
        ("bytes", 0.2, Space(("int8",), (1.0, 0.5), drop=True)),
    ],
)
def test_a_search_keeps_its_budget_and_its_recipe_makes_what_was_measured(tiny, unit, budget, space):
    lm = with_scaled(tiny, [1.0, 0.05, 1.0])
    result = search(lm, OTHER, budget, unit, space, calibration=TOKENS)
    best = result.candidates[result.best]
    made = made_by(best.recipe, lm)
    assert (made.weight_bytes, made.num_params) == (best.weight_bytes, best.params)
    cost = made.weight_bytes if unit == "bytes" else made.num_params
    assert cost == best.cost <= budget * (lm.weight_bytes if unit == "bytes" else lm.num_params)
    assert jaxllm.compare(made, lm, OTHER) == best.quality
    allowed = [c.quality.kl for c in result.candidates if c.cost <= result.budget]
    assert best.quality.kl == min(allowed)
    if space.drop:
        assert "layers=[0, 2]" in best.recipe  # the layer that does little is the one that goes


def test_a_search_by_time_measures_it(tiny):
    result = search(tiny, OTHER, 1.0, "ms", Space(("float", "int8")), calibration=TOKENS)
    assert result.budget == result.original_cost
    assert 0 < result.candidates[result.best].cost <= result.budget * (1 + 1e-9)


def test_the_budget_of_all_is_enough_for_all():
    """Though the same costs, added in another order, come to a little more."""
    choice = tuple(Option(None, cost, 0.0) for cost in (0.1, 0.2, 0.3))
    assert within([choice], math.nextafter(0.6, 0.0)) == choice


def test_what_a_search_writes(tiny, tmp_path):
    result = search(tiny, OTHER, 0.5, "bytes", Space(("float", "int8")), calibration=TOKENS)
    write_recipe(result, tmp_path / "recipe.py", "tiny")
    plot(result, tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes()[1:4] == b"PNG"
    text = (tmp_path / "recipe.py").read_text()
    assert f"KL {result.candidates[result.best].quality.kl:.4f}" in text
    assert made_by(text, tiny).weight_bytes == result.candidates[result.best].weight_bytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 0.01}, "cheapest choice of the options given costs"),
        ({"budget": -1.0}, "expected a fraction of the original's cost"),
        ({"budget": math.nan}, "expected a fraction of the original's cost"),
        ({"unit": "feet"}, "expected one of bytes, ms, params"),
    ],
)
def test_what_cannot_be_is_refused(tiny, change, message):
    given = {"budget": 0.5, "unit": "bytes"} | change
    with pytest.raises(ValueError, match=message):
        search(tiny, OTHER, space=Space(("float", "int8")), calibration=TOKENS, **given)


def test_a_bound_that_nothing_keeps_leaves_what_was_measured(tiny):
    result = search(tiny, OTHER, 0.5, "bytes", Space(("float", "int8")), max_kl=-1.0, calibration=TOKENS)
    assert result.best is None
    assert len(result.candidates) > 1


def test_layers_of_different_widths_can_be_searched(tiny):
    lm = jaxllm.compact(ffn=[40, 64, 64], kv_heads=[2, 1, 2], calibration=TOKENS)(tiny)
    result = search(lm, OTHER, 0.75, "params", Space(("float", "fp8"), (1.0, 0.5), (1,)), calibration=TOKENS)
    best = result.candidates[result.best]
    assert made_by(best.recipe, lm).num_params == best.params <= result.budget


@pytest.mark.parametrize("space", [{"formats": ("int9",)}, {"formats": ()}, {"ffn": (0.0,)}, {"ffn": ()}])
def test_spaces_that_cannot_be_are_refused(space):
    with pytest.raises(ValueError, match=r"int9|no formats|fractions"):
        Space(**space)
