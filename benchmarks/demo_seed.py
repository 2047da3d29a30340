"""One seed of the demo: train, then prune, fine-tune, pack, verify and save; 2:4, then channels.

Every number of a stage is measured on the model of that stage; nothing is carried over.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from slimgemm import kernels, pruning, sparse_ops
from slimgemm.benchmarks import demo_train
from slimgemm.benchmarks.demo_train import Score
from slimgemm.benchmarks.digits import Digits
from slimgemm.benchmarks.progress import Steps
from slimgemm.kernels.formats import Packed24
from slimgemm.pruning.cost import ENERGY, Cost

RATE = 1e-3  # Adam, dense training and fine-tuning of all widths
# A quarter of the weights has further to go: over six seeds of the digits, 5 epochs at 1e-3 ended
# 0.6 points below dense, 10 epochs at 2e-3 0.5 above; an epoch takes a third of the time.
RATE_CHANNELS = 2e-3
LOOPS = 3  # training loops of one seed
CHANNEL_SHARE = 0.5
CHANNEL_MULTIPLE = 8

# key -> what the table calls it, in the order in which a model goes through them
STAGES = {
    "dense": "dense, trained",
    "pruned": "2:4 pruned",
    "tuned": "2:4 fine-tuned, masks kept",
    "packed": "2:4 packed, verified",
    "reloaded": "2:4, fresh process",
    "cut": "channels cut",
    "cut_tuned": "channels fine-tuned",
    "cut_reloaded": "channels, fresh process",
}


@dataclass
class Stage:
    """What was measured at one stage.

    Args:
        accuracy: percent of the test images; loss: mean cross entropy, nats.
        file_bytes: of the weights as a safetensors file; of the whole folder where it was saved.
        difference: largest absolute difference of any logit to the stage before; None where the
            stage is meant to change the outputs.
        bit_equal: every logit is the same float as before; None as for difference.
    """

    accuracy: float
    loss: float
    file_bytes: int
    difference: float | None = None
    bit_equal: bool | None = None


@dataclass(frozen=True)
class LayerRow:
    """One layer under one pattern.

    Args:
        shape, stored_shape: of the weight, dense and as stored (dense shape where it is packed).
        kept: share of weights kept.
        dense_bytes, stored_bytes: of the weight; stored includes metadata.
        packed_16bit_bytes: the same weight packed from float16; None where it is not packed.
        energy_pj, stored_energy_pj: predicted for one image; see pruning.cost.
        note: why the layer is not packed or cut, or "".
    """

    pattern: str
    layer: str
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]
    kept: float
    dense_bytes: int
    stored_bytes: int
    packed_16bit_bytes: int | None
    energy_pj: float
    stored_energy_pj: float
    note: str


@dataclass
class SeedRun:
    """All that one seed gives: stages, curves, layers, models, tiles for the picture."""

    seed: int
    stages: dict[str, Stage] = field(default_factory=dict)
    curves: dict[str, list[Score]] = field(default_factory=dict)
    layers: list[LayerRow] = field(default_factory=list)
    models: dict[str, nn.Module] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    verified: bool = False
    verify_text: str = ""


@dataclass(frozen=True)
class Job:
    """What is the same for every seed.

    Args:
        epochs: of the dense training and of the fine-tuning after channels were cut.
        fine_tune: of the fine-tuning with 2:4 masks.
        models: folder of the saved models.
    """

    data: Digits
    device: torch.device
    epochs: int
    fine_tune: int
    models: Path

    @property
    def example(self) -> Tensor:
        """One test image, [1, 1, height, width], on the device."""
        return self.data.test_x[:1].to(self.device)


def folder_of(models: Path, seed: int, kind: str) -> Path:
    """Where a seed's model is saved; kind is "24" or "channels"."""
    return models / f"seed{seed}-{kind}"


def run_seed(job: Job, seed: int, steps: Steps) -> SeedRun:
    """The whole road of one seed."""
    run = SeedRun(seed)
    torch.manual_seed(seed)
    model = demo_train.build(job.data.image, job.data.classes).to(job.device)
    run.curves["dense"] = _train(job, run, model, steps, "train dense", job.epochs)
    run.models["dense"] = model
    run.stages["dense"] = _measure(job, model)
    _two_four(job, run, copy.deepcopy(model), steps)
    _channels(job, run, copy.deepcopy(model), steps)
    return run


def _train(
    job: Job, run: SeedRun, model: nn.Module, steps: Steps, name: str, epochs: int, **options: Any
) -> list[Score]:
    """Train with a progress bar; `options` go to demo_train.train."""
    curve: list[Score] = []
    options.setdefault("rate", RATE)
    rounds = demo_train.steps(job.data, epochs)
    with steps.loop(f"seed {run.seed}  {name}, {epochs} epochs", rounds) as loop:
        scores: Iterator[Score] = demo_train.train(
            model,
            job.data,
            epochs=epochs,
            seed=run.seed,
            device=job.device,
            tick=loop.step,
            **options,
        )
        for found in scores:
            curve.append(found)
            loop.note = f"{found.accuracy:.1f} %"
        loop.result = f"accuracy {curve[-1].accuracy:6.2f} %"
    return curve


