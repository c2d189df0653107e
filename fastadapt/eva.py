# SPDX-License-Identifier: Apache-2.0
"""EVA's pass over data: the principal directions of each layer's inputs become its A, and the ranks
of the budget go where they explain most.

An incremental PCA a layer, fed batch by batch until its components stand still; layers with the
same input share one. Source: EVA (arXiv 2410.07170).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt import inject, targets
from fastadapt.errors import ConfigError, FastAdaptWarning, LifecycleError
from fastadapt.inits.eva import EvaConfig
from fastadapt.kinds import kind_of
from fastadapt.layer import AdaptedLayer

_MOST_BATCHES = 10_000
"""Components of inputs that repeat stand still long before; what does not is an error."""


class IncrementalPCA:
    """components: (k, in), orthonormal; values: (k,) singular; share: (k,) of the variance."""

    def __init__(self, k: int, threshold: float) -> None:
        self.k, self.threshold, self.seen = k, threshold, 0
        self.components = self.values = self.mean = self.spread = torch.empty(0)
        self.converged = torch.zeros(k, dtype=torch.bool)

    def fit(self, x: Tensor) -> None:
        """x: (m, in), m at least k."""
        m = x.shape[0]
        mean, spread = x.mean(0), ((x - x.mean(0)) ** 2).sum(0)
        rows = x - mean
        if not self.seen:
            self.mean, self.spread = mean, spread
        else:
            total = self.seen + m
            shift = mean - self.mean
            turn = (self.seen * m / total) ** 0.5 * shift
            kept = self.values.unsqueeze(1) * self.components
            rows = torch.cat([kept, rows, turn.unsqueeze(0)])
            self.spread = self.spread + spread + turn**2
            self.mean = self.mean + shift * (m / total)
        self.seen += m
        _, s, vt = torch.linalg.svd(rows, full_matrices=False)
        before = self.components
        self.components, self.values = vt[: self.k], s[: self.k]
        self.share = self.values**2 / self.spread.sum()
        if before.shape == self.components.shape:
            alike = (before * self.components).sum(1).abs()
            self.converged = alike >= self.threshold


def forward_fn_dict(model: Any, inputs: Any) -> Any:
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: Any) -> Tensor:
    """(tokens, 2): (row, place) of those that count: no padding, no masked label."""
    if not isinstance(model_input, Mapping):
        raise ConfigError("prepare_model_inputs_fn_language_modeling: expected a dict of inputs")
    mask = model_input.get("attention_mask", torch.ones_like(model_input["input_ids"])).bool()
    options = peft_config.eva_config
    if options.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != options.label_mask_value)
    chosen: Tensor = mask.nonzero()
    return chosen


def prepare_layer_inputs_fn_language_modeling(
    layer_input: Any, model_input: Any, layer_name: str
) -> Tensor:
    """The rows of a layer's input that count: (m, in)."""
    x = layer_input[0] if isinstance(layer_input, tuple | list) else layer_input
    chosen: Tensor = x[model_input.T.unbind()]
    return chosen


