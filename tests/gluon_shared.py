"""Shared memory, barriers and partitions of one program in the NumPy executor (gluon_numpy)."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from gluon_tensors import DType, Fault, Tensor

# States of an element of shared memory. LANDED: waited for, but other threads need a barrier.
NEVER, VALID, FLYING, LANDED = 0, 1, 2, 3


class Alloc:
    """Shared memory of one allocation: values and, per element, its state and who has read it."""

    def __init__(self, count: int, dtype: DType):
        self.dtype, self.data = dtype, np.zeros(count, dtype.storage)
        self.state, self.unread = np.full(count, NEVER, np.int8), np.zeros(count, bool)
        self.read_epoch = np.full(count, -1)

    def overwrite(self, where: np.ndarray, block: Block) -> None:
        if (self.state[where] >= FLYING).any():
            raise Fault("shared memory is overwritten while a copy into it is in flight")
        if self.unread[where].any():
            raise Fault("shared memory is overwritten before it was read")
        if block.lockstep and (self.read_epoch[where] == block.epoch).any():
            raise Fault("shared memory is overwritten with no barrier since it was read")

    def read(self, where: np.ndarray, block: Block) -> np.ndarray:
        state = self.state[where]
        if (state == NEVER).any():
            raise Fault("shared memory is read that was never written")
        if (state != VALID).any():
            raise Fault("shared memory is read before its copy was waited for, or before a barrier")
        self.unread[where], self.read_epoch[where] = False, block.epoch
        return self.data[where]


class Shared:
    """A view of shared memory: `where` holds the place of each element in its allocation."""

    def __init__(self, alloc: Alloc, where: np.ndarray, block: Block):
        self.alloc, self.where, self.block = alloc, where, block

    shape = property(lambda self: self.where.shape)
    dtype = property(lambda self: self.alloc.dtype)

    def index(self, i):
        i = int(i)
        if not 0 <= i < self.where.shape[0]:
            raise Fault(f"shared memory index {i} of {self.where.shape[0]}")
        return Shared(self.alloc, self.where[i], self.block)

    def slice(self, start, length, dim=0):
        start = int(start)
        if not 0 <= start <= self.where.shape[dim] - length:
            raise Fault(f"shared memory slice {start}:{start + length} of {self.where.shape[dim]}")
        cut = [slice(None)] * self.where.ndim
        cut[dim] = slice(start, start + length)
        return Shared(self.alloc, self.where[tuple(cut)], self.block)

    def reshaped(self, shape):
        return Shared(self.alloc, self.where.reshape(shape), self.block)

    def load(self, layout=None) -> Tensor:
        return Tensor(self.alloc.read(self.where, self.block), self.dtype)

    def store(self, value: Tensor) -> None:
        if value.shape != self.shape:
            raise Fault(f"a tensor {value.shape} is stored to shared memory {self.shape}")
        self.alloc.overwrite(self.where, self.block)
        self.alloc.data[self.where] = value.a
        self.alloc.state[self.where], self.alloc.unread[self.where] = VALID, True


class Swizzled128:
    """Stands for NVMMASharedLayout: rows of 128 bytes, 16-byte units permuted by the row."""


class Barrier:
    """An mbarrier: arrivals and bytes still expected in the phase, and copies that land with it."""

    def __init__(self):
        self.count = None

    def init(self, count):
        self.count, self.pending, self.fenced = count, count, False
        self.bytes, self.phase, self.flying, self.landed = 0, 0, [], []

    def settle(self):
        if self.pending == 0 and self.bytes == 0:
            self.landed, self.flying = self.flying, []
            self.phase, self.pending = self.phase + 1, self.count


class Barriers:
    def __init__(self, shape):
        self.rows = [Barrier() for _ in range(shape[0])]

    def index(self, i):
        if not 0 <= int(i) < len(self.rows):
            raise Fault(f"barrier {int(i)} of {len(self.rows)}")
        return self.rows[int(i)]


class Block:
    """One program: its id, shared memory, copies in flight and partitions."""

    def __init__(self, pid, grid, schedule):
        self.pid, self.grid, self.schedule = pid, grid, schedule
        self.epoch, self.lockstep = 0, True
        self.groups: list[list[np.ndarray]] = []  # committed cp.async groups, oldest first
        self.open: list[tuple[Alloc, np.ndarray]] = []
        self.landed: list[tuple[Alloc, np.ndarray]] = []
        self.arena: Alloc | None = None
        self.barriers: list[Barrier] = []
        self.turn: Any = None

    def partitions(self, calls) -> None:
        """Run `calls` as partitions, one at a time, switching where one waits."""
        self.lockstep = False
        baton = threading.Condition()
        state = {"turn": None, "waits": [None] * len(calls), "done": [False] * len(calls)}
        errors: list[BaseException] = []

        def wait_turn(i):
            while state["turn"] != i:
                baton.wait()
            if errors:
                raise SystemExit

        def body(i, fn, args):
            with baton:
                try:
                    wait_turn(i)
                    fn(*args)
                except SystemExit:
                    pass
                except BaseException as error:
                    errors.append(error)
                state["done"][i], state["turn"] = True, None
                baton.notify_all()

        def pause(i, ready):
            state["waits"][i], state["turn"] = ready, None
            baton.notify_all()
            wait_turn(i)
            state["waits"][i] = None

        local = threading.local()
        self.turn = lambda ready: pause(local.i, ready)

        def named(i, fn, args):
            local.i = i
            body(i, fn, args)

        threads = [
            threading.Thread(target=named, args=(i, *call), daemon=True)
            for i, call in enumerate(calls)
        ]
        for thread in threads:
            thread.start()
        with baton:
            while not all(state["done"]):
                order = self.schedule(len(calls))
                able = [
                    i
                    for i in order
                    if not state["done"][i] and (state["waits"][i] is None or state["waits"][i]())
                ]
                if not able and not errors:
                    stuck = [i for i, done in enumerate(state["done"]) if not done]
                    errors.append(Fault(f"deadlock: partitions {stuck} wait for ever"))
                live = [i for i in order if not state["done"][i]]
                state["turn"] = (able or live)[0]
                baton.notify_all()
                while state["turn"] is not None:
                    baton.wait()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        self.turn, self.lockstep, self.epoch = None, True, self.epoch + 1
