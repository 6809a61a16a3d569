"""Bundles: on the machine that they were compiled for nothing is compiled, and on others nothing is taken on trust."""

import dataclasses
import importlib.util
import json
import pickle
import shutil
from typing import Any

import jax
import numpy as np
import pytest

import jaxllm
from jaxllm import bundle, cli, executable, shard, targets
from jaxllm.checkpoint import load_header
from jaxllm.checkpoint.source import open_path
from jaxllm.compile import Lowering
from jaxllm.sample import Sampling, as_arrays
from tests.conftest import TINY

CFG = dataclasses.replace(TINY, num_layers=1)  # all costs are by the layer
PROMPTS = [list(range(1, 30)), [4, 5]]
FOUR = {"data": 2, "model": 2, "share": 1}


def write(path, lm, mesh=None, devices=None):
    jaxllm.save(lm, path)
    spec = bundle.Spec("cpu", mesh, shard.RULES, 2, 64)
    devices = jax.devices() if devices is None else devices
    _, programs = bundle.lower(spec, lm.cfg, load_header(path).params, devices)
    with targets.uncached():  # what comes from the cache cannot be written again
        compiled = {name: program.compile() for name, program in programs.items()}
    bundle.write(path, spec, compiled, devices)
    return path


def answers(engine):
    return [result.tokens for result in engine.generate(PROMPTS, max_new_tokens=20)]


@pytest.fixture(scope="module")
def tiny():
    return jaxllm.init(CFG)


@pytest.fixture(scope="module")
def small(tmp_path_factory, tiny):
    return write(tmp_path_factory.mktemp("bundle") / "small", jaxllm.quantize("int8")(tiny))


@pytest.fixture
def copy(small, tmp_path):
    return shutil.copytree(small, tmp_path / "copy")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, tiny):
    return write(tmp_path_factory.mktemp("bundle") / "sharded", jaxllm.quantize("int4-g16")(tiny), FOUR)


@pytest.mark.parametrize(("name", "mesh"), [("small", None), ("sharded", FOUR)])
def test_a_bundle_answers_as_its_model_does_and_compiles_nothing(request, monkeypatch, name, mesh):
    path = request.getfixturevalue(name)
    mesh = None if mesh is None else shard.make_mesh(**mesh)
    expected = answers(jaxllm.compile(jaxllm.load(path), batch=2, max_len=64, mesh=mesh))

    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr(Lowering, "_lower", never)
    monkeypatch.setattr(bundle, "compile_programs", never)
    if mesh is None:  # its weights are kept as the programs take them
        monkeypatch.setattr(bundle, "load_path", never)
    for reader in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, reader, never)
    assert answers(jaxllm.load_bundle(path)) == expected


def test_a_bundle_is_a_saved_model_as_well(small, tiny):
    lm = jaxllm.load(small)
    assert lm.ledger == jaxllm.quantize("int8")(tiny).ledger
    np.testing.assert_array_equal(
        lm.params["embed"]["w"].values, jaxllm.quantize("int8")(tiny).params["embed"]["w"].values
    )


def test_the_state_is_donated(small):
    engine = bundle.load_bundle(small)
    state = engine.programs.start()
    new, _ = engine.programs.decode(engine.params, state, np.int32(1), as_arrays(Sampling(), frozenset()))
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    assert not any(x.is_deleted() for x in jax.tree.leaves(new))


@pytest.mark.parametrize("key", ["jaxlib", "cpu", "device_kind"])
def test_what_was_compiled_for_another_machine_is_compiled_anew(copy, small, caplog, key):
    manifest = json.loads((copy / bundle.MANIFEST).read_text())
    manifest["environment"][key] = "another"
    (copy / bundle.MANIFEST).write_text(json.dumps(manifest))
    for file in (copy / "programs").iterdir():
        file.write_bytes(b"")  # none of them is looked at
    with caplog.at_level("INFO", "jaxllm"):
        found = bundle.load_bundle(copy)
    assert f"compiled for {key} another; this is {key} {executable.environment(jax.devices()[:1])[key]}" in caplog.text
    assert answers(found) == answers(bundle.load_bundle(small))


def test_weights_that_are_damaged_or_of_another_model_are_refused(copy, tiny, tmp_path):
    weights = copy / "weights.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"weights\.safetensors is missing or damaged"):
        bundle.load_bundle(copy)
    other = write(tmp_path / "other", tiny)
    shutil.copy(other / weights.name, weights)
    manifest = json.loads((copy / bundle.MANIFEST).read_text())
    manifest["weights"] = json.loads((other / bundle.MANIFEST).read_text())["weights"]
    (copy / bundle.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"weights\.safetensors has other tensors than expected"):
        bundle.load_bundle(copy)