def _measure(job: Job, model: nn.Module, outputs: Tensor | None = None) -> Stage:
    """Score of the model and the bytes of its weights as a file."""
    found = demo_train.logits(model, job.data.test_x, job.device) if outputs is None else outputs
    result = demo_train.score(found, job.data.test_y)
    tensors = {name: t.contiguous() for name, t in model.state_dict().items()}
    return Stage(result.accuracy, result.loss, len(safetensors.torch.save(tensors)))


def compare(stage: Stage, got: Tensor, want: Tensor) -> None:
    """Write into `stage` how far the outputs `got` are from `want`."""
    stage.difference = float((got - want).abs().max())
    stage.bit_equal = torch.equal(got, want)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _two_four(job: Job, run: SeedRun, model: nn.Module, steps: Steps) -> None:
    """Prune 2:4, fine-tune with masks, pack, verify, save."""
    # conv1 has one input channel: there is no group of four to choose from.
    cost = pruning.count_macs(model, job.example)
    plan = pruning.plan(
        model,
        job.example,
        pattern=pruning.NofM(keep=2, group=4),
        score=pruning.Magnitude(p=1),
        ignore=["conv1"],
    )
    plan.apply(model)
    run.stages["pruned"] = _measure(job, model)
    run.curves["tuned"] = _train(
        job, run, model, steps, "fine-tune 2:4", job.fine_tune, masked=True
    )
    reference = copy.deepcopy(model)
    before = demo_train.logits(reference, job.data.test_x, job.device)
    run.stages["tuned"] = _measure(job, reference, before)
    # On a GPU too: the demo shows the packed model, and the table of kernels where it is faster.
    sparse_ops.compress(model, job.example, only_if_faster=False)
    report = sparse_ops.verify(model, reference, job.data.test_x.to(job.device))
    run.verified, run.verify_text = bool(report.ok), str(report)
    after = demo_train.logits(model, job.data.test_x, job.device)
    stage = run.stages["packed"] = _measure(job, model, after)
    compare(stage, after, before)
    run.models.update(tuned=reference, packed=model)
    run.outputs["24"] = after
    run.folders["24"] = folder_of(job.models, run.seed, "24")
    sparse_ops.save(model, run.folders["24"], overwrite=True)
    run.layers.extend(_layer_rows(plan, cost, model, "2:4"))


def _channels(job: Job, run: SeedRun, model: nn.Module, steps: Steps) -> None:
    """Cut channels out of the same trained model, fine-tune, save."""
    cost = pruning.count_macs(model, job.example)
    plan = pruning.plan(
        model,
        job.example,
        pattern=pruning.Channels(multiple_of=CHANNEL_MULTIPLE),
        score=pruning.Magnitude(p=1),
        amount=pruning.Uniform(CHANNEL_SHARE),
    )
    plan.apply(model)
    run.stages["cut"] = _measure(job, model)
    run.curves["cut_tuned"] = _train(
        job, run, model, steps, "fine-tune channels", job.epochs, rate=RATE_CHANNELS
    )
    outputs = demo_train.logits(model, job.data.test_x, job.device)
    run.stages["cut_tuned"] = _measure(job, model, outputs)
    run.models["channels"] = model
    run.outputs["channels"] = outputs
    run.folders["channels"] = folder_of(job.models, run.seed, "channels")
    sparse_ops.save(model, run.folders["channels"], overwrite=True)
    run.layers.extend(_layer_rows(plan, cost, model, "channels"))


def _layer_rows(
    plan: pruning.Plan, cost: Cost, model: nn.Module, pattern: str
) -> Iterator[LayerRow]:
    """What became of each layer: bytes from the model itself, energy as the plan predicts it.

    Args:
        cost: of one image through the dense model, for layers that the plan says nothing about.
    """
    table = ENERGY[plan.energy]
    for entry in plan.entries:
        module, used = model.get_submodule(entry.name), cost.layers[entry.name]
        dense = math.prod(entry.shape) * entry.dtype.itemsize
        energy = table.layer(used.macs, dense, used.input_bytes + used.output_bytes, entry.dtype)
        stored_energy, note, half = energy, entry.refusal or "", None
        packed = getattr(module, "packed", None)
        if isinstance(packed, Packed24):
            stored, shape = packed.nbytes, entry.shape
            stored_energy = entry.pruned_energy_pj
            half = kernels.pack_24(kernels.unpack_24(packed).detach().half()).nbytes
        else:
            assert isinstance(module.weight, Tensor)
            stored, shape = module.weight.nbytes, tuple(module.weight.shape)
            if entry.mask is not None:
                # Its zeros are stored and multiplied like any other weight.
                note = "stays dense, with zeros"
            elif entry.refusal is None:
                stored_energy = entry.pruned_energy_pj
        yield LayerRow(
            pattern=pattern,
            layer=entry.name,
            shape=entry.shape,
            stored_shape=shape,
            kept=entry.kept,
            dense_bytes=dense,
            stored_bytes=stored,
            packed_16bit_bytes=half,
            energy_pj=energy,
            stored_energy_pj=stored_energy,
            note=note,
        )
