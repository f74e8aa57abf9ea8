"""Windowed perplexity against ten lines of transformers."""

import math

import pytest
import torch

from spikellm.evaluation.perplexity import perplexity
from spikellm.model.conversion import fill, install
from tests.codes import base2_tables
from tests.models import tiny_model


def perplexity_by_transformers(model, windows) -> float:
    losses = []
    for window in windows:
        with torch.no_grad():
            losses.append(model(window[None], labels=window[None]).loss.item())
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("length", [2, 40, 300])
def test_perplexity_is_that_of_a_plain_loop(length):
    model = tiny_model()
    windows = torch.randint(0, 256, (3, length), generator=torch.Generator().manual_seed(length))
    found = perplexity(model, windows, label="test")
    assert found.value == pytest.approx(perplexity_by_transformers(model, windows), rel=1e-5)
    assert (found.windows, found.window, found.tokens) == (3, length, 3 * (length - 1))


def test_perplexity_of_a_spiking_model_is_that_of_a_plain_loop(ids):
    model = tiny_model()
    install(model, rotated=(), query_block=16)
    fill(model, base2_tables(model), compiled=False)
    assert perplexity(model, ids, label="test").value == pytest.approx(perplexity_by_transformers(model, ids), rel=1e-5)


def test_perplexity_of_the_real_model_on_real_text(real_model, real_tokenizer, shared_data):
    text = (shared_data / "text" / "wikitext2_test_dev.txt").read_text(encoding="utf-8")
    windows = torch.tensor(real_tokenizer(text[:20000], add_special_tokens=False)["input_ids"])[:1024].view(2, 512)
    found = perplexity(real_model, windows, label="test")
    assert found.value == pytest.approx(perplexity_by_transformers(real_model, windows), rel=1e-4)
    assert 10 < found.value < 80


def test_a_loss_that_is_no_number_is_an_error(ids):
    model = tiny_model()
    model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="broken"):
        perplexity(model, ids, label="broken")
