"""The library: one call converts as the command does, the README's snippet runs as it stands, what cannot be is refused beforehand."""

import inspect
import subprocess
import sys
from copy import deepcopy
from dataclasses import fields

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import spikellm
from spikellm.coding.neuron import PhaseNeuron
from spikellm.config.checks import InputError
from spikellm.config.model import HardwareConfig
from spikellm.config.snn import CompensateConfig, PrefixConfig, RotationConfig, SearchConfig, SpikingConfig, TuneConfig, WeightsConfig
from spikellm.evaluation.texts import token_windows
from spikellm.kernels.compiled import fused
from spikellm.model.conversion import fill, prepare
from spikellm.run.converting import spiking as of_the_command
from spikellm.run.fitting import CALIBRATE
from spikellm.run.tuning import TUNE
from spikellm.run.workspace import Workspace
from spikellm.spikes import ledger
from spikellm.store.saved import provenance_of
from tests.codes import base2_tables
from tests.configure import configure
from tests.jobs import SMALL
from tests.models import byte_tokenizer, tiny_model
from tests.places import README

QUICK = {"T": 4, "grain": 1, "compiled": False, "method": "base2"}


def windows(count: int = 4, length: int = 32) -> torch.Tensor:
    return torch.randint(2, 256, (count, length), generator=torch.Generator().manual_seed(1))


BINARY = ["snn.coding=phase", "snn.intervals=1"]
BETWEEN_BLOCKS = {"sequential", "weight_bits"}  # what a block does depends on the blocks before it


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        pytest.param({}, [], marks=pytest.mark.slow),
        ({"intervals": 2}, ["snn.intervals=2"]),
        (
            {"intervals": 1, "softmax_norm": "before", "groups": "site", "rotation_seed": None, "spike_weight": 1.0},
            ["snn.intervals=1", "snn.softmax_norm=before", "search.groups=site", "rotation.kind=none", "search.spike_weight=1"],
        ),
        ({"coding": "few_spike", "max_spikes": 2, "prefix": False}, ["snn.coding=few_spike", "snn.max_spikes=2", "prefix.enabled=false"]),
        ({"intervals": 1, "sequential": True}, ["snn.intervals=1", "search.sequential=true"]),
        ({"intervals": 1, "weight_bits": 4, "weight_group": 16}, ["snn.intervals=1", "weights.bits=4", "weights.group_size=16"]),
        ({"intervals": 1, "compensate": True}, ["snn.intervals=1", "compensate.enabled=true"]),
        (
            {"intervals": 1, "tune_epochs": 1, "tune": "all", "compensate": True, "weight_bits": 8},
            ["snn.intervals=1", "tune.epochs=1", "tune.what=all", "compensate.enabled=true", "weights.bits=8"],
        ),
        ({"intervals": 1, "amplitude": "token", "weight_bits": 8}, ["snn.intervals=1", "snn.amplitude=token", "weights.bits=8"]),
        (
            {"method": "base2", "intervals": 1, "weight_bits": 4, "rounding": "nearest", "tune_epochs": 4},
            [*BINARY, "search.method=base2", "weights.bits=4", "weights.rounding=nearest", "tune.epochs=4"],
        ),
    ],
    ids=[
        "default",
        "intervals",
        "signed",
        "few spikes",
        "sequential",
        "gptq",
        "compensated",
        "tuned, compensated, gptq",
        "amplitude of the token",
        "nearest, tuned",
    ],
)
def test_one_call_makes_the_network_of_the_command(options, arguments, tmp_path, ids):
    """To the last bit: the same codes, and the same logits."""
    shape = [] if BETWEEN_BLOCKS & options.keys() else ["model.options.num_hidden_layers=1"]
    compiled = "tune_epochs" not in options  # which Inductor would do, in a minute
    asked = ["search.method=evolution", "snn.T=4", "grain=1", f"hardware.fused={str(compiled).lower()}", *arguments]
    work = Workspace(configure(*SMALL, *shape, *asked, f"output_root={tmp_path}"))
    text = token_windows(work.config.dataset.calibration, "dataset.calibration", None)
    found = spikellm.convert(work.models.ann(), text, T=4, grain=1, compiled=compiled, **options)
    fits = TUNE.fits(work)
    assert list(fits) == found.sites
    for name, fit in fits.items():
        for field in fields(fit):
            ours, theirs = getattr(found.fits[name], field.name), getattr(fit, field.name)
            same = torch.equal(ours.nan_to_num(), theirs.nan_to_num()) if isinstance(ours, torch.Tensor) else ours == theirs
            assert same, (name, field.name)  # base 2 has no objective
    assert found.prefix_tokens == CALIBRATE.found(work).prefix_tokens
    assert torch.equal(found.model(ids).logits, of_the_command(work)(ids).logits)
    assert found.relative_error == pytest.approx(sum(fit.relative_error for fit in fits.values()) / len(fits))
    assert found.worse_than_base2 == [name for name, fit in fits.items() if fit.worse_than_base2]


