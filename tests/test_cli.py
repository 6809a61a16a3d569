import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

import jaxllm
from jaxllm.cli import COMMANDS, main
from jaxllm.text import Tokenizer

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
FAST = ["--rounds", "1", "--windows", "1", "--window-tokens", "64", "--max-len", "128"]


def byte_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, {}, [], TEMPLATE)


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    jaxllm.save(dataclasses.replace(tiny, tokenizer=byte_tokenizer()), path)
    return str(path)


def run(capsys, *argv):
    """Exit code, the JSON object on the last line of stdout if asked for, stdout, stderr."""
    code = main(argv)
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1]) if code == 0 and "--json" in argv else None
    return code, result, out, err


def test_optimize_then_use_the_result(capsys, model, tmp_path):
    out = str(tmp_path / "small")
    compact = "ffn=0.75,kv_heads=2,layers=2"
    steps = ["--prune", "magnitude", "--sparsity", "0.5", "--compact", compact, "--quantize", "int8"]
    code, result, text, _ = run(capsys, "optimize", model, *steps, "--out", out, *FAST, "--json")
    assert code == 0
    assert [row["name"] for row in result["rows"]] == [
        "original",
        "compact",
        "compact + prune magnitude",
        "compact + prune magnitude + int8",
    ]
    assert [entry["name"] for entry in result["ledger"]] == ["init", "compact", "prune", "quantize"]
    final = result["rows"][-1]
    assert final["weight_bytes"] < result["rows"][0]["weight_bytes"] / 4
    assert 0.5 < final["pruning_rate"] < 1
    assert final["step_ms"] > 0 < final["bandwidth_use"]
    assert "compact + prune magnitude" in text
    assert (tmp_path / "small" / "report.png").read_bytes().startswith(b"\x89PNG")

    code, info, text, _ = run(capsys, "info", out, "--json")
    assert (code, info["config"]["ffw_dim"], info["config"]["num_layers"]) == (0, 48, 2)
    assert {w["dtype"] for w in info["weights"]} == {"int8", "float32"}
    assert "layers_N/mlp/gate/w" in text

    code, quality, _, _ = run(capsys, "eval", out, "--reference", model, *FAST[2:6], "--json")
    assert code == 0
    assert quality["perplexity"] == pytest.approx(final["perplexity"])
    assert quality["kl"] == pytest.approx(final["kl"])

    assert run(capsys, "export", out, "--out", str(tmp_path / "hf"))[0] == 0
    back = jaxllm.load(tmp_path / "hf")
    assert back.num_params == final["params"]


def test_generate_prints_text_and_nothing_else(capsys, model):
    code, _, out, err = run(capsys, "generate", model, "Hello", "--max-new-tokens", "5", "--max-len", "64")
    expected = jaxllm.compile(jaxllm.load(model), max_len=64).generate("Hello", max_new_tokens=5)[0].text
    assert (code, out) == (0, expected + "\n")
    assert "compiling" in err
    code, result, _, _ = run(
        capsys, "generate", model, "Hello", "Bye", "--chat", "--max-new-tokens", "5", "--max-len", "64", "--json"
    )
    assert [len(r["tokens"]) for r in result["results"]] == [5, 5]
    assert result["results"][0]["prompt_tokens"] == len("user: Hello\nassistant:")


def test_prompts_may_follow_options(capsys, model):
    options = ["--max-new-tokens", "2", "--max-len", "64", "--json"]
    code, result, _, _ = run(capsys, "generate", model, "--chat", "Hello", *options, "Bye")
    assert code == 0
    assert [r["prompt"] for r in result["results"]] == ["Hello", "Bye"]


def test_a_relative_path_will_do(capsys, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "optimize", model, "--quantize", "int8", "--out", "small", "--no-report")[0] == 0
    assert run(capsys, "info", "small")[0] == 0
    assert run(capsys, "export", "small", "--out", "hf")[0] == 0


