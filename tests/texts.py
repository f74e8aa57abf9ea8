"""Texts and benchmarks of known content."""

from pathlib import Path

import torch

from spikellm.config.choices import DatasetSource
from spikellm.config.dataset import TextConfig


def text_config(path: Path | str | None, **options) -> TextConfig:
    return TextConfig(source=DatasetSource.text, path=None if path is None else str(path), **options)


def words(generator: torch.Generator, count: int) -> str:
    return " ".join("".join(chr(97 + int(letter)) for letter in torch.randint(0, 26, (4,), generator=generator)) for _ in range(count))


def random_rows(task: str, count: int = 24, seed: int = 0) -> list[dict]:
    """Rows of a benchmark with choices of different lengths."""
    g = torch.Generator().manual_seed(seed)

    def pick(n: int) -> int:
        return int(torch.randint(0, n, (1,), generator=g))

    def choices(n: int) -> list[str]:
        return [words(g, 1 + pick(4)) for _ in range(n)]

    def row() -> dict:
        match task:
            case "winogrande":
                option1, option2 = choices(2)
                return {"sentence": f"{words(g, 2)} _ {words(g, 2)}", "option1": option1, "option2": option2, "answer": "12"[pick(2)]}
            case "piqa":
                sol1, sol2 = choices(2)
                return {"goal": words(g, 3), "sol1": sol1, "sol2": sol2, "label": pick(2)}
            case "hellaswag":
                return {"activity_label": "A", "ctx_a": words(g, 2), "ctx_b": words(g, 1), "endings": choices(4), "label": str(pick(4))}
        return {"question": words(g, 3), "choices": {"text": choices(3), "label": ["A", "B", "C"]}, "answerKey": "ABC"[pick(3)]}

    return [row() for _ in range(count)]
