"The reference, over all modules: what it says of a name is what the source says of it."
import ast
import builtins
import inspect
import io
import re
import tokenize
from pathlib import Path

import pytest

from mlcourse.course import lessons
from mlcourse.site import is_ours, modules, public, reference_page, signature

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow   # torch and its kin are imported


@pytest.fixture(scope="module")
def mods():
    return {name: mod for name, mod in modules(ROOT).items() if mod}


@pytest.fixture(scope="module")
def written(mods):
    "The page of every module, as Markdown."
    found = {o.module: o for o in lessons(ROOT) if o.module}
    return {name: reference_page(found[name], mod, {}) for name, mod in mods.items()}


def comments(source):
    "Every comment of a source, by Python's own reading."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.string.lstrip("# ").strip() for t in tokens if t.type == tokenize.COMMENT}


def sections(page):
    "What stands under each heading of a page."
    parts = re.split(r"^#{2,4} (.+)$", page, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))


def functions(tree):
    "Every function of a module, by its name with its class."
    for node in tree.body:
        if isinstance(node, ast.FunctionDef): yield node.name, node
        if isinstance(node, ast.ClassDef):
            for f in (f for f in node.body if isinstance(f, ast.FunctionDef)):
                yield f"{node.name}.{f.name}", f


def test_functions_and_classes_come_before_constants(mods, written):
    for name, mod in mods.items():
        order = [is_ours(getattr(mod, n)) for n in public(mod)]
        assert order == sorted(order, reverse=True), name
        headings = re.findall(r"^## (.+)$", written[name], re.M)
        assert "Constants" not in headings[:-1], name
        patterns = [n for n in mod.__all__ if isinstance(getattr(mod, n), re.Pattern)]
        assert not set(patterns) & set(sections(written[name])), (name, patterns)


def test_no_docstring_of_a_builtin(written):
    docs = {inspect.getdoc(thing).split("\n\n")[0] for thing in vars(builtins).values()
            if inspect.isclass(thing) and len(inspect.getdoc(thing) or "") > 60}
    docs |= {inspect.getdoc(re.Pattern), inspect.getdoc(inspect.Parameter)}
    for name, page in written.items():
        assert not [doc[:60] for doc in docs if doc in page], name


def test_what_a_constant_says_is_a_comment(mods, written):
    "A `#` inside a string is none: only what Python takes for a comment may stand there."
    said = 0
    for name, mod in mods.items():
        known, under = comments(inspect.getsource(mod)), sections(written[name])
        for const in (n for n in public(mod) if not is_ours(getattr(mod, n))):
            _, _, text = under[const].rpartition("```")
            if not (text := text.strip().removesuffix(".")): continue
            assert any(text[1:] == c[1:] for c in known), f"{name}.{const}: {text}"
            said += 1
    assert said > 20


def test_a_comment_behind_the_head_is_the_result_s(mods, written):
    "Behind the line that closes a head stands what comes back, never what goes in."
    seen = 0
    for name, mod in mods.items():
        source, under = inspect.getsource(mod), sections(written[name])
        lines = source.splitlines()
        for function, node in functions(ast.parse(source)):
            if function not in under or node.name == "__init__": continue
            closing = re.search(r":\s*#\s*(.+)$", lines[node.body[0].lineno - 2])
            rows = re.findall(r"^\| (`\w+`|\*returns\*) \|(.*)\|$", under[function], re.M)
            if not closing or not rows: continue
            where = [what for what, rest in rows if rest.rstrip().endswith(closing[1].strip())]
            assert "*returns*" in where, f"{name}.{function}: {closing[1]} is said of {where}"
            seen += 1
    assert seen > 100


def test_every_parameter_with_a_comment_is_described(mods, written):
    for name, mod in mods.items():
        for thing in (n for n in public(mod) if inspect.isfunction(getattr(mod, n))):
            text = sections(written[name])[thing]
            shown = re.findall(r"^\| `(\w+)` \|", text, re.M)
            if shown: assert shown == list(inspect.signature(getattr(mod, thing)).parameters), thing


def test_what_is_printed_is_the_same_in_every_run(mods, written):
    for name, page in written.items():
        assert not re.search(r" at 0x|Path\('/", page), name
        for text in re.findall(r"(?<![\w\]])\{('[^:{}\n]+(?:, '[^:{}\n]+)+)\}", page):
            assert text.split(", ") == sorted(text.split(", ")), f"{name}: {text}"
    def odd(a={"b", "a", "c"}): ...
    assert signature("odd", odd) == "odd(a={'a', 'b', 'c'})"
