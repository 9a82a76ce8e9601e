"""What must hold for the notebooks and the repository, checked without running a kernel.

Every check takes what it looks at and returns a list of sentences, one a problem; an empty list is
a pass. `test_static.py` runs all of them on the repository, and each of them on something made up
that it must find fault with.

    python tests/checks.py          print the problems
    python tests/checks.py --fix    strip outputs, counts and metadata that belong in no commit
"""
from __future__ import annotations

import argparse, ast, json, re, statistics, subprocess, sys, tomllib
from configparser import ConfigParser
from pathlib import Path

import nbformat
from mlcourse.course import PARTS
from mlcourse.exercises import find_exercises

ROOT = Path(__file__).resolve().parent.parent
# Limits. What to aim at is lower: 60 code cells, 4 lines in the median, two or three code cells in
# a row, a thousand words.
MAX_CODE_CELLS, MAX_MEDIAN_LINES, MAX_CELLS_IN_A_ROW, MIN_WORDS = 75, 7, 4, 800
MAX_COLUMNS = 100   # as in pyproject.toml, which says it to ruff
EXERCISES = range(3, 6)
# What a reader sees of a lesson above its heading "How we know", and what the library gets of it.
READ_LINES, READ_CELLS, READ_CELL_LINES, READ_WORDS, EXPORTED_LINES = 300, 32, 25, 1_800, 250
EARLY_ANSWER = {"week2/02_qlora"}   # trains within the first five cells
CELL_KEYS, NOTEBOOK_KEYS = {"tags", "jupyter"}, {"kernelspec"}


# ---------------------------------------------------------------- notebooks

def notebooks(root: Path = ROOT) -> list[Path]:
    "All notebooks below nbs/."
    found = sorted((root / "nbs").rglob("*.ipynb"))
    return [p for p in found if not any(part[0] in "._" for part in p.relative_to(root).parts)]


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


def _plain(source: str) -> str:
    "Code whose lines of IPython do nothing."
    lines = source.splitlines()
    return "\n".join("pass" if l.lstrip().startswith(("%", "!")) else l for l in lines)


def parse(cell: dict) -> list[ast.stmt]:
    "The statements of a code cell without lines of IPython; none if the cell does not parse."
    try: return ast.parse(_plain(cell["source"])).body
    except SyntaxError: return []


def parameters(nb: dict) -> list[str]:
    "One cell is tagged `parameters`, and it begins with the tier."
    tagged = [c for c in nb["cells"] if "parameters" in c["metadata"].get("tags", [])]
    if len(tagged) != 1:
        return [f"{len(tagged)} cells are tagged `parameters`; papermill needs one to set the tier"]
    body = parse(tagged[0])
    if body and ast.unparse(body[0]) == "tier = 'auto'": return []
    return ['the parameters cell must begin with `tier = "auto"`']


def clean(nb: dict) -> list[str]:
    "Nothing of a run is left in the file."
    found = [f"cell {i} has outputs" for i, c in code_cells(nb) if c["outputs"]]
    found += [f"cell {i} has an execution count" for i, c in code_cells(nb)
              if c["execution_count"] is not None]
    places = [(f"cell {i}", set(c["metadata"]) - CELL_KEYS) for i, c in enumerate(nb["cells"])]
    places.append(("the notebook", set(nb["metadata"]) - NOTEBOOK_KEYS))
    found += [f"{where} has metadata {', '.join(sorted(odd))}" for where, odd in places if odd]
    return [f"{f}: run `make tidy`" for f in found]


def valid(nb: dict) -> list[str]:
    "The file is a notebook of a format with cell ids, and the ids differ."
    ids = [c.get("id") for c in nb["cells"]]
    if None in ids: return ["cells have no ids: it must be nbformat 4.5"]
    twice = sorted({i for i in ids if ids.count(i) > 1})
    if twice: return [f"cell id {i} is used {ids.count(i)} times" for i in twice]
    try: nbformat.validate(nbformat.from_dict(nb))
    except nbformat.ValidationError as e: return [f"not a valid notebook: {str(e).splitlines()[0]}"]
    return []


def _imports(statement: ast.stmt) -> bool:
    "Is it an import?"
    return isinstance(statement, (ast.Import, ast.ImportFrom))


