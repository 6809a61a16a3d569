"""What a model would need and do on machines that nobody has at hand: compiled for them, never run.

A decode step and a chunk of prefill are compiled by the target's own compiler, from shapes alone, and its program is
read. Models of many layers are compiled with fewer, and their layers' cost is extended: unrolled layers cost the same
each. `exact=True` compiles all of them. Of a model in stages, each stage is compiled for its part of the slice.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from jaxllm import hlo_cost, shard, targets
from jaxllm.compile import CHUNKS, cache_slots
from jaxllm.config import WIDTHS, ModelConfig
from jaxllm.prediction import HOP_S, Case, Kind, Program, compiled, interval, weight_bytes
from jaxllm.stages import Stage, split
from jaxllm.targets import Target

# Of more layers so many are compiled. In a step of few, more of their caches stay on the chip than in a whole model.
FEW_LAYERS: Mapping[Kind, int] = {"prefill": 4, "step": 16}
# From a slice to another, through the network of the hosts; assumptions.
NETWORK_S = 1e-4
NETWORK_BYTES_PER_S = 12.5e9

_NONE = hlo_cost.Cost()
_NOTHING = Program(math.nan, math.nan, 0.0, _NONE, _NONE, 0.0, math.nan, _NONE, _NONE)


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """A stage of a Candidate: bytes of each of its devices, ms of one run for one group of the batch.

    argument_bytes: with the caches of all groups. transfer_ms: until the next stage, or of a token the first, has what
    this one gives. Other fields as of a Candidate.
    """

    layers: int
    fits: bool
    reason: str
    argument_bytes: float
    temp_bytes: float
    program_bytes: float
    step_ms_low: float
    step_ms_high: float
    prefill_ms_low: float
    prefill_ms_high: float
    transfer_ms_low: float
    transfer_ms_high: float
    bottleneck: str


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A prediction, for a device where bytes are given and for the whole slice where tokens are.

    With stages, bytes and reason are those of the stage that needs most, and other figures of all together.

    fits: whether arguments, temporaries and program go into hbm_bytes. reason: why not; "" where it does.
    step_ms: of a decode step with a full cache, one token for each sequence. The low end is the roofline: what memory,
        matmul units or links need at their peak. The high end takes the compiler's cycles, of kernels their roofline,
        and a delay for each collective. bottleneck: what makes the low end. With stages it is the sum of their times
        and transfers, for a group; or what the slowest stage takes for all groups, where that is more.
    ttft_ms: of `prompt_tokens`, all sequences of the batch at once.
    tokens_per_s: of all sequences together. cost: for a million new tokens, at a price for a chip and hour.
    largest_batch: at this context, estimated from what a sequence more takes.
    layers: how many were compiled, of how many.
    rules: as of a Case. stages: each; one for a model that is not split. groups: that the batch runs in.
    bubble: the share of its time that a stage waits while the groups go through all once: (S - 1) / (groups + S - 1).
    """

    target: str
    chips: int
    mesh: dict[str, int]
    quantize: str | None
    kv_dtype: str | None
    batch: int
    context: int
    fits: bool
    reason: str
    hbm_bytes: float
    argument_bytes: float
    temp_bytes: float
    program_bytes: float
    step_ms_low: float
    step_ms_high: float
    bottleneck: str
    prompt_tokens: int
    ttft_ms_low: float
    ttft_ms_high: float
    tokens_per_s_low: float
    tokens_per_s_high: float
    cost_low: float | None
    cost_high: float | None
    largest_batch: int
    memory_bytes: float
    flops: float
    collectives: dict[str, int]
    collective_bytes: float
    compile_s: float
    layers: tuple[int, int]
    rules: str
    stages: tuple[StagePlan, ...]
    groups: int
    bubble: float


def meshes(
    cfg: ModelConfig, target: Target, batch: int, stages: int = 1, rules: str = "tensor", context: int = 0
) -> Iterator[tuple[int, int, int]]:
    """(data, model, share) of the meshes of all devices of a stage's part of a slice that divide the model and batch.

    Of those with as many devices a copy, only that in which the fewest share KV heads. context: tokens, for rules that
    split the cache by them. Raises ValueError where the slice has no such parts.
    """
    devices = target.part(stages).devices()
    for copy in (n for n in range(len(devices), 0, -1) if len(devices) % n == 0):
        for share in (n for n in range(1, copy + 1) if copy % n == 0):
            try:
                sizes = len(devices) // copy, copy // share, share
                mesh = shard.make_mesh(*sizes, devices=devices)
                shard.check_mesh(cfg, mesh, batch, shard.TABLES[rules], cache_slots(context))
            except ValueError:
                continue
            yield sizes
            break


