"""The artefact store: whole or absent, computed once, whoever is killed."""

import errno
import multiprocessing
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from spikellm.planning.watch import watched
from spikellm.store import artifacts
from spikellm.store.artifacts import ArtifactStore, Digests, artifact_key, computed_by, file_digest, read_json, write_json, write_tensors
from spikellm.store.provenance import versions

fork = multiprocessing.get_context("spawn")  # processes without torch: nothing to share
json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda v: st.lists(v, max_size=3), max_leaves=5)


def test_results_that_are_made_together_are_kept_one_by_one(tmp_path):
    store, asked = ArtifactStore(tmp_path), []

    def make(folders):
        asked.append(list(folders))
        for number, folder in folders.items():
            if number == 3:
                raise ValueError("the last one fails")
            (folder / "found").write_text(str(number))
            yield number

    every = [{"a": number} for number in range(4)]
    store.load_or_compute("stage", every[1], lambda folder: (folder / "found").write_text("before"))
    with pytest.raises(ValueError, match="the last one fails"):
        store.load_or_compute_together("stage", every, make)
    assert set(asked[0]) == {0, 2, 3}
    kept = {number: store.holds("stage", inputs) for number, inputs in enumerate(every)}
    assert kept[1]
    assert not kept[3]
    assert {number for number in (0, 2) if kept[number]} == set(asked[0][: asked[0].index(3)])
    assert not [path for path in (tmp_path / "stage").iterdir() if ".tmp-" in path.name]
    found = store.load_or_compute_together("stage", every[:3], make)
    assert [(each.folder / "found").read_text() for each in found] == ["0", "before", "2"]
    assert [each.cached for each in found] == [kept[number] for number in range(3)]
    count = len(asked)
    assert all(each.cached for each in store.load_or_compute_together("stage", every[:3], make))
    assert len(asked) == count, "nothing was missing"


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


def test_what_is_removed_is_gone_and_computed_again(tmp_path):
    store = ArtifactStore(tmp_path)
    first, other = (store.load_or_compute("stage", {"a": number}, write("first")) for number in (1, 2))
    store.remove(first)
    store.remove(first)
    assert not first.folder.exists()
    assert [path for path in (tmp_path / "stage").iterdir() if path.suffix != ".lock"] == [other.folder]
    assert store.load_or_compute("stage", {"a": 1}, write("again")) == (first.folder, False)
    assert (first.folder / "result.txt").read_text() == "again"


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


DAMAGE = {
    "one byte changed": lambda folder: (folder / "result.txt").write_text("wholf"),
    "cut": lambda folder: (folder / "result.txt").write_text("who"),
    "empty": lambda folder: (folder / "result.txt").write_bytes(b""),
    "gone": lambda folder: (folder / "result.txt").unlink(),
    "a folder in its place": lambda folder: ((folder / "result.txt").unlink(), (folder / "result.txt").mkdir()),
    "another's inputs": lambda folder: (folder / "inputs.json").write_text('{"a": 2}'),
    "no checksums": lambda folder: (folder / "checksums.json").unlink(),
    "checksums cut": lambda folder: (folder / "checksums.json").write_text('{"result.txt": "'),
    "checksums of nothing": lambda folder: (folder / "checksums.json").write_text("{}"),
    "checksums are no object": lambda folder: (folder / "checksums.json").write_text("[1]"),
    "NUL bytes": lambda folder: (folder / "checksums.json").write_bytes(bytes(300)),
    "versions changed": lambda folder: (folder / "versions.json").write_text("{}"),
    "an empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
    "a file in its place": lambda folder: (shutil.rmtree(folder), folder.write_text("")),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("looked_at", [False, True])
def test_a_damaged_result_is_named_and_made_again(damage, looked_at, tmp_path, caplog):
    """Once in a new process (a store that has not seen it), once in the one that has read it before."""
    store = ArtifactStore(tmp_path)
    folder, _ = store.load_or_compute("stage", {"a": 1}, write("whole"))
    assert store.holds("stage", {"a": 1})
    DAMAGE[damage](folder)
    store = store if looked_at else ArtifactStore(tmp_path)
    assert not store.holds("stage", {"a": 1})
    assert store.load_or_compute("stage", {"a": 1}, write("whole")) == (folder, False)
    assert (folder / "result.txt").read_text() == "whole"
    assert [str(folder) in record.message for record in caplog.records] == [True]
    assert store.load_or_compute("stage", {"a": 1}, write("another")) == (folder, True)
    assert list(folder.parent.iterdir()) == [folder]  # no remains, no lock


def test_a_result_under_anothers_key_is_not_taken(tmp_path):
    store = ArtifactStore(tmp_path)
    folder, _ = store.load_or_compute("stage", {"a": 1}, write("theirs"))
    shutil.copytree(folder, store.folder("stage", {"a": 2}))
    other, cached = store.load_or_compute("stage", {"a": 2}, write("mine"))
    assert ((other / "result.txt").read_text(), cached) == ("mine", False)


def test_files_below_folders_are_guarded_too(tmp_path):
    def compute(folder: Path) -> None:
        (folder / "model").mkdir()
        write("weights")(folder / "model")

    store = ArtifactStore(tmp_path)
    folder, _ = store.load_or_compute("stage", {}, compute)
    shutil.rmtree(folder / "model")
    assert not store.load_or_compute("stage", {}, compute).cached
    assert (folder / "model" / "result.txt").read_text() == "weights"


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """What a power cut leaves is what was synced before the rename."""
    synced, renamed = set(), []
    fsync, rename = os.fsync, Path.rename

    def note_rename(self, target):
        renamed.append({path.stat().st_ino for path in [self, *self.rglob("*")]} - synced)
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.add(os.fstat(descriptor).st_ino), fsync(descriptor)))
    monkeypatch.setattr(Path, "rename", note_rename)

    def compute(folder: Path) -> None:
        (folder / "deep").mkdir()
        write("deep")(folder / "deep")
        write("flat")(folder)

    folder, _ = ArtifactStore(tmp_path).load_or_compute("stage", {}, compute)
    assert renamed == [set()]
    assert folder.parent.stat().st_ino in synced


