import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

import jaxllm
from jaxllm import lm as lm_module
from jaxllm.lm import Entry
from jaxllm.params import flatten
from jaxllm.replay import load_recipe, read_ledger, transforms_of
from jaxllm.transforms.layerwise import Layerwise
from tests.conftest import TINY

TOKENS = np.random.default_rng(0).integers(0, 256, (3, 40)).astype(np.int32)
OTHER = np.random.default_rng(1).integers(0, 256, (3, 40)).astype(np.int32)

CHAINS = {
    "magnitude": [jaxllm.prune(0.3)],
    "global": [jaxllm.prune(0.3, scope="global", match=r".*/mlp/.*")],
    "global wanda": [jaxllm.prune(0.3, "wanda", scope="global", calibration=TOKENS)],
    "rules": [jaxllm.prune({r".*/mlp/.*": 0.7, r".*/attn/.*": 1 / 3}, "wanda", calibration=TOKENS)],
    "2:4": [jaxllm.prune(method="sparsegpt", pattern="2:4", calibration=TOKENS)],
    "blocks": [jaxllm.prune(0.5, pattern="4x4")],
    "int8": [jaxllm.quantize()],
    "formats": [jaxllm.quantize({r".*/down/w": None, r"embed/w": "int8", ".*": "int4-g8-affine"}, clip="mse")],
    "gptq": [jaxllm.quantize("int4-g16", "gptq", calibration=TOKENS)],
    "awq": [jaxllm.quantize("int4-g16", "awq", calibration=TOKENS)],
    "smoothquant": [jaxllm.quantize("w8a8-static", "smoothquant", "percentile", 0.7, calibration=TOKENS)],
    "compact": [jaxllm.compact(ffn=0.5, kv_heads=2, calibration=TOKENS)],
    "compact by layer": [jaxllm.compact(ffn=[64, 40, 32], kv_heads=[4, 3, 2], correct=False, calibration=TOKENS)],
    "compact layers": [jaxllm.compact(layers=2, calibration=TOKENS)],
    "compact all": [jaxllm.compact(ffn=[40, 0.5], kv_heads=0.75, layers=[0, 2], calibration=TOKENS)],
    "long": [
        jaxllm.compact(ffn=[64, 40, 32], calibration=TOKENS),
        jaxllm.compact(layers=0.7, kv_heads=3, calibration=TOKENS),
        jaxllm.prune(0.5, "wanda", calibration=TOKENS),
        jaxllm.quantize_kv(),
        jaxllm.quantize({r".*/mlp/.*": "int4-g8"}, "gptq", calibration=TOKENS),
        jaxllm.quantize({r".*/attn/.*|embed/w": "int8"}),
    ],
}


