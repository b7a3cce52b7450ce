"""Virtual time for real code: processes with an event loop each, blocking calls, freezes and kills; one seed, one life.

Nothing here waits for a clock. All that is going to happen lies in one heap, ordered by virtual time; a process is an
asyncio event loop whose handles lie there as well. Blocking code (what asyncio hands to threads) runs as a `Fiber`: a
greenlet that runs only while the world stands still and waits for it, so the order of all steps depends on the seed
alone.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections.abc import Callable
from typing import Any, cast

from greenlet import getcurrent, greenlet

STEPS_MAX = 400_000
"""Of one life; far over what any needs, so that a life which spins is an error and not a hang."""
UNWIND_STEPS_MAX = 20_000


class Killed(BaseException):
    """Raised in the code of a process that has been killed, so that its threads and tasks come to an end."""


class World:
    """Virtual time, the heap of what is going to happen, and who is running now. One at a time in a Python process."""

    current: World

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.process: Process | None = None
        self.fiber: Fiber | None = None
        self.processes: list[Process] = []
        self.steps = 0
        self._heap: list[tuple[float, int, Process | None, asyncio.Handle]] = []
        self._numbers = itertools.count()
        World.current = self

    def push(self, delay_s: float, process: Process | None, handle: asyncio.Handle) -> None:
        heapq.heappush(self._heap, (self.now + delay_s, next(self._numbers), process, handle))

    def later(self, delay_s: float, work: Callable[..., object], *args: Any) -> None:
        """`work`, in nobody's process: what the network, the store or fate does."""
        self.push(delay_s, None, asyncio.Handle(work, args, cast(Any, _Nobody)))

    def run(self, until: Callable[[], bool], limit_s: float) -> bool:
        """Lets things happen until `until` holds; False when `limit_s` of virtual time have passed first."""
        end = self.now + limit_s
        while not until():
            if not self._heap or self._heap[0][0] > end:
                self.now = end
                return False
            self.now, _, process, handle = heapq.heappop(self._heap)
            self.steps += 1
            if self.steps > STEPS_MAX:
                raise RuntimeError(f"more than {STEPS_MAX} steps: something spins")
            if handle.cancelled() or (process is not None and process.dead):
                continue
            if process is not None and process.frozen:
                process.stash.append(handle)
                continue
            self.step(process, handle)
        return True

    def take_ready(self, process: Process) -> list[asyncio.Handle]:
        """What a process would have done next, but for its timers."""
        mine = [(at, number, handle) for at, number, owner, handle in self._heap if owner is process]
        waiting = [*process.stash, *(handle for _, _, handle in sorted(mine, key=lambda entry: entry[:2]))]
        return [handle for handle in waiting if not isinstance(handle, asyncio.TimerHandle)]

    def step(self, process: Process | None, handle: asyncio.Handle) -> None:
        before, self.process = self.process, process
        outer = asyncio._get_running_loop()
        asyncio._set_running_loop(process.loop if process else None)
        try:
            handle._run()
        finally:
            asyncio._set_running_loop(outer)
            self.process = before

    def sleep(self, seconds: float) -> None:
        """Parks the blocking call that runs now."""
        fiber = self.fiber
        assert fiber is not None, "only blocking code sleeps"
        fiber.process.loop.call_later(seconds, fiber.resume)
        fiber.park()

    def pause(self, low_s: float, high_s: float) -> float:
        return self.rng.uniform(low_s, high_s)


class _Nobody:
    """The loop that asyncio's handles of no process are given: all that they ask is whether to debug."""

    @staticmethod
    def get_debug() -> bool:
        return False

    @staticmethod
    def call_exception_handler(context: dict[str, Any]) -> None:
        raise context["exception"]


