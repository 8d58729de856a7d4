"""What `make docs` does to the pages: README and its neighbours become pages, links lead there, API entries find their objects.

The pages stay as a reader of the repository wants them. A link to a file that is no page leads to the repository.
An entry `::: effdense.NAME` names an object as users import it; the object is shown from the module that defines it, followed
by the classes of effdense that it returns.
"""

from __future__ import annotations

import functools
import os.path
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
# Pages that stand outside of docs/, by what they are called on the site.
OUTSIDE = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
# Arguments that a docstring explains together: "bias, memory: see DenseLayer."
TOGETHER = re.compile(r"^( *)(\w+(?:, \w+)+): (.*)$", re.MULTILINE)
# What a module's class shows of itself beside its arguments.
MODULE = {"members": ["forward", "freeze_features"]}
RECORD = {"show_if_no_docstring": True, "show_root_full_path": False}


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that stand outside of docs/."""
    for uri, source in OUTSIDE.items():
        files.append(File.generated(config, uri, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """A page's text as the site wants it."""
    uri = page.file.src_uri
    source = OUTSIDE.get(uri, f"docs/{uri}")

    def link(found: re.Match[str]) -> str:
        return f"]({site_link(found[1], source, uri, config.repo_url)}"

    markdown = re.sub(r"\]\(([^)\s]+)", link, markdown)
    markdown = re.sub(r"^( *```\w+) needs=.*$", r"\1", markdown, flags=re.MULTILINE)
    return re.sub(r"^::: ([\w.]+)$", lambda found: "\n".join(entries(found[1])), markdown, flags=re.MULTILINE)


def site_link(target: str, source: str, uri: str, repository: str) -> str:
    """Where a link of the repository's file `source`, which is the site's page `uri`, leads on the site."""
    path, mark, anchor = target.partition("#")
    if "://" in path or not path:
        return target
    path = os.path.normpath(os.path.join(os.path.dirname(source), path))
    pages = {file: page for page, file in OUTSIDE.items()}
    inside = pages.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
    if inside is None or (ROOT / path).is_dir():
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"{repository.rstrip('/')}/{kind}/main/{path}{mark}{anchor}"
    return os.path.relpath(inside, os.path.dirname(uri) or ".") + mark + anchor


class OneByOne(griffe.Extension):
    """Gives every argument of a docstring a line of its own, which a table needs."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Rewrites an object's docstring."""
        if obj.docstring:
            obj.docstring.value = TOGETHER.sub(one_by_one, obj.docstring.value)


def one_by_one(found: re.Match[str]) -> str:
    """The same explanation for every name, except for exceptions, which are one entry of several types."""
    indent, names, text = found.groups()
    if names[0].isupper():
        return found[0]
    return "\n".join(f"{indent}{name}: {text}" for name in names.split(", "))


@functools.cache
def package() -> Any:
    """effdense's modules, read without importing them."""
    return griffe.load("effdense", search_paths=[str(ROOT)])


def find(name: str) -> Any:
    """The object that `name` is after `import effdense`, where it is defined.

    A function hides the module of its name, and a name may be assigned from a module that is imported.
    """
    holder, _, last = name.rpartition(".")
    if not holder:
        return package()
    found = find(holder).members[last]
    found = found.final_target if found.is_alias else found
    if found.is_module and last in imported_functions(holder):
        found = found.members[last]
    elif found.is_attribute and re.fullmatch(r"[a-z_]+\.\w+", str(found.value)):
        found = package()[str(found.value)]
    return found.final_target if found.is_alias else found


@functools.cache
def imported_functions(holder: str) -> set[str]:
    """Names that a package imports from modules of the same names."""
    return set(re.findall(r"^from [\w.]+\.(\w+) import (?:.*\b)?\1\b", find(holder).source, re.MULTILINE))


def entries(name: str) -> Iterator[str]:
    """mkdocstrings' entries for an object and the classes that come with it."""
    found = find(name)
    if found.is_module:
        yield from entry(name, found, members=False)
        return
    yield from entry(name, found, **(MODULE if found.is_class else {}))
    for record in records(found, {found.path}):
        yield from entry(record.name, record, **RECORD)


def entry(heading: str, found: Any, **options: Any) -> Iterator[str]:
    """mkdocstrings' directive, with a heading that says how users import the object."""
    yield f"::: {found.path}\n    options:\n      heading: {heading}\n      toc_label: {heading}"
    yield from (f"      {key}: {str(value).lower()}" for key, value in options.items())
    yield ""


def records(found: Any, known: set[str]) -> Iterator[Any]:
    """Classes of effdense that a function returns, or that such a class holds; public modules have entries of their own."""
    if found.is_function:
        expressions = [found.returns]
    else:
        expressions = [*found.bases, *(a.annotation for a in found.attributes.values())]
    for part in (part for e in expressions if isinstance(e, griffe.Expr) for part in e.iterate(flat=True)):
        path = getattr(part, "canonical_path", "")
        if (
            not path.startswith("effdense.")
            or path in known
            or path.startswith(("effdense.nn.", "effdense.models."))
        ):
            continue
        known.add(path)
        record = package()[path.removeprefix("effdense.")]
        if record.is_class:
            yield record
            yield from records(record, known)
