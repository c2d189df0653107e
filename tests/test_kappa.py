# SPDX-License-Identifier: Apache-2.0
"""KappaTune picks the weights with the smallest condition numbers."""

from __future__ import annotations

import torch
from fastadapt.helpers import KappaTuneSelector, find_kappa_target_modules
from torch import nn

from tests import tiny


class Experts(nn.Module):
    def __init__(self, *kappas: float) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.stack([conditioned(k) for k in kappas]))


def conditioned(kappa: float) -> torch.Tensor:
    """A 6 x 4 matrix of this condition number."""
    generator = torch.Generator().manual_seed(int(kappa))
    u, _, v = torch.linalg.svd(torch.randn(6, 4, generator=generator), full_matrices=False)
    return u @ torch.diag(torch.logspace(0, -torch.log10(torch.tensor(kappa)).item(), 4)) @ v


def test_layers_and_experts_in_order() -> None:
    model = nn.ModuleDict({str(k): nn.Linear(4, 6) for k in (300, 3, 30)})
    for kappa, layer in model.items():
        layer.weight.data.copy_(conditioned(float(kappa)))
    model["wide"] = nn.Linear(40, 4)
    model["experts"] = Experts(2.0, 4.0)
    model["worse"] = Experts(2.0, 400.0)
    selector = KappaTuneSelector(model, max_dim_size_to_analyze=8, show_progress=False)
    assert selector.get_best_targets() == ["3", "30", "300"]
    assert selector.get_best_targets(top_p=0.1) == ["3"]
    assert selector.get_best_targets(num_modules=2) == ["3", "30"]
    assert selector.get_best_targets(threshold=31.0) == ["3", "30"]
    experts = ["experts.down_proj", "worse.down_proj"]
    assert selector.get_best_target_parameters() == experts
    found = find_kappa_target_modules(model, 0.5, max_dim_size_to_analyze=8, show_progress=False)
    assert found == {"target_modules": ["3"], "target_parameters": experts[:1]}


def test_quantised_weights_are_read() -> None:
    found = find_kappa_target_modules(tiny.model("llama", "nf4"), show_progress=False)
    assert found["target_modules"]
    assert found["target_parameters"] is None
