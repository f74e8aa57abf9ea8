"""Rotation changes activations and no logits."""

from copy import deepcopy

import pytest
import torch
from conftest import TINY, norm_ratio, tiny_model

from spikellm.coding.neuron import Slot
from spikellm.model.conversion import get_neuron, install, model_sites, set_neuron
from spikellm.model.rotation import rotate
from spikellm.model.sites import SiteKind

ARCHITECTURES = list(TINY)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_stay(name, ids):
    wanted = tiny_model(name)(ids).logits
    model = tiny_model(name)
    rotate(model, seed=3)
    install(model, rotated=True, query_block=16)
    assert norm_ratio(model(ids).logits, wanted) <= 1e-4


def test_logits_of_the_real_model_stay(real_model, real_tokenizer):
    ids = real_tokenizer("The capital of France is Paris, and the Seine flows through it.", return_tensors="pt")["input_ids"]
    wanted = real_model(ids).logits
    model = deepcopy(real_model)
    rotate(model, seed=0)
    install(model, rotated=True, query_block=256)
    assert norm_ratio(model(ids).logits, wanted) <= 1e-4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_norm_weights_become_one_and_embeddings_untied(name):
    model = tiny_model(name, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    rotate(model, seed=0)
    for key, parameter in model.named_parameters():
        # the q and k norms of Qwen3 act per head, after the rotation's reach: they keep their weight
        if "layernorm" in key or key == "model.norm.weight":
            assert torch.equal(parameter, torch.ones_like(parameter)), key
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert not model.config.tie_word_embeddings


def test_tied_embeddings_keep_the_logits(ids):
    wanted = tiny_model("llama", tie_word_embeddings=True)(ids).logits
    model = tiny_model("llama", tie_word_embeddings=True)
    rotate(model, seed=0)
    install(model, rotated=True, query_block=16)
    assert norm_ratio(model(ids).logits, wanted) <= 1e-4


def test_seed_decides_the_rotation():
    embeddings = []
    for seed in (0, 0, 1):
        model = tiny_model()
        rotate(model, seed=seed)
        embeddings.append(model.model.embed_tokens.weight)
    assert torch.equal(embeddings[0], embeddings[1])
    assert norm_ratio(embeddings[2], embeddings[0]) > 0.1


def test_outlier_channels_are_spread(ids):
    model = tiny_model()
    model.model.embed_tokens.weight[:, 5] *= 100
    before = model.model.embed_tokens(ids)
    rotate(model, seed=0)
    after = model.model.embed_tokens(ids)
    assert torch.allclose(before.norm(dim=-1), after.norm(dim=-1), rtol=1e-5)
    peak = [x.abs().amax(-1).mean() / x.norm(dim=-1).mean() for x in (before, after)]
    assert peak[0] > 0.95
    assert peak[1] < 0.3


class Recorder(Slot):
    def forward(self, x):
        self.seen = x.clone()
        return x


def recorded(model, ids, kinds):
    """What passes the slots of `kinds` in layer 1."""
    found = {}
    for site in model_sites(model):
        if site.layer == 1 and site.kind in kinds:
            set_neuron(model, site, Recorder())
            found[site.kind] = site
    model(ids)
    return {kind: get_neuron(model, site).seen for kind, site in found.items()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_r3_changes_queries_and_keys_but_no_scores(name, ids):
    plain = tiny_model(name)
    install(plain, rotated=False, query_block=64)
    rotated = tiny_model(name)
    rotate(rotated, seed=0)
    install(rotated, rotated=True, query_block=64)
    kinds = (SiteKind.query, SiteKind.key)
    q, k = recorded(plain, ids, kinds).values()
    q_rotated, k_rotated = recorded(rotated, ids, kinds).values()
    groups = q.shape[1] // k.shape[1]

    def scores(query, key):
        return query @ key.repeat_interleave(groups, 1).transpose(-1, -2)

    assert norm_ratio(q_rotated, q) > 0.5
    assert norm_ratio(k_rotated, k) > 0.5
    assert norm_ratio(scores(q_rotated, k_rotated), scores(q, k)) <= 1e-4


def test_a_width_without_hadamard_matrix_is_an_error():
    model = tiny_model(intermediate_size=92)
    with pytest.raises(ValueError, match="92"):
        rotate(model, seed=0)
