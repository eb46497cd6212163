"""Steering a model: rows are scaled as their profiles say, and the rest is untouched."""

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny_models
import torch
from accelerate import cpu_offload, dispatch_model
from peft import LoraConfig, get_peft_model
from reference_steering import generated_alone, logits_alone, new_tokens, scaled
from tiny_models import random_profile, text_inputs

from hones_steer._transformers import disable_checkpointing, enable_checkpointing
from hones_steer.errors import LayoutError, MismatchError, ProfileError, RoutingError, StateError
from hones_steer.huggingface import is_steered, steer
from hones_steer.profile import save_profile
from hones_steer.store import ProfileStore

ROWS = ["a", None, "b", "a@0.5+b"]
INPUTS = {
    "llama": text_inputs,
    "llava": tiny_models.llava_inputs,
    "qwen2_5_vl": tiny_models.qwen2_5_vl_inputs,
}


def steered(model, **options):
    """A model with two profiles attached, and these profiles by expression."""
    a, b = random_profile(model, 1), random_profile(model, 2)
    return steer(model, {"a": a, "b": b}, **options), {"a": a, "b": b, None: None, "a@0.5+b": a * 0.5 + b}


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def generate(model, inputs, **options):
    return new_tokens(model.generate(**inputs, **{"do_sample": False, "max_new_tokens": 8, **options}), inputs)


def real_positions(inputs):
    return inputs["attention_mask"].bool()


@pytest.fixture
def model():
    return tiny_models.llama()


@pytest.fixture(params=tiny_models.ALL)
def any_model(request):
    return tiny_models.ALL[request.param]()


@pytest.fixture(params=INPUTS)
def full_matrix(request):
    return tiny_models.FULL_MATRIX[request.param](), INPUTS[request.param]()


class TestEveryArchitecture:
    def test_rows_without_a_task_are_bit_equal_to_the_untouched_model(self, any_model):
        inputs = text_inputs()
        untouched = logits(any_model, inputs)
        steering, _ = steered(any_model)
        assert torch.equal(logits(any_model, inputs), untouched)
        with steering.task("none"):
            assert torch.equal(logits(any_model, inputs), untouched)
        with steering.tasks(ROWS):
            mixed = logits(any_model, inputs)
        assert torch.equal(mixed[1], untouched[1])
        assert not torch.allclose(mixed[0], untouched[0], atol=1e-2)

    def test_steered_rows_equal_the_reference(self, any_model):
        inputs = text_inputs()
        steering, profiles = steered(any_model)
        with steering.tasks(ROWS):
            mixed = logits(any_model, inputs)
        with steering.task("b"):
            uniform = logits(any_model, inputs)
        steering.detach()
        mask = real_positions(inputs)
        for row, alone in enumerate(logits_alone(any_model, inputs, [profiles[task] for task in ROWS])):
            torch.testing.assert_close(mixed[row][mask[row]], alone[mask[row]], atol=1e-3, rtol=1e-4)
        for row, alone in enumerate(logits_alone(any_model, inputs, [profiles["b"]] * 4)):
            torch.testing.assert_close(uniform[row][mask[row]], alone[mask[row]], atol=1e-3, rtol=1e-4)

    def test_detached_it_is_exactly_what_it_was(self, any_model):
        inputs = text_inputs()
        before = {id(module): set(vars(module)) for module in any_model.modules()}
        weights = {name: tensor.clone() for name, tensor in any_model.state_dict().items()}
        untouched = logits(any_model, inputs)
        steering, _ = steered(any_model)
        with steering.task("a"):
            logits(any_model, inputs)
        assert list(any_model.state_dict()) == list(weights)
        steering.detach()
        assert torch.equal(logits(any_model, inputs), untouched)
        assert {id(module): set(vars(module)) for module in any_model.modules()} == before
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in any_model.modules())
        assert all(torch.equal(tensor, weights[name]) for name, tensor in any_model.state_dict().items())

    def test_verify_confirms_it(self, any_model):
        steering, _ = steered(any_model)
        report = steering.verify()
        assert [p.name for p in report.profiles] == ["a", "b"]
        assert all(p.largest_logit_change > 0.01 for p in report.profiles)
        assert "every down-projection is hooked" in report.lines()[0]


