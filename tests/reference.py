"""Section 2 of the method written plainly: one example at a time, whole model forwards, nothing shared or cached.

The fast paths of `hones_offline` must equal these functions. Model, processor and tokenizer are Hugging Face objects;
an intervention is a context manager. Nothing here imports `hones_offline` except to be handed its examples and tasks.
"""

import math
from collections import Counter
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import torch
from reference_steering import expert_activations, expert_product, inputs_first

from hones_steer.layout import find_layout, is_transposed


def prompt_inputs(processor, example, prompt):
    """Token ids and pixel values of one prompt through chat template and processor."""
    tokenizer = getattr(processor, "tokenizer", processor)
    image = example.image.load() if example.image else None
    if processor.chat_template is None:
        text = prompt
    else:
        content = [{"type": "image"}, {"type": "text", "text": prompt}] if image else prompt
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
    special = tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)
    if image is None:
        return dict(tokenizer([text], return_tensors="pt", add_special_tokens=special))
    return dict(processor(images=[image], text=[text], return_tensors="pt", add_special_tokens=special))


@contextmanager
def head_replaced(model, layer, head):
    """I_h (2.1): head's slice of o_proj's input becomes the mean of the other heads' slices, position by position."""
    part = find_layout(model).layers[layer]

    def hook(_module, args):
        x = args[0]
        width = x.shape[-1] // part.num_heads
        slices = [x[..., j * width : (j + 1) * width] for j in range(part.num_heads)]
        others = [s for j, s in enumerate(slices) if j != head]
        slices[head] = sum(others) / len(others)
        return (torch.cat(slices, dim=-1),)

    handle = part.attn_out.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def ffns(model):
    """(layer, kind, module) of every FFN: its down-projection, or the module of all routed experts of the layer."""
    for layer in find_layout(model).layers:
        if layer.ffn_out is not None:
            yield layer.index, "dense", layer.ffn_out
        if layer.shared_out is not None:
            yield layer.index, "shared", layer.shared_out
        if layer.experts is not None:
            yield layer.index, "experts", layer.experts.module


@contextmanager
def neurons_scaled(model, layers):
    """Z' = s·z for the listed neurons (2.5 with scale 0, 2.6): layers = {layer: (neurons, scales)}.

    Instead of a layer's number stands (layer, "shared") or (layer, expert).
    """
    with neurons_changed(model, layers, lambda z, scale: z * scale):
        yield


@contextmanager
def neurons_set(model, layers):
    """Z' = a constant for the listed neurons, at every position: layers = {layer: (neurons, values)}."""
    with neurons_changed(model, layers, lambda z, value: torch.full_like(z, value)):
        yield


@contextmanager
def neurons_changed(model, layers, change):
    """Z' = change(z, value) for the listed neurons: layers = {layer: (neurons, values)}, of experts where run."""
    listed = {key if isinstance(key, tuple) else (key, "dense"): pair for key, pair in layers.items()}
    with ExitStack() as stack:
        for layer, kind, module in ffns(model):
            if kind == "experts":
                of_layer = {e: pair for (at, e), pair in listed.items() if at == layer and isinstance(e, int)}

                def changed(z, of_layer=of_layer):
                    z = z.clone()
                    for e, (neurons, values) in of_layer.items():
                        for neuron, value in zip(neurons.tolist(), values.tolist(), strict=True):
                            z[:, e, neuron] = change(z[:, e, neuron], value)
                    return z

                stack.enter_context(experts_computed_plainly(module, changed))
            elif (layer, kind) in listed:
                stack.enter_context(input_changed(module, *listed[layer, kind], change))
        yield


@contextmanager
def input_scaled(down_projection, neurons, scales):
    """Z' = s·z for the listed neurons of one down-projection."""
    with input_changed(down_projection, neurons, scales, lambda z, scale: z * scale):
        yield


@contextmanager
def input_changed(down_projection, neurons, values, change):
    """Z' = change(z, value) for the listed neurons of one down-projection."""

    def hook(_module, args):
        z = args[0].clone()
        for neuron, value in zip(neurons.tolist(), values.tolist(), strict=True):
            z[..., neuron] = change(z[..., neuron], value)
        return (z,)

    handle = down_projection.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def routed(module, hidden_states, choices=None, weights=None):
    """(row, token, expert, what it is given, what its output is weighed by) of each choice; its output is of the row.

    Llama 4 has each expert compute every token, weighed before, and zeros of those that it is not chosen for.
    """
    if choices is not None:
        for token, x in enumerate(hidden_states):
            for e, weight in zip(choices[token].tolist(), weights[token], strict=True):
                yield token, token, e, x, weight
        return
    tokens = len(hidden_states) // len(module.down_proj)
    for row, x in enumerate(hidden_states):
        if x.any():
            yield row, row % tokens, row // tokens, x, torch.ones(())


