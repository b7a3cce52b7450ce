"""A memory for a checkpoint of another maker: what it recalls before and after it was trained, beside frozen weights.

    python benchmarks/attach.py [--speak 5] [--minutes 18] [--length 16384] [--runs 5] [--threads 2] [--json FILE]

The checkpoint is made here, since nobody may be asked to download one: a small Llama of transformers, with a
tokenizer, a chat template and shards of its own, that learns for `--speak` minutes to chat and to answer about what
nobody told it, and so to answer wrongly. Then `titanmem train --model` teaches a memory for `--minutes`. Needles have
names and values that neither has seen; text to train on and text to hide them in are different parts of the book.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.report import report  # noqa: E402
from cluster.allocator import keep_memory  # noqa: E402
from cluster.needle_bench import NeedleOptions, run_needle_bench  # noqa: E402
from tests.foreign_model import foreign_folder  # noqa: E402
from titanmem.checkpoint import decoder_hash  # noqa: E402
from titanmem.corpus import read_text, words_of  # noqa: E402
from titanmem.facts import FactMaker  # noqa: E402
from titanmem.needles import heldout_needles, write_needles  # noqa: E402
from titanmem.phrasebook import FOLDER, load  # noqa: E402
from titanmem.precision import quick_products  # noqa: E402
from titanmem.start import Start, beside, spoken_samples  # noqa: E402
from titanmem.stream import BatchMaker  # noqa: E402
from titanmem.train import Trainer  # noqa: E402
from titanmem.train_config import TrainConfig  # noqa: E402

BOOK = ROOT / "examples" / "decline-and-fall.txt.xz"
TRAINED_ON, HIDDEN_IN = slice(0, 1_500_000), slice(1_500_000, 4_000_000)
"""Characters of the book."""
VOCABULARY, WIDTH, LAYERS = 8192, 192, 4
TOKENS, LR = 256, 3e-3
KINDS = """
@ color | about: me, relation, person | value: color, word
= {S's} favorite color is {v}.
= {S} [like|likes] the color {v} best.
? What is {S's} favorite color?
@ city | about: me, relation, person | value: city, name
= {S} [live|lives] in {v}.
= {v} is where {S} [live|lives].
? Where [do|does] {S} live?
@ pet | about: me, relation, person | value: animal, word
= {S's} pet is a {v}.
? What pet [do|does] {S} have?
@ fruit | about: me, relation, person | value: fruit, word
= {S} [eat|eats] {v} every day.
? Which fruit [do|does] {S} eat?
@ friend | about: me, relation, person | value: name, fullname
= {S's} best friend is called {v}.
? What is {S's} best friend called?
"""
"""As in the product's own phrase book, a list of values has words and names beside it: from lists alone, values are
learned by heart, and a value of no list is not read back."""


def phrase_book(folder: Path) -> Path:
    """A phrase book of a few kinds of facts: the checkpoint is to show the way, not to know the world."""
    folder.mkdir()
    for name in ("values.txt", "talk.txt"):
        (folder / name).write_text((FOLDER / name).read_text("utf-8"), "utf-8")
    (folder / "kinds.txt").write_text(KINDS, "utf-8")
    return folder


def taught_to_speak(folder: Path, start: Start, minutes: float) -> float:
    """Trains the checkpoint in `folder` on chat and book text, by next-token prediction; its last loss."""
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    facts = FactMaker(start.words, start.phrases, seed=7)
    batches = BatchMaker(start.speech, start.book, facts, tokens=TOKENS, spoken=12, silent=0, books=4)
    steps = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    began, loss = time.monotonic(), torch.zeros(())
    while (progress := (time.monotonic() - began) / (60 * minutes)) < 1:
        for group in steps.param_groups:
            group["lr"] = LR * (1 - progress)
        tokens = torch.from_numpy(batches.make().tokens).long()
        with quick_products():
            logits = model(tokens[:, :-1]).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        steps.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        steps.step()
    model.save_pretrained(folder, max_shard_size="2MB")
    return float(loss.detach())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--speak", type=float, default=5.0, help="minutes that the checkpoint itself is trained"
    )
    parser.add_argument("--minutes", type=float, default=18.0, help="minutes that the memory is trained")
    parser.add_argument("--length", type=int, default=16384, help="tokens that the needles are hidden in")
    parser.add_argument("--runs", type=int, default=5, help="haystacks, 20 needles each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None, help="file for the figures")
    asked = parser.parse_args()
    keep_memory()
    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory(prefix="titanmem-attach-") as scratch:
        report(drill(Path(scratch), asked), asked.json)


def drill(scratch: Path, asked: argparse.Namespace) -> dict[str, object]:
    """All of it in one folder; the figures."""
    text = read_text(BOOK)
    book, haystack, needles = scratch / "book.txt", scratch / "haystack.txt", scratch / "needles.jsonl"
    book.write_text(text[TRAINED_ON], "utf-8")
    haystack.write_text(text[HIDDEN_IN], "utf-8")
    phrases, words = phrase_book(scratch / "phrases"), words_of([text[TRAINED_ON]])
    write_needles(needles, heldout_needles(words, load(phrases), 400, seed=5))
    samples = [*spoken_samples(words, load(phrases), 5000), text[TRAINED_ON]]
    folder = foreign_folder(scratch / "llama", samples, vocab_size=VOCABULARY, width=WIDTH, layers=LAYERS)
    config = TrainConfig(
        out=folder, model=folder, data=(book,), phrases=phrases, minutes=asked.minutes, tokens=TOKENS,
        threads=asked.threads,
    )  # fmt: skip
    loss = taught_to_speak(folder, beside(config, folder, words), asked.speak)
    base = decoder_hash(folder)

    def recalled() -> dict[str, object]:
        options = NeedleOptions(
            lengths=(asked.length,), runs=asked.runs, needles=needles, haystack=haystack, model=folder
        )
        (row,) = run_needle_bench(options)["lengths"]
        return {name: row[name] for name in ("recall", "queries", "facts", "written_share")}

    trainer = Trainer(config, beside(config, folder, words))
    trainer.save()
    before = recalled()
    trainer.run(lambda figures: print(figures, file=sys.stderr, flush=True))
    return {
        "checkpoint": f"Llama, {LAYERS} layers of {WIDTH}, {VOCABULARY} tokens, in shards",
        "its loss": round(loss, 3),
        "steps": trainer.step,
        "untrained memory": before,
        "trained memory": recalled(),
        "weights unchanged": decoder_hash(folder) == base,
    }


if __name__ == "__main__":
    main()
