import math

import pytest

from slimgemm.pruning import AMC, Channels, NofM, Search, count_macs
from slimgemm.pruning.amc import FEATURES, AMCSearch
from slimgemm.pruning.ddpg import Agent
from slimgemm.pruning.space import Allocation


@pytest.fixture
def begun(blobs, tmp_path):
    def make(**limits):
        search = Search(
            blobs.accuracy, method=AMC(3, 3), patterns=(Channels(multiple_of=4), NofM(2, 4)),
            show=False, **limits,
        )  # fmt: skip
        task = search._task(blobs.model, blobs.example, tmp_path)
        task.dense_value = blobs.accuracy(blobs.model)
        return AMCSearch(search.method, task)

    return make


def test_states_are_the_papers_and_actions_keep_the_limit_reachable(blobs, begun):
    macs = count_macs(blobs.model, blobs.example).macs
    search = begun(max_macs=0.3 * macs)
    assert search.sites == ["0", "2", "0 2:4", "2 2:4", "4 2:4"]
    agent = Agent(FEATURES, 0)
    for _ in range(6):
        steps, allocation = search._episode(agent, 0.5)
        assert search.task.costs(search.pool.space, allocation).macs <= 0.3 * macs
        states = [state for state, _ in steps]
        assert all(state.shape == (FEATURES,) for state in states)
        assert states[0][8] == 0 and states[0][10] == 1  # nothing reduced yet, first action
        assert float(states[-1][9]) == 0  # nothing is left after the last
        reduced = [float(state[8]) for state in states]
        assert reduced == sorted(reduced) and reduced[-1] > 0
        assert [float(s[10]) for s in states[1:]] == pytest.approx([a for _, a in steps[:-1]])
    assert float(search.features.max()) == 1


def test_rewards_are_the_papers(blobs, begun):
    macs = count_macs(blobs.model, blobs.example).macs
    dense = Allocation()
    error = 100 - blobs.accuracy(blobs.model)
    assert begun(max_macs=macs)._reward(dense) == pytest.approx(-error)


def test_without_a_limit_cheaper_models_are_rewarded(blobs, begun):
    search = begun(max_drop=5.0)
    half = search.pool.space.uniform(0.5)
    for allocation in (Allocation(), half):
        reward = search._reward(allocation)
        _, value, costs = search.pool.tried[allocation.key]
        share = costs.macs / count_macs(blobs.model, blobs.example).macs
        assert reward == pytest.approx(-(100 - value) * math.log(1 + 1000 * share))


def test_bad_options():
    with pytest.raises(ValueError, match="AMC needs an episode"):
        AMC(explore=0, exploit=0)
