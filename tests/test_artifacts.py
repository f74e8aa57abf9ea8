"""The artefact store: whole or absent, computed once, whoever is killed."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spikellm.artifacts import ArtifactStore, artifact_key, read_json, write_json

fork = multiprocessing.get_context("spawn")  # processes without torch: nothing to share
json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda v: st.lists(v, max_size=3), max_leaves=5)


@given(
    inputs=st.dictionaries(st.text(max_size=5), json_values, max_size=4),
    other=st.dictionaries(st.text(max_size=5), json_values, max_size=4),
)
@settings(deadline=None, max_examples=100, derandomize=True)
def test_key_is_a_function_of_the_values_and_not_of_their_order(inputs, other):
    assert artifact_key(inputs) == artifact_key(dict(reversed(inputs.items())))
    assert len(artifact_key(inputs)) == 16
    int(artifact_key(inputs), 16)
    if repr(sorted(inputs.items())) != repr(sorted(other.items())):
        assert artifact_key(inputs) != artifact_key(other)


def write(text: str):
    return lambda folder: (folder / "result.txt").write_text(text)


def test_computed_once_then_loaded(tmp_path):
    store = ArtifactStore(tmp_path)
    folder, cached = store.load_or_compute("stage", {"a": 1}, write("first"))
    assert not cached
    again, cached = store.load_or_compute("stage", {"a": 1}, write("second"))
    assert cached
    assert again == folder == store.folder("stage", {"a": 1})
    assert (folder / "result.txt").read_text() == "first"
    assert read_json(folder / "inputs.json") == {"a": 1}
    assert store.load_or_compute("stage", {"a": 2}, write("third"))[0] != folder
    assert store.load_or_compute("other", {"a": 1}, write("fourth"))[0] != folder


def test_a_failing_computation_leaves_nothing(tmp_path):
    store = ArtifactStore(tmp_path)

    def fail(folder: Path) -> None:
        write("half")(folder)
        raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"):
        store.load_or_compute("stage", {"a": 1}, fail)
    assert not [path for path in tmp_path.rglob("*") if path.suffix != ".lock" and path != tmp_path / "stage"]
    assert store.load_or_compute("stage", {"a": 1}, write("whole"))[1] is False


def test_the_result_is_not_seen_before_it_is_whole(tmp_path):
    store = ArtifactStore(tmp_path)

    def look(folder: Path) -> None:
        write("half")(folder)
        assert not store.folder("stage", {}).exists()

    folder, _ = store.load_or_compute("stage", {}, look)
    assert (folder / "result.txt").exists()


def compute_slowly(root: str, log: str) -> None:
    def compute(folder: Path) -> None:
        with open(log, "a") as file:
            file.write("computed\n")
        time.sleep(0.3)
        write("result")(folder)

    folder, _ = ArtifactStore(Path(root)).load_or_compute("stage", {"a": 1}, compute)
    assert (folder / "result.txt").read_text() == "result"


def test_processes_that_want_the_same_compute_it_once(tmp_path):
    log = tmp_path / "log"
    workers = [fork.Process(target=compute_slowly, args=(str(tmp_path / "store"), str(log))) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert log.read_text() == "computed\n"


def compute_and_die(root: str) -> None:
    def compute(folder: Path) -> None:
        write("half")(folder)
        os.kill(os.getpid(), signal.SIGKILL)

    ArtifactStore(Path(root)).load_or_compute("stage", {"a": 1}, compute)


def test_a_killed_process_leaves_neither_result_nor_lock(tmp_path):
    store = ArtifactStore(tmp_path)
    worker = fork.Process(target=compute_and_die, args=(str(tmp_path),))
    worker.start()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    assert not store.folder("stage", {"a": 1}).exists()
    folder, cached = store.load_or_compute("stage", {"a": 1}, write("whole"))
    assert not cached
    assert (folder / "result.txt").read_text() == "whole"
    assert not list(tmp_path.rglob("*.tmp-*"))  # what the killed process had left is cleared away


def test_what_other_machines_are_writing_is_left_alone_until_it_is_old(tmp_path):
    store = ArtifactStore(tmp_path)
    target = store.folder("stage", {"a": 1})
    young, old = (target.parent / f"{target.name}.tmp-other-{number}-0" for number in (1, 2))
    for folder in (young, old):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    store.load_or_compute("stage", {"a": 1}, write("mine"))
    assert young.is_dir()
    assert not old.exists()


def test_a_result_that_another_machine_puts_there_first_stands(tmp_path):
    """A file system without locks between machines: both compute, the first to be whole wins, nobody fails."""
    store = ArtifactStore(tmp_path)

    def lose(folder: Path) -> None:
        write("mine")(folder)
        target = store.folder("stage", {})
        target.mkdir()
        write("theirs")(target)

    folder, _ = store.load_or_compute("stage", {}, lose)
    assert (folder / "result.txt").read_text() == "theirs"
    assert not list(tmp_path.rglob("*.tmp-*"))


def write_often(path: str, text: str) -> None:
    for _ in range(50):
        write_json(Path(path), {"text": text})


def test_writers_of_one_file_do_not_mix(tmp_path):
    path = tmp_path / "summary.json"
    workers = [fork.Process(target=write_often, args=(str(path), letter * 5000)) for letter in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert set(read_json(path)["text"]) in ({"a"}, {"b"})
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    with pytest.raises((TypeError, ValueError)):
        write_json(path, {("no", "key"): 2})
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
