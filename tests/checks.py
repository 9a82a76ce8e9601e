"""What must hold for the notebooks and the repository, checked without running a kernel.

Every check takes what it looks at and returns a list of sentences, one a problem; an empty list is a pass. `test_static.py` runs
all of them on the repository, and each of them on something made up that it must find fault with.

    python tests/checks.py          print the problems
    python tests/checks.py --fix    strip outputs, counts and metadata that do not belong in a commit; ids and tags stay
"""
from __future__ import annotations

import argparse, ast, json, re, statistics, subprocess, sys, tomllib
from configparser import ConfigParser
from pathlib import Path

import nbformat
from mlcourse.course import PARTS
from mlcourse.exercises import find_exercises

ROOT = Path(__file__).resolve().parent.parent
# Limits. What to aim at is lower: 60 code cells, 4 lines in the median, two or three code cells in a row, a thousand words.
MAX_CODE_CELLS, MAX_MEDIAN_LINES, MAX_CELLS_IN_A_ROW, MIN_WORDS = 75, 7, 4, 800
EXERCISES = range(3, 6)
CELL_KEYS, NOTEBOOK_KEYS = {"tags", "jupyter"}, {"kernelspec"}


# ---------------------------------------------------------------- notebooks

def notebooks(root: Path = ROOT) -> list[Path]:
    "All notebooks below nbs/."
    return sorted(p for p in (root / "nbs").rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.relative_to(root).parts))


def read(path: Path) -> dict:
    "A notebook as nbformat's JSON, each source one string."
    nb = json.loads(path.read_text(encoding="utf-8"))
    for cell in nb["cells"]: cell["source"] = "".join(cell["source"])
    return nb


def lesson_name(path: Path, root: Path = ROOT) -> str | None:
    "`week1/03_hello_llm` for a lesson; None for the front page and the library."
    parts = path.relative_to(root / "nbs").with_suffix("").parts
    return "/".join(parts) if re.fullmatch(r"week\d+|clinic", parts[0]) else None


def code_cells(nb: dict) -> list[tuple[int, dict]]:
    "The code cells with their indices."
    return [(i, c) for i, c in enumerate(nb["cells"]) if c["cell_type"] == "code"]


def prose_cells(nb: dict) -> list[tuple[int, str]]:
    "The text of the markdown cells with their indices."
    return [(i, c["source"]) for i, c in enumerate(nb["cells"]) if c["cell_type"] == "markdown"]


def directives(cell: dict) -> list[str]:
    "What stands behind `#|` in a cell."
    return [l[2:].strip() for l in cell["source"].splitlines() if l.startswith("#|")]


def is_hidden(cell: dict) -> bool:
    "Is the cell folded away in Jupyter?"
    return cell["metadata"].get("jupyter", {}).get("source_hidden", False)


def is_exported(cell: dict) -> bool:
    "Does the cell go to the library?"
    return any(d.startswith("export") for d in directives(cell))


def parse(cell: dict) -> list[ast.stmt]:
    "The statements of a code cell; lines of IPython are left out, a cell that does not parse gives none."
    lines = ["pass" if l.lstrip().startswith(("%", "!")) else l for l in cell["source"].splitlines()]
    try: return ast.parse("\n".join(lines)).body
    except SyntaxError: return []


def parameters(nb: dict) -> list[str]:
    "One cell is tagged `parameters`, and it begins with the tier."
    tagged = [c for c in nb["cells"] if "parameters" in c["metadata"].get("tags", [])]
    if len(tagged) != 1: return [f"{len(tagged)} cells are tagged `parameters`; it must be one, or papermill cannot set the tier"]
    body = parse(tagged[0])
    if not body or ast.unparse(body[0]) != "tier = 'auto'": return ['the parameters cell must begin with `tier = "auto"`']
    return []


def clean(nb: dict) -> list[str]:
    "Nothing of a run is left in the file."
    found = [f"cell {i} has outputs" for i, c in code_cells(nb) if c["outputs"]]
    found += [f"cell {i} has an execution count" for i, c in code_cells(nb) if c["execution_count"] is not None]
    found += [f"cell {i} has metadata {', '.join(sorted(odd))}" for i, c in enumerate(nb["cells"]) if (odd := set(c["metadata"]) - CELL_KEYS)]
    if odd := set(nb["metadata"]) - NOTEBOOK_KEYS: found.append(f"the notebook has metadata {', '.join(sorted(odd))}")
    return [f"{f}: run `make tidy`" for f in found]


