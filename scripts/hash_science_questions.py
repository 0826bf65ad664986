"""Write `moka_pl/data/science_questions.npz` from the LLM-Adapters training files of ARC and OpenBookQA.

    python scripts/hash_science_questions.py FOLDER

FOLDER holds arc_easy/train.json, arc_challenge/train.json and openbookqa/train.json. The file keeps a 32-bit
hash of every question, nothing of its text.
"""

import sys
from pathlib import Path

import numpy

from moka_pl.data.llm_adapters import fingerprint, parse_llm_adapters
from moka_pl.data.streams import stream

TASKS = ("arc_easy", "arc_challenge", "openbookqa")
OUT = Path(__file__).parents[1] / "moka_pl" / "data" / "science_questions.npz"


def main(folder: Path) -> None:
    """Hash the questions of the three tasks."""
    hashes = {}
    for task in TASKS:
        found = {
            fingerprint(question, options)
            for where, record in stream(folder / task / "train.json")
            for question, options, _ in [parse_llm_adapters(record, where)]
        }
        hashes[task] = numpy.array(sorted(found), dtype=numpy.uint32)
        print(f"{task}: {len(found)} different questions")
    numpy.savez_compressed(OUT, **hashes)
    print(f"{OUT}: {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
