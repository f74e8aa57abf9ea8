"""A saved model in the folder of its run, measured again from there, and twelve ways to damage one."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import spikellm
from spikellm.config.checks import InputError
from spikellm.config.snn import RotationConfig
from spikellm.model.sites import ARCHITECTURES
from spikellm.run.command import compose_config
from spikellm.run.saved import as_given, completed
from spikellm.store.saved import check, provenance_of, seal
from tests.configure import configure
from tests.jobs import SMALL, cached, run
from tests.launch import launch, one_line
from tests.models import BOS, byte_model, byte_tokenizer, tiny_model

# Of the measuring, not of the conversion: what a job on a saved model may be told.
TEXT = ["dataset.evaluation.window=64", "dataset.evaluation.max_windows=2", "report.html=false"]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job that saves its model: root, results, folder of the run."""
    root = tmp_path_factory.mktemp("job")
    model = byte_model(root / "pretrained")
    arguments = [*SMALL, *model, "model.name=bytes", "snn.T=6", "rotation.seed=3", "save_model=true", f"output_root={root}"]
    done = launch(*arguments, f"hydra.run.dir={root}/run")
    assert done.code == 0, done.err
    assert f"model    {root}/run/model\n" in done.out
    return root, json.loads((root / "run" / "results.json").read_text())


def again(root: Path, *arguments: str) -> dict:
    """The saved model, measured with a store of its own."""
    from spikellm.run.stages import run_stages

    return run_stages(compose_config([*TEXT, f"model.path={root}/run/model", f"output_root={root}/other", *arguments])).results.to_json()


def test_the_runs_folder_holds_the_model_with_its_card(job):
    root, found = job
    folder = root / "run" / "model"
    assert found["saved_model"] == str(folder)
    names = {"README.md", "config.json", "generation_config.json", "model.safetensors", "results.json", "spikellm.json", "spiking.py"}
    assert {file.name for file in folder.iterdir()} == names | {"tokenizer.json", "tokenizer_config.json"}
    check(folder)
    (artefact,) = (root / "artifacts" / "convert").glob("*/model")
    assert (artefact / "model.safetensors").samefile(folder / "model.safetensors")  # a link: the weights lie on the disk once
    assert not (artefact / "config.json").samefile(folder / "config.json")
    assert not (artefact / "README.md").exists()
    assert json.loads((folder / "results.json").read_text()) == found
    card = (folder / "README.md").read_text()
    for wanted in (f"{found['perplexity']['snn']:.4f}", f"`{found['command']}`", found["inputs"]["model"], found["rotation"]["hash"]):
        assert wanted in card
    modes = {file.name: oct(file.stat().st_mode) for file in folder.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_the_folder_says_how_it_was_made(job):
    root, found = job
    made = provenance_of(root / "run" / "model")
    assert (made.model, made.path, made.prefix_tokens) == ("bytes", "pretrained", found["prefix_tokens"])
    assert (made.source, made.calibration) == (found["inputs"]["model"], found["inputs"]["dataset.calibration"])
    assert made.rotation.to_json() == found["rotation"]
    assert (made.options["snn.T"], made.options["rotation.seed"], made.options["search.method"]) == (6, 3, "base2")
    assert made.search.to_json() == found["search"]
    assert len(made.relative_error) == found["sites"]
    assert made.versions == found["versions"]


def test_it_is_measured_again_without_calibration_and_without_the_pretrained_model(job, monkeypatch):
    root, found = job
    monkeypatch.setattr("spikellm.evaluation.networks.load_model", None)
    measured = again(root)
    wanted = found["perplexity"]
    assert measured["perplexity"] == {key: wanted[key] for key in ("ann_prefix", "snn", "windows", "window", "tokens")}
    for section in ("spikes", "energy", "rotation", "prefix_tokens", "sites", "T", "grain", "coding", "model", "dtype"):
        assert measured[section] == found[section], section
    assert "dataset.calibration" not in measured["inputs"]
    assert set(measured["stages"]) == {"evaluate"}
    assert cached(again(root)) == {"evaluate": True}
    stepped = again(root, "snn.execution=stepped", "spikes.enabled=false")
    assert stepped["perplexity"]["snn"] == pytest.approx(wanted["snn"], rel=1e-3)
    assert stepped["anytime"]["perplexity"][-1] == stepped["perplexity"]["snn"]
    damage = again(root, "stages=[diagnose]", "diagnostics.windows=2")["diagnostics"]
    assert damage["perplexity_by_kind"]["none"] == pytest.approx(wanted["ann_prefix"], rel=1e-6)


def test_the_command_speaks_of_the_folder_alone_and_refreshes_the_card(job):
    root, found = job
    given = [*TEXT, f"model.path={root}/run/model", f"output_root={root}/second", "save_model=true", "spikes.enabled=false"]
    done = launch(*given, f"hydra.run.dir={root}/second/run")
    assert done.code == 0, done.err
    results = json.loads((root / "second" / "run" / "results.json").read_text())
    assert results["command"] == " ".join(["python main.py", *given])
    model = root / "second" / "run" / "model"
    assert (model / "model.safetensors").samefile(root / "run" / "model" / "model.safetensors")
    assert results["command"] in (model / "README.md").read_text()
    assert "spikes" not in json.loads((model / "results.json").read_text())
    assert found["command"] in (root / "run" / "model" / "README.md").read_text()  # which is another run's
    (runs,) = [override for override in (root / "second" / "run" / ".hydra" / "overrides.yaml").read_text().split() if "snn.T" in override]
    assert runs == "snn.T=6"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("snn.T=8", "is a spiking model of snn.T=6"),
        ("timesteps=8", "is a spiking model of snn.T=6"),
        ("snn.T=4,6", "is a spiking model of snn.T=6"),
        ("grain=3", "is a spiking model of snn.grain=2"),
        ("snn.coding=phase_signed", "is a spiking model of snn.coding=phase"),
        ("rotation.seed=0", "is a spiking model of rotation.seed=3"),
        ("rotation.parts=[R1]", "is a spiking model of rotation.parts=[R1,R2,R3,R4]"),
        ("weights.bits=8", "is a spiking model of weights.bits=null"),
        ("experiment=t_by_grain", "says how a model is converted"),
        ("evaluation.networks=[ann,snn]", "is a saved model and holds ann_prefix, snn; ann takes the run that converts"),
        ("stages=[search,evaluate]", "is converted already, there is nothing to search; take [evaluate]; [diagnose]"),
        ("model.source=hub", "holds a spiking model already; leave model.source out to measure it"),
    ],
)
def test_what_contradicts_the_folder_is_refused_in_one_line(argument, message, job):
    root, _ = job
    with pytest.raises(InputError) as caught:
        again(root, argument)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_what_agrees_with_the_folder_may_be_said(job):
    root, _ = job
    for arguments in (["snn.T=6", "grain='2'"], ["timesteps='6'", "rotation.parts=[R1,R2,R3,R4]"], ["model.source=spiking"]):
        given = [f"model.path={root}/run/model", *arguments]
        whole = completed(given)
        assert whole[: len(given)] == given
        assert set(as_given(whole)) <= set(given)
        assert completed(whole) == whole
    with pytest.raises(InputError, match="which has its own T and grain; give it alone"):
        completed([f"model.path={root}/run/model,{root}/pretrained"])
    others = ["model.path=/nowhere", "-m", "snn.T=4,6"]
    assert completed(others) == as_given(others) == others
    config = configure(f"model.path={root}/run/model")
    wrong = replace(config, rotation=RotationConfig(seed=5))  # as a file of overrides would have it
    from spikellm.run.stages import run_stages

    with pytest.raises(InputError, match=r"rotation\.seed=5: .* is a spiking model of rotation\.seed=3"):
        run_stages(wrong)


