# SPDX-License-Identifier: Apache-2.0
"""The life of adapters on a model: add, activate, disable, merge, unmerge, delete, unload.

``Adapters`` is mixed into both doors, the model patched in place and the PEFT-shaped wrapper;
each says where the adapted modules start (``adapter_root``).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fastadapt import checkpoint, combine, inject, invocation, penalties, tying, weighted
from fastadapt.adapter_file import open_adapter
from fastadapt.base import release_weights
from fastadapt.config import AdapterConfig, as_config
from fastadapt.errors import FastAdaptWarning, LifecycleError
from fastadapt.hollow import hollow
from fastadapt.layer import AdaptedLayer
from fastadapt.merge import LEAST, MergeReport, leave_out
from fastadapt.methods import METHODS, OWN, method_of
from fastadapt.modules_to_save import ModulesToSaveWrapper
from fastadapt.recompute import remembered
from fastadapt.rows import Rows


class Adapters:
    """What a model with adapters can do. State lives in the layers; here are only the configs."""

    _configs: dict[str, AdapterConfig]

    @property
    def adapter_root(self) -> nn.Module:
        """The module whose paths are those of the base model."""
        raise NotImplementedError

    # adapters

    def add_adapter(
        self,
        adapter_name: Any,
        peft_config: Any = None,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        *,
        allow_unmatched: bool = True,
    ) -> None:
        """Add a second adapter; the active one stays active. low_cpu_mem_usage: its parameters have
        no memory until a state dict is set.

        Takes PEFT's argument order (name, config) and that of transformers (config, name)."""
        if not isinstance(adapter_name, str):
            adapter_name, peft_config = peft_config or "default", adapter_name
        config = as_config(peft_config)
        self._check_new(adapter_name, config)
        made = inject.plan(self.adapter_root, config, allow_unmatched=allow_unmatched)
        self._attach(made, adapter_name, autocast_adapter_dtype)
        if low_cpu_mem_usage:
            hollow(self.adapter_root, adapter_name)

    def _attach(self, made: inject.Plan, name: str, autocast_adapter_dtype: bool = True) -> None:
        root = self.adapter_root
        if any(isinstance(m, AdaptedLayer) and m.merged for _, m in self._adapted()):
            warnings.warn(
                "Adapter cannot be set when the model is merged. Unmerging the model first.",
                stacklevel=4,
            )
            self.unmerge_adapter()
        inject.attach(root, made, name, autocast_adapter_dtype=autocast_adapter_dtype)
        path = getattr(root, "name_or_path", None) or getattr(
            getattr(root, "config", None), "_name_or_path", None
        )
        if made.config.base_model_name_or_path is None:
            made.config.base_model_name_or_path = path or None
        self._configs[name] = made.config
        penalties.attach(root, name, made)
        invocation.attach(root, made)
        inject.low_precision_warning(root, name)

    def _check_new(self, name: str, config: AdapterConfig) -> None:
        if not isinstance(name, str) or not name or "." in name or name == "__base__":
            raise LifecycleError(f"expected an adapter name without a dot, got {name!r}")
        if name in self._configs:
            raise LifecycleError(f"Adapter with name {name} already exists.")
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind in (*METHODS, *OWN):
            method = method_of(kind)
            alike = {n: c for n, c in self._configs.items() if c.peft_type == config.peft_type}
            self._check_beside(method, config, alike)
            if name in method.prefix:
                warnings.warn(
                    f"Adapter name '{name}' should not be contained in the prefix "
                    f"'{method.prefix}'. This may lead to reinitialization of the adapter weights "
                    "during loading.",
                    FastAdaptWarning,
                    stacklevel=4,
                )
        trained = [n for n, c in self._configs.items() if getattr(c, "bias", "none") != "none"]
        if trained and getattr(config, "bias", "none") != "none":
            raise LifecycleError(
                f"{type(config).__name__} supports only 1 adapter with bias. When using multiple "
                f"adapters, set bias to 'none' for all adapters; {trained[0]!r} trains biases"
            )

    def _check_beside(self, method: Any, config: AdapterConfig, others: dict[str, Any]) -> None:
        method.check_beside(config, others)

    def load_adapter(
        self,
        model_id: Any,
        adapter_name: str = "default",
        is_trainable: bool = False,
        *,
        strict: bool = True,
        autocast_adapter_dtype: bool = True,
        **kwargs: Any,
    ) -> checkpoint.LoadReport:
        """Load an adapter from a folder or hub repository, under a new name or into an adapter
        of that name. Everything is checked first; on any problem the model is left as it was.

        Raises CheckpointError with every problem; ``strict=False`` warns instead and loads what
        fits, as PEFT does."""
        root = self.adapter_root
        loose: dict[str, Any] = {
            "ignore_mismatched_sizes": bool(kwargs.pop("ignore_mismatched_sizes", False))
        }
        if kwargs.get("key_mapping") is None:
            kwargs["key_mapping"] = getattr(root, "_checkpoint_conversion_mapping", None)
        adapter = open_adapter(model_id, root=root, **kwargs)
        new = adapter_name not in self._configs
        if new:
            config = adapter.config
            config.inference_mode = not is_trainable
            self._check_new(adapter_name, config)
            report = checkpoint.check(root, adapter, strict=strict, **loose)
            made = inject.plan(root, config)
            self._attach(made, adapter_name, autocast_adapter_dtype)
        else:
            report = checkpoint.check(root, adapter, strict=strict, name=adapter_name, **loose)
        checkpoint.fill(root, adapter, adapter_name)
        if is_trainable and new:
            # asked for by name, so also while another adapter is the active one
            self.set_requires_grad(adapter_name)
        if not is_trainable:
            self.eval()  # type: ignore[attr-defined]
        return report

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one or several adapters active and trainable; all others are frozen."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            if name not in self._configs:
                raise LifecycleError(f"Adapter {name} not found; there are {list(self._configs)}")
        for _, layer in self._adapted():
            if isinstance(layer, ModulesToSaveWrapper):
                layer.choose(names)
        for _, layer in self._adapted():
            if isinstance(layer, AdaptedLayer) and layer.merged:
                warnings.warn(
                    "Adapter cannot be set when the model is merged. Unmerging the model first.",
                    stacklevel=2,
                )
                layer.unmerge()
            layer.set_adapter(names, inference_mode)
        for name in names:
            inject.set_bias_trainable(
                self.adapter_root, self._configs[name], name, not inference_mode
            )

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Freeze or train adapters, active or not."""
        for _, layer in self._adapted():
            layer.set_requires_grad(adapter_names, requires_grad)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model inside the ``with``, where no adapter trains; what trained before does so
        after it, also after an exception.

        A model whose layers were all off stays off after it. Where some were on and some off there
        is a warning, and all are on after it."""
        before = {layer.disable_adapters for _, layer in self._adapted()}
        if len(before) > 1:
            warnings.warn(
                "The model contains some adapter layers that are enabled and others that are "
                "disabled. This is most likely unintentional. After exiting the disable_adapter "
                "context, all adapters will be enabled", stacklevel=3,
            )  # fmt: skip
        if before != {True}:
            self.disable_adapter_layers()
        try:
            yield
        finally:
            if before != {True}:
                self.enable_adapter_layers()

    def disable_adapter_layers(self) -> None:
        """Every adapter off. Warns where biases of the base are trained, which stay changed."""
        for name in self._active_names():
            mode = getattr(self._configs.get(name), "bias", "none")
            if mode != "none":
                warnings.warn(
                    f"Careful, disabling adapter layers with bias configured to be '{mode}' does "
                    "not produce the same output as the base model would without adaption.",
                    stacklevel=3,
                )
        for _, layer in self._adapted():
            layer.enable_adapters(False)

    def enable_adapter_layers(self) -> None:
        for _, layer in self._adapted():
            layer.enable_adapters(True)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; when it was active, the first that is left becomes active. Raises
        LifecycleError while it is merged."""
        if adapter_name not in self._configs:
            raise LifecycleError(f"Adapter {adapter_name} does not exist")
        self._check_unmerged([adapter_name])
        was = self._active_names()
        del self._configs[adapter_name]
        for _, layer in self._adapted():
            layer.delete_adapter(adapter_name)
        left = [n for n in was if n != adapter_name]
        if adapter_name in was and not left and self._configs:
            left = [min(self._configs)]
            warnings.warn(
                f"Adapter {adapter_name} was active which is now deleted. Setting active adapter "
                f"to {left[0]}.",
                stacklevel=2,
            )
        if left != was and left:
            self.set_adapter(left)

    def _check_unmerged(self, names: list[str]) -> None:
        layers = [layer for _, layer in self._adapted()]
        held = [n for n in names if any(n in layer.merged_adapters for layer in layers)]
        if held:
            raise LifecycleError(
                f"Cannot delete adapter(s) {held} while they are merged. Please unmerge them first."
            )

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str | None = None,
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """A new, frozen adapter out of several: LoRA by any type of ``combine.TYPES`` (default
        "svd"), IA3 by "linear". Nothing happens when the name is taken, as in PEFT.

        Raises LifecycleError, ConfigError or UnsupportedError before the model is changed."""
        if adapter_name in self._configs:
            return
        if len(weights) != len(adapters):
            raise LifecycleError(f"expected {len(adapters)} weights, got {len(weights)}")
        lora = all(hasattr(self._configs.get(name), "lora_alpha") for name in adapters)
        how = combination_type or ("svd" if lora else "linear")
        recipe = combine.Recipe(
            how="linear" if len(adapters) == 1 and how in combine.TYPES else how, rank=svd_rank,
            clamp=svd_clamp, full_matrices=svd_full_matrices, driver=svd_driver, density=density,
            majority=majority_sign_method,
        )  # fmt: skip
        made = weighted.plan(self.adapter_root, self._configs, adapters, recipe)
        self._check_new(adapter_name, made.config)
        self._attach(made, adapter_name)
        try:
            weighted.fill(self.adapter_root, adapter_name, adapters, weights, recipe)
        except BaseException:
            self.delete_adapter(adapter_name)
            raise

    def update_and_allocate(self, global_step: int) -> None:
        """Advance methods that have a schedule (AdaLoRA's budget of ranks). Call it in each step
        after ``loss.backward()`` and before ``zero_grad()``; others ignore it.

        Raises LifecycleError without gradients."""
        for name in self._active_names():
            adapters = inject.adapters_of(self.adapter_root, name)
            for cls in {type(a): None for a in adapters.values()}:
                cls.on_step(self._configs[name], adapters, global_step)

    # merging

    def merge_adapter(
        self,
        adapter_names: list[str] | None = None,
        safe_merge: bool = False,
        *,
        keep: str | None = None,
        keep_share: float = LEAST,
    ) -> MergeReport:
        """Write adapters (default: the active ones) into the base weights. When one layer cannot,
        none is merged.

        Gives for each layer the share of its update that the weight's format kept, and warns where
        that is less than ``keep_share``; ``keep="refit"`` stores such layers in codes that keep it,
        ``keep="16bit"`` unquantised. See ``fastadapt.merge`` and docs/merging.md."""
        done: list[AdaptedLayer] = []
        report = MergeReport()
        try:
            for path, layer in self._adapted():
                if isinstance(layer, AdaptedLayer) and layer.merge(
                    safe_merge, adapter_names, keep=keep, keep_share=keep_share
                ):
                    done.append(layer)
                    report.add(path, layer.merge_share)
        except BaseException:
            for layer in done:
                layer.undo_merge()
            raise
        self._reported(report, keep_share)
        return report

    def unmerge_adapter(self) -> None:
        """Restore the base weights, to the bit."""
        vars(self.adapter_root).pop("merge_report", None)
        for _, layer in self._adapted():
            if isinstance(layer, AdaptedLayer) and layer.merged:
                layer.unmerge()

    @property
    def merge_report(self) -> MergeReport | None:
        """What the last merge kept of the updates; None without one. The model that
        ``merge_and_unload`` gives has it too."""
        report: MergeReport | None = vars(self.adapter_root).get("merge_report")
        return report

    def _reported(self, report: MergeReport, keep_share: float) -> None:
        if report.layers:
            report.warn(keep_share)
            vars(self.adapter_root)["merge_report"] = report

    def _strip(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None, progressbar: bool,
        **keep: Any,
    ) -> nn.Module:  # fmt: skip
        """Take every adapted layer out of the root, merged or as it was."""
        root, layers = self.adapter_root, list(self._adapted())
        report, tied = MergeReport(), tying.tied_paths(root) if merge else []
        vars(root).pop("merge_report", None)
        if merge and safe_merge:
            # all layers are checked before the first is taken out
            self.merge_adapter(adapter_names, safe_merge=True, **keep)
        # what stands inside a wrapper of a parameter comes out before it
        for path, layer in _progress(layers[::-1], progressbar):
            if isinstance(layer, ModulesToSaveWrapper):
                chosen = adapter_names or layer.active_adapters
                kept = [layer.modules_to_save[n] for n in chosen if n in layer.modules_to_save]
                inject.put(root, path, kept[0] if merge and kept else layer.original_module)
                continue
            if merge and not safe_merge:
                layer.merge(adapter_names=adapter_names, **keep)
            elif not merge and layer.merged:
                layer.unmerge()
            report.add(path, layer.merge_share)
            inject.put(root, path, layer.base_layer)
        if merge:
            tying.tie_again(root, tied)
            self._reported(report, keep.get("keep_share", LEAST))
            leave_out(root, report)
        release_weights(root)
        penalties.detach(root)
        invocation.detach(root)
        if vars(root).get("peft_config") is self._configs:
            del vars(root)["peft_config"]
        return root

    # queries

    @property
    def targeted_module_names(self) -> list[str]:
        """Paths of the adapted layers, those of the first adapter first, each once."""
        root = self.adapter_root
        found = (p for name in self._configs for p in inject.adapters_of(root, name))
        return list(dict.fromkeys(found))

    def _adapted(self) -> Iterator[tuple[str, Any]]:
        return inject.adapted(self.adapter_root)

    def _active_names(self) -> list[str]:
        names: dict[str, None] = {}
        for _, layer in self._adapted():
            names.update(dict.fromkeys(layer.active_adapters))
        return list(names)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether ``convert_to_lora`` takes the adapter, on all of its layers."""
        layers = [m for _, m in self._adapted() if isinstance(m, AdaptedLayer)]
        held = [m for m in layers if adapter_name in m.adapters]
        return bool(held) and all(m.supports_lora_conversion(adapter_name) for m in held)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all); a 4-bit weight counts the weights it stands for."""
        trainable = total = 0
        for parameter in self.parameters():  # type: ignore[attr-defined]
            count = _count(parameter)
            total += count
            trainable += count if parameter.requires_grad else 0
        return trainable, total

    def print_trainable_parameters(self) -> None:
        """One line, in PEFT's words."""
        trainable, total = self.get_nb_trainable_parameters()
        print(  # noqa: T201
            f"trainable params: {trainable:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trainable / total:.4f}"
        )

    @contextmanager
    def mixed_batch(self, adapter_names: Sequence[str] | None, repeat: int = 1) -> Iterator[None]:
        """Inside, row i of a batch goes through ``adapter_names[i]`` ("__base__" for none).

        repeat: how often a row stands in the batch, as generation repeats them for beams."""
        if adapter_names is None:
            yield
            return
        known = {*self._configs, "__base__"}
        unknown = [n for n in dict.fromkeys(adapter_names) if n not in known]
        if unknown:
            raise LifecycleError(
                f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}"
            )
        layers = [layer for _, layer in self._adapted()]
        for layer in layers:
            layer.rows = Rows(list(adapter_names), repeat)
        try:
            with remembered(self.adapter_root, layers):
                yield
        finally:
            for layer in layers:
                layer.rows = None


def _count(parameter: Tensor) -> int:
    if type(parameter).__name__ == "Params4bit":
        return parameter.numel() * 2 * parameter.element_size()
    return getattr(parameter, "ds_numel", None) or parameter.numel()


def _progress(items: list[Any], show: bool) -> Any:
    if not show:
        return items
    from tqdm import tqdm  # type: ignore[import-untyped]

    return tqdm(items, desc="Unloading model")
