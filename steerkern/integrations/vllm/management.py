"""Plans of a running server: loaded, listed, rescaled and unloaded, on every worker or on none."""

from __future__ import annotations

import asyncio
from typing import Any

from ...errors import PlanError
from ...plan import Plan
from ...steps import describe
from .admission import Admission
from .library import Library, Shelf, inside


class Management:
    """Changes the plans of the server whose engine is ``engine``.

    A plan that was unloaded stays in the workers until the last request that was admitted with it has ended, so no
    request ever runs by another plan than it asked for.
    """

    def __init__(self, engine: Any, admission: Admission) -> None:
        self.engine = engine
        self.admission = admission
        self._one = asyncio.Lock()
        self._leaving: set[str] = set()

    @property
    def library(self) -> Library:
        """The server's plans; PlanError where it was started without steering."""
        if self.admission.library is None:
            raise PlanError('this server was started without additional_config={"steerkern": ...}')
        return self.admission.library

    def describe(self, name: str) -> dict[str, Any]:
        """A plan as it is listed; UnknownPlan if there is none of that name."""
        shelf = self.library.get(name)
        return {
            "name": name,
            "scale": shelf.scale,
            "digest": shelf.plan.digest,
            "source": shelf.source,
            "default": name == self.library.settings.default,
            "steps": [describe(step) for step in shelf.plan.steps],
        }

    async def load(self, name: str, path: str | None, scale: object = 1.0) -> None:
        """Load a plan from ``path`` inside the server's folder, by default the one of its name.

        Raises:
            PermissionError: no folder was allowed, or the path leads out of it.
            ArtifactError: there is no sound plan.
            PlanError, ValueError, TypeError: it cannot run here; then no worker has it.
        """
        self._check_alone()
        folder = self.library.settings.folder
        if folder is None:
            raise PermissionError("plans may be loaded only by a server that was started with steerkern.folder")
        source = str(inside(folder, name if path is None else path))
        async with self._one:
            shelf = self.library.shelf(name, await asyncio.to_thread(Plan.from_pretrained, source), source, scale)
            try:
                reasons = await self._rpc("load", name, source, shelf.plan.digest)
                if any(reasons):
                    raise PlanError(next(reason for reason in reasons if reason))
                self.library.put(shelf)
            finally:
                self._leaving.add(shelf.plan.digest)
                await self._sweep()

    async def unload(self, name: str) -> None:
        """Let requests to come not ask for a plan any more; those that run go on with it.

        Raises:
            UnknownPlan, PlanError: no such plan, or the server's default.
        """
        self._check_alone()
        async with self._one:
            shelf: Shelf = self.library.take(name)
            self._leaving.add(shelf.plan.digest)
            await self._sweep()

    async def rescale(self, name: str, scale: object) -> None:
        """Set the strength of requests that arrive from now on; the library's errors."""
        self._check_alone()
        async with self._one:
            self.library.rescale(name, scale)

    async def summary(self) -> dict[str, int]:
        """Counts of the workers, which do the same where they share a model."""
        async with self._one:
            await self._sweep()
        counts = await self._rpc("summary")
        return {name: max(count[name] for count in counts) for name in counts[0]}

    async def receipt(self, name: str) -> dict[str, Any]:
        """What was written of the requests of one receipt."""
        merged: dict[str, Any] = {"plans": {}}
        for found in await self._rpc("receipt", name):
            for plan, own in (found or merged)["plans"].items():
                known = merged["plans"].setdefault(plan, {**own, "sites": []})
                known["sites"] += [site for site in own["sites"] if site not in known["sites"]]
        return merged

    async def _sweep(self) -> None:
        """Have the workers forget what nobody can have any more."""
        for digest in [one for one in self._leaving if not self.admission.in_use(one)]:
            await self._rpc("forget", digest)
            self._leaving.discard(digest)
        self._leaving = {one for one in self._leaving if not self._shelved(one)}

    def _shelved(self, digest: str) -> bool:
        return any(shelf.plan.digest == digest for shelf in self.library.shelves.values())

    async def _rpc(self, verb: str, *args: Any) -> list[Any]:
        answers: list[Any] = await self.engine.collective_rpc("steerkern", args=(verb, *args))
        while answers and isinstance(answers[0], list):  # one list for each engine of a data parallel server
            answers = [answer for several in answers for answer in several]
        return answers

    def _check_alone(self) -> None:
        parallel: Any = self.engine.vllm_config.parallel_config
        if getattr(parallel, "_api_process_count", 1) > 1:
            raise PlanError("this server has several API processes, each with plans of its own; start it with one")
