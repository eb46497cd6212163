"""The vLLM plugin: entry points that vLLM calls in each of its processes.

compat.py      the functions of vLLM that the plugin relies on, checked at start, and the settings it refuses
connectors.py  which KV connectors keep one steering's cache from another
front.py       before the engine: an expression or an HTTP admission becomes the request's profile and cache salt
layout.py      in the worker: the loaded model's down-projections
experts.py     in the worker: its routed experts, and their scale tables
scaling.py     in the worker: each token's slot, the scaled input of each down-projection, the scaled rows of experts
worker.py      in the worker: from the engine's steps to the profile and slot of each token
api_server.py  the HTTP side of the API server
servers.py     the folder in which several API servers agree, and the registry of each
serve.py       `vllm serve` as a module, which starts them
batch.py       the lines of a batch file (`vllm run-batch`), in place of the HTTP side

`hones serve` runs the API server, which starts the engine core as a process of its own. There is one worker for each
tensor-parallel rank of each pipeline stage: a single one lives in the engine core's process, several have a process
each. With data parallelism there are so many engine cores, each with its workers and their tables; the API server has
one registry for all of them, and vLLM chooses the engine core of each request after step 6. Of several API servers each
has a registry, and all of these hold what is in a file (`hones_serving.shared_state`), for a new version of which each
looks before step 3; who is admitted, and what is counted in steps 6 and 11, each knows alone. From a profile's file to
the multiplied activation, and back to the response's headers, through `hones_serving.middleware` and `.registry`, the
modules of this package, and `hones_steer.slots`; `register` has wrapped the methods of vLLM:

At start
    worker       1. `worker.attach`, after vLLM's `Worker.load_model`: finds every layer's down-projection
                    (`layout.find_decoder`), and gives it a `SteeredInput` with a table of scales; each layer's
                    routed experts get a `SteeredExperts`, and those that the profiles in the folder list a table
    API server   2. `front.attach`, to which `Endpoint.init_state` gives the identity of the model, having asked the
                    workers for it: its `ProfileRegistry` reads every profile file of the folder and checks it
For each request
    API server   3. `contract.admit`: `routing.decide` chooses the expression, `ProfileRegistry.resolve` makes it one
                    profile, `ProfileRegistry.admit` reserves room
                 4. `exchange.Exchange.admission`: the middleware notes the admission in the request's context, which
                    vLLM's handlers, tasks and generators run in
                 5. `Front.steer`, after `InputProcessor.process_inputs`: puts the profile's bytes and digest into the
                    request's `SamplingParams.extra_args`, and salts its prefix cache with the digest; a scope
                    goes with them
                 6. `Front.enter`, around `OutputProcessor.add_request`: keeps the profile's slot until the request ends
    engine core     vLLM's own scheduler puts new requests, `extra_args` included, into its `SchedulerOutput`;
                    `front.block_keys` has a scope enter the hashes of blocks that reach behind the prompt
For each step
    worker       7. `WorkerSteering.begin`, before the runner's `execute_model`: unpacks the profiles of new requests
                 8. `WorkerSteering.fill`, before the runner's `_prepare_inputs` (V1) or `prepare_inputs` (V2), if the
                    step's requests are not those of the last step: takes a slot for each profile (`SlotPool.acquire`,
                    which writes its scales with `ScaleTables.write`) and sets each token's slot (`TokenSlots.write`);
                    before, `MixtureTables.require` sees that each expert that a profile lists has a table
                 9. `SteeredInput.forward`, before each down-projection: z * table[slot of each token]; of routed
                    experts, after their activation: z * rows[slot of each row's token, table of its expert]
For each request
    API server  10. `middleware._steering_headers`, as the response starts: X-Hones-Profile and X-Hones-Route;
                    `contract.Admitted.complete`: the object `hones` in its JSON
                11. `Front.leave`, after `OutputProcessor._finish_request`: counts the tokens and gives the slot back.
                    What speculative decoding drafted, `Front.count_drafts` has counted before `process_outputs`
                12. `ProfileRegistry.leave`, after the response's end

`LLM(...)` has no steps 3, 4, 10 and 12: `LLMEngine` calls `front.attach` itself, and in step 5 `Front.steer` resolves
the expression `hones_task` from the request's `extra_args`. A profile's contents travel inside the request, so workers
need no registry of their own.

vLLM logs and skips a plugin whose *import* fails: here only the standard library is imported, the rest inside
`register`, whose errors stop the process. It also logs and skips an `endpoint` that fails, so that one does next to
nothing: what can go wrong is in `Endpoint.init_state`, whose errors stop the server. If it is skipped all the same,
`front._load_endpoint_plugins` stops the server. An AsyncLLM in another program's server has no front, and
`front._process_inputs` refuses to generate.
"""

from typing import Any

_registered = False


def register() -> None:
    """Install the plugin: vLLM calls this `vllm.general_plugins` entry point in every process, perhaps more than once.

    Does nothing unless HONES_PROFILES is set.

    Raises:
        StateError: this vLLM version is not supported.
        DataError: a HONES_* variable has a value that means nothing.
    """
    global _registered
    from hones_serving.settings import Settings

    settings = Settings.from_env()
    if settings is None or _registered:
        return
    from hones_serving.vllm import batch, compat, front, servers, worker

    compat.check_version()
    front.install()
    servers.install()
    batch.install()
    worker.install()
    _registered = True


def endpoint() -> Any:
    """Make the API server's plugin object: vLLM calls this `vllm.endpoint_plugins` entry point there."""
    from hones_serving.vllm.api_server import Endpoint

    return Endpoint()
