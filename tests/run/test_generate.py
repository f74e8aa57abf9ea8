"""Stage generate: texts are those that the model gives by hand, and wrong wishes are one line."""

import csv
import json
from dataclasses import replace

import pytest
import torch

from spikellm.config.checks import InputError
from spikellm.run.command import explain
from spikellm.run.converting import spiking
from spikellm.run.stages import run_stages
from spikellm.run.workspace import Workspace
from spikellm.spikes import ledger, raster
from tests.configure import configure
from tests.jobs import SMALL
from tests.launch import launch
from tests.models import byte_model, greedy

PROMPTS = ["hello you", "a", "Spikes are few.", "x = 1"]
NEW, END = 6, 257  # the tokenizer's </s>


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Arguments of a job with a model whose tokens are bytes, in float64; one store for all."""
    root = tmp_path_factory.mktemp("generate")
    named = byte_model(root / "model")
    return [*SMALL, *named, "model.dtype=float64", f"output_root={root}", "stages=[generate]", f"generate.max_new_tokens={NEW}"]


def generated(job, *arguments: str):
    """(the section of results.json, tables)"""
    outcome = run_stages(configure(*job, *arguments))
    return outcome.results.generate, outcome.tables


def by_hand(job, prompts: list[str]) -> tuple[object, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The spiking model and, without a cache, what it finds likeliest after each prompt."""
    work = Workspace(configure(*job))
    model, texts = spiking(work), []
    for prompt in prompts:
        ids = torch.tensor(work.tokenizer(prompt).input_ids)
        new = greedy(model, ids[None], NEW)[0, len(ids) :].tolist()
        texts.append((ids, torch.tensor(new[: new.index(END) + 1] if END in new else new)))
    return work.tokenizer, model, texts


def test_texts_are_the_likeliest_tokens_in_batches_as_alone_and_step_by_step(job, tmp_path):
    tokenizer, _, texts = by_hand(job, PROMPTS)
    wanted = [tokenizer.decode(new, skip_special_tokens=True) for _, new in texts]
    assert len(set(wanted)) > 1
    file = tmp_path / "prompts.txt"
    file.write_text("\n\n".join(PROMPTS) + "\n", encoding="utf-8")
    found, _ = generated(job, f"generate.prompts_file={file}", "generate.batch_size=3")
    assert [(text.prompt, text.text) for text in found.texts] == list(zip(PROMPTS, wanted, strict=True))
    assert [text.prompt_tokens for text in found.texts] == [len(prompt) + 1 for prompt in PROMPTS]  # BOS: there is no prefix
    assert [text.tokens for text in found.texts] == [len(new) for _, new in texts]
    alone, _ = generated(job, f"generate.prompt={PROMPTS[2]}")
    steps, _ = generated(job, f"generate.prompt={PROMPTS[2]}", "snn.execution=stepped")
    assert alone.texts[0].text == steps.texts[0].text == wanted[2]
    assert (alone.spikes_per_token, alone.sops_per_token) == (steps.spikes_per_token, steps.sops_per_token)
    assert steps.seconds_per_token > 0


def test_spikes_are_those_of_the_new_tokens_that_were_read(job):
    _, model, [(ids, new)] = by_hand(job, PROMPTS[:1])
    counted = ledger.count_decoded(model, [(ids, new[:-1])])
    found, _ = generated(job, f"generate.prompt={PROMPTS[0]}")
    assert found.spikes_per_token == counted.spikes / (NEW - 1)
    assert found.sops_per_token == counted.sops / (NEW - 1)


def test_sampling_repeats_by_its_seed_and_beams_search(job):
    prompt, sampled = f"generate.prompt={PROMPTS[0]}", ("generate.temperature=1.5", "generate.top_p=0.9")
    first, other = (generated(job, prompt, *sampled, f"generate.seed={seed}")[0].texts[0].text for seed in (1, 2))
    assert first != other
    state = torch.random.get_rng_state()
    again = replace(configure(*job, prompt, *sampled, "generate.seed=1"), output_root=configure(*job).output_root + "/again")
    assert run_stages(again).results.generate.texts[0].text == first
    assert torch.equal(torch.random.get_rng_state(), state)
    tokenizer, model, [(ids, _)] = by_hand(job, PROMPTS[:1])
    beams = model.generate(ids[None], attention_mask=torch.ones_like(ids[None]), max_new_tokens=NEW, num_beams=3, use_cache=False)
    assert generated(job, prompt, "generate.beams=3")[0].texts[0].text == tokenizer.decode(beams[0, len(ids) :], skip_special_tokens=True)


