"""Make `benchmarks/needles/heldout.jsonl`: facts with values, names and keys that training never used.

python benchmarks/make_needles.py TEXT… : give the texts that the model was trained on; their words are split once,
by hash, and only the part that training leaves out is used here.
"""

import sys
from pathlib import Path

from titanmem.corpus import read_text, words_of
from titanmem.needles import heldout_needles, write_needles
from titanmem.phrasebook import load

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python benchmarks/make_needles.py TEXT…")
    words = words_of([read_text(Path(name)) for name in sys.argv[1:]])
    write_needles(
        Path(__file__).parent / "needles" / "heldout.jsonl", heldout_needles(words, load(), 2_200, seed=7)
    )