def imports_alone(nb: dict) -> list[str]:
    "A cell that imports, unless exported, does nothing else: the site's builder runs it by itself."
    found = []
    for i, c in code_cells(nb):
        kinds = [_imports(s) for s in parse(c)]
        if any(kinds) and not all(kinds) and not is_exported(c):
            found.append(f"cell {i} mixes imports and other code")
    return found


def _is_boilerplate(cell: dict) -> bool:
    "Cells that a reader skips: directives only, parameters, imports, folded solutions."
    body = parse(cell)
    if "parameters" in cell["metadata"].get("tags", []) or is_hidden(cell): return True
    if not cell["source"].strip() or re.fullmatch(r"(#\|.*\n?)+", cell["source"]): return True
    return bool(body) and all(_imports(s) for s in body)


def budget(nb: dict) -> list[str]:
    "Few and short cells, with prose between them. A function of the library may be longer."
    seen, found = [c for _, c in code_cells(nb) if not _is_boilerplate(c)], []
    if len(seen) > MAX_CODE_CELLS:
        found.append(f"{len(seen)} code cells to read; the limit is {MAX_CODE_CELLS}")
    lines = [code_lines(c) for c in seen if not is_exported(c)]
    median = statistics.median(lines) if lines else 0
    if median >= MAX_MEDIAN_LINES:
        found.append(f"the median code cell has {median:g} lines; the limit is {MAX_MEDIAN_LINES}")
    row = 0
    for i, c in enumerate(nb["cells"]):
        if c["cell_type"] != "code": row = 0
        elif not _is_boilerplate(c):
            row += 1
            if row == MAX_CELLS_IN_A_ROW + 1:
                found.append(f"cell {i} is the {row}th code cell in a row without prose")
    return found


def code_parses(nb: dict) -> list[str]:
    "Every code cell is Python, but for IPython's own lines, or the other checks could not see it."
    empty = re.compile(r"(\s*(#.*)?\n?)*")
    return [f"cell {i} does not parse" for i, c in code_cells(nb)
            if not (c["source"].startswith("%%") or parse(c) or empty.fullmatch(c["source"]))]


ABSOLUTE = re.compile(r"(?<![\w.~/$}-])/(?:home|root|work|Users)/\w")

def portable(nb: dict) -> list[str]:
    "No path of one person's machine, and nothing left to do."
    found = []
    for i, c in enumerate(nb["cells"]):
        path, left = ABSOLUTE.search(c["source"]), re.search(r"\b(TODO|FIXME|XXX)\b", c["source"])
        if path: found.append(f"cell {i} names an absolute path: {path[0]}...")
        if left: found.append(f"cell {i} holds a {left[0]}")
    return found


def columns(nb: dict) -> list[str]:
    "No line of code is wider than the site shows; alternative text may be."
    return [f"cell {i}, line {n}, has {len(line)} columns; a line ends at {MAX_COLUMNS}"
            for i, c in code_cells(nb) for n, line in enumerate(c["source"].splitlines(), 1)
            if len(line) > MAX_COLUMNS and not re.match(r"#\|\s*fig-alt", line)]


def imports_in_order(nb: dict) -> list[str]:
    "The imports of a cell come in three groups: the standard library, packages, the course's own."
    def group(s):
        named = s.module or "mlcourse" if isinstance(s, ast.ImportFrom) else s.names[0].name
        name = named.split(".")[0]
        return 2 if name == "mlcourse" else 0 if name in sys.stdlib_module_names else 1
    found = []
    for i, c in code_cells(nb):
        imports = [s for s in parse(c) if _imports(s)]
        early = [a for a, b in zip(imports, imports[1:]) if group(a) > group(b)]
        found += [f"cell {i}: `{ast.unparse(s)}` comes too early: first the standard library, "
                  "then packages, then mlcourse" for s in early]
    return found


# ---------------------------------------------------------------- figures

DRAWING = {"plot", "hist", "imshow", "scatter", "bar", "barh", "boxplot", "matshow", "subplots",
           "figure"}
MIN_ALT = 20

def alt_text(cell: dict) -> str:
    "What the cell's `#| fig-alt:` says."
    said = (re.match(r"fig-alt\s*:(.*)", d) for d in directives(cell))
    return next((m[1].strip().strip("\"'") for m in said if m), "")


LATER = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)

