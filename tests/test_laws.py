# SPDX-License-Identifier: Apache-2.0
"""The laws of an adapter, over every method, weight format and layer kind.

1. the start is the identity        2. every adapter parameter learns, the base does not
3. forward is merged                4. merging keeps the outputs, to the format's own rounding
5. unmerging restores the bits      6. what is saved loads to the same outputs (PEFT's: parity/)
7. what cannot be says so, and leaves the model alone
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadapt
from fastadapt.errors import LifecycleError, UnsupportedError
from fastadapt.layer import AdaptedLayer
from fastadapt.ops.dropout import draw_seed
from fastadapt.testing import (
    FORMATS,
    IMPOSSIBLE,
    KINDS,
    METHOD_CASES,
    UNMERGEABLE,
    OneLayer,
    adapted,
    adapter_parameters,
    applied,
    base_layer,
    budget,
    check,
    config_of,
    drop_factors,
    dtype_of,
    error,
    exists,
    in_float64,
    layer_input,
    merged,
    move,
)

pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*inputs will be cast from:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*not divisible by block size.*:UserWarning"),
]

LAYERS = [(fmt, kind) for fmt in FORMATS for kind in KINDS if exists(fmt, kind)]
SELDOM = {
    ("dense16", "linear_nobias"), ("dense16", "conv1d_gpt2"), ("dense16", "conv2d_grouped"),
    ("bnb4", "linear_nobias"), ("fp4", "linear"), ("bnb8", "linear_nobias"),
}  # fmt: skip
"""Format and kind both stand in other cells: the full product is for `make test-slow`."""


def cells(*, but: set[tuple[str, str]], often: tuple[str, ...] = FORMATS) -> Any:
    """Parametrised over (method case, format, kind), without what is in ``but``; formats that are
    not in ``often`` are for `make test-slow`, too."""
    return pytest.mark.parametrize(
        ("case", "fmt", "kind"),
        [
            pytest.param(
                case, *layer, id="-".join((case, *layer)),
                marks=[pytest.mark.slow] if layer in SELDOM or layer[0] not in often else [],
            )
            for case, layer in itertools.product(METHOD_CASES, LAYERS)
            if not {(case, part) for part in layer} & but
        ],
    )  # fmt: skip


DRAWS = 3
"""How often the inputs are rounded at random to see what that does."""


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor


each_cell = cells(but=IMPOSSIBLE)
each_mergeable_cell = cells(but=IMPOSSIBLE | UNMERGEABLE)
each_cell_of_two_formats = cells(but=IMPOSSIBLE, often=("dense32", "bnb4"))
each_mergeable_cell_of_three = cells(
    but=IMPOSSIBLE | UNMERGEABLE, often=("dense32", "bnb4", "bnb8")
)


@each_cell
def test_law_1_the_start_is_the_identity(case: str, fmt: str, kind: str) -> None:
    base, x = base_layer(fmt, kind), layer_input(fmt, kind, 3, 5)
    layer = adapted(copy.deepcopy(base), config_of(case), start=True)
    if not layer.adapters["a0"].identity_at_init:
        assert not torch.equal(layer(x), base(x)), "it is an identity and does not promise it"
        return
    cost = 0.0 if (case, kind) in UNMERGEABLE else cost_of(layer, ["a0"], x, fmt)
    check(layer(x), base(x), oracle_of(layer, [], x), cost=cost, what="y")


@each_cell
def test_law_2_adapters_learn_and_the_base_does_not(case: str, fmt: str, kind: str) -> None:
    layer = adapted(base_layer(fmt, kind), config_of(case)).train()
    y = layer(layer_input(fmt, kind, 3, 5))
    if fmt.startswith("dense"):  # bitsandbytes' own outputs refuse it
        y.mul_(2)  # what comes next may change the output in place
    y.square().mean().backward()
    constant = set(layer.adapters["a0"].constant)
    for name, parameter in adapter_parameters(layer):
        if constant & set(name.split(".")):
            assert not parameter.requires_grad, name
            assert parameter.grad is None, name
            continue
        assert parameter.requires_grad, name
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    for name, parameter in layer.base_layer.named_parameters():
        assert not parameter.requires_grad, name
        assert parameter.grad is None, name


@each_mergeable_cell
def test_law_3_forward_is_merged(case: str, fmt: str, kind: str) -> None:
    """Outputs, and the gradients of every parameter and of the input."""
    layer, x = adapted(base_layer(fmt, kind), config_of(case)), layer_input(fmt, kind, 3, 5)
    forward_is_merged(layer, ["a0"], x, fmt)


@each_mergeable_cell
def test_law_4_merging_keeps_the_outputs(case: str, fmt: str, kind: str) -> None:
    layer, x = adapted(base_layer(fmt, kind), config_of(case)), layer_input(fmt, kind, 3, 5)
    merging_keeps_the_outputs(layer, ["a0"], x, fmt)


@each_mergeable_cell
def test_law_5_unmerging_restores_the_bits(case: str, fmt: str, kind: str) -> None:
    """After two merges; for int8 also when the layer ran before and in between: it moves its
    statistics then."""
    for used in (False, True) if fmt == "bnb8" else (True,):
        unmerging_restores_the_bits(case, fmt, kind, used=used)


def unmerging_restores_the_bits(case: str, fmt: str, kind: str, *, used: bool) -> None:
    configs = config_of(case), config_of("ia3")
    layer, x = adapted(base_layer(fmt, kind), *configs), layer_input(fmt, kind, 3, 5)
    before_y = layer(x) if used else None
    before, weight = stored(layer.base_layer), layer.base_layer.weight
    for name in ("a0", "a1"):
        layer.merge(adapter_names=[name])
        assert not same(before, stored(layer.base_layer)), "merging changed nothing"
        assert layer.merged_adapters[-1] == name
        if used:
            layer(x)
    layer.unmerge()
    assert same(before, stored(layer.base_layer))
    assert layer.base_layer.weight is weight
    assert not layer.merged
    if before_y is not None:
        assert torch.equal(layer(x), before_y)


@each_cell_of_two_formats
def test_law_6_what_is_saved_loads_to_the_same_outputs(
    case: str, fmt: str, kind: str, tmp_path: Path
) -> None:
    base, x = base_layer(fmt, kind), layer_input(fmt, kind, 3, 5)
    model = fastadapt.get_peft_model(OneLayer(copy.deepcopy(base)), config_of(case))
    move(model.base_model.model.layer)
    model.save_pretrained(tmp_path)
    again = fastadapt.PeftModel.from_pretrained(OneLayer(copy.deepcopy(base)), tmp_path)
    held, loaded = dict(model.named_parameters()), dict(again.named_parameters())
    assert held.keys() == loaded.keys()
    assert all(torch.equal(loaded[name], value) for name, value in held.items())
    with torch.no_grad():
        y, start = model.eval()(x), base(x)
        # a convolution rounds its sums by where its memory happens to lie: one rounding more
        rounding_once = torch.finfo(y.dtype).eps / 2 * y.abs().max().item()
        check(again.eval()(x), y, y.double(), cost=rounding_once)
        assert not torch.equal(y, start)


# 7. what cannot be


@pytest.mark.parametrize(
    ("fmt", "kind"), [(f, k) for f in FORMATS for k in KINDS if not exists(f, k)]
)
def test_law_7_a_format_on_a_kind_that_cannot_be(fmt: str, kind: str) -> None:
    base = base_layer(fmt, kind)
    root = OneLayer(base)
    with pytest.raises(UnsupportedError, match=r"layer is not supported: expected .* got"):
        fastadapt.get_peft_model(root, config_of("lora"))
    assert root.layer is base


@pytest.mark.parametrize(("case", "part"), sorted(IMPOSSIBLE))
def test_law_7_a_method_where_it_cannot_be(case: str, part: str) -> None:
    for fmt, kind in LAYERS:
        if part in (fmt, kind):
            base = base_layer(fmt, kind)
            trained = [p for p in base.parameters() if p.is_floating_point()]
            for parameter in trained:
                parameter.requires_grad_()
            root = OneLayer(base)
            with pytest.raises(UnsupportedError, match=r"(?i)convolution|embedding|quantised"):
                fastadapt.get_peft_model(root, config_of(case))
            assert root.layer is base
            assert all(p.requires_grad for p in trained)


@pytest.mark.parametrize(("case", "kind"), sorted(UNMERGEABLE - IMPOSSIBLE))
def test_law_7_a_method_that_cannot_be_merged_there(case: str, kind: str) -> None:
    fmt = "dense32"
    layer, x = adapted(base_layer(fmt, kind), config_of(case)), layer_input(fmt, kind, 3)
    before, y = stored(layer.base_layer), layer(x)
    with pytest.raises(UnsupportedError, match="cannot be merged"):
        layer.merge()
    assert not layer.merged
    assert same(before, stored(layer.base_layer))
    assert torch.equal(layer(x), y)


# composition


def pairs() -> Iterator[Any]:
    """Every ordered pair of methods, each on the next layer in its turn; without `make test-slow`
    one case a method, and one of the two orders."""
    turn = itertools.cycle(LAYERS)
    leading = {fields["peft_type"]: case for case, fields in reversed(METHOD_CASES.items())}
    for i, j in itertools.product(range(len(METHOD_CASES)), repeat=2):
        first, second = (list(METHOD_CASES)[n] for n in (i, j))
        fmt, kind = next(turn)
        seldom = {first, second} - {*leading.values()} or (i > j) == (i + j) % 2
        if not {*itertools.product((first, second), (fmt, kind))} & (IMPOSSIBLE | UNMERGEABLE):
            yield pytest.param(
                first, second, fmt, kind, id=f"{first}-{second}-{fmt}-{kind}",
                marks=[pytest.mark.slow] if seldom else [],
            )  # fmt: skip


@pytest.mark.parametrize(("first", "second", "fmt", "kind"), list(pairs()))
def test_two_methods_on_one_layer(first: str, second: str, fmt: str, kind: str) -> None:
    """The second stands on the first: forward is merged, and both learn."""
    layer = adapted(base_layer(fmt, kind), config_of(first), config_of(second))
    forward_is_merged(layer, ["a0", "a1"], layer_input(fmt, kind, 3, 5), fmt)


@each_mergeable_cell_of_three
def test_rows_of_a_mixed_batch_go_their_own_ways(case: str, fmt: str, kind: str) -> None:
    layer = adapted(base_layer(fmt, kind), config_of(case), config_of("ia3"))
    x = layer_input(fmt, kind, 5, 4)
    names = ["a1", "__base__", "a0", "a1", "a0"]
    with torch.no_grad():
        y = layer(x, adapter_names=names)
        for i, name in enumerate(names):
            alone = layer.stack([name])(x[i : i + 1])
            oracle = oracle_of(layer, [name] if name != "__base__" else [], x[i : i + 1])
            check(y[i : i + 1], alone, oracle, what=f"row {i}, {name}")


def test_a_mixed_batch_of_the_wrong_length_and_of_none() -> None:
    layer, x = adapted(base_layer("dense32", "linear"), config_of("lora")), torch.zeros(2, 64)
    with pytest.raises(LifecycleError, match="2"):
        layer(x, adapter_names=["a0"])
    assert layer(x[:0], adapter_names=[]).shape == (0, 48)
    with pytest.raises(LifecycleError, match=r"non-existing.*other.*has \['a0'\]"):
        layer(x, adapter_names=["a0", "other"])
    layer.merge()
    with pytest.raises(LifecycleError, match="merged"):
        layer(x, adapter_names=["a0", "a0"])


@each_cell
def test_disabled_is_the_base_exactly(case: str, fmt: str, kind: str) -> None:
    base, x = base_layer(fmt, kind), layer_input(fmt, kind, 3, 5)
    layer = adapted(copy.deepcopy(base), config_of(case))
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base(x))
    if (case, kind) not in UNMERGEABLE:
        layer.enable_adapters(True)
        layer.merge()
        layer.enable_adapters(False)
        assert torch.equal(layer(x), base(x)), "a merged adapter is unmerged first"


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        cell for cell in itertools.product(METHOD_CASES, ("linear", "conv1d_gpt2", "conv2d"))
        if cell not in UNMERGEABLE | IMPOSSIBLE
    ],
)  # fmt: skip
def test_under_autocast_the_result_is_autocasts(case: str, kind: str) -> None:
    layer = adapted(base_layer("dense32", kind), config_of(case))
    x = layer_input("dense32", kind, 3, 5)
    w, bias = merged(layer, ["a0"], torch.float32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got, plain = layer(x), applied(layer, x, w, bias)
    cost = cost_of(layer, ["a0"], x, "dense16")
    check(got, plain.to(torch.bfloat16), oracle_of(layer, ["a0"], x), cost=cost, what="y")


# dropout: PEFT's formulas, with the mask that the op draws


@pytest.mark.parametrize("fmt", ["dense32", "bnb4"])
def test_dropout_of_lora(fmt: str) -> None:
    """y = W x + b + s B A d(x)."""
    layer = adapted(base_layer(fmt, "linear"), config_of("lora", lora_dropout=0.4)).train()
    x = layer_input(fmt, "linear", 3, 5)
    by_formula(layer, x, fmt, lambda w, d, x, delta, factor: x @ w.t() + d @ delta.t())


@pytest.mark.parametrize("fmt", ["dense32", "bnb4"])
def test_dropout_of_dora(fmt: str) -> None:
    """y = W x + b + (g - 1) W d(x) + g s B A d(x)."""
    layer = adapted(base_layer(fmt, "linear"), config_of("dora", lora_dropout=0.4)).train()
    x = layer_input(fmt, "linear", 3, 5)
    by_formula(
        layer, x, fmt,
        lambda w, d, x, delta, factor: (
            x @ w.t() + (factor - 1) * (d @ w.t()) + factor * (d @ delta.t())
        ),
    )  # fmt: skip


def by_formula(layer: AdaptedLayer, x: Tensor, fmt: str, formula: Any) -> None:
    def evaluated(dtype: torch.dtype) -> Tensor:
        w, bias = layer.frozen.read()
        w = w.to(dtype)
        a, b = (layer.get_submodule(f"lora_{n}.a0").weight.to(dtype) for n in "AB")
        delta = b @ a * layer.scaling["a0"]
        factor = torch.ones(1, dtype=dtype)
        if "lora_magnitude_vector" in layer.adapter_layer_names:
            m = layer.lora_magnitude_vector["a0"].weight.to(dtype)
            factor = m / torch.linalg.vector_norm(w + delta, dim=1)
        torch.manual_seed(0)
        dropped = x.to(dtype) * drop_factors(draw_seed(x.device), x.shape, 0.4).to(dtype)
        y: Tensor = formula(w, dropped, x.to(dtype), delta, factor) + bias.to(dtype)
        return y

    with torch.no_grad():
        torch.manual_seed(0)
        got = layer(x)
        check(got, evaluated(torch.float32), evaluated(torch.float64), what="y")


# what the laws say, once


def forward_is_merged(layer: AdaptedLayer, names: list[str], x: Tensor, fmt: str) -> None:
    """Outputs, and the gradients of every parameter and of the input, are those of W'."""
    trained = [(k, p) for k, p in adapter_parameters(layer) if p.requires_grad]
    g = torch.randn(layer(x).shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def outcome(forward: Any, x: Tensor, noise: Any = as_it_is) -> dict[str, Tensor]:
        leaf = noise(x) if x.is_floating_point() else x
        leaf = leaf.detach().clone().requires_grad_(x.is_floating_point())
        y = forward(leaf)
        wanted = [p for _, p in trained] + ([leaf] if leaf.requires_grad else [])
        # an adapter under one that replaces the weight (LN tuning) has no gradient: that is zero
        grads = torch.autograd.grad(
            y, wanted, noise(g).to(y.dtype), allow_unused=True, materialize_grads=True
        )
        keys = ["y", *(k for k, _ in trained), "x"]
        return dict(zip(keys, [y.detach(), *grads], strict=False))

    def exact(noise: Any = as_it_is) -> dict[str, Tensor]:
        with in_float64(layer, noise):
            return outcome(
                lambda x: applied(layer, x, *merged(layer, names, noise=noise)), wide(x), noise
            )

    got = outcome(layer, x)
    plain = outcome(lambda x: by_hand(layer, names, x, fmt), x)
    oracle = exact()
    assert got.keys() == plain.keys() == oracle.keys()
    rounded = [exact(rounding(fmt, seed)) for seed in range(DRAWS)]
    for name in got:
        cost = spread([r[name] for r in rounded], oracle[name])
        check(got[name], plain[name], oracle[name], cost=cost, what=name)


def merging_keeps_the_outputs(layer: AdaptedLayer, names: list[str], x: Tensor, fmt: str) -> None:
    """The stored bits are those that the format's own quantiser makes of W'; so outputs change by
    what that quantiser loses, and by no more than the products' own rounding beside it."""
    with torch.no_grad():
        before, kept = layer(x), stored(layer.base_layer)
        w, _ = layer.stack(names).read()
        asked = oracle_of(layer, names, x)
        cost = cost_of(layer, names, x, fmt)
        layer.merge(safe_merge=True, adapter_names=names)
        now = stored(layer.base_layer)
        for key, tensor in requantised(fmt, layer.frozen.kind.orient(w), layer.base_layer).items():
            assert torch.equal(raw(now[key]), raw(tensor)), key
        after, plain, oracle = layer(x), by_hand(layer, [], x, fmt), oracle_of(layer, [], x)
        check(after, plain, oracle, cost=cost, what="merged")
        lost = error(oracle, asked)
        assert error(after, before.double()) <= lost + 2 * budget(plain, oracle, cost)
        layer.unmerge()
        assert same(kept, stored(layer.base_layer))


def by_hand(layer: AdaptedLayer, names: list[str], x: Tensor, fmt: str) -> Tensor:
    """The merged weight as plain PyTorch applies it, in the dtype of the layer's activations; an
    int8 layer rounds each row of x to 8 bits."""
    w, bias = merged(layer, names, torch.float32)
    if fmt == "bnb8":
        import bitsandbytes.functional as bnb

        rows, scales, _ = bnb.int8_vectorwise_quant(x.detach().half().flatten(0, -2))
        x = x + ((rows * scales.view(-1, 1) / 127).view(x.shape) - x).detach()
    dtype = dtype_of(fmt)
    return applied(layer, x, w.to(dtype), None if bias is None else bias.to(dtype))


def oracle_of(layer: AdaptedLayer, names: list[str], x: Tensor, noise: Any = as_it_is) -> Tensor:
    """The merged weight applied in float64."""
    with torch.no_grad(), in_float64(layer, noise):
        x = noise(x.double()) if x.is_floating_point() else x
        return applied(layer, x, *merged(layer, names, noise=noise))


def cost_of(layer: AdaptedLayer, names: list[str], x: Tensor, fmt: str) -> float:
    """What one rounding of x, the weight, the bias and the parameters does to the output."""
    rounded = [oracle_of(layer, names, x, rounding(fmt, seed)) for seed in range(DRAWS)]
    return spread(rounded, oracle_of(layer, names, x))


def spread(rounded: list[Tensor], exact: Tensor) -> float:
    """Three standard deviations of the element that varies most."""
    if exact.numel() == 0:
        return 0.0
    return 3 * (torch.stack(rounded) - exact).square().mean(0).max().sqrt().item()


def rounding(fmt: str, seed: int) -> Any:
    """Moves each value by one unit roundoff of what the format computes in, up or down."""
    generator = torch.Generator().manual_seed(seed)
    unit = torch.finfo(torch.float16 if fmt == "bnb8" else dtype_of(fmt)).eps / 2
    return lambda t: t * (1 + unit * (2 * torch.randint(2, t.shape, generator=generator) - 1))


def wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def stored(layer: nn.Module) -> dict[str, Tensor | None]:
    """A copy of every tensor that a layer keeps, under one name each."""
    weight: Any = layer.weight
    found: dict[str, Any] = {"weight": weight.data, "bias": getattr(layer, "bias", None)}
    state = getattr(weight, "quant_state", None)
    if state is not None:
        found |= {"absmax": state.absmax, "code": state.code, "offset": state.offset}
        found |= {"inner_absmax": state.state2.absmax, "inner_code": state.state2.code}
        assert layer.quant_state is state
    if hasattr(weight, "SCB"):
        found |= {"CB": weight.CB, "SCB": weight.SCB}
        found |= {"state_CB": layer.state.CB, "state_SCB": layer.state.SCB}
    return {k: None if v is None else v.detach().clone() for k, v in found.items()}


def same(one: dict[str, Tensor | None], other: dict[str, Tensor | None]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(
        (v is None) == (other[k] is None)
        and (v is None or (v.dtype == other[k].dtype and torch.equal(raw(v), raw(other[k]))))
        for k, v in one.items()
    )


def raw(tensor: Any) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def requantised(fmt: str, w: Tensor, layer: Any) -> dict[str, Tensor]:
    """What the format's own quantiser stores for ``w``, in the layer's orientation."""
    if fmt.startswith("dense"):
        return {"weight": w.to(layer.weight.dtype)}
    import bitsandbytes.functional as bnb

    if fmt == "bnb8":
        rows, scales, _ = bnb.int8_vectorwise_quant(w.half().contiguous())
        return {"weight": rows, "SCB": scales}
    packed, state = bnb.quantize_4bit(
        w.float().contiguous(), blocksize=64, compress_statistics=True,
        quant_type=layer.weight.quant_type,
    )  # fmt: skip
    return {"weight": packed, "absmax": state.absmax, "inner_absmax": state.state2.absmax,
            "offset": state.offset}  # fmt: skip
