"""Errors of libraries become one line about the user's value; defects of our own keep their traceback."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from spikellm.config import boundary
from spikellm.config.boundary import blamed_on
from spikellm.config.checks import InputError

CURE = "give another file"


def load_pickle(path: Path) -> None:
    pickle.loads(path.read_bytes())


@pytest.mark.parametrize(
    ("read", "content"),
    [
        (lambda path: json.loads(path.read_text()), b"{"),
        (lambda path: path.read_text(encoding="utf-8"), b"\xff"),
        (lambda path: safe_open(path, "pt"), b"\xff" * 20),
        (lambda path: torch.load(path, weights_only=True), b"no pickle"),
        (lambda path: torch.load(path, weights_only=True), b""),
        (load_pickle, b"no pickle"),
        (lambda path: (path / "deeper").read_bytes(), b""),
    ],
)
def test_an_error_of_a_library_names_value_reason_and_cure(read, content, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught, blamed_on(f"model.path={path}", CURE):
        read(path)
    text = str(caught.value)
    assert text.startswith(f"model.path={path}: ")
    assert text.endswith(f"; {CURE}")
    assert len(text.splitlines()) == 1
    assert caught.value.__cause__ is not None


def test_a_defect_of_our_own_keeps_its_type(monkeypatch):
    """Raised beside the call, or in a function of ours that a library calls back."""
    monkeypatch.setattr(boundary, "PACKAGE", str(Path(__file__).parent))
    with pytest.raises(ZeroDivisionError), blamed_on("a=1", CURE):
        1 / 0  # noqa: B018
    with pytest.raises(KeyError), blamed_on("a=1", CURE):
        json.loads("{}", object_hook=lambda found: found["nothing"])
    with pytest.raises(TypeError), blamed_on("a=1", CURE):
        json.loads("{}", object_hook=lambda _: json.loads(1))
    with pytest.raises(InputError, match=r"^a=1: JSONDecodeError"), blamed_on("a=1", CURE):
        json.loads("{")
    with pytest.raises(InputError, match=r"^b=2: wrong$"), blamed_on("a=1", CURE):
        raise InputError("b=2: wrong")
    with pytest.raises(KeyboardInterrupt), blamed_on("a=1", CURE):
        raise KeyboardInterrupt