def same(a, b):
    if a.cfg != b.cfg or a.ledger != b.ledger or jax.tree.structure(a.params) != jax.tree.structure(b.params):
        return False
    pairs = zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True)
    return all(x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


@pytest.fixture(scope="module")
def original():
    """Three layers of different worth, so that what is kept is a choice."""
    return jaxllm.init(dataclasses.replace(TINY, qkv_bias=True), seed=3)


@pytest.mark.parametrize("name", CHAINS)
def test_a_ledger_makes_the_same_model_again(original, name):
    made = jaxllm.chain(*CHAINS[name])(original)
    assert len(transforms_of(made.ledger, TOKENS)) == len(CHAINS[name])
    assert same(jaxllm.chain(*transforms_of(made.ledger, TOKENS))(original), made)
    stored = [Entry(**entry) for entry in json.loads(json.dumps([dataclasses.asdict(entry) for entry in made.ledger]))]
    assert tuple(stored) == made.ledger  # parents and all
    assert same(jaxllm.chain(*transforms_of(stored, TOKENS))(original), made)


def test_what_fractions_and_counts_decided_is_what_is_done_again(original):
    """On another model the same layers, counts and rules: nothing is chosen anew."""
    made = jaxllm.compact(ffn=0.5, layers=2, calibration=TOKENS)(original)
    kept = made.ledger[-1].args["layers"]
    assert len(kept) == 2
    assert made.ledger[-1].args["ffn"] == 32
    for seed in range(4):
        again = jaxllm.chain(*transforms_of(made.ledger, TOKENS))(jaxllm.init(original.cfg, seed=seed))
        assert again.ledger[-1].args["layers"] == kept


def test_a_saved_directory_is_a_recipe(original, tmp_path):
    made = jaxllm.chain(jaxllm.compact(ffn=40, layers=[0, 2], calibration=TOKENS), jaxllm.prune(0.4))(original)
    jaxllm.save(made, tmp_path / "saved")
    (tmp_path / "list.json").write_text(json.dumps([dataclasses.asdict(entry) for entry in made.ledger]))
    for path in (tmp_path / "saved", tmp_path / "saved" / "jaxllm.json", tmp_path / "list.json"):
        recipe = load_recipe(path, TOKENS)
        assert recipe.title == "compact + prune"
        assert same(jaxllm.chain(*recipe.transforms)(original), made)


def test_the_shipped_text_is_found_by_its_windows_and_an_own_one_must_be_given(original):
    lm = dataclasses.replace(original, tokenizer=Bytes())
    windows = jaxllm.token_windows(lm, jaxllm.calibration_text(), 64, 2)
    for made in (
        jaxllm.prune(0.5, "wanda")(lm),
        jaxllm.prune(0.5, "wanda", calibration=windows)(lm),  # a part of the shipped text
    ):
        assert same(jaxllm.chain(*transforms_of(made.ledger))(lm), made)
    text = jaxllm.evaluation_text()
    made = jaxllm.quantize("int4", "gptq", calibration=jaxllm.token_windows(lm, text, 48, 3))(
        jaxllm.prune(0.5, "wanda")(lm)
    )
    assert same(jaxllm.chain(*transforms_of(made.ledger, text))(lm), made)  # one saw the shipped text, one this
    with pytest.raises(ValueError, match=r"saw .*\[3, 48\].*ships with jaxllm is .*--calibration"):
        transforms_of(made.ledger)[0](lm)  # before the first of them starts, which saw the shipped one
    with pytest.raises(ValueError, match=r"the one given is .*\[3, 40\]"):
        transforms_of(made.ledger, OTHER)[0](lm)


def test_without_a_tokenizer_ids_are_asked_for(original):
    made = jaxllm.prune(0.5, "wanda", calibration=TOKENS)(original)
    with pytest.raises(ValueError, match=r"no tokenizer.*token ids"):
        transforms_of(made.ledger)[0](original)


def test_layerwise_transforms_stay_so(original):
    """They are what can run on models that do not fit into memory."""
    made = jaxllm.chain(jaxllm.prune(0.5, "wanda", calibration=TOKENS), jaxllm.quantize())(original)
    again = transforms_of(made.ledger, TOKENS)
    assert all(isinstance(each, Layerwise) for each in again)
    assert same(jaxllm.chain(*again)(original), made)


class Bytes:
    def encode(self, text, add_special=False):
        return list(text.encode())[:600]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("frobnicate", {})], "has 'frobnicate', which this version does not know; known:.*'quantize'"),
        ([("quantize", {"format": "int4", "bits": 4})], "quantize has no argument 'bits'; it has format, method"),
        ([("quantize_kv", {"format": "int4"})], "quantize_kv has no argument 'format'; it has none"),
        ([("quantize", {"imported": "GGUF Q4_0"})], "before the weights were imported .GGUF Q4_0."),
        ([("quantize", {"format": 4})], r"format is 4; expected str \| Mapping"),
        ([("quantize", {"format": {"embed/w": 4}})], "format is"),
        ([("quantize", {"format": "int3"})], "no format of weights"),
        ([("quantize", {"method": "magic"})], "method is 'magic'; expected one of rtn"),
        ([("prune", {"sparsity": True})], "sparsity is True"),
        ([("prune", {"sparsity": 2})], "sparsity is 2"),
        ([("prune", {"sparsity": 0.5, "match": None})], "match is None; expected str"),
        ([("compact", {"ffn": [1, "2"]})], "ffn is"),
        ([("compact", {"ffn": 32, "correct": 1})], "correct is 1; expected bool"),
        ([("compact", {})], "asked for nothing"),
        ([("compact", {"ffn": 32, "calibration": [[1, 2]]})], 'calibration is .*; expected .*"windows"'),
        ([("compact", {"ffn": 32, "calibration": {"windows": [3, 40], "sha256": "../.."}})], "calibration is"),
        ([("quantize", {}), ("prune", {"sparsity": 0.5})], "prune cannot follow quantize.*compact, prune"),
        ([("quantize", {}), ("load", {})], "'load' after 'quantize'; only its first line"),
    ],
)
def test_entries_that_cannot_be_done_again_are_refused_at_once(entries, message):
    with pytest.raises(ValueError, match=message):
        transforms_of([Entry("init", {"seed": 0}), *(Entry(name, args) for name, args in entries)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("3", "holds no ledger"),
        ('{"config": {}}', "holds no ledger"),
        ("[3]", "entry 0 is 3; expected an object with name, args"),
        ('[{"name": "prune"}]', "entry 0 is"),
        ('[{"name": "prune", "args": {}, "code": "x"}]', "entry 0 is"),
        ('[{"name": "prune", "args": [1]}]', r"entry 0: args is \[1\]; expected a dict"),
        ('[{"name": "prune", "args": {"sparsity": NaN}}]', "sparsity is nan"),
        ("[]", "without transforms"),
        ('[{"name": "init", "args": {}}]', "without transforms"),
        (json.dumps([{"name": "quantize_kv", "args": {}}] * 1001), "1001 entries"),
    ],
)
def test_broken_json_is_refused_with_its_name(tmp_path, text, message):
    file = tmp_path / "recipe.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"recipe.json.*{message}"):
        load_recipe(file)


