"""The list of a saved model's files: what was changed, lost or added is named, and nothing else is."""

import hashlib
import json
import os
import subprocess

import pytest

from spikellm.config.checks import InputError
from spikellm.config.schema import Config
from spikellm.config.snn import WeightsConfig
from spikellm.store.saved import CONVERTING, SCHEMA, check, conversion_options, is_saved, provenance_of, seal
from tests.configure import configure

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "spikellm", "schema": SCHEMA}}))
    for number, name in enumerate((*SHARDS, "model.safetensors.index.json", "tokenizer.json", "README.md")):
        (tmp_path / name).write_bytes(bytes([number]) * 100)
    seal(tmp_path, ["tokenizer.json"])
    check(tmp_path)
    return tmp_path


def flip(path):
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    path.write_bytes(content)


def refused(folder, **options) -> str:
    with pytest.raises(InputError) as caught:
        check(folder, **options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value).removeprefix(f"{folder}, ")


def test_the_sums_are_those_of_sha256sum(folder):
    files = json.loads((folder / "spikellm.json").read_text())["files"]
    assert set(files) == {"config.json", *SHARDS, "model.safetensors.index.json", "tokenizer.json"}
    for name, entry in files.items():
        content = (folder / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    lines = "".join(f"{entry['sha256']}  {name}\n" for name, entry in files.items())
    subprocess.run(["sha256sum", "--check", "--strict"], input=lines, text=True, cwd=folder, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("name", ["config.json", *SHARDS, "model.safetensors.index.json", "tokenizer.json"])
def test_a_bit_a_byte_and_a_file_are_missed(name, folder):
    whole = (folder / name).read_bytes()
    flip(folder / name)
    assert refused(folder) == f"{name}: does not match its checksum, the file was changed; copy or convert it again"
    check(folder, verify=False)  # sizes alone
    (folder / name).write_bytes(whole[:-1])
    for verify in (True, False):
        assert refused(folder, verify=verify).startswith(f"{name}: has {len(whole) - 1} bytes, {len(whole)} were saved; copy")
    (folder / name).unlink()
    assert refused(folder) == f"{name}: is missing; copy or convert it again"
    check(folder, whole=False)
    os.mkfifo(folder / name)  # would be read for ever
    assert refused(folder) == f"{name}: is no file; copy or convert it again"


def test_what_people_write_beside_a_model_is_theirs(folder):
    flip(folder / "README.md")
    for name in ("generation_config.json", "notes.txt", "adapter_model.safetensors"):
        (folder / name).write_text("mine")
    check(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "model-00003-of-00003.safetensors", "pytorch_model.bin"])
def test_weights_that_nobody_saved_are_not_read(name, folder):
    (folder / name).write_bytes(b"other")
    assert refused(folder) == f"{name}: was not saved with the model and would be read in its place; take it away"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"schema": SCHEMA + 1, "files": {}}, f"schema={SCHEMA + 1}, this version reads {SCHEMA}; update spikellm"),
        ({"schema": SCHEMA - 1, "files": {}}, f"schema={SCHEMA - 1}, this version reads {SCHEMA}; convert again"),
        ({"schema": SCHEMA}, "is damaged; copy or convert it again"),
        ({"schema": SCHEMA, "files": {"config.json": "ab"}}, "is damaged; copy or convert it again"),
        ([], f"schema=None, this version reads {SCHEMA}; convert again"),
    ],
)
def test_a_list_of_another_kind_is_refused(content, message, folder):
    (folder / "spikellm.json").write_text(json.dumps(content))
    assert refused(folder) == f"spikellm.json: {message}"


def test_a_folder_without_a_list_is_told_by_its_config(folder):
    (folder / "spikellm.json").unlink()
    assert is_saved(folder)
    assert refused(folder) == "spikellm.json: is missing; copy or convert it again"
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "spikellm", "schema": SCHEMA - 1}}))
    assert refused(folder) == f"config.json: schema={SCHEMA - 1}, this version reads {SCHEMA}; convert again"
    for content in ("{", "[]", "{}", json.dumps({"quantization_config": {"quant_method": "gptq"}})):
        (folder / "config.json").write_text(content)
        assert not is_saved(folder)
        with pytest.raises(InputError, match=rf"^{folder}, config\.json: "):
            provenance_of(folder)


def test_shards_are_asked_for_once(folder):
    asked = []
    check(folder, digest=lambda path: asked.append(path.name) or hashlib.sha256(path.read_bytes()).hexdigest())
    assert sorted(asked) == sorted(["config.json", *SHARDS, "model.safetensors.index.json", "tokenizer.json"])


def test_every_node_of_the_configuration_decides_the_network_or_does_not():
    """A new node must be put on one side."""
    measuring = {
        "model",
        "dataset",
        "hardware",
        "tracking",
        "evaluation",
        "diagnostics",
        "spikes",
        "energy",
        "generate",
        "report",
        "reference",
    }
    plain = {"stages", "seed", "output_root", "objective", "save_model", "plan"}
    assert set(Config.__dataclass_fields__) == set(CONVERTING) | measuring | plain


def test_options_of_a_conversion_are_in_json_types_and_know_no_execution():
    config = configure("snn.T=6", "grain=auto", "rotation.parts=[R1,R4]", "seed=3", "snn.execution=stepped")
    found = conversion_options({name: getattr(config, name) for name in CONVERTING}, config.seed)
    assert found == json.loads(json.dumps(found))
    wanted = {
        "snn.T": 6,
        "snn.grain": "auto",
        "snn.coding": "phase_signed",
        "rotation.parts": ["R1", "R4"],
        "weights.bits": None,
        "seed": 3,
    }
    assert found == found | wanted | {"seed": 3}
    assert not {"snn.execution", "snn.step_chunk", "snn.max_memory_gib"} & set(found)
    nodes = {name: getattr(config, name) for name in CONVERTING} | {"weights": WeightsConfig(bits=8)}
    assert conversion_options(nodes, 0)["weights.bits"] == 8
