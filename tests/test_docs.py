"""The documentation keeps up: every field, every file, every experiment."""

import re
from dataclasses import dataclass, field
from enum import Enum

import pytest

from spikellm.config.help import describe, field_docs, field_help
from spikellm.config.schema import Config
from tests.configure import configure
from tests.places import CONF, README, ROOT

READING_ORDER = README.partition("## Reading order")[2].partition("\n## ")[0]
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
# The published table: WikiText-2 perplexity, WinoGrande, ARC-c, ARC-e, PIQA [%].
PUBLISHED = {
    ("llama2_7b", 8, "2"): (6.50, 70.56, 46.33, 73.70, 78.35),
    ("llama2_7b", 8, "3"): (6.31, 70.48, 46.25, 73.82, 78.29),
    ("llama2_7b", 10, "2"): (5.50, 70.48, 46.50, 73.91, 78.29),
    ("llama2_7b", 10, "3"): (5.50, 70.48, 46.33, 73.86, 78.35),
    ("llama3_8b", 6, "2"): (7.60, 69.77, 48.55, 74.75, 79.11),
    ("llama3_8b", 6, "3"): (7.79, 70.80, 48.81, 74.96, 79.05),
    ("llama3_8b", 8, "2"): (6.34, 72.93, 54.01, 77.44, 80.63),
    ("llama3_8b", 8, "3"): (6.33, 73.72, 53.41, 77.36, 80.36),
}
ANN = {"llama2_7b": 5.47, "llama3_8b": 6.1}


@pytest.mark.parametrize("row", describe(Config), ids=lambda row: row[0])
def test_every_field_is_documented(row):
    name, kind, _, meaning = row
    assert len(meaning.split()) >= 2, f"{name} ({kind}) has no docstring under it in config/; --help shows it"


def test_help_text_is_made_of_names_defaults_docstrings_and_choices():
    class Colour(Enum):
        red = 1
        """like a rose"""
        blue = 2

    @dataclass
    class Inner:
        size: float = 0.5
        """how large [m]"""

    @dataclass
    class Outer:
        inner: Inner
        colour: Colour = Colour.red
        """of the petals"""
        names: list[str] = field(default_factory=lambda: ["a", "b"])  # in no order
        """what it is called"""
        bare: int | None = None

    # get_type_hints looks names up where the class was made
    Outer.__annotations__ = {"inner": Inner, "colour": Colour, "names": list[str], "bare": int | None}
    Inner.__annotations__ = {"size": float}
    assert field_docs(Colour) == {"red": "like a rose"}
    assert describe(Outer) == [
        ("inner.size", "float", "0.5", "how large [m]"),
        ("colour", "red: like a rose; blue", "red", "of the petals"),
        ("names", "list of str", "[a,b]", "what it is called"),
        ("bare", "int or null", "null", ""),
    ]
    lines = field_help(Outer).splitlines()
    assert lines[0].split() == ["inner.size=0.5", "how", "large", "[m]", "(float)"]
    assert all(len(line) <= 140 for line in field_help(Config).splitlines())


def files_of_the_tree() -> list[str]:
    rooms = [path.parent.name for path in (ROOT / "spikellm").glob("*/__init__.py")]
    files = [f"{room}: {path.name}" for room in rooms for path in (ROOT / "spikellm" / room).rglob("*") if path.suffix in (".py", ".j2")]
    folders = [f"experiments/{path.parent.name}" for path in (ROOT / "experiments").glob("*/README.md")]
    groups = [f"conf/{path.name}" for path in CONF.iterdir() if path.is_dir()]
    files += [path.name for path in (ROOT / "spikellm").glob("[!_]*.py")]
    return sorted(
        {
            "main.py",
            "Makefile",
            "pyproject.toml",
            "tests/",
            *files,
            *folders,
            *groups,
        }
        - {f"{room}: __init__.py" for room in rooms}
    )


@pytest.mark.parametrize("name", files_of_the_tree())
def test_every_file_is_named_in_the_reading_order(name):
    room, _, file = name.rpartition(": ")
    rows = [row for row in READING_ORDER.splitlines() if row.startswith(f"| `spikellm/{room}/`")] if room else [READING_ORDER]
    assert any(re.search(rf"(?<!\w){re.escape(file)}", row) for row in rows), f"{name} is not in README.md's reading order"


def test_every_experiment_folder_says_what_it_asks_and_how():
    for folder in (path for path in (ROOT / "experiments").iterdir() if path.is_dir() and path.name != "__pycache__"):
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert text.startswith("# "), folder
        assert re.search(r"^ *(python (experiments/|main\.py)|make )", text, re.M), f"{folder}: no command"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes(name):
    assert name in README
    config = configure(f"experiment={name}")
    for row in config.reference.rows:
        assert configure(f"experiment={name}", f"snn.T={row.T}", f"grain={row.grain}").snn.T == row.T


def test_published_experiments_name_the_published_figures():
    found = {}
    for name in (name for name in EXPERIMENTS if name.startswith("published")):
        config = configure(f"experiment={name}")
        for row in config.reference.rows:
            found[config.model.name, row.T, row.grain] = config.reference.figures(config.model.name, row.T, row.grain)
    assert set(found) == set(PUBLISHED)
    for (model, T, grain), figures in found.items():
        keys = ["winogrande.acc", "arc_challenge.acc_norm", "arc_easy.acc_norm", "piqa.acc_norm"]
        perplexity, *accuracies = PUBLISHED[model, T, grain]
        wanted = {f"zero_shot.snn.{key}": value / 100 for key, value in zip(keys, accuracies, strict=True)}
        assert figures == pytest.approx({"perplexity.ann": ANN[model], "perplexity.snn": perplexity} | wanted)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("published_llama2_7b", {"intermediate_size": 11008, "vocab_size": 32000}),
        ("published_llama3_8b", {"intermediate_size": 14336, "vocab_size": 128256, "num_key_value_heads": 8}),
    ],
)
def test_published_experiments_dry_run_without_weights(name, sizes, tmp_path):
    """From a local config alone: the architecture on the meta device has the 289 sites of the published files."""
    from transformers import LlamaConfig

    from spikellm.kernels.hadamard import order
    from spikellm.model.load import empty_model
    from spikellm.model.sites import check_architecture, decoder_layers, sites

    LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, **sizes).save_pretrained(tmp_path)
    model = empty_model(configure(f"experiment={name}", f"model.path={tmp_path}").model)
    check_architecture(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert len(list(sites(len(decoder_layers(model))))) == 289
    assert order(model.config.intermediate_size) == model.config.intermediate_size  # R4 has a construction


def test_figures_of_another_model_t_or_grain_are_not_compared():
    reference = configure("experiment=published_llama2_7b").reference
    assert reference.figures("llama2_7b", 8, "2")
    for other in (("tiny", 8, "2"), ("llama2_7b", 7, "2"), ("llama2_7b", 8, "auto")):
        assert reference.figures(*other) == {}