def valid(nb: dict) -> list[str]:
    "The file is a notebook of a format with cell ids, and the ids differ."
    ids = [c.get("id") for c in nb["cells"]]
    if None in ids: return ["cells have no ids: it must be nbformat 4.5"]
    if twice := sorted({i for i in ids if ids.count(i) > 1}): return [f"cell id {i} is used {ids.count(i)} times" for i in twice]
    try: nbformat.validate(nbformat.from_dict(nb))
    except nbformat.ValidationError as e: return [f"not a valid notebook: {str(e).splitlines()[0]}"]
    return []


def imports_alone(nb: dict) -> list[str]:
    "A cell that imports and is not exported does nothing else: the site's builder runs such cells by themselves."
    found = []
    for i, c in code_cells(nb):
        kinds = [isinstance(s, (ast.Import, ast.ImportFrom)) for s in parse(c)]
        if any(kinds) and not all(kinds) and not is_exported(c): found.append(f"cell {i} mixes imports and other code")
    return found


def _is_boilerplate(cell: dict) -> bool:
    "Cells that a reader skips: directives only, parameters, imports, folded solutions."
    body = parse(cell)
    return ("parameters" in cell["metadata"].get("tags", []) or is_hidden(cell) or not cell["source"].strip()
            or bool(re.fullmatch(r"(#\|.*\n?)+", cell["source"])) or bool(body) and all(isinstance(s, (ast.Import, ast.ImportFrom)) for s in body))


def budget(nb: dict) -> list[str]:
    "Few and short cells, with prose between them. A function that goes to the library may be longer than a cell of the lesson."
    read_by_all, found = [c for _, c in code_cells(nb) if not _is_boilerplate(c)], []
    if len(read_by_all) > MAX_CODE_CELLS: found.append(f"{len(read_by_all)} code cells to read; the limit is {MAX_CODE_CELLS}")
    lines = [sum(1 for l in c["source"].splitlines() if l.strip() and not l.startswith("#|")) for c in read_by_all if not is_exported(c)]
    if lines and statistics.median(lines) >= MAX_MEDIAN_LINES:
        found.append(f"the median code cell has {statistics.median(lines):g} lines; it must be under {MAX_MEDIAN_LINES}")
    row = 0
    for i, c in enumerate(nb["cells"]):
        if c["cell_type"] != "code": row = 0
        elif not _is_boilerplate(c):
            row += 1
            if row == MAX_CELLS_IN_A_ROW + 1: found.append(f"cell {i} is the {row}th code cell in a row without prose")
    return found


def code_parses(nb: dict) -> list[str]:
    "Every code cell is Python (but for IPython's own lines); otherwise the other checks would not see into it."
    found = []
    for i, c in code_cells(nb):
        if c["source"].startswith("%%"): continue
        if c["source"].strip() and not parse(c) and not re.fullmatch(r"(\s*(#.*)?\n?)*", c["source"]): found.append(f"cell {i} does not parse")
    return found


ABSOLUTE = re.compile(r"(?<![\w.~/$}-])/(?:home|root|work|Users)/\w")

def portable(nb: dict) -> list[str]:
    "No path of one person's machine, and nothing left to do."
    found = [f"cell {i} names an absolute path: {m.group()}..." for i, c in enumerate(nb["cells"]) if (m := ABSOLUTE.search(c["source"]))]
    return found + [f"cell {i} holds a {m.group()}" for i, c in enumerate(nb["cells"]) if (m := re.search(r"\b(TODO|FIXME|XXX)\b", c["source"]))]


# ---------------------------------------------------------------- figures

DRAWING = {"plot", "hist", "imshow", "scatter", "bar", "barh", "boxplot", "matshow", "subplots", "figure"}
MIN_ALT = 20

def alt_text(cell: dict) -> str:
    "What the cell's `#| fig-alt:` says."
    return next((d.split(":", 1)[1].strip().strip("\"'") for d in directives(cell) if re.match(r"fig-alt\s*:", d)), "")


def _now(node: ast.AST):
    "The nodes below `node` that are run with the cell: not the insides of functions and classes."
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)): continue
        yield child
        yield from _now(child)


