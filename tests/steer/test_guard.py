"""Never silently unsteered: layers that pass their hook by, parts replaced after `steer`, recorded programs."""

import copy

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tiny_models import random_profile, text_inputs
from torch import nn

from hones_steer.errors import RoutingError, StateError
from hones_steer.huggingface import steer

IDS = {"input_ids": text_inputs()["input_ids"], "use_cache": False}
LORA = LoraConfig(target_modules=["down_proj"], init_lora_weights=False)
COMPILED = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


@pytest.fixture
def model():
    return tiny_models.llama()


def attach(model):
    return steer(model, {"a": random_profile(model, 1), "b": random_profile(model, 2)})


def logits(model):
    with torch.no_grad():
        return model(**IDS).logits


class Fused(nn.Module):
    """An FFN that reads the down-projection's weight instead of calling it, as fused kernels do."""

    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
            mlp.act_fn,
        )

    def forward(self, x):
        return F.linear(self.act_fn(self.gate_proj(x)) * self.up_proj(x), self.down_proj.weight)


class Whole(nn.Module):
    """A module in the place of another one, which it keeps inside."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class TestALayerThatRunsWithoutItsScaling:
    @COMPILED
    @pytest.mark.parametrize("tasks", [["a"] * 4, [None, None, "b", None]])
    def test_raises_and_names_it(self, model, compiled, tasks):
        model.model.layers[1].mlp = Fused(model.model.layers[1].mlp)
        untouched = logits(model)
        steering = attach(model)
        call = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
        assert torch.equal(logits(call), untouched)
        for _ in range(2):  # tracing, and the code that was traced
            with pytest.raises(StateError, match=r"model\.layers\.1 ran without .*fold\(\)"), steering.tasks(tasks):
                logits(call)
            with steering.task("none"):
                assert torch.equal(logits(call), untouched)
        steering.fold("a")
        assert not torch.equal(logits(call), untouched)
        steering.unfold()
        steering.detach()
        assert torch.equal(logits(model), untouched)

    @COMPILED
    def test_raises_where_it_happens_after_steer(self, model, compiled):
        """Inductor recompiles for another `forward`, and tracing is when the guard looks."""
        steering = attach(model)
        call = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
        with steering.task("a"):
            logits(call)
        layer = model.model.layers[2]
        layer.mlp.forward = lambda x: Fused.forward(layer.mlp, x)
        with pytest.raises(StateError, match=r"model\.layers\.2 ran without"), steering.task("a"):
            logits(call)
        del layer.mlp.forward
        with steering.task("a"):
            logits(call)

    def test_raises_where_layers_are_compiled_one_by_one(self, model):
        model.model.layers[1].mlp = Fused(model.model.layers[1].mlp)
        steering = attach(model)
        for layer in model.model.layers:
            layer.compile(backend="eager", fullgraph=True)
        for _ in range(2):
            with pytest.raises(StateError, match=r"model\.layers\.1 ran without"), steering.task("a"):
                logits(model)

    def test_leaves_nothing_behind(self, model):
        model.model.layers[1].mlp = Fused(model.model.layers[1].mlp)
        steering = attach(model)
        with pytest.raises(StateError), steering.task("a"):
            logits(model)
        steering.detach()
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())

    def test_a_hook_that_somebody_removed_is_noticed(self, model):
        steering = attach(model)
        model.model.layers[0].mlp.down_proj._forward_pre_hooks.clear()
        with pytest.raises(StateError, match=r"model\.layers\.0 ran without"), steering.task("a"):
            logits(model)

    @COMPILED
    def test_a_layer_that_does_not_run_is_no_fault(self, model, compiled):
        """Early exit does that, and a text prompt in a model with cross-attention layers."""
        steering = attach(model)
        with steering.task("a"):
            whole = logits(model)
        model.model.layers[1].forward = lambda hidden, *_args, **_kwargs: hidden  # runs, without its FFN
        with pytest.raises(StateError, match=r"model\.layers\.1"), steering.task("a"):
            logits(torch.compile(model, backend="eager") if compiled else model)
        del model.model.layers[1].forward
        model.model.config.num_hidden_layers = 2  # the decoder leaves the third layer out
        with steering.task("a"):
            left_early = logits(torch.compile(model, backend="eager") if compiled else model)
        assert not torch.allclose(left_early, whole, atol=1e-2)


class TestPartsReplacedAfterSteer:
    def replacements(self, model):
        layers = model.model.layers

        def projection():
            layers[1].mlp.down_proj = copy.copy(layers[1].mlp.down_proj)
            layers[1].mlp.down_proj._forward_pre_hooks = {}

        def ffn():
            layers[1].mlp = Fused(layers[1].mlp)

        def layer():
            layers[1] = Whole(layers[1])

        def decoder():
            model.model = Whole(model.model)

        return {"mlp.down_proj": projection, "mlp": ffn, "model.layers.1": layer, "model": decoder}

    @pytest.mark.parametrize("part", ["mlp.down_proj", "mlp", "model.layers.1", "model"])
    def test_are_refused_by_name(self, model, part):
        steering = attach(model)
        untouched = logits(model)
        self.replacements(model)[part]()
        with pytest.raises(StateError, match=rf"{part} was replaced after steer\(\)"), steering.task("a"):
            logits(model)
        assert not steering.is_attached_to(model)
        assert torch.equal(logits(model), untouched)

    def test_a_lora_gives_one_result_whenever_it_is_added(self, model):
        later = copy.deepcopy(model)
        torch.manual_seed(0)
        peft_model = get_peft_model(model, LORA).eval()
        adapted = logits(peft_model)
        steering = attach(peft_model)
        with steering.task("a"):
            before = logits(peft_model)
        assert not torch.allclose(before, adapted, atol=1e-2)

        steering = attach(later)
        torch.manual_seed(0)
        peft_later = get_peft_model(later, LORA).eval()
        assert torch.equal(logits(peft_later), adapted)
        with (
            pytest.raises(StateError, match=r"down_proj was replaced after steer\(\).*PEFT adapter.*detach\(\)"),
            steering.task("a"),
        ):
            logits(peft_later)
        steering.detach()
        steering = attach(peft_later)
        with steering.task("a"):
            assert torch.equal(logits(peft_later), before)

    def test_merging_an_adapter_is_noticed(self, model):
        peft_model = get_peft_model(model, LORA).eval()
        steering = attach(peft_model)
        merged = peft_model.merge_and_unload()
        assert not steering.is_attached_to(merged)
        with pytest.raises(StateError, match="was replaced"), steering.task("a"):
            logits(merged)
        steering.detach()
        with attach(merged) as steering, steering.task("a"):
            logits(merged)

    def test_compiling_a_part_replaces_nothing(self, model):
        steering = attach(model)
        with steering.task("a"):
            expected = logits(model)
        model.model.layers[1].mlp = torch.compile(model.model.layers[1].mlp, backend="eager")
        model.model.layers[2] = torch.compile(model.model.layers[2], backend="eager")
        with steering.task("a"):
            assert torch.equal(logits(model), expected)
        assert steering.is_attached_to(model)


class TestRecordedPrograms:
    """A recorded program would be steered forever as when it was recorded, or never."""

    @pytest.fixture(autouse=True)
    def fresh_compiler(self):
        yield
        torch.compiler.reset()

    @pytest.mark.parametrize("strict", [False, True])
    def test_export_is_refused(self, model, strict):
        steering = attach(model)
        ffn = model.model.layers[0].mlp
        refused = pytest.raises(Exception, match=r"torch\.export cannot record a steered model")
        for part, args, kwargs in (
            (model, (), IDS),
            (model.model, (), IDS),
            (ffn, (torch.randn(4, 7, 32),), {}),
        ):
            for task in ("a", "none"):
                with refused, steering.task(task):
                    torch.export.export(part, args, kwargs, strict=strict)
        steering.detach()
        torch.export.export(model, (), IDS, strict=False)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
    def test_trace_is_refused(self, model):
        steering = attach(model)
        for call in (model, model.model.layers[0].mlp):
            inputs = IDS["input_ids"] if call is model else torch.randn(4, 7, 32)
            for task in ("a", "none"):
                with pytest.raises(StateError, match=r"torch\.jit\.trace cannot record"), steering.task(task):
                    torch.jit.trace(call, inputs, strict=False)
        with steering.task("a"):
            logits(model)


@COMPILED
def test_the_decoder_called_past_its_model_is_refused(model, compiled):
    steering = attach(model)
    decoder = torch.compile(model.model, backend="eager") if compiled else model.model
    with torch.no_grad():
        plain = decoder(**IDS)[0]
        with pytest.raises(RoutingError, match="called past the model"), steering.task("a"):
            decoder(**IDS)
        assert torch.equal(decoder(**IDS)[0], plain)
