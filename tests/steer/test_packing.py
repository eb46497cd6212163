"""Packed rows: tokens of several sequences in one row, each steered as its own; and `generate_batch`, which packs."""

import mixture_models
import pytest
import tiny_models
import torch
from reference_steering import generated_alone, logits_alone, scaled
from tiny_models import random_profile
from transformers import ContinuousBatchingConfig, GenerationConfig

from hones_steer.errors import RoutingError, StateError
from hones_steer.experts import IMPLEMENTATIONS
from hones_steer.huggingface import steer

PROMPTS = [[11, 12, 13], [21, 22, 23, 24, 25, 26, 27], [31, 32], [41, 42, 43, 44]]
TASKS = ["a", None, "b", "a@0.5+b"]
NEW = 6
GREEDY = GenerationConfig(do_sample=False, max_new_tokens=NEW, eos_token_id=-1, pad_token_id=0)


@pytest.fixture
def model():
    return tiny_models.llama()


def steered(model, **options):
    """A model with two profiles attached, and the profiles of TASKS."""
    a, b = random_profile(model, 1), random_profile(model, 2)
    return steer(model, {"a": a, "b": b}, **options), [a, None, b, a * 0.5 + b]


def small(**options):
    """Room for a few prompts: transformers would take most of the memory there is."""
    return ContinuousBatchingConfig(**{"page_size": 8, "num_blocks": 24, "max_batch_tokens": 32, **options})


def packed_inputs(prompts):
    """One row of all prompts, in which each attends to itself alone."""
    lengths = [len(prompt) for prompt in prompts]
    mask = torch.block_diag(*(torch.ones(n, n).tril() for n in lengths))
    return {
        "input_ids": torch.tensor([[token for prompt in prompts for token in prompt]]),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "attention_mask": torch.where(mask.bool(), 0.0, torch.finfo(torch.float32).min)[None, None],
        "use_cache": False,
    }


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits[0]


def alone(model, profiles):
    """The continuation of each prompt of PROMPTS by itself."""
    rows = zip(PROMPTS, profiles, strict=True)
    inputs = [({"input_ids": torch.tensor([ids])}, profile) for ids, profile in rows]
    return [generated_alone(model, one, [profile], max_new_tokens=NEW)[0][0] for one, profile in inputs]


def generate_batch(model, prompts=PROMPTS, config=GREEDY, **options):
    results = model.generate_batch(prompts, generation_config=config, continuous_batching_config=small(), **options)
    return [result.generated_tokens for result in results.values()]