@contextmanager
def experts_computed_plainly(module, change):
    """Compute routed experts one token and one expert after the other, with change(z) instead of z [T, experts, I].

    That is 0 of experts that the router has not chosen for a token, which add nothing. What others write is weighed by
    the router.
    """

    def forward(*given):
        every = list(routed(module, *given))
        width = module.down_proj.numel() // module.down_proj.shape[0] // given[0].shape[-1]
        tokens = 1 + max(token for _, token, *_ in every)
        z = [[torch.zeros(width) for _ in range(module.down_proj.shape[0])] for _ in range(tokens)]
        for _, token, e, x, _ in every:
            z[token][e] = expert_activations(module, e, x)
        z = change(torch.stack([torch.stack(of_token) for of_token in z]))
        written = [torch.zeros(given[0].shape[-1]) for _ in given[0]]
        for row, token, e, _, weight in every:
            written[row] = written[row] + weight * expert_product(module, "down_proj", e, z[token, e])
        return torch.stack(written)

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


@contextmanager
def choices_recorded(model):
    """Record what the router chooses in the block: {layer: weights [T, experts], 0 of those not chosen}."""
    recorded = {}
    with ExitStack() as stack:
        for layer, kind, module in ffns(model):
            if kind == "experts":

                def hook(module, args, layer=layer):
                    every = list(routed(module, *args))
                    tokens = 1 + max(token for _, token, *_ in every)
                    recorded[layer] = torch.zeros(tokens, module.down_proj.shape[0])
                    for _, token, e, _, weight in every:
                        recorded[layer][token, e] = weight.detach()

                stack.callback(module.register_forward_pre_hook(hook).remove)
        yield recorded


@contextmanager
def shared_gates_recorded(model):
    """Record what shared experts with a gate are weighed by in the block, {layer: [T]}."""
    recorded = {}
    with ExitStack() as stack:
        for layer in find_layout(model).layers:
            for name, module in layer.module.named_modules():
                if name.endswith("shared_expert_gate"):

                    def hook(_module, _args, result, layer=layer.index):
                        recorded[layer] = torch.sigmoid(result).flatten()

                    stack.callback(module.register_forward_hook(hook).remove)
        yield recorded


@torch.no_grad()
def generate(model, processor, task, example):
    """Greedy text for one example by `model.generate`."""
    tokenizer = getattr(processor, "tokenizer", processor)
    inputs = prompt_inputs(processor, example, task.prompts(example)[0])
    out = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=task.max_new_tokens)
    text = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    return first_line(text) if task.first_line else text


def first_line(text):
    """The first line that is not blank, less "Answer:" before it, then less the quotes that it begins and ends with."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        return ""
    before, colon, after = lines[0].partition(":")
    line = after.strip() if colon and before.strip().lower() == "answer" else lines[0]
    while line and line[0] in "\"'":
        line = line[1:]
    while line and line[-1] in "\"'":
        line = line[:-1]
    return line.strip()


@torch.no_grad()
def margins(model, processor, task, example):
    """logit(Yes) − logit(No) of the next token, one forward per candidate."""
    tokenizer = getattr(processor, "tokenizer", processor)
    yes = tokenizer("Yes", add_special_tokens=False)["input_ids"][0]
    no = tokenizer("No", add_special_tokens=False)["input_ids"][0]
    logits = [model(**prompt_inputs(processor, example, prompt)).logits[0, -1] for prompt in task.prompts(example)]
    return torch.stack([row[yes] - row[no] for row in logits]).double().numpy()


def outputs(model, processor, task, examples):
    """The model's output for each example."""
    run = margins if task.kind == "rank" else generate
    return [run(model, processor, task, example) for example in examples]


def metric(model, processor, task, examples):
    """The task's metric over examples (2.8)."""
    rows = [
        task.statistics(example, out)
        for example, out in zip(examples, outputs(model, processor, task, examples), strict=True)
    ]
    return task.aggregate(sum(rows), len(rows))


