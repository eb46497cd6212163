"""Learning a profile: factors for a bank's neurons, with the model's weights frozen (paper section 3.4).

docs/methods.md states the loss and its defaults.
"""

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hones_offline.data.examples import Example
from hones_offline.data.neurons import Bank, NeuronIndex
from hones_offline.data.tasks import Task
from hones_offline.learning.loss import EpochLoss, Losses
from hones_offline.running.backward import frozen
from hones_offline.running.decoder import TextDecoder
from hones_offline.running.execution import Execution
from hones_offline.running.interventions import scaled_ffn
from hones_offline.running.progress import progress_bar
from hones_offline.running.prompts import Prepared, prepare
from hones_offline.running.run_folder import Arrays, RunFolder, check_seed, run_settings
from hones_steer._transformers import disable_checkpointing, enable_checkpointing
from hones_steer.errors import DataError
from hones_steer.ffns import Ffn
from hones_steer.profile import ModelIdentity, Profile
from hones_steer.slots import dense_row

GRID = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
CHUNK = 64  # optimizer steps between two resumable states, of which each epoch's end is one


@dataclass(frozen=True)
class FitSettings:
    """Settings of the learning of factors; the defaults are the paper's, but for the learning rate (there 5e-4).

    Raises:
        DataError: a value is out of range.
    """

    epochs: int = 2
    lr: float = 0.02
    beta_kl: float = 0.05
    l2: float = 1e-5
    clamp: float = 1.5
    batch_size: int = 1
    accumulation_steps: int = 4
    max_grad_norm: float = 1.0
    seed: int = 3407
    keep: int | None = None
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.keep is not None and self.keep < 1:
            raise DataError(f"keep must be at least 1, not {self.keep}")
        for name in ("epochs", "lr", "clamp", "batch_size", "accumulation_steps", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise DataError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("beta_kl", "l2"):
            if not 0 <= getattr(self, name) < math.inf:
                raise DataError(f"{name} must be zero or positive, not {getattr(self, name)}")
        check_seed(self.seed)


def fit(
    model: torch.nn.Module,
    processor: Any,
    task: Task,
    examples: Sequence[Example],
    bank: Mapping[Any, npt.NDArray[np.int32]],
    *,
    run_dir: str | Path | None = None,
    max_failures: float = 0.05,
    progress: bool = False,
    epochs: int = 2,
    lr: float = 0.02,
    beta_kl: float = 0.05,
    l2: float = 1e-5,
    clamp: float = 1.5,
    batch_size: int = 1,
    accumulation_steps: int = 4,
    max_grad_norm: float = 1.0,
    seed: int = 3407,
    keep: int | None = None,
    gradient_checkpointing: bool = False,
) -> Profile:
    """Learn z' = (1 + λ)·z for the neurons of a bank, from λ = 0, on a task's examples.

    Minimizes the mean answer-token cross-entropy + β·KL(original ‖ scaled) on the answer tokens + l2·Σλ²/N, where the
    answer includes its end token and N is the number of all FFN neurons; the teacher of the KL is the same model
    unscaled. An example with several (prompt, answer) pairs counts as their mean. AdamW without decay, cosine to 10% of
    `lr`, λ clamped to ±`clamp`.

    Args:
        model: a Hugging Face causal LM or VLM, in eval mode; its weights are not changed.
        processor: its processor; the tokenizer for a text-only model.
        task: what is learned.
        examples: the discovery examples.
        bank: the neurons whose factors are learned, {layer: int32 indices}, by (layer, expert) or (layer, "shared") for
            experts.
        run_dir: where the state is kept every 64 steps, so that a killed run can be resumed.
        max_failures: share of examples whose image may be unusable before it is an error.
        progress: show progress bars on a terminal.
        epochs: passes over the examples.
        lr: AdamW's learning rate at the beginning.
        beta_kl: β, the weight of the KL.
        l2: weight of Σλ²/N.
        clamp: bound of |λ|.
        batch_size: examples per forward and backward.
        accumulation_steps: forwards and backwards per optimizer step.
        max_grad_norm: the gradient's norm is clipped to it.
        seed: order of the examples, and what the task's `drawn_answers` draws, in each epoch.
        keep: how many of the bank's neurons keep a factor; the others are pruned while learning. None prunes none.
        gradient_checkpointing: recompute layers in the backward pass: less memory, more time.

    Raises:
        DataError: no usable example, an empty bank or one of another model, a setting out of range, or a run folder
            with other settings.
        LayoutError: the model's structure is not supported.
    """
    settings = FitSettings(
        epochs=epochs,
        lr=lr,
        beta_kl=beta_kl,
        l2=l2,
        clamp=clamp,
        batch_size=batch_size,
        accumulation_steps=accumulation_steps,
        max_grad_norm=max_grad_norm,
        seed=seed,
        keep=keep,
        gradient_checkpointing=gradient_checkpointing,
    )
    prepared = prepare(model, processor, task, examples, max_failures=max_failures, progress=progress)
    checked = Bank(bank)
    checked.check(NeuronIndex.of(prepared.decoder.layout))
    _check_keep(checked, settings)
    run = None if run_dir is None else RunFolder(run_dir, fit_run_settings(prepared, checked, settings))
    return fit_prepared(prepared, checked, settings, Execution(folder=run, progress=progress))


def _check_keep(bank: Bank, settings: FitSettings) -> None:
    """Raise DataError if more neurons are to be kept than there are."""
    if settings.keep is not None and settings.keep > bank.size:
        raise DataError(
            f"keep is {settings.keep}, but the bank has {bank.size} neurons; keep fewer, or give a larger one"
        )


def fit_run_settings(prepared: Prepared, bank: Bank, settings: FitSettings) -> dict[str, Any]:
    """Everything that decides the bytes of a fitted profile."""
    return {
        "stage": "fit",
        **run_settings(prepared),
        "bank": bank.to_json(),
        **asdict(settings),
    }


def fit_prepared(
    prepared: Prepared, bank: Bank, settings: FitSettings, execution: Execution, *, name: str = "hones"
) -> Profile:
    """`fit` on examples that are already encoded and a bank that is the model's.

    Of the execution the run folder and progress count; `name` is the method's, for the profile's metadata.
    """
    *_, (_, last) = learned_by_epoch(prepared, bank, settings, execution, name=name)
    return last


def learned_by_epoch(
    prepared: Prepared,
    bank: Bank,
    settings: FitSettings,
    execution: Execution,
    *,
    name: str = "hones",
    losses: Losses | None = None,
) -> Generator[tuple[int, Profile]]:
    """`fit_prepared`, giving (number, from 1; profile) after each epoch.

    An epoch is learned when its profile is asked for; the learning rate falls over all of `settings.epochs`, however
    many that are. Epochs before the end of pruning (`settings.keep`) give no profile. `losses` is what `losses_of`
    gives, made once for several runs on the same examples.

    Raises:
        DataError: more neurons are to be kept than the bank has.
    """
    learner = _Learner(prepared, bank, settings, losses or losses_of(prepared, settings))
    state: Arrays = learner.start()
    title = f"{prepared.task.name}: fit {name}"
    with progress_bar(title, learner.total_steps, show=execution.shows_progress) as bar:
        for epoch in range(settings.epochs):
            begin, end = epoch * learner.steps_per_epoch, (epoch + 1) * learner.steps_per_epoch
            for first in range(begin, end, CHUNK):
                steps = range(first, min(first + CHUNK, end))
                state = execution.arrays(f"{name}-{steps.stop:06d}", partial(learner.advance, state, steps))
                bar.update(len(steps))
            if learner.kept_after(end) == learner.kept_after(learner.total_steps):
                kept = learner.kept(state)
                method = {"name": name, "examples": len(prepared), "epoch": epoch + 1, "optimizer_steps": end}
                scales = 1 + state["offsets"][kept]
                yield epoch + 1, bank_profile(prepared, bank.only(kept), scales, {**method, **asdict(settings)})


def losses_of(prepared: Prepared, settings: FitSettings) -> Losses:
    """The losses that learning on these examples under these settings minimizes, but for the penalty."""
    return Losses(
        prepared,
        beta_kl=settings.beta_kl,
        batch_size=settings.batch_size,
        whole=settings.gradient_checkpointing,
    )


def uniform_profile(prepared: Prepared, bank: Bank, factor: float, name: str) -> Profile:
    """One factor for every neuron of the bank: "fixed_amp" (2.0) and the points of "grid_search"."""
    scales = np.full(bank.size, factor, dtype=np.float32)
    return bank_profile(prepared, bank, scales, {"name": name, "factor": factor})


def grid_search(prepared: Prepared, bank: Bank, on_dev: Callable[[Profile], float]) -> Profile:
    """The factor of `GRID` with the best metric on dev, as `on_dev` measures it; among equals the nearest to 1."""
    profiles = [uniform_profile(prepared, bank, factor, "grid_search") for factor in GRID]
    return max(sorted(profiles, key=lambda profile: abs(profile.method["factor"] - 1)), key=on_dev)


def bank_profile(prepared: Prepared, bank: Bank, scales: npt.NDArray[np.float32], method: Mapping[str, Any]) -> Profile:
    """A profile from a bank and its scales, float32 [bank size], in the bank's order."""
    parts = bank.split(scales)
    return Profile(
        task=prepared.task.name,
        layers={key: (neurons, parts[key].astype(np.float32)) for key, neurons in bank.items()},
        base_model=ModelIdentity.from_model(prepared.decoder.model),
        method=dict(method),
    )


class _Learner:
    """The optimization as a function from state to state, so that it can stop and go on at any chunk."""

    def __init__(self, prepared: Prepared, bank: Bank, settings: FitSettings, losses: Losses) -> None:
        _check_keep(bank, settings)
        self.decoder: TextDecoder = prepared.decoder
        self.index = NeuronIndex.of(self.decoder.layout)
        self.bank, self.settings, self.losses = bank, settings, losses
        self.places = {
            ffn: (torch.from_numpy(neurons), torch.from_numpy(numbers))
            for ffn, (neurons, numbers) in bank.positions(self.index).items()
        }
        self.examples = len(prepared)
        self.steps_per_epoch = math.ceil(self.examples / (settings.batch_size * settings.accumulation_steps))
        self.total_steps = settings.epochs * self.steps_per_epoch

    def start(self) -> Arrays:
        zeros = np.zeros(self.bank.size, dtype=np.float32)
        kept = np.ones(self.bank.size, dtype=np.uint8)
        return {"offsets": zeros, "exp_avg": zeros, "exp_avg_sq": zeros, "kept": kept}

    def advance(self, state: Arrays, steps: range) -> Arrays:
        """Run the given optimizer steps from a state; the same state and steps give the same bytes."""
        offsets = torch.nn.Parameter(torch.tensor(state["offsets"]))
        kept = torch.tensor(self.kept(state))
        optimizer = torch.optim.AdamW([offsets], lr=self.settings.lr, weight_decay=0.0)
        optimizer.state[offsets] = {
            "step": torch.tensor(float(steps.start)),
            "exp_avg": torch.tensor(state["exp_avg"]),
            "exp_avg_sq": torch.tensor(state["exp_avg_sq"]),
        }
        with frozen(self.decoder.model), checkpointed(self.decoder, self.settings.gradient_checkpointing):
            for step in steps:
                self._step(step, offsets, kept, optimizer)
                kept = self._pruned(step, offsets, kept)
        moments = optimizer.state[offsets]
        return {
            "offsets": offsets.detach().numpy(),
            "exp_avg": moments["exp_avg"].numpy(),
            "exp_avg_sq": moments["exp_avg_sq"].numpy(),
            "kept": kept.numpy().astype(np.uint8),
        }

    @staticmethod
    def kept(state: Arrays) -> npt.NDArray[np.bool_]:
        """Which of the bank's neurons are not pruned."""
        return state["kept"].astype(np.bool_)

    def kept_after(self, steps: int) -> int:
        """How many neurons keep a factor after so many steps: the cubic schedule, over the first half of all."""
        if self.settings.keep is None:
            return self.bank.size
        left = max(0.0, 1 - steps / max(1, self.total_steps // 2))
        return self.settings.keep + round((self.bank.size - self.settings.keep) * left**3)

    def _step(self, step: int, offsets: torch.nn.Parameter, kept: Tensor, optimizer: torch.optim.AdamW) -> None:
        settings = self.settings
        optimizer.param_groups[0]["lr"] = settings.lr * cosine(step / self.total_steps)
        chosen = self._examples_of(step)
        loss = self.losses.of_epoch(settings.seed + step // self.steps_per_epoch)
        for start in range(0, len(chosen), settings.batch_size):
            batch = chosen[start : start + settings.batch_size]
            self._accumulate(loss, batch, offsets, share=len(batch) / len(chosen))
        with torch.enable_grad():
            (settings.l2 * offsets.square().sum() / self.index.size).backward()
        assert offsets.grad is not None
        offsets.grad.mul_(kept)
        torch.nn.utils.clip_grad_norm_([offsets], settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            offsets.clamp_(-settings.clamp, settings.clamp)

    @torch.no_grad()
    def _pruned(self, step: int, offsets: torch.nn.Parameter, kept: Tensor) -> Tensor:
        """The neurons that keep a factor after a step, those with the largest |λ|; the others' becomes λ = 0.

        Of equals those stay that come first in the bank.
        """
        if self.settings.keep is None:
            return kept
        sizes = torch.where(kept, offsets.abs(), -1.0)
        largest = sizes.argsort(descending=True, stable=True)[: self.kept_after(step + 1)]
        kept = torch.zeros_like(kept).index_fill(0, largest, True)
        offsets.mul_(kept)
        return kept

    def _examples_of(self, step: int) -> list[int]:
        epoch, within = divmod(step, self.steps_per_epoch)
        order = order_of(self.examples, self.settings.seed + epoch)
        size = self.settings.batch_size * self.settings.accumulation_steps
        return order[within * size : (within + 1) * size]

    def _accumulate(self, loss: EpochLoss, batch: Sequence[int], offsets: Tensor, share: float) -> None:
        """Add share · the gradient of the loss of these examples."""
        original = loss.original(batch)
        with torch.enable_grad(), scaled_ffn(self.decoder.layout, self._scales(offsets)):
            # Inside the block: checkpointed layers are run again here, and must be scaled again.
            (loss(batch, original) * share).backward()

    def _scales(self, offsets: Tensor) -> dict[Ffn, Tensor]:
        return {
            ffn: dense_row(neurons, 1 + offsets[numbers], self.index[ffn].stop - self.index[ffn].start)
            for ffn, (neurons, numbers) in self.places.items()
        }


def order_of(count: int, seed: int) -> list[int]:
    """The numbers below `count` in the order that a seed draws."""
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def cosine(progress: float) -> float:
    """Learning-rate factor: cosine from 1 to 0.1."""
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


@contextmanager
def checkpointed(decoder: TextDecoder, wanted: bool) -> Iterator[None]:
    """The decoder's layers recomputed in the backward pass, if that is wanted.

    transformers checkpoints a layer only in training mode; only the layers' own flag is raised, so that dropout inside
    them stays off.
    """
    if not wanted:
        yield
        return
    layers = [layer.module for layer in decoder.layout.layers]
    modes = [layer.training for layer in layers]
    enable_checkpointing(decoder.model)
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        disable_checkpointing(decoder.model)
        for layer, mode in zip(layers, modes, strict=True):
            layer.training = mode
