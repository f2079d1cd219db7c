"""Prints how large the package is and how finely it is cut; nothing fails on these figures: they are there to be seen.

A private helper called once is a function or method `_name` that the package mentions in one place beside its
definition.
A code line holds more than a comment or a docstring.
"""

import ast
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}


def docstring(node: ast.AST) -> ast.Constant | None:
    """The docstring of a module, class or function."""
    body = getattr(node, "body", None)
    first = body[0] if isinstance(body, list) and body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return first.value
    return None


def code_lines(path: Path, docstrings: list[ast.Constant]) -> int:
    """How many lines of a file are neither empty, nor a comment, nor part of a docstring."""
    with tokenize.open(path) as file:
        tokens = [token for token in tokenize.generate_tokens(file.readline) if token.type not in NOT_CODE]
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1) if token.string}
    return len(lines - {line for node in docstrings for line in range(node.lineno, (node.end_lineno or 0) + 1)})


def main() -> None:
    """Prints the figures of the package, then the lines of the tests."""
    lines: dict[str, int] = {}
    functions: dict[str, int] = {}
    mentioned: Counter[str] = Counter()
    private: list[str] = []
    code = words = 0
    for path in sorted((ROOT / "lowrank_tune").rglob("*.py")):
        tree, name = ast.parse(path.read_text(encoding="utf-8")), str(path.relative_to(ROOT))
        lines[name] = len(path.read_text(encoding="utf-8").splitlines())
        docstrings = [found for node in ast.walk(tree) if (found := docstring(node))]
        code += code_lines(path, docstrings)
        words += sum(len(str(node.value).split()) for node in docstrings)
        for node in ast.walk(tree):
            match node:
                case ast.FunctionDef() | ast.AsyncFunctionDef():
                    functions[f"{name}:{node.lineno} {node.name}"] = (node.end_lineno or 0) - node.lineno + 1
                    if node.name.startswith("_") and not node.name.endswith("__"):
                        private.append(node.name)
                case ast.Name():
                    mentioned[node.id] += 1
                case ast.Attribute():
                    mentioned[node.attr] += 1
    once = [name for name in private if mentioned[name] == 1]
    longest, function = max(lines, key=lines.__getitem__), max(functions, key=functions.__getitem__)
    tests = [len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "tests").rglob("*.py")]
    print(f"package     {sum(lines.values()):,} lines in {sum(1 for count in lines.values() if count)} files")
    print(f"longest     {longest} with {lines[longest]} lines; {function} with {functions[function]}")
    print(f"above 400   {', '.join(f'{name} {count}' for name, count in lines.items() if count > 400) or 'none'}")
    share = len(once) / len(functions)
    print(f"helpers     {len(once)} of {len(functions)} functions are private and called once: {share:.0%}")
    print(f"docstrings  {words / code:.2f} words a code line ({code:,} code lines)")
    print(f"tests       {sum(tests):,} lines in {len(tests)} files")


if __name__ == "__main__":
    main()