class TestFullMatrix:
    def test_a_mixed_batch_generates_what_each_row_does_alone(self, full_matrix):
        model, inputs = full_matrix
        unsteered = generate(model, inputs)
        steering, profiles = steered(model)
        with steering.tasks(ROWS):
            mixed = generate(model, inputs)
        each = []
        for row, task in enumerate(ROWS):
            with steering.task(task):
                each += generate(model, tiny_models.select_row(inputs, row))
        steering.detach()
        alone = generated_alone(model, inputs, [profiles[task] for task in ROWS], max_new_tokens=8)
        assert mixed == each == [row[0] for row in alone]
        assert mixed[1] == unsteered[1]

    def test_the_profiles_used_here_change_the_outputs(self, full_matrix):
        """Otherwise the equalities of this file would hold for a runtime that does nothing."""
        model, inputs = full_matrix
        unsteered = generate(model, inputs)
        steering, _ = steered(model)
        changed = []
        for task in ("a", "b", "a@0.5+b"):
            with steering.task(task):
                changed += [one != other for one, other in zip(generate(model, inputs), unsteered, strict=True)]
        assert sum(changed) >= 0.8 * len(changed)

    @pytest.mark.parametrize(
        "options",
        [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 2, "length_penalty": 0.0}],
    )
    def test_beams_follow_their_prompt(self, full_matrix, options):
        model, inputs = full_matrix
        steering, profiles = steered(model)
        with steering.tasks(ROWS):
            mixed = generate(model, inputs, **options)
        steering.detach()
        alone = generated_alone(model, inputs, [profiles[task] for task in ROWS], max_new_tokens=8, **options)
        assert mixed == [sequence for row in alone for sequence in row]

    def test_sampled_return_sequences_follow_their_prompt(self, full_matrix):
        model, inputs = full_matrix
        steering, _ = steered(model)
        options = {"do_sample": True, "num_return_sequences": 3, "output_logits": True, "return_dict_in_generate": True}
        with steering.tasks(ROWS):
            first = model.generate(**inputs, max_new_tokens=1, **options).logits[0]
            greedy = model.generate(
                **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
            ).logits[0]
        torch.testing.assert_close(first, greedy.repeat_interleave(3, 0), atol=1e-3, rtol=1e-4)

    def test_bfloat16(self, full_matrix):
        model, inputs = full_matrix
        model = model.bfloat16()
        inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
        untouched = logits(model, inputs)
        steering, profiles = steered(model)
        with steering.tasks(ROWS):
            mixed = logits(model, inputs)
        steering.detach()
        # The same batch with the reference's scaling, so that only the scaling itself can differ.
        for row, task in enumerate(ROWS):
            with scaled(model, profiles[task]):
                expected = logits(model, inputs)[row]
            assert torch.equal(mixed[row], expected)
        assert torch.equal(mixed[1], untouched[1])

    def test_two_swapped_slots_are_noticed(self, full_matrix):
        model, inputs = full_matrix
        steering, profiles = steered(model)
        with steering.tasks(ROWS):
            tables = steering._attached.injection.tables.tables
            for table in tables.values():
                table[[1, 2]] = table[[2, 1]]
            swapped = generate(model, inputs)
        steering.detach()
        alone = generated_alone(model, inputs, [profiles[task] for task in ROWS], max_new_tokens=8)
        assert [s == a[0] for s, a in zip(swapped, alone, strict=True)] == [False, True, False, True]

    def test_verify_notices_swapped_slots(self, full_matrix):
        model, _ = full_matrix
        steering, _ = steered(model)
        with steering.tasks(["a", "b"]):
            pass_rows = {name: value[:2] for name, value in text_inputs(2).items()}
            logits(model, pass_rows)
        for table in steering._attached.injection.tables.tables.values():
            table[[1, 2]] = table[[2, 1]]
        with pytest.raises(StateError, match="not scaled as 'a' says"):
            steering.verify()


