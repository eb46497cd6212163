"""Settings and requests that cannot be steered are refused by name, at the start or before they enter the engine."""

import asyncio
import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
from hones_serving.metrics import Metrics
from hones_serving.settings import Settings
from hones_serving.vllm import compat
from hones_serving.vllm.servers import registry_of
from prometheus_client import CollectorRegistry
from serving.steered import Reference, answers, engine, generate, prompts, request, tokens_of, write_profiles
from tiny_models import TEXT, _build
from tiny_processors import text_tokenizer
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM

from hones_steer import ModelIdentity
from hones_steer.errors import DataError, LayoutError, MismatchError, ProfileError, RoutingError, StateError
from serving import checkpoints

PROMPTS = prompts(2)


# Without HONES_PROFILES (first: nothing has been wrapped yet) ----------------------------------------


@pytest.mark.parametrize("plugins", ["hones", "none"])
def test_without_a_folder_of_profiles_nothing_is_changed(llama: Path, plugins: str) -> None:
    with engine(llama, None, {"VLLM_PLUGINS": plugins}) as llm:
        hooks = llm.apply_model(lambda model: sum(len(module._forward_pre_hooks) for module in model.modules()))
        assert hooks == [0]
        unsteered, named = answers(llm, [PROMPTS[0]] * 2, [None, "whatever vLLM's users put there"])
        assert unsteered == named


# Settings of vLLM ---------------------------------------------------------------------------------

