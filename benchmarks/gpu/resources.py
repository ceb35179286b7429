"""What nvcc made of the CUDA kernels: ``python -m benchmarks.gpu.resources MODULE.so`` needs no GPU.

Registers, stack (0: nothing spilled), barriers and accesses of 16 bytes of every kernel in a built extension, read with
the ``cuobjdump`` that the Triton package carries.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

_FUNCTION = re.compile(r"steer_rows.*?(float|Bfloat16|Float16|If)[E]?Li(\d+)ELb(\d)ELb(\d)ELb(\d)")
_OPERATION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)")


class Kernel(NamedTuple):
    """One kernel on one arch."""

    arch: str
    name: str
    registers: int
    stack: int
    operations: Counter[str]

    def count(self, start: str, part: str = "") -> int:
        """Instructions whose name begins with ``start`` and holds ``part``."""
        return sum(n for code, n in self.operations.items() if code.startswith(start) and part in code)

    @property
    def title(self) -> str:
        """What its template arguments mean."""
        found = _FUNCTION.search(self.name)
        assert found is not None, self.name
        dtype = {"If": "fp32", "float": "fp32", "Bfloat16": "bf16", "Float16": "fp16"}[found[1]]
        pieces, aligned, gram, layer = (int(group) for group in found.groups()[1:])
        rows = f"{pieces} pieces per thread" if pieces else "pieces read again"
        words = [dtype, rows, *(["Gram"] if gram else []), *(["LayerNorm"] if layer else [])]
        return ", ".join(words if aligned else [*words, "any alignment"])


def kernels(module: Path) -> list[Kernel]:
    """Every kernel of a built extension, arch by arch."""
    usage = re.compile(r"^arch = (\S+)|Function (\S*steer_rows\S*?):\s+(REG:.*)", re.MULTILINE)
    found: list[Kernel] = []
    arch, code = "", dict[str, Counter[str]]()
    for match in usage.finditer(_cuobjdump("--dump-resource-usage", module)):
        if match[1]:
            arch, code = match[1], _operations(module, match[1])
        else:
            used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", match[3])}
            found.append(Kernel(arch, match[2], used["REG"], used["STACK"] + used["LOCAL"], code[match[2]]))
    return found


def _operations(module: Path, arch: str) -> dict[str, Counter[str]]:
    parts = re.split(r"\n\s+Function : ", _cuobjdump("-sass", module, "-arch", arch))[1:]
    return {part.split("\n")[0].strip(): Counter(_OPERATION.findall(part)) for part in parts}


def _cuobjdump(what: str, module: Path, *options: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([str(tool), *options, what, str(module)], text=True, capture_output=True, check=True)
    return done.stdout


def main() -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("arch", "kernel", "registers", "stack", "barriers", "loads of 16 bytes", "stores of 16 bytes")
    for kernel in kernels(Path(sys.argv[1])):
        counts = (kernel.registers, kernel.stack, kernel.count("BAR.SYNC"))
        wide = (kernel.count("LDG", ".128"), kernel.count("STG", ".128"))
        table.add_row(kernel.arch, kernel.title, *map(str, (*counts, *wide)))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
