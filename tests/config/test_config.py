"""Composition: every option of every group, the user's spellings, the checks of values."""

import shlex
from pathlib import Path

import pytest
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from spikellm.config.checks import InputError
from spikellm.config.choices import Coding, Device, ModelSource
from spikellm.config.help import describe
from spikellm.config.schema import Config
from spikellm.config.snn import MAX_T, SIGNED_SPIKE_WEIGHT
from spikellm.run.command import command_line, quote_values
from tests.configure import configure
from tests.places import CONF

GROUPS = ("model", "timesteps", "grain", "dataset", "texts", "hardware", "tracking", "experiment")
OPTIONS = sorted((group, path.stem) for group in GROUPS for path in (CONF / group).glob("*.yaml"))
# what the contract with the user names
PROMISED = {
    "model": {
        "smollm2_135m", "llama2_7b", "llama2_13b", "llama3_8b", "llama3_2_1b", "llama3_2_3b", "tinyllama_1b", "qwen2_5_0_5b",
        "qwen3_0_6b", "mistral_7b", "tiny",
    },
    "grain": {"1", "2", "3", "auto"},
    "timesteps": {"4", "6", "8"},
    "texts": {"wikitext2", "c4", "pile", "redpajama", "local"},
    "dataset": {"pydocs", "wikitext2", "c4", "pile", "redpajama", "text"},
    "hardware": {"cpu", "gpu", "multi_gpu"},
    "tracking": {"none", "wandb"},
}  # fmt: skip


def test_defaults_are_the_contract():
    config = configure()
    assert (config.model.name, config.dataset.name, config.snn.T, config.snn.grain) == ("smollm2_135m", "pydocs", 8, "2")
    assert config.hardware.device is Device.cpu
    assert config.stages == ["calibrate", "search", "convert", "evaluate"]
    assert Path(config.output_root) == CONF.parent / "outputs"


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes(group, option):
    value = f"[{option}]" if group == "texts" else option
    config = configure(f"{group}={value}", *(["snn.T=10"] if group == "grain" else []))
    if group in ("model", "dataset"):
        assert getattr(config, group).name == option
    elif group == "texts":
        assert list(config.dataset.extra) == [option]
    elif group == "grain":
        assert config.snn.grain == option
    elif group == "timesteps":
        assert int(option) == config.snn.T


@pytest.mark.parametrize("group", list(PROMISED))
def test_promised_options_are_there(group):
    assert PROMISED[group] <= {option for name, option in OPTIONS if name == group}


def test_spellings_of_the_user():
    config = configure("model=llama3_8b", "snn.T=8", "grain=3")
    assert (config.model.name, config.model.source, config.snn.T, config.snn.grain) == ("llama3_8b", ModelSource.hub, 8, "3")
    assert configure("stages=[calibrate,search]").stages == ["calibrate", "search"]
    assert configure("timesteps=6", "grain=auto").snn.grain == "auto"
    text = configure(
        "dataset=text", "dataset.calibration.path=A.txt", "dataset.evaluation.path=B.txt", "dataset.evaluation.window=2048",
        "dataset.evaluation.max_windows=8",
    ).dataset  # fmt: skip
    assert (text.calibration.path, text.evaluation.path, text.evaluation.window, text.evaluation.max_windows) == ("A.txt", "B.txt", 2048, 8)
    assert not configure("prefix.enabled=false").prefix.enabled
    assert configure("model=llama2_7b", "model.path=/some/folder").model.path == "/some/folder"


@pytest.mark.parametrize(
    ("overrides", "coding"),
    [
        ([], "phase_signed"),
        (["search.method=gradient"], "phase"),
        (["search.method=base2"], "phase"),
        (["search.import_file=neurons.pth"], "phase"),
        (["search.method=base2", "snn.coding=phase_signed"], "phase_signed"),
        (["snn.coding=rate"], "rate"),
    ],
)
def test_codes_of_the_authors_have_their_digits(overrides, coding):
    assert configure(*overrides).snn.coding is Coding(coding)


def test_the_weight_of_spikes_without_a_value_is_that_of_the_coding():
    assert [configure(f"snn.coding={name}").search.weight_of_spikes(Coding(name)) for name in ("phase", "phase_signed")] == [0.0, 1.5]
    assert configure("search.spike_weight=0").search.weight_of_spikes(Coding.phase_signed) == 0.0
    (meaning,) = (meaning for name, _, _, meaning in describe(Config) if name == "search.spike_weight")
    assert meaning.endswith(f"phase_signed {SIGNED_SPIKE_WEIGHT}")


