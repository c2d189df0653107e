# SPDX-License-Identifier: Apache-2.0
"""MonteCLoRA:  LoRA; in training A is the mean of N noisy copies of itself.

    A' = A + sum_n w_n (eps_n L)^T    eps_n ~ N(0, 1): (in, r)    L L^T = V, V diagonal
    V = diag(Wishart(r) exp(2 t))  t: (r,)       w = softmax(log-normal with mean log alpha): (N,)

t (``std_prior``) and log alpha (``expert_weights_prior``) are trained. The variational loss of the
paper, ``_get_monteclora_loss()``, is the caller's to add. PEFT draws ``buffer_size`` steps ahead
(150 x N times the size of A); here the noise is drawn when it is used, from the same distribution.
Merging and evaluation are LoRA's. Source: MonteCLoRA (arXiv 2411.04358).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.base import Base
from fastadapt.errors import ConfigError
from fastadapt.methods.lora import Lora, refuse_kind

_SMALLEST_VARIANCE = 1e-3
_SMALL = 1e-6


@dataclass
class MontecloraConfig:
    """num_samples: N; use_entropy: add |w|^2 to the loss; dirichlet_prior: of w; sample_scaler:
    of the noise; kl_loss_weight: of the loss; buffer_size: accepted, nothing is drawn ahead."""

    num_samples: int = 8
    use_entropy: bool = False
    dirichlet_prior: float = 0.1
    sample_scaler: float = 1e-4
    kl_loss_weight: float = 1e-5
    buffer_size: int = 150

    def __post_init__(self) -> None:
        for name in ("num_samples", "dirichlet_prior", "buffer_size"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"`{name}` must be greater than 0.")


class Sampler(nn.Module):
    """PEFT's parameters and buffers, and the noise. forward() -> the noise of A^T: (in, r)."""

    gaussian_var_prior: Tensor
    expert_weights: Tensor

    def __init__(self, width: int, r: int, options: MontecloraConfig) -> None:
        super().__init__()
        self.width, self.options = width, options
        self.std_prior = nn.Parameter(torch.rand(r))
        self.expert_weights_prior = nn.Parameter(torch.rand(options.num_samples))
        self.register_buffer("gaussian_var_prior", torch.eye(r))
        weights = torch.ones(options.num_samples) / options.num_samples
        self.register_buffer("expert_weights", weights)

    def forward(self) -> Tensor:
        t, r, n = self.std_prior, self.std_prior.shape[0], self.options.num_samples
        variance = (_wishart_diagonal(r, t) * torch.exp(2 * t)).clamp_min(_SMALLEST_VARIANCE)
        weights = torch.softmax(self._logits(), 0)
        self.gaussian_var_prior, self.expert_weights = torch.diag(variance), weights
        eps = torch.randn(n, self.width, r, device=t.device, dtype=t.dtype)
        noise = torch.einsum("n,nir->ir", weights, eps) * variance.sqrt()
        return self.options.sample_scaler * noise

    def _logits(self) -> Tensor:
        """A normal in log space with the first two moments of a Dirichlet's logits."""
        n = self.options.num_samples
        alpha = torch.exp(self.expert_weights_prior).clamp_min(_SMALL)
        mean = alpha.log() - alpha.log().mean()
        variance = (1 - 2 / n) / alpha + (1 / alpha).sum() / n**2
        variance = variance.clamp_min(_SMALL) + _SMALL
        return mean + variance.sqrt() * torch.randn_like(alpha)

    def loss(self) -> Tensor:
        """The three divergences, and |w|^2 where asked for."""
        options, r = self.options, self.std_prior.shape[0]
        alpha = torch.exp(self.expert_weights_prior)
        prior = torch.full_like(alpha, options.dirichlet_prior)
        dirichlet = (
            torch.lgamma(alpha.sum()) - torch.lgamma(prior.sum())
            + (torch.lgamma(alpha) - torch.lgamma(prior)).sum()
            + ((alpha - prior) * (torch.digamma(alpha) - torch.digamma(alpha.sum()))).sum()
        )  # fmt: skip
        var = torch.exp(2 * self.std_prior)
        # the trace of log over a matrix with zeros off its diagonal is over its diagonal
        wishart = 0.5 * (-var.log().sum() * r + var.sum() * r - r**2)
        last = self.gaussian_var_prior.diagonal().clamp_min(_SMALL)
        normal = options.num_samples * 0.5 * (last.sum() - last.log().sum() - r)
        loss = options.kl_loss_weight * (dirichlet + wishart + normal)
        return loss + self.expert_weights.square().sum() if options.use_entropy else loss


class Monteclora(Lora):
    name = "monteclora"

    def build(self, base: Base, shared: Any) -> None:
        refuse_kind(base, "monteclora_config", indexed=False)
        super().build(base, shared)
        self.parts["lora_monteclora_sampler"] = Sampler(
            base.shape[1], self.config.r, self.config.monteclora_config
        )

    def forward(self, x: Tensor, base: Base) -> Tensor:
        sampler = self["lora_monteclora_sampler"]
        if not sampler.training:
            return super().forward(x, base)
        a, b = self.pair()
        a = a + sampler().t().to(a.dtype)
        return base.low_rank(x, a, b, self["scaling"], self.rate("lora_dropout"))


def monteclora_loss(adapters: Iterable[Any]) -> Tensor | float:
    """The mean variational loss over the layers of MonteCLoRA among ``adapters`` that train."""
    losses = [
        a["lora_monteclora_sampler"].loss()
        for a in adapters
        if isinstance(a, Monteclora) and a["lora_monteclora_sampler"].training
    ]
    return sum(losses[1:], losses[0]) / len(losses) if losses else 0.0


def _wishart_diagonal(r: int, like: Tensor) -> Tensor:
    """The diagonal of a draw from Wishart(r degrees, I): of A A^T with Bartlett's lower A."""
    freedom = torch.arange(r, 0, -1, device=like.device, dtype=torch.float32)
    chi = torch.distributions.Chi2(freedom).sample()
    lower = torch.randn(r, r, device=like.device).tril(-1)
    return (lower.square().sum(1) + chi).to(like.dtype)