class Process:
    """One operating system's process. `wall_off_s` is how wrong its clock on the wall is."""

    def __init__(self, world: World, name: str, wall_off_s: float = 0.0) -> None:
        self.world, self.name, self.wall_off_s = world, name, wall_off_s
        self.dead = self.frozen = False
        self.stash: list[asyncio.Handle] = []
        self.fibers: set[Fiber] = set()
        self.on_death: list[Callable[[], None]] = []
        self.place: Any = None
        """Whatever runs it: the cluster that it belongs to."""
        self.loop = Loop(self)
        self.errors: list[str] = []
        self.reads: dict[str, float] = {}
        """Object of the store → when the store carried out the last read of it that was answered here."""
        world.processes.append(self)

    def wall(self) -> float:
        """Seconds since the epoch, as this process believes."""
        return 1.8e9 + self.world.now + self.wall_off_s

    def spawn(self, coroutine: Any) -> None:
        """Runs a coroutine as a task of this process, from now on."""
        if self.dead:
            coroutine.close()
            return
        self.loop.call_soon(self.loop.create_task, coroutine)

    def freeze(self) -> None:
        """SIGSTOP: nothing of it runs, and what is meant for it waits."""
        self.frozen = True

    def thaw(self) -> None:
        """SIGCONT: it goes on where it was, and believes what it believed."""
        self.frozen = False
        stash, self.stash = self.stash, []
        for handle in stash:
            self.world.push(0.0, self, handle)

    def kill(self) -> None:
        """SIGKILL: from now on it changes nothing; its tasks and threads are unwound with no effect outside."""
        if self.dead:
            return
        self.dead = True
        for fiber in list(self.fibers):
            if fiber is not self.world.fiber:
                fiber.resume(Killed())
        self.loop.unwind()
        for work in self.on_death:
            work()


class Fiber:
    """A blocking call: a greenlet, which runs only between `resume` and its next `park`."""

    def __init__(self, process: Process, work: Callable[[], None]) -> None:
        self.process, self._work = process, work
        self._greenlet = greenlet(self._run)
        process.fibers.add(self)

    def resume(self, error: BaseException | None = None) -> None:
        """Runs it until it parks or ends. With `error`, its park raises that."""
        if self._greenlet.dead:
            return
        world, loop = self.process.world, asyncio._get_running_loop()
        before, world.fiber = (world.fiber, world.process), self
        world.process = self.process
        self._greenlet.parent = getcurrent()
        asyncio._set_running_loop(None)  # blocking code has none
        try:
            self._greenlet.switch(error)
        finally:
            asyncio._set_running_loop(loop)
            world.fiber, world.process = before

    def park(self) -> None:
        """Gives the word back; returns when it is resumed. Raises `Killed` if the process has died meanwhile."""
        if self.process.dead:
            raise Killed
        resumer = self._greenlet.parent
        assert resumer is not None, "a fiber that runs was resumed"
        error = resumer.switch()
        if error is not None:
            raise error

    def _run(self, error: BaseException | None) -> None:
        try:
            if error is None:
                self._work()
        except Killed:
            pass
        except BaseException as error:  # of a thread that the product started itself
            self.process.errors.append(f"{self.process.name}: a thread ended with {error!r}")
        finally:
            self.process.fibers.discard(self)


class Loop(asyncio.AbstractEventLoop):
    """One process's event loop: what asyncio itself, and the product, ask of one. Time is the world's."""

    def __init__(self, process: Process) -> None:
        self._process, self._world = process, process.world
        self._unwinding: list[asyncio.Handle] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    def time(self) -> float:
        return self._world.now

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        if self._unwinding is not None:
            self._unwinding.append(handle)
        elif not self._process.dead:
            self._world.push(0.0, self._process, handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        return self.call_at(self._world.now + delay, callback, *args, context=context)

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        if not self._process.dead:
            self._world.push(max(0.0, when - self._world.now), self._process, handle)
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Asked by asyncio; a cancelled handle is passed over when its time comes."""

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: str | None = None, context: Any = None) -> asyncio.Task[Any]:  # type: ignore[override]
        task = asyncio.Task(coro, loop=self, name=name or "task", context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """A fiber; one of an executor of one thread starts when the one before has ended, since none parks there."""
        future = self.create_future()
        if self._process.dead:
            future.cancel()
            return future

        def settle(error: BaseException | None, result: Any) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        def work() -> None:
            try:
                result, problem = func(*args), None
            except Exception as error:
                result, problem = None, error
            self.call_soon(settle, problem, result)

        self.call_soon(Fiber(self._process, work).resume)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not self._process.dead and not isinstance(error, Killed):
            self._process.errors.append(f"{self._process.name}: {context.get('message')}: {error!r}")

    def unwind(self) -> None:
        """Cancels every task of a dead process and runs what that leads to; nothing of it has any effect outside."""
        self._unwinding = self._world.take_ready(self._process)
        for task in list(self._tasks):
            task.cancel()
        steps = 0
        while self._unwinding and steps < UNWIND_STEPS_MAX:
            ready, self._unwinding = self._unwinding, []
            for handle in ready:
                steps += 1
                if not handle.cancelled():
                    self._world.step(self._process, handle)
        self._unwinding = None
        for task in self._tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
