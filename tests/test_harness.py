"""lm-eval's evaluator on local files, with figures worked out from the model's logits."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import warnings

import numpy as np
import pytest

import jaxllm

pytest.importorskip("lm_eval")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what lm-eval's many imports say is not about this package
    import datasets

    from jaxllm import harness
    from jaxllm.harness import HarnessLM, evaluate_tasks

pytestmark = [pytest.mark.peer, pytest.mark.slow]

QUESTIONS = [
    {"q": "The sky is", "choices": ["blue", "green", "loud"], "gold": 0},
    {"q": "Two and two are", "choices": ["four", "five"], "gold": 0},
    {"q": "", "choices": ["a", "b"], "gold": 1},
    {"q": "A very long question, longer than the others: is it", "choices": ["y", "n"], "gold": 1},
]
CHOICE = """
task: choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_target: gold
doc_to_choice: choices
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
GENERATE = """
task: answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{q}}}} what?"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["zz"], max_gen_toks: 6}}
metric_list: [{{metric: exact_match}}]
"""
ROLLING = """
task: read
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{q}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""


@dataclasses.dataclass
class Request:
    args: tuple


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Any attempt at the network fails the test, even one whose error is swallowed."""
    attempts = []

    def refuse(*args, **kwargs):
        attempts.append(args)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield
    assert not attempts


def write_task(path, yaml, records):
    data = path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    file = path / "task.yaml"
    file.write_text(yaml.format(data=data))
    return file


def by_hand(lm, tokens, start):
    """log P of tokens[start:] given those before, in float64."""
    padded = np.full((1, 128), 7)
    padded[0, : len(tokens)] = tokens
    logits = np.asarray(jaxllm.logits(lm, padded)[0], np.float64)
    log_p = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    at = np.arange(start, len(tokens))
    return log_p[at - 1, np.array(tokens)[at]].sum()


def test_log_likelihoods_equal_float64_numpy(tiny_text):
    encode = tiny_text.tokenizer.encode
    pairs = [("The sky is", " blue"), ("", "Hello"), ("A space ", "moves"), ("x", "y" * 40), ("The sky is", " green")]
    found = HarnessLM(tiny_text, batch=2).loglikelihood([Request(pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (log_p, _) in zip(pairs, found, strict=True):
        tokens = encode(context + continuation) if context else [256, *encode(continuation)]
        start = len(encode(context.rstrip())) if context else 1
        assert log_p == pytest.approx(by_hand(tiny_text, tokens, start), rel=1e-6)


def test_rolling_counts_each_token_once(tiny_text):
    texts = ["A short text.", "", "A text that does not fit into one window of twenty tokens, but into several."]
    model = HarnessLM(tiny_text, batch=3, max_len=20)
    found = model.loglikelihood_rolling([Request((text,)) for text in texts])
    for text, log_p in zip(texts, found, strict=True):
        tokens = [256, *tiny_text.tokenizer.encode(text)]  # <s>, then the text
        expected, done = 0.0, 1
        while done < len(tokens):
            end = min(len(tokens), done + 20)
            begin = max(0, end - 21)  # the last window has a full context
            expected += by_hand(tiny_text, tokens[begin:end], done - begin)
            done = end
        assert log_p == pytest.approx(expected, rel=1e-6)


@pytest.fixture(scope="module")
def engine(tiny_text):
    return jaxllm.compile(tiny_text, max_len=64)


def test_generation_is_the_engines(tiny_text, engine):
    prompts = ["The sky", "A much longer prompt than the other one", "x", ""]
    free = engine.generate(["<s>" if p == "" else p for p in prompts], max_new_tokens=8)
    text = free[0].text
    cuts = {
        text[: text.index(text[3])]: {"until": text[3], "max_new_tokens": 8},
        text[:2]: {"until": [""], "max_gen_toks": 2},
    }
    requests = [Request((prompt, {"until": [], "max_gen_toks": 8})) for prompt in prompts]
    requests += [Request((prompts[0], how)) for how in cuts.values()]
    assert HarnessLM(tiny_text, batch=3).generate_until(requests) == [result.text for result in free] + [*cuts]


def test_a_prompt_that_leaves_no_room_is_cut_at_the_left(tiny_text, engine):
    prompt = "A much longer prompt than the other one"
    (answer,) = HarnessLM(tiny_text, max_len=16).generate_until([Request((prompt, {"max_gen_toks": 8}))])
    assert answer == engine.generate(prompt[-8:], max_new_tokens=8)[0].text


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, {"temperature": 0}),
        ({"temperature": 0.7}, {"temperature": 0.7}),
        ({"temperature": 0.7, "do_sample": False}, {"temperature": 0}),
        ({"do_sample": True, "top_p": 0.9}, {"temperature": 1, "top_p": 0.9}),
    ],
)
def test_sampling_is_read_as_lm_eval_means_it(asked, expected):
    assert harness._generation(asked) == {"stop": [], "max_new_tokens": 256} | expected


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_beams": 4}, r"generation_kwargs have \['num_beams'\]"),
        ({"do_sample": True, "temperature": -1}, "temperature is -1"),
        ({"max_gen_toks": 256}, "256 new tokens, and max_len=256"),
    ],
)
def test_bad_generation_is_refused(tiny_text, asked, message):
    with pytest.raises(ValueError, match=message):
        HarnessLM(tiny_text).generate_until([Request(("x", asked))])


