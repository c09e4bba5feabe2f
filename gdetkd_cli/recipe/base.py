"""The base class of a recipe's blocks, and their kinds of numbers.

Numbers are strict, because YAML reads ``yes`` as true and pydantic reads true as 1. They are finite and bounded,
because a number beyond these bounds is a slip, and would end in a full memory or a run without end.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

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


class Strict(BaseModel):
    """A block of a recipe: immutable; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
