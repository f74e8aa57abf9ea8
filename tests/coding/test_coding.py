"""Grain assignments and amplitudes: the count formula, hand-computed rows, the authors' published files."""

from math import comb

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikellm.coding.grains import assignments, base2_amplitudes, default_v0, phase_amplitudes
from spikellm.model.sites import sites

law = settings(deadline=None, max_examples=80, derandomize=True)


@given(T=st.integers(1, 16), G=st.integers(1, 5), m=st.integers(1, 4))
@law
def test_assignments_are_all_cuts_into_long_enough_grains(T, G, m):
    if m * G > T:
        with pytest.raises(ValueError, match=rf"T={T}\b.*G={G}\b"):
            assignments(T, G, min_length=m)
        return
    rows = assignments(T, G, min_length=m)
    assert len(rows) == comb(T - (m - 1) * G - 1, G - 1)
    assert len({tuple(row) for row in rows.tolist()}) == len(rows)
    for row in rows.tolist():
        assert row == sorted(row)
        assert all(row.count(grain) >= m for grain in range(G))
        assert set(row) == set(range(G))


def test_counts_named_in_the_method():
    assert len(assignments(8, 2)) == 5
    assert len(assignments(8, 3)) == 6
    assert assignments(4, 2).tolist() == [[0, 0, 1, 1]]


def test_amplitudes_count_the_exponent_from_the_first_phase_of_the_code():
    tau = torch.tensor([2.0])
    rows = phase_amplitudes(tau, torch.tensor([[2.0, 4.0]]), torch.tensor([0, 0, 1, 1]))
    # 2 * 2^-1, 2 * 2^-2, then base 4 goes on with exponents 3 and 4, not 1 and 2
    assert torch.allclose(rows, torch.tensor([[1.0, 0.5, 2 / 64, 2 / 256]]), rtol=1e-6)


def test_amplitudes_of_several_sites_at_once():
    tau = torch.tensor([1.0, 10.0])
    bases = torch.tensor([[2.0, 3.0], [1.5, 2.0]])
    assignment = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    wanted = torch.tensor([[1 / 2, 1 / 4, 1 / 27, 1 / 81], [10 / 1.5, 10 / 4, 10 / 8, 10 / 16]])
    assert torch.allclose(phase_amplitudes(tau, bases, assignment), wanted, rtol=1e-6)


def test_base_2_rows_and_initial_potential():
    tau = torch.tensor([1.0, 3.0])
    assert torch.equal(base2_amplitudes(tau, 3), torch.tensor([[0.5, 0.25, 0.125], [1.5, 0.75, 0.375]]))
    assert torch.equal(default_v0(tau, 3), torch.tensor([1 / 16, 3 / 16]))


def published(shared_data):
    files = sorted((shared_data / "published_neurons").glob("*.pth"))
    if not files:
        pytest.skip("no published neuron files")
    return files


def test_published_files_name_our_sites(shared_data):
    names = [site.name for site in sites(32)]
    assert len(names) == len(set(names)) == 289
    for file in published(shared_data):
        entries = torch.load(file, weights_only=True, map_location="cpu")
        assert len(entries) == 289, file.name
        assert set(entries) == set(names), file.name


def test_published_tables_obey_the_conventions(shared_data):
    """Assignments are among ours; with global exponents a published code is a fine code: its amplitudes fall by about two a phase."""
    for file in published(shared_data):
        T, grains = int(file.stem.split("-T-")[1].split("-")[0]), int(file.stem.split("-")[-1])
        allowed = {tuple(row) for row in assignments(T, grains).tolist()}
        for name, entry in torch.load(file, weights_only=True, map_location="cpu").items():
            G, assignment, bases, tau = entry[:4]
            assert grains == G, name
            assignment = torch.as_tensor(assignment).long().flatten()
            assert tuple(assignment.tolist()) in allowed, f"{file.name} {name}: {assignment}"
            bases = torch.as_tensor(bases).float().flatten()
            d = phase_amplitudes(torch.as_tensor(tau).float().reshape(()), bases, assignment)
            ratios = d[:-1] / d[1:]
            assert (bases - 2).abs().max() < 0.07, name
            assert ((ratios > 1.2) & (ratios < 3.2)).all(), f"{file.name} {name}: {ratios}"
