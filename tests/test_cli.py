import dataclasses
import json
import signal
import subprocess
import sys
import time

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

import jaxllm
from jaxllm.cli import main
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
        "compact + prune",
        "compact + prune + int8",
    ]
    assert [entry["name"] for entry in result["ledger"]] == ["init", "compact", "prune_magnitude", "quantize_int8"]
    final = result["rows"][-1]
    assert final["weight_bytes"] < result["rows"][0]["weight_bytes"] / 4
    assert 0.5 < final["pruning_rate"] < 1
    assert final["step_ms"] > 0 < final["bandwidth_use"]
    assert "compact + prune + int8" in text
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
            ["optimize", "MODEL", "--out", "OUT", "--quantize", "int8", "--quantize-match", "x", "--max-len", "128"],
            "No weight path",
        ),
        (["optimize", "MODEL", "--out", "MODEL", "--quantize", "int8"], "exists"),
        (["optimize", "MODEL", "--out", "OUT", "--quantize", "int8", "--text", "no.txt"], "no.txt"),
        (["eval", "MODEL", "--text", "no.txt"], "no.txt"),
        (["eval", "MODEL", "--windows", "0"], "expected at least one"),
        (["bench", "MODEL", "--new-tokens", "1"], "new_tokens is 1"),
        (["export", "MODEL", "--out", "MODEL"], "exists"),
    ],
)
def test_bad_input_is_one_line_on_stderr_before_slow_work(capsys, model, tmp_path, argv, message, monkeypatch):
    def too_late(*args, **kwargs):
        raise AssertionError("slow work was begun")

    monkeypatch.setattr(sys.modules["jaxllm.compile"], "ThreadPoolExecutor", too_late)
    monkeypatch.setattr("jaxllm.transforms.compact.input_mean_squares", too_late)
    monkeypatch.setattr("jaxllm.transforms.prune._zero_smallest", too_late)
    out = tmp_path / "out"
    code, _, stdout, err = run(capsys, *[arg.replace("MODEL", model).replace("OUT", str(out)) for arg in argv])
    errors = [line for line in err.splitlines() if line.startswith("jaxllm: error:")]
    assert code == 1
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in err
    assert stdout == ""
    assert not out.exists() or argv[0] == "quickstart"


@pytest.mark.parametrize(
    "argv", [[], ["nonsense"], ["optimize", "MODEL"], ["generate", "M", "x", "--top-k", "x"], ["info", "M", "N"]]
)
def test_misuse_exits_with_two(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2
    assert "usage: jaxllm" in capsys.readouterr().err


def test_an_interrupt_ends_with_130_and_leaves_nothing(model, tmp_path):
    command = [
        sys.executable,
        "-m",
        "jaxllm.cli",
        "optimize",
        model,
        "--quantize",
        "int8",
        "--max-len",
        "128",
        "--out",
        "out",
    ]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "loaded" in line:
                break
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert "interrupted" in rest
    assert "Traceback" not in rest
    assert [path.name for path in tmp_path.iterdir() if path.name != "out"] == []
    if (tmp_path / "out").exists():  # saved before the signal: then it is whole
        jaxllm.load(tmp_path / "out")


def test_every_command_has_help(capsys):
    for command in ("quickstart", "optimize", "generate", "chat", "eval", "bench", "info", "export"):
        with pytest.raises(SystemExit) as exit:
            main([command, "--help"])
        assert exit.value.code == 0
        assert "--json" in capsys.readouterr().out
