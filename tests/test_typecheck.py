"""Annotations are checked at every call in these tests: of shapes, and where there are none."""

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError

from spikellm.coding.neuron import PhaseTable
from spikellm.kernels.encode import Digits, emit
from spikellm.kernels.hadamard import hadamard_transform


def test_shapes_are_checked():
    with pytest.raises(TypeCheckError):
        hadamard_transform(torch.ones(6), (torch.ones(2, 2), torch.ones(3, 2)))
    with pytest.raises(TypeCheckError):
        PhaseTable(theta=torch.ones(1, 3), h=torch.ones(1, 3), d=torch.ones(1, 2), v0=torch.ones(1))


def test_types_are_checked_where_there_are_no_shapes():
    one = torch.ones(1)
    emit(one, one, one, Digits())
    with pytest.raises(BeartypeCallHintViolation):
        emit(one, 1.0, one, Digits())
    with pytest.raises(TypeCheckError):
        Digits(sides="2")
