"""Scopes: tokens before or after the prompt's end are steered, by their positions, and all others are untouched."""

import mixture_models
import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from reference_steering import generated_in_scope, in_scope, new_tokens, scaled
from tiny_models import FIRST_WORD, random_profile, text_inputs
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig
from transformers.generation.continuous_batching.requests import RequestState

from hones_steer.errors import RoutingError, StateError
from hones_steer.huggingface import steer
from hones_steer.scopes import SCOPES, check_scope, scoped_digest, split

ROWS = ["a", "a", "a", None, "b", "a@0.5+b"]
OF_ROWS = ["prompt", "generated", "all", "generated", "prompt", "generated"]
NEW = 6
INPUTS = {"llama": text_inputs, "llava": tiny_models.llava_inputs, "qwen2_5_vl": tiny_models.qwen2_5_vl_inputs}


def steered(model):
    """A model with two profiles attached, and the profiles of ROWS."""
    a, b = random_profile(model, 1), random_profile(model, 2)
    by_name = {"a": a, "b": b, None: None, "a@0.5+b": a * 0.5 + b}
    return steer(model, {"a": a, "b": b}), [by_name[task] for task in ROWS]


def generate(model, inputs, **options):
    return new_tokens(model.generate(**inputs, **{"do_sample": False, "max_new_tokens": NEW, **options}), inputs)


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.fixture
def model():
    return tiny_models.llama()


@pytest.fixture(scope="module")
def expected():
    """The llama's answers to `text_inputs`, from the reference."""
    model = tiny_models.llama()
    steering, profiles = steered(model)
    steering.detach()
    inputs = text_inputs(len(ROWS))
    rows = generated_in_scope(model, inputs, profiles, OF_ROWS, NEW)
    whole = generated_in_scope(model, inputs, profiles, ["all"] * len(ROWS), NEW)
    none = generated_in_scope(model, inputs, [None] * len(ROWS), OF_ROWS, NEW)
    assert all(row not in (whole[i], none[i]) for i, row in enumerate(rows) if i not in (2, 3))
    return rows


class TestWords:
    @given(scope=st.sampled_from(SCOPES), end=st.integers(0, 9), start=st.integers(0, 9), count=st.integers(0, 9))
    def test_the_parts_of_some_tokens_are_those_of_each_token(self, scope, end, start, count):
        parts = split(scope, end, start, count)
        assert [steers for tokens, steers in parts for _ in range(tokens)] == in_scope(scope, end, start + count)[
            start:
        ]

    @pytest.mark.parametrize("scope", ["answer", "", "ALL", None, 1, ["all"], "x" * 100], ids=repr)
    def test_no_other_words(self, scope):
        with pytest.raises(RoutingError, match=r"^the scope is .{,60}; give 'all', 'prompt' or 'generated'$"):
            check_scope(scope)

    def test_each_scope_has_a_digest_and_all_has_the_profiles_own(self):
        digests = {scope: scoped_digest("ab" * 32, scope) for scope in SCOPES}
        assert len({*digests.values()}) == 3
        assert digests["all"] == "ab" * 32
        assert all(len(digest) == 64 for digest in digests.values())