def predict(
    cfg: ModelConfig, case: Case, prompt_tokens: int = 512, price: float | None = None, exact: bool = False
) -> Candidate:
    """Compiles one case and predicts it. price: of a chip for an hour. exact: compile all layers.

    Raises ValueError when the mesh does not divide the model, or the format not its weights.
    """
    cfg = dataclasses.replace(cfg, kv_dtype=case.kv_dtype or cfg.kv_dtype)
    one = case.of_stage
    parts = split(cfg, case.stages)
    wanted = {(part, kind): _few(part, kind, exact) for part in parts for kind in FEW_LAYERS}
    todo = list(dict.fromkeys((few, kind) for (_, kind), few in wanted.items()))
    with targets.uncached(), ThreadPoolExecutor(2) as pool:  # XLA compiles outside Python's lock
        made = dict(zip(todo, pool.map(lambda want: compiled(want[0], one, want[1]), todo), strict=True))

    def program(part: Stage, kind: Kind) -> Program | str:
        few = wanted[part, kind]
        found = made[few, kind]
        return found if isinstance(found, str) else found.extend(len(part.layers) / len(few.layers))

    runs = [_run(part, one, program(part, "prefill"), program(part, "step")) for part in parts]
    return _candidate(cfg, case, runs, prompt_tokens, price, max(len(few.layers) for few, _ in todo))


def _few(part: Stage, kind: Kind, exact: bool) -> Stage:
    """A stage as it is, or one like it of fewer layers, from which it follows."""
    layers = len(part.layers)
    uniform = not any(isinstance(getattr(part.cfg, name), tuple) for name in WIDTHS)
    few = min(layers, FEW_LAYERS[kind]) if uniform and not exact else layers
    return Stage(range(few), dataclasses.replace(part.cfg, num_layers=few), part.part)


@dataclasses.dataclass(frozen=True)
class _Run:
    """A stage's programs; reason: why there are none. one: its case."""

    part: Stage
    one: Case
    prefill: Program
    step: Program
    reason: str

    @property
    def weight_bytes(self) -> float:
        return weight_bytes(self.part, self.one)

    @property
    def temp_bytes(self) -> float:
        return max(self.step.temp_bytes, self.prefill.temp_bytes)

    @property
    def program_bytes(self) -> float:
        return self.step.program_bytes + self.prefill.program_bytes

    @property
    def state_bytes(self) -> float:
        """The cache, of one group."""
        return self.step.argument_bytes - self.weight_bytes


def _run(part: Stage, one: Case, prefill: Program | str, step: Program | str) -> _Run:
    """prefill, step: the programs, or why they do not fit."""
    if isinstance(prefill, str) or isinstance(step, str):
        return _Run(part, one, _NOTHING, _NOTHING, prefill if isinstance(prefill, str) else str(step))
    return _Run(part, one, prefill, step, "")


def _stage_plan(run: _Run, case: Case, number: int) -> StagePlan:
    chip, step = run.one.target.chip, run.step
    arguments = step.argument_bytes + (case.groups - 1) * run.state_bytes
    need, reason = arguments + run.temp_bytes + run.program_bytes, run.reason
    if not reason and need > chip.hbm_bytes:
        reason = f"needs {need / 1e9:.1f} GB of {chip.hbm_bytes / 1e9:.1f}"
    low, high, bottleneck = interval(step, run.one.target)
    prefill_low, prefill_high, _ = interval(run.prefill, run.one.target)
    transfer_low, transfer_high = _transfer(run, case, number, tokens=1)
    return StagePlan(
        layers=len(run.part.layers),
        fits=not reason,
        reason=reason,
        argument_bytes=arguments,
        temp_bytes=run.temp_bytes,
        program_bytes=run.program_bytes,
        step_ms_low=low * 1e3,
        step_ms_high=high * 1e3,
        prefill_ms_low=prefill_low * 1e3,
        prefill_ms_high=prefill_high * 1e3,
        transfer_ms_low=transfer_low * 1e3,
        transfer_ms_high=transfer_high * 1e3,
        bottleneck=bottleneck,
    )


