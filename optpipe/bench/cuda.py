"""What a backend needs of a GPU, through torch: memory, one stream, events, captured graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def uuid() -> str:
    """Of the current GPU, as NVML calls it."""
    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"


class Cuda:
    """One stream of the current GPU; memory is torch's, so that it is counted."""

    def __init__(self) -> None:
        self.name = torch.cuda.get_device_name()
        self.stream = torch.cuda.Stream()
        self._outside = 0
        self._steps: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = []

    @property
    def handle(self) -> int:
        return int(self.stream.cuda_stream)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        with self.work():  # on another stream, nothing would keep it from coming later
            return torch.zeros(shape, dtype=dtype, device="cuda")

    def staging(self, shape: tuple[int, ...]) -> Tensor:
        """Page-locked int64 on the host, which copies without waiting."""
        return torch.zeros(shape, dtype=torch.int64, pin_memory=True)

    @contextmanager
    def work(self) -> Iterator[None]:
        """What torch does inside goes to the stream."""
        with torch.cuda.stream(self.stream):
            yield

    def wait(self) -> None:
        """Until the stream has done all that it was given."""
        self.stream.synchronize()

    @contextmanager
    def counted(self) -> Iterator[None]:
        """What is taken inside, past torch, counts as memory of this process from now on.

        Workers load one after another, so that nobody else takes memory meanwhile.
        """
        free, reserved = torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()
        yield
        taken = free - torch.cuda.mem_get_info()[0] - (torch.cuda.memory_reserved() - reserved)
        self._outside += max(0, taken)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        """Peak of torch's memory, and all that was counted."""
        return torch.cuda.max_memory_allocated() + self._outside

    @contextmanager
    def timed(self, more: bool = False) -> Iterator[None]:
        """Between two events, for :meth:`device_s`; ``more``: still the step of the last time."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(self.stream)
        yield
        end.record(self.stream)
        if not more:
            self._steps.append([])
        self._steps[-1].append((start, end))

    def device_s(self) -> tuple[float, ...]:
        """Seconds between the events of each step since the last call; waits for the stream."""
        self.wait()
        found = tuple(sum(a.elapsed_time(b) for a, b in step) / 1e3 for step in self._steps)
        self._steps.clear()
        return found

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """A replay of what ``enqueue`` puts into the stream, as one launch."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            enqueue()

        def replay() -> None:
            with torch.cuda.stream(self.stream):
                graph.replay()

        return replay