def _draws(call: ast.Call) -> bool:
    "Does this call put a figure on the page? plt.*, x.plot.*, anything.hist(), plot_it(), draw_it(), Image(...)."
    names, f = [], call.func
    while isinstance(f, ast.Attribute): names, f = [f.attr, *names], f.value
    root = f.id if isinstance(f, ast.Name) else ""
    if not names: return root.startswith(("plot_", "draw_", "show_image")) or root in ("plot", "draw", "Image", "SVG")
    if root == "plt": return names[0] not in ("rcParams", "style", "close", "switch_backend")
    return bool(DRAWING & set(names)) or names[-1].startswith(("plot_", "draw_", "show_image"))


def figures(nb: dict) -> list[str]:
    "Every cell that draws says in words what the figure shows: `#| fig-alt: \"...\"`."
    found = []
    for i, c in code_cells(nb):
        drawing = [n for n in _now(ast.Module(parse(c), [])) if isinstance(n, ast.Call) and _draws(n)]
        if drawing and len(alt_text(c)) < MIN_ALT:
            found.append(f"cell {i} draws ({ast.unparse(drawing[0].func)}) and has no `#| fig-alt: \"...\"` of at least {MIN_ALT} letters")
    return found + [f"cell {i} {f}" for i, s in prose_cells(nb) for f in pictures(s)]


def pictures(text: str) -> list[str]:
    "Every picture in markdown has alt text."
    text = without_code(text)
    found = [f"has a picture without alt text: {m[2]}" for m in re.finditer(r"!\[([^\]]*)\]\(([^)]*)\)", text) if not m[1].strip()]
    return found + [f"has a picture without alt text: {m.group()[:60]}" for m in re.finditer(r"<img\b[^>]*>", text)
                    if not re.search(r"\balt\s*=\s*[\"'][^\"']*\w", m.group())]


def drawn_without_alt(nb: dict) -> list[str]:
    "For an executed notebook: every cell that really put out a picture has alt text."
    return [f"cell {i} put out a picture and has no `#| fig-alt`" for i, c in code_cells(nb)
            if any(mime.startswith("image/") for o in c["outputs"] for mime in o.get("data", {})) and len(alt_text(c)) < MIN_ALT]


# ---------------------------------------------------------------- lessons

def exercises(nb: dict, lesson: str) -> list[str]:
    "Three to five exercises, each with a stub, a hint, a check and a folded solution."
    cells, found = nb["cells"], []
    all_of_them = find_exercises(cells)
    names = [x.name for x in all_of_them]
    if len(names) not in EXERCISES: found.append(f"{len(names)} exercises; a lesson has {EXERCISES[0]} to {EXERCISES[-1]}")
    found += [f"exercise {n} is there {names.count(n)} times" for n in sorted(set(names)) if names.count(n) > 1]
    for x in all_of_them:
        if x.lesson != lesson: found.append(f"exercise {x.name} says lesson={x.lesson!r}; it is {lesson!r}")
        if len(x.hint) < 10: found.append(f"exercise {x.name} has no hint")
        before = next((cells[i] for i in range(x.cell, -1, -1) if i < x.cell and cells[i]["cell_type"] == "code"), None)
        if x.name not in _defined(before or {"source": ""}) | _defined(cells[x.cell]): found.append(f"exercise {x.name} has no stub in the cell before its check")
        if not re.search(r"\b(test_\w+|assert\w*|raise)\b", cells[x.cell]["source"]): found.append(f"the check of {x.name} asserts nothing")
        if x.solution is None: found.append(f"exercise {x.name} has no solution after its check")
        elif not is_hidden(cells[x.solution]) or "code-fold: true" not in directives(cells[x.solution]):
            found.append(f"the solution of {x.name} is not folded (source_hidden, and `#| code-fold: true`)")
    return found


