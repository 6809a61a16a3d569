import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import losses
from jaxllm.losses import Objective

RANDOM = np.random.default_rng(0)
STUDENT, TEACHER = RANDOM.standard_normal((2, 3, 5, 40)) * 3  # logits [B, T, V]
TARGETS = RANDOM.integers(0, 40, (3, 5))


def distribution(logits, temperature=1.0):
    p = np.exp(logits / temperature - (logits / temperature).max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def kl(p, q):
    return (p * np.log(p / q)).sum(-1)


def reference(objective):
    """By the definitions, in float64."""
    q, p = (distribution(logits, objective.temperature) for logits in (STUDENT, TEACHER))
    m = objective.beta * p + (1 - objective.beta) * q
    divergence = {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "jensen_shannon": objective.beta * kl(p, m) + (1 - objective.beta) * kl(q, m),
    }[objective.divergence]
    ce = -np.log(np.take_along_axis(distribution(STUDENT), TARGETS[..., None], -1))[..., 0]
    return (1 - objective.ce) * objective.temperature**2 * divergence + objective.ce * ce


OBJECTIVES = [
    Objective(),
    Objective(temperature=2.0, ce=0.3),
    Objective("reverse_kl", temperature=0.5),
    Objective("jensen_shannon", beta=0.1),
    Objective("jensen_shannon", beta=0.9, ce=1.0),
]


def of_tokens(objective, student, teacher=TEACHER):
    as_rows = lambda x: jnp.asarray(x, jnp.float32).reshape(-1, x.shape[-1])  # noqa: E731
    return objective.tokens(as_rows(student), as_rows(teacher), jnp.asarray(TARGETS.reshape(-1)))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_are_their_definitions(objective):
    np.testing.assert_allclose(
        of_tokens(objective, STUDENT)["loss"], reference(objective).reshape(-1), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_are_those_of_finite_differences(objective):
    with jax.enable_x64(True):
        loss = lambda x: objective.tokens(x, jnp.asarray(TEACHER[0]), jnp.asarray(TARGETS[0]))["loss"].sum()  # noqa: E731
        x = jnp.asarray(STUDENT[0])
        gradient = jax.grad(loss)(x)
        for at in [(0, 0), (2, 7), (4, 39)]:
            # The losses are computed in float32: a wide step, and a wide tolerance.
            step = 1e-2
            difference = (loss(x.at[at].add(step)) - loss(x.at[at].add(-step))) / (2 * step)
            np.testing.assert_allclose(gradient[at], difference, rtol=2e-3, atol=2e-3)


@pytest.mark.peer
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_losses_and_gradients_agree_with_torch(temperature):
    torch = pytest.importorskip("torch")
    student = torch.tensor(STUDENT.reshape(-1, 40), dtype=torch.float64, requires_grad=True)
    log_q = torch.log_softmax(student / temperature, -1)
    log_p = torch.log_softmax(torch.tensor(TEACHER.reshape(-1, 40), dtype=torch.float64) / temperature, -1)
    theirs = {
        "forward_kl": torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True),
        "reverse_kl": torch.nn.functional.kl_div(log_p, log_q, reduction="sum", log_target=True),
    }
    for name, loss in theirs.items():
        (gradient,) = torch.autograd.grad(loss * temperature**2, student, retain_graph=True)
        objective = Objective(name, temperature)
        ours, mine = jax.value_and_grad(lambda x, o=objective: of_tokens(o, x)["loss"].sum())(jnp.asarray(STUDENT))
        np.testing.assert_allclose(ours, loss.item() * temperature**2, rtol=1e-5)
        np.testing.assert_allclose(mine.reshape(-1, 40), gradient.numpy(), atol=1e-5)


def test_what_the_teacher_rules_out_is_no_nan():
    teacher = TEACHER.copy()
    teacher[..., 3:] = -np.inf
    for name in losses.DIVERGENCES:
        found = of_tokens(Objective(name), STUDENT, teacher)["loss"]
        assert np.isinf(found).all() if name == "reverse_kl" else np.isfinite(found).all()


@pytest.mark.parametrize("name", losses.DIVERGENCES)
def test_top_tokens_and_their_tail_bound_the_divergence_from_below(name):
    """Putting events together loses information, never adds any; with all tokens but one nothing is lost."""
    objective = Objective(name, temperature=1.5)
    whole = of_tokens(objective, STUDENT)["divergence"]
    student = jnp.asarray(STUDENT, jnp.float32).reshape(-1, 40)
    before = jnp.zeros_like(whole)
    for k in (1, 8, 39):
        top = losses.top_tokens(jnp.asarray(TEACHER, jnp.float32).reshape(-1, 40), k, 1.5)
        np.testing.assert_allclose(jnp.exp(top.log_p).sum(-1) + jnp.exp(top.log_tail), 1.0, rtol=1e-5)
        found = objective.tokens(student, top, jnp.asarray(TARGETS.reshape(-1)))["divergence"]
        assert (found >= before - 1e-5).all()
        assert (found <= whole + 1e-5).all()
        before = found
    np.testing.assert_allclose(before, whole, rtol=1e-4)


def test_a_tail_of_nearly_nothing_is_exact():
    logits = jnp.asarray([[30.0, 0.0, 1.0, 2.0]])
    top = losses.top_tokens(logits, 1)
    np.testing.assert_allclose(top.log_tail, np.log(np.exp([0.0, 1.0, 2.0]).sum()) - 30.0, rtol=1e-6)


@pytest.mark.parametrize("size", [4, 7, 100])
def test_chunks_add_up_to_the_whole_and_so_do_gradients(size):
    random = np.random.default_rng(1)
    w, other = (jnp.asarray(random.standard_normal((40, 6)), jnp.float32) for _ in range(2))
    x, y = (jnp.asarray(random.standard_normal((11, 6)), jnp.float32) for _ in range(2))
    rows = y, jnp.asarray(random.integers(0, 40, 11)), jnp.asarray(random.integers(0, 2, 11), bool)

    def part(w, x, of, other):
        y, targets, counts = of
        found = Objective(ce=0.5).tokens(x @ w.T, y @ other.T, targets)
        return {name: jnp.where(counts, value, 0) for name, value in found.items()}

    def whole(w, x):
        return part(w, x, rows, other)["loss"].sum() * 3

    def chunked(w, x):
        return losses.in_chunks(part, size, w, x, rows, other)["loss"] * 3

    np.testing.assert_allclose(chunked(w, x), whole(w, x), rtol=1e-6)
    for ours, theirs in zip(jax.grad(chunked, (0, 1))(w, x), jax.grad(whole, (0, 1))(w, x), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_chunks_hold_one_chunk_of_logits():
    rows, vocabulary, size = 1024, 4096, 64
    arrays = jnp.zeros((vocabulary, 8)), jnp.zeros((rows, 8)), (jnp.zeros((rows, 8)), jnp.zeros(rows, jnp.int32))

    def part(w, x, of, other):
        return Objective().tokens(x @ w.T, of[0] @ other.T, of[1])

    def temporaries(size):
        run = jax.grad(lambda w, x, of: losses.in_chunks(part, size, w, x, of, w)["loss"], (0, 1))
        return jax.jit(run).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    one = 4 * size * vocabulary
    assert temporaries(size) < 8 * one < 4 * rows * vocabulary < temporaries(rows)


def test_relations_of_models_with_other_heads():
    random = np.random.default_rng(2)
    mine, theirs = (jnp.asarray(random.standard_normal((2, 6, heads, 4)), jnp.float32) for heads in (2, 6))
    assert losses.relation_loss(theirs, theirs, 2) == pytest.approx(0, abs=1e-6)
    assert losses.relation_loss(mine, theirs, 2) > 0.01
    future = theirs.at[:, -1].set(9.0)  # the last token is seen by itself alone
    change = losses.relation_loss(theirs[:, :-1], future[:, :-1], 2)
    assert change == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"divergence": "l2"}, "forward_kl, reverse_kl"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"beta": 1.0}, "beta is 1.0"),
        ({"ce": 1.5}, "ce is 1.5"),
        ({"hidden": -1.0}, "hidden is -1.0"),
    ],
)
def test_objectives_out_of_range_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        Objective(**given)
