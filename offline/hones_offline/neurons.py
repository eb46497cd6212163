"""Write-in and head-guided importance of FFN neurons (paper sections 3.2-3.3, design 2.2-2.3)."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from hones_offline.decoding import Segment, batches
from hones_offline.distributed import ALONE, Processes
from hones_offline.interventions import HeadRuns
from hones_offline.metrics import FloatArray
from hones_offline.prompts import Prepared
from hones_offline.recording import Head, recorded_ffn
from hones_steer.errors import DataError
from hones_steer.layout import down_weight

MAX_TARGET_TOKENS = 128


def target_directions(prepared: Prepared) -> Tensor:
    """u_y of every (prompt, answer) pair: unit vectors, float32 [pairs, hidden].

    The sum of the unembedding rows of the target's tokens, special tokens dropped, the first 128; for a task with
    `idf_weighted` each row is weighted by the token's smoothed IDF over these examples, all references joined.

    Raises:
        DataError: a target has no token.
    """
    tokens = [
        _target_tokens(prepared, text)
        for example in prepared.examples
        for text in (
            [" ".join(prepared.task.target_texts(example))]
            if prepared.task.idf_weighted
            else [answer for _, answer in prepared.task.answers(example)]
        )
    ]
    weights = _smoothed_idf(tokens) if prepared.task.idf_weighted else {}
    unembedding = prepared.decoder.unembedding.weight
    assert isinstance(unembedding, Tensor)
    sums = [
        torch.tensor([weights.get(t, 1.0) for t in row]) @ unembedding.detach()[row].float().cpu() for row in tokens
    ]
    return F.normalize(torch.stack(sums), dim=-1)


def _target_tokens(prepared: Prepared, text: str) -> list[int]:
    special = set(prepared.tokenizer.all_special_ids)
    ids: list[int] = prepared.tokenizer(text, add_special_tokens=False)["input_ids"]
    kept = [token for token in ids if token not in special][:MAX_TARGET_TOKENS]
    if not kept:
        raise DataError(f"the target {text!r} has no token that is not special")
    return kept


def _smoothed_idf(documents: Sequence[Sequence[int]]) -> dict[int, float]:
    """ln((n+1)/(df+1)) + 1 per token."""
    frequency = Counter(token for document in documents for token in set(document))
    return {token: math.log((len(documents) + 1) / (df + 1)) + 1 for token, df in frequency.items()}


def importance(
    prepared: Prepared,
    directions: Tensor,
    heads: Sequence[tuple[int, int, float]],
    *,
    batch_size: int,
    memory_gb: float = 4.0,
    processes: Processes = ALONE,
) -> npt.NDArray[np.float32]:
    """I_{l,i} = Σ_h w_h·[mean c(θ) − mean c(θ_Ih)]_+ / Σ_h w_h, float32 [L, I]; `heads` are (layer, head, w)."""
    replaced = [(layer, head) for layer, head, _ in heads]
    options: dict[str, Any] = {"batch_size": batch_size, "memory_gb": memory_gb, "processes": processes}
    base, *changed = mean_write_in(prepared, directions, replaced, **options)
    weights = [weight for _, _, weight in heads]
    drops = [weight * (base - mean).clip(min=0) for weight, mean in zip(weights, changed, strict=True)]
    result: npt.NDArray[np.float32] = (sum(drops) / sum(weights)).astype(np.float32)
    return result


def mean_write_in(
    prepared: Prepared,
    directions: Tensor,
    heads: Sequence[Head] = (),
    *,
    batch_size: int,
    memory_gb: float = 4.0,
    processes: Processes = ALONE,
) -> FloatArray:
    """Mean over pairs of c_{l,i} = z_i·⟨W_down[:,i], u_y⟩ at the last prompt token: float64 [1 + heads, L, I].

    First with every head in place, then with each of `heads` replaced. Each of `processes` runs some of the batches.
    """
    layout = prepared.decoder.layout
    prompts = [
        encoded.prompt(index)
        for example, encoded in zip(prepared.examples, prepared.encoded, strict=True)
        for index, _ in prepared.task.answers(example)
    ]

    def of_batch(chosen: list[int]) -> FloatArray:
        some = [prompts[i] for i in chosen]
        runs = WriteIn(prepared, some, directions[chosen], batch_size=batch_size, memory_gb=memory_gb)
        return np.stack([runs.base(), *runs.results(heads)])

    units = [partial(of_batch, chosen) for chosen in batches([len(prompt) for prompt in prompts], batch_size)]
    shape = (1 + len(heads), len(layout.layers), layout.intermediate_size)
    return processes.sum(units, shape) / len(prompts)


class WriteIn(HeadRuns):
    """Items are prompts with their target directions [items, hidden]; the result is Σ c_{l,i}, float64 [L, I]."""

    def __init__(self, prepared: Prepared, prompts: Sequence[Segment], directions: Tensor, **options: Any) -> None:
        self.layout = prepared.decoder.layout
        self.batch = prepared.decoder.collate(prompts)
        weights = [down_weight(layer) for layer in self.layout.layers]
        self.alignments = [directions.to(weight.device) @ weight.float() for weight in weights]  # [items, I]
        super().__init__(prepared, rows=len(prompts), tokens=self.batch.mask.numel(), **options)

    def undisturbed(self) -> FloatArray:
        with recorded_ffn(self.layout) as recorded:
            self.decoder.run(self.batch)
        nothing = np.zeros((len(self.alignments), self.layout.intermediate_size))
        sums: FloatArray = self._sums(recorded, nothing[None])[0]
        return sums

    def replaced(self, heads: Sequence[Head], states: Sequence[Tensor]) -> Sequence[FloatArray]:
        with recorded_ffn(self.layout) as recorded:
            self.decoder.resume(self.batch, states[0], heads)
        return list(self._sums(recorded, self._base[None].repeat(len(heads), axis=0)))

    def _sums(self, recorded: Mapping[int, Tensor], sums: FloatArray) -> FloatArray:
        """Σ over the items for each copy of the rows; layers that did not run stay as they are in `sums`."""
        for layer, z in recorded.items():  # [copies·items, I]
            written = z.unflatten(0, (len(sums), -1)) * self.alignments[layer]
            sums[:, layer] = written.sum(1, dtype=torch.float64).cpu().numpy()
        return sums