def test_what_is_damaged_is_refused(copy):
    program = copy / "programs" / "decode-8.bin"
    program.write_bytes(program.read_bytes()[:-1] + b"\0")
    with pytest.raises(ValueError, match="missing or damaged"):
        bundle.load_bundle(copy)
    manifest = json.loads((copy / bundle.MANIFEST).read_text())
    (copy / bundle.MANIFEST).write_text(json.dumps(manifest | {"rules": 3}))
    with pytest.raises(ValueError, match="is damaged"):
        bundle.load_bundle(copy)
    (copy / bundle.MANIFEST).write_text(json.dumps(manifest | {"version": 0}))
    with pytest.raises(ValueError, match="expected 1"):
        bundle.load_bundle(copy)
    (copy / bundle.MANIFEST).write_text(json.dumps(manifest | {"mesh": {"data": 64}}))
    with pytest.raises(ValueError, match="needs 64 devices"):
        bundle.load_bundle(copy)
    with pytest.raises(ValueError, match="is no bundle"):
        bundle.load_bundle(copy.parent)


def test_other_logits_than_the_golden_are_refused(copy):
    golden = np.load(copy / "golden.npy")
    np.save(copy / "golden.npy", np.roll(golden, 1, axis=-1))
    with pytest.raises(ValueError, match="logits differ"):
        bundle.load_bundle(copy)
    np.save(copy / "golden.npy", golden[:, :3])
    with pytest.raises(ValueError, match="shape"):
        bundle.load_bundle(copy)


def test_a_bundle_that_passed_is_not_checked_again(copy, sharded, tmp_path, monkeypatch):
    checks, check = [], bundle._check
    monkeypatch.setattr(bundle, "_check", lambda *args: (checks.append(args[-1]), check(*args)))
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "cache"))
    loaded = [answers(bundle.load_bundle(copy)) for _ in range(2)]
    assert loaded[0] == loaded[1]
    assert checks == [copy]
    np.save(copy / "golden.npy", np.roll(np.load(copy / "golden.npy"), 1, axis=-1))
    with pytest.raises(ValueError, match="logits differ"):
        bundle.load_bundle(copy)
    with pytest.raises(ValueError, match="logits differ"):  # what failed did not pass
        bundle.load_bundle(copy)
    checks.clear()
    for _ in range(2):  # of its weights there is no hash
        bundle.load_bundle(sharded)
    assert checks == [sharded, sharded]


def test_a_decode_that_computes_something_else_is_refused(copy, tmp_path, monkeypatch):
    """As of a compiler that gets one program wrong, and the others right."""
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "cache"))  # where nothing has passed
    good = executable.callable_program

    def wrong(loaded, arguments, results, donated, devices):
        program = good(loaded, arguments, results, donated, devices)
        if isinstance(results, tuple) and results[1].ndim == 2:
            return lambda *args: (lambda state, tokens: (state, (tokens + 1) % TINY.vocab_size))(*program(*args))
        return program

    monkeypatch.setattr(executable, "callable_program", wrong)
    with pytest.raises(ValueError, match="greedy token"):
        bundle.load_bundle(copy)


def test_golden_logits_are_those_of_the_model(small):
    lm = jaxllm.load(small)
    tokens = bundle.golden_tokens(lm.cfg.vocab_size)
    expected = jaxllm.logits(lm, tokens[None])[0]
    np.testing.assert_array_equal(bundle.golden_logits(open_path(small, origin=""), tokens), expected)


