"""vLLM, steered: a plugin that gives every request of an unforked engine its own plans.

vLLM finds :func:`register` through the entry point ``vllm.general_plugins`` in each of its processes. Without
``additional_config={"steerkern": ...}`` it changes nothing. With it:

- the API process reads what a request asks for, refuses what cannot run, and sends on which plans act and from which
  token their steering shows in the cache (``admission``, ``asked``, ``library``);
- the scheduler puts that into the hashes of the blocks of the prefix cache (``prefix_cache``);
- each worker finds the norms that read the residual stream of its model by a probe forward (``anatomy``), puts the
  fused op into them (``norms``), and before each forward fills the row map that this op reads (``worker``,
  ``runners``). The map and the tables keep their addresses, so graphs may be compiled and captured;
- a server has routes for its plans, receipts and metrics (``server``).

Read and run with vLLM 0.32.
"""

from __future__ import annotations

__all__ = ["register", "routes"]


def register() -> None:
    """Put the hooks into vLLM's classes, once per process."""
    from . import hooks

    hooks.install()


def routes() -> object:
    """The endpoint plugin: vLLM asks for it if ``VLLM_PLUGINS`` names ``steerkern``."""
    from .server import Endpoints

    return Endpoints()
