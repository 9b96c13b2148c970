"""Registered models: `chat`, `promote`, `serve`."""

import sys
from typing import Annotated

import typer
from rich.text import Text

from flows.cli.common import FAILED, JsonFile, err, looking, out, say, working, write_json
from plumbline.errors import ParamsError

Temperature = Annotated[float, typer.Option(min=0.01, help="Divides the logits.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest answer.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the sampling.")]


def chat(
    model: Annotated[
        str | None,
        typer.Argument(
            show_default="challenger",
            help="Registered model to load: NAME@ALIAS, NAME/3, or an alias of plumbline-policy.",
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="Talk to what `plumbline serve` serves there, and load nothing."),
    ] = None,
    temperature: Temperature = 0.7,
    max_tokens: MaxTokens = 128,
    seed: Seed = 0,
) -> None:
    """Talk to a trained model; an empty line or Ctrl-D ends."""
    with looking():
        if url and model:
            raise ParamsError(f"expected a model or --url, got both: {model} and {url}")
        from flows.markdown import plain

        speaker = "model" if url else model or "plumbline-policy@challenger"
        if url:
            from flows.models.remote_chat import open_remote_chat

            answer = open_remote_chat(
                url, say, temperature=temperature, max_tokens=max_tokens, seed=seed
            )
        else:
            err.print("[dim]loading …[/dim]")
            from flows.models.chatting import open_chat

            answer = open_chat(speaker, temperature=temperature, max_tokens=max_tokens, seed=seed)
        while True:
            try:
                text = input("you> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                break
            if not text:
                break
            out.print(Text.assemble((f"{speaker}> ", "bold"), plain(answer(text))))


def promote(
    model: Annotated[
        str,
        typer.Argument(
            metavar="CHALLENGER", help="NAME@ALIAS, NAME/3, or an alias of plumbline-policy."
        ),
    ] = "challenger",
    threshold: Annotated[
        float,
        typer.Option(
            min=0, max=0.999, help="The lower end of the win rate's interval has to be above it."
        ),
    ] = 0.5,
    ask: Annotated[
        bool, typer.Option("--ask", help="Show the comparison and ask before promoting.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Let a version meet the champion on held-out prompts; if it is better, it takes the place."""
    with working(json_file) as project:
        from flows.promotion.command import run_promotion

        found = run_promotion(project, err, model, threshold, ask=ask)
        write_json(json_file, found.model_dump(mode="json"))
        from flows.promotion.summary import show

        show(out, found, shown=ask and found.approved is not None)
        if found.outcome == "refused":
            raise typer.Exit(FAILED)


def serve(
    model: Annotated[
        str,
        typer.Argument(
            metavar="ALIAS", help="An alias of plumbline-policy, NAME@ALIAS, or NAME/3."
        ),
    ] = "champion",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where to listen.")] = 5001,
    temperature: Temperature = 0.7,
    max_tokens: MaxTokens = 128,
    seed: Seed = 0,
) -> None:
    """Serve a model by MLflow's scoring server, for this machine alone, until Ctrl-C."""
    with working():
        from flows.models.serving import serve_model

        serve_model(model, port, say, temperature=temperature, max_tokens=max_tokens, seed=seed)
