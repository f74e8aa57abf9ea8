"""README's "Use the model" runs as it stands, and lm-eval's own command gives the figures of our stage."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs import SMALL
from tests.launch import launch
from tests.models import byte_model
from tests.places import README

SECTION = README.partition("## Use the model\n")[2].partition("\n## ")[0]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", SECTION, re.M | re.S)
COMMANDS = [line for language, block in BLOCKS if not language for line in block.splitlines()]
(SNIPPET,) = (block for language, block in BLOCKS if language == "python")
TEXT = ["dataset.evaluation.window=64", "dataset.evaluation.max_windows=2", "report.html=false"]
CHOICES = {"text": ["one", "two", "three"], "label": ["A", "B", "C"]}
ROWS = [{"question": f"Which is number {number}?", "choices": CHOICES, "answerKey": "ABC"[number % 3]} for number in range(7)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where the first command was given, of a small model; the rest follows it."""
    folder = tmp_path_factory.mktemp("place")
    small = [*SMALL, *byte_model(folder / "tiny"), f"output_root={folder}/outputs"]
    done = launch(*shlex.split(COMMANDS[0])[2:], *small, before=os.chdir, values=(folder,))
    assert done.code == 0, done.err
    return folder


def test_the_snippet_runs_in_a_process_that_imports_spikellm_alone(place):
    command = [sys.executable, "-W", "ignore", "-c", SNIPPET]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    made = done.stdout.splitlines()
    assert "The capital of France is" in made[0]
    assert any(line.startswith("Spikes are") for line in made)
    assert float(made[-2]) > 1
    assert float(made[-1]) > 1


@pytest.mark.parametrize("command", COMMANDS[1:3])
def test_the_commands_measure_it_again(command, place, tmp_path):
    program, script, *arguments = shlex.split(command)
    assert (program, script) == ("python", "main.py")
    text = [each for each in TEXT if each.partition("=")[0] not in command]
    done = launch(*arguments, *text, f"output_root={tmp_path}", before=os.chdir, values=(place,))
    assert done.code == 0, done.err
    (results,) = tmp_path.glob("runs/*/*/results.json")
    wanted = json.loads((place / "outputs" / "spiking" / "results.json").read_text())
    found = json.loads(results.read_text())
    assert [found[key] for key in ("model", "T", "grain", "coding")] == [wanted[key] for key in ("model", "T", "grain", "coding")]
    assert results.parent.name.endswith(f"-{wanted['model']}-T8-G2")
    assert "perplexity" in found or "diagnostics" in found


def lm_eval(command: str, folder: Path, rows: Path) -> dict:
    """lm-eval's command as it stands, its task read from local rows: the results of the task."""
    task = {
        "include": str(Path(sys.modules["lm_eval"].__file__).parent / "tasks" / "arc" / "arc_easy.yaml"),
        "task": "arc_easy", "dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "training_split": None, "validation_split": None, "test_split": "test", "fewshot_split": None,
    }  # fmt: skip
    (folder / "tasks").mkdir()
    (folder / "tasks" / "arc_easy.yaml").write_text(json.dumps(task))
    program, *arguments = shlex.split(command)
    local = ["--include_path", str(folder / "tasks"), "--output_path", str(folder / "lm_eval"), "--device", "cpu"]
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "datasets"), "HF_MODULES_CACHE": str(folder / "modules")}
    run = [str(Path(sys.executable).parent / program), *arguments, *local]
    done = subprocess.run(run, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = (folder / "lm_eval").rglob("results_*.json")
    return json.loads(found.read_text())["results"]["arc_easy"]


@pytest.mark.slow
def test_lm_evals_own_command_gives_the_figures_of_our_stage(place, tmp_path):
    pytest.importorskip("lm_eval")
    rows = tmp_path / "arc_easy.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    ours = [f"dataset.zero_shot.{option}" for option in ("tasks=[arc_easy]", f"path={tmp_path}", "limit=100")]
    model = f"model.path={place}/outputs/spiking/model"
    done = launch(model, *TEXT, *ours, "spikes.enabled=false", f"output_root={tmp_path}", f"hydra.run.dir={tmp_path}/run")
    assert done.code == 0, done.err
    wanted = json.loads((tmp_path / "run" / "results.json").read_text())["zero_shot"]["snn"]["arc_easy"]
    (tmp_path / "outputs").symlink_to(place / "outputs")
    found = lm_eval(COMMANDS[3], tmp_path, rows)
    assert {name: found[f"{name},none"] for name in ("acc", "acc_norm")} == {name: wanted[name] for name in ("acc", "acc_norm")}


FRESH = """
import time
start = time.perf_counter()
import spikellm
imported = time.perf_counter() - start
import torch
from transformers import AutoModelForCausalLM
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained("model")
loaded = time.perf_counter() - start
ids, wanted = torch.load("logits.pt")
print(imported, loaded, torch.equal(model(ids).logits, wanted))
"""


@pytest.mark.slow
def test_the_real_model_comes_back_bit_for_bit_in_a_fresh_process(smollm2, real_tokenizer, tmp_path):
    import torch

    import spikellm
    from spikellm.config.choices import Device
    from spikellm.config.model import HardwareConfig
    from spikellm.model.load import load_model

    model = load_model(smollm2, HardwareConfig(device=Device.cpu))
    found = spikellm.convert(model, real_tokenizer, T=6, window=128, max_windows=4, method="base2", compiled=False)
    found.save(tmp_path / "model")
    ids = real_tokenizer("The capital of France is a city on the river", return_tensors="pt").input_ids
    torch.save((ids, model(ids).logits), tmp_path / "logits.pt")
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert sum(file.stat().st_size for file in (tmp_path / "model").iterdir()) <= 1.1 * weights
    command = [sys.executable, "-W", "ignore", "-c", FRESH]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=600)
    imported, loaded, equal = done.stdout.split()
    assert equal == "True"
    assert float(imported) < 0.5
    assert float(loaded) < 10
