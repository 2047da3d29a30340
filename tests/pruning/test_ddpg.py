import torch

from slimgemm.pruning.ddpg import Agent, Transition


def history(seed, updates=6):
    agent = Agent(3, seed, hidden=16, batch=8)
    actions = []
    for number in range(4):
        state = torch.full((3,), number / 4)
        actions.append(agent.act(state, 0.3))
        agent.learn([Transition(state, actions[-1], -actions[-1], None)], updates)
    return actions, agent


def test_one_seed_gives_one_history():
    (first, one), (second, two), (other, _) = history(0), history(0), history(1)
    assert first == second != other
    assert all(0 <= action <= 1 for action in first)
    pairs = zip(one.actor.parameters(), two.actor.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_it_learns_which_action_pays():
    agent = Agent(2, 0, hidden=32, actor_rate=3e-4, critic_rate=3e-3, tau=0.05, batch=32)
    state = torch.tensor([0.2, 0.9])
    assert abs(agent.act(state, 0.0) - 0.7) > 0.15
    for _ in range(40):
        action = agent.act(state, 0.5)
        agent.learn([Transition(state, action, -10 * (action - 0.7) ** 2, None)], 6)
    assert abs(agent.act(state, 0.0) - 0.7) < 0.1


def test_the_baseline_is_a_moving_average_and_memory_is_bounded():
    agent = Agent(1, 0, hidden=8, memory=3, baseline=0.9)
    state = torch.zeros(1)
    for reward in (1.0, 3.0):
        agent.learn(
            [Transition(state, 0.5, reward, state), Transition(state, 0.5, reward, None)], 0
        )
    assert abs(agent.average - (0.9 * 1 + 0.1 * 3)) < 1e-12
    assert [t.reward for t in agent.buffer] == [1.0, 3.0, 3.0]


def test_the_value_of_a_state_includes_what_follows():
    agent = Agent(
        1, 0, hidden=32, critic_rate=1e-2, actor_rate=0.0, tau=0.2, batch=32, baseline=1.0
    )
    agent.average = 0.0
    first, last = torch.tensor([0.0]), torch.tensor([1.0])
    for _ in range(30):
        agent.learn([Transition(first, 0.5, 0.0, last), Transition(last, 0.5, 2.0, None)], 8)
    action = torch.tensor([[0.5]])
    with torch.no_grad():
        assert abs(float(agent.critic(last[None], action)) - 2) < 0.3
        assert float(agent.critic(first[None], action)) > 1