def _all_rows(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    x = layer_input[0] if isinstance(layer_input, tuple | list) else layer_input
    rows: Tensor = x.reshape(-1, x.shape[-1])
    return rows


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: Any = None,
    forward_fn: Callable[[Any, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, Any], Any] | None = (
        prepare_model_inputs_fn_language_modeling
    ),
    prepare_layer_inputs_fn: Any = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """Path -> the rows of A, (rank, in), of each targeted linear layer; ranks of 0 are possible.

    model: adapted (its adapters are off meanwhile) or plain, then with ``peft_config``;
    forward_fn(model, batch); prepare_model_inputs_fn(batch, config) and prepare_layer_inputs_fn
    (inputs of a layer, that, path; or one a path): which rows count. Raises ConfigError for a
    loader without batches and for components that never stand still."""
    adapted = hasattr(model, "peft_config")
    held: Any = getattr(model, "peft_config", {})
    config: Any = peft_config or held.get(adapter_name)
    if config is None:
        raise ConfigError("peft_config is required if model is not a PeftModel")
    layers = dict(_targets(model, config, adapter_name if adapted else None))
    prepare = dict(prepare_layer_inputs_fn) if isinstance(prepare_layer_inputs_fn, Mapping) else {}
    if set(prepare) - set(layers):
        raise ConfigError(
            f"prepare_layer_inputs_fn: no layer is named {set(prepare) - set(layers)}"
        )
    default = _all_rows if prepare or prepare_layer_inputs_fn is None else prepare_layer_inputs_fn
    ranks = {p: config.at(p.removeprefix("base_model.model.")).r for p in layers}
    pass_over = _Pass(layers, ranks, config.eva_config or EvaConfig(), prepare, default)
    training = model.training
    try:
        model.eval()
        with model.disable_adapter() if adapted else nullcontext():  # type: ignore[operator]
            for count, batch in enumerate(_batches(dataloader)):
                batch = _moved(batch, next(model.parameters()).device)
                prepared = batch
                if prepare_model_inputs_fn is not None:
                    prepared = prepare_model_inputs_fn(batch, config)
                if pass_over.step(prepared, lambda b=batch: forward_fn(model, b)):  # type: ignore[misc]
                    break
                if count > _MOST_BATCHES:
                    raise ConfigError(
                        f"EVA: {pass_over.restless()[:3]} have not converged after {_MOST_BATCHES} "
                        "batches: lower tau, or give larger batches"
                    )
    finally:
        pass_over.remove()
        model.train(training)
    return pass_over.rows()


class _Pass:
    """The hooks, the PCAs and the ranks as they stand."""

    def __init__(
        self,
        layers: dict[str, Any],
        ranks: dict[str, int],
        options: Any,
        prepare: Any,
        default: Any,
    ) -> None:
        self._layers, self._ranks, self._options = layers, ranks, options
        self._prepare, self._default = prepare, default
        self._inputs: dict[str, Any] = {}
        self._shared: dict[str, str] = {}
        self._pcas: dict[str, IncrementalPCA] = {}
        self._most = {p: max(1, round(r * options.rho)) for p, r in ranks.items()}
        self.found = dict(self._most)
        self._handles = [m.register_forward_hook(self._hook(p)) for p, m in layers.items()]

    def _hook(self, path: str) -> Any:
        def hook(_: Any, inputs: Any, __: Any) -> None:
            if path not in self._inputs and self._shared.get(path, path) == path:
                self._inputs[path] = inputs

        return hook

    def step(self, prepared: Any, forward: Callable[[], Any]) -> bool:
        """One batch; True when every PCA stands still."""
        if self._pcas and not self.restless():
            return True
        self._inputs = {}
        forward()
        if not self._shared:
            self._share()
        for path, inputs in self._inputs.items():
            if self._shared[path] != path:
                continue
            x = self._prepare.get(path, self._default)(inputs, prepared, path).float()
            pca = self._pcas.get(path)
            if pca is None:
                k = min(self._most[path], x.shape[1])
                pca = self._pcas[path] = IncrementalPCA(k, self._options.tau)
            if x.shape[0] >= pca.k:
                pca.fit(x)
        self._inputs = {}
        if all(p.seen for p in self._pcas.values()):
            self.found = self._distribute()
        return False

    def _share(self) -> None:
        """Layers that were given the same tensor have the same directions."""
        first: dict[int, str] = {}
        for path, inputs in self._inputs.items():
            self._shared[path] = first.setdefault(id(inputs[0]), path)
        for path, owner in self._shared.items():
            self._most[owner] = max(self._most[owner], self._most[path])
        for path, owner in self._shared.items():
            self._most[path] = self._most[owner]

    def _distribute(self) -> dict[str, int]:
        """The budget, sum of r, to the directions that explain most over all layers."""
        pcas = {p: self._pcas[owner] for p, owner in self._shared.items()}
        shares = torch.cat([pca.share[: self._most[p]].cpu() for p, pca in pcas.items()])
        paths = [p for p, pca in pcas.items() for _ in pca.share[: self._most[p]]]
        counts = dict.fromkeys(pcas, 0)
        for i in shares.argsort(descending=True)[: sum(self._ranks.values())].tolist():
            counts[paths[i]] += 1
        return counts

    def restless(self) -> list[str]:
        return [
            p for p, owner in self._shared.items()
            if not self._pcas[owner].converged[: self.found[p]].all()
        ]  # fmt: skip

    def rows(self) -> dict[str, Tensor]:
        made = {}
        for path, rank in self.found.items():
            pca = self._pcas[self._shared[path]]
            rows = pca.components[:rank].clone()
            if self._options.whiten:
                rows = rows / pca.values[:rank].sqrt().unsqueeze(1)
            made[path] = rows
        return made

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@torch.no_grad()
def initialize_lora_eva_weights(
    model: Any,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: dict[str, Tensor] | None = None,
    forward_fn: Callable[[Any, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Any = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Any = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Set A of the adapter from ``eva_state_dict``, or from a pass over ``dataloader``; ranks and
    alphas of the config follow, and a layer of rank 0 loses its adapter.

    Raises ConfigError when neither is given or the config's start is not "eva", LifecycleError for
    a model without adapters or with several active ones."""
    if not hasattr(model, "peft_config"):
        raise LifecycleError("model must be a PeftModel")
    names = model.active_adapters() if callable(model.active_adapters) else model.active_adapters
    if len(names) > 1:
        raise LifecycleError(
            "`initialize_lora_eva_weights` currently only works with a single active adapter"
        )
    config = model.peft_config[adapter_name]
    if config.init_lora_weights != "eva":
        raise ConfigError(
            "`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`"
        )
    if eva_state_dict is None:
        if dataloader is None:
            raise ConfigError("dataloader is required if eva_state_dict is not provided")
        eva_state_dict = get_eva_state_dict(
            model, dataloader, None, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn,
            adapter_name,
        )  # fmt: skip
    rows = {k.removeprefix("base_model.model."): v for k, v in eva_state_dict.items()}
    root, missing = model.adapter_root, []
    rank_pattern, alpha_pattern, kept = {}, {}, []
    for path, layer in list(inject.adapted(root)):
        if not isinstance(layer, AdaptedLayer) or adapter_name not in layer.adapters:
            continue
        old = layer.adapters[adapter_name].config
        a = rows.get(path)
        if a is None:
            missing.append(path)
        r = old.r if a is None else a.shape[0]
        if r == 0:
            layer.delete_adapter(adapter_name)
            if not layer.adapters:
                inject.put(root, path, layer.base_layer)
            continue
        alpha = old.lora_alpha
        if r != old.r and config.eva_config.adjust_scaling_factors:
            alpha = alpha * r / old.r
        rank_pattern.update({path: r} if r != config.r else {})
        alpha_pattern.update({path: alpha} if alpha != config.lora_alpha else {})
        kept.append(path)
        if r != old.r:
            _resize(layer, adapter_name, path, r, alpha)
        if a is not None:
            layer.get_parameter(f"lora_A.{adapter_name}.weight").copy_(a)
    config.target_modules = set(kept)
    config.rank_pattern, config.alpha_pattern = rank_pattern, alpha_pattern
    if missing:
        warnings.warn(
            f"not in the eva state dict, these layers keep their start: {missing}",
            FastAdaptWarning,
            stacklevel=2,
        )


def _resize(layer: AdaptedLayer, name: str, path: str, r: int, alpha: float) -> None:
    """A fresh adapter of another rank in the place of the old one."""
    old = layer.adapters[name]
    config = old.config.resized(r, alpha)
    inject.swap(layer, name, type(old)(config, layer.frozen))


def _targets(model: Any, config: Any, name: str | None) -> Iterator[tuple[str, Any]]:
    if name is not None:
        root = model.adapter_root
        prefix = next((n + "." for n, m in model.named_modules() if m is root and n), "")
        for path, layer in inject.adapted(root):
            own = isinstance(layer, AdaptedLayer) and name in layer.adapters
            if own and layer.frozen.kind.product:
                yield prefix + path, layer
        return
    paths = [p for p, _ in targets.walk(model)]
    chosen = set(targets.select(config, paths)) if config.target_modules is not None else set(paths)
    for path, module in targets.walk(model):
        kind = kind_of(module)
        if path in chosen and kind is not None and kind.product:
            yield path, module


def _batches(loader: Iterable[Any]) -> Iterator[Any]:
    """The loader's batches, again and again."""
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise ConfigError("dataloader is empty")


def _moved(batch: Any, device: Any) -> Any:
    if isinstance(batch, Mapping):
        return {k: _moved(v, device) for k, v in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(_moved(v, device) for v in batch)
    return batch.to(device) if hasattr(batch, "to") else batch