def test_chat_remembers_what_was_said(capsys, model, monkeypatch):
    lines = iter(["One", "Two", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    code, result, _, _ = run(
        capsys, "chat", model, "--system", "Be brief", "--max-new-tokens", "4", "--max-len", "128", "--json"
    )
    assert code == 0
    assert [m["role"] for m in result["messages"]] == ["system", "user", "assistant", "user", "assistant"]


def test_bench_gives_a_line_for_each_model(capsys, model):
    shape = ["--prompt-tokens", "8", "--new-tokens", "9", "--rounds", "2", "--max-len", "32", "--batch", "2"]
    code, result, out, _ = run(capsys, "bench", model, *shape, "--mesh", "data=2,model=2", "--json")
    assert code == 0
    assert result["models"][model]["tokens_per_s"] > 0
    assert "GB/s" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["info", "no-such-model"], "no-such-model"),
        (["info", "./missing"], "missing"),
        (["generate", "MODEL", ""], "empty"),
        (["generate", "MODEL", "x" * 300], "300 tokens"),
        (["generate", "MODEL", "x", "--temperature", "-1"], "temperature is -1.0"),
        (["generate", "MODEL", "x", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["generate", "MODEL", "x", "--max-len", "9999"], "at most 256"),
        (["generate", "MODEL", "x", "--system", "y"], "add --chat"),
        (["generate", "MODEL", "x", "--mesh", "model=3"], "does not divide"),
        (["generate", "MODEL", "x", "--mesh", "rows=3"], "'rows=3'; expected NAME=NUMBER"),
        (["generate", "MODEL", "x", "--mesh", "model=99"], "needs 99 devices"),
        (["optimize", "MODEL", "--out", "OUT"], "Nothing to do"),
        (["optimize", "MODEL", "--out", "OUT", "--prune", "magnitude"], "--prune needs --sparsity"),
        (["optimize", "MODEL", "--out", "OUT", "--prune", "magnitude", "--sparsity", "2"], "sparsity is 2.0"),
        (["optimize", "MODEL", "--out", "OUT", "--quantize", "int8", "--scope", "global"], "--scope goes with --prune"),
        (["optimize", "MODEL", "--out", "OUT", "--compact", "ffn=0.5,ffn=2"], "each once"),
        (["optimize", "MODEL", "--out", "OUT", "--compact", "ffn=0.5", "--max-len", "300"], "at most 256"),
        (["optimize", "MODEL", "--out", "MODEL/jaxllm.json/x", "--quantize", "int8"], "cannot be written"),
        (["quickstart", "--model", "MODEL", "--out", "OUT", "--text", "no.txt"], "no.txt"),
        (["generate", "MODEL", "x", "--stop", ""], "--stop is empty"),
        (["bench", "MODEL", "./missing"], "missing"),
        (["optimize", "MODEL", "--out", "OUT", "--compact", "ffn=x"], "'ffn=x'"),
        (["optimize", "MODEL", "--out", "OUT", "--compact", "rows=1"], "'rows=1'"),
        (["optimize", "MODEL", "--out", "OUT", "--compact", "kv_heads=9", "--no-report"], "the model has 4"),
        (
            ["optimize", "MODEL", "--out", "OUT", "--quantize", "int8", "--rule", "x=int8", "--max-len", "128"],
            "No weight path",
        ),
        (["optimize", "MODEL", "--out", "MODEL", "--quantize", "int8"], "exists"),
        (["optimize", "MODEL", "--out", "OUT", "--quantize", "int8", "--text", "no.txt"], "no.txt"),
        (["eval", "MODEL", "--text", "no.txt"], "no.txt"),
        (["eval", "MODEL", "--windows", "0"], "expected at least one"),
        (["bench", "MODEL", "--new-tokens", "1"], "new_tokens is 1"),
        (["optimize", "MODEL", "--out", "OUT", "--quantize", "int9"], "'int9' is no format"),
        (
            ["optimize", "MODEL", "--out", "OUT", "--quantize", "int4-g128", "--no-report"],
            "groups of 128 do not divide",
        ),
        (["optimize", "MODEL", "--out", "OUT", "--quantize", "int8", "--rule", "int8"], "expected REGEX=FORMAT"),
        (["optimize", "MODEL", "--out", "OUT", "--method", "gptq", "--kv", "int8"], "--method goes with --quantize"),
        (["optimize", "MODEL", "--out", "OUT", "--prune", "wanda", "--pattern", "2:3", "--no-report"], "divide"),
        (["optimize", "MODEL", "--out", "OUT", "--prune", "wanda", "--pattern", "x"], "'x' is no pattern"),
        (["optimize", "MODEL", "--out", "OUT", "--recipe", "no.py"], "no.py is not there"),
        (["optimize", "MODEL", "--out", "OUT", "--recipe", "no.py", "--kv", "int8"], "leave --kv out"),
        (["optimize", "MODEL", "--out", "OUT", "--compact", "ffn=0.5", "--calibration", "no.txt"], "no.txt"),
        (["optimize", "MODEL", "--out", "OUT", "--compact", "layers=2", "--stream"], "looks at the whole model"),
        (["optimize", "MODEL", "--out", "MODEL", "--quantize", "int8", "--stream"], "exists"),
        (["search", "MODEL", "--budget", "0.5", "--out", "recipe.txt"], "a recipe is a Python file"),
        (["search", "MODEL", "--budget", "0.5", "--out", "OUT.py", "--formats", "int9"], "'int9' is no format"),
        (["search", "MODEL", "--budget", "0.5", "--out", "OUT.py", "--ffn", "x"], "--ffn is 'x'"),
        (["search", "MODEL", "--budget", "-1", "--out", "OUT.py"], "budget is -1.0"),
        (["bisect", "MODEL", "--reference", "./missing"], "missing"),
        (["eval", "MODEL", "--stride", "9999"], "stride is 9999"),
        (["eval", "MODEL", "--limit", "3"], "go with --tasks"),
        (["eval", "MODEL", "--stride", "0"], "stride is 0"),
        (["optimize", "MODEL", "--out", "OUT", "--quantize", "int8", "--alpha", "0"], "--alpha goes with"),
        (["optimize", "MODEL", "--out", "OUT", "--quantize", "int8", "--calibration-windows", "3"], "looks at a text"),
        (["export", "MODEL", "--out", "MODEL"], "exists"),
    ],
)
def test_bad_input_is_one_line_on_stderr_before_slow_work(capsys, model, tmp_path, argv, message, monkeypatch):
    def too_late(*args, **kwargs):
        raise AssertionError("slow work was begun")

    monkeypatch.setattr(sys.modules["jaxllm.compile"], "ThreadPoolExecutor", too_late)
    monkeypatch.setattr("jaxllm.calibrate.Walk", too_late)
    monkeypatch.setattr("jaxllm.transforms.layerwise.run", too_late)
    monkeypatch.setattr(sys.modules["jaxllm.search"], "layer_damage", too_late)
    out = tmp_path / "out"
    code, _, stdout, err = run(capsys, *[arg.replace("MODEL", model).replace("OUT", str(out)) for arg in argv])
    errors = [line for line in err.splitlines() if line.startswith("jaxllm: error:")]
    assert code == 1
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in err
    assert stdout == ""
    assert not out.exists() or argv[0] == "quickstart"


