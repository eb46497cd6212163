"""Backward passes: the gradient of an answer's log-probability by what hooks put into the forward, such as factors.

Before the first one `rows_at_once` checks, on a few tokens, that every module of the decoder passes gradients on, and
measures how much memory the longest example needs.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from hones_offline.running.batching import Batch, gib
from hones_offline.running.decoder import TextDecoder
from hones_offline.running.evaluation import mean_log_probabilities
from hones_offline.running.execution import Execution
from hones_offline.running.interventions import ffn_factors
from hones_offline.running.prompts import Pair, Prepared
from hones_offline.running.readings import calls_read
from hones_steer.errors import DataError, LayoutError
from hones_steer.ffns import Ffn
from hones_steer.layout import Layout

Place = TypeVar("Place", int, Ffn)
Leaves = Callable[[Layout], AbstractContextManager[Mapping[Place, Tensor]]]
"""A block of hooks that puts what gradients are taken by into the forward, a tensor per FFN, or per layer."""


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within the block, no gradients for the model's own weights."""
    parameters = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, required in parameters:
            parameter.requires_grad_(required)


class AnsweredBatch:
    """Prompts with their answers in one batch, padded on the right, where no token that counts looks at padding."""

    def __init__(self, decoder: TextDecoder, pairs: Sequence[Pair]) -> None:
        """Prepare (prompt, answer ids) pairs, one a row."""
        self.decoder, self.answers = decoder, [answer for _, answer in pairs]
        segments = [decoder.answered(prompt, answer) for prompt, answer in pairs]
        self.ends = torch.tensor([len(segment) for segment in segments])
        self.batch: Batch = decoder.collate(segments, side="right")

    @property
    def last_prompt_columns(self) -> Tensor:
        """The column of each prompt's last token, [rows]."""
        return self.ends - torch.tensor([len(answer) for answer in self.answers])

    def utilities(self) -> Tensor:
        """The mean token log-probability of each answer, [rows]."""
        hidden, _ = self.decoder.run(self.batch)
        return mean_log_probabilities(self.decoder, hidden, self.ends, self.answers)


def factor_gradients(
    decoder: TextDecoder, pairs: Sequence[Pair], *, last_prompt_token: bool = False
) -> dict[Ffn, Tensor]:
    """The gradient of each pair's utility by its neurons' factors, at 1: float32 [pairs, N] per FFN.

    It is Σ z·∂P/∂z over all positions, of prompt and answer, or z·∂P/∂z at the prompt's last token. Rows of a batch
    have factors of their own and no influence on one another, so one backward pass gives every pair's own gradient.
    The model is to be `frozen`.
    """
    batch = AnsweredBatch(decoder, pairs)
    columns = batch.last_prompt_columns if last_prompt_token else None
    return gradients_by(partial(ffn_factors, columns=columns), batch)


def gradients_by(leaves: Leaves[Place], batch: AnsweredBatch) -> dict[Place, Tensor]:
    """The gradient of the sum of a batch's utilities by its leaves, in ascending order of their places."""
    with torch.enable_grad(), leaves(batch.decoder.layout) as taken:
        utility = batch.utilities().sum()
        places = sorted(taken)
        gradients = torch.autograd.grad(utility, [taken[place] for place in places])
    return dict(zip(places, gradients, strict=True))


def rows_at_once(prepared: Prepared, execution: Execution, leaves: Leaves[Any] = ffn_factors) -> int:
    """How many pairs are run backward together: at most the batch size, and as many as fit into `memory_gb`.

    What counts is what the forward keeps for a backward pass to the `leaves`, and their gradients. All processes get
    the same number.

    Raises:
        LayoutError: the model cannot be run backward.
        DataError: the longest example alone does not fit.
    """
    decoder = prepared.decoder
    pairs = prepared.pairs()
    longest = max((prompt for prompt, _ in pairs), key=len), max((answer for _, answer in pairs), key=len)
    with frozen(decoder.model):
        require_backward(decoder, longest, leaves)
        kept = execution.processes.from_first(lambda: kept_bytes(decoder, longest, leaves))
    rows = min(execution.batch_size, gib(execution.memory_gb) // kept)
    if not rows:
        raise DataError(
            f"task {prepared.task.name!r}: the backward pass of one example, of up to {len(longest[0])} + "
            f"{len(longest[1])} tokens, keeps more than memory_gb={execution.memory_gb:g}; "
            f"--memory-gb {math.ceil(kept / gib(1) * 100) / 100:g} is enough"
        )
    return rows


def kept_bytes(decoder: TextDecoder, pair: Pair, leaves: Leaves[Any] = ffn_factors) -> int:
    """Bytes that the forward of one pair keeps for the backward pass, weights aside, and those of the gradients.

    They are counted as they come and not kept, so that this needs no more memory than a forward. A storage that is kept
    by several operations counts once.
    """
    tensors = [*decoder.model.parameters(), *decoder.model.buffers()]
    counted = {StorageWeakRef(tensor.untyped_storage()) for tensor in tensors}
    kept = 0

    def count(tensor: Tensor) -> None:
        nonlocal kept
        storage = tensor.untyped_storage()
        # As long as the reference lives, no other storage can take the place of one that is freed.
        if (reference := StorageWeakRef(storage)) not in counted:
            counted.add(reference)
            kept += storage.nbytes()

    with torch.enable_grad(), leaves(decoder.layout) as taken, saved_tensors_hooks(count, _never_run_backward):
        AnsweredBatch(decoder, [pair]).utilities()
    for leaf in taken.values():
        count(leaf)
    return kept + sum(leaf.nbytes for leaf in taken.values())


def _never_run_backward(_kept: object) -> Tensor:
    raise AssertionError("the forward that counts what is kept is not run backward")


def require_backward(decoder: TextDecoder, pair: Pair, leaves: Leaves[Any] = ffn_factors) -> None:
    """Run a few tokens backward; raises LayoutError, naming the module, if it passes no gradient on.

    A quantized layer may leave its input out of the graph, raise, or warn and go on without a gradient: with the
    residual stream around it the rest would look like one.
    """
    prompt, answer = pair
    parts = {*decoder.layout.decoder.modules(), decoder.unembedding}
    modules = {name: module for name, module in decoder.model.named_modules() if module in parts}

    def check(name: str, module: nn.Module, given: Tensor, output: Tensor) -> None:
        if not given.requires_grad:
            return
        passed = output.requires_grad and torch.autograd.grad(output.sum(), given, retain_graph=True, allow_unused=True)
        if not passed or passed[0] is None:
            raise _no_backward(decoder, f"its {name} ({type(module).__name__}) passes no gradient on")

    with warnings.catch_warnings(action="ignore"), calls_read(modules, check):
        try:
            gradients_by(leaves, AnsweredBatch(decoder, [(prompt.split(2)[0], answer[:1])]))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what torch raises for an operation without a derivative
            raise _no_backward(decoder, str(error).splitlines()[0].rstrip(".")) from error


def _no_backward(decoder: TextDecoder, reason: str) -> LayoutError:
    return LayoutError(
        f"model type {decoder.layout.model_type!r} cannot be run backward: {reason}; use a checkpoint that is not "
        "quantized, or a method without a backward pass: hones (with heads exact or race), dvp, ma, ap"
    )
