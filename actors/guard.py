"""What is to be done about a memory that goes wrong: decisions, which others carry out.

Two bounds are part of the fold itself (`titanmem/bounds.py`), since what they do must come out the same when the
journal is replayed; here they are only noticed. Recall is judged here, and `actors/watch.py` acts on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum

from titanmem.bounds import UTILISATION_MAX
from titanmem.fold import Fold

RECALL_FALL_MAX = 0.05
"""Share of the probes that the last good version answered which a memory may answer no more."""
PROBES_LOST_MIN = 3
"""Fewer lost probes than these are chance, however few there are."""
FALLS_MAX = 1
"""Falls after which a memory is only taken back; the next one freezes it."""


class Action(StrEnum):
    """What is done, and how it is counted (`titan:rollbacks_total{reason}`)."""

    RAISE_THRESHOLD = "raise_threshold"
    """Of a chunk only the most surprising tokens were written."""
    MORE_DECAY = "more_decay"
    """Rewritten columns were forgotten faster."""
    WAIT = "wait"
    """What was told crowds what was known: judged again after the next consolidation, which may mend it. Until then no
    version is stored, so that the newest stored one is always a good one."""
    ROLL_BACK = "recall"
    """The memory is made again from its last good version."""
    FREEZE = "frozen"
    """The same, and from here on it is neither read nor written."""


def on_fold(done: Fold) -> Iterator[Action]:
    """What the bounds did while a segment was folded."""
    if done.passed_over:
        yield Action.RAISE_THRESHOLD
    if done.utilisation > UTILISATION_MAX:
        yield Action.MORE_DECAY


def has_fallen(asked: int, answered: int) -> bool:
    """Whether so many answers of `asked` probes, all of which were answered once, are too few."""
    lost = asked - answered
    return lost >= PROBES_LOST_MIN and lost > RECALL_FALL_MAX * asked


def on_fall(*, by_tokens: bool, rested: bool, falls: int) -> Action:
    """What to do about a memory whose recall has fallen.

    `by_tokens`: the last good version and the tokens since then, folded again, have fallen as well. Otherwise what is
    in the slot is not what was told, and there is nothing to wait for. `rested`: all that was told is consolidated.
    `falls`: how often this was decided before.
    """
    if by_tokens and not rested:
        return Action.WAIT
    return Action.FREEZE if falls >= FALLS_MAX else Action.ROLL_BACK
