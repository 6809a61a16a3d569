"""A model in stages says what it says in one piece."""

import dataclasses

import jax
import pytest

import jaxllm
from jaxllm import shard, stages
from jaxllm.params import flatten
from tests.conftest import TINY

UNTIED = dataclasses.replace(TINY, tie_embeddings=False)
UNEVEN = dataclasses.replace(TINY, num_heads=(8, 4, 4), num_kv_heads=(4, 2, 2), ffw_dim=(64, 48, 32))
PROMPTS = [list(range(3 + n, 24 - n)) for n in range(6)]  # of 21 to 11 tokens: two chunks of prefill


def tokens(engine, **options):
    return [result.tokens for result in engine.generate(PROMPTS, max_new_tokens=10, **options)]


QUANTISED = jaxllm.quantize({"embed/w": "int8", ".*/gate/w": "int8"})


@pytest.mark.parametrize(
    ("cfg", "change", "mesh"),
    [
        (dataclasses.replace(TINY, num_layers=2), QUANTISED, {"stages": 2, "data": 2}),  # both have the embedding
        (UNTIED, jaxllm.chain(), {"stages": 2, "model": 2}),
        (UNEVEN, jaxllm.chain(), {"stages": 3}),
    ],
)
def test_stages_generate_what_one_program_does(cfg, change, mesh):
    lm = change(jaxllm.init(cfg))
    # A mesh of one device has no CPU kernels, as no mesh has: they would round activations otherwise.
    meshes = jaxllm.make_mesh(), jaxllm.make_mesh(**mesh)
    whole, split = (jaxllm.compile(lm, batch=4, max_len=32, mesh=m) for m in meshes)
    assert tokens(split) == (expected := tokens(whole))
    assert tokens(split, stop_tokens=expected[0][3:4]) == tokens(whole, stop_tokens=expected[0][3:4])
    sampling = {"temperature": 1.5, "top_p": 0.95, "seed": 3}
    assert tokens(split, **sampling) == tokens(whole, **sampling)
    for count in (1, 2, 9):  # where blocks of tokens end, and one before and behind
        assert [len(r.tokens) for r in split.generate(PROMPTS[:3], max_new_tokens=count)] == [count] * 3


def test_each_stage_holds_its_own_layers_and_caches_alone():
    mesh = jaxllm.make_mesh(stages=2, model=2)
    engine = jaxllm.compile(jaxllm.init(UNTIED), batch=4, max_len=32, mesh=mesh)
    first, last = engine.params
    assert {path.split("/")[0] for path in flatten(first)} == {"embed", "layers_0", "layers_1"}
    assert {path.split("/")[0] for path in flatten(last)} == {"layers_0", "final_norm", "head"}
    for part, devices in zip(engine.params, mesh.devices, strict=True):
        for leaf in jax.tree.leaves(part):
            assert leaf.sharding.device_set == set(devices.flat)
    groups = engine.programs.start()
    assert [len(group.last.token_B) for group in groups] == [2, 2]
    for group in groups:
        assert [len(cache.k) for cache in (*group.caches, group.last.cache)] == [2, 1]
        assert group.caches[0].k[0].sharding.device_set == set(mesh.devices[0].flat)
        assert group.last.cache.k[0].sharding.device_set == set(mesh.devices[1].flat)
    # The first stage reads most: two layers, for each of the two groups, and their cache.
    sizes = {path: leaf.size for path, leaf in flatten(first).items() if path != "embed/w"}
    norms = sum(size for path, size in sizes.items() if "norm" in path)
    halves = (sum(sizes.values()) - norms) // 2
    cache = sum(array.size for group in groups for array in (*group.caches[0].k, *group.caches[0].v))
    assert engine.step_bytes == 4 * (2 * (halves + norms) + cache // 2)


@pytest.mark.parametrize(
    ("layers", "count", "lengths"), [(8, 2, [4, 4]), (8, 3, [3, 3, 2]), (5, 5, [1] * 5), (9, 4, [2, 2, 3, 2])]
)
def test_stages_are_of_nearly_equal_cost(layers, count, lengths):
    # The head costs as much as half a layer.
    cfg = dataclasses.replace(TINY, num_layers=layers, vocab_size=132, num_heads=4, ffw_dim=48)
    parts = stages.split(cfg, count)
    assert [len(part.layers) for part in parts] == lengths
    assert [i for part in parts for i in part.layers] == [*range(layers)]
    assert [part.part.embeds for part in parts] == [True] + [False] * (count - 1)
    assert [part.part.predicts for part in parts] == [False] * (count - 1) + [True]


def test_a_heavy_head_takes_layers_from_the_last_stage():
    parts = stages.split(dataclasses.replace(TINY, num_layers=8, vocab_size=1 << 12), 2)
    assert [len(part.layers) for part in parts] == [7, 1]


@pytest.mark.parametrize(
    ("batch", "count", "data", "groups"), [(8, 2, 1, 2), (8, 4, 2, 4), (6, 4, 1, 3), (4, 4, 2, 2), (1, 2, 1, 1)]
)
def test_groups_leave_each_device_whole_rows(batch, count, data, groups):
    assert stages.count_groups(batch, count, data) == groups


@pytest.mark.parametrize(
    ("mesh", "batch", "message"),
    [
        ({"stages": 4}, 1, "stages=4; a model of 3 layers has 1 to 3"),
        ({"stages": 2, "model": 3}, 1, "stages=2 x data=1 x model=3 x share=1 needs 6 devices; there are 4"),
        ({"stages": 2, "data": 2}, 3, r"batch=3 does not divide .* data=2"),
    ],
)
def test_stages_that_cannot_be_are_refused(tiny, mesh, batch, message):
    with pytest.raises(ValueError, match=message):
        jaxllm.compile(tiny, batch=batch, max_len=16, mesh=jaxllm.make_mesh(**mesh))


def test_a_mesh_of_stages_is_for_no_single_program(tiny):
    with pytest.raises(ValueError, match="The mesh has 2 stages; a program runs on one"):
        shard.check_mesh(tiny.cfg, jaxllm.make_mesh(stages=2), 2)