def test_several_texts_in_one_run():
    extra = configure(
        "texts=[c4,redpajama]", "dataset.extra.c4.window=512", "+dataset.extra={dev: {source: text, path: F, max_windows: 2}}"
    ).dataset.extra  # fmt: skip
    assert {name: (text.path, text.window, text.skip_rows, text.max_windows) for name, text in extra.items()} == {
        "c4": ("allenai/c4", 512, 0, 128),
        "redpajama": ("togethercomputer/RedPajama-Data-1T-Sample", 2048, 2000, 128),
        "dev": ("F", 2048, 0, 2),
    }
    c4, main = configure("texts=[c4]").dataset.extra["c4"], configure("dataset=c4").dataset.evaluation
    assert c4 == main


def test_a_value_wins_over_its_group():
    assert configure("timesteps=6", "snn.T=7").snn.T == 7
    assert configure("snn.T=7", "timesteps=6").snn.T == 7


@pytest.mark.parametrize(
    ("argument", "quoted"),
    [
        ("grain=3", "grain='3'"),
        ("grain=1,2,3", "grain='1','2','3'"),
        ("timesteps=10", "timesteps='10'"),
        ("timesteps=4,6,8", "timesteps='4','6','8'"),
        ("grain=1,auto", "grain='1','auto'"),
        ("grain='2'", "grain='2'"),
        ("snn.T=4,6", "snn.T=4,6"),
        ("model.options.grain=3", "model.options.grain=3"),
        ("+grain=3", "+grain=3"),
        ("-m", "-m"),
        ("model=tiny", "model=tiny"),
    ],
)
def test_bare_integers_of_numeric_groups_are_quoted(argument, quoted):
    assert quote_values([argument]) == [quoted]


TYPED = [
    "/d/ü.txt", "a=b", "/d/(a)/b", "it's", 'say "a"', "#", "C:\\ü\\'x'", "ü\\", "http://x/y?z=1&q=2", "日本 語", "a{b", "!x", "50%;", "`a`",
]  # fmt: skip


@pytest.mark.parametrize("value", TYPED)
def test_values_mean_what_was_typed_and_the_command_repeats_them(value):
    arguments = ["dataset=text", f"dataset.evaluation.path={value}", f"dataset.calibration.path={value}"]
    assert configure(*arguments).dataset.evaluation.path == value
    understood = quote_values(arguments)
    repeated = shlex.split(command_line("python main.py", understood))[2:]
    assert quote_values(repeated) == understood == quote_values(understood)


def test_the_command_shows_values_as_they_were_typed():
    typed = ["grain=1,2", "dataset.evaluation.path=/d/it's (ü)=1.txt", "timesteps=8", "dataset.evaluation.path='/d/quoted'"]
    assert shlex.split(command_line("python main.py", quote_values(typed))) == ["python", "main.py", *typed]


def test_a_leading_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    assert configure("dataset=text", "dataset.evaluation.path=~/ü/x").dataset.evaluation.path == "/h/ü/x"
    assert configure("output_root=~/x").output_root == "/h/x"


