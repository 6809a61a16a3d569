import csv
import dataclasses
import os
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

import jaxllm
from jaxllm import cli, training
from jaxllm.fit import LOG, read_log
from jaxllm.params import flatten
from jaxllm.text import Tokenizer
from jaxllm.transforms.distill import match_layers
from tests.conftest import TINY

CFG = dataclasses.replace(TINY, num_layers=2)
TEACHER = jaxllm.init(CFG, seed=1)
TOKENS = np.random.default_rng(0).integers(0, 256, (20, 17)).astype(np.int32)
HELD = TOKENS[:4]
SHORT = jaxllm.Training(steps=12, batch=4, learning_rate=3e-3)


@pytest.fixture(scope="module")
def student():
    return jaxllm.smaller(TEACHER, dataclasses.replace(CFG, ffw_dim=32))


@pytest.fixture(scope="module")
def plain(student):
    return jaxllm.distill(TEACHER, TOKENS, SHORT, heldout=HELD)(student)


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (one.params, other.params)), strict=True))


def gain(lm):
    """How much of the held-out loss is gone."""
    before, after = lm.ledger[-1].args["heldout_loss"]
    return 1 - after / before


def test_a_student_comes_nearer_to_its_teacher(student, plain):
    assert gain(plain) > 0.3
    loss = plain.ledger[-1].args["heldout_loss"][1]
    assert jaxllm.compare(plain, TEACHER, HELD).kl == pytest.approx(loss, rel=1e-3)  # another way to compute it
    assert jax.tree.map(jnp.shape, plain.params) == jax.tree.map(jnp.shape, student.params)
    assert plain.ledger[-1].name == "distill"


@pytest.mark.parametrize("how", [{"accumulate": 2}, {"remat": True}])
def test_memory_is_saved_without_another_result(student, plain, how):
    saving = jaxllm.distill(TEACHER, TOKENS, dataclasses.replace(SHORT, **how), heldout=HELD)(student)
    for mine, theirs in zip(*map(jax.tree.leaves, (plain.params, saving.params)), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-4)


@pytest.mark.parametrize(("rules", "mesh"), [("tensor", {"data": 2, "model": 2}), ("fully", {"data": 4})])
def test_over_a_mesh_the_same_is_trained(student, plain, rules, mesh):
    over = {"mesh": jaxllm.make_mesh(**mesh), "rules": jaxllm.shard.TABLES[rules]}
    spread = jaxllm.distill(TEACHER, TOKENS, SHORT, heldout=HELD, **over)(student)
    assert spread.ledger[-1].args["heldout_loss"] == pytest.approx(plain.ledger[-1].args["heldout_loss"], rel=1e-3)


def test_of_a_split_batch_nobody_needs_what_another_has():
    mesh = jaxllm.make_mesh(data=4)
    trainer = training.Trainer(training.Weights(CFG), CFG, jaxllm.Objective(), SHORT, mesh=mesh)
    fixed, state = trainer.begin(TEACHER.params)
    places = jax.tree.map(lambda x: x.sharding, state), None
    teacher = jaxllm.shard.put(TEACHER.params, jaxllm.shard.param_shardings(CFG, TEACHER.params, mesh))
    batch = TOKENS[:8], np.ones((8, TOKENS.shape[1]), bool)
    text = jax.jit(trainer.step, out_shardings=places).lower(state, fixed, teacher, *batch).compile().as_text()
    assert "all-reduce" in text  # of gradients
    assert not re.search(r"(all-gather|all-to-all|collective-permute)\(", text)


@pytest.mark.parametrize("mesh", [None, {"data": 2, "model": 2}])
def test_bfloat16_is_computed_with_and_float32_trained(student, plain, mesh):
    def cast(lm):
        params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), lm.params)
        return dataclasses.replace(lm, cfg=dataclasses.replace(lm.cfg, dtype="bfloat16"), params=params)

    over = {} if mesh is None else {"mesh": jaxllm.make_mesh(**mesh)}
    lm = jaxllm.distill(cast(TEACHER), TOKENS, SHORT, heldout=HELD, **over)(cast(student))
    assert {leaf.dtype for leaf in jax.tree.leaves(lm.params)} == {jnp.dtype(jnp.bfloat16)}
    assert lm.ledger[-1].args["heldout_loss"] == pytest.approx(plain.ledger[-1].args["heldout_loss"], rel=0.05)
    _, trained = training.Weights(lm.cfg).begin(lm.params)
    assert {leaf.dtype for leaf in trained.values()} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_zeros_stay_and_nothing_else_becomes_zero(pattern):
    pruned = jaxllm.prune(0.5, pattern=pattern)(TEACHER)
    lm = jaxllm.distill(TEACHER, TOKENS, dataclasses.replace(SHORT, weight_decay=0.1), heldout=HELD)(pruned)
    assert gain(lm) > 0.1
    for before, after in zip(*map(jax.tree.leaves, (pruned.params, lm.params)), strict=True):
        np.testing.assert_array_equal(before == 0, after == 0)


