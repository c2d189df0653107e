# SPDX-License-Identifier: Apache-2.0
"""The command line: ``fastadapt train | explain | merge | inspect | doctor``, over the library.

Exit codes: 0 done, 1 failed (a bug, or a loss that is not finite), 2 usage or configuration,
3 data, 4 an adapter or checkpoint, 5 the environment (a missing extra, a kernel), 6 output,
130 interrupted. With --json, stdout holds exactly one JSON document, also for an error
({"error": {"type", "message", "exit_code"}}); everything else goes to stderr.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

from fastadapt import errors

if TYPE_CHECKING:
    from rich.console import Console
    from typer import Typer

EXIT_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (errors.ConfigError, 2),
    (errors.TargetError, 2),
    (errors.UnsupportedError, 2),
    (errors.LifecycleError, 2),
    (errors.DataError, 3),
    (errors.CheckpointError, 4),
    (errors.MissingExtraError, 5),
    (errors.KernelError, 5),
    (errors.OutputError, 6),
    (KeyboardInterrupt, 130),
    (Exception, 1),
)

Document = dict[str, Any]
Command = Callable[..., tuple[Document, int]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (the table above)."""
    try:
        app = _app()
    except errors.MissingExtraError as error:
        print(f"fastadapt: {error}", file=sys.stderr)
        return _exit_code(error)
    try:
        app(args=None if arguments is None else list(arguments), prog_name="fastadapt")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def _app() -> Typer:
    for package in ("typer", "rich"):
        try:
            __import__(package)
        except ImportError as error:
            raise errors.MissingExtraError(
                package=package, extra="train", purpose="the command line"
            ) from error
    import typer

    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        help="Kernel-accelerated parameter-efficient fine-tuning.",
    )
    option, argument = typer.Option, typer.Argument
    base = Annotated[str | None, option(help="base model, when it is not the adapter's own")]
    four = Annotated[bool, option("--load-in-4bit", help="NF4 base")]
    adapter = Annotated[str, argument(help="adapter folder, or hub repository")]
    target = Annotated[str, argument(help="adapter folder, or model id or folder")]
    _register(app, "train", _train, _train_options())
    _register(app, "explain", _explain, {
        "target": (target, ...), "model": (base, None), "load_in_4bit": (four, False),
        "targets": (Annotated[str, option("--target", help="for a model")], "all-linear"),
        "tokens": (Annotated[int, option(help="tokens in a call")], 512),
        "require": (Annotated[float | None, option(
            help="fail when less than this share of adapter FLOPs is fused, 0 to 1")], None),
    })  # fmt: skip
    _register(app, "merge", _merge, {
        "adapter": (adapter, ...), "model": (base, None),
        "out": (Annotated[str, option(help="folder for the merged model")], ...),
        "dtype": (Annotated[str, option(help="stored, float32, bfloat16 or float16")], "stored"),
        "overwrite": (Annotated[bool, option("--overwrite", help="replace the folder")], False),
    })  # fmt: skip
    _register(app, "inspect", _inspect, {"adapter": (adapter, ...)})
    _register(app, "doctor", _doctor, {})
    return app


def _register(app: Typer, name: str, command: Command, options: dict[str, tuple[Any, Any]]) -> None:
    """Add a command. ``options``: name -> (annotation, default; ... = required)."""
    import typer

    shared = {
        "as_json": (Annotated[bool, typer.Option("--json", help="one JSON document")], False),
        "debug": (Annotated[bool, typer.Option("--debug", help="show the traceback")], False),
    }
    parameters = [
        inspect.Parameter(
            key,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=annotation,
            default=inspect.Parameter.empty if default is ... else default,
        )
        for key, (annotation, default) in {**options, **shared}.items()
    ]

    def shell(*, as_json: bool, debug: bool, **values: Any) -> None:
        raise typer.Exit(_guarded(command, values, as_json=as_json, debug=debug))

    shell.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    shell.__annotations__ = {p.name: p.annotation for p in parameters}
    app.command(name, help=command.__doc__)(shell)


def _guarded(command: Command, values: dict[str, Any], *, as_json: bool, debug: bool) -> int:
    """Run a command with stdout kept for its document; one line on stderr for an error."""
    from rich.console import Console

    stdout = sys.stdout
    document: Document
    try:
        with contextlib.redirect_stdout(sys.stderr if as_json else stdout):
            console = Console(soft_wrap=True)
            if not console.is_terminal:
                console = Console(soft_wrap=True, width=140)  # tables in a log are not folded
            document, code = command(console, **values)
    except (Exception, KeyboardInterrupt) as error:
        code = _exit_code(error)
        if debug:
            traceback.print_exc()
        interrupted = "interrupted; nothing was saved"
        default = interrupted if code == 130 else type(error).__name__
        message = " ".join(str(error).split()) or default
        if code == 1 and not isinstance(error, errors.FastAdaptError):
            message = f"{type(error).__name__}: {message} (--debug shows where)"
        print(f"fastadapt: {message}", file=sys.stderr)
        document = {"error": {"type": type(error).__name__, "message": message, "exit_code": code}}
    if as_json:
        print(json.dumps(document, indent=2, ensure_ascii=False), file=stdout)
    return code


