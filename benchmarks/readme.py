"""Write the numbers of the README and its pictures from the committed results: ``python -m benchmarks.readme``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks import pictures, records, tables
from benchmarks.gpu import tables as gpu

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- written by python -m benchmarks.readme -->", "<!-- end -->"
FOLDED = ("peers", "ops", "malloc", "prefill", "swap", "isolation", "scaling", *gpu.FOLDED)
"""Tables that are kept shut."""


def text(folder: Path = RESULTS) -> str:
    """Everything between the README's two marks."""
    return "\n\n".join([BEGIN, *_parts(folder), END])


def _parts(folder: Path) -> Iterator[str]:
    record = records.read(folder, "decode")
    assert record is not None, "the README's first table is that of decoding"
    machine = record.machine
    where = f"{machine['device']}, torch {machine['torch']}, {machine['instruction set']}, one thread"
    yield f"""Medians of interleaved runs on a shared machine ({where}),
correctness checked before anything was timed; losses are listed like wins. In a clone this repeats every number and
picture:

```bash
pip install torch==2.13.0 -e ".[peers,plots]" && pip install --no-deps -r benchmarks/peers/requirements.txt
steerkern bench --out benchmarks/results && python -m benchmarks.readme
```

(vLLM's: `pytest benchmarks/test_vllm.py --benchmark-json=benchmarks/results/vllm.json` in the environment that
`tests/serving/run.sh` makes.)"""
    for plot in pictures.everything(folder):
        yield f"![{plot.title}. {plot.caption}](benchmarks/results/plots/{plot.name}.png)"
    for table in tables.everything(folder):
        page = table.to_markdown()
        if table.name in FOLDED:
            title, _, rest = page.removeprefix("### ").partition("\n")
            page = f"<details><summary><b>{title}</b></summary>\n{rest}\n\n</details>"
        yield page


def main() -> None:
    """Rewrite the block in the README, and its pictures."""
    pictures.draw(RESULTS)
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(before + text() + after, encoding="utf-8")


if __name__ == "__main__":
    main()