def _now(node: ast.AST):
    "The nodes below `node` that are run with the cell: not the insides of functions and classes."
    for child in ast.iter_child_nodes(node):
        if isinstance(child, LATER): continue
        yield child
        yield from _now(child)


def _calls_now(cell: dict) -> list[ast.Call]:
    "The calls that are made when the cell runs."
    return [n for n in _now(ast.Module(parse(cell), [])) if isinstance(n, ast.Call)]


def _draws(call: ast.Call) -> bool:
    "Does this call put a figure on the page? plt.*, x.plot.*, y.hist(), plot_it(), Image(...)."
    names, f = [], call.func
    while isinstance(f, ast.Attribute): names, f = [f.attr, *names], f.value
    root = f.id if isinstance(f, ast.Name) else ""
    verbs = ("plot_", "draw_", "show_image")
    if not names: return root.startswith(verbs) or root in ("plot", "draw", "Image", "SVG")
    if root == "plt": return names[0] not in ("rcParams", "style", "close", "switch_backend")
    return bool(DRAWING & set(names)) or names[-1].startswith(verbs)


def figures(nb: dict) -> list[str]:
    "Every cell that draws says in words what the figure shows: `#| fig-alt: \"...\"`."
    found = []
    for i, c in code_cells(nb):
        drawing = [ast.unparse(n.func) for n in _calls_now(c) if _draws(n)]
        if drawing and len(alt_text(c)) < MIN_ALT:
            found.append(f"cell {i} draws ({drawing[0]}) and has no `#| fig-alt: \"...\"` "
                         f"of at least {MIN_ALT} letters")
    return found + [f"cell {i} {f}" for i, s in prose_cells(nb) for f in pictures(s)]


def pictures(text: str) -> list[str]:
    "Every picture in markdown has alt text."
    text = without_code(text)
    linked = re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", text)
    bare = [target for alt, target in linked if not alt.strip()]
    bare += [tag[:60] for tag in re.findall(r"<img\b[^>]*>", text)
             if not re.search(r"\balt\s*=\s*[\"'][^\"']*\w", tag)]
    return [f"has a picture without alt text: {b}" for b in bare]


def drawn_without_alt(nb: dict) -> list[str]:
    "For an executed notebook: every cell that really put out a picture has alt text."
    def is_picture(c):
        return any(mime.startswith("image/") for o in c["outputs"] for mime in o.get("data", {}))
    return [f"cell {i} put out a picture and has no `#| fig-alt`" for i, c in code_cells(nb)
            if is_picture(c) and len(alt_text(c)) < MIN_ALT]


# ---------------------------------------------------------------- lessons

def exercises(nb: dict, lesson: str) -> list[str]:
    "Three to five exercises, each with a stub, a hint, a check and a folded solution."
    cells, found = nb["cells"], []
    all_of_them = find_exercises(cells)
    names = [x.name for x in all_of_them]
    if len(names) not in EXERCISES:
        found.append(f"{len(names)} exercises; a lesson has {EXERCISES[0]} to {EXERCISES[-1]}")
    twice = sorted({n for n in names if names.count(n) > 1})
    found += [f"exercise {n} is there {names.count(n)} times" for n in twice]
    for x in all_of_them:
        check, earlier = cells[x.cell], [c for c in cells[:x.cell] if c["cell_type"] == "code"]
        stub = earlier[-1] if earlier else {"source": ""}
        if x.lesson != lesson:
            found.append(f"exercise {x.name} says lesson={x.lesson!r}; it is {lesson!r}")
        if len(x.hint) < 10: found.append(f"exercise {x.name} has no hint")
        if x.name not in _defined(stub) | _defined(check):
            found.append(f"exercise {x.name} has no stub in the cell before its check")
        if not re.search(r"\b(test_\w+|assert\w*|raise)\b", check["source"]):
            found.append(f"the check of {x.name} asserts nothing")
        if x.solution is None:
            found.append(f"exercise {x.name} has no solution after its check")
            continue
        solution = cells[x.solution]
        if not is_hidden(solution) or "code-fold: true" not in directives(solution):
            found.append(f"the solution of {x.name} is not folded (`#| code-fold: true`)")
    return found


