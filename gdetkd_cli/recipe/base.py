"""What every block of a recipe is."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Strict(BaseModel):
    """Every block: immutable, and an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)
