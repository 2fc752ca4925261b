"""Work that a job does not wait for: one piece at a time in a thread, on copies of what goes on
changing meanwhile."""

import threading
from collections.abc import Callable, Mapping

import torch


class Background:
    """One thread, that does one piece of work at a time."""

    def __init__(self):
        self.thread = None
        self.error = None

    def start(self, work: Callable[[], None]) -> None:
        """Call `work()` in the thread, once the piece before it is done; raises what that
        raised."""
        self.wait()
        self.thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Until nothing is being done. Raises what the work raised."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def _run(self, work):
        try:
            work()
        except BaseException as error:  # noqa: BLE001 (raised again where it is waited for)
            self.error = error

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        """Whatever happened, what was begun is done."""
        if kind is None:
            self.wait()
        elif self.thread is not None:
            self.thread.join()


class Copies:
    """Copies of tensors in the host's memory, in buffers that are kept for the next time: page-
    locked for those of a GPU, which are then copied at the speed of the bus."""

    def __init__(self):
        self.held = {}

    @torch.no_grad()
    def of(
        self, files: Mapping[str, tuple[Mapping[str, torch.Tensor], object]]
    ) -> dict[str, tuple[dict[str, torch.Tensor], object]]:
        """The same files, name → (tensors, metadata), with copies of the tensors as they are now.
        They are overwritten by the next call. Raises MemoryError where there is no room."""
        copies = {}
        streams = set()
        for file, (tensors, metadata) in files.items():
            copies[file] = ({}, metadata)
            for name, tensor in tensors.items():
                buffer = self._buffer((file, name), tensor)
                buffer.copy_(tensor, non_blocking=tensor.is_cuda)
                copies[file][0][name] = buffer
                if tensor.is_cuda:
                    streams.add(torch.cuda.current_stream(tensor.device))
        for stream in streams:
            stream.synchronize()
        return copies

    def _buffer(self, key, tensor):
        known = self.held.get(key)
        if known is None or known.shape != tensor.shape or known.dtype != tensor.dtype:
            known = room_for(tensor)
            self.held[key] = known
        return known


def room_for(tensor):
    """An empty tensor like it in the host's memory. Raises MemoryError."""
    try:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    except RuntimeError as error:  # so PyTorch says it
        raise MemoryError(str(error)) from None
