"""ddpg: deep deterministic policy gradient for one action in [0, 1], in plain torch.

    y = r - b + gamma * Q'(s', mu'(s'));  minimise (Q(s, a) - y)**2;  maximise Q(s, mu(s))

b is a moving average of past rewards; Q' and mu' follow Q and mu slowly.

Source: Lillicrap et al. 2015, arXiv 1509.02971; with b as in He et al. 2018, arXiv 1802.03494.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Transition:
    """A state, its action, the reward of the episode, and the next state (None at its end)."""

    state: Tensor
    action: float
    reward: float
    next: Tensor | None


class Critic(nn.Module):
    """Q(s, a)."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(features + 1, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, 1),
        )  # fmt: skip

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        """[n, 1] for states [n, features] and actions [n, 1]."""
        return self.layers(torch.cat([states, actions], 1))


class Agent:
    """Actor, critic, their slow copies and a replay buffer. One seed gives one history.

    Args:
        features: of a state.
        hidden: width of both hidden layers.
        actor_rate, critic_rate: of Adam.
        tau: how fast the slow copies follow.
        gamma: discount.
        batch, memory: transitions per update, and kept in all.
        baseline: weight of the past in the moving average of rewards.
    """

    def __init__(
        self,
        features: int,
        seed: int,
        *,
        hidden: int = 300,
        actor_rate: float = 1e-4,
        critic_rate: float = 1e-3,
        tau: float = 0.01,
        gamma: float = 1.0,
        batch: int = 64,
        memory: int = 2000,
        baseline: float = 0.95,
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.tau, self.gamma, self.batch, self.memory = tau, gamma, batch, memory
        self.weight = baseline
        self.average: float | None = None  # of rewards, once there is one
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.actor: nn.Module = nn.Sequential(
                nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
                nn.Linear(hidden, 1), nn.Sigmoid(),
            )  # fmt: skip
            self.critic: nn.Module = Critic(features, hidden)
        self.slow_actor, self.slow_critic = copy.deepcopy(self.actor), copy.deepcopy(self.critic)
        self.actor_step = torch.optim.Adam(self.actor.parameters(), lr=actor_rate)
        self.critic_step = torch.optim.Adam(self.critic.parameters(), lr=critic_rate)
        self.buffer: list[Transition] = []

    def act(self, state: Tensor, sigma: float) -> float:
        """The actor's action with noise: a normal around it, cut off at 0 and 1."""
        with torch.no_grad():
            mean = float(self.actor(state.unsqueeze(0)))
        if sigma == 0:
            return mean
        while True:
            action = mean + sigma * float(torch.randn((), generator=self.generator))
            if 0 <= action <= 1:
                return action

    def learn(self, episode: Sequence[Transition], updates: int) -> None:
        """Remember an episode, move the baseline, and update from the buffer."""
        self.buffer = [*self.buffer, *episode][-self.memory :]
        reward = episode[-1].reward
        past = reward if self.average is None else self.average
        self.average = self.weight * past + (1 - self.weight) * reward
        for _ in range(updates):
            self._update()

    def _update(self) -> None:
        picked = torch.randint(len(self.buffer), (self.batch,), generator=self.generator)
        batch = [self.buffer[i] for i in picked.tolist()]
        states = torch.stack([t.state for t in batch])
        actions = torch.tensor([[t.action] for t in batch])
        rewards = torch.tensor([[t.reward] for t in batch])
        ends = torch.tensor([[t.next is None] for t in batch])
        following = torch.stack([t.state if t.next is None else t.next for t in batch])
        with torch.no_grad():
            ahead = self.slow_critic(following, self.slow_actor(following))
            target = rewards - (self.average or 0.0) + self.gamma * ahead.masked_fill(ends, 0.0)
        loss = nn.functional.mse_loss(self.critic(states, actions), target)
        self.critic_step.zero_grad()
        loss.backward()
        self.critic_step.step()
        gain = self.critic(states, self.actor(states)).mean()
        self.actor_step.zero_grad()
        (-gain).backward()
        self.actor_step.step()
        for slow, fast in ((self.slow_actor, self.actor), (self.slow_critic, self.critic)):
            for a, b in zip(slow.parameters(), fast.parameters(), strict=True):
                a.data.lerp_(b.data, self.tau)
