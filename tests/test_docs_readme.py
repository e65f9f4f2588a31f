"""Documents are executed as far as that goes without a model: commands parse, paths and settings exist."""

import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest
import typer.main

import edgecascade
from deploy.local.plan import Site
from deploy.stack import load

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]


def shell_lines(page):
    """Words of each line in the fenced blocks without a language; comments and settings in front are cut off."""
    language = None
    for line in page.read_text("utf-8").splitlines():
        if line.startswith("```"):
            language = line[3:] if language is None else None
        elif language == "":
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words.pop(0)
            if words:
                yield words


def lines_of(program):
    return sorted({tuple(words) for page in PAGES for words in shell_lines(page) if words[0] == program})


@pytest.mark.parametrize("words", lines_of("edgecascade"), ids=" ".join)
def test_each_edgecascade_line_is_one_the_command_line_takes(words):
    command, rest = typer.main.get_command(edgecascade.app), list(words[1:])
    while isinstance(command, click.Group) or hasattr(command, "commands"):
        command = command.commands[rest.pop(0)]
    with command.make_context(words[0], rest) as context:
        assert context.command is command


def mentions(page):
    """Words of each command in the text, in backticks or on an indented line; arguments may be left out there."""
    text = page.read_text("utf-8")
    for told in re.findall(r"`((?:[A-Z_]+=\S+ )*edgecascade [^`]+)`|^    (edgecascade .+)$", text, re.MULTILINE):
        words = re.sub(r"^([A-Z_]+=\S+ )*edgecascade ", "", "".join(told))
        yield shlex.split(words, comments=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_command_in_the_text_has_that_name_and_those_options(page):
    for words in mentions(page):
        command, rest = typer.main.get_command(edgecascade.app), list(words)
        while rest and hasattr(command, "commands"):
            command = command.commands[rest.pop(0)]
        options = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
        assert {word.split("=")[0] for word in rest if word.startswith("--")} <= options, words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_place_in_the_text_exists(page):
    rooms = "bench|deploy|docs|examples|functions|models|routing|scaler|tests"
    for place in re.findall(rf"`((?:{rooms})/[\w./-]+)`", page.read_text("utf-8")):
        assert (ROOT / place).exists() or (ROOT / f"{place}.py").exists(), place


@pytest.mark.parametrize("words", lines_of("make"), ids=" ".join)
def test_each_make_line_names_a_target(words):
    said = subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr


def test_every_line_is_of_a_program_we_know():
    known = {"edgecascade", "make", "curl", "pip", "faas-cli", "python", "mosquitto", "mosquitto_pub"}
    known |= {"docker", "kubectl", "openssl", "promtool"}
    assert {Path(words[0]).name for page in PAGES for words in shell_lines(page)} <= known


def test_the_two_commands_stand_on_the_first_screen():
    first = (ROOT / "README.md").read_text("utf-8").splitlines()[:12]
    assert any(line.startswith("make demo") for line in first)
    assert any(line.startswith("make test") for line in first)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


def test_every_place_on_the_map_exists():
    for place in re.findall(r"^\| `([\w./]+)` \|", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE):
        assert (ROOT / place).exists(), place


def test_every_setting_of_stack_yml_is_documented():
    text = (ROOT / "stack.yml").read_text("utf-8")
    documented = (ROOT / "docs" / "running.md").read_text("utf-8")
    for name in set(re.findall(r"\$\{(\w+)", text)):
        assert f"`{name}`" in documented, name


def test_the_folders_that_running_md_names_are_those_of_the_code():
    documented = (ROOT / "docs" / "running.md").read_text("utf-8")
    site = Site(Path(), Path("var"))
    for inside, here in site.folders.items():
        assert re.search(rf"`\w+_PATH: {inside}` \| `{here}`", documented)
    functions = load(ROOT / "stack.yml", {}).functions.values()
    paths = {f.environment.get(key) for f in functions for key in ("MODEL_PATH", "FEDERATION_STATE_PATH")}
    assert paths - {None} == set(site.folders)