def answer_logits(model, processor, example, prompt, answer):
    """Logits [n, vocabulary] at an answer's tokens (end token included), teacher forced, and those tokens [n]."""
    tokenizer = getattr(processor, "tokenizer", processor)
    inputs = prompt_inputs(processor, example, prompt)
    length = inputs["input_ids"].shape[1]
    end = model.generation_config.eos_token_id
    if isinstance(end, list):
        end = tokenizer.eos_token_id if tokenizer.eos_token_id in end else end[0]
    ids = torch.tensor([[*tokenizer(answer, add_special_tokens=False)["input_ids"], end]])
    inputs.pop("labels", None)
    text = torch.full_like(ids, model.config.model_type == "paligemma")  # whose type 0 is the prompt
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}.get(name, text)
            inputs[name] = torch.cat([inputs[name], more], dim=1)
    return model(**inputs).logits[0, length - 1 : -1], ids[0]


@torch.no_grad()
def mean_log_probability(model, processor, task, examples):
    """Mean over (prompt, answer) pairs of the mean log-probability of the answer's tokens."""
    values = []
    for example in examples:
        for index, answer in task.answers(example):
            prompt = task.prompts(example)[index]
            logits, ids = answer_logits(model, processor, example, prompt, answer)
            values.append(logits.log_softmax(-1)[range(len(ids)), ids].mean().item())
    return sum(values) / len(values)


def head_scores(model, processor, task, examples, utility):
    """S(h) = P(θ) − P(θ_Ih) (2.1), [L][H], NaN in a layer without heads; utility: `metric`, `mean_log_probability`."""
    base = utility(model, processor, task, examples)
    scores = []
    most = max(layer.num_heads or 0 for layer in find_layout(model).layers)
    for layer in find_layout(model).layers:
        if layer.attn_out is None:
            scores.append([math.nan] * most)
            continue
        row = []
        for head in range(layer.num_heads):
            with head_replaced(model, layer.index, head):
                row.append(base - utility(model, processor, task, examples))
        scores.append(row)
    return scores