def _defined(cell: dict) -> set[str]:
    "Names that a cell's top level defines."
    names = set()
    for s in parse(cell):
        if isinstance(s, (ast.FunctionDef, ast.ClassDef)): names.add(s.name)
        elif isinstance(s, (ast.Import, ast.ImportFrom)): names |= {(a.asname or a.name).split(".")[0] for a in s.names}
        else: names |= {n.id for n in ast.walk(s) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return names


def records(nb: dict, lesson: str) -> list[str]:
    "A lesson records at least one number."
    calls = [n for _, c in code_cells(nb) for n in _now(ast.Module(parse(c), [])) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "record"]
    return [] if calls else ["nothing is recorded: a lesson has at least one `record(...)`"]


def words(nb: dict, lesson: str) -> list[str]:
    "A lesson explains itself."
    n = sum(len(re.findall(r"[^\W\d_]{2,}", without_code(s, inline=False))) for _, s in prose_cells(nb))
    return [] if n >= MIN_WORDS else [f"{n} words of prose; a lesson has at least {MIN_WORDS}"]


def opening(nb: dict, lesson: str | None = None) -> list[str]:
    "A notebook opens with a title and a one-line promise."
    first = nb["cells"][0]["source"] if nb["cells"] and nb["cells"][0]["cell_type"] == "markdown" else ""
    return [] if re.match(r"# \S[^\n]*\n\s*> \S", first) else ["the first cell is not `# Title`, followed by `> one line`"]


NOTEBOOK_CHECKS = [parameters, clean, valid, code_parses, imports_alone, budget, portable, figures, opening]
LESSON_CHECKS = [exercises, records, words]


# ---------------------------------------------------------------- prose: links, names, commands

FENCE = re.compile(r"^( *)(```+|~~~+)([^\n]*)\n(.*?)^\1\2[ \t]*$", re.M | re.S)

def without_code(text: str, inline: bool = True) -> str:
    "Markdown without its code blocks, and without its inline code."
    text = FENCE.sub("\n", text)
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", " ", text) if inline else text


def slugs(heading: str) -> set[str]:
    "The anchors that GitHub and Quarto make of a heading."
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    explicit = re.search(r"\{[^}]*#([\w-]+)[^}]*\}", text)
    text = re.sub(r"\{[^}]*\}", "", text).replace("`", "").strip()
    github = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
    pandoc = re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", re.sub(r"[^\w\-. ]", "", text.lower())))
    return {github, pandoc} | ({explicit[1]} if explicit else set())


def anchors(path: Path) -> set[str]:
    "What `#...` may follow the address of this file: headings, explicit ids, and names that the site documents."
    if path.suffix == ".ipynb":
        nb = read(path)
        text = "\n\n".join(s for _, s in prose_cells(nb))
        names = {n for _, c in code_cells(nb) if is_exported(c) for n in _defined(c)}
    else: text, names = path.read_text(encoding="utf-8"), set()
    text = FENCE.sub("\n", text)
    found = {s for m in re.finditer(r"^#{1,6}\s+(.+?)\s*#*$", text, re.M) for s in slugs(m[1])}
    return found | names | set(re.findall(r"\b(?:id|name)=[\"']([\w.-]+)[\"']", text))


def links(text: str, path: Path, root: Path = ROOT) -> list[str]:
    "Every link to something in the repository leads somewhere, to the anchor too."
    text, found = without_code(text), []
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+[\"'][^)]*[\"'])?\s*\)", text) + re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, re.M)
    for target in targets + re.findall(r"<(?:a|img)\b[^>]*\b(?:href|src)=[\"']([^\"']+)[\"']", text):
        if re.match(r"[a-z][a-z0-9+.-]*:", target) or target.startswith("//"): continue
        name, _, anchor = target.partition("#")
        file = path if not name else (root / name.lstrip("/") if name.startswith("/") else path.parent / name)
        if not file.exists(): found.append(f"link to {target}: there is no such file")
        elif anchor and file.suffix in (".md", ".ipynb") and anchor not in anchors(file): found.append(f"link to {target}: no heading there has this anchor")
    return found


def module_names(root: Path = ROOT) -> dict[str, set[str]]:
    "The modules of the library, with the names that each defines; read, not imported."
    found = {}
    for path in (root / "mlcourse").glob("[!_]*.py"): found[path.stem] = _defined({"source": path.read_text(encoding="utf-8")})
    return found


def code_in(text: str) -> tuple[list[tuple[str, str]], list[str]]:
    "The code blocks of markdown, with their language, and the pieces of inline code."
    blocks = [(m[3].strip().strip("{}.").split()[0] if m[3].strip() else "", m[4]) for m in FENCE.finditer(text)]
    return blocks, [m[2].strip() for m in re.finditer(r"(`+)(?!`)(.+?)(?<!`)\1(?!`)", FENCE.sub("\n", text))]