@pytest.mark.parametrize("execution", ["folded", "stepped"])
def test_the_raster_has_every_spike_of_the_layer(job, execution, monkeypatch):
    monkeypatch.setattr(raster, "NEURONS", 10**6)
    _, model, [(ids, new)] = by_hand(job, PROMPTS[:1])
    counted = {site.name: site.spikes for site in ledger.count_decoded(model, [(ids, new)]).sites if site.layer == 1}
    rows = generated(job, f"generate.prompt={PROMPTS[0]}", "generate.raster=1", f"snn.execution={execution}")[1]["raster.csv"]
    counted.pop("layers.1.softmax")
    assert {row["name"] for row in rows} == set(counted)
    for name, steps in counted.items():
        own = [row["step"] for row in rows if row["name"] == name]
        assert [own.count(step) for step in range(8)] == [sum(heads) for heads in steps], name
    assert {row["token"] for row in rows} == set(range(NEW))
    assert {row["spike"] for row in rows} == {-1, 1}


def test_as_it_is_typed(job, tmp_path):
    """On the console token by token, the figures behind; the raster drawn; the second time from the store."""
    arguments = [*job, "generate.prompt=hello you", "generate.raster=0"]
    first, second = (launch(*arguments, f"hydra.run.dir={tmp_path}/{run}") for run in ("first", "second"))
    assert first.code == second.code == 0, first.err
    found = json.loads((tmp_path / "first" / "results.json").read_text())["generate"]
    text = "hello you" + found["texts"][0]["text"]
    streamed, last = first.out.index(text.split("\n")[0]), first.out.index("generated, 1 text, 6 tokens")
    assert streamed < last
    assert f"generate: {text}" in second.out
    for run in ("first", "second"):
        assert (tmp_path / run / "plots" / "raster.png").stat().st_size > 10_000
        assert len(list(csv.DictReader((tmp_path / run / "raster.csv").open()))) > 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"^generate\.prompt=null: give a text"),
        (["generate.prompt="], r"^generate\.prompt=: give a text"),
        (["generate.prompt=a", "generate.prompts_file=b"], r"^generate\.prompts_file=b with generate\.prompt=a: give one"),
        (["generate.prompts_file=/no/such"], r"^generate\.prompts_file=/no/such: No such file.*; give a UTF-8"),
        (["generate.prompt=a", "generate.raster=2"], r"^generate\.raster=2: model=tiny has layers 0 to 1"),
        (["generate.prompt=a", "generate.raster=-1"], r"^generate\.raster=-1: "),
        (["generate.prompt=a", "generate.max_new_tokens=0"], r"^generate\.max_new_tokens=0: must be at least 1"),
        (["generate.prompt=a", "generate.top_p=0.5"], r"^generate\.top_p=0\.5: goes with sampling: add generate\.temperature"),
        (["generate.prompt=a", "generate.temperature=1", "generate.top_p=0"], r"^generate\.top_p=0\.0: takes a share"),
        (["generate.prompt=a", "generate.temperature=-1"], r"^generate\.temperature=-1\.0: "),
        (["generate.prompt=a", "model.source=random", "model.path=llama"], r"^generate\.prompt=a: model=tiny has no tokenizer"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_wishes_are_one_line(arguments, message, job):
    with pytest.raises(InputError, match=message) as error:
        run_stages(configure(*job, *arguments))
    assert "\n" not in explain(error.value)


@pytest.mark.parametrize("content", [b"", b" \n\n", b"\xff\xfe\xfa"])
def test_a_file_without_a_prompt_is_refused(content, job, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(InputError, match=rf"^generate\.prompts_file={file}: holds no line"):
        run_stages(configure(*job, f"generate.prompts_file={file}"))