def head_slopes(model, processor, task, examples, share):
    """Σ_positions ⟨x_h − x_h', ∂P/∂x_h⟩ of each pair with every head `share` of the way to x_h', [pairs][L][H].

    NaN in a layer without heads.
    """
    every = find_layout(model).layers
    layers = [layer for layer in every if layer.attn_out is not None]
    slopes = []
    for example in examples:
        for index, answer in task.answers(example):
            ways, recorded = {}, {}
            with ExitStack() as stack:
                for layer in layers:

                    def hook(_module, args, layer=layer, ways=ways, recorded=recorded):
                        x = args[0]
                        slices = x.split(x.shape[-1] // layer.num_heads, dim=-1)
                        others = [
                            sum(s for j, s in enumerate(slices) if j != head) / (layer.num_heads - 1)
                            for head in range(layer.num_heads)
                        ]
                        ways[layer.index] = [s - other for s, other in zip(slices, others, strict=True)]
                        moved = x - share * torch.cat(ways[layer.index], dim=-1)
                        moved.retain_grad()
                        recorded[layer.index] = moved
                        return (moved,)

                    stack.callback(layer.attn_out.register_forward_pre_hook(hook).remove)
                logits, ids = answer_logits(model, processor, example, task.prompts(example)[index], answer)
            logits.log_softmax(-1)[range(len(ids)), ids].mean().backward()
            slopes.append([[math.nan] * layers[0].num_heads for _ in every])
            for layer in layers:
                x = recorded[layer.index]
                gradients = x.grad.split(x.shape[-1] // layer.num_heads, dim=-1)
                pieces = zip(ways[layer.index], gradients, strict=True)
                slopes[-1][layer.index] = [(way * gradient).sum().item() for way, gradient in pieces]
            model.zero_grad()
    return slopes


def directions(model, processor, task, examples):
    """u_y (2.2) of every example's first prompt, towards the task's `target_texts`."""
    tokenizer = getattr(processor, "tokenizer", processor)
    rows = model.get_output_embeddings().weight

    def tokens(text):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return [i for i in ids if i not in tokenizer.all_special_ids][:128]

    documents = [tokens(" ".join(task.target_texts(example))) for example in examples]
    if task.idf_weighted:
        df = Counter(token for document in documents for token in set(document))
        n = len(documents)
        sums = [sum(rows[t] * (math.log((n + 1) / (df[t] + 1)) + 1) for t in doc) for doc in documents]
    else:
        sums = [sum(rows[t] for t in doc) for doc in documents]
    return [u / u.norm() for u in sums]


def by_layer(model, values):
    """{(layer, kind): [N]} as [L, I], 0 where no FFN is or ran; values may have more dimensions.

    In a layer the dense FFN's come first, then the shared expert's, then those of the experts. I is the most neurons of
    a layer; others have 0 beyond their own.
    """
    parts = {}
    for layer, kind, _ in ffns(model):
        if (layer, kind) in values:
            parts.setdefault(layer, []).append(values[layer, kind])
    joined = {layer: torch.cat(of_layer, dim=-1) for layer, of_layer in parts.items()}
    widest = max(joined.values(), key=lambda value: value.shape[-1])
    padded = {i: torch.nn.functional.pad(z, (0, widest.shape[-1] - z.shape[-1])) for i, z in joined.items()}
    return torch.stack([padded.get(i, torch.zeros_like(widest)) for i in range(len(find_layout(model).layers))])


@contextmanager
def ffn_inputs_recorded(model):
    """Z of every FFN in the forwards of the block, of one row: {(layer, kind): [T, N]}.

    That of experts has one expert after the other, 0 where one is not chosen.
    """
    recorded = {}
    with ExitStack() as stack:
        for layer, kind, module in ffns(model):

            def hook(_module, args, ffn=(layer, kind)):
                recorded[ffn] = z = args[0].reshape(-1, args[0].shape[-1])  # OPT's has no row dimension
                return (z.reshape(args[0].shape),)

            def of_experts(z, ffn=(layer, kind)):
                recorded[ffn] = flat = z.flatten(1)
                return flat.reshape(z.shape)

            if kind == "experts":
                stack.enter_context(experts_computed_plainly(module, of_experts))
            else:
                stack.callback(module.register_forward_pre_hook(hook).remove)
        yield recorded


@torch.no_grad()
def activation(model, processor, example, prompt, *, weighed=False):
    """Z at the last token of a prompt (2.2), [L, I]; if `weighed`, that of experts by the router and shared gates."""
    with ffn_inputs_recorded(model) as recorded, choices_recorded(model) as chosen, shared_gates_recorded(model) as of:
        model(**prompt_inputs(processor, example, prompt))
    last = {ffn: z[-1] for ffn, z in recorded.items()}
    if weighed:
        for layer, weights in chosen.items():
            z = last[layer, "experts"]
            last[layer, "experts"] = (z.view(len(weights[-1]), -1) * weights[-1][:, None]).flatten()
        for layer, gate in of.items():
            last[layer, "shared"] = last[layer, "shared"] * gate[-1]
    return by_layer(model, last)


def activations(model, processor, task, examples):
    """Z at the last prompt token of every (prompt, answer) pair, one [L, I] each."""
    return [
        activation(model, processor, example, task.prompts(example)[index])
        for example in examples
        for index, _answer in task.answers(example)
    ]


@torch.no_grad()
def position_means(model, processor, task, examples):
    """Mean of z over all positions of prompt and answer, the answer's end token aside, of all pairs, [L, I].

    Of an expert's neurons over those that it is chosen for.
    """
    total, positions = 0, 0
    for example in examples:
        for index, answer in task.answers(example):
            with ffn_inputs_recorded(model) as recorded, choices_recorded(model) as chosen:
                answer_logits(model, processor, example, task.prompts(example)[index], answer)
            there = {ffn: torch.ones_like(z) for ffn, z in recorded.items()}
            for layer, weights in chosen.items():
                width = recorded[layer, "experts"].shape[1] // weights.shape[1]
                there[layer, "experts"] = (weights > 0).float().repeat_interleave(width, dim=1)
            total = total + by_layer(model, {ffn: z[:-1] for ffn, z in recorded.items()}).sum(1)
            positions = positions + by_layer(model, {ffn: of_ffn[:-1] for ffn, of_ffn in there.items()}).sum(1)
    return total / positions.clamp(min=1)


@torch.no_grad()
def write_ins(model, processor, task, examples, units):
    """c_{l,i} = z_i·⟨W_down[:,i], u_y⟩ at the first prompt's last token (2.2) of every example, one [L, I] each.

    An expert's is weighed by the router, and 0 where it is not chosen.
    """

    def alignments(unit):
        aligned = {}
        for layer, kind, module in ffns(model):
            if kind == "experts":
                each = [w.T if inputs_first(module) else w for w in module.down_proj]
                aligned[layer, kind] = torch.cat([unit @ w for w in each])
            else:
                aligned[layer, kind] = unit @ (module.weight.T if is_transposed(module) else module.weight)
        return by_layer(model, aligned)

    every = [activation(model, processor, example, task.prompts(example)[0], weighed=True) for example in examples]
    return [z * alignments(unit) for z, unit in zip(every, units, strict=True)]


def mean_write_in(model, processor, task, examples, units=None):
    """Mean of c_{l,i} over examples, [L, I]; with the paper's directions, or others."""
    units = directions(model, processor, task, examples) if units is None else units
    return sum(write_ins(model, processor, task, examples, units)) / len(units)


def importance(model, processor, task, examples, scores, top_heads):
    """Head-guided importance (2.3) from the scores [L][H] of all heads, [L, I]."""
    ranked = sorted(
        ((s, -layer, -head) for layer, row in enumerate(scores) for head, s in enumerate(row) if not math.isnan(s)),
        reverse=True,
    )[:top_heads]
    base = mean_write_in(model, processor, task, examples)
    total, weights = torch.zeros_like(base), 0.0
    for score, layer, head in ranked:
        weight = max(score, 0.0)
        with head_replaced(model, -layer, -head):
            changed = mean_write_in(model, processor, task, examples)
        total = total + weight * (base - changed).clamp(min=0)
        weights += weight
    return total / weights


def importance_by_example(model, processor, task, examples, heads, units):
    """Σ_h w_h · mean_x [c(θ) − c(θ_Ih)]_+ / Σ_h w_h: the positive part of each example; heads are (layer, head, w)."""
    base = write_ins(model, processor, task, examples, units)
    total, weights = 0, 0.0
    for layer, head, weight in heads:
        with head_replaced(model, layer, head):
            changed = write_ins(model, processor, task, examples, units)
        drops = [(before - after).clamp(min=0) for before, after in zip(base, changed, strict=True)]
        total = total + weight * sum(drops) / len(drops)
        weights += weight
    return total / weights


def centred_directions(model, processor, task, examples):
    """As `directions`, of an unembedding whose rows have their mean over the vocabulary taken off."""
    rows = model.get_output_embeddings().weight
    before = rows.data.clone()
    rows.data = rows.data - rows.data.mean(0)
    try:
        return directions(model, processor, task, examples)
    finally:
        rows.data = before


def contrastive_directions(model, processor, task, examples):
    """u_y less the mean of the other examples' u, normalized again."""
    units = directions(model, processor, task, examples)
    result = []
    for i, unit in enumerate(units):
        others = [other for j, other in enumerate(units) if j != i]
        difference = unit - sum(others) / len(others)
        result.append(difference / difference.norm())
    return result


def gradient_activation(model, processor, task, examples):
    """Mean over pairs of z·∂P/∂z at the last prompt token, P the answer's mean token log-probability, [L, I]."""
    products = []
    for example in examples:
        for index, answer in task.answers(example):
            with ffn_inputs_recorded(model) as recorded:
                logits, ids = answer_logits(model, processor, example, task.prompts(example)[index], answer)
            for z in recorded.values():
                z.retain_grad()
            logits.log_softmax(-1)[range(len(ids)), ids].mean().backward()
            last = -len(ids) - 1
            products.append(by_layer(model, {i: (z * z.grad)[last].detach() for i, z in recorded.items()}))
            model.zero_grad()
    return sum(products) / len(products)


def factor_gradients(model, processor, task, examples):
    """Mean over an example's pairs of Σ z·∂P/∂z over all positions, prompt and answer; one [L, I] for each example."""
    gradients = []
    for example in examples:
        of_pairs = []
        for index, answer in task.answers(example):
            with ffn_inputs_recorded(model) as recorded:
                logits, ids = answer_logits(model, processor, example, task.prompts(example)[index], answer)
            for z in recorded.values():
                z.retain_grad()
            logits.log_softmax(-1)[range(len(ids)), ids].mean().backward()
            of_pairs.append(by_layer(model, {i: (z * z.grad).sum(0).detach() for i, z in recorded.items()}))
            model.zero_grad()
        gradients.append(sum(of_pairs) / len(of_pairs))
    return gradients


def grad_all(model, processor, task, examples):
    """The mean of g over examples, [L, I]."""
    gradients = factor_gradients(model, processor, task, examples)
    return sum(gradients) / len(gradients)


def fisher(model, processor, task, examples):
    """The mean of g² over examples, [L, I]."""
    gradients = factor_gradients(model, processor, task, examples)
    return sum(g**2 for g in gradients) / len(gradients)


def head_gradient(model, processor, task, examples, heads):
    """Σ_h w_h·[mean over examples of Σ (z − z_h)·∂P/∂z]_+ / Σ_h w_h, [L, I]; heads are (layer, head, w)."""
    total, weights = 0, 0.0
    for layer, head, weight in heads:
        drops = []
        for example in examples:
            of_pairs = []
            for index, answer in task.answers(example):
                pair = example, task.prompts(example)[index], answer
                with ffn_inputs_recorded(model) as recorded:
                    logits, ids = answer_logits(model, processor, *pair)
                for z in recorded.values():
                    z.retain_grad()
                logits.log_softmax(-1)[range(len(ids)), ids].mean().backward()
                with torch.no_grad(), head_replaced(model, layer, head), ffn_inputs_recorded(model) as replaced:
                    answer_logits(model, processor, *pair)
                differences = {i: (z - replaced[i]) * z.grad for i, z in recorded.items()}
                of_pairs.append(by_layer(model, {i: drop.sum(0).detach() for i, drop in differences.items()}))
                model.zero_grad()
            drops.append(sum(of_pairs) / len(of_pairs))
        total = total + weight * (sum(drops) / len(drops)).clamp(min=0)
        weights += weight
    return total / weights


@torch.no_grad()
def activation_probability(model, processor, task, examples):
    """LAPE's share of all tokens, of prompts and answers, at which the FFN's activation function gives > 0, [L, I].

    An expert's function gives something only at tokens that the expert is chosen for.
    """
    active, tokens = [], 0
    for example in examples:
        for index, answer in task.answers(example):
            given = {}

            def hook(_module, _args, output, given=given, ffn=None):
                given[ffn] = output.flatten(0, -2) > 0

            def of_experts(module, args, given=given, ffn=None):
                every = list(routed(module, *args))
                width = module.down_proj.numel() // module.down_proj.shape[0] // args[0].shape[-1]
                count = 1 + max(token for _, token, *_ in every)
                given[ffn] = torch.zeros(count, module.down_proj.shape[0], width, dtype=torch.bool)
                for _, token, e, x, _ in every:
                    name = "gate_up_proj" if hasattr(module, "gate_up_proj") else "up_proj"
                    given[ffn][token, e] = module.act_fn(expert_product(module, name, e, x)[:width]) > 0
                given[ffn] = given[ffn].flatten(1)

            with ExitStack() as stack:
                for layer, kind, part in ffns(model):
                    if kind == "experts":
                        handle = part.register_forward_pre_hook(partial(of_experts, ffn=(layer, kind)))
                    else:
                        every = find_layout(model).layers[layer].module.modules()
                        ffn = next(m for m in every if part in m.children())
                        functions = [m for m in ffn.modules() if "activation" in type(m).__module__]
                        (function,) = functions or [ffn.w1]  # LFM2 calls SiLU by name, which keeps its gate's sign
                        handle = function.register_forward_hook(partial(hook, ffn=(layer, kind)))
                    stack.callback(handle.remove)
                answer_logits(model, processor, example, task.prompts(example)[index], answer)
            # Without the end token, after which nothing is read.
            active.append(by_layer(model, {ffn: rows[:-1].sum(0) for ffn, rows in given.items()}))
            tokens += len(next(iter(given.values()))) - 1
    return sum(active) / tokens


def activation_entropy(probabilities):
    """LAPE's entropy from {task: [L][I] activation probabilities}: {task: importance [L][I]}, neuron by neuron."""
    tasks = list(probabilities)
    every = sorted(float(p) for table in probabilities.values() for row in table for p in row)
    position = 0.95 * (len(every) - 1)
    low = math.floor(position)
    threshold = every[low] + (position - low) * (every[min(low + 1, len(every) - 1)] - every[low])
    result = {task: [[0.0] * len(row) for row in probabilities[task]] for task in tasks}
    for layer, row in enumerate(probabilities[tasks[0]]):
        for neuron in range(len(row)):
            values = [float(probabilities[task][layer][neuron]) for task in tasks]
            if sum(values) == 0:
                continue
            shares = [value / sum(values) for value in values]
            entropy = -sum(share * math.log(share) for share in shares if share > 0)
            for task, value in zip(tasks, values, strict=True):
                bonus = math.log(len(tasks)) if value >= threshold else 0.0
                result[task][layer][neuron] = max(math.log(len(tasks)) - entropy, 0.0) + bonus
    return result


def unit_importance(importance):
    """Positive part of an importance (list of floats) over the mean of its own top 1%."""
    positive = [max(float(value), 0.0) for value in importance]
    top = sorted(positive, reverse=True)[: max(1, round(0.01 * len(positive)))]
    return [value / (sum(top) / len(top)) for value in positive]


def contrasted_bank(own, others, contrast, fraction, pool_factor=4, floor=0.05):
    """Numbers of the neurons of a contrasted bank, ascending, neuron by neuron; importances are lists of floats."""
    size = max(1, round(fraction * len(own)))
    mine, theirs = unit_importance(own), [unit_importance(other) for other in others]
    if contrast == "max":
        value = {i: mine[i] - max(other[i] for other in theirs) for i in range(len(own))}
    else:
        pool = sorted((i for i in range(len(own)) if own[i] > 0), key=lambda i: (-own[i], i))
        pool = pool[: round(pool_factor * size)]
        value = {i: mine[i] / (max(other[i] for other in theirs) + floor * mine[pool[-1]]) for i in pool}
    rounded = {i: float(np.float32(v)) for i, v in value.items() if v > 0}
    return sorted(sorted(rounded, key=lambda i: (-rounded[i], i))[:size])


def epoch_loss(model, processor, task, examples, layers, beta_kl, seed):
    """2.6 over an epoch of learning: the mean over examples of the mean over the pairs that its seed draws."""
    random = np.random.default_rng(seed)
    losses = []
    for example in examples:
        pairs = task.drawn_answers(example, random)
        own = [fit_loss(model, processor, task, example, *pair, layers, beta_kl).item() for pair in pairs]
        losses.append(sum(own) / len(own))
    return sum(losses) / len(losses)


def fit_loss(model, processor, task, example, index, answer, layers, beta_kl):
    """2.6 for one (example, answer): mean answer-token cross-entropy + β·KL(original ‖ scaled)."""
    prompt = task.prompts(example)[index]
    with torch.no_grad():
        original, _ = answer_logits(model, processor, example, prompt, answer)
    with neurons_scaled(model, layers):
        scaled, ids = answer_logits(model, processor, example, prompt, answer)
    cross_entropy = torch.nn.functional.cross_entropy(scaled, ids)
    p, q = original.log_softmax(-1), scaled.log_softmax(-1)
    return cross_entropy + beta_kl * (p.exp() * (p - q)).sum(-1).mean()


def drop_at(points, level):
    """Where the line from (0, 0) through the points (x, y) first reaches x = `level`: its y, or None if it does not."""
    before = (0.0, 0.0)
    for point in points:
        if point[0] >= level:
            return before[1] + (level - before[0]) / (point[0] - before[0]) * (point[1] - before[1])
        before = point
    return None


def means_of_drawn(matrix, related, drawn):
    """Mean own drop of the drawn tasks, with repeats, and mean drop of those that are related to each and drawn.

    A task without any such is left out of the second mean. Two copies of a task are not related.
    """
    own = [matrix[t][t] for t in drawn]
    beside = []
    for t in drawn:
        others = [matrix[t][u] for u in drawn if related[t][u]]
        if others:
            beside.append(sum(others) / len(others))
    return sum(own) / len(own), sum(beside) / len(beside)


def fit_penalty(model, layers, l2):
    """L2 · the mean over all FFN neurons of λ², λ = scale − 1 of those listed and 0 of the others."""
    hidden = model.config.get_text_config().hidden_size
    weights = [module.down_proj if kind == "experts" else module.weight for _, kind, module in ffns(model)]
    neurons = sum(weight.numel() // hidden for weight in weights)
    return l2 * sum((scale - 1) ** 2 for _, scales in layers.values() for scale in scales.tolist()) / neurons
