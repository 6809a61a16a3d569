"""Distillation: weights are trained until a model predicts what another one does."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxllm import formats, shard
from jaxllm.arrays import QArray
from jaxllm.calibrate import describe
from jaxllm.config import ModelConfig
from jaxllm.evaluate import evaluation_text, token_windows
from jaxllm.fit import Run, fit
from jaxllm.lm import LM, Transform, check_tokens, fingerprint, record, require_order
from jaxllm.losses import Objective
from jaxllm.params import assign, flatten, unflatten
from jaxllm.teachers import CachedTeacher, cache_teacher, check_top
from jaxllm.training import Gradual, Trainer, Training, Weights
from jaxllm.transforms.prune import cubic_schedule
from jaxllm.transforms.quantize import default_rules

_HELDOUT = 0.05  # of the windows, where no others are given


def distill(
    teacher: LM | CachedTeacher,
    text: Any,
    training: Training,
    objective: Objective | None = None,
    *,
    heldout: Any = None,
    length: int = 256,
    top_k: int | None = None,
    quantize: str | Mapping[str, str | None] | None = None,
    sparsity: float | None = None,
    layer_map: Mapping[int, int] | None = None,
    on_policy: float = 0.0,
    mesh: Mesh | None = None,
    rules: shard.Rules = shard.RULES,
    path: Path | None = None,
    resume: bool = False,
    save_every: int | None = None,
    keep: int = 1,
    log: Callable[[str], None] = lambda _: None,
) -> Transform:
    """Trains a model's weights until it predicts what the teacher does. Zeros that pruning made stay zero.

    teacher: a model of the same vocabulary, of any size and precision; or its predictions (`cache_teacher`) of exactly
        these windows, the held-out ones last.
    text: what is read, a str or ids [N, T]; a text is cut into windows of `length` tokens. heldout: the same, what is
        measured on and not trained on; by default the last twentieth of the windows.
    training, objective: how, and towards what; by default forward KL at temperature 1.
    top_k: the teacher's predictions are cached first, in path / "teacher", this many of each position.
    quantize: weights are seen as `quantize` of the same rules would round them, so that doing it afterwards costs less.
    sparsity: magnitude pruning to this fraction of each matrix of the layers while training, by `cubic_schedule`, done
        after half of the steps. Only what comes after that can be the result.
    layer_map: {layer: the teacher's layer} that the objective's `hidden` and `attention` compare; by default each layer
        with the one at the same share of the depth.
    on_policy: share of steps, in [0, 1], on text that the model being trained draws itself.
    mesh, rules: where weights and the batch are split; as of `compile`.
    path: directory of checkpoints (every `save_every` steps, by default a tenth; the `keep` best by held-out loss, and
        the latest) and of log.csv. resume: goes on with a run that is there; otherwise that is an error.

    The result has the weights of the least held-out loss. Its ledger entry cannot be replayed without the teacher.
    Raises ValueError for a model or teacher that this cannot train, or a combination that makes no sense, before any
    slow work.
    """
    objective = Objective() if objective is None else objective
    if not 0 <= on_policy <= 1:
        raise ValueError(f"on_policy is {on_policy}; expected a share of the steps in [0, 1].")
    if sparsity is not None and not 0 < sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}; expected a fraction in (0, 1).")
    if sparsity is not None and training.rank:
        raise ValueError("sparsity and rank exclude each other: a low-rank change cannot zero weights.")
    for name, value in {"save_every": save_every, "keep": keep}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; expected a positive number.")
    if layer_map is not None and not (objective.hidden or objective.attention):
        raise ValueError("layer_map says what hidden and attention compare; give one of them a weight.")
    if sparsity is not None and training.steps < 2:
        raise ValueError("sparsity needs at least two steps: nothing is pruned before the first has been taken.")
    if top_k is not None and (path is None or not isinstance(teacher, LM)):
        raise ValueError("top_k caches what a model predicts, in `path`: it needs a model as teacher, and a path.")
    if isinstance(teacher, LM) and top_k is not None:
        check_top(top_k, teacher.cfg.vocab_size, objective.temperature)
    cached = top_k is not None or isinstance(teacher, CachedTeacher)
    if cached and (on_policy or objective.hidden or objective.attention):
        raise ValueError("A cached teacher has predictions of its text alone: no on_policy, hidden or attention.")
    if isinstance(teacher, CachedTeacher) and teacher.temperature != objective.temperature:
        raise ValueError(
            f"The cached teacher's temperature is {teacher.temperature}, the objective's {objective.temperature}; "
            "they have to be the same."
        )

    def transform(lm: LM) -> LM:
        require_order(lm, "distill")
        vocabulary = teacher.vocab_size if isinstance(teacher, CachedTeacher) else teacher.cfg.vocab_size
        if vocabulary != lm.cfg.vocab_size:
            raise ValueError(
                f"The teacher has {vocabulary} tokens, the student {lm.cfg.vocab_size}; expected the same."
            )
        for each in [lm, teacher] if isinstance(teacher, LM) else [lm]:
            if each.cfg.dtype == "float16":
                raise ValueError("float16 has too few exponents for gradients; load the models in bfloat16 or float32.")
        if isinstance(teacher, LM):
            _check_tokenizers(lm, teacher)
        tokens_NT, heldout_MT = _windows(lm, text, heldout, length)
        seen = np.concatenate([tokens_NT, heldout_MT])
        if isinstance(teacher, CachedTeacher) and describe(seen)["sha256"] != teacher.sha256:
            raise ValueError(f"{teacher.path} has predictions of other windows; cache the teacher for these.")
        rounded: dict[str, str] = {}
        if quantize is not None:
            rounded = assign(default_rules(quantize) if isinstance(quantize, str) else quantize, lm.info)
            for name, fmt in rounded.items():
                formats.check_group(formats.parse(fmt), lm.info[name].shape, lm.info[name].contracted, name)
        if mesh is not None:
            for cfg in [lm.cfg, teacher.cfg] if isinstance(teacher, LM) else [lm.cfg]:
                shard.check_mesh(cfg, mesh, training.batch // training.accumulate, rules)
        gradual, pruned = None, 0
        if sparsity is not None:
            pruned = max(1, training.steps // 2)
            gradual = Gradual(cubic_schedule(sparsity, 0, pruned), every=max(1, training.steps // 50))
            pruned = min(pruned + gradual.every, training.steps)  # by then no mask changes any more
        layers = {}
        if objective.hidden or objective.attention:
            assert isinstance(teacher, LM)
            layers = dict(layer_map or match_layers(lm.cfg.num_layers, teacher.cfg.num_layers))
            _check_layers(layers, lm.cfg, teacher.cfg, objective)
        # Rounding has no gradient: an int8 cache is for the model that comes out, not for training.
        weights = Weights(dataclasses.replace(lm.cfg, kv_dtype=None), training.rank, rounded, training.seed)
        known = teacher.cfg if isinstance(teacher, LM) and top_k is None else None
        trainer = Trainer(weights, known, objective, training, layers, gradual, mesh, rules)
        args = {
            "teacher": _name(teacher),
            "top_k": top_k,
            "text": describe(tokens_NT),
            "heldout": describe(heldout_MT),
            "training": dataclasses.asdict(training),
            "objective": dataclasses.asdict(objective),
            "quantize": dict(quantize) if isinstance(quantize, Mapping) else quantize,
            "sparsity": sparsity,
            "layer_map": {str(mine): theirs for mine, theirs in layers.items()},
            "on_policy": on_policy,
        }
        settings = args | {"student": fingerprint(lm)}
        every = save_every or max(1, training.steps // 10)
        run = Run(trainer, tokens_NT, heldout_MT, every, pruned, keep, on_policy, path, settings)
        given = teacher
        if mesh is not None and isinstance(teacher, LM):
            places = shard.param_shardings(teacher.cfg, teacher.params, mesh, rules)
            given = dataclasses.replace(teacher, params=shard.put(teacher.params, places))
        if isinstance(given, LM) and top_k is not None:
            assert path is not None
            given = cache_teacher(given, seen, path / "teacher", top_k, objective.temperature, log)
        done = fit(run, lm, given, resume, log)
        args |= {"best_step": done.step, "heldout_loss": [done.first_loss, done.heldout_loss]}
        return record(lm, "distill", args, weights.paths(lm.params), params=done.params)

    return transform


def _windows(lm: LM, text: Any, heldout: Any, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(what is trained on, what is held out), of one length."""

    def cut(given: Any) -> np.ndarray:
        found = check_tokens(lm.cfg, token_windows(lm, given, length) if isinstance(given, str) else given)
        if not 2 <= found.shape[1] <= lm.cfg.max_len:
            raise ValueError(
                f"The windows have {found.shape[1]} tokens; expected at least two, and at most the {lm.cfg.max_len} "
                "that the model was made for."
            )
        return found

    tokens_NT = cut(text)
    if heldout is not None:
        heldout_MT = cut(heldout)
        if heldout_MT.shape[1] != tokens_NT.shape[1]:
            raise ValueError(
                f"The text's windows have {tokens_NT.shape[1]} tokens, the held-out ones {heldout_MT.shape[1]}; "
                "expected the same. Is one of the texts shorter than a window?"
            )
        return tokens_NT, heldout_MT
    if len(tokens_NT) < 2:
        raise ValueError(f"The text has one window of {tokens_NT.shape[1]} tokens; give more, or a held-out text.")
    count = max(1, round(_HELDOUT * len(tokens_NT)))
    return tokens_NT[:-count], tokens_NT[-count:]


def _check_tokenizers(student: LM, teacher: LM) -> None:
    """Raises ValueError where the teacher would read other words in the ids that the student's tokenizer makes."""
    if student.tokenizer is None or teacher.tokenizer is None:
        return
    probe = evaluation_text()[:2000]
    mine, theirs = (lm.tokenizer.encode(probe) for lm in (student, teacher) if lm.tokenizer is not None)
    if mine != theirs:
        raise ValueError("The teacher's tokenizer has other ids than the student's; expected the same for a text.")


def match_layers(student: int, teacher: int) -> dict[int, int]:
    """Each of the student's layers with the teacher's at the same share of the depth; the last with the last."""
    return {i: math.ceil((i + 1) * teacher / student) - 1 for i in range(student)}


def _check_layers(layers: Mapping[int, int], mine: ModelConfig, theirs: ModelConfig, objective: Objective) -> None:
    for student, teacher in layers.items():
        if not (0 <= student < mine.num_layers and 0 <= teacher < theirs.num_layers):
            raise ValueError(
                f"layer_map has {student}: {teacher}; the student has layers 0 to {mine.num_layers - 1}, the teacher "
                f"0 to {theirs.num_layers - 1}."
            )
    if objective.hidden and mine.embed_dim != theirs.embed_dim:
        raise ValueError(
            f"hidden compares residual streams, and the student's is {mine.embed_dim} wide, the teacher's "
            f"{theirs.embed_dim}; use attention, which takes any width."
        )


def _name(teacher: LM | CachedTeacher) -> Any:
    if isinstance(teacher, CachedTeacher):
        return {"cached": teacher.sha256, "k": teacher.k, "temperature": teacher.temperature}
    return fingerprint(teacher)


def smaller(teacher: LM, cfg: ModelConfig, layers: Mapping[int, int] | None = None) -> LM:
    """A student of another shape that begins with the teacher's weights: of each axis the first channels or heads.

    layers: {student's layer: teacher's layer} that it begins with; by default as `match_layers`.
    Raises ValueError where the student is larger than the teacher, or has another vocabulary or head width.
    """
    layers = match_layers(cfg.num_layers, teacher.cfg.num_layers) if layers is None else layers
    if sorted(layers) != list(range(cfg.num_layers)):
        raise ValueError(f"layers names {sorted(layers)}; expected each of the student's {cfg.num_layers} once.")
    if any(not 0 <= theirs < teacher.cfg.num_layers for theirs in layers.values()):
        raise ValueError(f"layers are {dict(layers)}; the teacher has 0 to {teacher.cfg.num_layers - 1}.")
    flat, params = flatten(teacher.params), {}
    for path, info in LM(cfg, {}).info.items():
        group, _, rest = path.partition("/")
        source = f"layers_{layers[int(group[7:])]}/{rest}" if group.startswith("layers_") else path
        w = flat.get(source)
        if w is None or isinstance(w, QArray) or w.ndim != len(info.shape) or np.any(np.less(w.shape, info.shape)):
            has = "nothing" if w is None else f"{getattr(w, 'shape', ())}"
            raise ValueError(
                f"{path} is {info.shape} and the teacher has {has}; expected a float weight at least as large."
            )
        params[path] = jnp.asarray(w[tuple(slice(0, size) for size in info.shape)], cfg.dtype)
    args = {"teacher": fingerprint(teacher), "layers": {str(mine): theirs for mine, theirs in layers.items()}}
    return record(dataclasses.replace(teacher, cfg=cfg, ledger=()), "init", args, [*params], params=unflatten(params))