def test_a_low_rank_change_keeps_zeros_and_everything_outside_the_layers():
    pruned = jaxllm.prune(0.5)(TEACHER)
    how = dataclasses.replace(SHORT, rank=4, learning_rate=1e-2)
    lm = jaxllm.distill(TEACHER, TOKENS, how, heldout=HELD)(pruned)
    assert gain(lm) > 0.03
    before, after = flatten(pruned.params), flatten(lm.params)
    for path, info in lm.info.items():
        np.testing.assert_array_equal(before[path] == 0, after[path] == 0)
        trained = info.contracted and path.startswith("layers_")
        assert np.array_equal(before[path], after[path]) != bool(trained), path
    weights = training.Weights(CFG, rank=4)
    _, trained = weights.begin(pruned.params)
    assert sum(leaf.size for leaf in trained.values()) < 0.4 * pruned.num_params


def test_pruning_while_training_ends_at_the_sparsity_asked_for():
    lm = jaxllm.distill(TEACHER, TOKENS, SHORT, sparsity=0.5)(TEACHER)
    assert lm.ledger[-1].args["best_step"] > 6  # before, fewer are zero, and the loss is less
    for path, leaf in flatten(lm.params).items():
        zeros = float(jnp.mean(leaf == 0))
        inside = path.startswith("layers_") and leaf.ndim > 1
        assert zeros == pytest.approx(0.5 if inside else 0, abs=1e-3), path


def test_what_was_zero_before_stays_so_while_more_is_pruned():
    pruned = jaxllm.prune(0.3)(TEACHER)
    lm = jaxllm.distill(TEACHER, TOKENS, SHORT, sparsity=0.5)(pruned)
    for before, after in zip(*map(jax.tree.leaves, (pruned.params, lm.params)), strict=True):
        assert not np.any((before == 0) & (after != 0))
    assert float(jnp.mean(lm.params["layers_0"]["mlp"]["up"]["w"] == 0)) == pytest.approx(0.5, abs=1e-3)


def test_training_that_knows_of_rounding_loses_less_to_it(student, plain):
    lm = jaxllm.distill(TEACHER, TOKENS, SHORT, quantize="int4-g16", heldout=HELD)(student)
    assert not any("QArray" in type(leaf).__name__ for leaf in flatten(lm.params).values())
    unaware, aware = (jaxllm.compare(jaxllm.quantize("int4-g16")(each), TEACHER, HELD).kl for each in (plain, lm))
    assert aware < unaware
    # What training saw is what quantising makes: its last held-out loss is that of the quantised model.
    assert lm.ledger[-1].args["heldout_loss"][1] == pytest.approx(aware, rel=0.02)


def test_layers_are_matched(student):
    narrow = jaxllm.smaller(TEACHER, dataclasses.replace(CFG, num_layers=1), {0: 1})
    np.testing.assert_array_equal(
        narrow.params["layers_0"]["attn"]["q"]["w"], TEACHER.params["layers_1"]["attn"]["q"]["w"]
    )
    lm = jaxllm.distill(TEACHER, TOKENS, SHORT, jaxllm.Objective(hidden=1.0, attention=1.0))(narrow)
    assert gain(lm) > 0.1
    assert lm.ledger[-1].args["layer_map"] == {"0": 1}
    assert match_layers(3, 12) == {0: 3, 1: 7, 2: 11}
    assert match_layers(4, 4) == {0: 0, 1: 1, 2: 2, 3: 3}
    both = jaxllm.smaller(TEACHER, dataclasses.replace(CFG, embed_dim=16, num_heads=4, num_kv_heads=2))
    with pytest.raises(ValueError, match="student's is 16 wide"):
        jaxllm.distill(TEACHER, TOKENS, SHORT, jaxllm.Objective(hidden=1.0))(both)