def test_its_defaults_are_those_of_the_configuration():
    defaults = {name: each.default for name, each in inspect.signature(spikellm.convert).parameters.items()}
    owners = {
        SpikingConfig: ("intervals", "amplitude", "max_spikes", "softmax_norm"), SearchConfig: ("method", "groups", "spike_weight"),
        HardwareConfig: ("query_block",),
    }  # fmt: skip
    for owner, names in owners.items():
        wanted = {each.name: getattr(each.default, "value", each.default) for each in fields(owner)}
        assert {name: defaults[name] for name in names} == {name: wanted[name] for name in names}
    default = configure()
    assert defaults["coding"] is None  # the configuration's own, which depends on the method
    assert (defaults["T"], str(defaults["grain"]), defaults["seed"]) == (default.snn.T, default.snn.grain, default.seed)
    assert (defaults["window"], defaults["max_windows"]) == (default.dataset.calibration.window, default.dataset.calibration.max_windows)
    assert defaults["prefix"] == PrefixConfig().enabled
    assert defaults["rotation_seed"] == RotationConfig().seed
    assert (defaults["weight_bits"], defaults["weight_group"], defaults["rounding"]) == (None, None, WeightsConfig().rounding.value)
    assert (defaults["tune_epochs"], defaults["tune"]) == (TuneConfig().epochs, TuneConfig().what.value)
    assert defaults["compensate"] == CompensateConfig().enabled
    assert defaults["compiled"] == HardwareConfig().fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama-biases", "mistral", "qwen2", "qwen3"])
def test_every_architecture_is_converted_in_place_counted_stepped_saved_and_loaded(name, dtype, tmp_path, ids):
    model = tiny_model(name, dtype=dtype)
    found = spikellm.convert(model, windows(), **QUICK)
    assert found.model is model
    assert sum(isinstance(module, PhaseNeuron) for module in model.modules()) == len(found.fits) == 19
    assert str(found).splitlines()[0] == f"{type(model).__name__}, spiking: T=4, 19 sites, prefix tokens {found.prefix_tokens}"
    assert len(str(found).splitlines()) == 3
    folded, spikes = spikellm.perplexity(model, ids), spikellm.count_spikes(model, ids)
    whole = ledger.count(model, ids)
    assert spikes["sops_per_token"] == whole.sops / ids.numel()
    assert 0 < spikes["firing_rate"] == whole.spikes / (whole.neurons * 4) < 1
    with spikellm.stepped(model):
        assert spikellm.perplexity(model, ids).value == pytest.approx(folded.value, rel=0.05)
    found.save(tmp_path)
    again, tokenizer = spikellm.load(tmp_path)
    assert tokenizer is None
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert provenance_of(tmp_path) == found.provenance


def test_integer_weights_are_saved_to_the_last_bit_or_not_at_all(tmp_path, ids):
    """A bfloat16 model's rounded Linears are float32, which reading the checkpoint in its own dtype would round."""
    options = QUICK | {"weight_bits": 4, "weight_group": 16}
    found = spikellm.convert(tiny_model(), windows(), **options)
    found.save(tmp_path)
    again, _ = spikellm.load(tmp_path)
    assert torch.equal(again(ids).logits, found.model(ids).logits)
    with pytest.raises(ValueError, match=r"float32 beside torch\.bfloat16"):
        spikellm.convert(tiny_model(dtype=torch.bfloat16), windows(), **options).save(tmp_path)
    with pytest.raises(InputError, match=r"^weight_group=64: does not divide intermediate_size=144"):
        spikellm.convert(tiny_model(), windows(), **QUICK, weight_bits=4, weight_group=64)


