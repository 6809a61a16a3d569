"""A model as EleutherAI's lm-evaluation-harness sees it. Needs lm-eval: pip install 'jaxllm[eval]'."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    import datasets.config
    import huggingface_hub.constants
    from lm_eval import evaluator
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, make_disjoint_window
except ImportError as error:
    raise ImportError(f"Evaluation tasks need lm-eval ({error}): pip install 'jaxllm[eval]'.") from error

from jaxllm import generate
from jaxllm.likelihood import log_likelihoods
from jaxllm.lm import LM
from jaxllm.sample import Sampling

# What a task may ask of generation. The first four are one thing under the names of several engines.
_MAX_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def evaluate_tasks(
    lm: LM,
    tasks: Sequence[str | Path],
    task_dir: str | Path | None = None,
    limit: int | None = None,
    batch: int = 8,
    *,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    max_len: int | None = None,
) -> dict[str, Any]:
    """Runs lm-eval's tasks. Returns its results as JSON values: "results" has {task: {"acc,none": …, …}}.

    tasks: YAML files, or names of tasks and groups: those in task_dir, then lm-eval's own.
    limit: only the first examples of each task; for trying out, not for figures to report.
    batch: sequences that run together. num_fewshot: of tasks that do not fix it; theirs, or 0, by default.
    max_len: tokens of context and answer, beyond which contexts are cut off at the left; by default what the model was
        trained for.

    Nothing is downloaded: data sets are local files (`dataset_path: json`, `dataset_kwargs: {data_files: …}`, relative
    to the working directory) or already in Hugging Face's cache. A task file may name Python functions, which are run:
    use only those that you trust.

    Raises FileNotFoundError for a file and ValueError for a task that is not there.
    """
    if len(tasks) == 0 or (limit is not None and limit < 1):
        raise ValueError(f"{len(tasks)} tasks with limit={limit}; expected at least one task and one example.")
    model = HarnessLM(lm, batch, max_len)
    with _quiet_and_offline():
        manager, specs = _find(tasks, task_dir)
        loaded = manager.load(specs)
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            if own is None or (num_fewshot is not None and own != 0):  # a task that sets 0 means it
                task.set_config(key="num_fewshot", value=num_fewshot or 0)
            task.set_fewshot_seed(seed=1234)  # as lm-eval's own command does
        results = evaluator.evaluate(
            model,
            loaded,
            limit=limit,
            bootstrap_iters=1000,  # gives a standard error to 2 %
            log_samples=False,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template,
        )
    return json.loads(json.dumps(results, default=handle_non_serializable))


def _find(tasks: Sequence[str | Path], task_dir: str | Path | None) -> tuple[TaskManager, list[Any]]:
    """What knows the tasks, and how it calls them. lm-eval's own are many thousand files: read if they are needed."""
    if task_dir is not None and not Path(task_dir).is_dir():
        raise FileNotFoundError(f"task_dir {task_dir} is not a directory.")
    names = []
    for task in tasks:
        if isinstance(task, Path) or task.endswith((".yaml", ".yml")):
            if not Path(task).is_file():
                raise FileNotFoundError(f"The task file {task} does not exist.")
        else:
            names.append(task)
    include = None if task_dir is None else str(task_dir)
    manager = TaskManager(include_path=include, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        own = manager.all_tasks
        manager = TaskManager(include_path=include)
        if unknown := sorted(set(names) - set(manager.all_tasks)):
            raise ValueError(f"No task is named {', '.join(unknown)}, in lm-eval or in task_dir, which has {own}.")
    return manager, [str(task) for task in tasks]


@contextlib.contextmanager
def _quiet_and_offline() -> Iterator[None]:
    """lm-eval prints, asks the network even for local files, and forks, which a process with JAX's threads may not."""
    modules = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    in_one_process = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        for module in modules:
            setattr(module, "HF_HUB_OFFLINE", True)  # noqa: B010 - no attribute that a type checker knows
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        for module, value in zip(modules, before, strict=True):
            setattr(module, "HF_HUB_OFFLINE", value)  # noqa: B010
        del os.environ["DISABLE_MULTIPROC"]
        if in_one_process is not None:
            os.environ["DISABLE_MULTIPROC"] = in_one_process


class HarnessLM(TemplateLM):
    """An LM that lm-eval's evaluator takes: `lm_eval.simple_evaluate(model=HarnessLM(lm), …)`.

    batch: sequences that run together. max_len: tokens of a context and its answer; by default what the model was
    trained for. Raises ValueError for a model without a tokenizer.
    """

    def __init__(self, lm: LM, batch: int = 8, max_len: int | None = None):
        super().__init__()
        if lm.tokenizer is None:
            raise ValueError("This model has no tokenizer; evaluation tasks are text.")
        self.max_length = generate.choose_max_len(lm.cfg, max_len or lm.cfg.max_len)
        self.batch_size = batch
        self._lm, self._text = lm, lm.tokenizer

    @property
    def eot_token_id(self) -> int:
        ends = [self._text.eos_id] if self._text.eos_id is not None else sorted(self._text.stop_ids)
        if not ends:
            raise ValueError(
                "This model's tokenizer names no token that begins or ends a text; an empty context needs one."
            )
        return ends[0]

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self._text.bos_id is None else self._text.bos_id

    @property
    def tokenizer_name(self) -> str:
        return "jaxllm"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        tokens = self._text.encode(string, add_special=add_special_tokens is not False)
        doubled = [self._text.bos_id] * 2
        return tokens[1:] if add_special_tokens is None and tokens[:2] == doubled else tokens  # a chat template has BOS

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text. Without a generation prompt it stops within the last message, to be continued."""
        text = self._text.apply_chat(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        return log_likelihoods(self._lm, pairs, self.batch_size, self.max_length)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        pairs, owners = [], []
        for n, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            for window in windows:
                pairs.append(make_disjoint_window(window))
                owners.append(n)
        sums = [0.0] * len(requests)
        scores = log_likelihoods(self._lm, pairs, self.batch_size, self.max_length)
        for owner, (log_p, _) in zip(owners, scores, strict=True):
            sums[owner] += log_p
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        prompts: list[list[int]] = []
        groups: dict[str, list[int]] = {}  # requests that generate in the same way
        longest = 0
        for n, request in enumerate(requests):
            text, asked = tuple[Any, ...](request.args)
            how = _generation(asked)
            room = self.max_length - how["max_new_tokens"]
            if room < 1:
                raise ValueError(
                    f"A task asks for {how['max_new_tokens']} new tokens, and max_len={self.max_length} is for the "
                    "prompt as well; set max_gen_toks in the task's generation_kwargs."
                )
            prompts.append((self.tok_encode(text) or [self.prefix_token_id])[-room:])
            groups.setdefault(json.dumps(how, sort_keys=True), []).append(n)
            longest = max(longest, len(prompts[-1]) + how["max_new_tokens"])
        answers = [""] * len(requests)
        if not requests:
            return answers
        engine = generate.compile(self._lm, batch=min(self.batch_size, len(requests)), max_len=longest)
        for how, members in groups.items():
            members.sort(key=lambda n: len(prompts[n]))  # a batch lasts as long as its longest prompt
            results = engine.generate([prompts[n] for n in members], **json.loads(how))
            for n, result in zip(members, results, strict=True):
                answers[n] = result.text
        return answers


def _generation(asked: Mapping[str, Any]) -> dict[str, Any]:
    """A task's generation_kwargs as arguments of `Engine.generate`. Raises ValueError for one that it does not have."""
    known = ("until", "do_sample", *_MAX_NEW_TOKENS, *_SAMPLING)
    if unknown := sorted(set(asked) - set(known)):
        raise ValueError(f"The task's generation_kwargs have {unknown}; known: {', '.join(known)}.")
    until = asked.get("until") or []
    sampling = {name: asked[name] for name in _SAMPLING if asked.get(name) is not None}
    # As in lm-eval: a temperature alone means sampling, and do_sample: false means none.
    if not asked.get("do_sample", sampling.get("temperature", 0) > 0):
        sampling["temperature"] = 0
    elif "temperature" not in sampling:
        sampling["temperature"] = 1
    Sampling(**sampling)
    return {
        "stop": [text for text in ([until] if isinstance(until, str) else until) if text],
        "max_new_tokens": next((int(asked[name]) for name in _MAX_NEW_TOKENS if asked.get(name) is not None), 256),
    } | sampling
