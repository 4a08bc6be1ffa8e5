"""Python functions as pairs of text: the source without its docstring, and the docstring's first line."""

import ast
import warnings
from collections.abc import Iterator

_Function = ast.FunctionDef | ast.AsyncFunctionDef


def documented_functions(text: str) -> Iterator[tuple[int, str, str]]:
    """Every function of a module that has a docstring, in order, nested ones and methods included.

    Yields:
        The line of its `def`, its source without the docstring and without its indentation, and the first line of the
        docstring that is not empty. Decorators are left out.

    Raises:
        SyntaxError: the text is not a module of the running Python.
    """
    text = text.removeprefix("\ufeff")  # `ast` takes a byte-order mark in bytes only
    # Not str.splitlines: Python's own line numbers do not count form feeds or U+2028.
    lines = text.encode().splitlines(keepends=True)
    functions = [node for node in ast.walk(_parse(text)) if isinstance(node, _Function)]
    for node in sorted(functions, key=lambda node: node.lineno):
        summary = _summary(node)
        if summary:
            yield node.lineno, _source(node, lines), summary


def _parse(text: str) -> ast.Module:
    with warnings.catch_warnings():
        # What a reader of text does not care about: '\d' in a string of somebody else's module.
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return ast.parse(text)
        except (ValueError, RecursionError, MemoryError) as error:  # null bytes; nesting beyond the parser's depth
            raise SyntaxError(str(error)) from error


def _summary(node: _Function) -> str:
    docstring = (ast.get_docstring(node) or "").strip()
    first = docstring.splitlines()[0].strip() if docstring else ""
    return first.encode("utf-8", "replace").decode()  # an escape such as '\ud800' makes text that has no UTF-8


def _source(node: _Function, lines: list[bytes]) -> str:
    docstring = node.body[0]
    assert docstring.end_lineno is not None
    assert docstring.end_col_offset is not None
    # Offsets of `ast` count UTF-8 bytes, so the cutting is done on bytes.
    before = b"".join(lines[node.lineno - 1 : docstring.lineno - 1])
    before += lines[docstring.lineno - 1][: docstring.col_offset]
    after = lines[docstring.end_lineno - 1][docstring.end_col_offset :].lstrip(b" \t;")
    after += b"".join(lines[docstring.end_lineno : node.end_lineno])
    if after[:1] in (b"", b"\n", b"\r"):
        before = before.rstrip()  # the docstring had its lines to itself: they go with it
    indent = lines[node.lineno - 1][: node.col_offset]
    body = (before + after).splitlines(keepends=True)
    return b"".join(line.removeprefix(indent) for line in body).decode().rstrip()
