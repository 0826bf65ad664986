"""The page on global changes names what the code sets and reads for the whole process."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "global-changes.md").read_text(encoding="utf-8")
CODE = {file: file.read_text(encoding="utf-8") for file in (ROOT / "moka_pl").rglob("*.py")}


def test_it_names_every_environment_variable() -> None:
    found = set()
    for text in CODE.values():
        found |= set(re.findall(r"environ(?:\.\w+\(|\[)\"(\w+)\"", text))
        found |= set(re.findall(r"\"((?:CUDA|OMP|MKL|TOKENIZERS|PL|HF)_\w+)\"", text))
    assert {"TOKENIZERS_PARALLELISM", "MOKA_PL_CACHE", "CUDA_VISIBLE_DEVICES"} <= found
    assert not {name for name in found if f"`{name}`" not in PAGE}


def test_it_names_every_warning_that_stays_filtered() -> None:
    kept = set()
    for file, text in CODE.items():
        if "catch_warnings" not in text:
            kept |= {(file.name, words) for words in re.findall(r"filterwarnings\((.*)\)", text)}
    told = ("loftq_config", "LeafSpec", "IterableDataset", "It is recommended to use")
    assert len(kept) == len(told)
    for _, words in kept:
        assert any(part in words and part in PAGE for part in told), words