def _defined(cell: dict) -> set[str]:
    "Names that a cell's top level defines."
    names = set()
    for s in parse(cell):
        if isinstance(s, (ast.FunctionDef, ast.ClassDef)): names.add(s.name)
        elif _imports(s): names |= {(a.asname or a.name).split(".")[0] for a in s.names}
        else:
            names |= {n.id for n in ast.walk(s)
                      if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return names


def records(nb: dict, lesson: str) -> list[str]:
    "A lesson records at least one number."
    called = {getattr(n.func, "id", "") for _, c in code_cells(nb) for n in _calls_now(c)}
    if "record" in called: return []
    return ["nothing is recorded: a lesson has at least one `record(...)`"]


def count_words(text: str) -> int:
    "Words of two letters and more."
    return len(re.findall(r"[^\W\d_]{2,}", text))


def words(nb: dict, lesson: str) -> list[str]:
    "A lesson explains itself."
    texts = [without_code(s, inline=False) for _, s in prose_cells(nb)]
    n = sum(map(count_words, texts))
    return [] if n >= MIN_WORDS else [f"{n} words of prose; a lesson has at least {MIN_WORDS}"]


def is_collapsed(cell: dict) -> bool:
    "Is the cell's code folded away in Jupyter and on the site?"
    folds = {"code-fold: true", "hide", "include: false", "echo: false"}
    return is_hidden(cell) and bool(folds & set(directives(cell)))


def code_lines(cell: dict) -> int:
    "Lines of code, blank ones and directives apart."
    return sum(1 for l in cell["source"].splitlines() if l.strip() and not l.startswith("#|"))


def to_read(nb: dict) -> tuple[list[tuple[int, dict]], int]:
    "The code cells that a reader sees above `## How we know`, with their indices, and the words."
    folded = (i for i, s in prose_cells(nb) if re.search(r"^## How we know", s, re.M))
    end = next(folded, len(nb["cells"]))
    shown = [(i, c) for i, c in code_cells(nb) if i < end and not is_collapsed(c) and code_lines(c)]
    texts = (s if i < end else re.split(r"^## How we know", s, flags=re.M)[0]
             for i, s in prose_cells(nb) if i <= end)
    above = [without_code(s, inline=False) for s in texts]
    return shown, sum(map(count_words, above))


def length(nb: dict, lesson: str) -> list[str]:
    "A lesson can be read in one sitting, and leaves what it teaches in the library."
    shown, n_words = to_read(nb)
    exported = sum(code_lines(c) for _, c in code_cells(nb) if is_exported(c))
    measured = ((sum(code_lines(c) for _, c in shown), READ_LINES, "visible lines of code"),
                (len(shown), READ_CELLS, "visible code cells"), (n_words, READ_WORDS, "words"),
                (exported, EXPORTED_LINES, "exported lines"))
    found = [f"{n:,} {what}; the limit is {limit:,}" for n, limit, what in measured if n > limit]
    return found + [f"cell {i} shows {code_lines(c)} lines; the limit is {READ_CELL_LINES}"
                    for i, c in shown if code_lines(c) > READ_CELL_LINES]


def first_trained_answer(nb: dict, lesson: str) -> list[str]:
    "Where a cell is tagged `first-trained-answer`, it is among the first five that a reader sees."
    at = [n for n, (_, c) in enumerate(to_read(nb)[0], 1)
          if "first-trained-answer" in c["metadata"].get("tags", [])]
    if lesson in EARLY_ANSWER and not at: return ["no cell is `first-trained-answer`"]
    return [f"the first trained answer is visible cell {n}, after the fifth" for n in at if n > 5]


def opening(nb: dict, lesson: str | None = None) -> list[str]:
    "A notebook opens with a title and a one-line promise."
    first = prose_cells(nb)[:1]
    good = first and first[0][0] == 0 and re.match(r"# \S[^\n]*\n\s*> \S", first[0][1])
    return [] if good else ["the first cell is not `# Title`, followed by `> one line`"]


NOTEBOOK_CHECKS = [parameters, clean, valid, code_parses, columns, imports_alone, imports_in_order,
                   budget, portable, figures, opening]
LESSON_CHECKS = [exercises, records, words, length, first_trained_answer]
APPENDIX_CHECKS = [records]


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
    "What `#...` may follow a file's address: headings, ids, names that the site documents."
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
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+[\"'][^)]*[\"'])?\s*\)", text)
    targets += re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, re.M)
    targets += re.findall(r"<(?:a|img)\b[^>]*\b(?:href|src)=[\"']([^\"']+)[\"']", text)
    for target in targets:
        if re.match(r"[a-z][a-z0-9+.-]*:", target) or target.startswith("//"): continue
        name, _, anchor = target.partition("#")
        base = root if name.startswith("/") else path.parent
        file = base / name.lstrip("/") if name else path
        if not file.exists(): found.append(f"link to {target}: there is no such file")
        elif anchor and file.suffix in (".md", ".ipynb") and anchor not in anchors(file):
            found.append(f"link to {target}: no heading there has this anchor")
    return found


