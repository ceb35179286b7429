"""SGLang, steered per request by a plugin; nothing of it is forked.

**Not run on a GPU.** Written against the source of 0.5.23. Its CPU backend, run eagerly in float32 on a tiny Llama with
stand-ins for the packages that need a GPU, gives the tokens of our own session: chunked and mixed prefill, overlapped
scheduling, radix cache, two tensor-parallel ranks (``tests/integrations/test_sglang_engine.py``). CUDA graphs and
SGLang's GPU kernels have never met this code.

With steerkern installed beside SGLang, ``STEERKERN_PLANS`` names the folders of the plans (``Plan.save_pretrained``),
separated like those of ``PATH``; without it the plugin does nothing. A request asks for a plan in ``custom_params``::

    {"text": "...", "sampling_params": {"custom_params": {"steerkern": {"plan": "calm", "scale": 1.5}}}}

``scale`` multiplies what the plan adds; ``scope`` (``all``, ``prompt``, ``decode``, ``reply``) takes the place of its
own. Requests share prefixes in the radix cache, by way of ``extra_key``, only where they are steered alike. Plans write
``resid_pre`` and ``resid_post``, without latches, controllers, events or probes; ``plugin.PLAIN`` lists the server
arguments that do not go with steering, each refused by name at the start.

``plans`` reads that field, ``norms`` finds the norms that read the residual stream and stands in for them,
``steering`` sets the row map before each forward, ``plugin`` hangs these into SGLang's hooks.
"""

from __future__ import annotations

import os

VARIABLE = "STEERKERN_PLANS"


def register() -> None:
    """What SGLang calls in each of its processes, by the entry point group ``sglang.srt.plugins``.

    Raises:
        SystemExit: the plans cannot be read, or this SGLang lacks what is hooked. SGLang logs any other error of a
            plugin and goes on, which here would be a server that does not steer.
    """
    folders = os.environ.get(VARIABLE)
    if not folders:
        return
    from .plans import Plans
    from .plugin import Plugin

    try:
        Plugin(Plans.read(folders.split(os.pathsep))).hook()
    except Exception as error:
        raise SystemExit(f"steerkern cannot steer this SGLang: {error}") from error