def _transfer(run: _Run, case: Case, number: int, tokens: int) -> tuple[float, float]:
    """Seconds until another stage has what stage `number` gives for so many tokens of each row, least and most."""
    if case.stages == 1:
        return 0.0, 0.0
    target, last = case.target, number == case.stages - 1
    stream = run.one.lowering(run.part).stream(tokens)
    nbytes = (
        4.0 * run.one.batch if last else math.prod(stream.sharding.shard_shape(stream.shape)) * stream.dtype.itemsize
    )
    low = nbytes / target.chip.link_bytes_per_s + HOP_S
    if target.count > 1 and (last or (number + 1) % (case.stages // target.count) == 0):
        return low, nbytes * math.prod(run.one.target.host) / NETWORK_BYTES_PER_S + NETWORK_S
    return low, nbytes / target.chip.link_bytes_per_s + sum(target.grid) * HOP_S


def _candidate(
    cfg: ModelConfig, case: Case, runs: Sequence[_Run], prompt_tokens: int, price: float | None, layers: int
) -> Candidate:
    plans = [_stage_plan(run, case, number) for number, run in enumerate(runs)]
    prompt = [_transfer(run, case, number, CHUNKS[-1]) for number, run in enumerate(runs)]
    failed = next((number for number, plan in enumerate(plans) if plan.reason), None)
    worst = max(plans, key=_need) if failed is None else plans[failed]
    slowest = max(plans, key=lambda plan: plan.step_ms_low)
    steps = [
        max(sum(step) + sum(transfer), case.groups * max(step))
        for step, transfer in (
            ([p.step_ms_low for p in plans], [p.transfer_ms_low for p in plans]),
            ([p.step_ms_high for p in plans], [p.transfer_ms_high for p in plans]),
        )
    ]
    runs_of_prompt = math.ceil(prompt_tokens / CHUNKS[-1]) * case.groups
    first = [
        sum(chunk) + sum(transfer) * 1e3 + (runs_of_prompt - 1) * max(chunk)
        for chunk, transfer in (
            ([p.prefill_ms_low for p in plans], [low for low, _ in prompt[:-1]]),
            ([p.prefill_ms_high for p in plans], [high for _, high in prompt[:-1]]),
        )
    ]
    rates = sorted(case.batch / ms * 1e3 if ms else 0.0 for ms in steps)
    costs: list[float | None] = [None, None]
    if price is not None and rates[0]:
        costs = [price * case.target.chips / 3600 / rate * 1e6 for rate in reversed(rates)]
    total = sum((run.step.low for run in runs), hlo_cost.Cost())
    reason = worst.reason
    return Candidate(
        target=str(case.target),
        chips=case.target.chips,
        mesh={"data": case.data, "model": case.model, "share": case.share},
        quantize=case.format,
        kv_dtype=cfg.kv_dtype,
        batch=case.batch,
        context=case.context,
        fits=not reason,
        reason=f"stage {plans.index(worst) + 1} {reason}" if reason and len(plans) > 1 else reason,
        hbm_bytes=case.target.chip.hbm_bytes,
        argument_bytes=worst.argument_bytes,
        temp_bytes=worst.temp_bytes,
        program_bytes=worst.program_bytes,
        step_ms_low=steps[0],
        step_ms_high=steps[1],
        bottleneck=slowest.bottleneck,
        prompt_tokens=prompt_tokens,
        ttft_ms_low=first[0],
        ttft_ms_high=first[1],
        tokens_per_s_low=rates[0],
        tokens_per_s_high=rates[1],
        cost_low=costs[0],
        cost_high=costs[1],
        largest_batch=min(_largest_batch(run, case) for run in runs),
        memory_bytes=total.memory_bytes,
        flops=total.flops,
        collectives=dict(total.collectives),
        collective_bytes=total.collective_bytes,
        compile_s=sum(run.step.compile_s + run.prefill.compile_s for run in runs),
        layers=(layers, cfg.num_layers),
        rules=case.rules,
        stages=tuple(plans),
        groups=case.groups,
        bubble=(case.stages - 1) / (case.groups + case.stages - 1),
    )


def _need(plan: StagePlan) -> float:
    return plan.argument_bytes + plan.temp_bytes + plan.program_bytes


def _largest_batch(run: _Run, case: Case) -> int:
    """In all groups together, that a stage's devices hold."""
    row = run.state_bytes / run.one.batch + run.temp_bytes / case.batch
    if not row or math.isnan(row):
        return 0
    room = (run.one.target.chip.hbm_bytes - run.weight_bytes - run.program_bytes) / row
    return max(0, int(room) // case.data * case.data)


def sweep(
    cfg: ModelConfig,
    slices: Sequence[Target],
    formats: Sequence[str | None],
    batches: Sequence[int],
    contexts: Sequence[int],
    kv_dtype: str | None = None,
    prompt_tokens: int = 512,
    price: float | None = None,
    exact: bool = False,
    every_mesh: bool = False,
    rules: Sequence[str] = ("tensor",),
    stages: Sequence[int] | None = None,
) -> Iterator[Candidate]:
    """Every slice with every format, batch, context, rule table and number of stages, one by one as they are compiled.

    every_mesh: with each mesh that divides model and batch, not only the one that splits a copy of the model most.
    rules: keys of `shard.TABLES`. stages: by default one for each of a target's slices.
    """
    for target in slices:
        for format, batch, context in itertools.product(formats, batches, contexts):
            for table, count in itertools.product(rules, stages or [target.count]):
                fitting = meshes(cfg, target, batch, count, table, context)
                for mesh in itertools.islice(fitting, None if every_mesh else 1):
                    case = Case(target, *mesh, format, kv_dtype, batch, context, table, count)
                    yield predict(cfg, case, prompt_tokens, price, exact)


def best(candidates: Sequence[Candidate]) -> Candidate | None:
    """Of those that fit the one with the most tokens per second and chip, by the slower end."""
    fitting = [c for c in candidates if c.fits]
    return max(fitting, key=lambda c: c.tokens_per_s_low / c.chips, default=None)