@pytest.mark.parametrize("batch", [1, 3])
def test_a_multiple_choice_task_runs_from_local_files(tiny_text, tmp_path, offline, batch):
    file = write_task(tmp_path, CHOICE, QUESTIONS)
    results = evaluate_tasks(tiny_text, [file], batch=batch)
    right = right_norm = 0
    for question in QUESTIONS:
        context = question["q"]
        begin = tiny_text.tokenizer.encode(context) or [256]
        tails = [tiny_text.tokenizer.encode(" " + choice) for choice in question["choices"]]
        scores = [by_hand(tiny_text, begin + tail, len(begin)) for tail in tails]
        right += int(np.argmax(scores) == question["gold"])
        lengths = [len(choice) for choice in question["choices"]]
        right_norm += int(np.argmax(np.array(scores) / lengths) == question["gold"])
    assert results["results"]["choose"]["acc,none"] == right / len(QUESTIONS)
    assert results["results"]["choose"]["acc_norm,none"] == right_norm / len(QUESTIONS)
    assert results["n-samples"]["choose"] == {"original": 4, "effective": 4}
    assert json.loads(json.dumps(results)) == results
    limited = evaluate_tasks(tiny_text, [file], batch=batch, limit=2)
    assert limited["n-samples"]["choose"] == {"original": 4, "effective": 2}


def test_a_generation_task_runs_by_name(tiny_text, engine, tmp_path, offline, capsys):
    (result,) = engine.generate("The sky is what?", max_new_tokens=6)
    records = [{"q": "The sky is", "answer": result.text}, {"q": "Two", "answer": "never"}]
    write_task(tmp_path, GENERATE, records)
    results = evaluate_tasks(tiny_text, ["answer"], task_dir=tmp_path)
    assert results["results"]["answer"]["exact_match,none"] == 0.5
    assert capsys.readouterr().out == ""


def test_a_rolling_task_and_its_bootstrap_run_in_this_process(tiny_text, tmp_path, offline):
    file = write_task(tmp_path, ROLLING, [{"q": question["q"] or "x"} for question in QUESTIONS])
    results = evaluate_tasks(tiny_text, [str(file)])["results"]["read"]
    texts = [question["q"] or "x" for question in QUESTIONS]
    log_p = sum(by_hand(tiny_text, [256, *tiny_text.tokenizer.encode(text)], 1) for text in texts)
    assert results["bits_per_byte,none"] == pytest.approx(-log_p / sum(map(len, texts)) / np.log(2), rel=1e-6)


def test_what_was_set_is_as_before(tiny_text, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", "before")
    monkeypatch.setenv("DISABLE_MULTIPROC", "before")
    seen = []

    def load(*args):
        seen.append(datasets.config.HF_HUB_OFFLINE)
        raise RuntimeError("as any error")

    monkeypatch.setattr(harness.TaskManager, "load", load)
    with pytest.raises(RuntimeError, match="as any error"):
        evaluate_tasks(tiny_text, [write_task(tmp_path, CHOICE, QUESTIONS)])
    assert seen == [True]
    assert datasets.config.HF_HUB_OFFLINE == os.environ["DISABLE_MULTIPROC"] == "before"


@pytest.mark.parametrize(
    ("tasks", "options", "error", "message"),
    [
        ([], {}, ValueError, "0 tasks"),
        (["x.yaml"], {"limit": 0}, ValueError, "limit=0"),
        (["missing.yaml"], {}, FileNotFoundError, "task file missing.yaml"),
        (["answer"], {"task_dir": "missing"}, FileNotFoundError, "task_dir missing"),
        (["x.yaml"], {"max_len": 1000}, ValueError, "at most 256"),
    ],
)
def test_bad_arguments_are_refused(tiny_text, tasks, options, error, message):
    with pytest.raises(error, match=message):
        evaluate_tasks(tiny_text, tasks, **options)


def test_a_model_without_a_tokenizer_is_refused(tiny):
    with pytest.raises(ValueError, match="has no tokenizer"):
        HarnessLM(tiny)


def test_without_lm_eval_the_error_says_what_to_install():
    code = "import sys; sys.modules['lm_eval'] = None; import jaxllm; import jaxllm.harness"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: Evaluation tasks need lm-eval" in out.stderr
    assert "pip install 'jaxllm[eval]'" in out.stderr
