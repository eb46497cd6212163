"""Numbers as the report writes them, in its tables and charts alike: a minus sign for a hyphen, no signed zero."""


def number(value: float) -> str:
    """A number of any size, to about four digits; counts whole: 134,515,008 or 0.7215."""
    if abs(value) < 1e15 and value == int(value):
        return f"{int(value):,}".replace("-", "−")
    return f"{value:,.1f}".replace("-", "−") if 100 <= abs(value) < 1e15 else f"{value:.4g}".replace("-", "−")


def fixed(value: float, digits: int = 3) -> str:
    """A metric's value: 0.722."""
    return number(value) if abs(value) >= 1e6 else _unsigned_zero(f"{value:.{digits}f}")


def change(value: float, digits: int = 3) -> str:
    """A difference, with its sign: +0.041."""
    return number(value) if abs(value) >= 1e6 else _unsigned_zero(f"{value:+.{digits}f}")


def compact(value: float) -> str:
    """A number without superfluous digits, to label an axis: −0.5."""
    return f"{value:g}".replace("-", "−")


def percent(value: float) -> str:
    """A share: 0.0025 becomes 0.25%."""
    return f"{100 * value:.3g}%".replace("-", "−")


def _unsigned_zero(text: str) -> str:
    """The text with a minus sign for a hyphen; without a sign if it shows only zeros."""
    return text.replace("-", "−") if text.strip("+-0.") else text.lstrip("+-")