UBATCH = {"ubatch_size": 2, "all2all_backend": "deepep_low_latency"}
DRAFT = {"method": "draft_model", "num_speculative_tokens": 2}
NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
UNSUPPORTED = {
    "pooling models": {"runner": "pooling"},
    "microbatching": UBATCH,
    "decode context parallelism": {"tensor_parallel_size": 4, "decode_context_parallel_size": 2},
    "the KV connector ExampleConnector": {
        "kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    },
    "unverified drafts": {
        "speculative_config": {**NGRAM, "rejection_sample_method": "synthetic", "synthetic_acceptance_length": 2}
    },
}
UNTESTED = {
    "data parallelism over several machines, .*": {"data_parallel_size": 2, "data_parallel_size_local": 1},
    "the executor backend 'external_launcher'": {"distributed_executor_backend": "external_launcher"},
    "an encoder-cache connector": {"ec_transfer_config": {"ec_connector": "ECExampleConnector", "ec_role": "ec_both"}},
    "speculative decoding by 'ngram_gpu'": {"speculative_config": {**NGRAM, "method": "ngram_gpu"}},
    "speculative decoding in a pipeline": {"speculative_config": NGRAM, "pipeline_parallel_size": 2},
}


def config_of(model: Path, **options: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    if options.get("speculative_config") is DRAFT:
        options["speculative_config"] = {**DRAFT, "model": str(model)}
    return EngineArgs(model=str(model), dtype="float32", max_model_len=256, **options).create_engine_config()


@pytest.mark.parametrize(("name", "options"), UNSUPPORTED.items(), ids=UNSUPPORTED)
def test_settings_refused_by_name(llama: Path, profiles: Path, name: str, options: dict[str, Any]) -> None:
    config = config_of(llama, **options)
    for allow_untested in (False, True):
        with pytest.raises(StateError, match=f"does not support {name}.*start vLLM without"):
            compat.refuse_unsupported(config, Settings(profiles, allow_untested=allow_untested))


@pytest.mark.parametrize(("name", "options"), UNTESTED.items(), ids=UNTESTED)
def test_untested_settings_want_to_be_asked_for(
    llama: Path, profiles: Path, name: str, options: dict[str, Any]
) -> None:
    config = config_of(llama, **options)
    with pytest.raises(StateError, match=f"never run with {name}; start vLLM without, or .*HONES_ALLOW_UNTESTED=1"):
        compat.refuse_unsupported(config, Settings(profiles))
    compat.refuse_unsupported(config, Settings(profiles, allow_untested=True))


def test_several_at_once_are_all_named(llama: Path, profiles: Path) -> None:
    config = config_of(llama, tensor_parallel_size=4, decode_context_parallel_size=2, **UBATCH)
    with pytest.raises(StateError, match=r"microbatching .* and decode context parallelism in this version"):
        compat.refuse_unsupported(config, Settings(profiles))


def test_prefill_context_parallelism(llama: Path, profiles: Path) -> None:
    config = config_of(llama)
    config.parallel_config.prefill_context_parallel_size = 2  # vLLM itself allows it only where there is Triton
    with pytest.raises(StateError, match="does not support prefill context parallelism"):
        compat.refuse_unsupported(config, Settings(profiles))


def test_replicas_behind_another_load_balancer(llama: Path, profiles: Path) -> None:
    config = config_of(llama, data_parallel_size=2)
    config.parallel_config.data_parallel_external_lb = True  # vLLM itself allows it only with experts
    with pytest.raises(StateError, match=r"never run with data parallelism .* behind a load balancer of your own"):
        compat.refuse_unsupported(config, Settings(profiles))


def test_several_api_servers_with_ids_of_their_clients(
    llama: Path, profiles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "1")
    compat.refuse_unsupported(config_of(llama), Settings(profiles))
    with pytest.raises(StateError, match="does not support request ids that clients choose"):
        compat.refuse_unsupported(config_of(llama, _api_process_count=2), Settings(profiles))


@pytest.mark.parametrize(
    ("slots", "servers", "most"),
    [(None, 1, 64), (None, 2, 32), (9, 1, 9), (9, 2, 4), (9, 9, 1), (100, 2, None), (100, 1, None), (400, 3, None)],
)
def test_api_servers_share_the_slots(
    slots: int | None, servers: int, most: int | None, llama: Path, profiles: Path
) -> None:
    """With as many slots as requests, each may have them all."""
    config = config_of(llama, max_num_seqs=100, _api_process_count=servers)
    assert compat.max_admitted(config, Settings(profiles, max_profiles=slots)) == most


def test_api_servers_without_a_slot_each(llama: Path, profiles: Path) -> None:
    config = config_of(llama, max_num_seqs=100, _api_process_count=3)
    with pytest.raises(StateError, match="--max-profiles is 2, but 3 API servers need one each"):
        compat.max_admitted(config, Settings(profiles, max_profiles=2))


def test_several_api_servers_need_a_folder_to_agree_in(llama: Path, profiles: Path) -> None:
    identity = ModelIdentity.from_model(AutoModelForCausalLM.from_pretrained(llama)).to_json()
    config = config_of(llama, _api_process_count=2)
    with pytest.raises(StateError, match="HONES_STATE_DIR names no folder in which they can agree"):
        registry_of(config, [{"identity": identity, "room": None}], Settings(profiles), "")


def test_the_rust_frontend(llama: Path, profiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(StateError, match="does not support the Rust frontend"):
        compat.refuse_unsupported(config_of(llama), Settings(profiles))


def test_adaptive_verification(llama: Path, profiles: Path) -> None:
    config = config_of(llama, speculative_config=NGRAM)
    config.speculative_config.enable_adaptive_verification = True  # vLLM itself allows it only with CUDA graphs
    with pytest.raises(StateError, match=r"adaptive verification \(speculative_config\.enable_adaptive"):
        compat.refuse_unsupported(config, Settings(profiles, allow_untested=True))


def test_lossy_verification_of_drafts(llama: Path, profiles: Path) -> None:
    """Takes the method of vLLM 0.33 that accepts drafts which the model itself would not have said."""
    config = config_of(llama, speculative_config=NGRAM)
    for method in ("standard", "block"):
        config.speculative_config.rejection_sample_method = method
        compat.refuse_unsupported(config, Settings(profiles))
    config.speculative_config.rejection_sample_method = "fly"
    with pytest.raises(StateError, match=r"unverified drafts \(speculative_config\.rejection_sample_method 'fly'\)"):
        compat.refuse_unsupported(config, Settings(profiles, allow_untested=True))


def test_what_is_supported_is_not_refused(llama: Path, profiles: Path) -> None:
    speculative = [{"speculative_config": method} for method in (NGRAM, DRAFT)]
    for options in (
        {},
        {"tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2},
        {"data_parallel_size": 2},
        {"_api_process_count": 2},
        {"enable_lora": True},
        *speculative,
    ):
        compat.refuse_unsupported(config_of(llama, **options), Settings(profiles))


def test_an_engine_with_a_refused_setting_does_not_start(llama: Path, profiles: Path) -> None:
    with pytest.raises(StateError, match="does not support pooling models"), engine(llama, profiles, runner="pooling"):
        pass


def test_a_server_without_its_http_side_does_not_start(llama: Path, profiles: Path) -> None:
    """If VLLM_PLUGINS is unset, vLLM loads the plugin for the engine, but not the one for the API server."""
    from hones_serving.vllm import register
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HONES_PROFILES", str(profiles))
        patch.delenv("VLLM_PLUGINS", raising=False)
        register()
        with pytest.raises(StateError, match="set VLLM_PLUGINS=hones, or use `hones serve`"):
            AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(llama), dtype="float32", max_model_len=256))


def test_a_server_whose_http_side_cannot_be_made_does_not_start(
    profiles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails as a missing package would; vLLM logs that, and would start to serve all the same."""
    import hones_serving.vllm
    from fastapi import FastAPI
    from vllm.plugins.endpoint_plugins.interface import attach_endpoint_plugins

    def endpoint() -> None:
        raise ImportError("a package is missing")

    monkeypatch.setenv("HONES_PROFILES", str(profiles))
    monkeypatch.setenv("VLLM_PLUGINS", "hones")
    hones_serving.vllm.register()
    monkeypatch.setattr(hones_serving.vllm, "endpoint", endpoint)
    with pytest.raises(StateError, match="vLLM could not make the HTTP side of hones-steer"):
        attach_endpoint_plugins(FastAPI(), ("generate",))


def test_a_server_without_our_http_side_generates_nothing(
    llama: Path, profiles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serves as programs do that put a server of their own around vLLM's AsyncLLM, without its plugins."""
    from hones_serving.vllm import register
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.exceptions import GracefulHTTPError
    from vllm.v1.engine.async_llm import AsyncLLM

    async def ask() -> None:
        options: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 8}
        server = AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(llama), **options))
        try:
            prompt = {"prompt_token_ids": PROMPTS[0]}
            async for _ in server.generate(prompt, SamplingParams(max_tokens=2), request_id="1"):
                pass
        finally:
            server.shutdown()
            server.engine_core.resources.ctx.destroy(linger=0)  # vLLM leaves it open

    monkeypatch.setenv("HONES_PROFILES", str(profiles))
    monkeypatch.setenv("VLLM_PLUGINS", "hones")
    register()
    with pytest.raises(GracefulHTTPError, match="HTTP side of hones-steer has not started") as refused:
        asyncio.run(ask())
    assert refused.value.http_status == 503


