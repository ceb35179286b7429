"""What goes wrong, by kind; bad arguments of a function stay ValueError or TypeError."""


class SteerkernError(Exception):
    """Any error that steerkern raises on purpose."""


class PlanError(SteerkernError, ValueError):
    """A plan cannot be built, or cannot be applied to this model, batch or row."""


class ArtifactError(SteerkernError, ValueError):
    """A file or folder is not a well-formed steerkern artefact."""


class BackendError(SteerkernError, RuntimeError):
    """A backend was asked for by name and cannot run."""