class TestExpressions:
    def test_all_ways_to_switch_off(self, model):
        inputs = text_inputs()
        untouched = logits(model, inputs)
        steering, _ = steered(model)
        for expression in ("none", None, "a@0", "a+a@-1"):
            with steering.task(expression):
                assert torch.equal(logits(model, inputs), untouched)

    def test_the_inner_block_counts(self, model):
        inputs = text_inputs()
        steering, _ = steered(model)
        with steering.task("a"):
            a = logits(model, inputs)
            with steering.task("b"):
                b = logits(model, inputs)
            with steering.task("none"):
                none = logits(model, inputs)
            assert torch.equal(logits(model, inputs), a)
        assert torch.equal(logits(model, inputs), none)
        with steering.task("b"):
            assert torch.equal(logits(model, inputs), b)

    def test_unknown_and_malformed_ones_are_refused(self, model):
        steering, profiles = steered(model)
        with (
            pytest.raises(RoutingError, match=r"no profile for the task 'vqa'; known tasks: a, b"),
            steering.task("vqa"),
        ):
            pass
        for name in "cdefghi":
            steering.load(name, profiles["a"])
        with (
            pytest.raises(RoutingError, match=r"nearest of the 9 known tasks: a; for all see Steering.names"),
            steering.task("aa"),
        ):
            pass
        with pytest.raises(RoutingError, match="not a strength"), steering.task("a@x"):
            pass
        with pytest.raises(RoutingError, match="list with one expression per row"):
            steering.tasks("a")

    def test_more_at_once_than_slots_are_refused_and_fewer_reuse_them(self, model):
        inputs = text_inputs()
        steering, profiles = steered(model, max_profiles=2)
        with pytest.raises(RoutingError, match=r"3 different profiles .* max_profiles is 2"), steering.tasks(ROWS):
            pass
        for _ in range(2):
            for task in ("a", "b", "a@0.5+b", "a"):
                with steering.task(task):
                    actual = logits(model, inputs)
                with scaled(model, profiles[task]):
                    torch.testing.assert_close(actual, logits(model, inputs), atol=1e-3, rtol=1e-4)

    def test_an_open_block_keeps_its_slot(self, model):
        inputs = text_inputs()
        steering, _ = steered(model, max_profiles=2)
        with steering.task("a"):
            a = logits(model, inputs)
            for task in ("b", "a@0.5", "b@2"):
                with steering.task(task):
                    logits(model, inputs)
            assert torch.equal(logits(model, inputs), a)


class TestRows:
    @pytest.mark.parametrize("tasks", [["a"], ["a", "b"], ["a"] * 8])
    def test_a_wrong_number_of_rows_is_refused(self, model, tasks):
        steering, _ = steered(model)
        with steering.tasks(ROWS):
            logits(model, text_inputs())
        message = f"names {len(tasks)} rows, but the model was called with 4"
        with pytest.raises(RoutingError, match=message), steering.tasks(tasks):
            logits(model, text_inputs())

    @pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
    def test_more_prompts_are_not_taken_for_beams(self, model, options):
        steering, _ = steered(model)
        message = "names 2 rows, but the model was called with 4"
        with pytest.raises(RoutingError, match=message), steering.tasks(["a", "b"]):
            generate(model, text_inputs(), **options)

    def test_inputs_embeds(self, model):
        inputs = text_inputs()
        steering, _ = steered(model)
        with steering.tasks(ROWS):
            expected = logits(model, inputs)
            embeds = model.get_input_embeddings()(inputs["input_ids"])
            actual = logits(model, {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]})
        assert torch.equal(actual, expected)

    def test_a_layer_that_packs_its_rows_takes_a_task_but_no_tasks(self, model):
        class Packing(torch.nn.Module):
            def __init__(self, mlp):
                super().__init__()
                self.inner, self.down_proj = mlp, mlp.down_proj

            def forward(self, x):
                return self.inner(x.reshape(1, -1, x.shape[-1])).view(x.shape)

        inputs = text_inputs()
        with steered(model)[0] as steering, steering.task("a"):
            expected = logits(model, inputs)
        model.model.layers[1].mlp = Packing(model.model.layers[1].mlp)
        steering, _ = steered(model)
        with steering.task("a"):
            torch.testing.assert_close(logits(model, inputs), expected)
        with pytest.raises(RoutingError, match=r"model.layers.1 got 1 rows from a batch of 4"), steering.tasks(ROWS):
            logits(model, inputs)

    def test_many_rows(self, model):
        inputs = text_inputs(rows=300, length=3)
        steering, profiles = steered(model)
        with steering.tasks([None] * 299 + ["a"]):
            actual = logits(model, inputs)
        with scaled(model, profiles["a"]):
            expected = logits(model, inputs)
        torch.testing.assert_close(actual[299], expected[299], atol=1e-3, rtol=1e-4)
        assert torch.equal(actual[:299], logits(model, inputs)[:299])


