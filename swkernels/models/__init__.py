"""What Hugging Face models look like: where the down projections are and how they are laid out."""

from .projections import (
    DownProjection,
    ProjectionNotFound,
    find_down_projections,
    skipped_towers,
)

__all__ = ["DownProjection", "ProjectionNotFound", "find_down_projections", "skipped_towers"]