def _exit_code(error: BaseException) -> int:
    return next(code for kind, code in EXIT_CODES if isinstance(error, kind))


def _train_options() -> dict[str, tuple[Any, Any]]:
    """An option for each field of TrainSettings. Its default is None: not given."""
    import typer

    from fastadapt.patch.settings import TrainSettings, allowed_types

    options: dict[str, tuple[Any, Any]] = {
        "config": (Annotated[str | None, typer.Option(help="YAML file with these keys")], None)
    }
    for field in fields(TrainSettings):
        kind = allowed_types(field.name)[0]
        text = field.metadata["help"]
        if field.default not in (None, "", False):
            text += f" [default: {field.default}]"
        flag = "--" + field.name.replace("_", "-")
        flags = (f"{flag}/--no-{flag[2:]}",) if kind is bool else (flag,)
        annotation = Annotated[kind | None, typer.Option(*flags, help=text, show_default=False)]  # type: ignore[valid-type]
        options[field.name] = (annotation, None)
    return options


def _train(console: Console, config: str | None, **given: Any) -> tuple[Document, int]:
    """Fine-tune a model on conversations; --config FILE holds the same keys, options win."""
    from fastadapt.patch.settings import TrainSettings, read_yaml
    from fastadapt.patch.train import run

    values = {} if config is None else read_yaml(config)
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    values |= {key: value for key, value in given.items() if value is not None}
    report = run(TrainSettings.from_mapping(values, config or "options"), console)
    losses = report["loss"]
    fifth = max(1, len(losses) // 5)
    first, last = sum(losses[:fifth]) / fifth, sum(losses[-fifth:]) / fifth
    console.print(
        f"loss {first:.3f} -> {last:.3f} (first and last fifth of {len(losses)} steps), "
        f"{report['tokens_per_second']:.0f} tokens/s; the adapter is in {values['out']}",
        highlight=False,
    )
    return report, 0


def _explain(
    console: Console, target: str, model: str | None, load_in_4bit: bool, targets: str,
    tokens: int, require: float | None,
) -> tuple[Document, int]:  # fmt: skip
    """Show which layers are adapted, how their weights are stored and what computes them."""
    import fastadapt
    from fastadapt.patch.inplace import patch
    from fastadapt.patch.loading import is_adapter, load_adapted, load_model

    if is_adapter(target):
        adapted, _ = load_adapted(target, model, load_in_4bit=load_in_4bit, trainable=True)
    else:
        config = fastadapt.LoraConfig(target_modules=targets, task_type="CAUSAL_LM")
        adapted = load_model(target, load_in_4bit=load_in_4bit)
        patch(adapted, config)
    explained = fastadapt.explain(adapted, tokens)
    console.print(explained.table())
    if require is not None:
        explained.require(require)
    return json.loads(explained.to_json()), 0


def _merge(
    console: Console, adapter: str, model: str | None, out: str, dtype: str, overwrite: bool
) -> tuple[Document, int]:
    """Write the base model with an adapter merged into its weights."""
    from fastadapt.patch.loading import load_adapted, load_tokenizer
    from fastadapt.patch.output import claim_new, replacing

    folder = claim_new(out, overwrite=overwrite)
    adapted, base = load_adapted(adapter, model, dtype=dtype)
    tokenizer = load_tokenizer(base)
    merged = adapted.merge_and_unload()
    with replacing(folder) as fresh:
        merged.save_pretrained(str(fresh))
        tokenizer.save_pretrained(str(fresh))
    console.print(f"{base} with {adapter} merged is in {folder}", highlight=False)
    parameters = sum(p.numel() for p in merged.parameters())
    return {
        "out": str(folder), "base_model": base, "adapter": adapter, "parameters": parameters,
        "dtype": str(merged.dtype).removeprefix("torch."),
    }, 0  # fmt: skip


def _inspect(console: Console, adapter: str) -> tuple[Document, int]:
    """Show an adapter's config, tensors, norms and size; the base model is not loaded."""
    from fastadapt.patch.inspection import inspect_adapter, summary, table

    document = inspect_adapter(adapter)
    console.print(table(document))
    console.print(summary(document), highlight=False, markup=False)
    return document, 0


def _doctor(console: Console) -> tuple[Document, int]:
    """Show versions, hardware and extras, and run each op once against its reference."""
    from fastadapt.patch.doctor import examine, show

    document = examine()
    show(document, console)
    return document, 0 if document["healthy"] else 5


if __name__ == "__main__":
    sys.exit(main())