def test_a_stream_makes_what_memory_would_and_a_dry_run_makes_nothing(capsys, model, tmp_path):
    steps = [
        "--prune",
        "sparsegpt",
        "--pattern",
        "2:4",
        "--quantize",
        "int4-g16",
        "--method",
        "awq+gptq",
        "--kv",
        "int8",
    ]
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "It was a dark and stormy night. " * 40}) + "\n")
    steps += ["--calibration", str(text), "--calibration-windows", "2", "--calibration-tokens", "64"]
    dry, streamed, whole = (str(tmp_path / name) for name in ("dry", "streamed", "whole"))
    code, found, said, _ = run(capsys, "optimize", model, *steps, "--out", dry, "--dry-run", "--json")
    assert code == 0
    assert "would write" in said
    assert found["bytes_out"] > 0
    assert not (tmp_path / "dry").exists()
    assert run(capsys, "optimize", model, *steps, "--out", streamed, "--stream")[0] == 0
    assert run(capsys, "optimize", model, *steps, "--out", whole, "--no-report")[0] == 0
    one, other = jaxllm.load(streamed), jaxllm.load(whole)
    assert (one.cfg, one.ledger) == (other.cfg, other.ledger)
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
    again = str(tmp_path / "again")  # from its own ledger, on the same text
    assert run(capsys, "optimize", model, "--recipe", whole, *steps[-6:], "--out", again, "--no-report")[0] == 0
    jax.tree.map(np.testing.assert_array_equal, jaxllm.load(again).params, other.params)
    assert run(capsys, "optimize", model, "--recipe", whole, "--out", str(tmp_path / "x"), "--no-report")[0] == 1


