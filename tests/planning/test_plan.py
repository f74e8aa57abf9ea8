"""What is told of a run before it starts. Truth: models that are built, memory that is taken, sums by hand."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from spikellm.config.labels import NetworkName
from spikellm.execution.memory import LOGIT_ROWS
from spikellm.model.load import empty_model
from spikellm.planning import plan as planning
from spikellm.planning.machine import Machine, measure, seconds
from spikellm.planning.plan import GIB, Job, plan
from spikellm.planning.probe import Cost, LayerCosts, fitted, made_up, probe
from spikellm.planning.shape import Shape
from spikellm.report.plan import duration, plan_table, planned_and_measured
from spikellm.search.options import Options
from spikellm.store.record import Results
from tests.configure import configure
from tests.jobs import run
from tests.launch import launch, one_line
from tests.models import tiny_model

MACHINE = Machine(
    device="cpu", threads=2, memory=16 * GIB, device_memory=None, disk=100 * GIB, products=1e11, copying=1e10, writing=1e9, reading=2e9,
    normals=1e8,
)  # fmt: skip
COSTS = LayerCosts(
    rotate=2.0,
    plain=Cost(linear=1e-3, square=1e-6),
    observed=Cost(linear=2e-3, square=2e-6),
    spiking=Cost(linear=3e-3, square=0.0),
)
JOB = Job(
    stages=["calibrate", "search", "convert", "evaluate"], calibration=(4, 1000), texts=[(2, 1000)], networks=list(NetworkName),
    T=8, grains=2, spike_windows=0, save=False, offload=False, made=False, random=True, compiled=False, query_block=256, resident=GIB // 2,
)  # fmt: skip


def llama3_8b() -> Shape:
    config = configure("model=llama3_8b", "model.source=random")
    return Shape.of(empty_model(config.model).config, torch.bfloat16)


def test_the_shape_of_llama3_8b_is_the_published_one():
    shape = llama3_8b()
    assert shape.layers * shape.layer + shape.embedding + shape.head + shape.hidden == 8_030_261_248  # with the final norm
    assert (shape.largest, shape.most_groups, shape.tied) == (4096 * 14336, 32, False)
    assert shape.groups == 32 + 8 + 8 + 32 + 32 + 4, "heads of q, k, v, softmax and the output, four sites without"


@pytest.mark.parametrize("name", ["llama", "llama-biases", "qwen3"])
def test_a_shape_counts_what_a_model_has(name):
    model = tiny_model(name)
    shape = Shape.of(model.config, torch.float32)
    assert shape.checkpoint_bytes == sum(weight.nbytes for weight in model.parameters()) - model.model.norm.weight.nbytes
    assert shape.tied == (name == "llama-biases")
    made = made_up(model.config, torch.bfloat16, torch.device("cpu"))
    assert [weight.shape for weight in made.model.layers[0].parameters()] == [weight.shape for weight in model.model.layers[0].parameters()]
    assert len(made.model.layers) == 1


def test_a_cost_of_two_lengths_is_known_at_every_length():
    cost = Cost(linear=3e-3, square=5e-6)
    found = fitted({512: cost(512), 256: cost(256)})
    assert found(2048) == pytest.approx(cost(2048))
    assert fitted({512: 1.0, 256: 0.9}) == Cost(linear=1 / 512, square=0.0), "a machine that was busy at the shorter one"
    assert fitted({512: 1.0, 256: 0.1}).linear >= 0


def test_times_are_sums_over_layers_windows_and_networks():
    shape = llama3_8b()
    found = plan(shape, COSTS, MACHINE, JOB).stages
    reading = shape.checkpoint_bytes / MACHINE.reading
    observed = 4 * (2e-3 * 1000 + 2e-6 * 1000**2)
    looked = 4 * (1e-3 * 512 + 1e-6 * 512**2)  # for prefix tokens
    drawn = shape.checkpoint_bytes / 2 / MACHINE.normals
    assert found["calibrate"].seconds == pytest.approx(32 * (2 + observed + looked) + drawn + reading)
    head = 2 * (2 * 1000 * 4096 * 128256 / 1e11 + planning.LOGIT_PASSES * 4 * 1000 * 128256 / 1e10)
    plain, spiking = 2 * 32 * (1e-3 * 1000 + 1e-6 * 1000**2), 2 * 32 * 3
    assert found["evaluate"].seconds == pytest.approx(2 * plain + 4 * spiking + 6 * head + reading)
    more = plan(shape, COSTS, MACHINE, replace(JOB, spike_windows=1, networks=[NetworkName.snn])).stages["evaluate"]
    assert more.seconds == pytest.approx(spiking + head + planning.COUNTED * (spiking + head) / 2)


def test_memory_holds_the_weights_or_one_layer_of_them():
    shape = llama3_8b()
    whole, part = (plan(shape, COSTS, MACHINE, replace(JOB, offload=offload)) for offload in (False, True))
    layer = 2 * shape.layer
    for name in whole.stages:
        difference = whole.stages[name].memory_gib - part.stages[name].memory_gib
        assert difference == pytest.approx(30 * layer / GIB, abs=0.6), name  # windows in flight go through a layer together
    logits = LOGIT_ROWS * 128256 * 4 / GIB
    assert part.stages["evaluate"].memory_gib > (2 * 2 * shape.head + layer) / GIB + 0.5 + logits
    assert part.disk_gib == pytest.approx(32 * layer / GIB)
    saved = plan(shape, COSTS, MACHINE, replace(JOB, offload=True, made=True, save=True))
    assert saved.disk_gib == pytest.approx((32 * layer + 2 * shape.checkpoint_bytes) / GIB)


def test_a_gpu_holds_the_model_and_the_cpu_none_of_it():
    found = plan(llama3_8b(), COSTS, replace(MACHINE, device="cuda", device_memory=80 * GIB), JOB)
    assert all(stage.device_gib > 14.9 for stage in found.stages.values() if stage.device_gib is not None)
    assert max(stage.memory_gib for stage in found.stages.values()) < 1
    assert "GPU" in plan_table(found)


def test_stages_that_are_needed_are_planned_too():
    shape = llama3_8b()
    assert list(plan(shape, COSTS, MACHINE, replace(JOB, stages=["evaluate"])).stages) == ["calibrate", "search", "evaluate"]
    assert list(plan(shape, COSTS, MACHINE, replace(JOB, stages=["calibrate"])).stages) == ["calibrate"]


def test_a_layer_is_timed_as_runs_use_it():
    config = configure("model=tiny", "hardware.fused=false", "snn.T=4", "grain=1")
    found = probe(tiny_model().config, torch.float32, MACHINE, config.hardware, config.rotation, Options.of(config), window=128)
    assert found.rotate > 0
    assert found.plain(128) < found.observed(128)
    assert found.plain(128) < found.spiking(128)


def test_a_machine_is_measured(tmp_path):
    found = measure(torch.device("cpu"), tmp_path / "new")
    assert 1e9 < found.products < 1e14
    assert 1e8 < found.copying < 1e13
    assert found.writing > 1e6
    assert found.reading > 1e6
    assert found.disk > 0
    assert not list((tmp_path / "new").iterdir()), "what was written is gone"


def test_seconds_are_those_of_the_fastest_call():
    calls = []

    def call() -> None:
        calls.append(None)

    assert 0 < seconds(call, torch.device("cpu")) < 0.1
    assert len(calls) > 2


PEAKS = """
import torch
from spikellm.planning.watch import watched
del_later = torch.ones(2**26)
del del_later
with watched() as nothing:
    pass
