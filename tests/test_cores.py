"""How threads wait, and how many there are, on a machine that other processes use too."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spikellm import cores
from tests.places import ROOT

# What the runtime that torch brings says of itself when it is loaded: the environment as it reads it. Torch itself costs seconds more.
LOADED = "import ctypes, sys; exec(sys.argv[1]); import spikellm; ctypes.CDLL(sys.argv[2])"


def shown(first: str = "", **environment: str) -> dict[str, str]:
    """The settings of libgomp in a process that runs `first`, imports spikellm and then loads the library."""
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    if not found:
        pytest.skip("this torch has another OpenMP runtime than GNU's")
    kept = {name: value for name, value in os.environ.items() if name not in cores.DECIDED}
    command = [sys.executable, "-c", LOADED, first, str(found[0])]
    environment = kept | {"OMP_DISPLAY_ENV": "VERBOSE"} | environment
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return dict(re.findall(r"(\w+) = '(.*)'", done.stderr))


def test_threads_sleep_while_they_wait():
    """GOMP_SPINCOUNT says it; OMP_WAIT_POLICY is shown as PASSIVE where it is undefined, too, with 300,000 rounds."""
    assert shown()["GOMP_SPINCOUNT"] == "0"
    assert int(shown("import ctypes; ctypes.CDLL(sys.argv[2])")["GOMP_SPINCOUNT"]) > 1000  # loaded before: nothing can be done


def test_what_the_user_has_set_stays():
    assert shown(OMP_WAIT_POLICY="ACTIVE")["OMP_WAIT_POLICY"] == "ACTIVE"
    assert shown(GOMP_SPINCOUNT="1234")["GOMP_SPINCOUNT"] == "1234"


@pytest.mark.parametrize("name", sorted(cores.DECIDED))
def test_one_decision_of_the_user_is_all_of_them(name, monkeypatch):
    """LLVM's runtime with OMP_WAIT_POLICY=ACTIVE would sleep all the same after a KMP_BLOCKTIME of 0."""
    monkeypatch.setattr(os, "environ", {name: "1"})
    monkeypatch.setattr(sys, "modules", {})
    cores.sleep_while_waiting()
    assert os.environ == {name: "1"}


def test_torch_that_is_there_already_stays_as_it_is(monkeypatch, caplog):
    monkeypatch.setattr(os, "environ", {})
    with caplog.at_level(logging.DEBUG, cores.__name__):
        cores.sleep_while_waiting()
    assert os.environ == {}
    assert [(record.levelname, "before spikellm" in record.message) for record in caplog.records] == [("DEBUG", True)]


# ---- how many --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


# (hardware.threads, OMP_NUM_THREADS, the container's share, threads)
@pytest.mark.parametrize(
    ("count", "asked", "share", "wanted"),
    [(None, None, None, 3), (None, None, 2, 2), (None, None, 8, 3), (None, "3", 2, 3), (5, None, 2, 5), (1, "3", None, 1)],
)
@pytest.mark.usefixtures("three_threads")
def test_threads_are_the_users_number_or_the_cores_of_which_there_is_a_share(count, asked, share, wanted, monkeypatch):
    monkeypatch.setattr(cores, "share", lambda: share)
    if asked is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    with cores.threads(count):
        assert torch.get_num_threads() == wanted
    assert torch.get_num_threads() == 3


# (this process's groups, files below /sys/fs/cgroup, cores): systemd's version 2, a container's, version 1, none
@pytest.mark.parametrize(
    ("groups", "files", "wanted"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 2),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2),
        ("0::/a/b", {"a/cpu.max": "800000 100000", "a/b/cpu.max": "50000 100000", "c/cpu.max": "10000 100000"}, 1),
        ("0::/of/the/host", {"cpu.max": "400000 100000"}, 4),
        ("3:cpu,cpuacct:/a\n0::/", {"cpu/a/cpu.cfs_quota_us": "300000", "cpu/a/cpu.cfs_period_us": "100000"}, 3),
        ("3:cpuset:/\n1:cpu:/host", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("0::/", {}, None),
        ("0::/", {"cpu.max": "?"}, None),
        (None, {"cpu.max": "100000 100000"}, None),
    ],
)
def test_a_share_is_the_least_that_the_groups_of_the_process_allow(groups, files, wanted, tmp_path):
    for name, content in files.items():
        (tmp_path / "sys" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys" / name).write_text(content + "\n")
    if groups is not None:
        (tmp_path / "cgroup").write_text(groups + "\n")
    assert cores.share(tmp_path / "cgroup", tmp_path / "sys") == wanted
