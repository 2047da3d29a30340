import math

import pytest
import torch

from slimgemm.pruning.energy import ENERGY, HOROWITZ45, HOROWITZ45_64, EnergyTable


def test_macs_by_width_are_the_published_sums():
    macs = HOROWITZ45.mac_pj
    assert macs[torch.float32] == pytest.approx(4.6) and macs[torch.float16] == pytest.approx(1.5)
    assert macs[torch.bfloat16] == macs[torch.float16] and macs[torch.int8] == pytest.approx(0.3)


def test_one_level_at_two_word_widths_is_not_mixed():
    assert HOROWITZ45.access("SRAM 32 KB") == 5 and HOROWITZ45_64.access("SRAM 32 KB") == 20
    assert HOROWITZ45.access("DRAM") == 640 and HOROWITZ45_64.access("DRAM") == 1300
    # 16 bytes: four 32-bit words or two 64-bit words
    assert HOROWITZ45.layer(0, 16, 0, torch.float32) == pytest.approx(4 * 640)
    assert HOROWITZ45_64.layer(0, 16, 0, torch.float32) == pytest.approx(2 * 1300)
    assert HOROWITZ45_64.layer(0, 0, 16, torch.float32) == pytest.approx(2 * 20)
    with pytest.raises(ValueError, match=r"no energy for SRAM 1 MB with words of 32 bits"):
        HOROWITZ45.access("SRAM 1 MB")


def test_tables_go_by_name_and_print_their_widths():
    assert {name: table.name for name, table in ENERGY.items()} == {n: n for n in ENERGY}
    text = str(HOROWITZ45)
    assert "32-bit word" in text and "DRAM 640" in text and "45 nm" in text
    assert "64-bit word" in str(HOROWITZ45_64)


def test_a_table_of_your_own():
    table = EnergyTable("x", 32, HOROWITZ45.operations, {("DRAM", 32): 8.0, ("L1", 32): 2.0}, "L1")
    assert table.layer(10, 4, 8, torch.int8) == pytest.approx(10 * 0.3 + 8 + 2 * 2)
    assert math.isnan(table.layer(10, 0, 0, torch.float64))