with watched() as peak:
    torch.ones(2**24)
print(peak.resident, nothing.resident)
"""


def test_a_peak_is_that_of_the_piece_of_work_alone():
    """256 MiB before and 64 MiB within, both given back at once; in a process of its own, whose heap has no pages to spare."""
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True, timeout=120)
    peak, nothing = done.stdout.split()
    if "None" in (peak, nothing):
        pytest.skip("this system tells no peaks")
    assert int(peak) - int(nothing) == pytest.approx(2**26, rel=0.3)


def test_times_are_told_in_the_unit_of_a_person():
    assert [duration(each) for each in (0.5, 12.34, 119.0, 600.0, 7199.0, 36000.0)] == [
        "0.5 s",
        "12.3 s",
        "119 s",
        "10 min",
        "120 min",
        "10 h",
    ]


def test_a_plan_is_printed_and_nothing_is_run(tmp_path):
    done = launch("model=tiny", "hardware.fused=false", "plan=true", f"output_root={tmp_path}")
    assert done.code == 0, done.err
    assert "calibrate" in done.out
    assert "in all" in done.out
    assert not list(tmp_path.rglob("results.json"))
    assert not (tmp_path / "artifacts" / "calibrate").exists()


def test_a_saved_model_has_no_plan(tmp_path):
    saved = run(tmp_path, "save_model=true", "stages=[convert]")["saved_model"]
    assert "plan=true" in one_line(launch(f"model.path={saved}", "plan=true", f"output_root={tmp_path}"))


def test_a_large_run_is_planned_beside_what_it_takes(tmp_path, monkeypatch):
    monkeypatch.setattr("spikellm.run.planning.LARGE", 0)
    found = run(tmp_path, "hardware.offload=true")
    assert set(found["plan"]["stages"]) == {"calibrate", "search", "convert", "evaluate"}
    assert found["plan"]["offload"] is True
    lines = planned_and_measured(Results.from_json(found))
    assert [line.split()[0] for line in lines[1:]] == list(found["stages"])
    again = run(tmp_path, "hardware.offload=true")
    assert "plan" not in again, "nothing is to be computed"
    assert planned_and_measured(Results.from_json(again)) == []


def test_a_disk_without_room_is_told_of_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("spikellm.run.planning.LARGE", 0)
    monkeypatch.setattr("spikellm.planning.machine.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(Exception, match=r"output_root=.* free .* GiB or take another output_root"):
        run(tmp_path, "hardware.offload=true", "save_model=true")
    assert not (tmp_path / "artifacts" / "calibrate").exists()
