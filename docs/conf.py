"""Sphinx: how the pages in docs/ and the docstrings of the public API become a site (`make docs`)."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import re
from pathlib import Path
from typing import Any

import flax.linen as nn
from sphinx.util.nodes import make_refnode

import impala_jax

ROOT = Path(__file__).parent.parent
# Pages whose text is elsewhere in the repository, where readers of the repository expect it.
ELSEWHERE = {
    'benchmarks': 'benchmarks/README.md',
    'changelog': 'CHANGELOG.md',
    'contributing': 'CONTRIBUTING.md',
    'index': 'README.md',
    'requirements': 'requirements/README.md',
}
PAGES = {ROOT / path: ROOT / 'docs' / f'{page}.md' for page, path in ELSEWHERE.items()}
# Modules whose names annotations and docstrings mention.
MODULES = (
    *('environments', 'networks', 'vtrace', 'tabular', 'plotting', 'actor', 'agent', 'learner', 'loss', 'types'),
    *('statistics', 'evaluation.evaluator', 'evaluation.video', 'rundir.checkpoint_format'),
)

project = 'impala_jax'
author = 'The impala_jax authors'
version = release = impala_jax.__version__
extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.mathjax', 'sphinx.ext.napoleon']
html_theme = 'furo'
html_title = f'impala_jax {version}'
html_copy_source = False
html_show_copyright = False

myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 4

smartquotes_action = 'D'  # The other ones would change `...` and '' in the text of docstrings.
default_role = 'literal'  # A single backtick in a docstring is code, as in Markdown.
autodoc_member_order = 'bysource'
autodoc_typehints = 'signature'
autodoc_preserve_defaults = True
# Shown by these names.
ALIASES = ('Array', 'ArrayLike', 'PyTree', 'Table', 'OptimizerFactory', 'Schedule')
autodoc_type_aliases = {name: name for name in ALIASES}
nitpicky = True
# What other packages document is not looked up, since that needs a network.
nitpick_ignore_regex = [
    ('py:.*', r'(jax|jaxlib|numpy|np|optax|flax|nn|chex|dm_env|matplotlib|pathlib|collections|typing|enum)\..*'),
    ('py:.*', r'Figure|Path|ndarray|' + '|'.join(ALIASES)),
]
autodoc_default_options = {'members': True, 'undoc-members': True}
maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_param = False


def setup(app: Any) -> None:
    """Connects the functions below to Sphinx's events."""
    for name in impala_jax.__all__:
        if name.endswith('Config'):
            # Without what only tells tyro how to parse a field.
            types = vars(getattr(impala_jax, name))['__annotations__']
            types |= {field: re.sub(r'^Annotated\[(.*?), .*\]$', r'\1', text) for field, text in types.items()}
    app.connect('source-read', _read_elsewhere)
    # Before and after napoleon, which takes what stands before a colon for a field's type.
    app.connect('autodoc-process-docstring', _prepare, priority=400)
    app.connect('autodoc-process-docstring', _restore_field, priority=600)
    app.connect('missing-reference', _find_public_name)
    app.connect('autodoc-process-signature', _hide_fields)


def _read_elsewhere(app: Any, page: str, source: list[str]) -> None:
    """Inserts the text of a page that is elsewhere, and makes links to such pages point into the site."""
    path = Path(app.srcdir) / f'{page}.md'
    if not path.exists():
        return
    folder = path.parent
    if page in ELSEWHERE:
        original = ROOT / ELSEWHERE[page]
        folder = original.parent
        tables_of_contents = re.findall(r'^```{toctree}.*?^```', source[0], re.MULTILINE | re.DOTALL)
        source[0] = '\n\n'.join([original.read_text(encoding='utf-8'), *tables_of_contents])
        app.env.note_dependency(str(original))

    def replaced(match: re.Match[str]) -> str:
        name, anchor = match.groups()
        target = (folder / name).resolve()
        return f']({os.path.relpath(PAGES.get(target, target), path.parent)}{anchor or ""})'

    source[0] = re.sub(r'\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)', replaced, source[0])


def _comments(cls: type) -> dict[str, str]:
    """Field -> the comment behind or above it, which for a NamedTuple is its documentation."""
    found, above = {}, []
    for line in inspect.getsource(cls).splitlines():
        if (comment := re.fullmatch(r' +# (.*)', line)) is not None:
            above.append(comment[1])
            continue
        if (field := re.match(r'    (\w+): [^#]+(?:# (.*))?$', line)) is not None:
            found[field[1]] = field[2] or ' '.join(above)
        above = []
    return found


_field: list[str] = []


def _prepare(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Keeps the text of a field, or finds it in the source; escapes text that only looks like markup."""
    end = next((i for i, line in enumerate(lines) if re.fullmatch(r'(Args|Returns|Raises):', line)), len(lines))
    is_formula = [i < end and line.startswith('    ') for i, line in enumerate(lines)]
    text: list[str] = []
    for i, line in enumerate(lines):
        if is_formula[i] and i and not lines[i - 1]:
            text += ['::', '']
        text.append(line if is_formula[i] else _escaped(line))
    lines[:] = _field[:] = text
    if lines and lines[0].startswith('Alias for field number'):
        *owner, field = name.split('.')
        _field[:] = [_escaped(_comments(_imported('.'.join(owner))).get(field, ''))]


def _escaped(line: str) -> str:
    """A line without references (`lambda_`), substitutions (`|x|`) and enumerations (`T.`) outside of code."""
    parts = re.split(r'(`[^`]*`)', line)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r'(\w)_(?![\w:])', r'\1\\_', parts[i])
        parts[i] = re.sub(r'(?<!\S)\|(?=\S)', r'\\|', parts[i])
        parts[i] = re.sub(r'^( +\w+: )([A-Z])\.$', r'\1\2', parts[i])
    return ''.join(parts)


def _restore_field(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    if what in ('attribute', 'property'):
        lines[:] = _field


def _imported(name: str) -> Any:
    """The object of a dotted name."""
    module, _, attribute = name.rpartition('.')
    return getattr(_imported(module), attribute) if module else importlib.import_module(name)


def _find_public_name(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """Links a name as annotations and docstrings have it to where the reference has it: `types.TimeStep`, and so on."""
    last = node.get('reftarget', '').rpartition('.')[2]
    domain = env.get_domain('py')
    for module in ('impala_jax', *(f'impala_jax.{name}' for name in MODULES)):
        if (found := domain.objects.get(f'{module}.{last}')) is not None:
            return make_refnode(app.builder, node['refdoc'], found.docname, found.node_id, contnode, found.node_id)
    return None


def _hide_fields(
    app: Any, what: str, name: str, thing: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str, str | None] | None:
    """Configuration classes, named tuples and protocols list what they have below the signature."""
    if what != 'class':
        return None
    if issubclass(thing, nn.Module):
        fields = [field for field in dataclasses.fields(thing) if field.name not in ('parent', 'name')]
        return f'({", ".join(map(_parameter, fields))})', returns
    is_listed = thing.__name__.endswith('Config') or hasattr(thing, '_fields') or getattr(thing, '_is_protocol', False)
    return ('', returns) if is_listed else None


def _parameter(field: dataclasses.Field) -> str:
    if field.default is dataclasses.MISSING:
        return field.name
    return f'{field.name}={getattr(field.default, "__name__", repr(field.default))}'
