import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slimgemm.pruning import cost, count_macs

WIDTHS = (64, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")


def test_the_course_numbers(vgg):
    found = count_macs(vgg(*WIDTHS), torch.zeros(1, 3, 32, 32))
    assert found.macs == 605_754_368
    assert found.macs_with_norm == 606_164_480
    assert found.params == 9_228_362
    assert found.macs_attention == 0


def test_layers_by_name_with_traffic():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.Linear(8 * 4, 5))
    found = count_macs(model, torch.zeros(2, 4, 4, 4))
    conv, linear = found.layers["0"], found.layers["2"]
    assert conv.macs == 2 * 8 * 4 * 2 * 9 and linear.macs == 2 * 32 * 5
    assert conv.weight_bytes == (8 * 2 * 9 + 8) * 4
    assert conv.input_bytes == 2 * 4 * 16 * 4 and conv.output_bytes == linear.input_bytes
    assert found.macs == conv.macs + linear.macs


def test_calls_add_up_and_shared_parameters_count_once():
    layer = nn.Linear(3, 3)
    found = count_macs(nn.Sequential(layer, layer), torch.zeros(2, 5, 3))
    assert found.layers["0"].calls == 2 and found.macs == 2 * 2 * 5 * 9
    assert found.params == 12 and found.bytes == 48


def test_transposed_convolution():
    model = nn.ConvTranspose2d(3, 5, 2, stride=2)
    assert count_macs(model, torch.zeros(1, 3, 4, 4)).macs == 3 * 16 * 5 * 4


def test_attention_is_counted_apart(attention):
    model = attention()
    found = count_macs(model, torch.zeros(1, 6, 16))
    assert found.macs == 6 * sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2)
    assert found.macs_attention == 2 * 6 * 6 * 16
    assert found.macs_with_norm == found.macs + 6 * 16

    class Bmm(nn.Module):
        def forward(self, x):
            return torch.bmm(x, x.transpose(1, 2))

    assert count_macs(Bmm(), torch.zeros(3, 4, 5)).macs_attention == 3 * 4 * 4 * 5


def test_average_pool_and_means_are_in_the_second_convention_only():
    class Pools(nn.Module):
        def forward(self, x):
            return F.avg_pool2d(x, 2).mean((2, 3)) + F.max_pool2d(x, 4).flatten(1)

    found = count_macs(Pools(), torch.zeros(1, 3, 4, 4))
    assert (found.macs, found.macs_with_norm) == (0, 3 * 4 + 3)


def test_counting_leaves_the_model_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    mean = model[1].running_mean.clone()
    count_macs(model, torch.ones(3, 4))
    assert model[2].training and torch.equal(model[1].running_mean, mean)
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks
    with pytest.raises(RuntimeError):
        count_macs(model, torch.ones(3, 5))
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks


def test_energy_of_a_layer():
    table = cost.HOROWITZ45
    # 10 MACs at 4.6; 2 words from DRAM at 640; 3 words through SRAM at 5
    assert table.layer(10, 8, 12, torch.float32) == pytest.approx(46 + 1280 + 15)
    assert table.layer(10, 0, 0, torch.float16) == pytest.approx(15)
    assert table.layer(10, 0, 0, torch.int8) == pytest.approx(3)
    assert math.isnan(table.layer(10, 0, 0, torch.float64))
    assert cost.ENERGY["horowitz45"] is table


def test_both_conventions_and_moved_bytes_are_printed(vgg):
    found = count_macs(vgg(*WIDTHS), torch.zeros(1, 3, 32, 32))
    text = str(found)
    assert "605,754,368 MACs in convolutions" in text and "606,164,480 MACs with" in text
    assert "9,228,362 parameters" in text
    small = count_macs(nn.Linear(3, 5), torch.zeros(2, 3))
    assert small.moved_bytes == 4 * (15 + 5 + 6 + 10)