class TestNeverSilentlyUnsteered:
    def test_a_block_without_a_forward_raises(self, model):
        steering, _ = steered(model)
        with pytest.raises(RoutingError, match=r"no forward .* inside task\('a'\).*steering.wrap"), steering.task("a"):
            pass
        with pytest.raises(RoutingError, match=r"tasks\(\['a', 'none'\]\)"), steering.tasks(["a", None]):
            pass

    def test_it_does_not_hide_the_blocks_own_error(self, model):
        steering, _ = steered(model)
        with pytest.raises(ZeroDivisionError), steering.task("a"):
            1 / 0  # noqa: B018

    def test_layers_called_past_the_model_are_refused(self, model):
        steering, _ = steered(model)
        for call in (model.model, model.forward):
            with pytest.raises(RoutingError, match="call the model itself"), steering.task("a"):
                call(**text_inputs())
            call(**text_inputs())

    def test_attaching_twice_is_refused_also_to_a_part(self):
        model = tiny_models.llava()
        steering, _ = steered(model)
        with pytest.raises(StateError, match="steered already"):
            steered(model)
        with pytest.raises(StateError, match="steered already"):
            steer(model.model.language_model, {})
        assert is_steered(model)
        steering.detach()
        assert not is_steered(model)
        steered(model)[0].detach()

    def test_a_failed_attach_leaves_nothing(self, model):
        steering = steer(model, {})
        hooks = [len(m._forward_pre_hooks) for m in model.modules()]
        with pytest.raises(StateError):
            steer(model, {})
        assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
        steering.detach()
        with pytest.raises(MismatchError):
            steer(model, {"a": random_profile(tiny_models.llama(seed=5), 1)})
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
        assert "generate" not in vars(model)

    def test_verify_notices_a_replaced_projection(self, model):
        steering, _ = steered(model)
        mlp = model.model.layers[1].mlp
        mlp.down_proj = copy.copy(mlp.down_proj)
        mlp.down_proj._forward_pre_hooks = type(mlp.down_proj._forward_pre_hooks)()
        with pytest.raises(StateError, match=r"model.layers.1: its down-projection was replaced"):
            steering.verify()

    def test_verify_notices_another_hook_that_undoes_the_scaling(self, model):
        steering, _ = steered(model)
        model.model.layers[2].mlp.down_proj.register_forward_pre_hook(lambda _module, args: (args[0] * 0.5,))
        with pytest.raises(StateError, match=r"model.layers.2: its input is not scaled"):
            steering.verify()

    def test_a_steered_model_cannot_be_copied(self, model):
        steering, _ = steered(model)
        for attempt in (copy.deepcopy, pickle.dumps):
            with pytest.raises(StateError, match="cannot be copied or pickled"):
                attempt(model)
        steering.detach()
        copy.deepcopy(model)


class TestProfiles:
    def test_from_files_and_folders(self, model, tmp_path):
        inputs = text_inputs()
        profile = random_profile(model, 1, task="a")
        save_profile(profile, tmp_path / "a.safetensors")
        actual = []
        for source in ({"a": profile}, {"a": tmp_path / "a.safetensors"}, str(tmp_path), ProfileStore(tmp_path)):
            with steer(model, source) as steering:
                assert steering.names == ("a",)
                with steering.task("a"):
                    actual.append(logits(model, inputs))
        assert all(torch.equal(one, actual[0]) for one in actual)

    def test_load_replaces_and_unload_forgets(self, model):
        inputs = text_inputs()
        steering, profiles = steered(model)
        with steering.task("b"):
            b = logits(model, inputs)
        with steering.task("a"):
            a = logits(model, inputs)
            steering.load("a", profiles["b"])
            assert torch.equal(logits(model, inputs), a)  # the open block keeps what it asked for
        with steering.task("a"):
            assert torch.equal(logits(model, inputs), b)
            with pytest.raises(StateError, match=r"'a' is in use by task\('a'\)"):
                steering.unload("a")
        steering.unload("a")
        assert steering.names == ("b",)
        with pytest.raises(RoutingError, match="known tasks: b"), steering.task("a"):
            pass
        with pytest.raises(RoutingError, match="no profile"):
            steering.unload("a")

    def test_of_another_model_are_refused(self, model):
        other = random_profile(tiny_models.llama(seed=5), 1)
        steering = steer(model, {})
        with pytest.raises(MismatchError, match="allow_mismatch"):
            steering.load("a", other)
        assert steering.names == ()
        steering.detach()
        with steer(model, {"a": other}, allow_mismatch=True) as steering, steering.task("a@0.5+a@0.25"):
            logits(model, text_inputs())

    def test_bad_names_are_refused(self, model):
        with pytest.raises(ProfileError, match="'none' cannot name a task"):
            steer(model, {"none": random_profile(model, 1)})


