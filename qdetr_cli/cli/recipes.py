"""Commands about recipes."""

from pathlib import Path
from typing import Annotated

import typer

from qdetr_cli.cli.app import recipe_app, reported
from qdetr_cli.cli.options import (
    Json,
    Plugins,
    Set,
)


@recipe_app.command("list")
@reported
def recipe_list(json: Json = False) -> None:
    """The shipped recipes, with the first line of each."""
    from qdetr_cli import recipe, report

    report.Page(json=json).recipe_table({name: recipe.recipe_summary(name) for name in recipe.recipe_names()})


@recipe_app.command("show")
@reported
def recipe_show(name: Annotated[str, typer.Argument(help="A shipped recipe or a file.")]) -> None:
    """A recipe as it is written."""
    from qdetr_cli import recipe

    typer.echo(recipe.recipe_text(name), nl=False)


@recipe_app.command("check")
@reported
def recipe_check(
    file: Annotated[str, typer.Argument(help="A recipe file or a shipped recipe.")],
    set_: Set = None,
    plugins: Plugins = None,
    json: Json = False,
) -> None:
    """Read a recipe, list every fault, and print it with everything that it extends."""
    from qdetr_cli import plugins as registry
    from qdetr_cli import recipe, report

    read = recipe.load_recipe(file, set_ or ())
    registry.load([*(plugins or ()), *map(Path, read.plugins)])
    report.Page(json=json).recipe(read)


@recipe_app.command("new")
@reported
def recipe_new(
    file: Annotated[Path, typer.Argument(help="The file to write; a new one.")],
    base: Annotated[str, typer.Option("--from", help="The recipe that it extends.")] = "w4a4",
) -> None:
    """Write a commented recipe to start from."""
    from qdetr_cli import recipe

    recipe.new_recipe(file, base)
    typer.echo(f"{file}: written; check it with `qdetr recipe check {file}`")
