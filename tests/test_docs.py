"""The pages in docs/ and the README: links lead somewhere, commands parse, keys exist."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer
from pydantic import BaseModel

import make
from arctrm.cli.app import app
from arctrm.config.commands import COMMANDS
from arctrm.config.load import shipped_configs

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("dev/[!L]*.md"))]
PAGES += [ROOT / "README.md", ROOT / "RESULTS.md"]
SECTIONS = (
    "data|trunk|reader|trm|training|coupling|evaluation|inference|judge|adaptation|tracking|hub"
)

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
KEY = re.compile(rf"(?:{SECTIONS})(?:\.[A-Za-z_]+)+")


def blocks(text: str, *languages: str) -> list[str]:
    return [body for language, body in BLOCK.findall(text) if language in languages]


def prose(text: str) -> str:
    return BLOCK.sub("", text)


def shell_lines(text: str) -> list[str]:
    """Command lines of the shell blocks, continuation lines joined, prompts removed."""
    joined = "\n".join(blocks(text, "bash", "console", "sh")).replace("\\\n", " ")
    return [line.removeprefix("$ ") for line in joined.splitlines()]


def arctrm_words(line: str) -> list[str] | None:
    """The words after `arctrm` or `-m arctrm` (variables and launchers may come before)."""
    match = re.match(r"(?:\w+=\S+ )*(?:arctrm|[\w.-]+ (?:.* )?-m arctrm)(?=\s|$)", line)
    if match is None:
        return None
    words = shlex.split(line[match.end() :], comments=True)
    ends = [i for i, word in enumerate(words) if word in ("|", ">", "&&", "2>", "&")]
    return words[: min(ends, default=None)]


def commands(text: str) -> list[tuple[str, bool]]:
    """(command line, whether it is meant to run as it stands)."""
    lines = [(line, True) for line in shell_lines(text)]
    lines += [(code, False) for code in INLINE.findall(prose(text))]
    return [(line, whole) for line, whole in lines if arctrm_words(line) is not None]


def parse(line: str, whole: bool) -> tuple[str, dict]:
    """Parse without executing; `whole` lines need their arguments too.

    Raises a usage error for what the command line does not know.
    """
    words = [word for word in arctrm_words(line) or [] if word != "--debug"]
    command, name = typer.main.get_command(app), []
    while words and words[0] in getattr(command, "commands", {}):
        name.append(words.pop(0))
        command = command.commands[name[-1]]
    if hasattr(command, "commands") and words and not words[0].startswith("-"):
        raise typer.BadParameter(f"{line}: there is no command {words[0]!r}")
    if {"--help", "--version"} & set(words) or not words:
        whole = False
    context = command.make_context(" ".join(name), words, resilient_parsing=not whole)
    return " ".join(name), context.params


def exists(key: str, model: type[BaseModel]) -> bool:
    """Whether a dotted key is a field of `model`, or an item of a field that is a table."""
    name, _, rest = key.partition(".")
    field = model.model_fields.get(name)
    if field is None:
        return False
    kind = field.annotation
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return not rest or exists(rest, kind)
    return not rest or str(kind).startswith("dict")


def anywhere(key: str) -> bool:
    return any(exists(key, model) for model in COMMANDS.values())


def leaves(table: dict, prefix: str = "") -> list[str]:
    found = []
    for name, value in table.items():
        found += leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]
    return found


def slug(heading: str) -> str:
    """The anchor that a heading gets where Markdown is shown."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).strip().replace(" ", "-")


@pytest.fixture(params=PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def page(request) -> Path:
    return request.param


def test_every_relative_link_leads_to_a_file_and_its_heading(page):
    for link in LINK.findall(prose(page.read_text(encoding="utf-8"))):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        path = page.parent / target if target else page
        assert path.exists(), link
        if anchor and path.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
            assert anchor in map(slug, headings), link


def test_every_command_line_parses(page):
    for line, whole in commands(page.read_text(encoding="utf-8")):
        try:
            parse(line, whole)
        except typer.Exit:
            pass
        except Exception as error:
            pytest.fail(f"{line}: {error}")


def test_every_key_and_file_that_a_command_line_names_exists(page):
    for line, whole in commands(page.read_text(encoding="utf-8")):
        name, params = parse(line, whole)
        for override in params.get("set") or []:
            key = override.partition("=")[0]
            assert exists(key, COMMANDS[name]) or "KEY" in key, f"{line}: {key}"
        for path in params.get("config") or []:
            shipped = path.stem in shipped_configs()
            assert shipped or not str(path).startswith("configs/"), line


def test_every_key_in_backticks_exists(page):
    for code in INLINE.findall(prose(page.read_text(encoding="utf-8"))):
        match = KEY.match(code)
        if match and code[match.end() :].lstrip()[:1] in ("", "="):
            assert anywhere(match[0]), code


def test_every_key_of_a_toml_block_exists(page):
    for block in blocks(page.read_text(encoding="utf-8"), "toml"):
        for key in leaves(tomllib.loads(block)):
            assert anywhere(key), key


def test_generated_pages_and_pictures_are_up_to_date():
    for path, text in make.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: run python docs/make.py"


def test_the_readme_leads_to_every_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in ROOT.glob("docs/**/*.md"):
        assert f"({page.relative_to(ROOT)})" in text, page.name


def test_every_picture_is_shown_somewhere():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for picture in ROOT.glob("docs/pictures/*.svg"):
        assert f"{picture.name})" in text, picture.name


def test_these_checks_find_what_is_wrong():
    text = "`arctrm nope`\n```console\n$ A=1 arctrm solve x.json --nope\nerror\n```\n"
    lines = commands(text)
    assert lines == [("A=1 arctrm solve x.json --nope", True), ("arctrm nope", False)]
    for line, whole in lines:
        with pytest.raises(Exception, match="nope"):
            parse(line, whole)
    with pytest.raises(Exception, match="target"):
        parse("torchrun -m arctrm solve --budget 5s", whole=True)
    assert not anywhere("trunk.hiden_size")
    assert anywhere("data.weights.evaluation")
    assert anywhere("trunk.hidden_size")
    assert slug("What is in `checkpoint.json`") == "what-is-in-checkpointjson"


def test_there_are_pages_with_commands_and_keys():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert len(commands(text)) > 20
    assert len(re.findall(rf"`{KEY.pattern}", text)) > 40