class TestGenerate:
    @pytest.mark.parametrize("name", INPUTS)
    def test_a_mixed_batch_generates_what_the_reference_does(self, name):
        model, inputs = tiny_models.FULL_MATRIX[name](), INPUTS[name](len(ROWS))
        steering, profiles = steered(model)
        steering.detach()
        expected = generated_in_scope(model, inputs, profiles, OF_ROWS, NEW)
        steering, _ = steered(model)
        with steering.tasks(ROWS, scope=OF_ROWS):
            assert generate(model, inputs) == expected

    @pytest.mark.parametrize("scope", SCOPES)
    def test_one_scope_for_all_rows(self, model, scope):
        inputs = text_inputs(3)
        steering, profiles = steered(model)
        steering.detach()
        expected = generated_in_scope(model, inputs, profiles[:1] * 3, [scope] * 3, NEW)
        steering, _ = steered(model)
        with steering.task("a", scope=scope):
            assert generate(model, inputs) == expected
        with steering.tasks(["a"] * 3, scope=scope):
            assert generate(model, inputs) == expected

    @pytest.mark.parametrize(
        "options",
        [{"use_cache": False}, {"prefill_chunk_size": 3}, {"cache_implementation": "static"}],
        ids=lambda options: next(iter(options)),
    )
    @pytest.mark.filterwarnings("ignore:.*prefill_chunk_size.*")
    def test_however_generate_computes_them(self, model, expected, options):
        steering, _ = steered(model)
        with steering.tasks(ROWS, scope=OF_ROWS):
            assert generate(model, text_inputs(len(ROWS)), **options) == expected

    @pytest.mark.parametrize("row", [0, 1])
    def test_drafted_tokens_are_generated_ones(self, model, expected, row):
        one = tiny_models.select_row(text_inputs(len(ROWS)), row)
        drafter = tiny_models.llama(num_hidden_layers=1)
        steering, _ = steered(model)
        with steering.task(ROWS[row], scope=OF_ROWS[row]):
            assert generate(model, one, assistant_model=drafter) == [expected[row]]
            assert generate(model, one, prompt_lookup_num_tokens=3) == [expected[row]]

    def test_beams_follow_their_prompt(self, model):
        inputs = text_inputs(3)
        beams = {"num_beams": 3, "num_return_sequences": 2}
        steering, _ = steered(model)
        expected = []
        for row, scope in enumerate(SCOPES):
            with steering.task("a", scope=scope):
                expected += generate(model, tiny_models.select_row(inputs, row), **beams)
        with steering.tasks(["a"] * 3, scope=SCOPES):
            assert generate(model, inputs, **beams) == expected

    def test_the_first_token_is_the_prompts(self, model):
        inputs = text_inputs(1)
        plain = generate(model, inputs)
        steering, _ = steered(model)
        with steering.task("a", scope="generated"):
            assert generate(model, inputs)[0][0] == plain[0][0]
        with steering.task("a", scope="prompt"):
            steered_first = generate(model, inputs, max_new_tokens=1)
        assert steered_first[0][0] != plain[0][0]

    def test_a_second_turn_that_is_given_the_first_ones_cache(self, model):
        """Takes what the cache holds as it was computed; all else of the second prompt is the prompt."""
        first = torch.arange(11, 18)[None]
        steering, (profile, *_) = steered(model)
        with steering.task("a", scope="generated"):
            done = model.generate(first, do_sample=False, max_new_tokens=NEW, return_dict_in_generate=True)
        cached = done.past_key_values.get_seq_length()
        second = torch.cat([done.sequences, torch.arange(31, 36)[None]], dim=1)
        with steering.task("a", scope="generated"):
            found = model.generate(second, past_key_values=done.past_key_values, do_sample=False, max_new_tokens=NEW)
        steering.detach()
        ids, end = second, second.shape[1]
        for length in range(end, end + NEW):
            flags = in_scope("generated", 7, cached) + in_scope("generated", end, length)[cached:]
            with scaled(model, profile, flags):
                token = logits(model, input_ids=ids)[:, -1:].argmax(-1)
            ids = torch.cat([ids, token], dim=1)
        assert found.tolist() == ids.tolist()


