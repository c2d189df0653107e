# SPDX-License-Identifier: Apache-2.0
"""QALoRA:  W' = W + s B A P,  P the sum over groups of inputs, times in / g^2.

    A: (r, in / g)  P: (in / g, in)  g = qalora_group_size

PEFT's input is the mean over each group times the number of groups. It applies the field on GPTQ
only and ignores it elsewhere; here every linear layer has it, and merges.
Source: QA-LoRA (arXiv 2309.14717).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastadapt.base import Base
from fastadapt.errors import ConfigError
from fastadapt.methods.lora import Lora, refuse_kind


class QALora(Lora):
    name = "qalora"

    def build(self, base: Base, shared: Any) -> None:
        refuse_kind(base, "use_qalora=True", indexed=False)
        width, group = base.shape[1], self.config.qalora_group_size
        if group < 1 or width % group:
            raise ConfigError(
                f"`use_qalora=True` requires `module.in_features` ({width}) to be divisible by "
                f"'qalora_group_size' ({group})"
            )
        super().build(base, shared)
        self.parts["lora_A"] = nn.Linear(width // group, self.config.r, bias=False)
        self.values["qalora_group_size"] = group

    def pair(self) -> tuple[Tensor, Tensor]:
        a, b = super().pair()
        group: int = self["qalora_group_size"]
        return a.repeat_interleave(group, dim=1) * (a.shape[1] / group), b
