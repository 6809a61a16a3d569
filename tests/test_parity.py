"""Against Hugging Face transformers, float32: what it said is stored, and with the `peer` extra it is asked again."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxllm

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen2", "qwen3"])
def test_random_models_equal_transformers(family):
    lm = jaxllm.load(DATA / family, dtype="float32")
    expected = load_file(DATA / family / "reference.safetensors")
    logits = jaxllm.logits(lm, expected["tokens"][None])[0]
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4, rtol=0)
    engine = jaxllm.compile(lm, max_len=128)
    (result,) = engine.generate([expected["tokens"].tolist()], max_new_tokens=48)
    assert result.tokens == expected["greedy"].tolist()


def test_smollm2_equals_transformers(smollm2):
    expected = load_file(DATA / "smollm2-135m.safetensors")
    logits = jaxllm.logits(smollm2, expected["tokens"][None])[0]
    np.testing.assert_allclose(logits[:, expected["ids"]], expected["logits"], atol=2e-4, rtol=0)
    engine = jaxllm.compile(smollm2, max_len=64)
    (result,) = engine.generate(["The three largest cities of Portugal are"], max_new_tokens=48, stop_tokens=())
    assert result.tokens == expected["greedy"].tolist()


@pytest.mark.peer
def test_every_logit_of_smollm2_equals_transformers(smollm2, tmp_path):
    torch = pytest.importorskip("torch", reason="the peer extra is not installed")
    transformers = pytest.importorskip("transformers", reason="the peer extra is not installed")
    jaxllm.export_hf(smollm2, tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    tokens = jaxllm.token_windows(smollm2, jaxllm.evaluation_text(), 64, 2)
    with torch.no_grad():
        expected = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(jaxllm.logits(smollm2, tokens), expected, atol=2e-4, rtol=0)


def test_int8_costs_smollm2_less_than_a_hundredth_of_a_nat(smollm2):
    tokens = jaxllm.token_windows(smollm2, jaxllm.evaluation_text(), 256, 4)
    quality = jaxllm.compare(jaxllm.quantize("int8")(smollm2), smollm2, tokens)
    assert quality.perplexity == pytest.approx(jaxllm.perplexity(smollm2, tokens), rel=0.006)
    assert quality.kl < 0.01
    assert quality.top1 > 0.93