def module_names(root: Path = ROOT) -> dict[str, set[str]]:
    "The modules of the library, with the names that each defines; read, not imported."
    return {path.stem: _defined({"source": path.read_text(encoding="utf-8")})
            for path in (root / "mlcourse").glob("[!_]*.py")}


def code_in(text: str) -> tuple[list[tuple[str, str]], list[str]]:
    "The code blocks of markdown, with their language, and the pieces of inline code."
    blocks = [((m[3].strip().strip("{}.").split() or [""])[0], m[4]) for m in FENCE.finditer(text)]
    inline = re.findall(r"(`+)(?!`)(.+?)(?<!`)\1(?!`)", FENCE.sub("\n", text))
    return blocks, [code.strip() for _, code in inline]


def names_in_prose(text: str, modules: dict[str, set[str]]) -> list[str]:
    "Code in the prose that names something of ours names something that exists."
    blocks, inline = code_in(text)
    found = []
    for code in [b for _, b in blocks] + inline:
        code = re.sub(r"https?://\S+|[\w./-]*/mlcourse[\w./-]*", "", code)
        imports = re.findall(r"from\s+mlcourse\.(\w+)\s+import\s+(\([^)]*\)|[^\n;#]+)", code)
        for module, names in imports:
            names = names.strip("()").replace("\n", ",").split(",")
            wanted = {re.split(r"\s+as\s+", n.strip())[0] for n in names}
            missing = sorted(wanted - modules.get(module, wanted))
            found += [f"mlcourse.{module} has no {n}" for n in missing if n.isidentifier()]
        for module, name in re.findall(r"\bmlcourse\.([a-z]\w*)(?:\.([A-Za-z_]\w*))?", code):
            if module in ("egg", "git"): continue
            if module not in modules: found.append(f"there is no module mlcourse.{module}")
            elif name and name not in modules[module] and name not in ("py", "ipynb"):
                found.append(f"mlcourse.{module} has no {name}")
    return sorted(set(found))