class TestPacked:
    def test_each_token_is_steered_as_its_sequence(self, model):
        inputs = packed_inputs(PROMPTS)
        untouched = logits(model, inputs)
        rows = zip(PROMPTS, steered(tiny_models.llama())[1], strict=True)
        ids = [({"input_ids": torch.tensor([ids])}, profile) for ids, profile in rows]
        expected = torch.cat([logits_alone(model, one, [profile])[0] for one, profile in ids])
        steering, _ = steered(model)
        with steering.packed(TASKS, [len(prompt) for prompt in PROMPTS]):
            found = logits(model, inputs)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(found[3:10], untouched[3:10])  # unsteered tokens among steered ones
        steered_tokens = [*range(3), *range(10, 16)]
        assert (found - untouched)[steered_tokens].abs().amax(dim=-1).min() > 1e-3
        assert torch.equal(logits(model, inputs), untouched)

    def test_flattened_activations(self):
        model = tiny_models.opt()
        inputs = packed_inputs(PROMPTS)
        steering, profiles = steered(model)
        with steering.packed(TASKS, [len(prompt) for prompt in PROMPTS]):
            found = logits(model, inputs)
        steering.detach()
        first = [0, 3, 10, 12, 16]
        for i, profile in enumerate(profiles):
            part = slice(first[i], first[i + 1])
            with scaled(model, profile):
                torch.testing.assert_close(found[part], logits(model, inputs)[part], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    def test_experts(self, implementation):
        model = mixture_models.deepseek_v3()
        model.set_experts_implementation(implementation)
        inputs = packed_inputs(PROMPTS)
        untouched = logits(model, inputs)
        steering, profiles = steered(model)
        with steering.packed(TASKS, [len(prompt) for prompt in PROMPTS]):
            found = logits(model, inputs)
        assert torch.equal(logits(model, inputs), untouched)
        steering.detach()
        first = [0, 3, 10, 12, 16]
        for i, profile in enumerate(profiles):
            part = slice(first[i], first[i + 1])
            with scaled(model, profile):
                torch.testing.assert_close(found[part], logits(model, inputs)[part], rtol=1e-4, atol=1e-4)

    def test_one_task_for_all(self, model):
        inputs = packed_inputs(PROMPTS)
        steering, _ = steered(model)
        with steering.task("a"):
            expected = logits(model, inputs)
        with steering.packed(["a"] * 4, [len(prompt) for prompt in PROMPTS]):
            assert torch.equal(logits(model, inputs), expected)

    @pytest.mark.parametrize(("rows", "tokens"), [(1, 15), (1, 17), (2, 8), (16, 1)])
    def test_another_shape_is_refused(self, model, rows, tokens):
        steering, _ = steered(model)
        with (
            pytest.raises(RoutingError, match=rf"names 16 tokens of one row, but .* {rows} rows of {tokens};"),
            steering.packed(TASKS, [3, 7, 2, 4]),
        ):
            logits(model, {"input_ids": torch.ones(rows, tokens, dtype=torch.int64)})

    @pytest.mark.parametrize("counts", [[3, 7, 2], [3, 7, 2, 0], []])
    def test_counts_that_do_not_fit_the_tasks(self, model, counts):
        steering, _ = steered(model)
        with pytest.raises(RoutingError, match="give each sequence's number of tokens"):
            steering.packed(TASKS, counts)

    def test_gradients_are_refused(self, model):
        steering, _ = steered(model)
        with pytest.raises(RoutingError, match="no forward with gradients"), steering.packed(TASKS, [3, 7, 2, 4]):
            model(**packed_inputs(PROMPTS))

    def test_compiled_layers_are_refused(self, model):
        steering, _ = steered(model)
        call = torch.compile(model, backend="eager")
        with (
            pytest.raises(StateError, match="0 of 3 layers ran uncompiled"),
            steering.packed(TASKS, [3, 7, 2, 4]),
        ):
            logits(call, packed_inputs(PROMPTS))


class TestGenerateBatch:
    def test_each_prompt_of_a_mixture_of_experts_is_steered_by_its_task(self):
        model = mixture_models.qwen3_moe()
        steering, profiles = steered(model)
        steering.detach()
        expected = alone(model, profiles)
        steering, _ = steered(model)
        with steering.tasks(TASKS):
            assert generate_batch(model) == expected
        assert generate_batch(model)[1] == expected[1]
        assert generate_batch(model) != expected

    def test_each_prompt_is_steered_by_its_task(self, model):
        steering, profiles = steered(model)
        steering.detach()
        expected = alone(model, profiles)
        plain = alone(model, [None] * 4)
        steering, _ = steered(model)
        with steering.tasks(TASKS):
            assert generate_batch(model) == expected
        assert generate_batch(model) == plain
        assert [a == b for a, b in zip(expected, plain, strict=True)] == [False, True, False, False]

    def test_one_task_for_all_prompts(self, model):
        steering, profiles = steered(model)
        steering.detach()
        expected = alone(model, profiles[:1] * 4)
        steering, _ = steered(model)
        with steering.task("a"):
            assert generate_batch(model) == expected

    def test_a_shared_beginning_is_not_taken_from_another_task(self, model):
        """Gives all prompts the same first blocks of cache, which transformers would share between them."""
        prompts = [[*range(10, 34), 40 + i] for i in range(4)]
        steering, _ = steered(model)
        expected = []
        for ids, task in zip(prompts, TASKS, strict=True):
            with steering.task(task):
                expected.append(model.generate(torch.tensor([ids]), generation_config=GREEDY)[0, len(ids) :].tolist())
        with steering.tasks(TASKS):
            assert generate_batch(model, prompts) == expected

    def test_a_replaced_profile_steers_only_later_blocks(self, model):
        steering, profiles = steered(model)
        expected = None
        with steering.tasks(TASKS):
            expected = generate_batch(model)
            steering.load("a", profiles[2])
            assert generate_batch(model) == expected
        with steering.tasks(TASKS):
            assert generate_batch(model)[0] != expected[0]

    def test_a_number_of_prompts_that_is_not_that_of_the_tasks(self, model):
        steering, _ = steered(model)
        with pytest.raises(RoutingError, match="names 4 rows, but the model was called with 3"), steering.tasks(TASKS):
            generate_batch(model, PROMPTS[:3])

    def test_a_manager_that_is_kept_is_refused(self, model):
        steering, _ = steered(model)
        with pytest.raises(RoutingError, match="leave out persistent_manager"), steering.tasks(TASKS):
            generate_batch(model, persistent_manager=True)

    @pytest.mark.parametrize("options", [{"use_cuda_graph": True}, {"default_compile_level": 1}], ids=str)
    def test_what_would_record_or_compile_its_steps_is_refused(self, model, options):
        steering, _ = steered(model)
        with pytest.raises(RoutingError, match=f"cannot be steered with {next(iter(options))}"), steering.task("a"):
            model.generate_batch(PROMPTS, generation_config=GREEDY, continuous_batching_config=small(**options))

    def test_what_ends_its_thread_is_raised(self, model):
        steering, _ = steered(model)
        model.model.layers[0].mlp = tiny_models.llama().model.layers[0].mlp
        with pytest.raises(StateError, match="was replaced after steer"), steering.tasks(TASKS):
            generate_batch(model)

    def test_a_manager_of_ones_own_is_refused(self, model):
        steering, _ = steered(model)
        with pytest.raises(RoutingError, match="requests that come later"), steering.task("a"):
            model.init_continuous_batching()
        steering.detach()
        assert not {"generate_batch", "init_continuous_batching"} & vars(model).keys()