@pytest.mark.parametrize("argument", ["seed=[1", "seed=f(x)", "dataset.evaluation.path=ü,b", "seed={a"])
def test_what_may_be_grammar_is_answered_with_the_quoting_that_works(argument):
    with pytest.raises(InputError) as caught:
        quote_values([argument])
    key, _, value = argument.partition("=")
    (quoted,) = shlex.split(str(caught.value).rpartition(": ")[2])
    assert quote_values([quoted]) == [quoted] == [f'{key}="{value}"']


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("+foo=1", "^foo=1: no such key; there is model"),
        ("+model.foo=1", r"^model\.foo=1: no such key; there is name"),
        ("++snn.steps=4", r"^snn\.steps=4: no such key"),
        ("+tracking.key=1", r"^tracking\.key=1: no such key"),
        ("grain=null", "^grain=null: .*1, 2, 3, auto"),
        ("grain=[1,2]", "^grain=.*1, 2, 3, auto"),
        ("model=null", "^model=null: .*smollm2_135m"),
        ("dataset=5", "^dataset=5: .*pydocs"),
        ("=8", "^=8: .*KEY=VALUE"),
        ("seed=" + "9" * 5000, "^seed=999"),
        ("seed=99999999999999999999", "^seed=9"),
        ("model.seed=-99999999999999999999", r"^model\.seed=-9"),
        ("hardware.threads=2147483648", r"^hardware\.threads=2147483648"),
        ("hardware.threads=-1", r"^hardware\.threads=-1"),
        ("dataset.evaluation.window=100000000000", r"^dataset\.evaluation\.window=1"),
        ("dataset.evaluation.skip_rows=-1", r"skip_rows=-1"),
        ("search.gradient_samples=99999999999", r"^search\.gradient_samples"),
        ("search.tolerance=nan", r"^search\.tolerance=nan"),
        ("search.tolerance=inf", r"^search\.tolerance=inf"),
        ("search.gradient_rate=inf", r"^search\.gradient_rate=inf"),
        ("search.spike_weight=nan", r"^search\.spike_weight=nan"),
        ("prefix.eta=inf", r"^prefix\.eta=inf"),
        ("prefix.eta=nan", r"^prefix\.eta=nan"),
        ("snn.max_memory_gib=inf", r"^snn\.max_memory_gib=inf"),
        ("energy.mac_pj=inf", r"^energy\.mac_pj=inf"),
        ("+model.options.rope_theta=nan", r"^model\.options\.rope_theta=nan"),
    ],
)
def test_unknown_keys_and_impossible_numbers_are_refused_by_key(argument, named):
    with pytest.raises(InputError, match=named):
        configure(argument)


@pytest.mark.parametrize("argument", ["grain=range(1,3)", "timesteps=choice(4,6)", "grain=choice(1,2)", "timesteps=range(4,9)"])
def test_sweep_functions_of_numeric_groups_are_refused_with_the_cure(argument):
    with pytest.raises(InputError, match=r"1,2,3") as caught:
        quote_values([argument])
    assert argument in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        (["snn.T=0"], "snn.T", "0"),
        ([f"snn.T={MAX_T + 1}"], "snn.T", str(MAX_T + 1)),
        (["snn.T=3", "grain=2"], "snn.T", "3 with grain=2"),
        (["snn.T=5", "grain=3"], "snn.T", "5 with grain=3"),
        (["snn.T=5", "grain=2", "snn.min_grain_length=3"], "snn.T", "5 with grain=2"),
        (["snn.min_grain_length=0"], "snn.min_grain_length", "0"),
        (["snn.step_chunk=0"], "snn.step_chunk", "0"),
        (["snn.max_memory_gib=0"], "snn.max_memory_gib", "0"),
        (["snn.grain=many"], "grain", "many"),
        (["snn.grain='0'"], "grain", "0"),
        (["prefix.eta=1"], "prefix.eta", "1"),
        (["prefix.max_tokens=0"], "prefix.max_tokens", "0"),
        (["dataset.evaluation.window=1"], "window", "1"),
        (["dataset.calibration.max_windows=0"], "max_windows", "0"),
        (["hardware.query_block=0"], "hardware.query_block", "0"),
        (["hardware.threads=0"], "hardware.threads", "0"),
        (["stages=[calibrate,fly]"], "stages", "fly"),
        (["stages=[]"], "stages", r"\[\]"),
    ],
)
def test_values_out_of_range_name_their_key_and_value(arguments, key, value):
    with pytest.raises(InputError, match=rf"{key}.*{value}"):
        configure(*arguments)


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("snn.T=eight", "eight"),
        ("model=llama9", "llama9"),
        ("nothing.here=1", "nothing"),
        ("model.dtype=int8", "int8"),
        ("hardware.fused=perhaps", "perhaps"),
    ],
)
def test_unknown_names_and_wrong_types_are_refused_by_name(argument, named):
    with pytest.raises((HydraException, OmegaConfBaseException), match=named):
        configure(argument)


def test_the_limits_themselves_are_allowed():
    assert configure(f"snn.T={MAX_T}", "grain=3").snn.T == MAX_T
    assert configure("snn.T=4", "grain=2").snn.T == 4
    assert configure("snn.T=1", "grain=1", "snn.min_grain_length=1").snn.T == 1