def test_a_cached_teacher_of_many_tokens_teaches_what_a_live_one_does(student, plain, tmp_path):
    both = np.concatenate([TOKENS, HELD])
    many = jaxllm.cache_teacher(TEACHER, both, tmp_path / "many", k=255)
    lm = jaxllm.distill(many, TOKENS, SHORT, heldout=HELD)(student)
    assert lm.ledger[-1].args["heldout_loss"] == pytest.approx(plain.ledger[-1].args["heldout_loss"], rel=1e-3)
    few = jaxllm.open_teacher(jaxllm.cache_teacher(TEACHER, both, tmp_path / "few", k=64).path)
    assert gain(jaxllm.distill(few, TOKENS, SHORT, heldout=HELD)(student)) > 0.1
    with pytest.raises(ValueError, match="other windows"):
        jaxllm.distill(few, TOKENS[:10], SHORT)(student)
    with pytest.raises(ValueError, match=r"temperature is 1\.0, the objective's 2\.0"):
        jaxllm.distill(few, TOKENS, SHORT, jaxllm.Objective(temperature=2.0))
    with pytest.raises(ValueError, match="another k: 64, not 8"):
        jaxllm.cache_teacher(TEACHER, both, tmp_path / "few", k=8)


def test_a_cache_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    tokens = np.tile(TOKENS, (7, 1))  # 140 windows, three files
    done = []

    def stop(message):
        done.append(message)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jaxllm.cache_teacher(TEACHER, tokens, tmp_path / "t", k=4, log=stop)
    with pytest.raises(ValueError, match=r"lacks 00002\.safetensors"):
        jaxllm.open_teacher(tmp_path / "t")
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "t").glob("*.safetensors")}
    cached = jaxllm.cache_teacher(TEACHER, tokens, tmp_path / "t", k=4)
    assert {name: (tmp_path / "t" / name).stat().st_mtime_ns for name in before} == before
    np.testing.assert_array_equal(cached.rows(np.array([3])).ids, cached.rows(np.array([123])).ids)
    (tmp_path / "t" / "00001.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"00001\.safetensors cannot be read"):
        cached.rows(np.array([70]))


def test_a_student_may_write_its_own_text(student, plain):
    lm = jaxllm.distill(TEACHER, TOKENS, SHORT, on_policy=1.0, heldout=HELD)(student)
    assert gain(lm) > 0.01
    assert not same(lm, plain)


RUN = """
import sys, pathlib, jaxllm, tests.test_distill as t
student = jaxllm.smaller(t.TEACHER, t.dataclasses.replace(t.CFG, ffw_dim=32))
how = t.dataclasses.replace(t.SHORT, steps=60)
lm = jaxllm.distill(t.TEACHER, t.TOKENS, how, path=pathlib.Path(sys.argv[1]), resume=True, save_every=3)(student)
jaxllm.save(lm, sys.argv[2])
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_in_the_same_weights(tmp_path):
    def start(run, out):
        return subprocess.Popen([sys.executable, "-c", RUN, tmp_path / run, tmp_path / out], cwd=os.getcwd())

    assert start("plain", "whole").wait(300) == 0
    random, kills = np.random.default_rng(int(time.time())), 0
    while kills < 5:
        process, log = start("killed", "resumed"), tmp_path / "killed" / LOG
        seen = log.stat().st_mtime_ns if log.exists() else 0
        while process.poll() is None and (not log.exists() or log.stat().st_mtime_ns == seen):
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.2))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills == 5
    assert start("killed", "resumed").wait(300) == 0
    assert same(jaxllm.load(tmp_path / "whole"), jaxllm.load(tmp_path / "resumed"))
    curves = [[row.get("loss") for row in read_log(tmp_path / run / LOG)] for run in ("plain", "killed")]
    assert curves[0] == curves[1]
    assert len(curves[0]) == 61


@pytest.mark.parametrize(
    "how",
    [{"sparsity": 0.5, "on_policy": 0.5, "quantize": "int8"}, {"mesh": jaxllm.make_mesh(data=2, model=2)}],
    ids=["all", "mesh"],
)
def test_a_run_that_broke_off_goes_on_to_the_same_weights(student, tmp_path, how):
    def stop(message):
        if message.startswith("step 6 "):
            raise KeyboardInterrupt

    def run(path, **more):
        made = jaxllm.distill(TEACHER, TOKENS, SHORT, heldout=HELD, save_every=3, path=tmp_path / path, **how, **more)
        return made(student), read_log(tmp_path / path / LOG)

    with pytest.raises(KeyboardInterrupt):
        run("broken", log=stop)
    said = []
    (tmp_path / "broken" / LOG).unlink()  # as if it had been killed before that was written
    resumed, its_log = run("broken", resume=True, log=said.append)
    assert "goes on after step 6 of 12" in said
    whole, other_log = run("whole")
    assert same(resumed, whole)
    for name in ("loss", "heldout_loss"):
        assert [row.get(name) for row in its_log] == [row.get(name) for row in other_log]


def test_an_int8_cache_is_not_trained_through(student, plain):
    lm = jaxllm.distill(TEACHER, TOKENS, SHORT, heldout=HELD)(jaxllm.quantize_kv()(student))
    assert lm.cfg.kv_dtype == "int8"
    assert same(lm, plain)


def test_a_run_that_ended_or_differs_is_said(student, tmp_path):
    once = jaxllm.distill(TEACHER, TOKENS, SHORT, path=tmp_path / "run")(student)
    with pytest.raises(FileExistsError, match="--resume"):
        jaxllm.distill(TEACHER, TOKENS, SHORT, path=tmp_path / "run")(student)
    with pytest.raises(ValueError, match="another training"):
        jaxllm.distill(TEACHER, TOKENS, dataclasses.replace(SHORT, batch=2), path=tmp_path / "run", resume=True)(
            student
        )
    assert same(once, jaxllm.distill(TEACHER, TOKENS, SHORT, path=tmp_path / "run", resume=True)(student))


def test_distilling_stands_before_quantising(student):
    quantised = jaxllm.quantize("int8")(student)
    with pytest.raises(ValueError, match="compact, prune, quantize, with distill anywhere before quantize"):
        jaxllm.distill(TEACHER, TOKENS, SHORT)(quantised)
    trained = jaxllm.distill(TEACHER, TOKENS, dataclasses.replace(SHORT, steps=1))(student)
    names = [entry.name for entry in jaxllm.chain(jaxllm.prune(0.3), jaxllm.quantize("int8"))(trained).ledger]
    assert names == ["init", "distill", "prune", "quantize"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mesh": jaxllm.make_mesh(data=3)}, "batch=4 does not divide"),
        ({"on_policy": 2.0}, "on_policy is 2.0"),
        ({"sparsity": 1.0}, "sparsity is 1.0"),
        ({"save_every": 0}, "save_every is 0"),
        ({"keep": 0}, "keep is 0"),
        ({"heldout": TOKENS[:, :5]}, "held-out ones 5"),
        ({"objective": jaxllm.Objective(hidden=1.0), "layer_map": {0: 9}}, "layer_map has 0: 9"),
        ({"quantize": "int4-g48"}, "48"),
        ({"layer_map": {0: 0}}, "give one of them a weight"),
        ({"top_k": 8}, "and a path"),
        ({"text": np.zeros((4, 300), np.int32)}, "300 tokens"),
    ],
)
def test_what_makes_no_sense_is_refused_before_training(student, given, said):
    with pytest.raises(ValueError, match=said):
        jaxllm.distill(TEACHER, given.pop("text", TOKENS), SHORT, **given)(student)
    other = jaxllm.init(dataclasses.replace(CFG, vocab_size=128))
    with pytest.raises(ValueError, match="The teacher has 128 tokens"):
        jaxllm.distill(other, TOKENS, SHORT)(student)


def test_a_teacher_that_reads_other_tokens_is_refused(tiny_text):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    shifted = Backend(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    shifted.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    other = dataclasses.replace(tiny_text, tokenizer=Tokenizer(shifted, {}, [], None))
    with pytest.raises(ValueError, match="other ids"):
        jaxllm.distill(other, TOKENS, SHORT)(tiny_text)


def test_the_command_trains_and_draws_the_curve(tiny_text, tmp_path, capsys):
    jaxllm.save(tiny_text, tmp_path / "teacher")
    jaxllm.save(jaxllm.prune(0.5)(tiny_text), tmp_path / "student")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    argv = ["distill", "--teacher", str(tmp_path / "teacher"), "--student", str(tmp_path / "student")]
    argv += ["--text", str(tmp_path / "text.txt"), "--tokens", "32", "--batch", "4", "--steps", "6", "--json"]
    assert cli.main([*argv, "--out", str(tmp_path / "out")]) == 0
    assert "held-out loss" in capsys.readouterr().out
    assert (tmp_path / "out" / "curve.png").stat().st_size > 1000
    assert jaxllm.load(tmp_path / "out").ledger[-1].name == "distill"
    with (tmp_path / "out.run" / LOG).open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == [*"0123456"]
    assert cli.main([*argv, "--out", str(tmp_path / "again"), "--top-k", "8"]) == 0
    assert (tmp_path / "again.run" / "teacher").is_dir()
    assert cli.main([*argv, "--out", str(tmp_path / "out")]) == 1
    assert "choose another --out" in capsys.readouterr().err
