"""The base class of a recipe's blocks, and their kinds of numbers.

Numbers are strict, because YAML reads ``yes`` as true and pydantic reads true as 1. They are finite and bounded,
because a number beyond these bounds is a slip, and would end in a full memory or a run without end.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MOST = 10**9  # steps, images, and the size of a float

Flag = Annotated[bool, Field(strict=True)]
Whole = Annotated[int, Field(strict=True, ge=0, le=MOST)]
Count = Annotated[int, Field(strict=True, gt=0, le=MOST)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Pixels = Annotated[int, Field(strict=True, gt=0, le=2**14)]
Channels = Annotated[int, Field(strict=True, gt=0, le=2**14)]
Real = Annotated[float, Field(strict=True, ge=-MOST, le=MOST)]
NotNegative = Annotated[float, Field(strict=True, ge=0, le=MOST)]
Positive = Annotated[float, Field(strict=True, gt=0, le=MOST)]
Fraction = Annotated[float, Field(strict=True, ge=0.0, le=1.0)]


def _check_plain(value: Any) -> Any:
    """Rejects what YAML would not give back: NaN, infinity, and names that are no strings."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"input should be plain values and finite numbers, got {value}")
    if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
        raise ValueError(f"input should be a mapping whose names are strings, got {list(value)[:5]}")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_plain(inner)
    return value


Arguments = Annotated[dict[str, Any], AfterValidator(_check_plain)]


class Strict(BaseModel):
    """A block of a recipe: immutable; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