class TestTheModelItself:
    """Calls of the model, to which `prompt_end` says where the prompts end."""

    ENDS = (4, 5, 6, 0, 7, 3)  # one has no prompt, one nothing but a prompt

    @pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
    def test_rows_in_one_forward(self, name):
        model = tiny_models.ALL[name]()
        inputs = {"input_ids": text_inputs(len(ROWS), 7)["input_ids"].clamp(min=FIRST_WORD)}
        untouched = logits(model, **inputs)
        steering, profiles = steered(model)
        with steering.tasks(ROWS, scope=OF_ROWS, prompt_end=self.ENDS):
            found = logits(model, **inputs)
        steering.detach()
        for row, (profile, scope, end) in enumerate(zip(profiles, OF_ROWS, self.ENDS, strict=True)):
            with scaled(model, profile, in_scope(scope, end, 7)):
                alone = logits(model, input_ids=inputs["input_ids"][row : row + 1])
            torch.testing.assert_close(found[row], alone[0], atol=1e-3, rtol=1e-4)
        assert torch.equal(found[3], untouched[3])
        assert torch.equal(found[1, :5], untouched[1, :5])
        assert not torch.allclose(found[1, 5:], untouched[1, 5:], atol=1e-2)

    def test_experts(self):
        model = mixture_models.qwen3_moe()
        ids = text_inputs(2, 6)["input_ids"][:1]
        a = random_profile(model, 1)
        for scope in ("prompt", "generated"):
            with steer(model, {"a": a}) as steering, steering.task("a", scope=scope, prompt_end=4):
                found = logits(model, input_ids=ids)
            with scaled(model, a, in_scope(scope, 4, 6)):
                torch.testing.assert_close(found, logits(model, input_ids=ids), atol=1e-3, rtol=1e-4)

    def test_a_loop_of_ones_own(self, model, expected):
        """Computes the prompts three tokens at a time, so that one call has the prompt's last token only."""
        inputs = text_inputs(len(ROWS))
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache, start = DynamicCache(), 0
        steering, _ = steered(model)
        with torch.no_grad(), steering.tasks(ROWS, scope=OF_ROWS, prompt_end=7):
            for stop in (3, 6, 7, *range(8, 7 + NEW)):
                out = model(
                    input_ids=ids[:, start:stop],
                    attention_mask=mask[:, :stop],
                    position_ids=positions[:, start:stop],
                    past_key_values=cache,
                )
                if stop >= 7:
                    ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], dim=1)
                    mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                    positions = torch.cat([positions, positions[:, -1:] + 1], dim=1)
                start = stop
        assert ids[:, 7:].tolist() == expected

    def test_gradients_flow_where_all_tokens_of_a_row_are_alike(self, model):
        steering, _ = steered(model)
        inputs = {"input_ids": text_inputs(2)["input_ids"].clamp(min=FIRST_WORD)}
        for end, same in ((7, "a"), (0, None)):
            with steering.task("a", scope="prompt", prompt_end=end):
                found = model(**inputs).logits
            with steering.task(same):
                assert torch.equal(found, model(**inputs).logits)
        with (
            pytest.raises(RoutingError, match="differently, and so no forward with gradients"),
            steering.task("a", scope="prompt", prompt_end=3),
        ):
            model(**inputs)

    def test_compiled_code_takes_rows_that_are_alike_and_is_not_compiled_again(self, model):
        steering, _ = steered(model)
        inputs = {"input_ids": text_inputs(2)["input_ids"].clamp(min=FIRST_WORD)}
        with steering.task("a"):
            whole = logits(model, **inputs)
        compiled = torch.compile(model, backend="eager")
        with steering.task("a", scope="prompt", prompt_end=7):
            torch.testing.assert_close(logits(compiled, **inputs), whole)
        plain = logits(compiled, **inputs)
        with torch.compiler.set_stance("fail_on_recompile"):
            with steering.task("a", scope="prompt", prompt_end=7):
                torch.testing.assert_close(logits(compiled, **inputs), whole)
            with steering.task("a", scope="generated", prompt_end=7):
                assert torch.equal(logits(compiled, **inputs), plain)
            with (
                pytest.raises(StateError, match="0 of 3 layers ran uncompiled"),
                steering.task("a", scope="prompt", prompt_end=3),
            ):
                logits(compiled, **inputs)


class TestGenerateBatch:
    PROMPTS = ([11, 12, 13], [21, 22, 23, 24, 25, 26, 27], [31, 32], [41, 42, 43, 44], [51, 52], [61, 62, 63])

    def expected(self, model, profiles):
        rows = zip(self.PROMPTS, profiles, OF_ROWS, strict=True)
        alone = [({"input_ids": torch.tensor([ids])}, profile, scope) for ids, profile, scope in rows]
        return [generated_in_scope(model, one, [profile], [scope], NEW)[0] for one, profile, scope in alone]

    @pytest.mark.parametrize("blocks", [32, 7])
    def test_each_prompt_has_its_scope_also_where_it_starts_over(self, model, monkeypatch, blocks):
        """Has room for all prompts, or for so few that some start over from the tokens that they have."""
        steering, profiles = steered(model)
        steering.detach()
        expected = self.expected(model, profiles)
        again = []
        restart = RequestState.create_equivalent_initial_request
        monkeypatch.setattr(
            RequestState,
            "create_equivalent_initial_request",
            lambda state: again.append(len(state.generated_tokens)) or restart(state),
        )
        room = ContinuousBatchingConfig(page_size=4, num_blocks=blocks, max_batch_tokens=16)
        greedy = GenerationConfig(do_sample=False, max_new_tokens=NEW, eos_token_id=-1, pad_token_id=0)
        steering, _ = steered(model)
        with steering.tasks(ROWS, scope=OF_ROWS):
            results = model.generate_batch(
                [*self.PROMPTS], generation_config=greedy, continuous_batching_config=room, progress_bar=False
            )
        assert [result.generated_tokens for result in results.values()] == expected
        assert any(again) == (blocks == 7)