# Batch files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"body": {"hones_task": "vqa", "hones_task": "none"}}', "the body gives 'hones_task' more than once"),
        ('{"body": {"vllm_xargs": {"hones_task": "a", "hones_task": "b"}}}', "the body gives 'hones_task' more than"),
        ('{"body": {"model": "m:vqa", "model": "m"}}', "the body gives 'model' more than once"),
        ('{"body": {"hones_task": "vqa"}, "body": {}}', "gives 'body' more than once"),
    ],
)
def test_a_batch_file_that_names_steering_twice(
    line: str, words: str, profiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hones_serving.vllm.batch import steer_runner
    from vllm.entrypoints.launchers import run_batch

    for name in ("read_file", "build_endpoint_registry"):
        monkeypatch.setattr(run_batch, name, getattr(run_batch, name))  # put back afterwards
    steer_runner(run_batch, Settings(profiles))
    file, plain = tmp_path / "in.jsonl", '{"body": {"messages": [{"x": 1, "x": 2}], "model": "m"}}\n\nno JSON\n'
    file.write_text(plain)
    assert asyncio.run(run_batch.read_file(str(file))) == plain
    file.write_text(plain + line)
    with pytest.raises(RoutingError, match=f"line 4 of the batch file.*{words}"):
        asyncio.run(run_batch.read_file(str(file)))


def test_the_runner_of_vllm_0_33_is_given_a_checked_file_from_its_beginning(profiles: Path) -> None:
    """Stands in for a runner that is given an open file; no CPU build has it yet."""
    from hones_serving.vllm.batch import steer_runner

    answered: list[str] = []

    async def dispatch_batch(input_file: IO[str], output_file: IO[str]) -> None:
        answered.extend(input_file)
        output_file.write("done")

    runner = SimpleNamespace(build_endpoint_registry=dispatch_batch, dispatch_batch=dispatch_batch)
    steer_runner(runner, Settings(profiles))
    lines, out = ['{"body": {"model": "m"}}\n', "\n", '{"body": {"model": "m:vqa", "model": "m"}}\n'], io.StringIO()
    with pytest.raises(RoutingError, match="line 3 of the batch file: the body gives 'model' more than once"):
        asyncio.run(runner.dispatch_batch(io.StringIO("".join(lines)), out))
    assert answered == []
    asyncio.run(runner.dispatch_batch(io.StringIO("".join(lines[:2])), out))
    assert (answered, out.getvalue()) == (lines[:2], "done")


# Models -------------------------------------------------------------------------------------------


def test_layers_without_an_ffn(profiles: Path, tmp_path: Path) -> None:
    config = MambaConfig(vocab_size=TEXT["vocab_size"], hidden_size=128, state_size=16, num_hidden_layers=2)
    mamba = tmp_path / "mamba"
    _build(MambaForCausalLM, config, seed=0).save_pretrained(mamba)
    text_tokenizer(config).save_pretrained(mamba)
    message = r"layer 0 of MambaModel \(MambaDecoderLayer\) has not one FFN .*\(found: none\)"
    with pytest.raises(LayoutError, match=message), engine(mamba, profiles):
        pass


# Profiles -----------------------------------------------------------------------------------------


def test_profiles_that_cannot_be_used(llama: Path, profiles: Path, tmp_path: Path) -> None:
    """The engine does not start; the message names the file."""
    another_llama = checkpoints.llama(tmp_path / "other", seed=1)
    write_profiles(AutoModelForCausalLM.from_pretrained(another_llama), tmp_path / "of_another")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "vqa.safetensors").write_bytes((profiles / "vqa.safetensors").read_bytes()[:-3])
    for folder, error, message in (
        ("of_another", MismatchError, r"of_another/cap\.safetensors: the profile belongs to another model"),
        ("broken", ProfileError, r"broken/vqa\.safetensors: not a sound safetensors file"),
        ("missing", ProfileError, r"missing: no such folder"),
    ):
        with pytest.raises(error, match=message), engine(llama, tmp_path / folder):
            pass


