"""Activation steering inside the normalisation kernel of a language model's decode loop."""

from .artifacts import Fingerprint
from .controller import Controller
from .decisions import Condition, Latch, Read, Term, cast
from .directions import Direction, Directions
from .edits import Edit, ablate, add, cap, clamp, probe, rotate
from .errors import ArtifactError, BackendError, PlanError, SteerkernError
from .markers import marker
from .plan import Plan
from .program import Capacity, Site
from .runtime.receipt import Receipt
from .runtime.session import Session, steer
from .steps import Tokens

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "BackendError",
    "Capacity",
    "Condition",
    "Controller",
    "Direction",
    "Directions",
    "Edit",
    "Fingerprint",
    "Latch",
    "Plan",
    "PlanError",
    "Read",
    "Receipt",
    "Session",
    "Site",
    "SteerkernError",
    "Term",
    "Tokens",
    "ablate",
    "add",
    "cap",
    "cast",
    "clamp",
    "marker",
    "probe",
    "rotate",
    "steer",
]
