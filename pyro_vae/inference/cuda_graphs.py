"""A graph of tensor operations as one CUDA graph: a whole step for the price of one launch.

On a GPU a small network's step is a hundred kernels of a few microseconds each, and
launching them from Python takes longer than running them. A CUDA graph records the
launches once, with their addresses, and plays them back. What varies between steps (the
batch or its index, the noise) is therefore copied to fixed places first; parameters,
moments and buffers are read and written where they are. If one of them has moved, the
launches are recorded anew.

Reference: docs.pytorch.org/docs/stable/notes/cuda.html, CUDA Graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_vae.inference.capture import Capture
from pyro_vae.inference.captured import first_line, forked

_WARM_UP = 3  # runs before recording, in which kernels are loaded and chosen

Run = Callable[..., Sequence[Tensor]]


class CudaGraph:
    """A function of tensors on one GPU, recorded and played back.

    Args:
        run: From tensors to tensors, all on one GPU, without a look at any value.
        inputs: What it is recorded on.
        fixed: Which of the inputs are always the same tensor, read and written in place.
        mutated: The tensors that it changes; they are left as they were.
    Attributes:
        recordings: How often the launches were recorded.
    Raises:
        RuntimeError: A tensor on another device, or what CUDA cannot record.
    """

    def __init__(self, run: Run, inputs: Sequence[Tensor], fixed: Sequence[bool], mutated: Sequence[Tensor]) -> None:
        if not _on_one_gpu(inputs):
            raise RuntimeError(f"tensors lie on {sorted({str(t.device) for t in inputs})}, wanted one GPU")
        self.run, self.fixed, self.mutated = run, tuple(fixed), tuple(mutated)
        self.recordings = 0
        self._record(inputs)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The results for these inputs, as tensors of their own."""
        if self._addresses(inputs) != self._recorded_at:
            self._record(inputs)
        for place, given, fixed in zip(self._places, inputs, self.fixed, strict=True):
            if not fixed:
                place.copy_(given, non_blocking=True)
        self._graph.replay()
        return [output.clone() for output in self._outputs]

    def _addresses(self, inputs: Sequence[Tensor]) -> list[int]:
        return [t.data_ptr() for t, fixed in zip(inputs, self.fixed, strict=True) if fixed]

    def _record(self, inputs: Sequence[Tensor]) -> None:
        saved = [(t, t.detach().clone()) for t in self.mutated]
        self._places = [t if fixed else t.clone() for t, fixed in zip(inputs, self.fixed, strict=True)]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self.run(*self._places)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = list(self.run(*self._places))
        for tensor, before in saved:
            tensor.copy_(before)
        self._recorded_at = self._addresses(inputs)
        self.recordings += 1


def record(capture: Capture, tensors: Sequence[Tensor]) -> str | None:
    """Have a capture replay its launches as one CUDA graph; what CUDA says where it cannot."""
    with torch.no_grad(), forked([*tensors, *capture.constants]):
        inputs = [*tensors, *capture.constants, *(draw() for draw in capture.draws)]
        fixed = [len(tensors) <= i < len(tensors) + len(capture.constants) for i in range(len(inputs))]
        try:
            capture._run = CudaGraph(capture._run, inputs, fixed, capture.mutated)
        except Exception as error:
            return first_line(error)
    return None


def _on_one_gpu(tensors: Sequence[Tensor]) -> bool:
    return {t.device.type for t in tensors} == {"cuda"} and len({t.device for t in tensors}) == 1