class TestRefused:
    def test_unknown_scopes_and_numbers_of_them(self, model):
        steering, _ = steered(model)
        with pytest.raises(RoutingError, match="the scope is 'answer'; give"), steering.task("a", scope="answer"):
            pass
        with (
            pytest.raises(RoutingError, match="scope has 2 values for 3 rows"),
            steering.tasks(["a"] * 3, scope=["all", "prompt"]),
        ):
            pass
        with (
            pytest.raises(RoutingError, match="prompt_end has 1 values for 2 rows"),
            steering.tasks(["a", "b"], scope="prompt", prompt_end=[1]),
        ):
            pass
        for end in (-1, 1.5, True, "3"):
            with (
                pytest.raises(RoutingError, match=r"prompt_end is .*; give the number of the prompt's tokens"),
                steering.task("a", scope="prompt", prompt_end=end),
            ):
                pass
        assert steering._open == []

    def test_a_call_of_the_model_whose_prompt_nobody_knows(self, model):
        steering, _ = steered(model)
        with (
            pytest.raises(RoutingError, match=r"task\('a', scope='prompt'\) cannot tell where the prompt ends"),
            steering.task("a", scope="prompt"),
        ):
            logits(model, **text_inputs(2))
        with (
            pytest.raises(RoutingError, match=r"tasks\(\['a', 'b'\], scope=\['all', 'prompt'\]\) cannot tell"),
            steering.tasks(["a", "b"], scope=["all", "prompt"]),
        ):
            logits(model, **text_inputs(2))

    def test_a_cache_that_tells_no_positions(self, model):
        class Other:
            pass

        steering, _ = steered(model)
        with (
            pytest.raises(RoutingError, match="a Other does not tell how many tokens are cached"),
            steering.task("a", scope="prompt", prompt_end=3),
        ):
            logits(model, **text_inputs(2), past_key_values=Other())

    def test_a_cache_that_the_mask_leaves_out(self, model):
        steering, _ = steered(model)
        with torch.no_grad():
            cache = model(torch.arange(11, 15)[None], use_cache=True).past_key_values
        with (
            pytest.raises(RoutingError, match="the model got other tokens than generate"),
            steering.task("a", scope="prompt"),
        ):
            model.generate(torch.arange(21, 24)[None], past_key_values=cache, max_new_tokens=2)

    @pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
    @pytest.mark.filterwarnings("ignore:Position ids are not supported")
    def test_virtual_tokens(self, model, kind):
        wrapped = get_peft_model(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=2))
        steering, _ = steered(wrapped)
        with steering.task("a"):
            wrapped.generate(**text_inputs(2), max_new_tokens=2)
        with (
            pytest.raises(RoutingError, match="the model got other tokens than generate"),
            steering.task("a", scope="prompt"),
        ):
            wrapped.generate(**text_inputs(2), max_new_tokens=2)

    def test_guidance_by_another_text(self, model):
        """Calls the model for that text within the same `generate`; it is as long as the prompt."""
        other = {"negative_prompt_ids": text_inputs(1, seed=1)["input_ids"], "guidance_scale": 1.5}
        steering, _ = steered(model)
        with steering.task("a"):
            model.generate(**text_inputs(1), **other, max_new_tokens=3)
        with pytest.raises(RoutingError, match="runs on other tokens in between"), steering.task("a", scope="prompt"):
            model.generate(**text_inputs(1), **other, max_new_tokens=3)

    def test_generate_inside_generate(self, model):
        steering, _ = steered(model)
        inner = lambda *_args, **_kwargs: model.generate(**text_inputs(2), max_new_tokens=1)  # noqa: E731
        with pytest.raises(RoutingError, match="inside generate"), steering.task("a", scope="prompt"):
            model.generate(**text_inputs(2), max_new_tokens=1, custom_generate=inner)