def commands_in_prose(text: str, command, targets: set[str]) -> list[str]:
    "Commands in the prose exist: those of `mlcourse` (a click group), options, make's targets."
    (blocks, lines), found = code_in(text), []
    for language, block in blocks:
        if language in ("", "sh", "bash", "console", "shell", "text"):
            lines += block.replace("\\\n", " ").splitlines()
    for line in lines:
        line = re.sub(r"^\s*(\$\s+)?((?:[A-Z_]+=\S+|uv run|env)\s+)*", "", line).split("#")[0]
        tokens = line.split()
        if tokens[:1] == ["make"]:
            found += [f"`make {t}`: the Makefile has no such target" for t in tokens[1:]
                      if re.fullmatch(r"[a-z][\w-]*", t) and t not in targets]
        if tokens[:1] != ["mlcourse"]: continue
        here, rest = command, tokens[1:]
        while rest and hasattr(here, "commands") and re.fullmatch(r"[a-z][\w-]*", rest[0]):
            if rest[0] not in here.commands:
                found.append(f"`mlcourse {rest[0]}`: there is no such command")
                break
            here, rest = here.commands[rest[0]], rest[1:]
        else:
            params = getattr(here, "params", [])
            options = {o for p in params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
            used = [t.split("=")[0] for t in rest if re.match(r"--[a-z]", t)]
            found += [f"`{line.strip()}`: {here.name} has no option {o}" for o in used
                      if o not in options]
    return sorted(set(found))


def make_targets(root: Path = ROOT) -> set[str]:
    "The targets of the Makefile."
    text = (root / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([A-Za-z][\w.-]*)\s*:(?!=)", text, re.M))


def markdown_files(root: Path = ROOT) -> list[Path]:
    "The .md files that belong to the repository."
    command = ["git", "ls-files", "-co", "--exclude-standard", "--", "*.md"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    return sorted(root / l for l in listed.splitlines() if (root / l).is_file())


def prose(root: Path = ROOT) -> list[tuple[Path, str, str]]:
    "Every piece of prose: its file, where in it, and its text."
    cells = [(p, f"cell {i}", s) for p in notebooks(root) for i, s in prose_cells(read(p))]
    return cells + [(p, "", p.read_text(encoding="utf-8")) for p in markdown_files(root)]


# ---------------------------------------------------------------- the library

def rank(notebook: str) -> tuple[int, str]:
    "The place of a notebook (relative to nbs/) in the order of imports: floor, number there."
    folder, _, name = notebook.rpartition("/")
    return (list(PARTS).index(folder) if folder in PARTS else -1, name)


def imports_point_back(sources: dict[str, str]) -> list[str]:
    """Given notebooks (relative to nbs/) with their code: imports point down, to a lower floor or
    to an earlier notebook of the same one."""
    made_by = {module: nb for nb, code in sources.items()
               for module in re.findall(r"^#\|\s*default_exp\s+(\w+)", code, re.M)}
    found = []
    for nb, code in sources.items():
        for tree in ast.walk(ast.parse(code)):
            names = []
            if isinstance(tree, ast.Import): names = [a.name for a in tree.names]
            elif isinstance(tree, ast.ImportFrom) and tree.module == "mlcourse":
                names = [f"mlcourse.{a.name}" for a in tree.names]
            elif isinstance(tree, ast.ImportFrom) and tree.module: names = [tree.module]
            for other in (made_by.get(n.split(".")[1]) for n in names if n.startswith("mlcourse.")):
                if other is None or other == nb: continue
                if nb != "index.ipynb" and rank(other) > rank(nb):
                    found.append(f"{nb} imports {other}, which comes later")
    return found


def notebook_code(root: Path = ROOT) -> dict[str, str]:
    "The code of every notebook, as one text."
    def code(path):
        cells = [c for _, c in code_cells(read(path)) if parse(c) or c["source"].startswith("#|")]
        return "\n\n".join(_plain(c["source"]) for c in cells)
    return {p.relative_to(root / "nbs").as_posix(): code(p) for p in notebooks(root)}


def lock_in_step(settings: str, lock: str) -> list[str]:
    "The requirements of settings.ini are those that uv.lock was made from."
    from packaging.requirements import Requirement
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read_string(settings)
    lists = {k.removesuffix("requirements").strip("_"): v.split()   # the core's name is empty
             for k, v in config["DEFAULT"].items() if k.endswith("requirements")}
    lists["all"] = sorted({r for k, rs in lists.items() if k.startswith("week") for r in rs})
    def key(requirement, extra):
        r = Requirement(requirement)
        limits = "".join(sorted(str(s) for s in r.specifier))
        return re.sub(r"[-_.]+", "-", r.name).lower(), limits, extra
    asked = {key(r, extra) for extra, rs in lists.items() for r in rs}
    [ours] = [p for p in tomllib.loads(lock)["package"] if p["name"] == "mlcourse"]
    held = set()
    for d in ours.get("metadata", {}).get("requires-dist", []):
        extra = re.search(r"extra == '(\w+)'", d.get("marker", ""))
        held.add(key(d["name"] + d.get("specifier", ""), extra[1] if extra else ""))
    def label(k): return f"{k[0]}{k[1]}" + (f" [{k[2]}]" if k[2] else "")
    return ([f"settings.ini asks for {label(k)}, and uv.lock does not: run `uv lock`"
             for k in sorted(asked - held)]
            + [f"uv.lock holds {label(k)}, which settings.ini does not ask for: run `uv lock`"
               for k in sorted(held - asked)])


# Decorators that hand the function to nobody.
BUILT = {"dataclass", "contextmanager", "cache", "lru_cache", "total_ordering", "property"}

def unused(sources: dict[str, dict], mentioned: str = "") -> list[str]:
    """Given notebooks by name (relative to nbs/): every public function and class of the library is
    used by another statement of the library, shown by a lesson, or named as code in the prose. A
    test of the machinery is no use; a decorator that registers is one."""
    defined, used = {}, set(re.findall(r"\w+", mentioned))
    for name, nb in sources.items():
        for _, c in code_cells(nb):
            for s in parse(c):
                words = set(re.findall(r"\w+", ast.unparse(s)))
                own = getattr(s, "name", None)
                if not is_exported(c):
                    if not re.match(r"(lib|tools)/", name): used |= words
                    continue
                used |= words - {own}
                if not isinstance(s, (ast.FunctionDef, ast.ClassDef)) or own[0] == "_": continue
                marks = {re.findall(r"\w+", ast.unparse(d))[0] for d in s.decorator_list}
                if marks <= BUILT: defined.setdefault(own, name)
        for _, text in prose_cells(nb):
            blocks, inline = code_in(text)
            used |= set(re.findall(r"\w+", " ".join([b for _, b in blocks] + inline)))
    return [f"{where}: nothing uses {name}" for name, where in defined.items() if name not in used]


def pinned(workflow: str) -> list[str]:
    "Every action of a workflow is named by the hash of a commit, with its version in a comment."
    lines = [l.strip() for l in workflow.splitlines() if re.match(r"\s*(- )?uses:", l)]
    return [f"`{l}`: name the commit by its 40 digits, and the version behind `#`" for l in lines
            if not re.fullmatch(r"(- )?uses: [\w./-]+@[0-9a-f]{40} # v\d+(\.\d+)*", l)]


def workflow(parsed: dict) -> list[str]:
    "A workflow has least rights and limits of time, and names no job or step that is not there."
    found, jobs = [], parsed["jobs"]
    if "permissions" not in parsed: found.append("nothing is said of permissions: `contents: read`")
    for name, job in jobs.items():
        needs, steps, said = job.get("needs", []), job.get("steps", []), json.dumps(job)
        if isinstance(needs, str): needs = [needs]
        ids = [s.get("id") for s in steps]
        named = re.findall(r"\bneeds\.([\w-]+)", said), re.findall(r"\bsteps\.([\w-]+)", said)
        found += [f"{name} needs {n}, which is no job" for n in needs if n not in jobs]
        found += [f"{name} names the job {n} and needs it not" for n in named[0] if n not in needs]
        found += [f"{name} names the step {n}, which it has not" for n in named[1] if n not in ids]
        if "timeout-minutes" not in job: found.append(f"{name} has no timeout-minutes")
        if any(("run" in s) == ("uses" in s) for s in steps):
            found.append(f"{name}: a step has one of `run` and `uses`")
        for script in (s["run"] for s in steps if "run" in s):
            if re.search(r"\$\{\{ *(github\.event|github\.head_ref|inputs)", script):
                found.append(f"{name}: what others write comes by an environment variable")
            plain = re.sub(r"\$\{\{.*?\}\}", "x", script)
            bash = subprocess.run(["bash", "-n"], input=plain, capture_output=True, text=True)
            if bash.returncode: found.append(f"{name}: a script is not bash: {bash.stderr.strip()}")
    return found


# ---------------------------------------------------------------- all of it, and the repair

def check_notebook(path: Path, root: Path = ROOT) -> list[str]:
    "All problems of one notebook."
    nb, lesson = read(path), lesson_name(path, root)
    found = [(check.__name__, p) for check in NOTEBOOK_CHECKS for p in check(nb)]
    if lesson:
        own = APPENDIX_CHECKS if lesson.endswith("_more") else LESSON_CHECKS
        found += [(check.__name__, p) for check in own for p in check(nb, lesson)]
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
    ap = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("paths", nargs="*", type=Path, help="notebooks; all of nbs/ when none is named")
    ap.add_argument("--fix", action="store_true", help="strip what does not belong; check nothing")
    args = ap.parse_args(argv)
    paths = [p.resolve() for p in args.paths] or notebooks()
    if args.fix:
        for path in paths:
            if tidy(path): print(f"{path.name}: tidied")
        return 0
    problems = [f"{path.relative_to(ROOT)}: {p}" for path in paths for p in check_notebook(path)]
    print("\n".join(problems) or f"{len(paths)} notebooks are in order.")
    return 1 if problems else 0


if __name__ == "__main__": sys.exit(main())
