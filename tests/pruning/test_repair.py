import pytest
import torch

from slimgemm.pruning import ADMM, LeastSquares, NofM
from slimgemm.pruning.repair import NotPositive, factor, revive


@pytest.fixture
def problem(normal):
    x = normal(200, 24, dtype=torch.float64) @ normal(24, 24, seed=1, dtype=torch.float64)
    weight = normal(10, 24, seed=2, dtype=torch.float64)
    return weight, NofM(2, 4).mask(weight.abs()), x.T @ x / 200


def error(weight, new, gram):
    return float(((weight - new) @ gram * (weight - new)).sum())


def test_least_squares_is_the_minimum_of_each_row(problem):
    weight, mask, gram = problem
    new = LeastSquares(damping=0.0, rows=3)(weight, mask, gram, [])
    assert not new[~mask].any()
    for row in range(weight.shape[0]):
        kept = mask[row]
        want = torch.linalg.solve(gram[kept][:, kept], gram[kept] @ weight[row])
        torch.testing.assert_close(new[row, kept], want)
    assert error(weight, new, gram) < 0.5 * error(weight, weight * mask, gram)


def test_admm_comes_close_to_the_minimum(problem):
    weight, mask, gram = problem
    exact = error(weight, LeastSquares(damping=0.0)(weight, mask, gram, []), gram)
    start = error(weight, weight * mask, gram)
    few = ADMM(iterations=5, damping=0.0)(weight, mask, gram, [])
    many = ADMM(iterations=2000, damping=0.0)(weight, mask, gram, [])
    assert not many[~mask].any()
    assert exact <= error(weight, many, gram) < 1.05 * exact
    assert error(weight, many, gram) < error(weight, few, gram) < start


def test_a_dense_mask_changes_nothing(problem):
    weight, mask, gram = problem
    full = torch.ones_like(mask)
    torch.testing.assert_close(LeastSquares()(weight, full, gram, []), weight)
    torch.testing.assert_close(ADMM()(weight, full, gram, []), weight)


def test_dead_inputs_do_not_stop_a_repair(problem):
    weight, mask, gram = problem
    gram[3] = gram[:, 3] = 0
    alive, dead = revive(gram)
    assert dead.nonzero().flatten().tolist() == [3] and alive[3, 3] == 1 and gram[3, 3] == 0
    for repair in (LeastSquares(), ADMM()):
        assert torch.isfinite(repair(weight, mask, gram, [])).all()


def test_factor_of_a_good_and_of_a_bad_matrix():
    notes = []
    gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    lower = factor(gram, 0.5, notes)
    torch.testing.assert_close(lower @ lower.T, gram + torch.eye(2, dtype=torch.float64))
    assert notes == []
    with pytest.raises(NotPositive, match="more calibration data"):
        factor(torch.full((2, 2), float("nan"), dtype=torch.float64), 0.5, notes)
    assert len(notes) == 4