def test_json_is_bounded_before_it_is_read(tmp_path, monkeypatch):
    file = tmp_path / "recipe.json"
    with open(file, "wb") as opened:
        opened.truncate(2**30)
    with pytest.raises(ValueError, match="1073741824 bytes"):
        load_recipe(file)
    with pytest.raises(FileNotFoundError, match=r"is not there; expected a \.py script"):
        load_recipe(tmp_path / "nothing.json")
    with pytest.raises(FileNotFoundError, match=r"jaxllm\.json is not there"):
        load_recipe(tmp_path)


def test_a_ledger_written_by_hand_needs_no_more_than_names_and_arguments(original, tmp_path):
    file = tmp_path / "recipe.json"
    file.write_text(
        '[{"name": "prune", "args": {"sparsity": 0.5, "method": "wanda"}}, {"name": "quantize", "args": {}}]'
    )
    assert read_ledger(file)[1] == Entry("quantize", {})
    by_hand = jaxllm.chain(jaxllm.prune(0.5, "wanda", calibration=OTHER), jaxllm.quantize())(original)
    assert same(jaxllm.chain(*load_recipe(file, OTHER).transforms)(original), by_hand)


def test_a_script_is_a_recipe(original, tmp_path):
    file = tmp_path / "half.py"
    file.write_text('''"""Half of the weights.

More of it."""
import jaxllm

MATCH = ".*/mlp/.*"

def transform(lm):
    return jaxllm.prune(0.5, match=MATCH)(lm)

if __name__ == "__main__":
    raise AssertionError("a recipe is not the main program")
''')
    recipe = load_recipe(file)
    assert recipe.title == "Half of the weights."
    assert same(jaxllm.chain(*recipe.transforms)(original), jaxllm.prune(0.5, match=".*/mlp/.*")(original))
    file.write_text("import jaxllm\ntransforms = [jaxllm.prune(0.5), jaxllm.quantize()]")
    recipe = load_recipe(file)
    assert recipe.title == "half"
    expected = jaxllm.chain(jaxllm.prune(0.5), jaxllm.quantize())(original)
    assert same(jaxllm.chain(*recipe.transforms)(original), expected)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1", "defines neither; expected either `transform`"),
        ("transform = 1", "defines transform; expected"),
        ("transforms = []", "defines transforms; expected"),
        ("transforms = [3]", "defines transforms; expected"),
        ("transform = print\ntransforms = [print]", "defines transform and transforms"),
        ("1 / 0", "failed: ZeroDivisionError"),
        ("raise SystemExit(3)", "failed: SystemExit"),
        ("def", "failed: SyntaxError"),
    ],
)
def test_a_script_that_is_no_recipe_is_refused(tmp_path, code, message):
    file = tmp_path / "recipe.py"
    file.write_text(code)
    with pytest.raises(ValueError, match=f"recipe.py {message}"):
        load_recipe(file)


ALL = {
    "compact": jaxllm.compact(ffn=0.75, calibration=TOKENS),
    "prune": jaxllm.prune(0.3),
    "distill": lambda lm: jaxllm.distill(lm, TOKENS, jaxllm.Training(steps=1, batch=1))(lm),
    "quantize": jaxllm.quantize({r".*/mlp/.*": "int8"}),
    "quantize_kv": jaxllm.quantize_kv(),
}
REFUSED = {("prune", "compact"), ("quantize", "compact"), ("quantize", "prune"), ("quantize", "distill")}


@pytest.fixture(scope="module")
def after(original):
    """The model after a transform."""
    return functools.cache(lambda name: ALL[name](original))


@pytest.mark.parametrize("later", ALL)
@pytest.mark.parametrize("earlier", ALL)
def test_every_order_is_legal_or_refused_with_the_legal_ones(original, after, earlier, later):
    assert {*ALL, "load", "init"} == set(lm_module._STAGES)  # a new transform needs a place here
    second = jaxllm.quantize({r".*/attn/.*": "int8"}) if earlier == later == "quantize" else ALL[later]
    first = after(earlier)
    if (earlier, later) in REFUSED:
        with pytest.raises(ValueError, match=rf"{later} cannot follow {earlier}.* is compact, prune, quantize"):
            second(first)
    elif earlier == later == "quantize_kv":
        with pytest.raises(ValueError, match="KV cache is int8 already"):
            second(first)
    else:
        made = second(first)
        assert [entry.name for entry in made.ledger] == ["init", earlier, later]
        assert np.isfinite(np.asarray(jaxllm.logits(made, TOKENS))).all()
        assert flatten(made.params).keys() == flatten(original.params).keys()