def test_a_folder_of_somebody_else_is_never_replaced(tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "thesis.txt").write_text("years of work")
    line = one_line(launch(*SMALL, "save_model=true", f"output_root={tmp_path}", f"hydra.run.dir={tmp_path}/run"))
    assert "model is there and is no saved model; hydra.run.dir=FOLDER" in line
    assert (tmp_path / "run" / "model" / "thesis.txt").read_text() == "years of work"


def test_a_model_of_bfloat16_and_one_of_python_are_measured_too(whole, tmp_path):
    found = run(tmp_path, "save_model=true", "model.options.num_hidden_layers=1", "spikes.enabled=false", "model.dtype=bfloat16")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(found["saved_model"])
    measured = again(tmp_path, "spikes.enabled=false")
    assert measured["dtype"] == "bfloat16"
    assert {key: measured["perplexity"][key] for key in ("ann_prefix", "snn")} == {
        key: found["perplexity"][key] for key in ("ann_prefix", "snn")
    }
    (tmp_path / "run" / "model").unlink()
    (tmp_path / "run" / "model").symlink_to(whole)
    measured = again(tmp_path, "spikes.enabled=false")
    assert (measured["T"], measured["grain"], measured["coding"]) == (4, 1, "phase")
    assert measured["perplexity"]["snn"] > 1


@pytest.mark.parametrize(
    "weights", [["weights.bits=8"], ["tune.epochs=1", "tune.what=all", "snn.coding=phase_signed", "hardware.fused=false"]]
)
def test_weights_of_its_own_have_no_pretrained_network_below_them(weights, tmp_path):
    found = run(tmp_path, "save_model=true", "snn.T=6", "model.options.num_hidden_layers=1", "spikes.enabled=false", *weights)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(found["saved_model"])
    measured = again(tmp_path)
    assert set(measured["perplexity"]) == {"snn", "windows", "window", "tokens"}
    assert measured["perplexity"]["snn"] == found["perplexity"]["snn"]
    assert {key: measured.get(key) for key in ("weights", "tune")} == {key: found.get(key) for key in ("weights", "tune")}


@pytest.mark.slow
@pytest.mark.parametrize("path", ARCHITECTURES)
def test_every_architecture_is_saved_and_measured_again(path, tmp_path):
    found = run(tmp_path, "save_model=true", f"model.path={path}", "snn.T=8", "spikes.enabled=false")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(found["saved_model"])
    assert again(tmp_path, "spikes.enabled=false")["perplexity"]["snn"] == found["perplexity"]["snn"]


