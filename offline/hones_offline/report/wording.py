"""How the report writes numbers and methods, in its tables and charts alike."""

MASKING = {
    "hones_task": ("HONES", "heads scored by the task's metric"),
    "hones_logprob": ("HONES-LP", "heads scored by the answers' log-probability"),
    "dvp": ("DVP", "direct value projection: what a neuron writes towards the answer, without heads"),
    "grad_act": ("grad × act", "gradient of the answers' log-probability times activation"),
    "ma": ("MA", "mean activation"),
    "ap": ("AP", "activation probability: how often a neuron is active"),
    "ape": ("APE", "entropy of the activation probability across tasks"),
    "random": ("random", "neurons drawn at random, as many in each layer"),
}
STEERING = {
    "base": "base",
    "fixed_amp": "fixed factor",
    "grid_search": "grid search",
    "random_neurons": "random neurons",
    "hones_no_kl": "HONES, no KL",
    "hones": "HONES",
}


def method_name(method: str) -> str:
    """`hones_logprob:rank` as it is shown, HONES-LP rank. A name not known here stays as it is."""
    base, colon, variant = method.partition(":")
    title = MASKING[base][0] if base in MASKING else STEERING.get(base, base)
    return f"{title} {variant}" if colon else title


def is_ours(method: str) -> bool:
    """Whether it is HONES or a variant of it, not something to compare with."""
    return method.startswith("hones")


def place(method: str) -> tuple[int, str]:
    """Sorts methods: HONES, its variants, then the others in the order above, then unknown ones."""
    base, _, variant = method.partition(":")
    for order in (list(MASKING), list(STEERING)):
        if base in order:
            return order.index(base), variant
    return len(MASKING), method


def number(value: float) -> str:
    """A number of any size, to about four digits; counts whole."""
    if abs(value) < 1e15 and value == int(value):
        return f"{int(value):,}".replace("-", "−")
    return f"{value:,.1f}".replace("-", "−") if 100 <= abs(value) < 1e15 else f"{value:.4g}".replace("-", "−")


def fixed(value: float, digits: int = 3) -> str:
    """A metric's value: 0.722."""
    return number(value) if abs(value) >= 1e6 else _unsigned_zero(f"{value:.{digits}f}")


def change(value: float, digits: int = 3) -> str:
    """A difference, with its sign: +0.041."""
    return number(value) if abs(value) >= 1e6 else _unsigned_zero(f"{value:+.{digits}f}")


def percent(value: float) -> str:
    """A share: 0.25%."""
    return f"{100 * value:.3g}%".replace("-", "−")


def _unsigned_zero(text: str) -> str:
    return text.replace("-", "−") if text.strip("+-0.") else text.lstrip("+-")
