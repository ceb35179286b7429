"""Reading the residual stream: rendered prompts, states at chosen tokens, difference-of-means directions."""

from .capture import Captured, capture, states
from .means import Contrast, Means, extract, means
from .template import Position, Prompt, Rendered, instruction_offset, render

__all__ = [
    "Captured",
    "Contrast",
    "Means",
    "Position",
    "Prompt",
    "Rendered",
    "capture",
    "extract",
    "instruction_offset",
    "means",
    "render",
    "states",
]