def test_portable_programs_need_nothing_of_jaxllm(small):
    """An answer by the files in portable/ alone, every argument by its name."""
    run = {file.stem: jax.export.deserialize(bytearray(file.read_bytes())) for file in (small / "portable").iterdir()}
    assert all(set(one.platforms) == {"cpu", "tpu", "cuda"} for one in run.values())
    lm = jaxllm.load(small)
    params = {
        f"params/{jax.tree_util.keystr(path, simple=True, separator='/')}": leaf
        for path, leaf in jax.tree.flatten_with_path(lm.params)[0]
    }
    how = {"repetition_penalty": 1.0, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    how |= {"seed": 0, "stop_tokens": np.full(16, -1)}

    def call(name, state, **given):
        shapes: Any = jax.tree.unflatten(run[name].in_tree, run[name].in_avals)[0][0]
        named = params | state | given | {f"how/{key}": value for key, value in how.items()}
        out: Any = run[name].call({key: np.asarray(named[key], shape.dtype) for key, shape in shapes.items()})
        return {key: value for key, value in out.items() if key != "tokens"}, out["tokens"]

    state = run["start"].call({})
    tokens = np.zeros((2, 16), np.int32)
    tokens[:, :9] = prompts = np.arange(18).reshape(2, 9)
    state, first = call("prefill-16", state, tokens_BC=tokens, start=0, lengths_B=[9, 9], row_B=[0, 1])
    _, rest = call("decode-8", state, limit=8)
    found = np.concatenate([first[:, None], rest], axis=1)
    expected = jaxllm.compile(lm, batch=2, max_len=64).generate(prompts.tolist(), max_new_tokens=9)
    assert found.tolist() == [result.tokens for result in expected]


def test_a_run_that_ended_goes_on_where_it_was(tiny, tmp_path, monkeypatch, capsys):
    """The command of the README, cut off after the weights and run again; and what it makes."""
    jaxllm.save(tiny, tmp_path / "model")
    argv = ["compile", str(tmp_path / "model"), "--target", "cpu", "--batch", "2", "--context", "64"]
    argv += ["--quantize", "int8", "--out", str(tmp_path / "bundle")]
    with monkeypatch.context() as patch:
        patch.setattr(bundle, "golden_logits", lambda *_: (_ for _ in ()).throw(RuntimeError("cut off")))
        assert cli.main(argv) == 1
    assert not (tmp_path / "bundle").exists()
    assert cli.main([*argv, "--json"]) == 0
    out, err = capsys.readouterr()
    assert "3 of 3 groups were written before" in err
    assert {program["name"] for program in json.loads(out.splitlines()[-1])["programs"]} > {"decode 8", "prefill 16"}
    expected = answers(jaxllm.compile(jaxllm.quantize("int8")(tiny), batch=2, max_len=64))
    assert answers(bundle.load_bundle(tmp_path / "bundle")) == expected


def test_generate_runs_a_bundle(tiny_text, tmp_path, capsys):
    cfg = dataclasses.replace(tiny_text.cfg, num_layers=1)
    tiny_text = dataclasses.replace(jaxllm.init(cfg), tokenizer=tiny_text.tokenizer)
    path = write(tmp_path / "bundle", tiny_text)
    assert cli.main(["generate", str(path), "ab", "abc", "a", "--max-new-tokens", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    expected = jaxllm.compile(tiny_text, batch=3, max_len=64).generate(["ab", "abc", "a"], max_new_tokens=4)
    assert [one["tokens"] for one in found] == [result.tokens for result in expected]
    assert cli.main(["generate", str(path), "ab", "--max-len", "32"]) == 1
    assert "leave --max-len out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--target", "cpu", "--check"], "--check holds TPU programs"),
        (["--target", "gpu"], "this machine has none"),
        (["--target", "cpu", "--quantize", "int8"], "quantised already"),
        (["--target", "cpu", "--mesh", "model=64"], "needs 64 devices"),
        (["--target", "v5e:9"], "is no target"),
    ],
)
def test_nonsense_is_refused_before_anything_is_compiled(small, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.setattr(Lowering, "_lower", None)
    assert cli.main(["compile", str(small), *argv, "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the tpu extra is not installed")
def test_a_bundle_for_a_tpu_is_written_without_one(tmp_path, capsys):
    """And here it runs all the same, compiled anew."""
    lm = jaxllm.quantize("int8")(jaxllm.init(dataclasses.replace(CFG, dtype="bfloat16")))
    jaxllm.save(lm, tmp_path / "model")
    argv = ["compile", str(tmp_path / "model"), "--target", "v5e:2x2", "--batch", "2", "--context", "64"]
    assert cli.main([*argv, "--out", str(tmp_path / "bundle")]) == 0
    manifest = json.loads((tmp_path / "bundle" / bundle.MANIFEST).read_text())
    assert manifest["environment"]["device_kind"] == "TPU v5 lite"
    assert manifest["mesh"] == {"data": 1, "model": 4, "share": 1}
    capsys.readouterr()
    found = bundle.load_bundle(tmp_path / "bundle")
    assert "was compiled for platform tpu" in capsys.readouterr().err
    expected = jaxllm.compile(lm, batch=2, max_len=64, mesh=shard.make_mesh(model=4))
    assert answers(found) == answers(expected)
