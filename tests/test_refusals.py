"""Wrong input of every kind ends with one line that names it, before long work: in this process, where nothing has to be launched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from spikellm.config.boundary import reason
from spikellm.config.checks import InputError
from spikellm.config.choices import Device, ModelSource
from spikellm.config.model import HardwareConfig, ModelConfig
from spikellm.evaluation.perplexity import perplexity
from spikellm.evaluation.texts import read_text
from spikellm.model.load import context_warning, load_model, load_tokenizer
from spikellm.report.results import NOT_FINISHED, finished_results, summary_rows, write_failure, write_results
from spikellm.run.command import explain
from spikellm.run.stages import run_stages
from spikellm.run.sweep import RUNNING, Reporter
from spikellm.store.record import JobRecord, Results
from tests.configure import composed, configure
from tests.jobs import WITH_REPORT
from tests.launch import launch, one_line
from tests.models import TINY, tiny_model
from tests.places import MAIN
from tests.texts import text_config

CPU = HardwareConfig(device=Device.cpu)


# ---- models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option",
    [
        "hidden_size=65", "hidden_size=-64", "num_attention_heads=0", "num_hidden_layers=0", "num_key_value_heads=3",
        "vocab_size=0", "vocab_size=abc", "intermediate_size=0", "hidden_act=evil", "head_dim=7", "rms_norm_eps=x", "torch_dtype=float99",
        "num_hidden_layers=null", "layer_types=[a]",
    ],
)  # fmt: skip
def test_options_that_make_no_model_are_refused_by_key_and_value(option):
    key, _, value = option.partition("=")
    with pytest.raises(InputError, match=rf"^model\.options.*{key}.*{value.strip('[]').replace('null', 'None')}"):
        load_model(configure("model=tiny", f"++model.options.{option}").model, CPU)


def test_bytes_beyond_the_vocabulary_are_refused_before_the_search(tmp_path):
    with pytest.raises(InputError, match=r"dataset\.calibration: token .*vocab_size=10"):
        run_stages(configure(*WITH_REPORT, f"output_root={tmp_path}", "model.options.vocab_size=10"))
    assert not list(tmp_path.glob("artifacts/*/*/*"))


@pytest.mark.parametrize("path", ["../x:y", "a.b.c:d", "x", ":y", "__main__:y", "", "os.path:x"])
def test_a_package_is_a_name_and_nothing_is_imported_for_it(path):
    with pytest.raises(InputError, match=r"^model\.path="):
        load_model(ModelConfig(name="m", source=ModelSource.gguf, path=path), CPU)


def test_a_folders_code_is_not_run_and_nobody_is_asked(tmp_path, monkeypatch):
    """transformers would ask on standard input whether to run it."""
    tiny_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "evil", "architectures": ["Evil"], "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.T", None]}, "tokenizer_class": "T"}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")

    def answer(_: str = "") -> str:
        raise AssertionError("a question was asked")

    monkeypatch.setattr("builtins.input", answer)
    hub = ModelConfig(name="evil", source=ModelSource.hub, path=str(tmp_path))
    for load in (lambda: load_model(hub, CPU), lambda: load_tokenizer(hub)):
        with pytest.raises(InputError, match=rf"model\.path={tmp_path}: "):
            load()
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_not_finite_are_named(tmp_path):
    for broken in (float("nan"), float("inf")):
        model = tiny_model()
        model.lm_head.weight[3, 4] = broken
        model.save_pretrained(tmp_path)
        with pytest.raises(InputError, match=r"^model\.path=.*lm_head\.weight.*NaN or infinite"):
            load_model(ModelConfig(name="m", source=ModelSource.hub, path=str(tmp_path)), CPU)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_dtype_is_advised_that_is_there_already(dtype):
    model = tiny_model().to(dtype)
    model.lm_head.weight[:] = float("nan")
    with pytest.raises(FloatingPointError, match="the loss is nan") as caught:
        perplexity(model, torch.zeros(1, 8, dtype=torch.long), label="x")
    assert f"model.dtype={str(dtype).removeprefix('torch.')}" not in str(caught.value)


@pytest.mark.parametrize("name", list(TINY))
def test_windows_beyond_the_context_are_told_with_both_numbers(name, tmp_path):
    tiny_model(name, max_position_embeddings=100).save_pretrained(tmp_path)
    model = ["model.source=hub", f"model.path={tmp_path}"]
    assert context_warning(configure(*WITH_REPORT, *model, "dataset.calibration.window=100")) is None
    told = context_warning(
        configure(*WITH_REPORT, *model, "dataset.evaluation.window=101", "texts=[local]", "dataset.extra.local.window=300")
    )
    assert all(part in told for part in ("dataset.evaluation.window=101", "dataset.extra.local.window=300", "100 tokens"))
    assert "calibration" not in told


# ---- messages -------------------------------------------------------------------------------------------------------------


def test_the_cure_fits_the_error_of_the_system(tmp_path):
    """Another place for results is no cure where a file cannot be read."""

    def told(act) -> str:
        try:
            act()
        except OSError as error:
            return explain(error)
        raise AssertionError("nothing went wrong")

    (tmp_path / "file").touch()
    assert "output_root=" in told(lambda: (tmp_path / "file" / "deeper").mkdir())
    assert "output_root=" in explain(OSError(28, "No space left on device"))
    for text in (told((tmp_path / "absent").read_text), told(tmp_path.read_text), explain(OSError(19, "No such device"))):
        assert "output_root" not in text
    assert reason(KeyError("evil")) == "KeyError: 'evil'"
    assert len(reason(ValueError("long " * 1000))) < 300


def test_a_reader_that_goes_away_is_no_error():
    """As in `python main.py --help | head -1`."""
    for unbuffered in ("", "1"):
        with subprocess.Popen(
            [sys.executable, MAIN, "--help"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        ) as process:
            process.stdout.close()
            assert process.stderr.read() == b""
            assert process.wait() in (0, 141)


# ---- folders of runs and sweeps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../../esc", "/esc", "a/b", "..", ".hidden", "a\\b", "''", "x" * 101, '"a\tb"'])
def test_a_name_stays_in_the_folder_of_runs(name, tmp_path):
    root = tmp_path / "a" / "b"
    config = composed("model=tiny", f"model.name={name}", f"output_root={root}")
    assert Path(config.hydra.run.dir).resolve().parents[2] == root
    with pytest.raises(InputError, match=r"^model\.name="):
        configure("model=tiny", f"model.name={name}")


def test_a_refused_name_leaves_nothing_outside(tmp_path):
    root = tmp_path / "a" / "b" / "c"
    assert "model.name='../../../../esc'" in one_line(launch(*WITH_REPORT, "model.name=../../../../esc", f"output_root={root}"))
    assert [path.name for path in tmp_path.rglob("*esc*")] == [path.name for path in root.rglob("*esc*")]


def test_two_runs_of_the_same_second_have_a_folder_each(tmp_path):
    folders, reporters = [], [Reporter() for _ in range(3)]
    for reporter in reporters:
        config = composed("model=tiny", f"output_root={tmp_path}")
        config.hydra.run.dir = f"{tmp_path}/runs/2026-01-01/00-00-00-tiny"
        reporter.on_run_start(config)
        folders.append(Path(config.hydra.run.dir).name)
    assert folders == ["00-00-00-tiny", "00-00-00-tiny-2", "00-00-00-tiny-3"]


def test_a_folder_that_the_user_names_is_taken_by_one_run_at_a_time(tmp_path):
    config = composed("model=tiny", f"output_root={tmp_path}", f"hydra.run.dir={tmp_path}/mine")
    first = Reporter()
    first.on_run_start(config)
    with pytest.raises(SystemExit, match=rf"^hydra\.run\.dir={tmp_path}/mine: another run"):
        Reporter().on_run_start(config)
    first._running.release()
    Reporter().on_run_start(config)
    assert config.hydra.run.dir == f"{tmp_path}/mine"


def test_two_different_sweeps_do_not_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("spikellm.run.sweep.PATIENCE_S", 0.1)

    def config(T: str):
        return composed("model=tiny", f"snn.T={T}", f"output_root={tmp_path}", f"hydra.sweep.dir={tmp_path}/sweep")

    first = Reporter()
    first.on_multirun_start(config("4,6"))
    Reporter().on_multirun_start(config("4,6"))  # the same one given twice
    asked = (tmp_path / "sweep" / "sweep.json").read_bytes()
    with pytest.raises(SystemExit, match=rf"^hydra\.sweep\.dir={tmp_path}/sweep: another sweep"):
        Reporter().on_multirun_start(config("5,7"))
    assert (tmp_path / "sweep" / "sweep.json").read_bytes() == asked
    first._running.release()
    Reporter().on_multirun_start(config("5,7"))


def test_a_sweep_of_the_same_second_gets_another_folder(tmp_path):
    made = composed("model=tiny", "snn.T=4,6", f"output_root={tmp_path}")
    clock = Path(made.hydra.sweep.dir)
    clock.mkdir(parents=True)
    with FileLock(clock / RUNNING):
        Reporter().on_multirun_start(made)
    assert Path(made.hydra.sweep.dir) == clock.with_name(f"{clock.name}-2")


def test_a_summary_that_cannot_be_written_is_an_error(tmp_path):
    job = tmp_path / "sweep" / "0-T4-G1"
    job.mkdir(parents=True)
    write_failure(job, "no", JobRecord())
    (tmp_path / "sweep" / "summary.csv").mkdir()
    config = composed("model=tiny", f"hydra.sweep.dir={tmp_path}/sweep")
    with pytest.raises(SystemExit, match=r"summary\.csv"):
        Reporter().on_multirun_end(config)


@pytest.mark.parametrize("content", [b"", b"{", b"\0" * 300, b"\xff", b"[1]"])
def test_a_damaged_record_is_made_again(content, tmp_path):
    job = tmp_path / "0-T4-G1"
    job.mkdir()
    write_results(job, Results(schema=1, config="0123", model="m", T=4, grain=1, stages={}), {}, [])
    assert finished_results(job, "0123")
    (job / "results.json").write_bytes(content)
    assert finished_results(job, "0123") is None
    assert "damaged" in summary_rows(tmp_path)[0]["error"]
    (job / "error.json").write_bytes(content)
    assert summary_rows(tmp_path)[0]["error"] == NOT_FINISHED


def test_text_config_of_a_path_with_a_null_byte():
    with pytest.raises(InputError, match=r"dataset\.evaluation\.path="):
        read_text(text_config("a\0b"), "dataset.evaluation")