class TestDetach:
    def test_is_refused_while_a_task_is_active(self, model):
        steering, _ = steered(model)
        with steering.task("a"):
            with pytest.raises(StateError, match=r"task\('a'\) is active"):
                steering.detach()
            logits(model, text_inputs())
        steering.detach()

    def test_a_detached_steering_says_so(self, model):
        steering, profiles = steered(model)
        with steering:
            pass
        for call in (
            steering.detach,
            steering.verify,
            steering.unfold,
            lambda: steering.fold("a"),
            lambda: steering.load("a", profiles["a"]),
            lambda: steering.unload("a"),
            lambda: steering.task("a").__enter__(),
        ):
            with pytest.raises(StateError, match="detached"):
                call()

    def test_neither_holds_the_other_in_memory(self):
        model = tiny_models.llama()
        steering, _ = steered(model)
        with steering.task("a"):
            generate(model, text_inputs())
        table = weakref.ref(steering._attached.injection.tables.tables[0, "dense"])
        steering.detach()
        gc.collect()
        assert table() is None
        weight = weakref.ref(model.model.layers[0].mlp.down_proj.weight)
        del model
        gc.collect()
        assert weight() is None
        assert steering.names == ("a", "b")

    def test_an_own_generate_is_put_back(self, model):
        own = model.generate
        model.generate = own
        steering, _ = steered(model)
        steering.detach()
        assert vars(model)["generate"] == own


class TestGradients:
    def run(self, model, steering, task):
        model.zero_grad()
        inputs = text_inputs()
        with steering.task(task):
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing_recomputes_the_same(self, model, reentrant):
        steering, _ = steered(model)
        plain = self.run(model, steering, "a")
        unsteered = self.run(model, steering, "none")
        assert not all(torch.allclose(one, other, rtol=1e-2) for one, other in zip(plain, unsteered, strict=True))
        model.train()
        model.enable_input_require_grads()
        enable_checkpointing(model, use_reentrant=reentrant)
        checkpointed = self.run(model, steering, "a")
        for one, other in zip(plain, checkpointed, strict=True):
            torch.testing.assert_close(one, other)
        for one, other in zip(unsteered, self.run(model, steering, "none"), strict=True):
            torch.testing.assert_close(one, other)

    def test_checkpointing_with_a_teacher_forward_in_between(self, model):
        steering, _ = steered(model)
        inputs = text_inputs()
        plain = self.run(model, steering, "a")
        model.train()
        enable_checkpointing(model)
        model.zero_grad()
        with steering.task("a"):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
            with steering.task("none"), torch.no_grad():
                model(**inputs)
            loss.backward()
        for one, other in zip(plain, [p.grad for p in model.parameters() if p.grad is not None], strict=True):
            torch.testing.assert_close(one, other)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_losses_steered_differently_go_back_together(self, model, reentrant):
        """A checkpointed forward is recomputed with the scales that it ran with."""
        steering, _ = steered(model)
        inputs = text_inputs()

        def gradients():
            model.zero_grad()
            losses = []
            with steering.task("b"):
                losses.append(model(**inputs, labels=inputs["input_ids"]).loss)
                with steering.tasks(ROWS):
                    losses.append(model(**inputs, labels=inputs["input_ids"]).loss)
                    with steering.task("none"):
                        losses.append(model(**inputs, labels=inputs["input_ids"]).loss)
                    losses.append(0.5 * model(**inputs, labels=inputs["input_ids"]).loss)
                    with steering.task("a"):
                        losses.append(model(**inputs, labels=inputs["input_ids"]).loss)
                        sum(losses).backward()
            return [parameter.grad.clone() for parameter in model.parameters()]

        plain = gradients()
        model.train()
        model.enable_input_require_grads()
        enable_checkpointing(model, use_reentrant=reentrant)
        for one, other in zip(plain, gradients(), strict=True):
            torch.testing.assert_close(one, other)

    def test_forwards_of_two_threads_that_cannot_be_told_apart_are_refused(self, model):
        """Autograd numbers its nodes thread by thread."""
        steering, _ = steered(model)
        inputs = text_inputs()
        model.train()
        enable_checkpointing(model)

        def forward(task):
            with steering.task(task):
                yield model(**inputs, labels=inputs["input_ids"]).loss

        streams = [forward("a"), forward("b")]
        losses = []
        for stream in streams:
            with ThreadPoolExecutor(1) as pool:
                losses.append(pool.submit(next, stream).result())
        with pytest.raises(StateError, match="cannot be told for which forward"):
            sum(losses).backward()

    def test_backward_outside_the_block_is_refused_when_it_recomputes(self, model):
        steering, _ = steered(model)
        inputs = text_inputs()
        model.train()
        enable_checkpointing(model)
        with steering.task("a"):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
        with pytest.raises(StateError, match=r"backward\(\) inside the block"):
            loss.backward()
        disable_checkpointing(model)
        with steering.task("a"):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()