def test_search_writes_a_recipe_that_optimize_follows(capsys, model, tmp_path):
    recipe, out = tmp_path / "mix.py", str(tmp_path / "out")
    formats = ["--formats", "float,int8,int4-g16", "--ffn", "1.0,0.5", *FAST[2:6]]
    code, found, text, _ = run(capsys, "search", model, "--budget", "0.3", *formats, "--out", str(recipe), "--json")
    assert code == 0
    assert recipe.with_suffix(".png").exists()
    best = found["candidates"][found["best"]]
    assert f"{best['name']} *" in text
    assert run(capsys, "optimize", model, "--recipe", str(recipe), "--out", out, "--no-report")[0] == 0
    assert jaxllm.load(out).weight_bytes == best["weight_bytes"] <= 0.3 * jaxllm.load(model).weight_bytes


def test_bisect_names_what_broke_a_model(capsys, model, tmp_path):
    out = str(tmp_path / "out")
    recipe = tmp_path / "bad.py"
    recipe.write_text(
        "import jaxllm\n"
        "transforms = [jaxllm.prune({r'layers_1/mlp/down/w': 0.98, r'layers_.*': 0.05}), jaxllm.quantize('int8')]\n"
    )
    assert run(capsys, "optimize", model, "--recipe", str(recipe), "--out", out, "--no-report")[0] == 0
    code, found, text, _ = run(capsys, "bisect", out, "--reference", model, *FAST[2:6], "--json")
    assert code == 0
    assert "layer 1" in found["verdict"]
    assert "prune" in found["verdict"]
    assert found["verdict"].split(":")[0] in text.replace("\n", " ")


def test_eval_says_its_protocol(capsys, model):
    code, found, text, _ = run(
        capsys, "eval", model, "--window-tokens", "64", "--stride", "32", "--windows", "3", "--json"
    )
    assert code == 0
    assert "64-token windows, stride 32, 127 tokens scored" in text
    assert found["protocol"] in text
    assert found["nll_se"] > 0


@pytest.mark.parametrize(
    "argv", [[], ["nonsense"], ["optimize", "MODEL"], ["generate", "M", "x", "--top-k", "x"], ["info", "M", "N"]]
)
def test_misuse_exits_with_two(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2
    assert "usage: jaxllm" in capsys.readouterr().err


def test_an_interrupt_ends_with_130_and_leaves_nothing(model, tmp_path):
    # Whoever runs the tests in a shell's background has had interrupts ignored, which children inherit.
    code = "import signal, jaxllm.cli as c; signal.signal(signal.SIGINT, signal.default_int_handler); exit(c.main())"
    options = ["--quantize", "int8", "--max-len", "128", "--out", "out"]
    command = [sys.executable, "-c", code, "optimize", model, *options]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "loaded" in line:
                break
        time.sleep(0.1)
        rest = None
        while rest is None:  # Python loses an interrupt that falls into a destructor; whoever sits there tries again
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                rest = process.communicate(timeout=2)[1]
    assert process.returncode == 130
    assert "interrupted" in rest
    assert "Traceback" not in rest
    assert [path.name for path in tmp_path.iterdir() if path.name != "out"] == []
    if (tmp_path / "out").exists():  # saved before the signal: then it is whole
        jaxllm.load(tmp_path / "out")


def test_every_command_has_help(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit) as exit:
            main([command, "--help"])
        assert exit.value.code == 0
        assert "--json" in capsys.readouterr().out