def test_a_text_is_cut_as_the_command_cuts_it():
    """The default is the language reference, as in `python main.py`; without special tokens, though the tokenizer would add one."""
    tokenizer, model = byte_tokenizer(adds_bos=True), tiny_model(vocab_size=259)
    options = QUICK | {"window": 40, "max_windows": 4, "prefix": False}
    config = configure("dataset.calibration.window=40", "dataset.calibration.max_windows=4").dataset.calibration
    cut = token_windows(config, "dataset.calibration", tokenizer)
    text = tokenizer.decode(cut.flatten())
    found = [
        spikellm.convert(deepcopy(model), tokenizer, **options),
        spikellm.convert(deepcopy(model), tokenizer, text=text + "tail", **options | {"max_windows": None}),
        spikellm.convert(deepcopy(model), cut, **QUICK | {"prefix": False}),
    ]
    for name, fit in found[0].fits.items():
        assert all(torch.equal(fit.tau, other.fits[name].tau) for other in found[1:])


def broken(**changes):
    model = tiny_model(vocab_size=259)
    for key, value in changes.items():
        model.get_parameter(key.replace("__", ".")).data.view(-1)[0] = value
    return model


def installed():
    model = tiny_model(vocab_size=259)
    prepare(model, rotation_seed=0)
    return model


def spiking():
    model = installed()
    fill(model, base2_tables(model), compiled=False)
    return model


def on_meta():
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_model("llama-biases").config)


def of_another_family():
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=8, n_head=2, n_layer=1, vocab_size=259))


