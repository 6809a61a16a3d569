"""Prompts in, answers out: the loop over a model's compiled programs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxllm import hosts, kernels, shard, stages
from jaxllm.cache import init_cache
from jaxllm.compile import WHOLE, Part, Programs, compile_programs
from jaxllm.config import ModelConfig
from jaxllm.lm import LM, check_tokens
from jaxllm.params import Params
from jaxllm.sample import Sampling, SamplingArrays, as_arrays
from jaxllm.text import TextStream, Tokenizer

Prompt = str | Sequence[int]
# To read the weights takes as long as to multiply them by so many tokens: on a CPU, as measured, and on an
# accelerator, by a TPU v5e's 197 TFLOP/s and 0.82 TB/s.
_CALL_TOKENS_CPU, _CALL_TOKENS = 16, 240
FinishReason = Literal["stop_token", "stop_string", "length"]


@dataclasses.dataclass
class Result:
    """The answer to one prompt.

    tokens: the new token ids, a stop token that ended them included.
    text: what they say, up to a stop token or stop string; "" for a model without a tokenizer.
    finish_reason: "length" when max_new_tokens or the cache ended it.
    """

    prompt_tokens: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None


@dataclasses.dataclass(frozen=True)
class Engine:
    """A compiled model. Made by `compile`; generate and stream may be called any number of times, from any thread.

    What a generation ends with, its cache above all, is kept for the next.
    """

    cfg: ModelConfig
    params: Any  # Params; with stages, a tuple of those of each
    programs: Programs
    tokenizer: Tokenizer | None
    max_len: int
    mesh: Mesh | None
    rules: shard.Rules
    _idle: list[Any] = dataclasses.field(default_factory=list, init=False, repr=False, compare=False)  # states

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = 128,
        stop: Sequence[str] = (),
        stop_tokens: Sequence[int] | None = None,
        **sampling: float,
    ) -> list[Result]:
        """Continues each prompt.

        prompts: texts or lists of token ids, of any lengths and any number; they run in groups of the compiled batch.
        max_new_tokens: for each prompt; fewer where the compiled max_len leaves less room.
        stop: strings that end an answer. stop_tokens: ids that do; the tokenizer's by default, () for none.
        sampling: the fields of `Sampling`: temperature (default 0: greedy), top_k, top_p, min_p, repetition_penalty
            and seed.

        Raises ValueError for an empty prompt, one that does not fit into max_len, or an argument out of range.
        """
        how = Sampling(**sampling)  # pyright: ignore[reportArgumentType]
        requests = self._requests(prompts, max_new_tokens, stop, stop_tokens)
        self._require_same(requests, how, stop, stop_tokens)
        for _ in self._run(requests, how, stop_tokens):
            pass
        return [request.result for request in requests]

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        stop: Sequence[str] = (),
        stop_tokens: Sequence[int] | None = None,
        **sampling: float,
    ) -> Iterator[str]:
        """Yields the answer to one prompt as text that only grows, never a part of a character. See `generate`."""
        how = Sampling(**sampling)  # pyright: ignore[reportArgumentType]
        requests = self._requests([prompt], max_new_tokens, stop, stop_tokens)
        self._require_same(requests, how, stop, stop_tokens)
        return (text for _, text in self._run(requests, how, stop_tokens) if text)

    def _requests(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_new_tokens: int,
        stop: Sequence[str],
        stop_tokens: Sequence[int] | None,
    ) -> list[_Request]:
        if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int | np.integer)):
            prompts = [prompts]  # pyright: ignore[reportAssignmentType]
        if len(prompts) == 0:
            raise ValueError("There are no prompts; expected at least one text or list of token ids.")
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens!r}; expected a positive integer.")
        if isinstance(stop, str) or any(not isinstance(text, str) or not text for text in stop):
            raise ValueError(f"stop is {stop!r}; expected a list of strings, none empty.")
        if stop and self.tokenizer is None:
            raise ValueError("Stop strings need a tokenizer and this model has none; use stop_tokens.")
        encoded = encode_prompts(prompts, self.cfg, self.tokenizer, self.max_len)  # pyright: ignore[reportArgumentType]
        return [self._request(tokens, max_new_tokens, stop) for tokens in encoded]

    def _require_same(self, requests: list[_Request], *how: Any) -> None:
        if shard.across_hosts(self.mesh):
            asked = [(request.prompt, request.limit) for request in requests]
            hosts.require_same("the prompts, or what was asked of them,", (asked, how))

    def _request(self, tokens: list[int], max_new_tokens: int, stop: Sequence[str]) -> _Request:
        text = None if self.tokenizer is None else self.tokenizer.stream(stop)
        return _Request(tokens, min(max_new_tokens, self.max_len - len(tokens)), text, Result(len(tokens)))

    def _run(
        self, requests: list[_Request], how: Sampling, stop_tokens: Sequence[int] | None
    ) -> Iterator[tuple[_Request, str]]:
        """Runs the requests group by group and yields each new piece of text as it comes."""
        if stop_tokens is None:
            stop_tokens = () if self.tokenizer is None else tuple(self.tokenizer.stop_ids)
        stops = frozenset(stop_tokens)
        arrays = as_arrays(how, stops)
        for start in range(0, len(requests), self.programs.batch):
            group = requests[start : start + self.programs.batch]
            limit = max(request.limit for request in group)
            for block_BN in self.token_blocks([request.prompt for request in group], limit, arrays, start):
                for request, row in zip(group, block_BN, strict=False):
                    if text := request.take(row, stops):
                        yield request, text
                if all(request.result.finish_reason for request in group):
                    break

    def token_blocks(
        self, prompts: Sequence[Sequence[int]], limit: int, how: SamplingArrays, first_row: int = 0
    ) -> Iterator[np.ndarray]:
        """The new tokens of at most `batch` prompts as they are drawn: int32 [B, N]; -1 after a row's end.

        The first block has one column, the others as many as a decode call yields. Prompts and limit must fit max_len.
        first_row: number of the first prompt, which chance depends on.
        """
        batch = self.programs.batch
        lengths_B = np.zeros(batch, np.int32)
        lengths_B[: len(prompts)] = [len(prompt) for prompt in prompts]
        call = _CALL_TOKENS_CPU if jax.default_backend() == "cpu" else _CALL_TOKENS
        plan = plan_prefill(int(lengths_B.max()), [*self.programs.prefill], call)
        tokens_BT = np.zeros((batch, sum(plan)), np.int32)
        for row, prompt in zip(tokens_BT, prompts, strict=False):
            row[: len(prompt)] = prompt

        row_B = np.arange(first_row, first_row + batch, dtype=np.int32)
        state = self._start()
        at, tokens = 0, None
        with contextlib.suppress(GeneratorExit):  # whoever asked has enough
            for chunk in plan:
                call, new = self.programs.prefill[chunk], tokens_BT[:, at : at + chunk]
                state, tokens = call(self.params, state, new, np.int32(at), lengths_B, row_B, how)
                at += chunk
            left = limit - 1
            # The next block is dispatched before this one is read, so that the host's work costs no time.
            while left > 0:
                state, ahead = self.programs.decode(self.params, state, np.int32(left), how)
                yield _columns(tokens)
                tokens = ahead
                left -= ahead.shape[1]
            yield _columns(tokens)
        self._idle.append(state)

    def _start(self) -> Any:
        try:
            return self._idle.pop()
        except IndexError:
            state = self.programs.start()
        if self.mesh is None:
            kernels.settle(state)
        return state

    @property
    def step_bytes(self) -> int:
        """What each device has to read in a decode step: its part of the contracted weights and of the cache.

        With stages: a device of the stage that reads most, which reads its weights for each group of rows.
        """
        batch, slots = self.programs.batch, self.programs.slots
        if self.mesh is None or self.mesh.shape["stages"] == 1:
            return sum(_read(self.cfg, WHOLE, self.params, batch, slots, self.mesh, self.rules))
        parts = stages.split(self.cfg, self.mesh.shape["stages"])
        groups = stages.count_groups(batch, len(parts), self.mesh.shape["data"])
        read = [
            _read(stage.cfg, stage.part, params, batch, slots, mesh, self.rules)
            for stage, params, mesh in zip(parts, self.params, shard.stage_meshes(self.mesh), strict=True)
        ]
        return max(groups * weights + cache for weights, cache in read)


def _read(
    cfg: ModelConfig, part: Part, params: Params, batch: int, slots: int, mesh: Mesh | None, rules: shard.Rules
) -> tuple[int, int]:
    """Bytes of contracted weights and of the cache on each device."""

    def nbytes(tree: Any) -> int:
        leaves = jax.tree.leaves(tree)
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)

    looked_up = {} if cfg.tie_embeddings and part.predicts else params.get("embed", {})
    weights = nbytes(params) - nbytes(looked_up)
    cache = jax.eval_shape(lambda: init_cache(cfg, batch, slots))
    if mesh is None:
        return weights, sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    shardings = shard.cache_shardings(cfg, mesh, cache.split, rules)
    return weights, nbytes(
        jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), cache, shardings)
    )


@dataclasses.dataclass
class _Request:
    prompt: list[int]
    limit: int  # new tokens
    stream: TextStream | None
    result: Result

    def take(self, row: np.ndarray, stops: frozenset[int]) -> str:
        """Adds tokens to the result until it is finished; returns the text that became certain."""
        result, new = self.result, ""
        for token in row.tolist():
            if result.finish_reason or token < 0:
                break
            result.tokens.append(token)
            if token in stops:
                result.finish_reason = "stop_token"
            elif self.stream is not None:
                new += self.stream.push(token)
                if self.stream.stopped:
                    result.finish_reason = "stop_string"
            if not result.finish_reason and len(result.tokens) == self.limit:
                result.finish_reason = "length"
            if result.finish_reason and self.stream is not None:
                new += self.stream.flush()
        result.text += new
        return new


def encode_prompts(
    prompts: Sequence[Prompt], cfg: ModelConfig, tokenizer: Tokenizer | None, max_len: int
) -> list[list[int]]:
    """Token ids of each prompt. Raises ValueError for one that is empty, or has no room for an answer in max_len."""
    encoded = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if tokenizer is None:
                raise ValueError(f"Prompt {i} is text, and this model has no tokenizer; give a list of token ids.")
            prompt = tokenizer.encode(prompt) if prompt else []
        tokens = list(prompt)
        if not tokens:
            raise ValueError(f"Prompt {i} is empty; a model needs at least one token to go on from.")
        check_tokens(cfg, [tokens])
        if len(tokens) >= max_len:
            raise ValueError(
                f"Prompt {i} has {len(tokens)} tokens; max_len={max_len} is for prompt and answer together. "
                "Shorten the prompt or compile with a larger max_len."
            )
        encoded.append(tokens)
    return encoded


def choose_max_len(cfg: ModelConfig, max_len: int | None) -> int:
    """max_len, or by default 2048 or what the model was trained for, if that is less."""
    if max_len is None:
        return min(2048, cfg.max_len)
    if max_len > cfg.max_len:
        raise ValueError(f"max_len={max_len}; the model was trained for at most {cfg.max_len} tokens.")
    return max_len


def _columns(tokens: jax.Array | None) -> np.ndarray:
    """Tokens on the host as [B, N]; waits for them."""
    host = np.asarray(tokens)
    return host[:, None] if host.ndim == 1 else host


def plan_prefill(length: int, chunks: Sequence[int], call: int) -> list[int]:
    """The chunks that take a prompt of `length` tokens at the least cost, in falling order.

    call: what a call costs, in tokens, beside those of its chunk.
    """
    largest = max(chunks)

    @functools.cache
    def best(left: int) -> tuple[int, list[int]]:
        plans = [(0, []) if size >= left else best(left - size) for size in chunks] if left > 0 else []
        found = [(cost + call + size, [size, *rest]) for size, (cost, rest) in zip(chunks, plans, strict=False)]
        return min(found, key=lambda plan: plan[0], default=(0, []))

    return [largest] * (length // largest) + sorted(best(length % largest)[1], reverse=True)


def compile(
    lm: LM,
    *,
    batch: int = 1,
    max_len: int | None = None,
    mesh: Mesh | None = None,
    rules: shard.Rules = shard.RULES,
) -> Engine:
    """Compiles a model for generation and puts its weights on the devices.

    batch: prompts that run together. max_len: tokens of prompt and answer; by default 2048 or what the model was
    trained for, if that is less. mesh: from `make_mesh`; None for one device; one with stages has a run of layers on
    each run of devices, and the batch goes through them in groups. rules: what the mesh's axes split: `shard.RULES`,
    tensor parallel; `shard.SCATTER`, the residual stream of prefill too; `shard.SEQUENCE_PARALLEL`, the cache of those
    that share KV heads; `shard.FULLY_SHARDED`, the weights also over the batch's devices.

    A mesh may have devices of several processes (`hosts.join`). Each then has to compile the same and ask the same of
    the engine, at the same time, and gets the same answers.

    Raises ValueError when max_len is more than the model was trained for, the mesh does not divide the model, it has
    more stages than the model has layers, or stages of several processes, or where processes want different things.
    """
    max_len = choose_max_len(lm.cfg, max_len)
    if shard.across_hosts(mesh):
        hosts.require_same("the model, batch, length, mesh or rules", (lm.cfg, lm.ledger, batch, max_len, mesh, rules))
    params = storable(lm.params, mesh)
    if mesh is not None and mesh.shape.get("stages", 1) > 1:
        if shard.across_hosts(mesh):
            raise ValueError("The mesh has stages and devices of several processes; stages are for one. Leave one out.")
        programs = stages.compile_stages(lm.cfg, params, batch, max_len, mesh, rules=rules)
        params = stages.put(lm.cfg, params, mesh, rules)
    else:
        programs = compile_programs(lm.cfg, params, batch, max_len, mesh, rules=rules)
        if mesh is not None:
            params = shard.put(params, shard.param_shardings(lm.cfg, params, mesh, rules))
    return Engine(lm.cfg, params, programs, lm.tokenizer, max_len, mesh, rules)


def storable(params: Params, mesh: Mesh | None, platform: str | None = None) -> Params:
    """The weights, or their shapes, as programs take them: those of a mesh, or of one device.

    platform: the device's; None for the default device's.
    """
    if mesh is None:
        return kernels.prepare(params, platform or jax.default_backend())
    if mesh.devices.flat[0].platform != "cpu":
        return params

    def widen(x: Any) -> Any:
        if x.dtype != jnp.int4:
            return x
        return jax.ShapeDtypeStruct(x.shape, jnp.int8) if isinstance(x, jax.ShapeDtypeStruct) else x.astype(jnp.int8)

    # A program compiled ahead refuses every sharded int4 array on CPU, taking its layout for another (jax 0.10). There
    # an int4 takes a byte in any case.
    return jax.tree.map(widen, params)
