"""Models are refused whose text decoder, run as attribution and learning run it, computes something else."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hones_offline import attribute, evaluate, fit
from hones_offline.running.prompts import prepare
from problems import Problem, problem

from hones_steer.errors import LayoutError

NOT_CAUSAL = "paligemma: its text decoder run on a prompt with its answer gives other logits than the whole model"


def asked(p: Problem) -> tuple[Any, ...]:
    return p.model, p.processor, p.task, p.examples


def test_attribution_learning_and_evaluation_refuse_a_bidirectional_prompt() -> None:
    """The answers would leak into the prompt, and rows would attend to their padding."""
    p = problem("paligemma", "text")
    bank = {0: np.array([1, 7], dtype=np.int32)}
    runs: list[Callable[[], object]] = [
        lambda: attribute(*asked(p), method="hones", head_metric="logprob"),
        lambda: fit(*asked(p), bank),
        lambda: evaluate(*asked(p)),
    ]
    for run in runs:
        with pytest.raises(LayoutError, match=f"{NOT_CAUSAL}.*bidirectional prefix"):
            run()


Change = Callable[[torch.Tensor, torch.Tensor], Any]
"""(input embeddings, mask) -> the share of the reversed hidden state [rows, T, hidden] that is added to it."""


def all_of_it(_embeds: torch.Tensor, _mask: torch.Tensor) -> float:
    return 0.1


def where_others_follow(embeds: torch.Tensor, _mask: torch.Tensor) -> Any:
    return 0.1 * torch.arange(embeds.shape[1] - 1, -1, -1)[:, None]


def beside_other_rows(embeds: torch.Tensor, _mask: torch.Tensor) -> float:
    return 0.1 * (len(embeds) - 1)


def before_padding(embeds: torch.Tensor, _mask: torch.Tensor) -> Any:
    return 0.1 * (embeds[:, -1] == 0).all(-1).any()


def after_a_cache(embeds: torch.Tensor, mask: torch.Tensor) -> float:
    return 0.1 * (mask.shape[1] > embeds.shape[1])


@pytest.mark.parametrize(
    ("change", "how"),
    [
        (all_of_it, "run alone"),
        (where_others_follow, "run on a prompt with its answer"),
        (beside_other_rows, "run on rows padded on the left"),
        (before_padding, "run on rows padded on the right"),
        (after_a_cache, "run in two parts"),
    ],
)
@pytest.mark.parametrize("count", [1, 3])
def test_each_way_of_running_the_decoder_is_checked(change: Change, how: str, count: int) -> None:
    """A single example is checked too; it makes a batch with itself."""
    p = problem("llama", "text", count=count)
    prepare(*asked(p))

    def hook(_module: object, _args: object, given: dict[str, Any], out: Any) -> Any:
        if given["inputs_embeds"] is not None:  # not when the whole model calls
            x = out.last_hidden_state
            out.last_hidden_state = x + change(given["inputs_embeds"], given["attention_mask"]) * x.flip(-1)
        return out

    handle = p.model.model.register_forward_hook(hook, with_kwargs=True)
    with pytest.raises(
        LayoutError, match=rf"llama: its text decoder {how} gives other logits than .* at position \d of \d+ that"
    ):
        prepare(*asked(p))
    handle.remove()
    prepare(*asked(p))


def test_a_prompt_of_which_an_indexer_would_choose_tokens_is_refused() -> None:
    """Tokens often have the same score, mostly 0: then the batch decides which of them is chosen."""
    p = problem("deepseek_v32", "text")
    assert prepare(*asked(p)).encoded[-1].longest == 8
    p.model.config.index_topk = 7
    with pytest.raises(LayoutError, match=r"attend to 7 tokens that an indexer chooses, .* has 8; leave out examples"):
        prepare(*asked(p))
    p.model.config.index_kpool = 2
    with pytest.raises(LayoutError, match="'deepseek_v32' choose the keys that they attend to by an indexer, by pools"):
        prepare(*asked(p))


def test_a_decoder_that_writes_into_its_embeddings_runs_the_same_again() -> None:
    """GIT adds positions in place to the embeddings that it is given."""
    p = problem("llama", "text", count=1)
    decoder = prepare(*asked(p)).decoder

    def add(_module: object, _args: object, given: dict[str, Any]) -> None:
        given["inputs_embeds"].add_(1)

    p.model.model.register_forward_pre_hook(add, with_kwargs=True)
    batch = decoder.collate([decoder.text(torch.tensor([10, 11, 12]))])
    with torch.no_grad():
        first, again = (decoder.run(batch)[0] for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("questions", [("what is cat", "what is cat dog"), ("what is cat", "what is dog")])
def test_parts_are_padded_when_a_decoder_is_run_in_two(questions: tuple[str, str]) -> None:
    """GIT goes on from a cache as if no part of it were padding."""
    p = problem("git", "text", count=2)
    p.examples = [replace(example, prompt=text) for example, text in zip(p.examples, questions, strict=True)]
    with pytest.raises(LayoutError, match="git: its text decoder run in two parts gives other logits"):
        prepare(*asked(p))


def test_settings_for_sampling_neither_matter_nor_warn(caplog: pytest.LogCaptureFixture) -> None:
    p = problem("llama", "text", count=2)
    p.model.generation_config.update(do_sample=True, temperature=0.7, top_k=3, num_beams=2, repetition_penalty=1.3)
    prepare(*asked(p))
    assert caplog.records == []
