"""Hidden states beyond a bound lie on disk: the same numbers, in files that are gone with them."""

import errno
import os

import pytest
import torch

from spikellm.model import states
from spikellm.model.states import States


def files_of_this_process(folder) -> list[str]:
    """Open and mapped ones below a folder, those without a name among them."""
    with open("/proc/self/maps") as maps:
        return [line for line in maps if str(folder) in line]


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="what a process has mapped is read from /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_what_is_beyond_the_bound_is_on_disk_and_the_same(dtype, tmp_path):
    wanted = [(100 * torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(seed))).to(dtype) for seed in range(5)]
    found = States(wanted, room=2 * wanted[0].nbytes, scratch=tmp_path / "scratch")
    assert found.resident == 2 * wanted[0].nbytes
    assert len(files_of_this_process(tmp_path)) == 3
    assert not list((tmp_path / "scratch").iterdir())
    other = found.copy()
    assert len(files_of_this_process(tmp_path)) == 3, "nothing was copied"
    for index in range(5):
        found[index] = found[index] + 1
    assert all(torch.equal(state, before) for state, before in zip(other, wanted, strict=True))
    assert all(torch.equal(state, before + 1) for state, before in zip(found, wanted, strict=True))
    assert found.resident == 2 * wanted[0].nbytes
    del other
    assert len(files_of_this_process(tmp_path)) == 3
    del found
    assert not files_of_this_process(tmp_path)


def test_without_a_place_all_stay_in_memory():
    found = States([torch.ones(2, 3)] * 4, room=0)
    assert found.resident == 4 * 24


def test_a_full_disk_is_an_error_of_the_system(tmp_path, monkeypatch):
    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def write(self, _):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(states, "TemporaryFile", lambda dir: Full())
    with pytest.raises(OSError, match="No space left"):
        States([torch.ones(3)], scratch=tmp_path)