# ---- damage ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A saved model in several shards, with its tokenizer."""
    folder = tmp_path_factory.mktemp("whole")
    found = spikellm.convert(
        tiny_model(num_hidden_layers=1, vocab_size=259, bos_token_id=BOS),
        byte_tokenizer(adds_bos=True),
        T=4,
        grain=1,
        method="base2",
        text="spikes " * 100,
        window=64,
        compiled=False,
    )
    found.save(folder / "one")
    model, tokenizer = spikellm.load(folder / "one")
    model.save_pretrained(folder / "shards", max_shard_size="100KB")
    seal(folder / "shards", [Path(file).name for file in tokenizer.save_pretrained(folder / "shards") if Path(file).is_file()])
    return folder / "shards"


THETA = "model.layers.0.mlp.down_proj.neuron.theta"


def shard_of(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][tensor]


def write_into(folder: Path, tensor: str, change) -> None:
    """Change the bytes of a tensor where they lie in their file."""
    file = shard_of(folder, tensor)
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    start, end = (8 + length + offset for offset in json.loads(content[8 : 8 + length])[tensor]["data_offsets"])
    content[start:end] = change(content[start:end])
    file.write_bytes(content)


def retensored(folder: Path, change) -> None:
    file = shard_of(folder, THETA)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def described(folder: Path, change, name: str = "config.json") -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def truncate(folder):
    file = shard_of(folder, THETA)
    file.write_bytes(file.read_bytes()[:-100])


def swap_shards(folder):
    one, other, *_ = sorted(folder.glob("*.safetensors"))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def set_nan(content):
    values = torch.frombuffer(content, dtype=torch.float32).clone()
    values[0] = torch.nan
    return values.numpy().tobytes()


def unreadable(folder):
    file = shard_of(folder, THETA)
    file.unlink()
    file.mkdir()


def quantization(change):
    return lambda folder: described(folder, lambda content: change(content["quantization_config"]))


def newer(folder):
    described(folder, lambda content: content.update(schema=99), "spikellm.json")
    quantization(lambda node: node.update(schema=99))(folder)


# name -> what is done, the file that the message names, and whether the model itself shows it where sums are not compared
DAMAGE = {
    "truncated shard": (truncate, ".safetensors", True),
    "swapped shards": (swap_shards, ".safetensors", False),  # a tensor is found by its name, wherever it lies
    "flipped table byte": (
        lambda folder: write_into(folder, THETA, lambda content: bytes([content[0] ^ 1]) + content[1:]),
        ".safetensors",
        True,
    ),
    "NaN": (lambda folder: write_into(folder, THETA, set_nan), ".safetensors", True),
    "missing tensor": (lambda folder: retensored(folder, lambda tensors: tensors.pop(THETA)), ".safetensors", True),
    "extra tensor": (
        lambda folder: retensored(folder, lambda tensors: tensors.update({THETA.replace(".0.", ".7."): torch.ones(1, 4)})),
        ".safetensors",
        True,
    ),
    "wrong T": (quantization(lambda node: node["sites"]["layers.0.mlp_product"].update(T=5)), "config.json", True),
    "wrong hash": (quantization(lambda node: node["provenance"]["rotation"].update(hash="0" * 16)), "config.json", True),
    "edited config": (lambda folder: described(folder, lambda content: content.update(rms_norm_eps=1e-2)), "config.json", False),
    "newer schema": (newer, ".json", True),
    "missing tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json", False),
    "unreadable file": (unreadable, ".safetensors", True),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_is_one_line_and_no_wrong_model(case, whole, tmp_path):
    damage, file, shows = DAMAGE[case]
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    damage(folder)
    messages = []
    for load in (spikellm.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=rf"^{folder}, [\w.-]*{file}[:,]") as caught:
            load(folder)
        messages.append(str(caught.value))
    messages.append(one_line(launch(*TEXT, f"model.path={folder}", f"output_root={tmp_path}/out")))
    assert not list((tmp_path / "out").glob("artifacts/evaluate/*"))
    cure = "update spikellm" if case == "newer schema" else "copy or convert it again"
    for message in messages:
        assert len(message.splitlines()) == 1
        assert f"{file}" in message
        assert message.endswith(cure)
    if shows:  # also for who does not compare sums, or whose sums were made after the damage
        if case != "unreadable file":
            seal(folder, ["tokenizer.json", "tokenizer_config.json"])
        with pytest.raises(ValueError, match=str(folder)):
            spikellm.load(folder, verify=False)


def test_swapped_shards_would_be_the_same_model(whole, tmp_path, ids):
    shutil.copytree(whole, tmp_path / "model")
    swap_shards(tmp_path / "model")
    seal(tmp_path / "model")
    (swapped, _), (wanted, _) = spikellm.load(tmp_path / "model"), spikellm.load(whole)
    assert torch.equal(swapped(ids).logits, wanted(ids).logits)