def test_what_the_disk_does_not_take_is_the_systems_error(tmp_path):
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as found:
            write_tensors(tmp_path / "file", {"a": torch.ones(2**18)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert (found.value.errno, found.value.filename) == (errno.EFBIG, str(tmp_path / "file"))
    assert not list(tmp_path.iterdir())


def test_tensors_are_written_from_their_own_memory(tmp_path):
    """A file of 128 MiB takes no copy of it; what is read back, and how it is described, are what was given."""
    tensors = {"b": torch.arange(2**25, dtype=torch.float32), "a": torch.ones(3, dtype=torch.int64), "c": torch.ones(2, 3).bfloat16()}
    with watched() as before:
        tensors["b"].sum()
    with watched() as peak:
        write_tensors(tmp_path / "file", tensors, {"format": "pt"})
    if before.resident is not None and peak.resident is not None:
        assert peak.resident - before.resident < 2**25
    with safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())


def test_versions_lie_beside_a_result_and_are_read_from_there(tmp_path, monkeypatch):
    store = ArtifactStore(tmp_path)
    old = store.load_or_compute("stage", {"a": 1}, write("old"))
    monkeypatch.setattr(artifacts, "versions", lambda: {"torch": "99"})
    new = store.load_or_compute("stage", {"a": 2}, write("new"))
    assert computed_by([old]) == {name: str(version) for name, version in versions().items()}
    assert computed_by([new]) == {"torch": "99"}
    assert computed_by([old, new])["torch"] == f"{versions()['torch']}, 99"


def test_a_deleted_lock_does_not_cost_the_one_who_holds_it_its_work(tmp_path):
    """Two compute the same then; neither takes what the other is writing for remains."""
    store = ArtifactStore(tmp_path)

    def compute(folder: Path) -> None:
        for lock in folder.parent.glob("*.lock"):
            lock.unlink()
        other = fork.Process(target=compute_slowly, args=(str(tmp_path), str(tmp_path / "log")))
        other.start()
        other.join(60)
        assert other.exitcode == 0
        write("result")(folder)

    folder, _ = store.load_or_compute("stage", {"a": 1}, compute)
    assert (folder / "result.txt").read_text() == "result"
    assert list(folder.parent.iterdir()) == [folder]


def test_remains_of_killed_processes_go_with_the_next_computation_of_the_stage(tmp_path):
    store = ArtifactStore(tmp_path)
    worker = fork.Process(target=compute_and_die, args=(str(tmp_path),))
    worker.start()
    worker.join(60)
    (lock,) = tmp_path.rglob("*.lock")
    os.utime(lock, (0, 0))
    folder, _ = store.load_or_compute("stage", {"a": 2}, write("another key"))
    assert list(folder.parent.iterdir()) == [folder]


def test_a_large_file_is_read_once_and_again_when_it_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "LARGE_BYTES", 4)
    monkeypatch.setattr(artifacts, "SETTLED_NS", -1)
    read = []
    monkeypatch.setattr(artifacts, "file_digest", lambda path: (read.append(path), file_digest(path))[1])
    path, memory = tmp_path / "weights", tmp_path / "memory.json"
    path.write_text("abcdef")
    first = Digests(memory).of(path)
    assert Digests(memory).of(path) == first == file_digest(path)
    assert len(read) == 1
    before = path.stat()
    path.write_text("abcdeg")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # neither size nor time decide
    changed = Digests(memory).of(path)
    assert changed == file_digest(path) != first
    for damage in (b"", bytes(40), b"[]", b'{"a": 1}', memory.read_bytes()[:-9]):
        memory.write_bytes(damage)
        assert Digests(memory).of(path) == changed
    memory.unlink()
    memory.mkdir()
    assert Digests(memory).of(path) == changed


def test_a_file_that_was_just_written_is_not_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "LARGE_BYTES", 4)
    path = tmp_path / "weights"
    path.write_text("abcdef")
    Digests(tmp_path / "memory.json").of(path)
    assert not (tmp_path / "memory.json").exists()


def test_a_process_without_file_handles_takes_nothing_for_damaged(tmp_path, monkeypatch):
    store = ArtifactStore(tmp_path)
    folder, _ = store.load_or_compute("stage", {"a": 1}, write("whole"))

    def refuse(path: Path) -> str:
        raise OSError(errno.EMFILE, "too many open files", str(path))

    monkeypatch.setattr(artifacts, "file_digest", refuse)
    with pytest.raises(OSError, match="too many open files"):
        ArtifactStore(tmp_path).load_or_compute("stage", {"a": 1}, write("another"))
    assert (folder / "result.txt").read_text() == "whole"
