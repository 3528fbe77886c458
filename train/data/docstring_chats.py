"""Builds chats from the docstrings of Python code: fine-tuning data that every machine with Python has.

    user        What does the function textwrap.dedent(text) do?
    assistant   Remove any common leading whitespace from every line in `text`.

The answer is the first paragraph of the docstring of a module, public class, function or method. The paragraph must be
a sentence of SHORTEST_ANSWER to LONGEST_ANSWER characters. A chat has the name of its file, so whole files are held
out. At the same data.validation_fraction these are the files that conf=tiny holds out.
"""

import ast
import inspect
import warnings
from collections.abc import Iterator

from train.data.chats import Chat, read_chat
from train.data.readers import SourceFile, read_text

SHORTEST_ANSWER, LONGEST_ANSWER = 12, 240
"""Length limits of an answer in characters: shorter answers say nothing, longer ones are no summaries."""
LONGEST_SIGNATURE = 80
"""Longest parameter list in a question, in characters."""
Documented = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def read_docstring_chats(file: SourceFile, field: str) -> Iterator[tuple[str, Chat]]:
    """The chats of a Python file, each under the file's name; none if this Python version cannot parse the file."""
    code = "".join(text for _, text in read_text(file, field, None))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about the library's code do not concern the user
            module = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError):
        return
    name = file.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for question, answer in _pairs(module, name):
        yield file.name, read_chat({"prompt": question, "completion": answer}, f"{file.path}: {question}", field)


def _pairs(module: ast.Module, name: str) -> Iterator[tuple[str, str]]:
    if answer := _answer(module):
        yield f"What is the module {name}?", answer
    yield from _of_definitions(module, name)


def _of_definitions(parent: ast.Module | ast.ClassDef, name: str) -> Iterator[tuple[str, str]]:
    for node in parent.body:
        if not isinstance(node, Documented) or node.name.startswith("_"):
            continue
        whole, answer = f"{name}.{node.name}", _answer(node)
        if isinstance(node, ast.ClassDef):
            if answer:
                yield f"What is the class {whole}?", answer
            yield from _of_definitions(node, whole)
        elif answer:
            kind = "method" if isinstance(parent, ast.ClassDef) else "function"
            yield f"What does the {kind} {whole}({_parameters(node)}) do?", answer


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    text = ast.unparse(function.args)
    return text if len(text) <= LONGEST_SIGNATURE else "..."


def _answer(node: ast.Module | Documented) -> str | None:
    text = ast.get_docstring(node, clean=False)
    paragraph = " ".join(inspect.cleandoc(text).partition("\n\n")[0].split()) if text else ""
    return paragraph if SHORTEST_ANSWER <= len(paragraph) <= LONGEST_ANSWER and " " in paragraph else None
