"""The guided controller: a small network reads a prompt's states and says how strongly to steer at each layer.

"Guiding Giants" (arXiv 2505.20309): :class:`Controller` satisfies :class:`steerkern.decisions.Gains`, so a plan may
hold one. :mod:`~steerkern.controller.recipe` trains one from prompts, :mod:`~steerkern.controller.evaluation` judges
it; both stand above plans, which read this package, and are imported by their own names.
"""

from .activations import cache_states, open_states
from .losses import Scores, bce, mse
from .network import Controller
from .outcome import Example, OutcomeObjective
from .phrases import refusal_vector
from .presets import CODE, OUTCOME, PAPER, PRESETS, Preset
from .training import Epoch, History, score_objective, train

__all__ = [
    "CODE",
    "OUTCOME",
    "PAPER",
    "PRESETS",
    "Controller",
    "Epoch",
    "Example",
    "History",
    "OutcomeObjective",
    "Preset",
    "Scores",
    "bce",
    "cache_states",
    "mse",
    "open_states",
    "refusal_vector",
    "score_objective",
    "train",
]