def test_it_tells_its_model_from_another_load_of_it(model):
    steering, _ = steered(model)
    assert steering.is_attached_to(model)
    assert steering.is_attached_to(torch.compile(model))
    assert not steering.is_attached_to(tiny_models.llama())
    steering.detach()
    assert not steering.is_attached_to(model)


def test_inference_mode(model):
    inputs = text_inputs()
    with torch.inference_mode():
        steering, _ = steered(model)
        with steering.tasks(ROWS):
            inside = model(**inputs).logits.clone()
    with steering.tasks(ROWS):
        outside = logits(model, inputs)
    assert torch.equal(inside, outside)


class TestWrappedModels:
    def test_a_peft_model_is_steered_through_every_entry(self, model):
        inputs = text_inputs()
        peft_model = get_peft_model(model, LoraConfig(target_modules=["down_proj", "q_proj"], init_lora_weights=False))
        peft_model.eval()
        steering, profiles = steered(peft_model)
        for entry in (peft_model, peft_model.base_model, model):
            with steering.tasks(ROWS):
                actual = logits(entry, inputs)
            for row, task in enumerate(ROWS):
                with scaled(model, profiles[task]):
                    expected = logits(model, inputs)[row]
                torch.testing.assert_close(actual[row], expected, atol=1e-3, rtol=1e-4)
        with steering.tasks(ROWS):
            mixed = generate(peft_model, inputs, num_beams=2)
        for row, task in enumerate(ROWS):
            with steering.task(task):
                assert generate(peft_model, tiny_models.select_row(inputs, row), num_beams=2) == [mixed[row]]
        with pytest.raises(RoutingError, match="names 2 rows"), steering.tasks(["a", "b"]):
            peft_model.generate(**inputs, num_beams=2, max_new_tokens=2)
        steering.verify()

    def test_a_model_wrapped_after_steer_stays_steered(self, model):
        inputs = text_inputs()
        steering, _ = steered(model)
        with steering.task("a"):
            expected = logits(model, inputs)
        peft_model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
        with steering.task("a"):
            assert torch.equal(logits(peft_model, inputs), expected)

    def test_accelerate_hooks_go_together_with_steering(self, model):
        inputs = text_inputs()
        untouched = logits(model, inputs)
        profiles = {"a": random_profile(model, 1), "b": random_profile(model, 2)}
        with steer(model, profiles) as steering, steering.tasks(ROWS):
            expected = logits(model, inputs)
        dispatch_model(model, {"": "cpu"}, force_hooks=True)
        with steer(model, profiles) as steering, steering.tasks(ROWS):
            assert torch.equal(logits(model, inputs), expected)
        assert torch.equal(logits(model, inputs), untouched)

    def test_offloaded_weights(self, model):
        inputs = text_inputs()
        profiles = {"a": random_profile(model, 1), "b": random_profile(model, 2)}
        with steer(model, profiles) as steering, steering.tasks(ROWS):
            expected = logits(model, inputs)
        cpu_offload(model, execution_device=torch.device("cpu"))
        with pytest.warns(UserWarning, match="no sketch"):
            steering = steer(model, profiles)
        with steering.tasks(ROWS):
            assert torch.equal(logits(model, inputs), expected)
        with pytest.raises(StateError, match="offloaded"):
            steering.fold("a")

    def test_weights_that_are_nowhere_are_refused(self, model):
        with pytest.raises(LayoutError, match=r"not loaded \(meta device\)"):
            steer(model.to("meta"), {})
