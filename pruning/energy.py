"""Energy: picojoules of single operations by width, and of memory words by level and width.

    energy of a layer = MACs * pJ per MAC + weight words * pJ (DRAM) + activation words * pJ (SRAM)

The two published memory tables disagree until the width of a word is said: 5 pJ is a 32-bit word
from a 32 KB SRAM, 20 pJ a 64-bit word. So every figure here carries its width, and a table is
used with words of one width. 45 nm at 0.9 V: compare models with it, do not quote joules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

# (operation, bits of an operand) -> pJ. Horowitz, ISSCC 2014, figure 1.1.9.
OPERATIONS: Mapping[tuple[str, int], float] = MappingProxyType(
    {
        ("int add", 8): 0.03,
        ("int add", 16): 0.05,
        ("int add", 32): 0.1,
        ("int mult", 8): 0.2,
        ("int mult", 32): 3.1,
        ("fp add", 16): 0.4,
        ("fp add", 32): 0.9,
        ("fp mult", 16): 1.1,
        ("fp mult", 32): 3.7,
    }
)
# (level, bits of a word) -> pJ per access. 32-bit words: EIE, arXiv 1602.01528, table 1. 64-bit
# words: Horowitz, ISSCC 2014, where DRAM is 1300 to 2600; the lower end stands here.
MEMORY: Mapping[tuple[str, int], float] = MappingProxyType(
    {
        ("register", 32): 1.0,
        ("SRAM 32 KB", 32): 5.0,
        ("DRAM", 32): 640.0,
        ("SRAM 8 KB", 64): 10.0,
        ("SRAM 32 KB", 64): 20.0,
        ("SRAM 1 MB", 64): 100.0,
        ("DRAM", 64): 1300.0,
    }
)
# dtype -> the two operations of one MAC; products of int8 are summed in 32 bits.
MACS: Mapping[torch.dtype, tuple[tuple[str, int], tuple[str, int]]] = MappingProxyType(
    {
        torch.float32: (("fp mult", 32), ("fp add", 32)),
        torch.float16: (("fp mult", 16), ("fp add", 16)),
        torch.bfloat16: (("fp mult", 16), ("fp add", 16)),
        torch.int8: (("int mult", 8), ("int add", 32)),
    }
)


@dataclass(frozen=True)
class EnergyTable:
    """Energies of one process node, with memory words of one width.

    Args:
        name: what reports print.
        word_bits: width of a memory word.
        operations: (operation, operand bits) -> pJ.
        memory: (level, word bits) -> pJ per access.
        sram: the level that activations pass through.
    """

    name: str
    word_bits: int
    operations: Mapping[tuple[str, int], float]
    memory: Mapping[tuple[str, int], float]
    sram: str = "SRAM 32 KB"

    def access(self, level: str) -> float:
        """pJ of one access to a word of `word_bits`.

        Raises:
            ValueError: the table has no figure for that level at that width.
        """
        if (level, self.word_bits) not in self.memory:
            known = ", ".join(f"{name} ({bits} bit)" for name, bits in self.memory)
            raise ValueError(
                f"{self.name} has no energy for {level} with words of {self.word_bits} bits; "
                f"it has {known}"
            )
        return self.memory[level, self.word_bits]

    @property
    def mac_pj(self) -> dict[torch.dtype, float]:
        """dtype -> pJ of one multiply and add of that width."""
        return {
            dtype: round(sum(self.operations[op] for op in ops), 3) for dtype, ops in MACS.items()
        }

    @property
    def sram_pj(self) -> float:
        """pJ of one word of `word_bits` in the SRAM that activations pass through."""
        return self.access(self.sram)

    @property
    def dram_pj(self) -> float:
        """pJ of one word of `word_bits` in DRAM."""
        return self.access("DRAM")

    def layer(
        self, macs: float, weight_bytes: float, activation_bytes: float, dtype: torch.dtype
    ) -> float:
        """pJ of a layer: its MACs, weights once from DRAM, activations once through SRAM.

        NaN where the table has no MAC energy for the dtype.
        """
        if dtype not in MACS:
            return float("nan")
        word = self.word_bits / 8
        weights = weight_bytes / word * self.dram_pj
        activations = activation_bytes / word * self.sram_pj
        return macs * self.mac_pj[dtype] + weights + activations

    def __str__(self) -> str:
        """The figures that `layer` uses, each with its width."""
        macs = ", ".join(f"{d} {pj:g}" for d, pj in self.mac_pj.items())
        return (
            f"{self.name} (45 nm, 0.9 V), pJ: MAC {macs}; {self.word_bits}-bit word "
            f"{self.sram} {self.sram_pj:g}, DRAM {self.dram_pj:g}"
        )


HOROWITZ45 = EnergyTable("horowitz45", 32, OPERATIONS, MEMORY)
HOROWITZ45_64 = EnergyTable("horowitz45-64bit", 64, OPERATIONS, MEMORY)
ENERGY: Mapping[str, EnergyTable] = MappingProxyType(
    {table.name: table for table in (HOROWITZ45, HOROWITZ45_64)}
)