def names_in_prose(text: str, modules: dict[str, set[str]]) -> list[str]:
    "Code in the prose that names something of ours names something that exists."
    blocks, inline = code_in(text)
    found = []
    for code in [b for _, b in blocks] + inline:
        code = re.sub(r"https?://\S+|[\w./-]*/mlcourse[\w./-]*", "", code)
        for module, names in re.findall(r"from\s+mlcourse\.(\w+)\s+import\s+(\([^)]*\)|[^\n;#]+)", code):
            wanted = {re.split(r"\s+as\s+", n.strip())[0] for n in names.strip("()").replace("\n", ",").split(",")} - {"", "*"}
            if module in modules: found += [f"mlcourse.{module} has no {n}" for n in sorted(wanted - modules[module]) if n.isidentifier()]
        for module, name in re.findall(r"\bmlcourse\.([a-z]\w*)(?:\.([A-Za-z_]\w*))?", code):
            if module in ("egg", "git"): continue
            if module not in modules: found.append(f"there is no module mlcourse.{module}")
            elif name and name not in modules[module] and name not in ("py", "ipynb"): found.append(f"mlcourse.{module} has no {name}")
    return sorted(set(found))


def commands_in_prose(text: str, command, targets: set[str]) -> list[str]:
    "Commands in the prose exist: those of `mlcourse` (a click group) with their options, and the targets of the Makefile."
    blocks, inline = code_in(text)
    lines = inline + [l for lang, b in blocks if lang in ("", "sh", "bash", "console", "shell", "text") for l in b.replace("\\\n", " ").splitlines()]
    found = []
    for line in lines:
        line = re.sub(r"^\s*(\$\s+)?((?:[A-Z_]+=\S+|uv run|env)\s+)*", "", line).split("#")[0]
        tokens = line.split()
        if tokens[:1] == ["make"]:
            found += [f"`make {t}`: the Makefile has no such target" for t in tokens[1:] if re.fullmatch(r"[a-z][\w-]*", t) and t not in targets]
        if tokens[:1] != ["mlcourse"]: continue
        here, rest = command, tokens[1:]
        while rest and hasattr(here, "commands") and re.fullmatch(r"[a-z][\w-]*", rest[0]):
            if rest[0] not in here.commands:
                found.append(f"`mlcourse {rest[0]}`: there is no such command")
                break
            here, rest = here.commands[rest[0]], rest[1:]
        else:
            options = {o for p in getattr(here, "params", []) for o in (*p.opts, *p.secondary_opts)} | {"--help"}
            used = [t.split("=")[0] for t in rest if re.match(r"--[a-z]", t)]
            found += [f"`{line.strip()}`: {here.name} has no option {o}" for o in used if o not in options]
    return sorted(set(found))


def make_targets(root: Path = ROOT) -> set[str]:
    "The targets of the Makefile."
    return set(re.findall(r"^([A-Za-z][\w.-]*)\s*:(?!=)", (root / "Makefile").read_text(encoding="utf-8"), re.M))


def markdown_files(root: Path = ROOT) -> list[Path]:
    "The .md files that belong to the repository."
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "--", "*.md"], cwd=root, capture_output=True, text=True, check=True).stdout
    return sorted(root / l for l in listed.splitlines() if (root / l).is_file())


def prose(root: Path = ROOT) -> list[tuple[Path, str, str]]:
    "Every piece of prose: its file, where in it, and its text."
    cells = [(p, f"cell {i}", s) for p in notebooks(root) for i, s in prose_cells(read(p))]
    return cells + [(p, "", p.read_text(encoding="utf-8")) for p in markdown_files(root)]


# ---------------------------------------------------------------- the library

def rank(notebook: str) -> tuple[int, str]:
    "The place of a notebook (relative to nbs/) in the order of imports: its floor, and its number there."
    folder, _, name = notebook.rpartition("/")
    return (list(PARTS).index(folder) if folder in PARTS else -1, name)


def imports_point_back(sources: dict[str, str]) -> list[str]:
    "Given notebooks (relative to nbs/) with their code: imports point down, to a lower floor or to an earlier notebook of the same one."
    made_by = {m[1]: nb for nb, code in sources.items() if (m := re.search(r"^#\|\s*default_exp\s+(\w+)", code, re.M))}
    found = []
    for nb, code in sources.items():
        for tree in ast.walk(ast.parse(code)):
            names = []
            if isinstance(tree, ast.Import): names = [a.name for a in tree.names]
            elif isinstance(tree, ast.ImportFrom) and tree.module == "mlcourse": names = [f"mlcourse.{a.name}" for a in tree.names]
            elif isinstance(tree, ast.ImportFrom) and tree.module: names = [tree.module]
            for other in (made_by.get(n.split(".")[1]) for n in names if n.startswith("mlcourse.")):
                if other is None or other == nb: continue
                if nb != "index.ipynb" and rank(other) > rank(nb): found.append(f"{nb} imports {other}, which comes later")
    return found


