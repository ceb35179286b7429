"""The API process: requests are read, checked and given their tickets before the engine sees them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from ...errors import SteerkernError
from .asked import RECEIPT, TICKET, FieldError, Ticket, wishes
from .library import Library, model_shape
from .prefix_cache import salt
from .settings import NAME, Settings, check_engine, settings_of


class Admission:
    """Turns what requests ask for into tickets.

    Args:
        settings: of the engine; None refuses whoever asks for steering.
        vllm_config: the engine's configuration.

    Raises:
        PlanError, ArtifactError: a plan of the settings that cannot be loaded, or an engine that cannot be steered.
    """

    def __init__(self, settings: Settings | None, vllm_config: Any) -> None:
        self.library: Library | None = None
        self.receipts = False
        """Whether the server can give receipts."""
        self.running: dict[str, tuple[str, ...]] = {}
        """Request of a server -> digests of its plans, from its admission to its end."""
        self._tracks = False
        self._outside = vllm_config.kv_transfer_config is not None
        if settings is not None:
            check_engine(vllm_config)
            width, layers = model_shape(vllm_config)
            self.library = Library(settings, width, layers, vllm_config.speculative_config is not None)

    @staticmethod
    def of(vllm_config: Any) -> Admission:
        """For an engine."""
        return Admission(settings_of(vllm_config), vllm_config)

    def check(self, extra_args: dict[str, Any] | None) -> None:
        """Raise vLLM's error for a bad request to a server, naming the field."""
        self._tracks = True
        given = extra_args or {}
        if given.get(RECEIPT) and not self.receipts:
            raise _refusal(f"{RECEIPT} needs a server that was started with VLLM_PLUGINS={NAME}", RECEIPT)
        self._ticket(given, 1 << 20)

    def admit(self, request: Any) -> None:
        """Give a request of the engine its ticket, in place of what it asked for.

        Raises:
            VLLMValidationError: a field that is not allowed, or plans that cannot act on this request.
        """
        params = request.sampling_params
        if params is None:
            return
        given = params.extra_args or {}
        ids = request.prompt_token_ids
        length = len(ids) if ids is not None else request.prompt_embeds.shape[0]
        with contextlib.nullcontext() if self.library is None else self.library.lock:
            ticket = self._ticket(given, length)
            if ticket is not None and self._tracks:
                self.running[request.request_id] = tuple(one.digest for one in ticket.plans)
        if not given and ticket is None:
            return
        kept = {name: value for name, value in given.items() if not name.startswith(NAME)}
        if ticket is not None:
            kept[TICKET] = ticket.to_wire()
            if self._outside:
                request.cache_salt = salt(request.cache_salt, ticket)
        params.extra_args = kept or None

    def refuse_beams(self, asked: dict[str, Any] | None) -> None:
        """Beam search takes no ``extra_args``, so a request that asks for plans would run plain."""
        if self._ticket(asked or {}, 1 << 20) is not None:
            raise _refusal("beam search cannot be steered: its beams are requests without extra arguments", NAME)

    async def tracked(self, request_id: str, outputs: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """The outputs of a request, to whose end its plans are kept."""
        try:
            async for output in outputs:
                yield output
        finally:
            self.running.pop(request_id, None)

    def in_use(self, digest: str) -> bool:
        """Whether a plan can be asked for, or some request that was admitted has it."""
        assert self.library is not None
        with self.library.lock:
            shelves = self.library.shelves.values()
            return any(shelf.plan.digest == digest for shelf in shelves) or any(
                digest in digests for digests in self.running.values()
            )

    def _ticket(self, given: dict[str, Any], prompt: int) -> Ticket | None:
        try:
            asked = wishes(given)
        except FieldError as error:
            raise _refusal(str(error), error.field) from None
        receipt = given.get(RECEIPT) or ""
        if not isinstance(receipt, str):
            raise _refusal(f"{RECEIPT} must be the name of a receipt, got {receipt!r}", RECEIPT)
        if self.library is None:
            if asked:
                raise _refusal(f'this engine was started without additional_config={{"{NAME}": ...}}', NAME)
            return None
        try:
            return self.library.ticket(asked, prompt, receipt)
        except (SteerkernError, TypeError, ValueError) as error:
            raise _refusal(str(error), NAME) from None


def _refusal(sentence: str, field: str) -> Exception:
    from vllm.exceptions import VLLMValidationError

    refusal: Exception = VLLMValidationError(sentence, parameter=field)
    return refusal