def test_settings_that_mean_nothing(llama: Path, profiles: Path) -> None:
    with (
        pytest.raises(DataError, match="HONES_MAX_PROFILES is '0'"),
        engine(llama, profiles, {"HONES_MAX_PROFILES": "0"}),
    ):
        pass


# Requests -----------------------------------------------------------------------------------------


@pytest.fixture(scope="class")
def llm(llama: Path, profiles: Path) -> Iterator[Any]:
    with engine(llama, profiles) as llm:
        yield llm


class TestRequests:
    @pytest.mark.parametrize(
        ("extra", "message"),
        [
            ({"hones_task": "poetry"}, "no profile for the task 'poetry'; known tasks: cap, ocr, vqa"),
            ({"hones_task": "vqa@0+poetry@0"}, "no profile for the task 'poetry'"),
            ({"hones_task": "vqa + ocr"}, "'vqa ' in the steering expression 'vqa . ocr' is not a task name"),
            ({"hones_task": "vqa@11"}, "exceeds 10 in magnitude"),
            ({"hones_task": ""}, "is not a task name"),
            ({"hones_task": 3}, "hones_task is 3; give an expression"),
            ({"hones_task": ["vqa"]}, "hones_task is .'vqa'.; give an expression"),
            ({"hones_profile": b"bytes", "hones_digest": "0" * 64}, "hones_digest, hones_profile: a reserved name"),
            ({"hones_task": "vqa", "hones_label": "x"}, "hones_label: a reserved name"),
            ({"hones_anything": None}, "hones_anything: a reserved name"),
        ],
    )
    def test_refused(self, llm: Any, extra: dict[str, Any], message: str) -> None:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=4, extra_args=extra)
        with pytest.raises(RoutingError, match=message):
            llm.generate([request(PROMPTS[0])] * 2, [SamplingParams(max_tokens=4), params], use_tqdm=False)
        assert not llm.llm_engine.has_unfinished_requests()
        assert llm.llm_engine.input_processor.hones_front.registry.slots_used() == 0

    @pytest.mark.parametrize("extra", [{"hones_task": "vqa"}, {"hones_scope": "all"}], ids=str)
    def test_a_server_takes_no_steering_past_its_middleware(
        self, llm: Any, extra: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Gives the engine an expression or a scope, as vLLM's routes that take whole sampling parameters could."""
        from vllm import SamplingParams

        front = llm.llm_engine.input_processor.hones_front
        monkeypatch.setattr(front, "metrics", Metrics(front.registry, CollectorRegistry()))
        params = SamplingParams(max_tokens=4, extra_args=extra)
        with pytest.raises(RoutingError, match=f"this route cannot be steered; leave out '{min(extra)}'"):
            llm.generate([request(PROMPTS[0])], params, use_tqdm=False)

    def test_other_extra_arguments_pass(self, llm: Any) -> None:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=4, extra_args={"mine": 1, "hones_task": None})
        (output,) = llm.generate([request(PROMPTS[0])], params, use_tqdm=False)
        assert tokens_of([output]) == tokens_of(generate(llm, PROMPTS[:1], [None], max_tokens=4, ignore_eos=False))
        assert params.extra_args == {"mine": 1, "hones_task": None}

    def test_the_engine_lives(self, llm: Any, llama: Path, profiles: Path) -> None:
        reference = Reference(AutoModelForCausalLM.from_pretrained(llama), profiles)
        assert answers(llm, PROMPTS, ["vqa", "none"]) == reference.answers(PROMPTS, ["vqa", "none"])


# Another vLLM -------------------------------------------------------------------------------------


def test_a_changed_vllm_is_refused(llama: Path, profiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine does not start if a wrapped function takes other parameters, and the message names them."""
    import hones_serving.vllm
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def _prepare_inputs(self: Any, batch: Any) -> None:
        """A method whose parameters are not those that the plugin was written for."""

    monkeypatch.setattr(hones_serving.vllm, "_registered", False)
    monkeypatch.setattr(GPUModelRunner, "_prepare_inputs", _prepare_inputs)
    with (
        pytest.raises(
            StateError, match=r"not supported: .*_prepare_inputs takes self, batch instead of .*tested: 0.32"
        ),
        engine(llama, profiles),
    ):
        pass


def test_a_vllm_that_lacks_something_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.output_processor import OutputProcessor

    monkeypatch.delattr(OutputProcessor, "abort_requests")
    with pytest.raises(StateError, match=r"not supported: .*abort_requests.*; tested: 0\.32"):
        compat.check_version()
