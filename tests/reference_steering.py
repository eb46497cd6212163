"""The runtime's scaling written plainly: one row at a time, the multiplication spelled out inside each projection.

Shares nothing with `hones_steer` but the profile: projections are found by their names, and a row's result comes
from running that row alone. Routed experts are computed here, one token and one expert after the other.
"""

import re
from contextlib import contextmanager

import torch
from tiny_models import select_row

DENSE = ("mlp.down_proj", "mlp.c_proj", "fc2", "feed_forward.down_proj")
SHARED = ("shared_expert.down_proj", "shared_experts.down_proj")


def named_parts(model, names):
    """The text decoder's modules with these last names, by the number of their layer."""
    return {
        int(re.search(r"\.(\d+)\.", name)[1]): module
        for name, module in model.named_modules()
        if name.endswith(names) and "vision" not in name and "visual" not in name
    }


def down_projections(model):
    """The text decoder's FFN down-projections in layer order, by name."""
    return [module for _, module in sorted(named_parts(model, DENSE).items())]


def in_scope(scope, end, length):
    """For each position of a sequence, whether it is steered; the prompt has `end` of them."""
    return [scope == "all" or (scope == "prompt") == (position < end) for position in range(length)]


@contextmanager
def scaled(model, profile, steered=None):
    """Within the block, each down-projection multiplies its input by the profile's scales; None changes nothing.

    `steered` says for each position of the only row whether it is steered; without it all are.
    """
    changed = []
    experts = {}
    for (layer, part), (neurons, scales) in ({} if profile is None else profile.ffns).items():
        if isinstance(part, int):
            experts.setdefault(layer, {})[part] = dict(zip(neurons.tolist(), scales.tolist(), strict=True))
            continue
        module = named_parts(model, DENSE if part == "dense" else SHARED)[layer]
        factor = torch.ones(module.weight.numel() // profile.base_model.hidden_size)
        for neuron, value in zip(neurons.tolist(), scales.tolist(), strict=True):
            factor[neuron] = value

        def forward(z, module=module, factor=factor):
            product = (z.float() * factor).to(z.dtype)
            if steered is not None:
                product = torch.where(torch.tensor(steered)[:, None], product, z)
            return type(module).forward(module, product)

        module.forward = forward
        changed.append(module)
    for layer, factors in experts.items():
        module = named_parts(model, (".experts",))[layer]
        module.forward = experts_forward(module, factors, steered)
        changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def experts_forward(module, factors, steered=None):
    """Return the forward of a module of experts, neuron i of expert e multiplied by `factors[e][i]` if there is one.

    `steered` is that of `scaled`, where the router chooses the experts of each token.
    """

    def expert_output(e, x, token=None):
        z = expert_activations(module, e, x)
        for neuron, value in factors.get(e, {}).items() if steered is None or steered[token] else ():
            z[neuron] *= value
        return expert_product(module, "down_proj", e, z)

    def forward(hidden_states, choices, weights):
        result = torch.zeros_like(hidden_states, dtype=torch.float32)
        for token, x in enumerate(hidden_states):
            for e, weight in zip(choices[token].tolist(), weights[token], strict=True):
                result[token] += weight * expert_output(e, x, token)
        return result

    def forward_of_all(hidden_states):
        tokens = len(hidden_states) // module.num_experts
        return torch.stack([expert_output(i // tokens, x) for i, x in enumerate(hidden_states)])

    return forward_of_all if type(module).__name__ == "Llama4TextExperts" else forward


def expert_product(module, name, e, x):
    """The product of expert e's weight of this name with x, and its bias if there is one."""
    weight = getattr(module, name)[e]
    bias = getattr(module, f"{name}_bias")[e] if hasattr(module, f"{name}_bias") else 0
    return (x @ weight if inputs_first(module) else weight @ x) + bias


def inputs_first(module):
    """Whether the weights of experts are [experts, inputs, outputs]."""
    return getattr(module, "is_transposed", type(module).__name__ == "Llama4TextExperts")


def expert_activations(module, e, x):
    """Z of expert e for one token."""
    if not hasattr(module, "gate_up_proj"):  # no gate
        return module.act_fn(expert_product(module, "up_proj", e, x))
    gate_up = expert_product(module, "gate_up_proj", e, x)
    if type(module).__name__ == "GptOssExperts":
        gate, up = gate_up[::2].clamp(max=module.limit), gate_up[1::2].clamp(-module.limit, module.limit)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    if "_apply_gate" in vars(type(module)) and not hasattr(module, "act_fn"):
        return module._apply_gate(gate_up)
    return module.act_fn(gate_up[: len(gate_up) // 2]) * gate_up[len(gate_up) // 2 :]


def logits_alone(model, inputs, profiles):
    """Logits `[T, V]` of each row, run alone under its profile."""
    rows = []
    for row, profile in enumerate(profiles):
        with torch.no_grad(), scaled(model, profile):
            rows.append(model(**select_row(inputs, row)).logits[0])
    return rows


def generated_alone(model, inputs, profiles, **options):
    """Generated ids of each row, run alone under its profile; a list of sequences per row."""
    rows = []
    for row, profile in enumerate(profiles):
        with scaled(model, profile):
            ids = model.generate(**select_row(inputs, row), do_sample=False, **options)
        rows.append(new_tokens(ids, inputs))
    return rows


def generated_in_scope(model, inputs, profiles, scopes, count):
    """The next `count` tokens of each row under its profile and scope, each from the whole sequence computed anew."""
    added = {"input_ids": 0, "attention_mask": 1, "mm_token_type_ids": 0}
    rows = []
    for row, (profile, scope) in enumerate(zip(profiles, scopes, strict=True)):
        one = select_row(inputs, row)
        end = one["input_ids"].shape[1]
        for length in range(end, end + count):
            with torch.no_grad(), scaled(model, profile, in_scope(scope, end, length)):
                token = int(model(**one, use_cache=False).logits[0, -1].argmax())
            for name in one.keys() & added:
                one[name] = torch.nn.functional.pad(one[name], (0, 1), value=added[name])
            one["input_ids"][0, -1] = token
        rows.append(one["input_ids"][0, end:].tolist())
    return rows


def new_tokens(ids, inputs):
    """The generated part of `generate`'s result, as lists."""
    return ids[:, inputs["input_ids"].shape[1] :].tolist()