REFUSED = {
    "T and grain": (broken, {"T": 4, "grain": 3}, r"snn\.T=4 with grain=3: .*snn\.T >= 6"),
    "T": (broken, {"T": 17}, r"snn\.T=17: takes 1 to 16"),
    "coding": (broken, {"coding": "morse"}, r"coding='morse': unknown; there is phase, phase_signed, rate"),
    "groups": (broken, {"groups": "layer"}, r"groups='layer': unknown; there is site, head"),
    "no bound": (broken, {"coding": "few_spike"}, r"snn\.max_spikes=null"),
    "re-fitted integers": (
        broken,
        {"compensate": True, "weight_bits": 8, "rounding": "nearest"},
        r"compensate\.enabled=true with weights\.bits=8, weights\.rounding=nearest: .*gptq",
    ),
    "little text": (broken, {"text": "short"}, r"text: 5 tokens do not fill one window of 1024; take a longer text or a smaller window"),
    "no text": (broken, {"text": ""}, r"text: 0 tokens"),
    "window": (broken, {"text": "abc", "window": 3}, r"window=3: 1 of it cannot be cut"),
    "installed": (installed, {}, r"LlamaForCausalLM: has neurons or slots.*load the pretrained model again"),
    "spiking": (spiking, {}, r"LlamaForCausalLM: has neurons or slots.*load the pretrained model again"),
    "meta": (on_meta, {}, r"weights are on the meta device \(model\.embed_tokens\.weight first\)"),
    "family": (of_another_family, {}, r"architecture 'gpt2' is not supported"),
    "NaN": (lambda: broken(model__norm__weight=torch.nan), {}, r"model\.norm\.weight has 1 values of 64 that are NaN"),
}
WINDOWS = {
    "a row": (torch.zeros(8, dtype=torch.long), r"windows of shape \(8,\).*ids\[None\]"),
    "none": (torch.zeros(0, 8, dtype=torch.long), r"windows of shape \(0, 8\)"),
    "embeddings": (torch.zeros(2, 8), r"torch\.float32: must be token ids"),
    "beyond the vocabulary": (torch.full((4, 8), 300), r"token 300 is not in .*vocab_size=259"),
    "negative": (torch.full((4, 8), -1), r"token -1 is not in"),
    "short": (torch.zeros(1, 3, dtype=torch.long), r"window=3: 1 of it cannot be cut"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_told_before_the_model_is_touched(case):
    make, options, message = REFUSED[case]
    model = make()
    before, modules = {name: weight.clone() for name, weight in model.state_dict().items()}, str(model)
    with pytest.raises(ValueError, match=message) as caught:
        spikellm.convert(model, byte_tokenizer(), **QUICK | options)
    assert len(str(caught.value).splitlines()) == 1
    assert str(model) == modules
    for name, weight in model.state_dict().items():
        assert weight.is_meta or torch.equal(weight, before[name]) or case == "NaN"


@pytest.mark.parametrize("case", WINDOWS)
def test_windows_that_are_none_are_told_too(case):
    given, message = WINDOWS[case]
    model = broken()
    modules = str(model)
    with pytest.raises(ValueError, match=message):
        spikellm.convert(model, given, **QUICK)
    with pytest.raises(ValueError, match="text goes with a tokenizer"):
        spikellm.convert(model, windows(), text="abc", **QUICK)
    assert str(model) == modules


def test_a_model_that_overflows_on_the_way_is_to_be_loaded_again():
    model = tiny_model()
    model.get_input_embeddings().weight[:] = 3e38  # finite; its square is not
    with pytest.raises(ValueError, match=r"infinite.*the model is rotated by now and has no neurons: load it again"):
        spikellm.convert(model, windows(), **QUICK)
    with pytest.raises(ValueError, match="load the pretrained model again"):
        spikellm.convert(model, windows(), **QUICK)


def test_what_is_no_saved_spiking_model_is_not_loaded(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        spikellm.load(tmp_path / "nowhere")
    tiny_model().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"holds a llama model without neurons; spikellm\.convert"):
        spikellm.load(tmp_path / "plain")
    (tmp_path / "plain" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/plain: "):
        spikellm.load(tmp_path / "plain")


@pytest.fixture
def unfused(monkeypatch):
    """Compilation takes minutes where annotations are checked (conftest.py)."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    fused.cache_clear()
    yield
    fused.cache_clear()


def test_the_snippet_of_the_readme_runs_as_it_stands(unfused, tmp_path, monkeypatch, capsys):
    snippet = README.partition("## From Python")[2].partition("```python\n")[2].partition("```")[0]
    tokenizer, words = byte_tokenizer(), "".join(map(chr, torch.randint(97, 123, (2100,), generator=torch.Generator().manual_seed(0))))
    tiny_model(num_hidden_layers=1, vocab_size=259, max_position_embeddings=2048).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    (tmp_path / "book.txt").write_text(words)
    monkeypatch.chdir(tmp_path)
    changed = snippet.replace('"HuggingFaceTB/SmolLM2-135M"', '"tiny"')
    assert changed != snippet
    exec(compile(changed, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("LlamaForCausalLM, spiking: T=8, 10 sites")
    folded, rates, stepped, made = lines[3], lines[4].split(), lines[5], "\n".join(lines[6:])
    assert float(folded) > 1 < float(stepped)
    assert 0 < float(rates[0]) < 1 < float(rates[1])
    assert made.startswith("Spikes are")
    assert (tmp_path / "spiking-model" / "tokenizer_config.json").is_file()


ORDERS = {
    "spikellm first": "import spikellm; from transformers import pipeline",
    "transformers first": "from transformers import AutoModelForCausalLM; import spikellm",
    "an architecture": "import spikellm; from transformers import LlamaForCausalLM",  # imports the auto classes in its middle
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    found = spikellm.convert(tiny_model(num_hidden_layers=1, vocab_size=259), windows(), **QUICK)
    found.save(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("order", ORDERS)
def test_import_spikellm_alone_teaches_transformers(order, saved):
    """In a process that imports nothing else; and the watch on imports is gone."""
    code = f"""
import sys
{ORDERS[order]}
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("spikellm")]
loaders = [getattr(module, "__loader__", None) for name, module in sys.modules.items() if name.startswith("transformers")]
assert not [loader for loader in loaders if type(loader).__module__.startswith("spikellm")]
from transformers import pipeline
made = pipeline("text-generation", {str(saved)!r})("spikes", max_new_tokens=2, do_sample=False)
assert type(made[0]["generated_text"]) is str
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=300)


def test_import_spikellm_costs_no_torch():
    code = "import spikellm, sys; assert not {'torch', 'transformers', 'hydra', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
