"""A training step recorded as a CUDA graph: a replay launches the whole step at once, without Python in between."""

from collections.abc import Callable, Iterable, Sequence

import torch

WARM_UP = 3  # steps made one by one first: libraries set themselves up, the optimiser makes its state

Step = Callable[..., torch.Tensor]


class RecordedStep:
    """A step on inputs of fixed shapes.

    Args:
        step: takes the inputs and returns a tensor; everything else that it reads and changes are tensors that stay
            where they are. It is called once, which records it and changes nothing.
        inputs: CUDA tensors of the shapes and dtypes that all inputs will have.
        generators: CUDA generators that the step draws from. Each replay goes on where the last one stopped.
    """

    def __init__(self, step: Step, inputs: Sequence[torch.Tensor], generators: Iterable[torch.Generator]) -> None:
        self._inputs = [tensor.clone() for tensor in inputs]
        self._graph = torch.cuda.CUDAGraph()
        for generator in generators:
            self._graph.register_generator_state(generator)
        with torch.cuda.graph(self._graph):
            self._result = step(*self._inputs)

    def __call__(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Make the step on these inputs; return its result, not waited for."""
        for held, given in zip(self._inputs, inputs, strict=True):
            held.copy_(given)
        self._graph.replay()
        return self._result.clone()