def notebook_code(root: Path = ROOT) -> dict[str, str]:
    "The code of every notebook, as one text."
    def text(c): return "\n".join("pass" if l.lstrip().startswith(("%", "!")) else l for l in c["source"].splitlines())
    return {p.relative_to(root / "nbs").as_posix(): "\n\n".join(text(c) for _, c in code_cells(read(p)) if parse(c) or c["source"].startswith("#|"))
            for p in notebooks(root)}


def lock_in_step(settings: str, lock: str) -> list[str]:
    "The requirements of settings.ini are those that uv.lock was made from."
    from packaging.requirements import Requirement
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read_string(settings)
    extras = {k.removesuffix("_requirements"): v.split() for k, v in config["DEFAULT"].items() if k.endswith("_requirements")}
    extras["all"] = sorted({r for k, rs in extras.items() if k.startswith("week") for r in rs})
    def key(r, extra):
        r = Requirement(r)
        return re.sub(r"[-_.]+", "-", r.name).lower(), "".join(sorted(str(s) for s in r.specifier)), extra
    asked = {key(r, "") for r in config["DEFAULT"]["requirements"].split()} | {key(r, e) for e, rs in extras.items() for r in rs}
    packages = {p["name"]: p for p in tomllib.loads(lock)["package"]}
    held = {key(d["name"] + d.get("specifier", ""), m[1] if (m := re.search(r"extra == '(\w+)'", d.get("marker", ""))) else "")
            for d in packages["mlcourse"].get("metadata", {}).get("requires-dist", [])}
    def label(k): return f"{k[0]}{k[1]}" + (f" [{k[2]}]" if k[2] else "")
    return ([f"settings.ini asks for {label(k)}, and uv.lock does not: run `uv lock`" for k in sorted(asked - held)]
            + [f"uv.lock holds {label(k)}, and settings.ini does not ask for it: run `uv lock`" for k in sorted(held - asked)])


# ---------------------------------------------------------------- all of it, and the repair

def check_notebook(path: Path, root: Path = ROOT) -> list[str]:
    "All problems of one notebook."
    nb, lesson = read(path), lesson_name(path, root)
    found = [(check.__name__, p) for check in NOTEBOOK_CHECKS for p in check(nb)]
    if lesson: found += [(check.__name__, p) for check in LESSON_CHECKS for p in check(nb, lesson)]
    return [f"{name}: {p}" for name, p in found]


def tidy(path: Path) -> bool:
    "Strip what a run or an editor left in a notebook. True if the file changed."
    before = path.read_text(encoding="utf-8")
    nb = json.loads(before)
    nb["metadata"] = {k: v for k, v in nb["metadata"].items() if k in NOTEBOOK_KEYS}
    for cell in nb["cells"]:
        cell["metadata"] = {k: v for k, v in cell["metadata"].items() if k in CELL_KEYS}
        if cell["cell_type"] == "code": cell.update(outputs=[], execution_count=None)
    after = json.dumps(nb, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    if after == before: return False
    tmp = path.with_suffix(".tmp")
    tmp.write_text(after, encoding="utf-8")
    tmp.replace(path)
    return True


def main(argv: list[str] | None = None) -> int:
    "Check notebooks (1 when there are problems) or repair them."
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("paths", nargs="*", type=Path, help="notebooks; all of nbs/ when none is named")
    ap.add_argument("--fix", action="store_true", help="strip what does not belong in a commit, and check nothing")
    args = ap.parse_args(argv)
    paths = [p.resolve() for p in args.paths] or notebooks()
    if args.fix:
        for path in paths:
            if tidy(path): print(f"{path.name}: tidied")
        return 0
    problems = [f"{path.relative_to(ROOT)}: {problem}" for path in paths for problem in check_notebook(path)]
    print("\n".join(problems) or f"{len(paths)} notebooks are in order.")
    return 1 if problems else 0


if __name__ == "__main__": sys.exit(main())
