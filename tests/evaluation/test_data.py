"""Text to windows."""

import os
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from spikellm.config.checks import InputError
from spikellm.config.choices import DatasetSource
from spikellm.config.dataset import TextConfig
from spikellm.evaluation.texts import token_windows
from spikellm.evaluation.zero_shot import read_rows
from spikellm.search.published import file_hash
from spikellm.store.artifacts import Digests
from spikellm.store.sources import text_source
from tests.texts import text_config

KEY = "dataset.evaluation"


def pydocs(split: str, **options) -> TextConfig:
    return TextConfig(source=DatasetSource.pydocs, split=split, **options)


@pytest.fixture
def alphabet(tmp_path) -> Path:
    path = tmp_path / "alphabet.txt"
    path.write_text("abcdefghijklmnopqrstuvwxyz", encoding="utf-8")
    return path


def test_windows_are_consecutive_and_the_tail_is_dropped(alphabet):
    windows = token_windows(text_config(alphabet, window=8), KEY, None)
    assert ["".join(map(chr, row)) for row in windows.tolist()] == ["abcdefgh", "ijklmnop", "qrstuvwx"]
    assert token_windows(text_config(alphabet, window=8, max_windows=2), KEY, None).tolist() == windows[:2].tolist()
    assert token_windows(text_config(alphabet, window=8, max_windows=9), KEY, None).tolist() == windows.tolist()
    assert token_windows(text_config(alphabet, window=26), KEY, None).shape == (1, 26)


def test_tokens_are_the_tokenizers_without_special_ones(alphabet, real_tokenizer):
    ids = real_tokenizer.encode(alphabet.read_text(), add_special_tokens=False)
    windows = token_windows(text_config(alphabet, window=3), KEY, real_tokenizer)
    assert windows.flatten().tolist() == ids[: len(ids) // 3 * 3]


def test_parts_of_the_embedded_text_are_fixed_and_do_not_overlap():
    parts = {split: bytes(token_windows(pydocs(split, window=64), KEY, None).flatten().tolist()) for split in ("calibration", "evaluation")}
    held = {
        split: {name for name, text in topics.items() if len(text) > 200 and text[:200].encode() in part} for split, part in parts.items()
    }
    assert len(held["calibration"]) > len(held["evaluation"]) > 5
    # one topic may quote another's beginning: the parts themselves share none
    shared = {name for name in held["calibration"] & held["evaluation"] if sum(topics[name][:200] in text for text in topics.values()) == 1}
    assert not shared


def test_fingerprint_follows_the_text_and_the_cut_and_not_the_files_place(alphabet, tmp_path):
    copy = tmp_path / "copy.txt"
    copy.write_bytes(alphabet.read_bytes())
    digests = Digests(tmp_path / "memory.json")
    mine = text_source(text_config(alphabet, window=8), digests)
    assert text_source(text_config(copy, window=8), digests) == mine
    assert text_source(text_config(alphabet, window=4), digests) != mine
    assert text_source(text_config(alphabet, window=8, max_windows=1), digests) != mine
    copy.write_text("another text")
    assert text_source(text_config(copy, window=8), digests) != mine


def test_wrong_texts_name_key_and_value(tmp_path):
    files = {"empty": b"", "blank": b" \n\t\n", "short": b"abc", "latin1": "caf\xe9 au lait".encode("latin-1")}
    for name, content in files.items():
        path = tmp_path / f"{name}.txt"
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"{KEY}\.path=.*{name}\.txt"):
            token_windows(text_config(path, window=8), KEY, None)
    with pytest.raises(InputError, match=rf"{KEY}\.path=.*absent"):
        token_windows(text_config(tmp_path / "absent"), KEY, None)
    with pytest.raises(InputError, match=rf"{KEY}\.path=.*{tmp_path.name}"):
        token_windows(text_config(tmp_path), KEY, None)
    with pytest.raises(InputError, match=rf"{KEY}\.path=null"):
        token_windows(text_config(None), KEY, None)
    with pytest.raises(InputError, match=rf"{KEY}\.split=everything"):
        token_windows(pydocs("everything"), KEY, None)


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    """A pipe never comes, a device never ends: a test that opens one hangs."""
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "pipe"), ("/dev/zero", "device"), (tmp_path, "folder"), ("/dev/stdin/..", "")):
        with pytest.raises(InputError, match=rf"{KEY}\.path=.*{kind}"):
            token_windows(text_config(path), KEY, None)
        with pytest.raises(InputError, match=rf"search\.import_file=.*{kind}"):
            file_hash(Path(path))
    os.mkfifo(tmp_path / "piqa.jsonl")
    with pytest.raises(InputError, match=r"piqa\.jsonl: .*pipe"):
        read_rows(str(tmp_path), "piqa")
    with pytest.raises(InputError, match=rf"{KEY}\.path=~nobody_such/x"):
        token_windows(text_config("~nobody_such/x"), KEY, None)


def test_a_byte_order_mark_is_no_text(alphabet, tmp_path):
    marked = tmp_path / "marked.txt"
    marked.write_bytes(b"\xef\xbb\xbf" + alphabet.read_bytes())
    assert (
        token_windows(text_config(marked, window=8), KEY, None).tolist()
        == token_windows(text_config(alphabet, window=8), KEY, None).tolist()
    )


def test_tokens_beyond_the_models_vocabulary_are_refused(alphabet):
    config = text_config(alphabet, window=8)
    assert token_windows(config, KEY, None, ord("z") + 1).shape == (3, 8)
    with pytest.raises(InputError, match=rf"{KEY}: token {ord('z')} .*vocab_size={ord('z')}"):
        token_windows(config, KEY, None, ord("z"))


def test_an_unreachable_data_set_of_the_hub_names_itself():
    config = TextConfig(source=DatasetSource.hub, path="nobody/no-such-set", split="train", max_rows=1)
    with pytest.raises(InputError, match=rf"{KEY}\.path=nobody/no-such-set"):
        token_windows(config, KEY, None)


def test_rows_of_a_data_set_are_joined_by_blank_lines(monkeypatch):
    """The hub's half of the protocol, with a data set made on the spot."""
    import datasets

    made = datasets.Dataset.from_dict({"body": ["one", "", "two", "three"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
    config = TextConfig(source=DatasetSource.hub, path="a/set", split="train", field="body", window=15)
    windows = token_windows(config, KEY, None)
    assert "".join(map(chr, windows[0].tolist())) == "one\n\n\n\ntwo\n\nthree"[:15]
    with pytest.raises(InputError, match=rf"{KEY}\.field=wrong"):
        token_windows(TextConfig(source=DatasetSource.hub, path="a/set", split="train", field="wrong", window=15), KEY, None)
