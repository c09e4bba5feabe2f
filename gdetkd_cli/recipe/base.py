"""The base class of a recipe's blocks."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Strict(BaseModel):
    """A block of a recipe: immutable; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)
