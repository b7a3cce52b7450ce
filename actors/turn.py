"""One chat turn of one user: what is new is journalled, the reply generated, and both written before it is done.

Reads before writes: the reply reads θ_M as it was before the last chunk of the prompt, which attention sees anyway;
that chunk and the reply are folded when the reply has ended (Titans, section 4.1: read, then write). A turn that is
cancelled ends in the same way, with the part of the reply that was made.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from actors.engine import Ending, Engine, Generation
from actors.messages import ChatCall, DoneEvent, TokenEvent
from actors.roster import Roster
from actors.seen import remember, update_hash
from actors.slab import Resident
from storage.segment import SEGMENT_TOKENS_MAX, Segment
from titanmem.fold import Fold
from titanmem.tokenizer import ChatTokenizer, prefix_hash
from titanmem.tracing import continued

Event = TokenEvent | DoneEvent | BaseException


def joined(parts: list[np.ndarray]) -> np.ndarray:
    """int32: arrays of ids end to end, none at all included."""
    return np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32)


@dataclass(kw_only=True, eq=False)
class Turn:
    """Runs as a task of its own, so that a client who leaves interrupts the reply and not the writing."""

    call: ChatCall
    engine: Engine
    roster: Roster
    tokenizer: ChatTokenizer
    seed: int
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    cancelled: bool = False
    generation: Generation | None = None
    folds: list[Fold] = field(default_factory=list)

    def cancel(self) -> None:
        """The client has gone: the lane is free after the step that runs."""
        self.cancelled = True
        if self.generation is not None:
            self.engine.cancel(self.generation)

    async def run(self) -> None:
        """The whole turn; its events, or what went wrong, go to `events`."""
        try:
            if self.call.memory == "off":
                done = await self._reply(None)
            else:
                with continued(self.call.trace, "search_memory", titan__memory=self.call.memory):
                    async with self.roster.turn(self.call.key) as resident:
                        done = await self._remembering(resident)
                        self.roster.store_soon(resident)
                if self.call.memory == "read_write":
                    await self.roster.replicator.durable(self.call.key)
            self.events.put_nowait(done)
        except BaseException as error:
            self.events.put_nowait(error)
            if not isinstance(error, Exception):
                raise

    async def _remembering(self, resident: Resident) -> DoneEvent:
        if resident.frozen:
            done = await self._reply(None)
            return replace(done, memory="off", memory_version=resident.memory_version, frozen=True)
        if self.call.memory == "read_only":
            return await self._reply(resident)
        waiting = await self._journal_prompt(resident)
        try:
            done = await self._reply(resident)
            await self._journal_reply(resident, done, waiting)
        finally:
            # What the journal has comes into the memory, also when the reply failed: its next segment counts on from
            # there, and a retry is told that these are written.
            with continued(self.call.trace, "update_memory"):
                for segment in waiting:
                    self.folds.append(await self.roster.fold(resident, segment))
        return DoneEvent(
            finish_reason=done.finish_reason, prompt_tokens=done.prompt_tokens,
            completion_tokens=done.completion_tokens, memory_version=resident.memory_version,
            tokens_written=sum(fold.tokens_written for fold in self.folds),
            surprise=max((fold.surprise for fold in self.folds), default=0.0), text=done.text, memory=done.memory,
        )  # fmt: skip

    async def _journal_prompt(self, resident: Resident) -> list[Segment]:
        """Journal what of the conversation is new; all but its last chunk is folded at once. Returns that chunk."""
        messages = self.call.messages
        # The last message is what the user says now, even if the same was said before: Rex, then Max, then Rex again.
        # A retry of this very request is known by its update id.
        known = max((i + 1 for i, m in enumerate(messages[:-1]) if m.prefix_hash in resident.seen), default=0)
        new = joined([message.tokens for message in messages[known:]])
        context = joined([message.tokens for message in messages[:known]])
        seen = [message.prefix_hash for message in messages[known:]]
        if not len(new):
            return []
        chunk = self.roster.spec.chunk_size
        head = (len(new) - 1) // chunk * chunk
        cuts = [*range(0, head, SEGMENT_TOKENS_MAX), head, len(new)] if head else [0, len(new)]
        last: list[Segment] = []
        with continued(self.call.trace, "journal"):
            for number, (start, end) in enumerate(pairwise(cuts)):
                final = end == len(new)
                segment = self.roster.segment(
                    resident, update_id=f"{self.call.update_id}:in:{number}", conversation=self.call.conversation,
                    role="user", context=joined([context, new[:start]]), tokens=new[start:end],
                )  # fmt: skip
                if not await self._append(resident, segment, seen if final else []):
                    continue
                if final:
                    last = [segment]
                else:
                    self.folds.append(await self.roster.fold(resident, segment))
        return last

    async def _journal_reply(self, resident: Resident, done: DoneEvent, waiting: list[Segment]) -> None:
        """Journal what the reply added to the conversation, so that nobody writes it again; it goes to `waiting`."""
        prompt = joined([message.tokens for message in self.call.messages])
        reply = joined([self.call.generation_prompt, np.array(self._ids, np.int32)])
        before = self.call.messages[-1].prefix_hash if self.call.messages else 0
        for number, start in enumerate(range(0, len(reply), SEGMENT_TOKENS_MAX)):
            tokens = reply[start : start + SEGMENT_TOKENS_MAX]
            segment = self.roster.segment(
                resident, update_id=f"{self.call.update_id}:out:{number}", conversation=self.call.conversation,
                role="assistant", context=joined([prompt, reply[:start]]), tokens=tokens,
            )  # fmt: skip
            seen = [prefix_hash(before, "assistant", done.text)] if start + len(tokens) == len(reply) else []
            if await self._append(resident, segment, seen):
                waiting.append(segment)

    async def _append(self, resident: Resident, segment: Segment, seen: list[int]) -> bool:
        """Journal a segment; False if it is written already, which the memory knows even where no journal does."""
        if update_hash(segment.update_id) not in resident.seen and await self.roster.append(
            resident, [segment], seen
        ):
            return True
        remember(resident, seen)
        return False

    async def _reply(self, resident: Resident | None) -> DoneEvent:
        """Generate; events go out as they come. The ids made so far are in `_ids` afterwards."""
        prompt = joined([*(message.tokens for message in self.call.messages), self.call.generation_prompt])
        loop, steps = asyncio.get_running_loop(), asyncio.Queue[int | Ending | BaseException]()

        def hand(item: int | Ending | BaseException) -> None:
            loop.call_soon_threadsafe(steps.put_nowait, item)

        call = self.call
        self._ids: list[int] = []
        generation = Generation(
            prompt=self.engine.prompt_of(prompt), resident=resident, mode=call.mode or self.roster.spec.mode,
            max_tokens=call.max_tokens, temperature=call.temperature, top_p=call.top_p,
            seed=self.seed if call.seed is None else call.seed,
            stop_ids=self.tokenizer.stop_ids, emit=hand, finish=hand,
        )  # fmt: skip
        self.generation = generation
        self.engine.submit(generation)
        if self.cancelled:
            self.engine.cancel(generation)
        ending, text = await self._follow(steps, generation)
        return DoneEvent(
            finish_reason=ending, prompt_tokens=len(prompt), completion_tokens=len(self._ids),
            memory_version=resident.memory_version if resident else 0, tokens_written=0, surprise=0.0, text=text,
            memory=call.memory,
        )  # fmt: skip

    async def _follow(self, steps: asyncio.Queue, generation: Generation) -> tuple[Ending, str]:
        """Pass tokens on until the reply ends, by itself or at a stop string; its ending and its text."""
        stopped: str | None = None
        while True:
            item = await steps.get()
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, str):
                ending: Ending = "stop" if stopped is not None and item == "cancelled" else item  # type: ignore[assignment]
                return ending, self.tokenizer.decode(self._ids) if stopped is None else stopped
            if stopped is not None:
                continue  # made by the step that ran while the stop string was found
            self._ids.append(item)
            self.events.put_nowait(TokenEvent(tokens=(item,)))
            if self.call.stop:
                stopped = cut_at(self.tokenizer.decode(self._ids), self.call.stop)
                if stopped is not None:
                    self.engine.cancel(generation)


def cut_at(text: str, stops: tuple[str, ...]) -> str | None:
    """The text before the first stop string; None when there is none in it."""
    found = [text.find(stop) for stop in stops if stop in text]
    return text[: min(found)] if found else None
