"""space: what can be chosen for a model (channels of coupled groups, 2:4 of layers) and applied.

A choice is an Allocation: how many units each group keeps, and which layers take a pattern. The
space knows which units go first (by a score), predicts the costs of an allocation without cutting,
and applies it to a copy of the model.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slimgemm.pruning import channels
from slimgemm.pruning.allocate import Uniform
from slimgemm.pruning.cost import count_macs
from slimgemm.pruning.coupling import Coupling
from slimgemm.pruning.decide import Request, scores_of_all
from slimgemm.pruning.energy import HOROWITZ45, EnergyTable
from slimgemm.pruning.geometry import Costs, Geometry, ModelLatency
from slimgemm.pruning.inputs import Inputs
from slimgemm.pruning.layers import Layer, check_finite, find_layers
from slimgemm.pruning.masks import set_mask
from slimgemm.pruning.patterns import Channels, NofM, Pattern
from slimgemm.pruning.plan import contexts_of
from slimgemm.pruning.proof import apply_surgery
from slimgemm.pruning.scores import Magnitude, Score
from slimgemm.pruning.sparsegpt import Solver
from slimgemm.pruning.trace import trace

MOST_OPTIONS = 32  # widths offered per group, evenly spread


@dataclass(frozen=True)
class Allocation:
    """How much is kept where.

    Args:
        channels: group (names of its layers, joined by " + ") -> units kept.
        patterns: layer -> pattern, as "2:4".
    """

    channels: Mapping[str, int] = field(default_factory=dict)
    patterns: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Plain dicts, in a fixed order."""
        return {
            "channels": dict(sorted(self.channels.items())),
            "patterns": dict(sorted(self.patterns.items())),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Allocation:
        """The inverse of `as_dict`."""
        return cls(dict(data["channels"]), dict(data["patterns"]))

    @property
    def key(self) -> str:
        """One string per allocation."""
        return json.dumps(self.as_dict())


@dataclass(frozen=True)
class Choices:
    """What a search may do to a model; shared by all its spaces.

    Args:
        patterns: Channels() for widths, NofM(2, 4) for masks inside a layer; at least one.
        score: which weights go first.
        calibration: batches, for scores that need data.
        ignore: as for `plan`.
        seed: of scores that draw random numbers.
        energy: table of the predicted energy.
    """

    patterns: tuple[Pattern, ...] = (Channels(),)
    score: Score = field(default_factory=lambda: Magnitude(p=2))
    calibration: Sequence[Any] | None = None
    ignore: Sequence[str] = ()
    seed: int = 0
    energy: EnergyTable = HOROWITZ45

    def __post_init__(self) -> None:
        kinds = [p for p in self.patterns if not isinstance(p, (Channels, NofM))]
        if kinds or not self.patterns:
            raise ValueError(
                f"a search chooses among Channels and NofM patterns, got {kinds or 'none'}"
            )
        if sum(isinstance(p, Channels) for p in self.patterns) > 1:
            raise ValueError("a search takes one Channels pattern, got several")
        if isinstance(self.score, Solver):
            raise ValueError(
                f"{self.score} solves for new weights and ranks no channels; use another score"
            )
        if self.calibration is None and self.score.needs in ("inputs", "gradients"):
            raise ValueError(f"{self.score} needs calibration data; pass calibration=")

    @property
    def widths(self) -> Channels | None:
        """The Channels pattern, if channels may go."""
        return next((p for p in self.patterns if isinstance(p, Channels)), None)

    @property
    def masks(self) -> dict[str, NofM]:
        """Patterns inside a layer by their name."""
        return {str(p): p for p in self.patterns if isinstance(p, NofM)}


class Space:
    """The choices for one model as it is now; the model itself is never changed.

    Args:
        coupling: of this model, where it is known; it is traced otherwise.

    Raises:
        ValueError: nothing can be pruned, a weight is not finite, or the model cannot be traced.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Inputs,
        choices: Choices,
        latency: ModelLatency | None = None,
        coupling: Coupling | None = None,
    ) -> None:
        self.model, self.example_inputs, self.choices = model, example_inputs, choices
        layers = find_layers(model, choices.ignore)
        chosen = [layer for layer in layers if layer.refusal is None]
        if not chosen:
            reasons = "; ".join(f"{la.name}: {la.refusal}" for la in layers) or "no layers"
            raise ValueError(f"nothing can be pruned: {reasons}")
        for layer in chosen:
            check_finite(layer.name, layer.weight)
        pinned = channels.pinned_by(model, layers, choices.ignore)
        self.coupling = coupling or trace(model, example_inputs, pinned)
        self.scores = scores_of(
            model, chosen, example_inputs, choices.score, choices.seed, self.coupling,
            choices.calibration,
        )  # fmt: skip
        found = channels.groups_of(self.coupling, list(self.scores)) if choices.widths else []
        self.groups = {" + ".join(group.layers): group for group in found}
        totals = channels.unit_scores(self.coupling, self.scores, choices.score.axis)
        self.values = {
            name: torch.tensor([totals.get(u, 0.0) for u in g.units], dtype=torch.float64)
            for name, g in self.groups.items()
        }
        self.geometry = Geometry(model, example_inputs, self.coupling, choices.energy, latency)
        self.maskable = {
            layer.name: [
                word
                for word, pattern in choices.masks.items()
                if pattern.refusal(tuple(layer.weight.shape)) is None
                and layer.weight.shape[1] >= pattern.group
            ]
            for layer in chosen
            if layer.name in self.geometry.sites
        }
        self.options = {name: self._options(name) for name in self.groups}

    def _order(self, name: str) -> np.ndarray:
        """Units of a group, the highest score first; ties to the lower index."""
        order = self.values[name].sort(descending=True, stable=True).indices.numpy()
        return np.asarray(self.groups[name].units)[order]

    def _options(self, name: str) -> list[int]:
        """Numbers of units that a group may keep, falling, without the present one."""
        pattern, group = self.choices.widths, self.groups[name]
        assert pattern is not None
        order = self._order(name)
        fits = np.ones(len(order) + 1, dtype=bool)
        for axis in group.axes:
            each = np.array([int((axis == unit).sum()) for unit in order])
            always = int(axis.size - each.sum())
            width = always + np.concatenate([[0], each.cumsum()])
            fits &= (width > 0) & (width % pattern.multiple_of == 0)
        known = [k for k in range(len(order) - 1, pattern.floor - 1, -1) if k and fits[k]]
        if len(known) <= MOST_OPTIONS:
            return known
        places = np.linspace(0, len(known) - 1, MOST_OPTIONS).round().astype(int)
        return [known[i] for i in places]

    def gone(self, kept: Mapping[str, int]) -> list[int]:
        """Root ids that go when groups keep these numbers of units."""
        lost: list[int] = []
        for name, count in kept.items():
            if name not in self.groups:
                raise ValueError(
                    f"{name} is no group of coupled channels here; groups are "
                    f"{', '.join(self.groups)}"
                )
            lost.extend(self._order(name)[count:].tolist())
        return sorted(lost)

    def nofm(self, allocation: Allocation) -> dict[str, NofM]:
        """Layer -> pattern object."""
        masks = self.choices.masks
        return {name: masks[word] for name, word in allocation.patterns.items()}

    def costs(self, allocation: Allocation) -> Costs:
        """Predicted costs."""
        return self.geometry.costs(self.gone(allocation.channels), self.nofm(allocation))

    def least(self, patterns: Mapping[str, str] | None = None) -> Allocation:
        """Every group at its least option, and every pattern (the first that a layer can take)."""
        masks = {name: words[0] for name, words in self.maskable.items() if words}
        widths = {name: options[-1] for name, options in self.options.items() if options}
        return Allocation(widths, {**(masks if patterns is None else patterns)})

    def uniform(self, share: float) -> Allocation:
        """Every group without this share of its units, as near as its options allow."""
        widths = {}
        for name, options in self.options.items():
            total = len(self.groups[name].units)
            best = min([total, *options], key=lambda k: abs(k - total * (1 - share)))
            if best < total:
                widths[name] = best
        return Allocation(widths)

    def any(self, luck: random.Random) -> Allocation:
        """Every group at one of its options, drawn at random."""
        return Allocation({n: luck.choice(words) for n, words in self.options.items() if words})

    def apply(self, allocation: Allocation) -> tuple[nn.Module, channels.Surgery | None]:
        """A pruned copy of the model, and what was cut.

        Raises:
            ValueError: the cut cannot be proved (see pruning.proof).
        """
        model = copy.deepcopy(self.model)
        gone = self.gone(allocation.channels)
        surgery = None
        if gone:
            surgery = channels.cut(model, self.coupling, gone, self.example_inputs)
            apply_surgery(model, surgery)
        for name, pattern in self.nofm(allocation).items():
            scores = self.scores[name]
            for axis in (0, 1):
                kept = surgery.slices.get((f"{name}.weight", axis)) if surgery else None
                if kept is not None:
                    scores = scores.index_select(axis, kept.to(scores.device))
            set_mask(model.get_submodule(name), pattern.mask(scores, 0))
        return model, surgery


def scores_of(
    model: nn.Module,
    layers: Sequence[Layer],
    example_inputs: Inputs,
    score: Score,
    seed: int,
    coupling: Coupling | None = None,
    calibration: Sequence[Any] | None = None,
) -> dict[str, Tensor]:
    """Layer name -> scores of its weights, shape of the weight."""
    if coupling is None and score.needs == "norm":
        coupling = trace(model, example_inputs, lambda *_: None)
    contexts = contexts_of(model, layers, score, coupling, calibration, seed)
    cost = count_macs(model, example_inputs)
    asked = (model, layers, Channels(), score, Uniform(), contexts, calibration, None, cost)
    return scores_of_all(Request(*asked))


def group_of(names: Iterable[str], layer: str) -> str | None:
    """The group whose layers include this one."""
    return next((name for name in names if layer in name.split(" + ")), None)
