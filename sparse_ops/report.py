"""What compress reports, and text tables by rich."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field


def as_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as text, at most 120 columns wide; what is longer is folded, never cut short."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    text = console.file
    assert isinstance(text, io.StringIO)
    return text.getvalue().rstrip()


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer. Bytes are of the weight; times are on the input seen.

    timing: how a layer was timed on a GPU: "graph" (captured in CUDA graphs) or "eager".
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    packed: bool
    reason: str
    dense_bytes: int
    packed_bytes: int
    us_dense: float | None = None
    us_packed: float | None = None
    timing: str = ""


@dataclass(frozen=True)
class CompressReport:
    """One LayerReport for every nn.Linear and nn.Conv2d; `print` shows it as a table.

    note: what holds for the whole model: that its GPU was not tuned; "" if nothing does.
    """

    layers: list[LayerReport] = field(default_factory=list)
    note: str = ""

    @property
    def packed(self) -> list[LayerReport]:
        """The layers that were swapped."""
        return [layer for layer in self.layers if layer.packed]

    def __str__(self) -> str:
        columns = [
            "layer",
            "shape",
            "result",
            "dense bytes",
            "packed bytes",
            "dense us",
            "packed us",
        ]
        rows = []
        for layer in self.layers:
            result = f"packed ({layer.kind})" if layer.packed else f"dense: {layer.reason}"
            times = [f"{us:.1f}" if us else "-" for us in (layer.us_dense, layer.us_packed)]
            packed_bytes = str(layer.packed_bytes) if layer.packed else "-"
            shape = "x".join(map(str, layer.shape))
            rows.append([layer.name, shape, result, str(layer.dense_bytes), packed_bytes, *times])
        lines = [as_table("compress", columns, rows)]
        if any(layer.timing for layer in self.layers):
            eager = [layer.name for layer in self.layers if layer.timing == "eager"]
            others = "; in eager calls, as no graph could be captured: " if eager else ""
            others += ", ".join(eager)
            lines.append(f"Times are medians with L2 cold, in captured CUDA graphs{others}.")
        if self.note:
            lines.append(self.note)
        if self.packed:
            lines.append("Packed layers hold new parameters: build the optimizer now, not before.")
        return "\n".join(lines)
