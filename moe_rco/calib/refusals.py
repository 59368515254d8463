"""What transformers raises where it is given files that it cannot use: it checks little before it uses it."""

from __future__ import annotations

from huggingface_hub.errors import StrictDataclassError

REFUSALS = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    StrictDataclassError,
)


def reason(error: BaseException) -> str:
    """Why, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
